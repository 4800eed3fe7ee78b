//! W3C Trace Context, level 2: `traceparent` (section 3.2), and the words in which every other format is told.

/// A trace's identity and this hop's place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: [u8; 16],
    pub parent_id: [u8; 8],
    pub flags: TraceFlags,
}

impl TraceContext {
    /// The trace id as it is written.
    pub fn trace_id_hex(&self) -> Vec<u8> {
        let mut digits = Vec::with_capacity(32);
        push_hex(&mut digits, &self.trace_id);
        digits
    }
}

/// The trace flags that are defined; other bits are sent as zero (section 3.2.2.5). Two more, which never leave in a
/// `traceparent`, say what other formats can say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceFlags(u8);

impl TraceFlags {
    /// The caller may have recorded the trace.
    pub const SAMPLED: TraceFlags = TraceFlags(0x01);
    /// The low 56 bits of the trace id are random (level 2).
    pub const RANDOM: TraceFlags = TraceFlags(0x02);
    /// Recorded whatever samplers say; implies [`TraceFlags::SAMPLED`].
    pub const DEBUG: TraceFlags = TraceFlags(0x10);
    /// The caller has left the sampling decision to the next hop.
    pub const DEFERRED: TraceFlags = TraceFlags(0x20);
    const DEFINED: u8 = 0x03;

    /// No flag.
    pub const NONE: TraceFlags = TraceFlags(0);

    /// A caller's decision, where it made one.
    pub const fn decided(sampled: Option<bool>) -> TraceFlags {
        match sampled {
            Some(true) => TraceFlags::SAMPLED,
            Some(false) => TraceFlags::NONE,
            None => TraceFlags::DEFERRED,
        }
    }

    pub const fn with(self, other: TraceFlags) -> TraceFlags {
        TraceFlags(self.0 | other.0)
    }

    pub const fn without(self, other: TraceFlags) -> TraceFlags {
        TraceFlags(self.0 & !other.0)
    }

    pub const fn sampled(self) -> bool {
        self.contains(TraceFlags::SAMPLED)
    }

    /// As a byte of a remembered context, and back.
    pub(super) const fn bits(self) -> u8 {
        self.0
    }

    pub(super) const fn from_bits(bits: u8) -> TraceFlags {
        TraceFlags(bits & (TraceFlags::DEFINED | TraceFlags::DEBUG.0))
    }

    pub const fn contains(self, other: TraceFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Why a `traceparent` is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidContext {
    /// The header was sent more than once.
    Duplicate,
    /// Too short, too long for its version, or a dash is missing.
    Shape,
    /// Version `ff`.
    Version,
    /// A character that is no lower-case hexadecimal digit.
    Character,
    ZeroTraceId,
    ZeroParentId,
}

/// Length of a version 00 `traceparent`.
pub const TRACEPARENT_LENGTH: usize = 55;

/// Parses a `traceparent`. A higher version is read as far as version 00 goes (section 4).
///
/// # Errors
/// Why the value must not be used.
pub fn parse_traceparent(value: &[u8]) -> Result<TraceContext, InvalidContext> {
    let (head, rest) = value.split_first_chunk::<TRACEPARENT_LENGTH>().ok_or(InvalidContext::Shape)?;
    let [v, w, b'-', ids @ .., b'-', f, g] = head else { return Err(InvalidContext::Shape) };
    let Some((trace_id, [b'-', parent_id @ ..])) = ids.split_first_chunk::<32>() else {
        return Err(InvalidContext::Shape);
    };
    let [version, flags, ..] = hex_to_bytes([*v, *w, *f, *g, b'0', b'0', b'0', b'0'])?;
    let (trace_id, parent_id) = (parse_id::<16>(trace_id)?, parse_id::<8>(parent_id)?);
    match version {
        0xff => return Err(InvalidContext::Version),
        0x00 if !rest.is_empty() => return Err(InvalidContext::Shape),
        _ if !(rest.is_empty() || rest.starts_with(b"-")) => return Err(InvalidContext::Shape),
        _ => {}
    }
    if trace_id == [0; 16] {
        return Err(InvalidContext::ZeroTraceId);
    }
    if parent_id == [0; 8] {
        return Err(InvalidContext::ZeroParentId);
    }
    Ok(TraceContext { trace_id, parent_id, flags: TraceFlags(flags & TraceFlags::DEFINED) })
}

/// Formats a version 00 `traceparent`.
pub fn format_traceparent(context: &TraceContext) -> Vec<u8> {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    let [_, _, _, ids @ .., f, g] = &mut text;
    let (trace_id, parent_id) = ids.split_at_mut(33);
    write_hex(trace_id, &context.trace_id);
    write_hex(parent_id, &context.parent_id);
    [.., *f, *g] = bytes_to_hex([0, 0, 0, context.flags.0 & TraceFlags::DEFINED]);
    text.to_vec()
}

/// Writes `bytes`, of which there are a multiple of four, as lower-case digits.
#[inline]
fn write_hex(text: &mut [u8], bytes: &[u8]) {
    for (eight, four) in text.as_chunks_mut::<8>().0.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *eight = bytes_to_hex(*four);
    }
}

/// The id of `2 N` lower-case digits.
#[inline]
fn parse_id<const N: usize>(text: &[u8]) -> Result<[u8; N], InvalidContext> {
    let mut id = [0; N];
    for (part, eight) in id.as_chunks_mut::<4>().0.iter_mut().zip(text.as_chunks::<8>().0) {
        *part = hex_to_bytes(*eight)?;
    }
    Ok(id)
}

/// An id of up to `2 N` digits of either case, padded on the left: what formats write that shorten ids.
pub(super) fn parse_padded_id<const N: usize>(text: &[u8]) -> Result<[u8; N], InvalidContext> {
    let padded = pad(text, N)?;
    padded.last_chunk().copied().ok_or(InvalidContext::Shape)
}

#[inline(never)]
fn pad(text: &[u8], length: usize) -> Result<[u8; 16], InvalidContext> {
    let mut padded = [b'0'; 32];
    if text.is_empty() || text.len() > 2 * length {
        return Err(InvalidContext::Shape);
    }
    for (place, digit) in padded.iter_mut().rev().zip(text.iter().rev()) {
        *place = digit.to_ascii_lowercase();
    }
    match (parse_id(&padded)?, length) {
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 16) => Err(InvalidContext::ZeroTraceId),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], _) => Err(InvalidContext::ZeroParentId),
        (id, _) => Ok(id),
    }
}

