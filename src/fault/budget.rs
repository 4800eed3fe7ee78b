//! The share of a route's error budget that an experiment may spend.
//!
//! An objective of 99.9 % lets one request in a thousand fail; a quarter of that is one injected failure in four
//! thousand requests. So that a failure is never spent before it was earned, and what was saved is never spent at once,
//! each injected failure waits until so many requests have come since the one before, or since the experiment began.
//! From the experiment's beginning up to any moment at most `requests / spacing` failures were injected, all workers
//! together; and at most one more than that between any two moments.

use crate::host::{Change, Conflict, SharedData, update};
use crate::units::Fraction;

/// The first byte of the word, to be changed with its layout.
const SCHEMA: u8 = 1;

/// How many requests have to come for each failure: `share` of what `availability` leaves. `None` where it leaves
/// nothing.
pub fn spacing(availability: Fraction, share: Fraction) -> Option<u64> {
    const SQUARE_OF_A_MILLION: u64 = 1_000_000_000_000;
    let failures = u64::from(Fraction::WHOLE.ppm() - availability.ppm()) * u64::from(share.ppm());
    (failures > 0).then(|| SQUARE_OF_A_MILLION.div_ceil(failures))
}

/// Whether another failure may be injected now that `requests` have come; it is spent then. The first one to ask begins
/// the experiment.
///
/// # Errors
/// [`Conflict`] if the word could not be written; nothing was spent.
pub fn spend(store: &impl SharedData, word: &str, spacing: u64, requests: u64) -> Result<bool, Conflict> {
    update(store, word, |found| {
        let last = match found.map(decode) {
            Some(Some(last)) => last,
            // Nothing of ours: the waiting begins.
            None | Some(None) => return Change::Write(encode(requests), false),
        };
        match requests.checked_sub(last) {
            Some(since) if since >= spacing => Change::Write(encode(requests), true),
            _ => Change::Keep(false),
        }
    })
}

fn encode(last: u64) -> Vec<u8> {
    [&[SCHEMA], &last.to_le_bytes()[..]].concat()
}

fn decode(word: &[u8]) -> Option<u64> {
    let (&SCHEMA, last) = word.split_first()? else { return None };
    <[u8; 8]>::try_from(last).ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Version;
    use crate::host::sim::Sim;
    use proptest::prelude::*;

    #[test]
    fn a_quarter_of_three_nines_is_one_in_four_thousand() {
        let percent = |ppm| Fraction::from_ppm(ppm);
        assert_eq!(spacing(percent(999_000), percent(250_000)), Some(4_000));
        assert_eq!(spacing(percent(990_000), Fraction::WHOLE), Some(100));
        assert_eq!(spacing(percent(970_000), Fraction::WHOLE), Some(34), "rounded to fewer failures");
        assert_eq!(spacing(Fraction::NONE, Fraction::WHOLE), Some(1));
        assert_eq!(spacing(Fraction::WHOLE, Fraction::WHOLE), None);
        assert_eq!(spacing(percent(999_000), Fraction::NONE), None);
    }

    #[test]
    fn nothing_is_spent_before_it_is_earned() {
        let host = Sim::new(1);
        assert_eq!(spend(&host, "w", 100, 7_000), Ok(false), "what came before the experiment earns nothing");
        assert_eq!(spend(&host, "w", 100, 7_099), Ok(false));
        assert_eq!(spend(&host, "w", 100, 7_100), Ok(true));
        assert_eq!(spend(&host, "w", 100, 7_100), Ok(false));
        assert_eq!(spend(&host, "w", 100, 90_000), Ok(true));
        assert_eq!(spend(&host, "w", 100, 90_001), Ok(false), "nothing is saved up");
        for garbage in [&b""[..], b"\x02\0\0\0\0\0\0\0\0", b"\x01\0"] {
            host.set("g", garbage, host.get("g").map_or(Version::ABSENT, |(_, version)| version)).unwrap();
            assert_eq!(spend(&host, "g", 1, 1_000), Ok(false), "{garbage:?}");
        }
    }

    proptest! {
        /// Workers that read the number of requests at different times never spend too much together.
        #[test]
        fn any_stretch_of_requests_is_within_the_budget(
            steps in proptest::collection::vec((0..30_u64, 0..20_u64), 1..300),
            spacing in 1..50_u64,
        ) {
            let host = Sim::new(1);
            spend(&host, "w", spacing, 0).unwrap();
            let mut requests = 0;
            let mut spent = Vec::new();
            for (more, late) in steps {
                requests += more;
                let seen = requests.saturating_sub(late);
                if spend(&host, "w", spacing, seen).unwrap() {
                    spent.push(seen);
                }
                prop_assert!(spent.len() as u64 <= requests / spacing);
            }
            for pair in spent.windows(2) {
                prop_assert!(pair[1] - pair[0] >= spacing, "{pair:?}");
            }
        }
    }
}
