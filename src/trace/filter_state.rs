//! What is left with a request in filter state: its trace id, for access logs; and the whole context, for a filter that
//! comes after Envoy's own tracer.
//!
//! A tracer that propagates writes its headers when a request leaves for its cluster: after every filter of the listener
//! and before the filters of the cluster. So the listener's filter decides and leaves what it decided; the same module as
//! a filter of the cluster (`edge: restore`) writes that again, whatever the headers say by then. No client can forge it.

use super::decision::Continuation;
use super::formats::Format;
use super::policy::Trace;
use super::w3c::{Flags, TRACEPARENT_LENGTH, format_traceparent, parse_traceparent, push};
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
pub(super) struct KeptHeaders(Vec<u8>);

impl KeptHeaders {
    /// Whether there is a header of this format.
    pub(super) fn has(&self, format: Format) -> bool {
        !self.0.is_empty() && format.kept_headers().iter().any(|place| self.get(format.headers(), *place).is_some())
    }

    /// The value of the header at a place.
    pub(super) fn get(&self, headers: &[&str], place: usize) -> Option<&[u8]> {
        let name = headers.get(place)?.as_bytes();
        self.0.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name)?.strip_prefix(b":"))
    }
}

impl Trace {
    /// Leaves what a request goes on with, once all its `mutations` are known.
    pub(super) fn leave(
        &self,
        continuation: &Continuation,
        request: &Request<'_>,
        mutations: &[HeaderMutation<'_>],
        host: &dyn Properties,
    ) {
        if self.filter_state.trace_id {
            host.leave(TRACE_ID, &continuation.context.trace_id_digits());
        }
        if self.filter_state.context {
            host.leave(CONTEXT, &self.context_lines(continuation, request, mutations));
        }
    }

    fn context_lines(
        &self,
        continuation: &Continuation,
        request: &Request<'_>,
        mutations: &[HeaderMutation<'_>],
    ) -> Vec<u8> {
        let mut lines = format_traceparent(&continuation.context);
        if let Some(tracestate) = request.value_after("tracestate", HeaderNames::TRACESTATE, mutations) {
            push(&mut lines, b" ");
            push(&mut lines, &tracestate);
        }
        if continuation.context.flags.contains(Flags::DEBUG) {
            push(&mut lines, b"\n");
            push(&mut lines, DEBUG);
        }
        for known in self.formats.iter().filter(|known| known.injected) {
            for place in known.format.kept_headers() {
                let (Some(name), Some(id)) = (known.format.headers().get(*place), known.ids.get(*place)) else {
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
pub(super) fn restore(host: &dyn Properties) -> Option<Continuation> {
    let left = host.property(&[CONTEXT])?;
    let end = left.iter().position(|byte| *byte == b'\n').unwrap_or(left.len());
    let (head, lines) = left.split_at_checked(end)?;
    let (traceparent, tracestate) = head.split_at_checked(TRACEPARENT_LENGTH)?;
    let mut context = parse_traceparent(traceparent).ok()?;
    if lines.split(|byte| *byte == b'\n').any(|line| line == DEBUG) {
        context.flags = context.flags.with(Flags::SAMPLED).with(Flags::DEBUG);
    }
    Some(Continuation::restored(context, tracestate.strip_prefix(b" "), KeptHeaders(lines.to_vec())))
}
