//! Where one request stands in its trace, and what the next hop is told.

use super::baggage;
use super::bridge::StoredContext;
use super::events::{TraceEvent, TraceEvents};
use super::filter_state::RetainedHeaders;
use super::formats::TraceFormat;
use super::policy::{ConfiguredFormat, EdgeMode, ResponseHeader, TracePolicy, TrafficDirection};
use super::tracestate::{TracestateEdit, has_member, is_tracestate, rewrite};
use super::w3c::{InvalidContext, TraceContext, TraceFlags, format_traceparent, parse_traceparent};
use crate::bytes::is_same;
use crate::http::{HeaderId, HeaderMutation, HeaderNames, Request};
use crate::units::Fraction;
use std::borrow::Cow;

/// What a request arrived with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extraction {
    Valid,
    Missing,
    Invalid(InvalidContext),
    /// In filter state: an earlier filter has decided.
    Restored,
}

/// What a request goes on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PropagatedContext {
    pub extraction: Extraction,
    /// The format of the context that arrived.
    pub format: Option<TraceFormat>,
    /// Whether the trace began here.
    pub is_root: bool,
    /// Whether the sampling decision was made here, because no earlier hop has made one.
    pub is_sampled_here: bool,
    pub context: TraceContext,
    pub(super) direction: TrafficDirection,
    pub(super) events: TraceEvents,
    tracestate: TracestateSource,
    /// The threshold by which the trace was sampled here.
    threshold: Option<u64>,
    is_forced: bool,
    stored: Option<StoredContext>,
    /// Where an earlier filter has decided: the headers that it wrote with more in them than the context.
    retained: RetainedHeaders,
}

/// Where the request's `tracestate` comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum TracestateSource {
    /// As it arrived.
    Request,
    /// From nowhere: there is none.
    Absent,
    /// From what was stored.
    Stored(Vec<u8>),
}

/// What the headers of all formats together say.
struct ExtractedContext {
    extraction: Extraction,
    format: Option<TraceFormat>,
    context: Option<TraceContext>,
    /// A decision that came without ids.
    decision: Option<TraceFlags>,
}

/// The 56 bits of a trace id that are random and that samplers go by.
const RANDOM_BITS: u64 = (1 << 56) - 1;

/// The least value of the random bits with which `share` of all traces are sampled, exact to 2^-50.
pub(super) fn rejection_threshold(share: Fraction) -> u64 {
    // A millionth of 2^56 is 2^50 / 15625. Taken in two steps, because the product does not fit.
    let ppm = u64::from(share.ppm());
    (1 << 56) - (((ppm / 15_625) << 50) + ((ppm % 15_625) << 50) / 15_625)
}

