//! B3 in several headers. Debug implies sampled, so only one of the two is written; neither leaves the decision open.

use super::b3::sampling_state;
use super::{Parsed, Read, Write, bit, context, decision};
use crate::trace::w3c::{Flags, Invalid, TraceContext, push_hex};

pub(super) const HEADERS: [&str; 5] =
    ["x-b3-traceid", "x-b3-spanid", "x-b3-sampled", "x-b3-flags", "x-b3-parentspanid"];

pub(super) fn parse(read: Read<'_, '_>) -> Parsed {
    // A sampling header that is repeated or not readable leaves the decision open. It does not invalidate the ids.
    let optional = |place| read(place).ok().flatten();
    let flags = match optional(3) {
        Some(b"1") => Flags::SAMPLED.with(Flags::DEBUG),
        _ => optional(2).and_then(sampling_state).unwrap_or(Flags::UNDECIDED),
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