// Eight digits are one machine word, the first of them in its lowest byte, as the module's memory has them: no step
// below looks at a single digit.

/// A word of eight bytes of this value.
const fn repeat(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// The four bytes that eight lower-case digits stand for.
#[inline]
fn hex_to_bytes(text: [u8; 8]) -> Result<[u8; 4], InvalidContext> {
    let text = u64::from_le_bytes(text);
    // A letter's low half counts from 1, and stands for that and 9 more.
    let nibbles = (text & repeat(0x0f)) + ((text >> 6) & repeat(0x01)) * 9;
    // What is no digit stands for nothing, or for what is written otherwise.
    if nibbles & repeat(0xf0) != 0 || nibbles_to_hex(nibbles) != text {
        return Err(InvalidContext::Character);
    }
    let pairs = (nibbles << 4 | nibbles >> 8) & 0x00ff_00ff_00ff_00ff;
    let halves = (pairs | pairs >> 8) & 0x0000_ffff_0000_ffff;
    Ok(((halves | halves >> 16) as u32).to_le_bytes())
}

/// Eight lower-case digits for four bytes: the inverse of [`hex_to_bytes`].
#[inline]
pub(super) fn bytes_to_hex(bytes: [u8; 4]) -> [u8; 8] {
    let whole = u64::from(u32::from_le_bytes(bytes));
    let halves = (whole | whole << 16) & 0x0000_ffff_0000_ffff;
    let pairs = (halves | halves << 8) & 0x00ff_00ff_00ff_00ff;
    nibbles_to_hex((pairs >> 4 | pairs << 8) & repeat(0x0f)).to_le_bytes()
}

/// The digit of each nibble, a nibble in each byte.
#[inline]
const fn nibbles_to_hex(nibbles: u64) -> u64 {
    const PAST_NINE: u64 = (b'a' - b'0' - 10) as u64;
    nibbles + repeat(b'0') + (((nibbles + repeat(6)) >> 4) & repeat(0x01)) * PAST_NINE
}

/// Appends `bytes`. Not inlined, as [`push_hex`] is not: formats are written in many small pieces.
#[inline(never)]
pub(super) fn push(text: &mut Vec<u8>, bytes: &[u8]) {
    text.extend_from_slice(bytes);
}

/// Appends `bytes`, of which there are a multiple of four, as lower-case digits.
#[inline(never)]
pub(super) fn push_hex(text: &mut Vec<u8>, bytes: &[u8]) {
    for four in bytes.as_chunks::<4>().0 {
        text.extend_from_slice(&bytes_to_hex(*four));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_specifications_example() {
        let context = parse_traceparent(VALID.as_bytes()).unwrap();
        assert_eq!(context.flags, TraceFlags::SAMPLED);
        assert_eq!(format_traceparent(&context), VALID.as_bytes());
    }

    #[test]
    fn what_is_no_traceparent() {
        let with = |from: &str, to: &str| parse_traceparent(VALID.replacen(from, to, 1).as_bytes());
        assert_eq!(with("00-", "ff-"), Err(InvalidContext::Version));
        assert_eq!(with("00-4", "0-4"), Err(InvalidContext::Shape));
        assert_eq!(with("00-4", "000-4"), Err(InvalidContext::Shape));
        assert_eq!(with("00-4", ".0-4"), Err(InvalidContext::Character));
        assert_eq!(with("4bf", "4bF"), Err(InvalidContext::Character));
        assert_eq!(with("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)), Err(InvalidContext::ZeroTraceId));
        assert_eq!(with("00f067aa0ba902b7", &"0".repeat(16)), Err(InvalidContext::ZeroParentId));
        assert_eq!(with("-01", "-0"), Err(InvalidContext::Shape));
        assert_eq!(with("-01", "-.1"), Err(InvalidContext::Character));
        assert_eq!(with("-01", "-01-what"), Err(InvalidContext::Shape));
        assert_eq!(with("-01", "-011"), Err(InvalidContext::Shape));
        assert_eq!(with("4736-00", "4736000"), Err(InvalidContext::Shape));
        assert_eq!(parse_traceparent(b""), Err(InvalidContext::Shape));
    }

    #[test]
    fn a_higher_version_is_read_as_far_as_it_is_known() {
        let with = |from: &str, to: &str| parse_traceparent(VALID.replacen(from, to, 1).as_bytes());
        assert!(with("00-", "cc-").is_ok());
        let longer = VALID.replacen("00-", "cc-", 1) + "-what-the-future";
        assert!(parse_traceparent(longer.as_bytes()).is_ok());
        assert_eq!(parse_traceparent(longer.replace("-what", ".what").as_bytes()), Err(InvalidContext::Shape));
        assert_eq!(with("-01", "-ff").unwrap().flags, TraceFlags::SAMPLED.with(TraceFlags::RANDOM));
    }

    #[test]
    fn no_other_character_is_a_digit() {
        for character in 0..=u8::MAX {
            let is_digit = character.is_ascii_digit() || (b'a'..=b'f').contains(&character);
            for place in 0..8 {
                let mut text = *b"0123cdef";
                text[place] = character;
                assert_eq!(hex_to_bytes(text).is_ok(), is_digit, "{character} at {place}");
            }
        }
    }

    #[test]
    fn short_ids_are_padded() {
        assert_eq!(parse_padded_id::<8>(b"aB"), Ok([0, 0, 0, 0, 0, 0, 0, 0xab]));
        assert_eq!(parse_padded_id::<8>(b"123"), Ok([0, 0, 0, 0, 0, 0, 0x01, 0x23]));
        assert_eq!(parse_padded_id::<8>(b""), Err(InvalidContext::Shape));
        assert_eq!(parse_padded_id::<8>(b"00000000000000001"), Err(InvalidContext::Shape));
        assert_eq!(parse_padded_id::<8>(b"0"), Err(InvalidContext::ZeroParentId));
        assert_eq!(parse_padded_id::<16>(b"0"), Err(InvalidContext::ZeroTraceId));
        assert_eq!(parse_padded_id::<16>(b"g"), Err(InvalidContext::Character));
    }

    proptest! {
        #[test]
        fn parse_and_format_are_inverse(trace_id: [u8; 16], parent_id: [u8; 8], flags in 0..4_u8) {
            prop_assume!(trace_id != [0; 16] && parent_id != [0; 8]);
            let context = TraceContext { trace_id, parent_id, flags: TraceFlags(flags) };
            prop_assert_eq!(parse_traceparent(&format_traceparent(&context)), Ok(context));
        }

        /// Every character at every place of eight is a digit or none, as a reader of one digit would say.
        #[test]
        fn eight_digits_are_read_as_one_by_one(text: [u8; 8], place in 0..8_usize) {
            let mut near = *b"09af3b7c";
            near[place] = text[place];
            for text in [text, near] {
                let is_digit = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
                let expected = std::str::from_utf8(&text)
                    .ok()
                    .filter(|_| text.iter().all(is_digit))
                    .map(|text| u32::from_str_radix(text, 16).unwrap().to_be_bytes());
                prop_assert_eq!(hex_to_bytes(text).ok(), expected);
                if let Some(four) = expected {
                    prop_assert_eq!(bytes_to_hex(four), text);
                }
            }
        }

        #[test]
        fn no_bytes_panic(value in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = (parse_traceparent(&value), parse_padded_id::<16>(&value), parse_padded_id::<8>(&value));
        }
    }
}