impl TracePolicy {
    /// Reads the request's context, and continues it or begins a new trace; `random` draws the new ids. `lookup` is
    /// asked what is stored for a request that leaves with this context, or with none. `None` where the policy
    /// leaves trace headers alone.
    pub(super) fn propagate(
        &self,
        request: &Request<'_>,
        direction: TrafficDirection,
        random: &mut dyn FnMut() -> u64,
        lookup: &mut dyn FnMut(Option<&TraceContext>) -> Option<StoredContext>,
    ) -> Option<PropagatedContext> {
        if matches!(self.edge, EdgeMode::Ignore | EdgeMode::Restore) {
            return None;
        }
        let extracted = self.extract(request);
        let mut events = TraceEvents::default();
        let restarts = match self.edge {
            _ if direction == TrafficDirection::Outbound => false,
            EdgeMode::Restart => true,
            EdgeMode::RestartExternal => !self.has_tracestate_key(request),
            EdgeMode::Continue | EdgeMode::Ignore | EdgeMode::Restore => false,
        };
        events.add_if(restarts, TraceEvent::Restarted);
        let inbound = extracted.context.filter(|_| !restarts);
        let mut stored = if direction == TrafficDirection::Outbound { lookup(inbound.as_ref()) } else { None };

        // What arrived valid is never overruled, only completed.
        let known = match (inbound, &stored) {
            (Some(context), Some(stored)) => Some(stored.complete(context, &mut events)),
            (None, Some(stored)) => {
                events.add(TraceEvent::Bridged);
                Some(stored.context)
            }
            (inbound, None) => inbound,
        };
        let parent_id = random().max(1).to_be_bytes();
        let mut context = match known {
            Some(known) => TraceContext { parent_id, ..known },
            None => {
                let low = random().max(1);
                let trace_id = ((u128::from(random()) << 64) | u128::from(low)).to_be_bytes();
                let decision = extracted.decision.filter(|_| !restarts).unwrap_or(TraceFlags::DEFERRED);
                TraceContext { trace_id, parent_id, flags: decision.with(TraceFlags::RANDOM) }
            }
        };
        let mut threshold = None;
        let is_sampled_here = context.flags.contains(TraceFlags::DEFERRED);
        if is_sampled_here {
            let (sampled, by) = self.decide_sampling(request, &context, restarts);
            context.flags = context.flags.without(TraceFlags::DEFERRED).with(TraceFlags::decided(Some(sampled)));
            threshold = by.filter(|_| sampled);
        }

        let mut tracestate = TracestateSource::Absent;
        if let Some(inbound) = inbound
            && request.has(HeaderNames::TRACESTATE)
        {
            // A list belongs to the traceparent beside it, and only by it to a context in another format.
            let belongs = extracted.format == Some(TraceFormat::TraceContext)
                || extract_traceparent(request)
                    .ok()
                    .flatten()
                    .is_some_and(|beside| beside.trace_id == inbound.trace_id);
            let is_valid = belongs && is_tracestate(request.values(HeaderNames::TRACESTATE));
            events.add_if(belongs && !is_valid, TraceEvent::InvalidTracestate);
            if is_valid {
                tracestate = TracestateSource::Request;
            }
        }
        if tracestate == TracestateSource::Absent
            && let Some(list) = stored.as_mut().and_then(|stored| stored.tracestate.take())
        {
            events.add_if(inbound.is_some(), TraceEvent::Repaired);
            tracestate = TracestateSource::Stored(list);
        }
        let is_converted = inbound.is_some()
            && self
                .formats
                .iter()
                .any(|configured| Some(configured.format) == extracted.format && !configured.injected);
        events.add_if(is_converted, TraceEvent::Converted);
        Some(PropagatedContext {
            extraction: extracted.extraction,
            format: extracted.format,
            is_root: known.is_none(),
            is_sampled_here,
            context,
            direction,
            events,
            tracestate,
            threshold,
            is_forced: false,
            stored,
            retained: RetainedHeaders::default(),
        })
    }

    /// The first valid context in the configured order. One that is invalid takes nothing from a later one.
    fn extract(&self, request: &Request<'_>) -> ExtractedContext {
        let mut extracted =
            ExtractedContext { extraction: Extraction::Missing, format: None, context: None, decision: None };
        for configured in self.formats.iter().filter(|configured| configured.extracted) {
            match configured.format.parse(&|index| configured.read(request, index)) {
                Ok(Some(context)) if context.trace_id == [0; 16] => {
                    extracted.decision = extracted.decision.or(Some(context.flags));
                }
                Ok(Some(context)) => {
                    let (extraction, format) = (Extraction::Valid, Some(configured.format));
                    return ExtractedContext { extraction, format, context: Some(context), decision: None };
                }
                Err(invalid) if extracted.extraction == Extraction::Missing => {
                    extracted.extraction = Extraction::Invalid(invalid)
                }
                _ => {}
            }
        }
        extracted
    }

    /// Whether the caller is one of ours.
    fn has_tracestate_key(&self, request: &Request<'_>) -> bool {
        let values = || request.values(HeaderNames::TRACESTATE);
        self.tracestate_key.as_ref().is_some_and(|own| is_tracestate(values()) && has_member(values(), own))
    }

