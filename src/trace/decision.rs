//! Where one request stands in its trace, and what the next hop is told.

use super::policy::{Edge, Trace};
use super::w3c::{Flags, Invalid, TraceContext, format_traceparent, is_tracestate, parse_traceparent};
use crate::http::{HeaderMutation, HeaderNames, Request};
use std::borrow::Cow;

/// What a request arrived with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
    Valid,
    Missing,
    Invalid(Invalid),
}

/// What a request goes on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    pub arrived: Arrived,
    /// Whether the trace began here.
    pub root: bool,
    pub context: TraceContext,
    /// Whether the request's `tracestate` may go on.
    keeps_tracestate: bool,
    has_tracestate: bool,
}

impl Trace {
    /// Reads the request's context, and continues it or begins a new trace; `random` draws the new ids.
    /// `None` where the policy leaves trace headers alone.
    pub fn carry_on(&self, request: &Request<'_>, mut random: impl FnMut() -> u64) -> Option<Continuation> {
        if self.edge == Edge::Ignore {
            return None;
        }
        let (arrived, inbound) = match extract(request) {
            Ok(Some(context)) => (Arrived::Valid, Some(context)),
            Ok(None) => (Arrived::Missing, None),
            Err(invalid) => (Arrived::Invalid(invalid), None),
        };
        let inbound = inbound.filter(|_| self.edge != Edge::Restart);
        let parent_id = not_zero(&mut random).to_be_bytes();
        let context = match inbound {
            Some(inbound) => TraceContext { parent_id, ..inbound },
            None => self.root(parent_id, random),
        };
        let has_tracestate = request.has(HeaderNames::TRACESTATE);
        let keeps_tracestate =
            inbound.is_some() && has_tracestate && is_tracestate(request.values(HeaderNames::TRACESTATE));
        Some(Continuation { arrived, root: inbound.is_none(), context, keeps_tracestate, has_tracestate })
    }

    fn root(&self, parent_id: [u8; 8], mut random: impl FnMut() -> u64) -> TraceContext {
        let low = not_zero(&mut random);
        let trace_id = ((u128::from(random()) << 64) | u128::from(low)).to_be_bytes();
        // Consistent probability sampling (OpenTelemetry, "TraceState: Probability Sampling"): the 56 random bits of
        // the trace id decide, the highest are kept, so that samplers further on agree.
        let sampled = self.sampling.includes(!(low << 8));
        let flags = if sampled { Flags::RANDOM.with(Flags::SAMPLED) } else { Flags::RANDOM };
        TraceContext { trace_id, parent_id, flags }
    }
}

impl Continuation {
    /// The header changes that tell the next hop.
    pub fn inject(&self, mutations: &mut Vec<HeaderMutation<'_>>) {
        mutations.push(HeaderMutation::Set("traceparent", Cow::Owned(format_traceparent(&self.context))));
        if self.has_tracestate && !self.keeps_tracestate {
            mutations.push(HeaderMutation::Remove("tracestate"));
        }
    }
}

/// The context that a request carries, whatever is done with it.
///
/// # Errors
/// Why its `traceparent` cannot be used.
pub fn extract(request: &Request<'_>) -> Result<Option<TraceContext>, Invalid> {
    if request.count(HeaderNames::TRACEPARENT) > 1 {
        return Err(Invalid::Duplicate);
    }
    request.first(HeaderNames::TRACEPARENT).map(parse_traceparent).transpose()
}

fn not_zero(mut random: impl FnMut() -> u64) -> u64 {
    random().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::encode_headers;
    use crate::units::Fraction;

    const INBOUND: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn passed_on(edge: Edge, sampling: Fraction, headers: &[(&str, &str)]) -> Vec<(String, String)> {
        let names = HeaderNames::default();
        let trace = Trace { edge, sampling };
        let block = encode_headers(headers);
        let mut state = 42;
        let mut mutations = Vec::new();
        let continuation = trace.carry_on(&Request::parse(&block, &names), || crate::random::split_mix(&mut state));
        if let Some(continuation) = continuation {
            continuation.inject(&mut mutations);
        }
        let mut after: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect();
        mutations.iter().for_each(|mutation| mutation.apply(&mut after));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        after.into_iter().map(|(name, value)| (text(name), text(value))).collect()
    }

    #[test]
    fn a_valid_context_goes_on_with_a_new_parent() {
        let after = passed_on(Edge::Continue, Fraction::NONE, &[("traceparent", INBOUND), ("tracestate", "a=1")]);
        let [(_, tracestate), (_, traceparent)] = after.as_slice() else { panic!("{after:?}") };
        assert_eq!(tracestate, "a=1");
        assert_eq!(traceparent[..36], INBOUND[..36]);
        assert_ne!(traceparent[36..52], INBOUND[36..52]);
        assert_eq!(traceparent[52..], INBOUND[52..], "the caller's sampling decision is respected");
    }

    #[test]
    fn anything_else_starts_a_new_trace_and_drops_the_tracestate() {
        let twice: &[_] = &[("traceparent", INBOUND), ("traceparent", INBOUND), ("tracestate", "a=1")];
        for headers in [&[][..], &[("tracestate", "a=1")], &[("traceparent", "00-"), ("tracestate", "a=1")], twice] {
            let after = passed_on(Edge::Continue, Fraction::WHOLE, headers);
            let [(name, traceparent)] = after.as_slice() else { panic!("{after:?}") };
            assert_eq!(name, "traceparent");
            assert_ne!(traceparent[..36], INBOUND[..36]);
            assert_eq!(traceparent[52..], *"-03", "sampled, and the id is random");
        }
    }

    #[test]
    fn a_bad_tracestate_does_not_spoil_the_traceparent() {
        let after = passed_on(Edge::Continue, Fraction::NONE, &[("traceparent", INBOUND), ("tracestate", "a==1")]);
        let [(_, traceparent)] = after.as_slice() else { panic!("{after:?}") };
        assert_eq!(traceparent[..36], INBOUND[..36]);
    }

    #[test]
    fn edges() {
        let headers = [("traceparent", INBOUND), ("tracestate", "a=1")];
        let restarted = passed_on(Edge::Restart, Fraction::NONE, &headers);
        let [(_, traceparent)] = restarted.as_slice() else { panic!("{restarted:?}") };
        assert_ne!(traceparent[..36], INBOUND[..36]);
        assert_eq!(traceparent[52..], *"-02");
        let ignored = passed_on(Edge::Ignore, Fraction::NONE, &headers);
        assert_eq!(ignored, headers.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}
