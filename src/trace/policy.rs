//! What is done with trace headers.

use super::bridge::Bridge;
use super::formats::Format;
use super::w3c::Invalid;
use crate::http::{HeaderId, HeaderNames, Request};
use crate::units::Fraction;

/// The `trace` block.
#[derive(Debug)]
pub struct Trace {
    pub edge: Edge,
    /// What is known of the formats: first those that are extracted, in their order, then the others.
    pub(super) formats: Vec<Recognised>,
    /// New traces are sampled from this value of their 56 random bits on.
    pub(super) threshold: u64,
    /// The share of new traces that are sampled. A caller's decision is respected.
    pub sampling: Fraction,
    /// What makes a request sampled whatever was decided.
    pub(crate) force: Force,
    /// Our own key in `tracestate`.
    pub(super) mark: Option<Box<str>>,
    pub(super) tracestate_allow: Option<Box<[Box<str>]>>,
    pub(super) baggage_allow: Option<Box<[Box<str>]>>,
    pub(super) baggage: HeaderId,
    pub(super) request_id: HeaderId,
    /// What untrusted callers must not send, besides the headers of the formats.
    pub(super) untrusted: Vec<(&'static str, HeaderId)>,
    /// Where requests come from; `None`: as the listener says.
    pub(super) direction: Option<Direction>,
    pub(super) response: Response,
    /// What is left for access logs and later filters.
    pub filter_state: FilterState,
    pub(super) bridge: Option<Bridge>,
}

/// What makes a request sampled, whatever was decided for its trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Force {
    /// A fault was injected.
    pub fault: bool,
    /// A rate limit refused it, or would have, were it not in shadow.
    pub rate_limit: bool,
    /// It would have gone to a canary that was rolled back.
    pub rollback: bool,
}

/// A format whose headers never pass unread.
#[derive(Debug)]
pub(super) struct Recognised {
    pub(super) format: Format,
    pub(super) extracted: bool,
    pub(super) injected: bool,
    /// In the order of [`Format::headers`].
    pub(super) ids: Vec<HeaderId>,
}

/// What is done with the context that a request arrives with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// A valid context goes on.
    Continue,
    /// Every request starts a new trace, unless it leaves outbound.
    Restart,
    /// As [`Edge::Restart`], unless our own key is in `tracestate`.
    RestartExternal,
    /// Trace headers are left as they are.
    Ignore,
    /// What an earlier filter of the same request has left in filter state is written, whatever the headers say.
    Restore,
}

/// On which side of the application a request passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the application.
    Inbound,
    /// From the application.
    Outbound,
    /// There is no application behind: a gateway.
    Neither,
}

/// Which response header tells the client its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    None,
    ServerTiming,
    Traceresponse,
}

impl Trace {
    /// The direction, or `None` where the listener has to be asked, which costs more than all else that a trace needs:
    /// nothing is asked where the policy is the same either way.
    pub(super) fn known_direction(&self) -> Option<Direction> {
        let matters = self.bridge.is_some()
            || matches!(self.edge, Edge::Restart | Edge::RestartExternal)
            || self.tracestate_allow.is_some()
            || self.baggage_allow.is_some()
            || self.response != Response::None;
        self.direction.or((!matters).then_some(Direction::Neither))
    }
}

impl Direction {
    /// From Envoy's `listener_direction`: a 64-bit number, little-endian.
    pub(super) fn from_property(value: Option<&[u8]>) -> Direction {
        match value.and_then(<[u8]>::first) {
            Some(1) => Direction::Inbound,
            Some(2) => Direction::Outbound,
            _ => Direction::Neither,
        }
    }
}

impl Recognised {
    pub(super) fn intern(format: Format, names: &mut HeaderNames) -> Option<Recognised> {
        let ids: Option<Vec<_>> = format.headers().iter().map(|name| names.intern(name)).collect();
        Some(Recognised { format, extracted: false, injected: false, ids: ids? })
    }

    /// The value of the header at `place`.
    pub(super) fn read<'a>(&self, request: &Request<'a>, place: usize) -> Result<Option<&'a [u8]>, Invalid> {
        let Some(id) = self.ids.get(place) else { return Ok(None) };
        if request.count(*id) > 1 { Err(Invalid::Duplicate) } else { Ok(request.first(*id)) }
    }
}

/// What is left in filter state. Each costs a call to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterState {
    pub trace_id: bool,
    pub context: bool,
}
