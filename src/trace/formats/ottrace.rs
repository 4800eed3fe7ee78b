//! OpenTracing's basic tracers: ids in hexadecimal, of the trace id only the low half.

use super::{HeaderReader, HeaderWriter, ParseResult, parse_context, sampled_word};
use crate::trace::w3c::{InvalidContext, TraceContext, TraceFlags, push_hex};

pub(super) const HEADERS: [&str; 3] = ["ot-tracer-traceid", "ot-tracer-spanid", "ot-tracer-sampled"];

pub(super) fn parse(read: HeaderReader<'_, '_>) -> ParseResult {
    let (trace_id, parent_id) = match (read(0)?, read(1)?) {
        (Some(trace_id), Some(parent_id)) => (trace_id, parent_id),
        (None, None) => return Ok(None),
        _ => return Err(InvalidContext::Shape),
    };
    // A sampling header that is repeated or not readable leaves the decision open. It does not invalidate the ids.
    let sampled = read(2).ok().flatten().and_then(sampled_word);
    parse_context(trace_id, parent_id, TraceFlags::decided(sampled))
}

pub(super) fn write(context: &TraceContext, write: HeaderWriter<'_>) {
    let (_, low) = context.trace_id.split_at(8);
    for (index, id) in [(0, low), (1, &context.parent_id[..])] {
        let mut text = Vec::with_capacity(16);
        push_hex(&mut text, id);
        write(index, text);
    }
    write(2, if context.flags.sampled() { b"true".to_vec() } else { b"false".to_vec() });
}
