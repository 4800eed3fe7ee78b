//! What is left with a request in filter state: its trace id, for access logs; and the whole context, for a filter that
//! comes after Envoy's own tracer.
//!
//! A tracer that propagates writes its headers when a request leaves for its cluster: after every filter of the listener
//! and before the filters of the cluster. So the listener's filter decides and leaves what it decided; the same module as
//! a filter of the cluster (`edge: restore`) writes that again, whatever the headers say by then. No client can forge it.

use super::decision::PropagatedContext;
use super::formats::TraceFormat;
use super::policy::TracePolicy;
use super::w3c::{TRACEPARENT_LENGTH, TraceFlags, format_traceparent, parse_traceparent, push};
use crate::host::Properties;
use crate::http::{HeaderMutation, HeaderNames, Request};

/// The trace id; `%FILTER_STATE(wasm.trimtab.trace_id:PLAIN)%` in an access log's format.
const TRACE_ID: &str = "trimtab.trace_id";

/// Lines: the `traceparent`, and the `tracestate` after a space; [`DEBUG`] for that flag, which a `traceparent` does not
/// have; `name:value` for each header that has more in it than the context.
const CONTEXT: &str = "trimtab.context";
const DEBUG: &[u8] = b"debug";

/// Header lines of [`CONTEXT`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RetainedHeaders(Vec<u8>);

impl RetainedHeaders {
    /// Whether there is a header of this format.
    pub(super) fn has(&self, format: TraceFormat) -> bool {
        !self.0.is_empty() && format.retained_headers().iter().any(|index| self.get(format.headers(), *index).is_some())
    }

    /// The value of the header at an index.
    pub(super) fn get(&self, headers: &[&str], index: usize) -> Option<&[u8]> {
        let name = headers.get(index)?.as_bytes();
        self.0.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name)?.strip_prefix(b":"))
    }
}

impl TracePolicy {
    /// Leaves what a request goes on with, once all its `mutations` are known.
    pub(super) fn set_filter_state(
        &self,
        propagated: &PropagatedContext,
        request: &Request<'_>,
        mutations: &[HeaderMutation<'_>],
        host: &dyn Properties,
    ) {
        if self.filter_state.trace_id {
            host.set_property(TRACE_ID, &propagated.context.trace_id_hex());
        }
        if self.filter_state.context {
            host.set_property(CONTEXT, &self.context_lines(propagated, request, mutations));
        }
    }

    fn context_lines(
        &self,
        propagated: &PropagatedContext,
        request: &Request<'_>,
        mutations: &[HeaderMutation<'_>],
    ) -> Vec<u8> {
        let mut lines = format_traceparent(&propagated.context);
        if let Some(tracestate) = request.value_after("tracestate", HeaderNames::TRACESTATE, mutations) {
            push(&mut lines, b" ");
            push(&mut lines, &tracestate);
        }
        if propagated.context.flags.contains(TraceFlags::DEBUG) {
            push(&mut lines, b"\n");
            push(&mut lines, DEBUG);
        }
        for configured in self.formats.iter().filter(|configured| configured.injected) {
            for index in configured.format.retained_headers() {
                let (Some(name), Some(id)) =
                    (configured.format.headers().get(*index), configured.header_ids.get(*index))
                else {
                    continue;
                };
                let value = request.value_after(name, *id, mutations).filter(|value| !value.contains(&b'\n'));
                let Some(value) = value else { continue };
                for part in [b"\n", name.as_bytes(), b":", &value] {
                    push(&mut lines, part);
                }
            }
        }
        lines
    }
}

/// What an earlier filter of the same request has decided, if one has left it.
pub(super) fn restore(host: &dyn Properties) -> Option<PropagatedContext> {
    let left = host.property(&[CONTEXT])?;
    let end = left.iter().position(|byte| *byte == b'\n').unwrap_or(left.len());
    let (head, lines) = left.split_at_checked(end)?;
    let (traceparent, tracestate) = head.split_at_checked(TRACEPARENT_LENGTH)?;
    let mut context = parse_traceparent(traceparent).ok()?;
    if lines.split(|byte| *byte == b'\n').any(|line| line == DEBUG) {
        context.flags = context.flags.with(TraceFlags::SAMPLED).with(TraceFlags::DEBUG);
    }
    Some(PropagatedContext::from_filter_state(context, tracestate.strip_prefix(b" "), RetainedHeaders(lines.to_vec())))
}
