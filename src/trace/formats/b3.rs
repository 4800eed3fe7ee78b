//! B3 in one header: `b3: {trace id}-{span id}-{0, 1 or d}-{parent span id}`, or the decision alone.

use super::{Parsed, Read, Write, bit, context, decision};
use crate::trace::w3c::{Flags, Invalid, TraceContext, push, push_hex};

pub(super) const HEADERS: [&str; 1] = ["b3"];

pub(super) fn parse(read: Read<'_, '_>) -> Parsed {
    let Some(value) = read(0)? else { return Ok(None) };
    if let Ok(flags) = state(value) {
        return decision(flags);
    }
    let mut fields = value.split(|byte| *byte == b'-');
    let trace_id = fields.next().filter(|digits| matches!(digits.len(), 16 | 32)).ok_or(Invalid::Shape)?;
    let parent_id = fields.next().filter(|digits| digits.len() == 16).ok_or(Invalid::Shape)?;
    let flags = fields.next().map_or(Ok(Flags::UNDECIDED), state)?;
    if fields.next().is_some_and(|grandparent| grandparent.len() != 16) || fields.next().is_some() {
        return Err(Invalid::Shape);
    }
    context(trace_id, parent_id, flags)
}

fn state(value: &[u8]) -> Result<Flags, Invalid> {
    match value {
        b"0" => Ok(Flags::NONE),
        b"1" => Ok(Flags::SAMPLED),
        b"d" => Ok(Flags::SAMPLED.with(Flags::DEBUG)),
        _ => Err(Invalid::Shape),
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
