//! B3 in several headers. Debug implies sampled, so only one of the two is written; neither leaves the decision open.

use super::{Parsed, Read, Write, bit, context, decision};
use crate::trace::w3c::{Flags, Invalid, TraceContext, push_hex};

pub(super) const HEADERS: [&str; 5] =
    ["x-b3-traceid", "x-b3-spanid", "x-b3-sampled", "x-b3-flags", "x-b3-parentspanid"];

pub(super) fn parse(read: Read<'_, '_>) -> Parsed {
    let flags = match (read(3)?, read(2)?) {
        (Some(b"1"), _) => Flags::SAMPLED.with(Flags::DEBUG),
        (_, None) => Flags::UNDECIDED,
        (_, Some(b"1" | b"true")) => Flags::SAMPLED,
        (_, Some(b"0" | b"false")) => Flags::NONE,
        _ => return Err(Invalid::Shape),
    };
    match (read(0)?, read(1)?) {
        (Some(trace_id), Some(parent_id)) if matches!(trace_id.len(), 16 | 32) && parent_id.len() == 16 => {
            context(trace_id, parent_id, flags)
        }
        (None, None) if flags == Flags::UNDECIDED => Ok(None),
        (None, None) => decision(flags),
        _ => Err(Invalid::Shape),
    }
}

pub(super) fn write(context: &TraceContext, write: Write<'_>) {
    let mut id = Vec::with_capacity(32);
    push_hex(&mut id, &context.trace_id);
    write(0, id);
    let mut id = Vec::with_capacity(16);
    push_hex(&mut id, &context.parent_id);
    write(1, id);
    if context.flags.contains(Flags::DEBUG) {
        write(3, vec![b'1']);
    } else {
        write(2, vec![bit(context.flags.sampled())]);
    }
}
