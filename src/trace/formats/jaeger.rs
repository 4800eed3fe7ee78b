//! Jaeger: `uber-trace-id: {trace id}:{span id}:{parent, given up, 0}:{flags}`, ids without leading zeros, the colons
//! percent-encoded by some clients. The first bit of the flags is sampled, the second debug.

use super::{HeaderReader, HeaderWriter, ParseResult, bit, parse_context};
use crate::trace::w3c::{InvalidContext, TraceContext, TraceFlags, parse_padded_id, push, push_hex};

pub(super) const HEADERS: [&str; 1] = ["uber-trace-id"];

pub(super) fn parse(read: HeaderReader<'_, '_>) -> ParseResult {
    let Some(mut rest) = read(0)? else { return Ok(None) };
    let mut fields = [&b""[..]; 4];
    for (index, field) in fields.iter_mut().enumerate() {
        let end = rest.iter().position(|byte| matches!(byte, b':' | b'%'));
        let (head, tail) = rest.split_at_checked(end.unwrap_or(rest.len())).ok_or(InvalidContext::Shape)?;
        *field = head;
        let separator = [&b":"[..], b"%3A", b"%3a"].into_iter().find_map(|separator| tail.strip_prefix(separator));
        rest = match separator {
            Some(rest) if index < 3 => rest,
            None if index == 3 && tail.is_empty() => tail,
            _ => return Err(InvalidContext::Shape),
        };
    }
    let [trace_id, parent_id, _, flags] = fields;
    parse_context(trace_id, parent_id, parse_flags(flags).unwrap_or(TraceFlags::DEFERRED))
}

/// The flags, a bit field of one or two hexadecimal digits; `None` if the value is not one.
fn parse_flags(digits: &[u8]) -> Option<TraceFlags> {
    let bits = match digits {
        b"0" | b"00" => 0,
        _ => parse_padded_id::<1>(digits).ok()?[0],
    };
    Some(match (bits & 2 != 0, bits & 1 != 0) {
        (true, _) => TraceFlags::SAMPLED.with(TraceFlags::DEBUG),
        (false, sampled) => TraceFlags::decided(Some(sampled)),
    })
}

pub(super) fn write(context: &TraceContext, write: HeaderWriter<'_>) {
    let mut text = Vec::with_capacity(53);
    push_hex(&mut text, &context.trace_id);
    push(&mut text, b":");
    push_hex(&mut text, &context.parent_id);
    push(&mut text, b":0:");
    push(&mut text, &[if context.flags.contains(TraceFlags::DEBUG) { b'3' } else { bit(context.flags.sampled()) }]);
    write(0, text);
}
