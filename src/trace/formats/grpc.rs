//! OpenCensus' binary format: `grpc-trace-bin`, in base64 the bytes 00, 00 and the trace id, 01 and the span id, 02 and
//! the flags. A decision is always there.

use super::{Parsed, Read, Write};
use crate::trace::w3c::{Flags, Invalid, TraceContext, push};

pub(super) const HEADERS: [&str; 1] = ["grpc-trace-bin"];

/// The bytes of a context.
const LENGTH: usize = 29;

pub(super) fn parse(read: Read<'_, '_>) -> Parsed {
    let Some(value) = read(0)? else { return Ok(None) };
    // Padding is accepted and never sent.
    let digits = value.strip_suffix(b"=").unwrap_or(value);
    let mut bytes = [0; LENGTH];
    if digits.len() != (LENGTH * 4).div_ceil(3) {
        return Err(Invalid::Shape);
    }
    for (chunk, bytes) in digits.chunks(4).zip(bytes.chunks_mut(3)) {
        let mut word = 0_u32;
        for (digit, shift) in chunk.iter().zip([18, 12, 6, 0]) {
            word |= sextet(*digit)? << shift;
        }
        for (byte, part) in bytes.iter_mut().zip(word.to_be_bytes().into_iter().skip(1)) {
            *byte = part;
        }
    }
    let [0, 0, rest @ ..] = &bytes else { return Err(Invalid::Version) };
    let (trace_id, rest) = rest.split_first_chunk::<16>().ok_or(Invalid::Shape)?;
    let [1, rest @ ..] = rest else { return Err(Invalid::Shape) };
    let (parent_id, rest) = rest.split_first_chunk::<8>().ok_or(Invalid::Shape)?;
    let [2, flags] = rest else { return Err(Invalid::Shape) };
    if *trace_id == [0; 16] {
        return Err(Invalid::ZeroTraceId);
    }
    if *parent_id == [0; 8] {
        return Err(Invalid::ZeroParentId);
    }
    let flags = Flags::decided(Some(flags & 1 != 0));
    Ok(Some(TraceContext { trace_id: *trace_id, parent_id: *parent_id, flags }))
}

pub(super) fn write(context: &TraceContext, write: Write<'_>) {
    let mut bytes = Vec::with_capacity(LENGTH);
    for part in [&[0, 0], &context.trace_id[..], &[1], &context.parent_id, &[2, u8::from(context.flags.sampled())]] {
        push(&mut bytes, part);
    }
    let mut text = Vec::with_capacity(39);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().zip([16, 8, 0]).fold(0, |word, (byte, shift)| word | u32::from(*byte) << shift);
        text.extend([18, 12, 6, 0].into_iter().take(chunk.len() + 1).map(|shift| digit(word >> shift)));
    }
    write(0, text);
}

fn sextet(digit: u8) -> Result<u32, Invalid> {
    let value = match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return Err(Invalid::Character),
    };
    Ok(u32::from(value))
}

fn digit(word: u32) -> u8 {
    match (word & 0x3f) as u8 {
        value @ 0..=25 => value + b'A',
        value @ 26..=51 => value - 26 + b'a',
        value @ 52..=61 => value - 52 + b'0',
        62 => b'+',
        _ => b'/',
    }
}
