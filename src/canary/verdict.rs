//! What the workers of a proxy have agreed on about a rollout, each in one shared word under the rollout's name. The
//! words outlast the policy, so a configuration push changes nothing; a new rollout has new words.

use super::judge::Verdict;
use crate::host::{Change, Conflict, SharedData, update};
use crate::units::Fraction;

/// The first byte of the words, to be changed with their layout.
const SCHEMA: u8 = 1;

/// The verdict that stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    pub verdict: Verdict,
    /// The canary's weight when it was found.
    pub weight: Fraction,
    /// Whether it was written just now.
    pub is_new: bool,
}

/// Writes a verdict to `word`, unless it stands there already or the canary has failed: that is for good.
///
/// # Errors
/// [`Conflict`] if the word could not be written.
pub fn settle(store: &impl SharedData, word: &str, verdict: Verdict, weight: Fraction) -> Result<Settled, Conflict> {
    update(store, word, |found| match found.and_then(decode) {
        Some(known) if known.verdict == Verdict::Fail || known.verdict == verdict => Change::Keep(known),
        // One who has only begun does not take a verdict back.
        Some(known) if verdict == Verdict::Insufficient && weight == Fraction::NONE => Change::Keep(known),
        _ => Change::Write(encode(verdict, weight), Settled { verdict, weight, is_new: true }),
    })
}

fn encode(verdict: Verdict, weight: Fraction) -> Vec<u8> {
    let verdict = match verdict {
        Verdict::Insufficient => 0,
        Verdict::Pass => 1,
        Verdict::Fail => 2,
    };
    [&[SCHEMA, verdict], &weight.ppm().to_le_bytes()[..]].concat()
}

fn decode(word: &[u8]) -> Option<Settled> {
    let ([SCHEMA, verdict], weight) = word.split_first_chunk::<2>()? else { return None };
    let verdict = match verdict {
        0 => Verdict::Insufficient,
        1 => Verdict::Pass,
        2 => Verdict::Fail,
        _ => return None,
    };
    let weight = Fraction::from_ppm(<[u8; 4]>::try_from(weight).ok().map(u32::from_le_bytes)?);
    Some(Settled { verdict, weight, is_new: false })
}

/// The edge under `word`, or `edge`, which all will find there; never 0.
///
/// # Errors
/// [`Conflict`] if the word could not be written.
pub fn agree_on_edge(store: &impl SharedData, word: &str, edge: u64) -> Result<u64, Conflict> {
    let known = |word: &[u8]| match word.split_first() {
        Some((&SCHEMA, edge)) => <[u8; 8]>::try_from(edge).ok().map(u64::from_le_bytes).filter(|edge| *edge > 0),
        _ => None,
    };
    update(store, word, |found| match found.and_then(known) {
        Some(edge) => Change::Keep(edge),
        None => Change::Write([&[SCHEMA], &edge.max(1).to_le_bytes()[..]].concat(), edge.max(1)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Version;
    use crate::host::sim::Sim;

    const TEN: Fraction = Fraction::from_ppm(100_000);

    #[test]
    fn a_failure_stands_for_good() {
        let host = Sim::new(1);
        let settle = |verdict, weight| settle(&host, "w", verdict, weight).unwrap();
        assert!(settle(Verdict::Insufficient, Fraction::NONE).is_new);
        assert!(settle(Verdict::Pass, TEN).is_new);
        assert!(!settle(Verdict::Pass, TEN).is_new);
        assert_eq!(settle(Verdict::Insufficient, Fraction::NONE).verdict, Verdict::Pass, "one who has only begun");
        assert!(settle(Verdict::Insufficient, TEN).is_new, "evidence may fade");
        assert!(settle(Verdict::Pass, Fraction::NONE).is_new, "what was found is written at any weight");
        let failed = settle(Verdict::Fail, TEN);
        assert_eq!(failed, Settled { verdict: Verdict::Fail, weight: TEN, is_new: true });
        for verdict in [Verdict::Insufficient, Verdict::Pass, Verdict::Fail] {
            assert_eq!(settle(verdict, Fraction::WHOLE), Settled { is_new: false, ..failed });
        }
    }

    #[test]
    fn a_neighbours_garbage_is_no_verdict_and_no_edge() {
        for garbage in
            [&b""[..], b"\x01", b"\x01\x03\0\0\0\0", b"\x02\x02\0\0\0\0", b"\x01\x02\0\0\0", b"\x01\0\0\0\0\0\0\0\0"]
        {
            let host = Sim::new(1);
            host.set("w", garbage, Version::ABSENT).unwrap();
            assert_eq!(settle(&host, "w", Verdict::Insufficient, TEN).unwrap().verdict, Verdict::Insufficient);
            host.set("e", garbage, Version::ABSENT).unwrap();
            assert_eq!(agree_on_edge(&host, "e", 7), Ok(7));
        }
    }

    #[test]
    fn the_first_edge_is_everybodys() {
        let host = Sim::new(1);
        assert_eq!(agree_on_edge(&host, "e", 7), Ok(7));
        assert_eq!(agree_on_edge(&host, "e", 9), Ok(7));
    }
}
