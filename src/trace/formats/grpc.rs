//! OpenCensus' binary format: `grpc-trace-bin`, in base64 the version 00 and then fields, each with its number: 00 and
//! the trace id, 01 and the span id, 02 and the options (OpenCensus specifications, encodings/BinaryEncoding.md). As in
//! the reference implementations, options that are missing leave the decision open, and what follows is not read.

use super::{HeaderReader, HeaderWriter, ParseResult};
use crate::trace::w3c::{InvalidContext, TraceContext, TraceFlags, push};

pub(super) const HEADERS: [&str; 1] = ["grpc-trace-bin"];

/// The bytes of a context that is written.
const LENGTH: usize = 29;

/// The most characters of a context that is read.
const MAX_DIGITS: usize = 128;

pub(super) fn parse(read: HeaderReader<'_, '_>) -> ParseResult {
    let Some(value) = read(0)? else { return Ok(None) };
    // Padding is accepted and never sent.
    let end = value.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    let (digits, padding) = value.split_at_checked(end).ok_or(InvalidContext::Shape)?;
    if digits.len() > MAX_DIGITS || digits.len() % 4 == 1 || padding.len() > 2 {
        return Err(InvalidContext::Shape);
    }
    let mut bytes = Vec::with_capacity(MAX_DIGITS);
    for chunk in digits.chunks(4) {
        let mut word = 0_u32;
        for (digit, shift) in chunk.iter().zip([18, 12, 6, 0]) {
            word |= sextet(*digit)? << shift;
        }
        bytes.extend(word.to_be_bytes().into_iter().skip(1).take(chunk.len() - 1));
    }
    let [0, fields @ ..] = bytes.as_slice() else { return Err(InvalidContext::Version) };
    let [0, rest @ ..] = fields else { return Err(InvalidContext::Shape) };
    let (trace_id, rest) = rest.split_first_chunk::<16>().ok_or(InvalidContext::Shape)?;
    let [1, rest @ ..] = rest else { return Err(InvalidContext::Shape) };
    let (parent_id, rest) = rest.split_first_chunk::<8>().ok_or(InvalidContext::Shape)?;
    if *trace_id == [0; 16] {
        return Err(InvalidContext::ZeroTraceId);
    }
    if *parent_id == [0; 8] {
        return Err(InvalidContext::ZeroParentId);
    }
    let flags = match rest {
        [2, options, ..] => TraceFlags::decided(Some(options & 1 != 0)),
        _ => TraceFlags::DEFERRED,
    };
    Ok(Some(TraceContext { trace_id: *trace_id, parent_id: *parent_id, flags }))
}

pub(super) fn write(context: &TraceContext, write: HeaderWriter<'_>) {
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

fn sextet(digit: u8) -> Result<u32, InvalidContext> {
    let value = match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return Err(InvalidContext::Character),
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
