//! Fractions, durations and instants: what a policy's numbers mean once they are read.
//!
//! Fractions are integers of parts per million, so that two proxies never disagree by a rounding, and durations are
//! nanoseconds of the host's monotonic clock, so that a step of the wall clock changes nothing. Only what proxies have
//! to agree on without a word between them, such as the beginning of a rollout, is an instant of the wall clock.

use crate::decimal::{Decimal, parse_decimal};
use crate::document::{Fields, Value};
use std::fmt;
use std::time::Duration;

/// An instant of a monotonic clock: its nanoseconds since a zero of no meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MonotonicInstant(u64);

impl MonotonicInstant {
    pub const ZERO: MonotonicInstant = MonotonicInstant(0);
    pub const MAX: MonotonicInstant = MonotonicInstant(u64::MAX);

    #[inline]
    pub const fn from_nanos(nanoseconds: u64) -> MonotonicInstant {
        MonotonicInstant(nanoseconds)
    }

    #[inline]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    #[inline]
    pub const fn saturating_add(self, nanoseconds: u64) -> MonotonicInstant {
        MonotonicInstant(self.0.saturating_add(nanoseconds))
    }

    #[inline]
    pub const fn saturating_sub(self, nanoseconds: u64) -> MonotonicInstant {
        MonotonicInstant(self.0.saturating_sub(nanoseconds))
    }

    /// The nanoseconds from `earlier` to this; 0 where `earlier` is the later.
    #[inline]
    pub const fn saturating_since(self, earlier: MonotonicInstant) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    #[inline]
    pub const fn to_le_bytes(self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    #[inline]
    pub const fn from_le_bytes(bytes: [u8; 8]) -> MonotonicInstant {
        MonotonicInstant(u64::from_le_bytes(bytes))
    }
}

/// The instant `nanoseconds` after the zero.
#[cfg(test)]
pub(crate) const fn at(nanoseconds: u64) -> MonotonicInstant {
    MonotonicInstant(nanoseconds)
}

/// By how much an instant that another worker has written may lie ahead of the one that this worker goes by, in
/// nanoseconds: the clock is read first, and shared data afterwards, by which time others have read a later clock.
pub const LATENESS: u64 = 1_000_000_000;

/// An instant of the wall clock: its nanoseconds since 1970 began, UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixNanos(u64);

impl UnixNanos {
    pub const ZERO: UnixNanos = UnixNanos(0);
    pub const MAX: UnixNanos = UnixNanos(u64::MAX);

    #[inline]
    pub const fn from_nanos(nanoseconds: u64) -> UnixNanos {
        UnixNanos(nanoseconds)
    }

    #[inline]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    #[inline]
    pub const fn saturating_add(self, nanoseconds: u64) -> UnixNanos {
        UnixNanos(self.0.saturating_add(nanoseconds))
    }

    /// The nanoseconds from `earlier` to this; 0 where `earlier` is the later.
    #[inline]
    pub const fn saturating_since(self, earlier: UnixNanos) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The nanoseconds from `earlier` to this, or `None` where `earlier` is the later.
    #[inline]
    pub const fn checked_since(self, earlier: UnixNanos) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }

    #[inline]
    pub const fn to_le_bytes(self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    #[inline]
    pub const fn from_le_bytes(bytes: [u8; 8]) -> UnixNanos {
        UnixNanos(u64::from_le_bytes(bytes))
    }
}

/// A share in parts per million, 0 to 1,000,000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fraction(u32);

impl Fraction {
    pub const WHOLE: Fraction = Fraction(1_000_000);
    pub const NONE: Fraction = Fraction(0);

    /// `ppm` parts per million; more than the whole is the whole.
    pub const fn from_ppm(ppm: u32) -> Fraction {
        Fraction(if ppm > 1_000_000 { 1_000_000 } else { ppm })
    }

    pub const fn ppm(self) -> u32 {
        self.0
    }

    /// From 0 to 1.
    pub fn as_part(self) -> f64 {
        f64::from(self.0) / 1_000_000.0
    }

    /// Whether a uniformly drawn 64-bit number falls into this share: exactly `ppm` of every million, to 2^-44.
    pub const fn includes(self, draw: u64) -> bool {
        point(draw) < self.0
    }

    /// A percentage as it is written, exact to one part per million: 0.0001 is one part.
    fn from_percent(percent: f64) -> Option<Fraction> {
        let ppm = (percent * 10_000.0).round();
        let exact = (percent * 10_000.0 - ppm).abs() < 1e-6;
        (exact && (0.0..=1_000_000.0).contains(&ppm)).then_some(Fraction(ppm as u32))
    }

    /// Reads a bare number as a percentage: a weight.
    pub fn read_number(value: &Value<'_>) -> Option<Fraction> {
        let fraction = value.as_number().and_then(Fraction::from_percent);
        if fraction.is_none() {
            value.unfit("expected a number from 0 to 100 in steps of 0.0001");
        }
        fraction
    }

