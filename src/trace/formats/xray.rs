//! AWS X-Ray: `X-Amzn-Trace-Id: Root=1-{8 digits}-{24 digits};Parent={span id};Sampled={0, 1 or ?}`, in any order. The
//! trace id is the two parts of the root. Load balancers, functions and applications add other fields, such as `Self`,
//! `Lineage` and `CalledFrom`; these are kept (AWS X-Ray developer guide, "Tracing header").

use super::{HeaderReader, HeaderWriter, ParseResult, bit};
use crate::trace::tracestate::trim_ows;
use crate::trace::w3c::{InvalidContext, TraceContext, TraceFlags, parse_padded_id, push, push_hex};

pub(super) const HEADERS: [&str; 1] = ["x-amzn-trace-id"];
pub(super) const RETAINED: [usize; 1] = [0];

pub(super) fn parse(read: HeaderReader<'_, '_>) -> ParseResult {
    let Some(value) = read(0)? else { return Ok(None) };
    let field = |name: &[u8]| value.split(|byte| *byte == b';').find_map(|field| trim_ows(field).strip_prefix(name));
    let root = field(b"Root=1-").ok_or(InvalidContext::Shape)?;
    let (time, random) = root.split_at_checked(8).ok_or(InvalidContext::Shape)?;
    let random = random.strip_prefix(b"-").filter(|random| random.len() == 24).ok_or(InvalidContext::Shape)?;
    let parent_id = match field(b"Parent=") {
        Some(parent_id) if parent_id.len() == 16 => parse_padded_id(parent_id)?,
        Some(_) => return Err(InvalidContext::Shape),
        None => [0; 8],
    };
    let flags = match field(b"Sampled=") {
        Some(b"1") => TraceFlags::SAMPLED,
        Some(b"0") => TraceFlags::NONE,
        _ => TraceFlags::DEFERRED,
    };
    Ok(Some(TraceContext { trace_id: parse_padded_id(&[time, random].concat())?, parent_id, flags }))
}

pub(super) fn write(context: &TraceContext, read: HeaderReader<'_, '_>, write: HeaderWriter<'_>) {
    let (time, random) = context.trace_id.split_at(4);
    let mut text = b"Root=1-".to_vec();
    push_hex(&mut text, time);
    push(&mut text, b"-");
    push_hex(&mut text, random);
    push(&mut text, b";Parent=");
    push_hex(&mut text, &context.parent_id);
    push(&mut text, b";Sampled=");
    push(&mut text, &[bit(context.flags.sampled())]);
    for field in read(0).ok().flatten().unwrap_or_default().split(|byte| *byte == b';').map(trim_ows) {
        let is_written = [&b"Root="[..], b"Parent=", b"Sampled="].iter().any(|name| field.starts_with(name));
        if !is_written && field.iter().position(|byte| *byte == b'=').is_some_and(|name| name > 0) {
            push(&mut text, b";");
            push(&mut text, field);
        }
    }
    write(0, text);
}
