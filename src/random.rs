//! SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014): one word of
//! state, every value once in its period. The host seeds it from the system's random source; it draws trace ids and
//! faults, and no secret.

/// The next number of the sequence that `state` stands in.
pub fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    /// The values of the reference implementation for the seed 1234567.
    #[test]
    fn agrees_with_the_reference() {
        let mut state = 1_234_567;
        let drawn: Vec<u64> = (0..3).map(|_| super::split_mix(&mut state)).collect();
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }
}