    /// Reads Istio's `{value: 5.0}`, or `"5%"`.
    pub fn read(value: &Value<'_>) -> Option<Fraction> {
        if value.is_object() {
            let mut fields = value.object()?;
            let fraction = fields.required("value").and_then(|percent| Fraction::read_number(&percent));
            fields.end();
            return fraction;
        }
        let fraction = value.as_string().and_then(Fraction::parse);
        if fraction.is_none() {
            value.unfit("expected {value: 5.0} or \"5%\", from 0 to 100 in steps of 0.0001");
        }
        fraction
    }

    /// Reads `5%`.
    pub fn parse(text: &str) -> Option<Fraction> {
        let ppm = parse_decimal(text.strip_suffix('%')?.trim(), 10_000)?;
        u32::try_from(ppm).ok().filter(|ppm| *ppm <= Fraction::WHOLE.0).map(Fraction)
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", Decimal(u64::from(self.0), 10_000))
    }
}

/// Scales a uniformly drawn 64-bit number to 0..1,000,000 without bias.
pub const fn point(draw: u64) -> u32 {
    ((draw as u128 * 1_000_000) >> 64) as u32
}

/// Reads a duration such as "250ms", "1.5s", "5m" or "1h30m", from `least` up to a day.
pub fn read_duration(value: &Value<'_>, least: Duration) -> Option<Duration> {
    const DAY: Duration = Duration::from_secs(86_400);
    let duration = value.as_string().and_then(parse_duration).filter(|duration| (least..=DAY).contains(duration));
    if duration.is_none() {
        let least = Decimal(least.as_millis() as u64, 1000);
        value.unfit(format!("expected a duration such as \"250ms\", \"30s\" or \"5m\", from {least}s to 24h"));
    }
    duration
}

/// The duration in the field `name`, in nanoseconds; `default` where none is written, or none that will do.
#[inline(never)]
pub fn duration_or(fields: &mut Fields<'_>, name: &'static str, least: Duration, default: u64) -> u64 {
    fields.optional(name).and_then(|value| read_duration(&value, least)).map_or(default, nanoseconds)
}

/// Go's duration syntax, as Istio and Envoy's command line write it; no sign, and nothing finer than a nanosecond.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() || text.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at_checked(unit_at)?;
        let number_at = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(number_at)?;
        let (scale, times) = match unit {
            "ns" => (1, 1),
            "us" | "µs" => (1_000, 1),
            "ms" => (1_000_000, 1),
            "s" => (1_000_000_000, 1),
            "m" => (1_000_000_000, 60),
            "h" => (1_000_000_000, 3600),
            _ => return None,
        };
        let part = parse_decimal(number, scale)?.checked_mul(times)?;
        total = total.checked_add(Duration::from_nanos(part))?;
        rest = tail;
    }
    Some(total)
}

/// `duration` in nanoseconds; what does not fit 584 years is cut.
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads an instant such as "2026-11-21T09:00:00Z".
pub fn read_instant(value: &Value<'_>) -> Option<UnixNanos> {
    let instant = value.as_string().and_then(parse_instant);
    if instant.is_none() {
        value.unfit("expected an RFC 3339 instant such as \"2026-11-21T09:00:00Z\" or \"2026-11-21T10:00:00+01:00\"");
    }
    instant
}

