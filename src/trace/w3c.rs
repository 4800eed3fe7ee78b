//! W3C Trace Context, level 2: `traceparent` (section 3.2), and the words in which every other format is told.

/// A trace's identity and this hop's place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: [u8; 16],
    pub parent_id: [u8; 8],
    pub flags: Flags,
}

/// The trace flags that are defined; other bits are sent as zero (section 3.2.2.5). Two more, which never leave in a
/// `traceparent`, say what other formats can say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u8);

impl Flags {
    /// The caller may have recorded the trace.
    pub const SAMPLED: Flags = Flags(0x01);
    /// The low 56 bits of the trace id are random (level 2).
    pub const RANDOM: Flags = Flags(0x02);
    /// Recorded whatever samplers say; implies [`Flags::SAMPLED`].
    pub const DEBUG: Flags = Flags(0x10);
    /// The caller has left the sampling decision to the next hop.
    pub const UNDECIDED: Flags = Flags(0x20);
    const DEFINED: u8 = 0x03;

    /// No flag.
    pub const NONE: Flags = Flags(0);

    /// A caller's decision, where it made one.
    pub const fn decided(sampled: Option<bool>) -> Flags {
        match sampled {
            Some(true) => Flags::SAMPLED,
            Some(false) => Flags::NONE,
            None => Flags::UNDECIDED,
        }
    }

