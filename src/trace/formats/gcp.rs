//! Google Cloud: `X-Cloud-Trace-Context: {trace id}/{span id, decimal};o={0 or 1}`; all but the trace id may be absent.

use super::{HeaderReader, HeaderWriter, ParseResult, bit, decimal};
use crate::trace::w3c::{InvalidContext, TraceContext, TraceFlags, parse_padded_id, push, push_hex};

pub(super) const HEADERS: [&str; 1] = ["x-cloud-trace-context"];

pub(super) fn parse(read: HeaderReader<'_, '_>) -> ParseResult {
    let Some(value) = read(0)? else { return Ok(None) };
    let mut parts = value.splitn(2, |byte| *byte == b';');
    let mut ids = parts.next().unwrap_or_default().splitn(2, |byte| *byte == b'/');
    let trace_id = ids.next().filter(|digits| digits.len() == 32).ok_or(InvalidContext::Shape)?;
    let parent_id = ids.next().map_or(Ok(0), decimal::parse)?;
    // Only 0 and 1 are defined. Any other option leaves the decision open and does not invalidate the ids.
    let flags = match parts.next() {
        Some(b"o=1") => TraceFlags::SAMPLED,
        Some(b"o=0") => TraceFlags::NONE,
        _ => TraceFlags::DEFERRED,
    };
    Ok(Some(TraceContext { trace_id: parse_padded_id(trace_id)?, parent_id: parent_id.to_be_bytes(), flags }))
}

pub(super) fn write(context: &TraceContext, write: HeaderWriter<'_>) {
    let mut text = Vec::with_capacity(57);
    push_hex(&mut text, &context.trace_id);
    push(&mut text, b"/");
    decimal::push(&mut text, u64::from_be_bytes(context.parent_id));
    push(&mut text, b";o=");
    push(&mut text, &[bit(context.flags.sampled())]);
    write(0, text);
}
