//! B3 in several headers. Debug implies sampled, so only one of the two is written; neither leaves the decision open.

use super::b3::sampling_state;
use super::{HeaderReader, HeaderWriter, ParseResult, bit, decision_without_ids, parse_context};
use crate::trace::w3c::{InvalidContext, TraceContext, TraceFlags, push_hex};

pub(super) const HEADERS: [&str; 5] =
    ["x-b3-traceid", "x-b3-spanid", "x-b3-sampled", "x-b3-flags", "x-b3-parentspanid"];

pub(super) fn parse(read: HeaderReader<'_, '_>) -> ParseResult {
    // A sampling header that is repeated or not readable leaves the decision open. It does not invalidate the ids.
    let optional = |index| read(index).ok().flatten();
    let flags = match optional(3) {
        Some(b"1") => TraceFlags::SAMPLED.with(TraceFlags::DEBUG),
        _ => optional(2).and_then(sampling_state).unwrap_or(TraceFlags::DEFERRED),
    };
    match (read(0)?, read(1)?) {
        (Some(trace_id), Some(parent_id)) if matches!(trace_id.len(), 16 | 32) && parent_id.len() == 16 => {
            parse_context(trace_id, parent_id, flags)
        }
        (None, None) if flags == TraceFlags::DEFERRED => Ok(None),
        (None, None) => decision_without_ids(flags),
        _ => Err(InvalidContext::Shape),
    }
}

pub(super) fn write(context: &TraceContext, write: HeaderWriter<'_>) {
    let mut id = Vec::with_capacity(32);
    push_hex(&mut id, &context.trace_id);
    write(0, id);
    let mut id = Vec::with_capacity(16);
    push_hex(&mut id, &context.parent_id);
    write(1, id);
    if context.flags.contains(TraceFlags::DEBUG) {
        write(3, vec![b'1']);
    } else {
        write(2, vec![bit(context.flags.sampled())]);
    }
}