    /// Decides whether a trace without a decision is sampled, and by which threshold.
    fn decide_sampling(&self, request: &Request<'_>, context: &TraceContext, restarts: bool) -> (bool, Option<u64>) {
        // Envoy writes into its request id why it traces a request: sampled, forced here, forced by the client. Such
        // a trace has no known probability.
        const REASON: usize = 14;
        let id = request.first(self.request_id).filter(|id| id.len() == 36 && !restarts);
        if id.and_then(|id| id.get(REASON)).is_some_and(|reason| matches!(reason, b'9' | b'a' | b'b')) {
            return (true, None);
        }
        // Consistent probability sampling (OpenTelemetry, "TraceState: Probability Sampling"): the random bits decide,
        // the highest values are retained, so that samplers further on agree.
        let (_, low) = context.trace_id.split_at(8);
        let randomness = low.iter().fold(0, |bits, byte| bits << 8 | u64::from(*byte)) & RANDOM_BITS;
        (randomness >= self.threshold, Some(self.threshold))
    }
}

impl PropagatedContext {
    /// What goes on as it was decided before.
    pub(super) fn from_filter_state(
        context: TraceContext,
        tracestate: Option<&[u8]>,
        retained: RetainedHeaders,
    ) -> PropagatedContext {
        PropagatedContext {
            extraction: Extraction::Restored,
            format: None,
            is_root: false,
            is_sampled_here: false,
            context,
            direction: TrafficDirection::Unspecified,
            events: TraceEvents::default(),
            tracestate: tracestate.map_or(TracestateSource::Absent, |list| TracestateSource::Stored(list.to_vec())),
            threshold: None,
            is_forced: false,
            stored: None,
            retained,
        }
    }

    /// Whether the policy forced the sampling decision (`sampling.force`).
    pub fn is_forced(&self) -> bool {
        self.is_forced
    }

    /// Samples the trace whatever was decided. The probability of that is unknown, so the threshold is removed.
    pub(crate) fn force_sampling(&mut self) {
        self.context.flags = self.context.flags.with(TraceFlags::SAMPLED);
        self.threshold = None;
        self.is_forced = true;
    }

    /// The header `id` as it was stored for a request that leaves, if the bridge of `trace` carries it.
    pub(super) fn stored_header(&self, trace: &TracePolicy, id: HeaderId) -> Option<&[u8]> {
        let index = trace.bridge.as_ref()?.carry.iter().position(|(_, carried)| *carried == id)?;
        self.stored.as_ref()?.carried.get(index)?.as_deref()
    }

