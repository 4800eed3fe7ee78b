//! Decimal numbers as whole numbers of a fixed scale: exact, and without the tenth of the module that formatting and
//! parsing floating point would take.

use std::fmt;

/// A number that is written in units of which `.1` make one: `Decimal(2500, 1000)` is `2.5`. `.1` is a power of ten.
pub struct Decimal(pub u64, pub u64);

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decimal(value, scale) = *self;
        write!(f, "{}", value / scale)?;
        let mut rest = value % scale;
        let mut place = scale / 10;
        if rest > 0 {
            f.write_str(".")?;
        }
        while rest > 0 && place > 0 {
            write!(f, "{}", rest / place)?;
            rest %= place;
            place /= 10;
        }
        Ok(())
    }
}

/// Parses a decimal number without sign or exponent and multiplies it by `scale`, a power of ten. `None` where the
/// result is not whole or does not fit.
pub fn parse_decimal(text: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() && fraction.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let mut value = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()?.checked_mul(scale)? };
    let mut place = scale;
    for digit in fraction.trim_end_matches('0').bytes() {
        place /= 10;
        if place == 0 {
            return None;
        }
        value = value.checked_add(u64::from(digit - b'0') * place)?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_decimal() {
        for bad in ["", ".", "-1", "+1", "1e3", "1.2.3", "1,5", "0.00001", "99999999999999999999"] {
            assert_eq!(parse_decimal(bad, 10_000), None, "{bad}");
        }
        assert_eq!(parse_decimal(".5", 10), Some(5));
        assert_eq!(parse_decimal("5.", 10), Some(50));
        assert_eq!(parse_decimal("0.50000", 10), Some(5));
    }

    proptest! {
        #[test]
        fn parse_and_format_are_inverse(value in 0..u64::MAX / 10_000) {
            prop_assert_eq!(parse_decimal(&Decimal(value, 10_000).to_string(), 10_000), Some(value));
        }
    }
}
