//! What is left with a request in filter state: its trace id, for access logs; and the whole context, for a filter that
//! comes after Envoy's own tracer.
//!
//! A tracer that propagates writes its headers when a request leaves for its cluster: after every filter of the listener
//! and before the filters of the cluster. So the listener's filter decides and leaves what it decided; the same module as
//! a filter of the cluster (`edge: restore`) writes that again, whatever the headers say by then. No client can forge it.

use super::decision::Continuation;
use super::policy::FilterState;
use super::w3c::{TRACEPARENT_LENGTH, format_traceparent, parse_traceparent, push};
use crate::host::Properties;
use crate::http::{HeaderMutation, HeaderNames, Request};

/// The trace id; `%FILTER_STATE(wasm.trimtab.trace_id:PLAIN)%` in an access log's format.
const TRACE_ID: &str = "trimtab.trace_id";

/// The `traceparent`, and the `tracestate` after a space.
const CONTEXT: &str = "trimtab.context";

impl FilterState {
    /// Leaves what a request goes on with, once all its `mutations` are known.
    pub fn leave(
        self,
        continuation: &Continuation,
        request: &Request<'_>,
        mutations: &[HeaderMutation<'_>],
        host: &dyn Properties,
    ) {
        if self.trace_id {
            host.leave(TRACE_ID, &continuation.context.trace_id_digits());
        }
        if self.context {
            let mut context = format_traceparent(&continuation.context);
            if let Some(tracestate) = request.value_after("tracestate", HeaderNames::TRACESTATE, mutations) {
                push(&mut context, b" ");
                push(&mut context, &tracestate);
            }
            host.leave(CONTEXT, &context);
        }
    }
}

/// What an earlier filter of the same request has decided, if one has left it.
pub fn restore(host: &dyn Properties) -> Option<Continuation> {
    let left = host.property(&[CONTEXT])?;
    let (traceparent, tracestate) = left.split_at_checked(TRACEPARENT_LENGTH)?;
    Some(Continuation::restored(parse_traceparent(traceparent).ok()?, tracestate.strip_prefix(b" ")))
}