    /// The header changes that tell the next hop.
    pub(super) fn inject<'p>(
        &mut self,
        trace: &'p TracePolicy,
        request: &Request<'p>,
        mutations: &mut Vec<HeaderMutation<'p>>,
    ) {
        let restarted = self.events.contains(TraceEvent::Restarted);
        for configured in &trace.formats {
            self.inject_format(configured, request, restarted, mutations);
        }
        self.inject_tracestate(trace, request, mutations);

        let allow = trace.baggage_allow.as_deref().filter(|_| self.direction != TrafficDirection::Inbound);
        if let Some(allow) = if restarted { Some(&[][..]) } else { allow } {
            mutations.extend(baggage::per_key_headers(request, allow).map(HeaderMutation::Remove));
        }
        if restarted {
            let sent = trace.untrusted_headers.iter().filter(|(_, id)| request.has(*id));
            mutations.extend(sent.map(|(name, _)| HeaderMutation::Remove(name)));
            return;
        }
        if request.has(trace.baggage) {
            let (list, cut) = baggage::enforce_limits(&mut request.values(trace.baggage), allow);
            self.events.add_if(cut, TraceEvent::Truncated);
            if let Some(list) = list {
                mutations.push(set_or_remove("baggage", list));
            }
        }
        let (Some(bridge), Some(stored)) = (&trace.bridge, &mut self.stored) else { return };
        for ((name, id), value) in bridge.carry.iter().zip(&mut stored.carried) {
            let Some(mut value) = value.take().filter(|_| !request.has(*id)) else { continue };
            if *id == trace.baggage
                && let (Some(list), _) = baggage::enforce_limits(&mut std::iter::once(value.as_slice()), allow)
            {
                value = list;
            }
            // A header that this request was given meanwhile is newer.
            if !value.is_empty() && !mutations.iter().any(|mutation| mutation.name() == &**name) {
                self.events.add(if self.events.contains(TraceEvent::Bridged) {
                    TraceEvent::Bridged
                } else {
                    TraceEvent::Repaired
                });
                mutations.push(HeaderMutation::Set(name, Cow::Owned(value)));
            }
        }
    }

    /// Writes a format, or removes it: a header that says something else must not stay.
    fn inject_format<'p>(
        &self,
        configured: &'p ConfiguredFormat,
        request: &Request<'_>,
        restarted: bool,
        mutations: &mut Vec<HeaderMutation<'p>>,
    ) {
        let headers = configured.format.headers();
        let mut written = 0_u8;
        if configured.injected {
            let sent = |index| if restarted { Ok(None) } else { configured.read(request, index) };
            let kept = |index| {
                if self.retained.has(configured.format) { Ok(self.retained.get(headers, index)) } else { sent(index) }
            };
            configured.format.write(&self.context, &kept, &mut |index, value| {
                written |= 1 << index;
                if let Some(name) = headers.get(index)
                    && !sent(index).is_ok_and(|sent| sent.is_some_and(|sent| is_same(sent, &value)))
                {
                    mutations.push(HeaderMutation::Set(name, Cow::Owned(value)));
                }
            });
        }
        for (index, (name, id)) in headers.iter().zip(&configured.header_ids).enumerate() {
            if written & 1 << index == 0 && request.has(*id) {
                mutations.push(HeaderMutation::Remove(name));
            }
        }
    }

    fn inject_tracestate<'p>(
        &mut self,
        trace: &'p TracePolicy,
        request: &Request<'_>,
        mutations: &mut Vec<HeaderMutation<'p>>,
    ) {
        const NAME: &str = "tracestate";
        let Some(configured) = trace.formats.iter().find(|configured| configured.format == TraceFormat::TraceContext)
        else {
            return;
        };
        let has = request.has(HeaderNames::TRACESTATE);
        let edit = TracestateEdit {
            allow: trace.tracestate_allow.as_deref().filter(|_| self.direction != TrafficDirection::Inbound),
            tracestate_key: trace.tracestate_key.as_deref(),
            threshold: self.threshold,
            erase_threshold: self.is_forced,
        };
        let is_edited =
            edit.allow.is_some() || edit.tracestate_key.is_some() || edit.threshold.is_some() || edit.erase_threshold;
        if !configured.injected || (self.tracestate == TracestateSource::Absent && !is_edited) {
            if has {
                mutations.push(HeaderMutation::Remove(NAME));
            }
            return;
        }
        if self.tracestate == TracestateSource::Request && !is_edited {
            return;
        }
        let (list, cut) = match &self.tracestate {
            TracestateSource::Request => rewrite(&mut request.values(HeaderNames::TRACESTATE), &edit),
            TracestateSource::Stored(list) => rewrite(&mut std::iter::once(list.as_slice()), &edit),
            TracestateSource::Absent => rewrite(&mut std::iter::empty(), &edit),
        };
        self.events.add_if(cut, TraceEvent::Truncated);
        let unchanged = request.count(HeaderNames::TRACESTATE) == 1
            && request.first(HeaderNames::TRACESTATE) == Some(list.as_slice());
        if !unchanged && (has || !list.is_empty()) {
            mutations.push(set_or_remove(NAME, list));
        }
    }

    /// The response header that tells the client its trace.
    pub(super) fn response_header(context: &TraceContext, response: ResponseHeader) -> Option<HeaderMutation<'static>> {
        let traceparent = format_traceparent(context);
        match response {
            ResponseHeader::None => None,
            ResponseHeader::Traceresponse => Some(HeaderMutation::Set("traceresponse", Cow::Owned(traceparent))),
            // A list, in which the upstream may have its own metrics.
            ResponseHeader::ServerTiming => {
                let value = [b"trace;desc=", traceparent.as_slice()].concat();
                Some(HeaderMutation::Add("server-timing", Cow::Owned(value)))
            }
        }
    }
}

