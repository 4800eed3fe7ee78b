//! `RateLimitRequest` and `RateLimitResponse` of `envoy.service.ratelimit.v3` (rls.proto), as far as a limit needs them.
//!
//! The code reads and writes the protobuf wire format (protobuf.dev, "Encoding") directly. A request has one domain and one
//! descriptor. Of a response only the code and the status of the first descriptor are read. Unknown fields are skipped.

use std::borrow::Cow;

/// The longest response that is read, in bytes. A usual response has some dozens of bytes, and the headers that the service
/// adds.
pub const MAX_RESPONSE_BYTES: usize = 64 * 1024;

/// The content of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ServiceResponse {
    pub(super) is_over: bool,
    /// The hits that remain in the window; `None` if the service has no limit for the descriptor.
    pub(super) remaining: Option<u32>,
    /// The length of the window in seconds; 0 if the response does not contain it.
    pub(super) window: u64,
    /// Seconds until the window ends, rounded up; 0 if the response does not contain it.
    pub(super) reset: u64,
}

/// Why a response cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResponseError {
    /// It is not a `RateLimitResponse`.
    Garbage,
    /// Its code is UNKNOWN, or is not in rls.proto.
    UnknownCode,
}

/// `RateLimitResponse.RateLimit.Unit` in seconds, by its number: UNKNOWN, SECOND, MINUTE, HOUR, DAY, MONTH, YEAR, WEEK.
const UNITS: [u64; 8] = [0, 1, 60, 3_600, 86_400, 2_592_000, 31_536_000, 604_800];

/// The longest time until a reset that is accepted, in seconds.
const LONGEST: u64 = 366 * 86_400;

/// Wire types.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH_DELIMITED: u64 = 2;
const FIXED32: u64 = 5;

