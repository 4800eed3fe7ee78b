//! Ids as decimal numbers of 64 bits.

use crate::trace::w3c::InvalidContext;

/// Reads a number; zero is one.
#[inline(never)]
pub(super) fn parse(digits: &[u8]) -> Result<u64, InvalidContext> {
    if digits.is_empty() {
        return Err(InvalidContext::Shape);
    }
    digits.iter().try_fold(0_u64, |number, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10).ok_or(InvalidContext::Shape)?;
        number.checked_mul(10).and_then(|number| number.checked_add(u64::from(digit))).ok_or(InvalidContext::Shape)
    })
}

/// Appends a number.
#[inline(never)]
pub(super) fn push(text: &mut Vec<u8>, number: u64) {
    if number >= 10 {
        push(text, number / 10);
    }
    text.push(b'0' + (number % 10) as u8);
}
