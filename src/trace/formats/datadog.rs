//! Datadog: the low half of the trace id and the span id in decimal, the high half in hexadecimal among the tags. The
//! other tags, the origin, and a defined priority with the same decision are the tracer's own and stay.

use super::{HeaderReader, HeaderWriter, ParseResult, bit, decimal};
use crate::trace::w3c::{InvalidContext, TraceContext, TraceFlags, parse_padded_id, push, push_hex};

pub(super) const HEADERS: [&str; 5] =
    ["x-datadog-trace-id", "x-datadog-parent-id", "x-datadog-sampling-priority", "x-datadog-tags", "x-datadog-origin"];
pub(super) const RETAINED: [usize; 3] = [2, 3, 4];

/// The tag of the high half.
const HIGH: &[u8] = b"_dd.p.tid=";

pub(super) fn parse(read: HeaderReader<'_, '_>) -> ParseResult {
    let Some(low) = read(0)? else { return Ok(None) };
    let low = decimal::parse(low)?;
    if low == 0 {
        return Err(InvalidContext::ZeroTraceId);
    }
    // Repeated or unreadable tags and priorities do not invalidate the ids.
    let optional = |index| read(index).ok().flatten();
    let tags = optional(3).unwrap_or_default();
    let high = tags.split(|byte| *byte == b',').find_map(|tag| tag.strip_prefix(HIGH)).unwrap_or_default();
    let high = if high.len() == 16 { parse_padded_id::<8>(high).unwrap_or_default() } else { [0; 8] };
    let parent_id = read(1)?.map_or(Ok(0), decimal::parse)?;
    Ok(Some(TraceContext {
        trace_id: ((u128::from(u64::from_be_bytes(high)) << 64) | u128::from(low)).to_be_bytes(),
        parent_id: parent_id.to_be_bytes(),
        flags: TraceFlags::decided(optional(2).and_then(is_kept)),
    }))
}

/// Whether the trace is kept at this sampling priority: a positive integer keeps it, zero or a negative one drops it.
/// `None` if the value is not an integer.
fn is_kept(priority: &[u8]) -> Option<bool> {
    let digits = priority.strip_prefix(b"-").unwrap_or(priority);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(digits.len() == priority.len() && digits.iter().any(|digit| *digit != b'0'))
}

/// Whether Datadog defines this priority.
fn is_defined(priority: &[u8]) -> bool {
    matches!(priority, b"-1" | b"0" | b"1" | b"2")
}

pub(super) fn write(context: &TraceContext, read: HeaderReader<'_, '_>, write: HeaderWriter<'_>) {
    let inbound = |index| read(index).ok().flatten();
    let (high, low) = context.trace_id.split_at(8);
    for (index, id) in [(0, low), (1, &context.parent_id[..])] {
        let mut text = Vec::with_capacity(20);
        decimal::push(&mut text, id.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)));
        write(index, text);
    }
    let sampled = context.flags.sampled();
    let priority = inbound(2).filter(|priority| is_defined(priority) && is_kept(priority) == Some(sampled));
    write(2, priority.map_or_else(|| vec![bit(sampled)], <[u8]>::to_vec));
    let tags = inbound(3).unwrap_or_default().split(|byte| *byte == b',');
    let mut text = Vec::new();
    for tag in tags.filter(|tag| !tag.is_empty() && !tag.starts_with(HIGH)) {
        push(&mut text, tag);
        push(&mut text, b",");
    }
    if high == [0; 8] {
        text.pop();
    } else {
        push(&mut text, HIGH);
        push_hex(&mut text, high);
    }
    if !text.is_empty() {
        write(3, text);
    }
    if let Some(origin) = inbound(4) {
        write(4, origin.to_vec());
    }
}
