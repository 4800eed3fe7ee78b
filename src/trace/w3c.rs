//! W3C Trace Context: `traceparent` (level 2, section 3.2) and `tracestate` (section 3.3).

/// A trace's identity and this hop's place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: [u8; 16],
    pub parent_id: [u8; 8],
    pub flags: Flags,
}

/// The trace flags that are defined; other bits are sent as zero (section 3.2.2.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u8);

impl Flags {
    /// The caller may have recorded the trace.
    pub const SAMPLED: Flags = Flags(0x01);
    /// The low 56 bits of the trace id are random (level 2).
    pub const RANDOM: Flags = Flags(0x02);
    const DEFINED: u8 = 0x03;

    pub const fn with(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
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

fn digit(character: u8) -> Result<u8, Invalid> {
    match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        _ => Err(Invalid::Character),
    }
}

/// Appends `bytes` as lower-case digits.
fn push_hex(text: &mut Vec<u8>, bytes: &[u8]) {
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
    push_hex(&mut text, &[context.flags.0]);
    text
}

/// The most members of a `tracestate` (section 3.3.1.1).
const MAX_MEMBERS: usize = 32;

/// Whether the values of all `tracestate` headers of a request are one valid list (section 3.3.1). Empty members are
/// allowed; a list that is not valid is dropped whole.
pub fn is_tracestate<'v>(values: impl Iterator<Item = &'v [u8]>) -> bool {
    let members = values.flat_map(|value| value.split(|byte| *byte == b',')).map(trim_ows);
    let mut count = 0;
    for member in members.filter(|member| !member.is_empty()) {
        count += 1;
        let mut halves = member.splitn(2, |byte| *byte == b'=');
        let key = halves.next().unwrap_or_default();
        if count > MAX_MEMBERS || !is_key(key) || !halves.next().is_some_and(is_value) {
            return false;
        }
    }
    true
}

/// `text` without the spaces and tabs around it (RFC 9110, section 5.6.3).
fn trim_ows(text: &[u8]) -> &[u8] {
    let ows = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = text.iter().position(|byte| !ows(byte)).unwrap_or(text.len());
    let end = text.iter().rposition(|byte| !ows(byte)).map_or(start, |last| last + 1);
    text.get(start..end).unwrap_or_default()
}

/// Level 2, section 3.3.1.3.1: a lower-case letter or digit, then up to 255 of those and `_-*/@`.
fn is_key(key: &[u8]) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let Some((first, rest)) = key.split_first() else { return false };
    key.len() <= 256 && alphanumeric(*first) && rest.iter().all(|byte| alphanumeric(*byte) || b"_-*/@".contains(byte))
}

/// Section 3.3.1.3.2: up to 256 printable characters but `,` and `=`, and the last is no space.
fn is_value(value: &[u8]) -> bool {
    let allowed = |byte: &u8| (0x20..0x7f).contains(byte) && *byte != b',' && *byte != b'=';
    (1..=256).contains(&value.len()) && value.iter().all(allowed) && value.last() != Some(&b' ')
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
    fn tracestate() {
        let valid = |values: &[&str]| is_tracestate(values.iter().map(|value| value.as_bytes()));
        assert!(valid(&["foo=1,bar=2", "rojo=1"]));
        assert!(valid(&["foo=1 \t , \t bar=2, ", ""]));
        assert!(valid(&["foo@=1", "foo@@bar=1", "0a_-*/=x~!"]));
        for bad in ["foo", "foo=", "=1", "Foo=1", "foo =1", "foo=1=2", "é=1", "foo=\u{7f}", "@foo=1"] {
            assert!(!valid(&[bad]), "{bad}");
        }
        let members = |count: usize| (0..count).map(|n| format!("k{n}=1")).collect::<Vec<_>>().join(",");
        assert!(valid(&[&members(32)]));
        assert!(!valid(&[&members(33)]));
        let (key, value) = ("k".repeat(256), "v".repeat(256));
        assert!(valid(&[&format!("{key}={value}")]));
        assert!(!valid(&[&format!("k{key}=1")]));
        assert!(!valid(&[&format!("k={value}v")]));
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
            let _ = (parse_traceparent(&value), is_tracestate([value.as_slice()].into_iter()));
        }
    }
}