    pub const fn with(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    pub const fn without(self, other: Flags) -> Flags {
        Flags(self.0 & !other.0)
    }

    pub const fn sampled(self) -> bool {
        self.contains(Flags::SAMPLED)
    }

    /// As a byte of a remembered context, and back.
    pub(super) const fn bits(self) -> u8 {
        self.0
    }

    pub(super) const fn from_bits(bits: u8) -> Flags {
        Flags(bits & (Flags::DEFINED | Flags::DEBUG.0))
    }

    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Why a `traceparent` is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalid {
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
pub fn parse_traceparent(value: &[u8]) -> Result<TraceContext, Invalid> {
    let (head, rest) = value.split_first_chunk::<TRACEPARENT_LENGTH>().ok_or(Invalid::Shape)?;
    let mut fields = head.split(|byte| *byte == b'-');
    let mut field = || fields.next().ok_or(Invalid::Shape);
    let [version] = hex(field()?)?;
    let trace_id = hex(field()?)?;
    let parent_id = hex(field()?)?;
    let [flags] = hex(field()?)?;
    match version {
        0xff => return Err(Invalid::Version),
        0x00 if !rest.is_empty() => return Err(Invalid::Shape),
        _ if !(rest.is_empty() || rest.starts_with(b"-")) => return Err(Invalid::Shape),
        _ => {}
    }
    if trace_id == [0; 16] {
        return Err(Invalid::ZeroTraceId);
    }
    if parent_id == [0; 8] {
        return Err(Invalid::ZeroParentId);
    }
    Ok(TraceContext { trace_id, parent_id, flags: Flags(flags & Flags::DEFINED) })
}

/// `N` bytes from exactly `2 N` lower-case digits.
fn hex<const N: usize>(digits: &[u8]) -> Result<[u8; N], Invalid> {
    let (pairs, odd) = digits.as_chunks::<2>();
    if pairs.len() != N || !odd.is_empty() {
        return Err(Invalid::Shape);
    }
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Ok(bytes)
}

/// An id of up to `2 N` digits of either case, padded on the left: what formats write that shorten ids.
#[inline(never)]
pub(super) fn padded_id<const N: usize>(digits: &[u8]) -> Result<[u8; N], Invalid> {
    if digits.is_empty() || digits.len() > 2 * N {
        return Err(Invalid::Shape);
    }
    let mut id = [0; N];
    let mut pairs = digits.rchunks(2);
    for byte in id.iter_mut().rev() {
        for character in pairs.next().unwrap_or_default() {
            *byte = *byte << 4 | digit(character.to_ascii_lowercase())?;
        }
    }
    match (id == [0; N], N) {
        (false, _) => Ok(id),
        (true, 16) => Err(Invalid::ZeroTraceId),
        (true, _) => Err(Invalid::ZeroParentId),
    }
}

fn digit(character: u8) -> Result<u8, Invalid> {
    match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        _ => Err(Invalid::Character),
    }
}

/// Appends `bytes`. Not inlined, as [`push_hex`] is not: formats are written in many small pieces.
#[inline(never)]
pub(super) fn push(text: &mut Vec<u8>, bytes: &[u8]) {
    text.extend_from_slice(bytes);
}

/// Appends `bytes` as lower-case digits.
#[inline(never)]
pub(super) fn push_hex(text: &mut Vec<u8>, bytes: &[u8]) {
    let character = |digit: u8| if digit < 10 { b'0' + digit } else { b'a' + digit - 10 };
    for byte in bytes {
        text.push(character(byte >> 4));
        text.push(character(byte & 0xf));
    }
}

/// Formats a version 00 `traceparent`.
pub fn format_traceparent(context: &TraceContext) -> Vec<u8> {
    let mut text = Vec::with_capacity(TRACEPARENT_LENGTH);
    text.extend(b"00-");
    push_hex(&mut text, &context.trace_id);
    text.push(b'-');
    push_hex(&mut text, &context.parent_id);
    text.push(b'-');
    push_hex(&mut text, &[context.flags.0 & Flags::DEFINED]);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_specifications_example() {
        let context = parse_traceparent(VALID.as_bytes()).unwrap();
        assert_eq!(context.flags, Flags::SAMPLED);
        assert_eq!(format_traceparent(&context), VALID.as_bytes());
    }

    #[test]
    fn what_is_no_traceparent() {
        let with = |from: &str, to: &str| parse_traceparent(VALID.replacen(from, to, 1).as_bytes());
        assert_eq!(with("00-", "ff-"), Err(Invalid::Version));
        assert_eq!(with("00-4", "0-4"), Err(Invalid::Shape));
        assert_eq!(with("00-4", "000-4"), Err(Invalid::Shape));
        assert_eq!(with("00-4", ".0-4"), Err(Invalid::Character));
        assert_eq!(with("4bf", "4bF"), Err(Invalid::Character));
        assert_eq!(with("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)), Err(Invalid::ZeroTraceId));
        assert_eq!(with("00f067aa0ba902b7", &"0".repeat(16)), Err(Invalid::ZeroParentId));
        assert_eq!(with("-01", "-0"), Err(Invalid::Shape));
        assert_eq!(with("-01", "-.1"), Err(Invalid::Character));
        assert_eq!(with("-01", "-01-what"), Err(Invalid::Shape));
        assert_eq!(with("-01", "-011"), Err(Invalid::Shape));
        assert_eq!(with("4736-00", "4736000"), Err(Invalid::Shape));
        assert_eq!(parse_traceparent(b""), Err(Invalid::Shape));
    }

    #[test]
    fn a_higher_version_is_read_as_far_as_it_is_known() {
        let with = |from: &str, to: &str| parse_traceparent(VALID.replacen(from, to, 1).as_bytes());
        assert!(with("00-", "cc-").is_ok());
        let longer = VALID.replacen("00-", "cc-", 1) + "-what-the-future";
        assert!(parse_traceparent(longer.as_bytes()).is_ok());
        assert_eq!(parse_traceparent(longer.replace("-what", ".what").as_bytes()), Err(Invalid::Shape));
        assert_eq!(with("-01", "-ff").unwrap().flags, Flags::SAMPLED.with(Flags::RANDOM));
    }

    #[test]
    fn short_ids_are_padded() {
        assert_eq!(padded_id::<8>(b"aB"), Ok([0, 0, 0, 0, 0, 0, 0, 0xab]));
        assert_eq!(padded_id::<8>(b"123"), Ok([0, 0, 0, 0, 0, 0, 0x01, 0x23]));
        assert_eq!(padded_id::<8>(b""), Err(Invalid::Shape));
        assert_eq!(padded_id::<8>(b"00000000000000001"), Err(Invalid::Shape));
        assert_eq!(padded_id::<8>(b"0"), Err(Invalid::ZeroParentId));
        assert_eq!(padded_id::<16>(b"0"), Err(Invalid::ZeroTraceId));
        assert_eq!(padded_id::<16>(b"g"), Err(Invalid::Character));
    }

    proptest! {
        #[test]
        fn parse_and_format_are_inverse(trace_id: [u8; 16], parent_id: [u8; 8], flags in 0..4_u8) {
            prop_assume!(trace_id != [0; 16] && parent_id != [0; 8]);
            let context = TraceContext { trace_id, parent_id, flags: Flags(flags) };
            prop_assert_eq!(parse_traceparent(&format_traceparent(&context)), Ok(context));
        }

        #[test]
        fn no_bytes_panic(value in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = (parse_traceparent(&value), padded_id::<16>(&value), padded_id::<8>(&value));
        }
    }
}
