//! B3 in one header: `b3: {trace id}-{span id}-{0, 1 or d}-{parent span id}`, or the decision alone.

use super::{HeaderReader, HeaderWriter, ParseResult, bit, decision_without_ids, parse_context, sampled_word};
use crate::trace::w3c::{InvalidContext, TraceContext, TraceFlags, push, push_hex};

pub(super) const HEADERS: [&str; 1] = ["b3"];

pub(super) fn parse(read: HeaderReader<'_, '_>) -> ParseResult {
    let Some(value) = read(0)? else { return Ok(None) };
    if let Some(flags) = sampling_state(value) {
        return decision_without_ids(flags);
    }
    let mut fields = value.split(|byte| *byte == b'-');
    let trace_id = fields.next().filter(|digits| matches!(digits.len(), 16 | 32)).ok_or(InvalidContext::Shape)?;
    let parent_id = fields.next().filter(|digits| digits.len() == 16).ok_or(InvalidContext::Shape)?;
    let flags = fields.next().and_then(sampling_state).unwrap_or(TraceFlags::DEFERRED);
    // The fourth field, the id of the parent's parent, is not read: a hop that continues the trace does not need it.
    if fields.nth(1).is_some() {
        return Err(InvalidContext::Shape);
    }
    parse_context(trace_id, parent_id, flags)
}

/// The flags of a sampling state; `None` if the value is not one. The words `true` and `false` are the values of early
/// B3 implementations.
pub(super) fn sampling_state(value: &[u8]) -> Option<TraceFlags> {
    match value {
        b"d" | b"D" => Some(TraceFlags::SAMPLED.with(TraceFlags::DEBUG)),
        _ => sampled_word(value).map(|sampled| TraceFlags::decided(Some(sampled))),
    }
}

pub(super) fn write(context: &TraceContext, write: HeaderWriter<'_>) {
    let mut text = Vec::with_capacity(51);
    push_hex(&mut text, &context.trace_id);
    push(&mut text, b"-");
    push_hex(&mut text, &context.parent_id);
    push(&mut text, b"-");
    push(&mut text, &[if context.flags.contains(TraceFlags::DEBUG) { b'd' } else { bit(context.flags.sampled()) }]);
    write(0, text);
}
