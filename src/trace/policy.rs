//! What is done with trace headers.

use super::bridge::Bridge;
use super::formats::TraceFormat;
use super::w3c::InvalidContext;
use crate::http::{HeaderId, HeaderNames, Request};
use crate::units::Fraction;

/// The `trace` block.
#[derive(Debug)]
pub struct TracePolicy {
    pub edge: EdgeMode,
    /// What is known of the formats: first those that are extracted, in their order, then the others.
    pub(super) formats: Vec<ConfiguredFormat>,
    /// New traces are sampled from this value of their 56 random bits on.
    pub(super) threshold: u64,
    /// The share of new traces that are sampled. A caller's decision is respected.
    pub sampling: Fraction,
    /// What makes a request sampled whatever was decided.
    pub(crate) force: ForcedSampling,
    /// Our own key in `tracestate`.
    pub(super) tracestate_key: Option<Box<str>>,
    pub(super) tracestate_allow: Option<Box<[Box<str>]>>,
    pub(super) baggage_allow: Option<Box<[Box<str>]>>,
    pub(super) baggage: HeaderId,
    pub(super) request_id: HeaderId,
    /// What untrusted callers must not send, besides the headers of the formats.
    pub(super) untrusted_headers: Vec<(&'static str, HeaderId)>,
    /// Where requests come from; `None`: as the listener says.
    pub(super) direction: Option<TrafficDirection>,
    pub(super) response: ResponseHeader,
    /// What is left for access logs and later filters.
    pub filter_state: FilterStateFields,
    pub(super) bridge: Option<Bridge>,
}

/// What makes a request sampled, whatever was decided for its trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForcedSampling {
    /// A fault was injected.
    pub fault: bool,
    /// A rate limit refused it, or would have, were it not in shadow.
    pub rate_limit: bool,
    /// It would have gone to a canary that was rolled back.
    pub rollback: bool,
}

/// A format whose headers never pass unread.
#[derive(Debug)]
pub(super) struct ConfiguredFormat {
    pub(super) format: TraceFormat,
    pub(super) extracted: bool,
    pub(super) injected: bool,
    /// In the order of [`TraceFormat::headers`].
    pub(super) header_ids: Vec<HeaderId>,
}

/// What is done with the context that a request arrives with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EdgeMode {
    /// A valid context goes on.
    Continue,
    /// Every request starts a new trace, unless it leaves outbound.
    Restart,
    /// As [`EdgeMode::Restart`], unless our own key is in `tracestate`.
    RestartExternal,
    /// Trace headers are left as they are.
    Ignore,
    /// What an earlier filter of the same request has left in filter state is written, whatever the headers say.
    Restore,
}

/// On which side of the application a request passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrafficDirection {
    /// To the application.
    Inbound,
    /// From the application.
    Outbound,
    /// There is no application behind: a gateway.
    Unspecified,
}

/// Which response header tells the client its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseHeader {
    None,
    ServerTiming,
    Traceresponse,
}

impl TracePolicy {
    /// The direction, or `None` where the listener has to be asked, which costs more than all else that a trace needs:
    /// nothing is asked where the policy is the same either way.
    pub(super) fn fixed_direction(&self) -> Option<TrafficDirection> {
        let matters = self.bridge.is_some()
            || matches!(self.edge, EdgeMode::Restart | EdgeMode::RestartExternal)
            || self.tracestate_allow.is_some()
            || self.baggage_allow.is_some()
            || self.response != ResponseHeader::None;
        self.direction.or((!matters).then_some(TrafficDirection::Unspecified))
    }
}

impl TrafficDirection {
    /// From Envoy's `listener_direction`: a 64-bit number, little-endian.
    pub(super) fn from_property(value: Option<&[u8]>) -> TrafficDirection {
        match value.and_then(<[u8]>::first) {
            Some(1) => TrafficDirection::Inbound,
            Some(2) => TrafficDirection::Outbound,
            _ => TrafficDirection::Unspecified,
        }
    }
}

impl ConfiguredFormat {
    pub(super) fn intern(format: TraceFormat, names: &mut HeaderNames) -> Option<ConfiguredFormat> {
        let header_ids: Option<Vec<_>> = format.headers().iter().map(|name| names.intern(name)).collect();
        Some(ConfiguredFormat { format, extracted: false, injected: false, header_ids: header_ids? })
    }

    /// The value of the header at `index` in [`TraceFormat::headers`].
    pub(super) fn read<'a>(&self, request: &Request<'a>, index: usize) -> Result<Option<&'a [u8]>, InvalidContext> {
        let Some(id) = self.header_ids.get(index) else { return Ok(None) };
        if request.count(*id) > 1 { Err(InvalidContext::Duplicate) } else { Ok(request.first(*id)) }
    }
}

/// What is left in filter state. Each costs a call to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterStateFields {
    pub trace_id: bool,
    pub context: bool,
}