fn set_or_remove(name: &'static str, value: Vec<u8>) -> HeaderMutation<'static> {
    if value.is_empty() { HeaderMutation::Remove(name) } else { HeaderMutation::Set(name, Cow::Owned(value)) }
}

/// The context in a request's `traceparent`, whatever is done with it.
///
/// # Errors
/// Why its `traceparent` cannot be used.
pub fn extract_traceparent(request: &Request<'_>) -> Result<Option<TraceContext>, InvalidContext> {
    if request.count(HeaderNames::TRACEPARENT) > 1 {
        return Err(InvalidContext::Duplicate);
    }
    request.first(HeaderNames::TRACEPARENT).map(parse_traceparent).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::{Node, Value};
    use crate::http::encode_headers;
    use proptest::prelude::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const INBOUND: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const B3: (&str, &str) = ("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1");

    type Headers = Vec<(String, String)>;

    fn propagate_with(
        trace: &str,
        direction: TrafficDirection,
        forced: bool,
        headers: &[(&str, &str)],
    ) -> (Headers, PropagatedContext) {
        let mut names = HeaderNames::default();
        let node = Node::from_json(trace.as_bytes()).unwrap();
        let report = Report::default();
        let trace = TracePolicy::read(&Value::root(&node, &report), "t/", &mut names).unwrap();
        assert_eq!(report.into_diagnostics(), []);
        let block = encode_headers(headers);
        let request = Request::parse(&block, &names);
        let mut state = 42;
        let mut random = || crate::random::split_mix(&mut state);
        let mut propagated = trace.propagate(&request, direction, &mut random, &mut |_| None).unwrap();
        if forced {
            propagated.force_sampling();
        }
        let mut mutations = Vec::new();
        propagated.inject(&trace, &request, &mut mutations);
        let mut after: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect();
        mutations.iter().for_each(|mutation| mutation.apply(&mut after));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (after.into_iter().map(|(name, value)| (text(name), text(value))).collect(), propagated)
    }

    fn headers_after(trace: &str, headers: &[(&str, &str)]) -> Headers {
        propagate_with(trace, TrafficDirection::Unspecified, false, headers).0
    }

    fn value<'h>(headers: &'h Headers, name: &str) -> Option<&'h str> {
        let mut values = headers.iter().filter(|(found, _)| found == name).map(|(_, value)| value.as_str());
        let first = values.next();
        assert_eq!(values.next(), None, "{name} twice");
        first
    }

    #[test]
    fn formats_are_tried_in_order_and_the_first_valid_one_wins() {
        let policy = r#"{"extract": ["tracecontext", "b3", "b3multi"]}"#;
        let multi = [("x-b3-traceid", "1111111111111111"), ("x-b3-spanid", "2222222222222222")];
        let after = headers_after(policy, &[("traceparent", "00-bad"), ("b3", "nonsense"), multi[0], multi[1]]);
        assert_eq!(value(&after, "traceparent").unwrap()[..36], *"00-00000000000000001111111111111111-");
        for removed in ["b3", "x-b3-traceid", "x-b3-spanid"] {
            assert_eq!(value(&after, removed), None, "{removed} would disagree");
        }
        let (_, propagated) = propagate_with(
            policy,
            TrafficDirection::Unspecified,
            false,
            &[("traceparent", INBOUND), multi[0], multi[1]],
        );
        assert_eq!((propagated.extraction, propagated.format), (Extraction::Valid, Some(TraceFormat::TraceContext)));
        let (_, propagated) = propagate_with(policy, TrafficDirection::Unspecified, false, &[("b3", "nonsense")]);
        assert_eq!(propagated.extraction, Extraction::Invalid(InvalidContext::Shape));
    }

    #[test]
    fn all_injected_formats_say_the_same() {
        let policy = r#"{"extract": ["b3"], "inject": ["tracecontext", "b3", "b3multi", "jaeger", "xray", "gcp", "datadog",
            "ottrace", "grpc"]}"#;
        let (after, propagated) = propagate_with(
            policy,
            TrafficDirection::Unspecified,
            false,
            &[B3, ("x-b3-parentspanid", "1"), ("x-b3-flags", "1")],
        );
        assert!(!propagated.events.contains(TraceEvent::Converted));
        let mut names = HeaderNames::default();
        for (name, format) in TraceFormat::ALL {
            let configured = ConfiguredFormat::intern(format, &mut names).unwrap();
            let block = encode_headers(&after);
            let request = Request::parse(&block, &names);
            let parsed = format.parse(&|index| configured.read(&request, index)).unwrap().unwrap();
            assert_eq!(parsed.parent_id, propagated.context.parent_id, "{name}");
            assert_eq!(parsed.trace_id[8..], propagated.context.trace_id[8..], "{name}");
            assert!(parsed.flags.sampled(), "{name}");
        }
        assert_eq!(value(&after, "x-b3-parentspanid"), None);
        assert_eq!(value(&after, "x-b3-flags"), None);
    }

    #[test]
    fn a_tracestate_stays_with_its_traceparent() {
        let policy = r#"{"extract": ["b3", "tracecontext"]}"#;
        let after = headers_after(policy, &[B3, ("traceparent", INBOUND), ("tracestate", "a=1")]);
        assert_eq!(value(&after, "tracestate"), Some("a=1"), "the same trace in both formats");
        let other = INBOUND.replace("4bf", "5bf");
        let after = headers_after(policy, &[B3, ("traceparent", &other), ("tracestate", "a=1")]);
        assert_eq!(value(&after, "tracestate"), None);
        let after = headers_after(r#"{"inject": ["b3"]}"#, &[("traceparent", INBOUND), ("tracestate", "a=1")]);
        assert_eq!((value(&after, "tracestate"), value(&after, "traceparent")), (None, None));
        assert_eq!(value(&after, "b3").unwrap()[..33], *format!("{TRACE}-"));
    }

    #[test]
    fn a_caller_may_leave_the_decision_to_us() {
        let undecided = ("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7");
        for (percentage, flags) in [("0%", "00"), ("100%", "01")] {
            let policy = format!(r#"{{"extract": ["b3"], "sampling": {{"percentage": "{percentage}"}}}}"#);
            assert_eq!(value(&headers_after(&policy, &[undecided]), "traceparent").unwrap()[53..], *flags);
        }
        let denied = headers_after(r#"{"extract": ["b3"], "sampling": {"percentage": "100%"}}"#, &[("b3", "0")]);
        assert_eq!(value(&denied, "traceparent").unwrap()[53..], *"02", "a decision without ids begins a trace");
    }

    #[test]
    fn a_new_trace_says_how_it_was_sampled() {
        let after = headers_after(r#"{"sampling": {"percentage": "100%"}}"#, &[("tracestate", "a=1")]);
        assert_eq!(value(&after, "tracestate"), Some("ot=th:0"));
        assert_eq!(value(&after, "traceparent").unwrap()[53..], *"03");
        let after = headers_after(r#"{"sampling": {"percentage": "0%"}}"#, &[("tracestate", "a=1")]);
        assert_eq!(value(&after, "tracestate"), None);
        assert_eq!(rejection_threshold(Fraction::from_ppm(500_000)), 0x80_0000_0000_0000);
        assert_eq!(rejection_threshold(Fraction::from_ppm(250_000)), 0xc0_0000_0000_0000);
        assert_eq!(rejection_threshold(Fraction::NONE), 1 << 56);
        assert_eq!(rejection_threshold(Fraction::WHOLE), 0);
    }

    #[test]
    fn a_forced_decision_has_no_threshold() {
        let headers =
            [("traceparent", &*INBOUND.replace("-01", "-00")), ("tracestate", "a=1,ot=th:c;rv:0123456789abcd")];
        let (after, _) = propagate_with("{}", TrafficDirection::Unspecified, true, &headers);
        assert_eq!(value(&after, "tracestate"), Some("ot=rv:0123456789abcd,a=1"));
        assert_eq!(value(&after, "traceparent").unwrap()[53..], *"01");
        let (after, _) =
            propagate_with(r#"{"sampling": {"percentage": "100%"}}"#, TrafficDirection::Unspecified, true, &[]);
        assert_eq!(value(&after, "tracestate"), None);
    }

    #[test]
    fn envoys_reason_in_the_request_id_is_honoured() {
        let id = |reason: &str| format!("a6f8a1b2-0c1d-{reason}234-9abc-0123456789ab");
        for (reason, flags) in [("4", "02"), ("9", "03"), ("a", "03"), ("b", "03")] {
            let id = id(reason);
            let headers = [("x-request-id", id.as_str())];
            let after = headers_after(r#"{"sampling": {"percentage": "0%"}}"#, &headers);
            assert_eq!(value(&after, "traceparent").unwrap()[53..], *flags, "{reason}");
            assert_eq!(value(&after, "tracestate"), None, "no threshold is known");
            let after = headers_after(r#"{"edge": "restart", "sampling": {"percentage": "0%"}}"#, &headers);
            assert_eq!(value(&after, "traceparent").unwrap()[53..], *"02", "a stranger forces nothing");
        }
    }

    #[test]
    fn a_restarting_edge_lets_nothing_of_the_caller_through() {
        let headers = [
            ("traceparent", INBOUND),
            ("tracestate", "a=1"),
            ("x-b3-flags", "1"),
            B3,
            ("uber-trace-id", "1:2:0:3"),
            ("baggage", "tenant=evil"),
            ("uberctx-tenant", "evil"),
            ("ot-baggage-tenant", "evil"),
            ("ot-baggage-tenant", "twice"),
            ("jaeger-baggage", "tenant=evil"),
            ("x-client-trace-id", "1"),
            ("x-envoy-force-trace", "true"),
            ("x-datadog-origin", "rum"),
            ("x-user", "ann"),
        ];
        let policy = r#"{"edge": "restart", "sampling": {"percentage": "0%"}}"#;
        let (after, propagated) = propagate_with(policy, TrafficDirection::Inbound, false, &headers);
        let names: Vec<_> = after.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["x-user", "traceparent"]);
        assert_ne!(value(&after, "traceparent").unwrap()[3..35], *TRACE);
        assert!(propagated.events.contains(TraceEvent::Restarted));
        let (after, _) = propagate_with(policy, TrafficDirection::Outbound, false, &headers);
        assert_eq!(value(&after, "traceparent").unwrap()[3..35], *TRACE, "what our own application sends goes on");
    }

    #[test]
    fn callers_of_ours_are_told_by_our_key() {
        let policy = r#"{"edge": "restartExternal", "tracestate": {"key": "acme"}}"#;
        for (tracestate, is_ours) in [("b=2,acme=1", true), ("b=2", false), ("acme2=1", false), ("acme=1,!", false)] {
            let (after, propagated) = propagate_with(
                policy,
                TrafficDirection::Inbound,
                false,
                &[("traceparent", INBOUND), ("tracestate", tracestate)],
            );
            assert_eq!(value(&after, "traceparent").unwrap()[3..35] == *TRACE, is_ours, "{tracestate}");
            assert_eq!(propagated.events.contains(TraceEvent::Restarted), !is_ours);
            let ours = value(&after, "tracestate").unwrap();
            assert_eq!(ours, if is_ours { "acme=1,b=2" } else { "acme=1" });
        }
    }

    #[test]
    fn only_what_is_allowed_leaves() {
        let policy = r#"{"tracestate": {"allow": ["a"]}, "baggage": {"allow": ["tenant"]}}"#;
        let headers =
            [("traceparent", INBOUND), ("tracestate", "a=1,b=2"), ("baggage", "tenant=x,user=ann"), ("baggage", "c=1")];
        let (after, _) = propagate_with(policy, TrafficDirection::Outbound, false, &headers);
        assert_eq!((value(&after, "tracestate"), value(&after, "baggage")), (Some("a=1"), Some("tenant=x")));
        let (after, _) = propagate_with(policy, TrafficDirection::Inbound, false, &headers[..3]);
        assert_eq!(
            (value(&after, "tracestate"), value(&after, "baggage")),
            (Some("a=1,b=2"), Some("tenant=x,user=ann"))
        );
    }

    #[test]
    fn baggage_of_other_formats_passes_where_baggage_may() {
        let headers =
            [("traceparent", INBOUND), ("uberctx-tenantid", "x"), ("uberctx-user", "ann"), ("ot-baggage-a", "1")];
        let sent = |policy: &str, direction| {
            let (after, _) = propagate_with(policy, direction, false, &headers);
            after.into_iter().map(|(name, _)| name).filter(|name| name != "traceparent").collect::<Vec<_>>()
        };
        let all = ["uberctx-tenantid", "uberctx-user", "ot-baggage-a"];
        assert_eq!(sent("{}", TrafficDirection::Outbound), all);
        let policy = r#"{"baggage": {"allow": ["tenantId"]}}"#;
        assert_eq!(sent(policy, TrafficDirection::Inbound), all);
        assert_eq!(sent(policy, TrafficDirection::Outbound), all[..1]);
        assert_eq!(sent(policy, TrafficDirection::Unspecified), all[..1]);
        assert_eq!(sent(r#"{"edge": "restart"}"#, TrafficDirection::Inbound), [""; 0]);
        assert_eq!(sent(r#"{"edge": "restart"}"#, TrafficDirection::Outbound), all);
    }

    #[test]
    fn an_ignored_trace_is_not_touched() {
        let mut names = HeaderNames::default();
        let node = Node::from_json(br#"{"edge": "ignore"}"#).unwrap();
        let report = Report::default();
        let trace = TracePolicy::read(&Value::root(&node, &report), "t/", &mut names).unwrap();
        let block = encode_headers(&[("traceparent", "bad")]);
        let request = Request::parse(&block, &names);
        assert_eq!(trace.propagate(&request, TrafficDirection::Inbound, &mut || 1, &mut |_| None), None);
    }

    proptest! {
        /// The share sampled is the share asked for, because the threshold cuts the random bits there.
        #[test]
        fn a_threshold_is_exact(ppm in 0_u32..=1_000_000) {
            let exact = (1_u128 << 56) * u128::from(1_000_000 - ppm) / 1_000_000;
            prop_assert!(u128::from(rejection_threshold(Fraction::from_ppm(ppm))).abs_diff(exact) <= 1);
        }

        /// Whatever arrives, what leaves in W3C's format is valid.
        #[test]
        fn valid_out(headers in proptest::collection::vec((0..12_usize, "[ -~]{0,60}"), 0..12), edge in 0..3_usize) {
            const NAMES: [&str; 12] = ["traceparent", "tracestate", "baggage", "b3", "x-b3-traceid", "x-b3-spanid",
                "uber-trace-id", "x-amzn-trace-id", "grpc-trace-bin", "x-request-id", "x-datadog-trace-id", "x-datadog-tags"];
            let headers: Vec<_> = headers.iter().map(|(name, value)| (NAMES[*name], value.as_str())).collect();
            let edge = ["continue", "restart", "restartExternal"][edge];
            let policy = format!(r#"{{"edge": "{edge}", "extract": ["b3", "tracecontext", "b3multi", "jaeger", "xray", "datadog", "grpc"],
                "inject": ["tracecontext", "datadog"]}}"#);
            for direction in [TrafficDirection::Inbound, TrafficDirection::Outbound, TrafficDirection::Unspecified] {
                let (after, propagated) = propagate_with(&policy, direction, false, &headers);
                let traceparent = value(&after, "traceparent").unwrap();
                let context = parse_traceparent(traceparent.as_bytes()).unwrap();
                prop_assert_eq!(context.trace_id, propagated.context.trace_id);
                let lists = after.iter().filter(|(name, _)| name == "tracestate").map(|(_, list)| list.as_bytes());
                prop_assert!(is_tracestate(lists));
            }
        }
    }
}