/// RFC 3339's `date-time`, from 1970 to 2553. There are no leap seconds, because the clock it is compared with has
/// none, and nothing finer than a nanosecond.
pub fn parse_instant(text: &str) -> Option<UnixNanos> {
    let bytes = text.as_bytes();
    let separated = [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')];
    if separated.iter().any(|(at, expected)| bytes.get(*at).map(u8::to_ascii_uppercase) != Some(*expected)) {
        return None;
    }
    let [year, month, day] = [digits(bytes, 0, 4)?, digits(bytes, 5, 2)?, digits(bytes, 8, 2)?];
    let [hour, minute, second] = [digits(bytes, 11, 2)?, digits(bytes, 14, 2)?, digits(bytes, 17, 2)?];
    let mut rest = text.get(19..)?;
    let mut fraction = 0;
    if rest.starts_with('.') {
        let end = rest.bytes().skip(1).position(|byte| !byte.is_ascii_digit())? + 1;
        fraction = parse_decimal(rest.get(..end)?, SECOND)?;
        rest = rest.get(end..)?;
    }
    let offset = match rest.as_bytes() {
        [b'Z' | b'z'] => 0,
        zone @ [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let (hours, minutes) = (digits(zone, 1, 2)?, digits(zone, 4, 2)?);
            let seconds = (hours < 24 && minutes < 60).then_some(hours * 3600 + minutes * 60)?;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days_in_month = match month {
        2 => 28 + i64::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=days_in_month).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    // Days in the proleptic Gregorian calendar, counted in years that begin in March, so that the leap day is the last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year / 4 - year / 100 + year / 400;
    let days = year * 365 + leap_days + (153 * month + 2) / 5 + day - 1 - 719_468;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset;
    u64::try_from(seconds).ok()?.checked_mul(SECOND)?.checked_add(fraction).map(UnixNanos)
}

/// The number of `count` digits that begins at `start`.
fn digits(bytes: &[u8], start: usize, count: usize) -> Option<i64> {
    bytes
        .get(start..start + count)?
        .iter()
        .try_fold(0, |number, byte| byte.is_ascii_digit().then(|| number * 10 + i64::from(byte - b'0')))
}

const SECOND: u64 = 1_000_000_000;

/// Whole seconds, rounded up: a client told to wait must not come back too early.
pub const fn seconds_rounded_up(nanoseconds: u64) -> u64 {
    nanoseconds.div_ceil(1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;

    fn fraction(text: &str) -> Result<Fraction, String> {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let read = Fraction::read(&Value::root(&node, &report));
        read.ok_or_else(|| report.into_diagnostics().first().unwrap().to_string())
    }

    #[test]
    fn percentages_are_read_in_both_spellings() {
        assert_eq!(fraction(r#"{"value": 5.0}"#), Ok(Fraction(50_000)));
        assert_eq!(fraction(r#""0.0001%""#), Ok(Fraction(1)));
        assert_eq!(fraction(r#""100%""#), Ok(Fraction::WHOLE));
        assert_eq!(fraction(r#"{"value": 0.1}"#), Ok(Fraction(1_000)));
        for bad in [r#""5""#, "5", r#""101%""#, r#""-1%""#, r#""0.00001%""#, r#""NaN%""#, r#"{"value": 101}"#, "{}"] {
            assert!(fraction(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_follow_go() {
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        for bad in ["", "5", "s", "5 s", "-5s", "5d", "1..5s", "1e3s", "99999999999h"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn instants_follow_rfc_3339() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1970-03-01T00:00:00Z", 5_097_600),
            ("2000-02-29T23:59:59Z", 951_868_799),
            ("2026-11-21T09:00:00Z", 1_795_251_600),
            ("2026-11-21t10:30:00+01:30", 1_795_251_600),
            ("2026-11-20T21:00:00-12:00", 1_795_251_600),
            ("2100-03-01T00:00:00z", 4_107_542_400),
        ] {
            assert_eq!(parse_instant(text), Some(UnixNanos(seconds * SECOND)), "{text}");
        }
        assert_eq!(parse_instant("1970-01-01T00:00:01.25Z"), Some(UnixNanos(1_250_000_000)));
        for bad in [
            "",
            "tomorrow",
            "2026-11-21",
            "2026-11-21T09:00:00",
            "2026-11-21 09:00:00Z",
            "2026-11-21T09:00Z",
            "2026-11-21T24:00:00Z",
            "2026-11-21T09:60:00Z",
            "2026-11-21T09:00:60Z",
            "2026-02-29T00:00:00Z",
            "2100-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-01-00T00:00:00Z",
            "2026-1-1T00:00:00Z",
            "+026-01-01T00:00:00Z",
            "2026-11-21T09:00:00+1:00",
            "2026-11-21T09:00:00+24:00",
            "2026-11-21T09:00:00+01:00Z",
            "2026-11-21T09:00:00ZZ",
            "2026-11-21T09:00:00.Z",
            "2026-11-21T09:00:00.0000000001Z",
            "1969-12-31T23:59:59Z",
            "9999-01-01T00:00:00Z",
            "2026-11-21T09:00:00Zé",
        ] {
            assert_eq!(parse_instant(bad), None, "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_instant_is_too_odd_to_refuse(text in "[0-9TtZz:.+é-]{0,30}") {
            let _ = parse_instant(&text);
        }

        #[test]
        fn each_second_of_the_calendar_follows_the_one_before(seconds in 0..16_000_000_000_u64) {
            let shown = |seconds: u64| {
                let (mut year, mut days) = (1970, seconds / 86_400);
                let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
                while days >= 365 + u64::from(is_leap(year)) {
                    days -= 365 + u64::from(is_leap(year));
                    year += 1;
                }
                let mut month = 0;
                let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
                while days >= lengths[month] {
                    days -= lengths[month];
                    month += 1;
                }
                let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
                format!("{year}-{:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", month + 1, days + 1)
            };
            proptest::prop_assert_eq!(parse_instant(&shown(seconds)), Some(UnixNanos(seconds * SECOND)));
        }
    }

    #[test]
    fn the_shares_of_a_split_cover_every_draw_once() {
        assert!(!Fraction::NONE.includes(0));
        assert!(Fraction::WHOLE.includes(u64::MAX));
        assert_eq!(point(0), 0);
        assert_eq!(point(u64::MAX), 999_999);
        assert_eq!(Fraction(250_000).to_string(), "25%");
        assert_eq!(Fraction(1).to_string(), "0.0001%");
    }

    #[test]
    fn waiting_is_rounded_up() {
        assert_eq!(seconds_rounded_up(1), 1);
        assert_eq!(seconds_rounded_up(1_000_000_000), 1);
        assert_eq!(seconds_rounded_up(1_000_000_001), 2);
    }
}
