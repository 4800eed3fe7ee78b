//! Logarithm and exponential to twelve digits. The library's own come with seven kilobytes of tables, and Envoy
//! compiles and keeps every byte of the module in every proxy.

use std::f64::consts::{LN_2, SQRT_2};

/// The natural logarithm of a positive number; of anything else, a very negative number.
pub fn ln(x: f64) -> f64 {
    if x.is_nan() || x < f64::MIN_POSITIVE {
        return -1_000.0;
    }
    // x = mantissa * 2^exponent with a mantissa around 1, and ln m = 2 artanh((m - 1) / (m + 1)).
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as f64 - 1023.0;
    let mut mantissa = f64::from_bits(bits & ((1 << 52) - 1) | (1023 << 52));
    if mantissa > SQRT_2 {
        mantissa /= 2.0;
        exponent += 1.0;
    }
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let mut sum = 0.0;
    for odd in (1..=19_u8).rev().step_by(2) {
        sum = sum * t * t + 1.0 / f64::from(odd);
    }
    exponent * LN_2 + 2.0 * t * sum
}

/// e to a power of 0 or less.
pub fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    // e^x = 2^-halvings * e^rest, with a rest from -ln 2 to 0.
    let halvings = (-x / LN_2) as u64;
    let rest = x + halvings as f64 * LN_2;
    let mut sum = 1.0;
    for n in (1..=16_u8).rev() {
        sum = 1.0 + rest / f64::from(n) * sum;
    }
    sum * f64::from_bits(1023_u64.saturating_sub(halvings) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn they_agree_with_the_library(x in 1e-300..1e300_f64, y in -650.0..0.0_f64, z in 0.5..2.0_f64) {
            for x in [x, z, 1.0 + z * 1e-9] {
                prop_assert!((ln(x) - x.ln()).abs() <= 1e-12 * x.ln().abs().max(1.0), "ln {x}");
            }
            prop_assert!((exp(y) / y.exp() - 1.0).abs() < 1e-12, "exp {y}");
        }
    }

    #[test]
    fn at_the_ends() {
        assert_eq!((ln(1.0), exp(0.0)), (0.0, 1.0));
        assert_eq!((ln(0.0), ln(f64::NAN).is_nan(), exp(-1e9), exp(f64::NEG_INFINITY)), (-1_000.0, false, 0.0, 0.0));
    }
}
