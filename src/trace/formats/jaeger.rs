//! Jaeger: `uber-trace-id: {trace id}:{span id}:{parent, given up, 0}:{flags}`, ids without leading zeros, the colons
//! percent-encoded by some clients. The first bit of the flags is sampled, the second debug.

use super::{Parsed, Read, Write, bit, context};
use crate::trace::w3c::{Flags, Invalid, TraceContext, padded_id, push, push_hex};

pub(super) const HEADERS: [&str; 1] = ["uber-trace-id"];

pub(super) fn parse(read: Read<'_, '_>) -> Parsed {
    let Some(mut rest) = read(0)? else { return Ok(None) };
    let mut fields = [&b""[..]; 4];
    for (index, field) in fields.iter_mut().enumerate() {
        let end = rest.iter().position(|byte| matches!(byte, b':' | b'%'));
        let (head, tail) = rest.split_at_checked(end.unwrap_or(rest.len())).ok_or(Invalid::Shape)?;
        *field = head;
        let separator = [&b":"[..], b"%3A", b"%3a"].into_iter().find_map(|separator| tail.strip_prefix(separator));
        rest = match separator {
            Some(rest) if index < 3 => rest,
            None if index == 3 && tail.is_empty() => tail,
            _ => return Err(Invalid::Shape),
        };
    }
    let [trace_id, parent_id, _, flags] = fields;
    context(trace_id, parent_id, parse_flags(flags).unwrap_or(Flags::UNDECIDED))
}

/// The flags, a bit field of one or two hexadecimal digits; `None` if the value is not one.
fn parse_flags(digits: &[u8]) -> Option<Flags> {
    let bits = match digits {
        b"0" | b"00" => 0,
        _ => padded_id::<1>(digits).ok()?[0],
    };
    Some(match (bits & 2 != 0, bits & 1 != 0) {
        (true, _) => Flags::SAMPLED.with(Flags::DEBUG),
        (false, sampled) => Flags::decided(Some(sampled)),
    })
}

pub(super) fn write(context: &TraceContext, write: Write<'_>) {
    let mut text = Vec::with_capacity(53);
    push_hex(&mut text, &context.trace_id);
    push(&mut text, b":");
    push_hex(&mut text, &context.parent_id);
    push(&mut text, b":0:");
    push(&mut text, &[if context.flags.contains(Flags::DEBUG) { b'3' } else { bit(context.flags.sampled()) }]);
    write(0, text);
}