/// A request of one descriptor with these entries, without its hits.
pub(super) fn encode(domain: &str, entries: &[(&str, Cow<'_, str>)]) -> Vec<u8> {
    let mut descriptor = Vec::new();
    for (key, value) in entries {
        let mut entry = Vec::with_capacity(key.len() + value.len() + 8);
        put_bytes(&mut entry, 1, key.as_bytes());
        put_bytes(&mut entry, 2, value.as_bytes());
        put_bytes(&mut descriptor, 1, &entry);
    }
    let mut request = Vec::with_capacity(domain.len() + descriptor.len() + 16);
    put_bytes(&mut request, 1, domain.as_bytes());
    put_bytes(&mut request, 2, &descriptor);
    request
}

/// `request` with `hits_addend`.
pub(super) fn with_hits(request: &[u8], hits: u32) -> Vec<u8> {
    let mut whole = Vec::with_capacity(request.len() + 6);
    whole.extend_from_slice(request);
    put_varint(&mut whole, 3 << 3 | VARINT);
    put_varint(&mut whole, hits.into());
    whole
}

/// Reads a response.
pub(super) fn decode(message: &[u8]) -> Result<ServiceResponse, ResponseError> {
    let (mut code, mut status) = (0, None);
    for field in Fields(message) {
        match field? {
            (1, Value::Number(number)) => code = number,
            (2, Value::Bytes(bytes)) => {
                let read = DescriptorStatus::read(bytes)?;
                status.get_or_insert(read);
            }
            _ => {}
        }
    }
    let is_over = match code {
        1 => false,
        2 => true,
        _ => return Err(ResponseError::UnknownCode),
    };
    let DescriptorStatus { remaining, window, reset } = status.unwrap_or_default();
    Ok(ServiceResponse { is_over, remaining, window, reset })
}

/// `RateLimitResponse.DescriptorStatus`.
#[derive(Default)]
struct DescriptorStatus {
    remaining: Option<u32>,
    window: u64,
    reset: u64,
}

impl DescriptorStatus {
    fn read(message: &[u8]) -> Result<DescriptorStatus, ResponseError> {
        let mut status = DescriptorStatus::default();
        let (mut has_limit, mut remaining) = (false, 0);
        for field in Fields(message) {
            match field? {
                (2, Value::Bytes(limit)) => {
                    has_limit = true;
                    for field in Fields(limit) {
                        if let (2, Value::Number(unit)) = field? {
                            let unit = usize::try_from(unit).ok().and_then(|unit| UNITS.get(unit));
                            status.window = unit.copied().unwrap_or(0);
                        }
                    }
                }
                (3, Value::Number(number)) => remaining = u32::try_from(number).unwrap_or(u32::MAX),
                (4, Value::Bytes(duration)) => {
                    let (mut seconds, mut nanos) = (0, 0);
                    for field in Fields(duration) {
                        match field? {
                            (1, Value::Number(number)) => seconds = number,
                            (2, Value::Number(number)) => nanos = number,
                            _ => {}
                        }
                    }
                    // A negative number is one far too large here.
                    let is_told = seconds <= LONGEST && nanos < 1_000_000_000;
                    status.reset = if is_told { seconds + u64::from(nanos > 0) } else { 0 };
                }
                _ => {}
            }
        }
        status.remaining = has_limit.then_some(remaining);
        Ok(status)
    }
}

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Writes a field of bytes. An empty value is omitted, as in proto3.
fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    put_varint(out, field << 3 | LENGTH_DELIMITED);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// The value of a field.
enum Value<'m> {
    Number(u64),
    Bytes(&'m [u8]),
    Fixed,
}

/// The fields of a message, each with its number. The first error ends them.
struct Fields<'m>(&'m [u8]);

impl<'m> Fields<'m> {
    fn take(&mut self, length: u64) -> Option<&'m [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut number = 0;
        for place in 0..10 {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn field(&mut self) -> Option<(u64, Value<'m>)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            VARINT => Value::Number(self.varint()?),
            LENGTH_DELIMITED => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            FIXED64 => self.take(8).map(|_| Value::Fixed)?,
            FIXED32 => self.take(4).map(|_| Value::Fixed)?,
            _ => return None,
        };
        (tag > 7).then_some((tag >> 3, value))
    }
}

impl<'m> Iterator for Fields<'m> {
    type Item = Result<(u64, Value<'m>), ResponseError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or(ResponseError::Garbage))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // All bytes below are what Google's Go library makes of the messages of go-control-plane (`proto.Marshal`).

    #[test]
    fn a_request_is_protobuf_byte_for_byte() {
        let request = encode("shop", &[("user", "ann".into()), ("org", "".into())]);
        assert_eq!(
            with_hits(&request, 300),
            b"\x0a\x04shop\x12\x14\x0a\x0b\x0a\x04user\x12\x03ann\x0a\x05\x0a\x03org\x18\xac\x02",
        );
    }

    const ADMITTED: &[u8] =
        b"\x08\x01\x12\x1a\x08\x01\x12\x0f\x08\xe8\x07\x10\x02\x1a\x08per-user\x18\xe1\x07\x22\x02\x08\x2a";
    const OVER: &[u8] = b"\x08\x02\x12\x19\x08\x02\x12\x0f\x08\xe8\x07\x10\x02\x1a\x08per-user\x22\x04\x08\x3c\x10\x05\
        \x1a\x17\x0a\x0fratelimit-limit\x12\x041000\x2a\x02no";

    #[test]
    fn responses_are_read() {
        let admitted = ServiceResponse { is_over: false, remaining: Some(993), window: 60, reset: 42 };
        assert_eq!(decode(ADMITTED), Ok(admitted));
        let over = ServiceResponse { is_over: true, remaining: Some(0), window: 60, reset: 61 };
        assert_eq!(decode(OVER), Ok(over), "5 ns more than a minute, with headers and a body besides");
        let unlimited = ServiceResponse { is_over: false, remaining: None, window: 0, reset: 0 };
        assert_eq!(decode(b"\x08\x01\x12\x02\x08\x01"), Ok(unlimited));
        assert_eq!(decode(b"\x08\x01"), Ok(unlimited), "no status at all");
    }

    #[test]
    fn what_makes_no_sense_is_no_answer() {
        for unknown in [&b""[..], b"\x12\x04\x08\x01\x18\x07", b"\x08\x00", b"\x08\x09"] {
            assert_eq!(decode(unknown), Err(ResponseError::UnknownCode), "{unknown:02x?}");
        }
        for end in 3..ADMITTED.len() {
            assert_eq!(decode(&ADMITTED[..end]), Err(ResponseError::Garbage), "cut after {end} bytes");
        }
        for garbage in [&b"\x08"[..], b"\x0b\x01", b"\x00\x01", b"\x12\x7f", b"not protobuf", &[0xff; 40]] {
            assert_eq!(decode(garbage), Err(ResponseError::Garbage), "{garbage:02x?}");
        }
    }

    #[test]
    fn a_time_that_makes_no_sense_is_none() {
        let negative = b"\x08\x01\x12\x20\x08\x01\x12\x0f\x08\xe8\x07\x10\x02\x1a\x08per-user\
            \x22\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        assert_eq!(decode(negative), Ok(ServiceResponse { is_over: false, remaining: Some(0), window: 60, reset: 0 }));
        let unit = b"\x08\x01\x12\x04\x12\x02\x10\x09";
        assert_eq!(decode(unit), Ok(ServiceResponse { is_over: false, remaining: Some(0), window: 0, reset: 0 }));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_none(message in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = decode(&message);
        }

        #[test]
        fn fields_that_are_unknown_change_nothing(field in 7..100_u64, bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            let mut message = Vec::new();
            put_bytes(&mut message, field, &bytes);
            put_varint(&mut message, field << 3 | VARINT);
            put_varint(&mut message, u64::MAX);
            put_varint(&mut message, field << 3 | FIXED64);
            message.extend([0xff; 8]);
            put_varint(&mut message, field << 3 | FIXED32);
            message.extend([0xff; 4]);
            message.extend(ADMITTED);
            prop_assert_eq!(decode(&message), decode(ADMITTED));
        }
    }
}
