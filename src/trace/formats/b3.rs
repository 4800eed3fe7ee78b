//! B3 in one header: `b3: {trace id}-{span id}-{0, 1 or d}-{parent span id}`, or the decision alone.

use super::{Parsed, Read, Write, bit, context, decision, sampled_word};
use crate::trace::w3c::{Flags, Invalid, TraceContext, push, push_hex};

pub(super) const HEADERS: [&str; 1] = ["b3"];

pub(super) fn parse(read: Read<'_, '_>) -> Parsed {
    let Some(value) = read(0)? else { return Ok(None) };
    if let Some(flags) = sampling_state(value) {
        return decision(flags);
    }
    let mut fields = value.split(|byte| *byte == b'-');
    let trace_id = fields.next().filter(|digits| matches!(digits.len(), 16 | 32)).ok_or(Invalid::Shape)?;
    let parent_id = fields.next().filter(|digits| digits.len() == 16).ok_or(Invalid::Shape)?;
    let flags = fields.next().and_then(sampling_state).unwrap_or(Flags::UNDECIDED);
    // The fourth field, the id of the parent's parent, is not read: a hop that continues the trace does not need it.
    if fields.nth(1).is_some() {
        return Err(Invalid::Shape);
    }
    context(trace_id, parent_id, flags)
}

/// The flags of a sampling state; `None` if the value is not one. The words `true` and `false` are the values of early
/// B3 implementations.
pub(super) fn sampling_state(value: &[u8]) -> Option<Flags> {
    match value {
        b"d" | b"D" => Some(Flags::SAMPLED.with(Flags::DEBUG)),
        _ => sampled_word(value).map(|sampled| Flags::decided(Some(sampled))),
    }
}

pub(super) fn write(context: &TraceContext, write: Write<'_>) {
    let mut text = Vec::with_capacity(51);
    push_hex(&mut text, &context.trace_id);
    push(&mut text, b"-");
    push_hex(&mut text, &context.parent_id);
    push(&mut text, b"-");
    push(&mut text, &[if context.flags.contains(Flags::DEBUG) { b'd' } else { bit(context.flags.sampled()) }]);
    write(0, text);
}
