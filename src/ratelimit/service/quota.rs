//! What all workers know of a key between two calls: hits that were charged ahead and are still to be spent, or that the
//! key is over its limit, and until when either holds.
//!
//! Kept like the local limits' keys in a fixed number of shared words, several keys in each, changed by
//! compare-and-swap. What is known of a key may be forgotten for another's sake: forgotten hits admit nobody, a forgotten
//! refusal costs one call. So the memory is bounded, and nobody is admitted too often for it.

use crate::units::MonotonicInstant;

/// How many keys a word holds.
pub(super) const WAYS: usize = 8;

/// The first byte of every word, to be changed with the layout.
const SCHEMA: u8 = 1;

/// The bytes of one key in a word.
const RESIDENT: usize = 28;

/// In the place of the hits ahead: the key is over its limit.
const OVER: u32 = u32::MAX;

/// Two answers tell the end of one window by so many nanoseconds apart at most, and windows in which hits are kept are a
/// minute long at least.
pub(super) const SAME_WINDOW: u64 = 2_000_000_000;

/// The keys of one word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Quota {
    residents: Vec<Resident>,
}

/// One key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Resident {
    fingerprint: u64,
    /// Until when the rest holds.
    until: MonotonicInstant,
    /// Hits ahead, or [`OVER`].
    ahead: u32,
    /// How many hits the last call asked for.
    batch: u32,
    /// What the service said remained then; of a key over its limit, milliseconds from `until` to its reset.
    remaining: u32,
}

/// What is known of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// Until when; 0 where nothing is known.
    pub(super) until: MonotonicInstant,
    pub(super) batch: u32,
    pub(super) remaining: u32,
}

/// What one request finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A hit that was charged ahead, and is spent now; until when it could have been.
    Hit(MonotonicInstant),
    /// The key is over its limit; nanoseconds until the reset.
    Over(u64),
    /// The service has to be asked.
    Nothing(Known),
}

impl Quota {
    /// Reads a word; `None` where it is not one of ours.
    pub(super) fn decode(word: &[u8]) -> Option<Quota> {
        let (schema, rest) = word.split_first()?;
        let (chunks, remainder) = rest.as_chunks::<RESIDENT>();
        if *schema != SCHEMA || !remainder.is_empty() || chunks.len() > WAYS {
            return None;
        }
        let mut residents = Vec::with_capacity(chunks.len() + 1);
        for chunk in chunks {
            let (fingerprint, rest) = chunk.split_first_chunk::<8>()?;
            let (until, rest) = rest.split_first_chunk::<8>()?;
            let (ahead, rest) = rest.split_first_chunk::<4>()?;
            let (batch, remaining) = rest.split_first_chunk::<4>()?;
            residents.push(Resident {
                fingerprint: u64::from_le_bytes(*fingerprint),
                until: MonotonicInstant::from_le_bytes(*until),
                ahead: u32::from_le_bytes(*ahead),
                batch: u32::from_le_bytes(*batch),
                remaining: u32::from_le_bytes(*remaining.first_chunk()?),
            });
        }
        Some(Quota { residents })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut word = Vec::with_capacity(1 + self.residents.len() * RESIDENT);
        word.push(SCHEMA);
        for resident in &self.residents {
            word.extend(resident.fingerprint.to_le_bytes());
            word.extend(resident.until.to_le_bytes());
            word.extend(resident.ahead.to_le_bytes());
            word.extend(resident.batch.to_le_bytes());
            word.extend(resident.remaining.to_le_bytes());
        }
        word
    }

    fn live(&mut self, fingerprint: u64, now: MonotonicInstant) -> Option<&mut Resident> {
        self.residents.iter_mut().find(|resident| resident.fingerprint == fingerprint && resident.until > now)
    }

    /// Spends a hit of a key, if one is ahead.
    pub(super) fn take(&mut self, fingerprint: u64, now: MonotonicInstant) -> Found {
        match self.live(fingerprint, now) {
            Some(Resident { until, ahead: OVER, remaining, .. }) => {
                Found::Over(until.saturating_since(now).saturating_add(u64::from(*remaining).saturating_mul(1_000_000)))
            }
            Some(resident) if resident.ahead > 0 => {
                resident.ahead -= 1;
                Found::Hit(resident.until)
            }
            Some(Resident { until, batch, remaining, .. }) => {
                Found::Nothing(Known { until: *until, batch: *batch, remaining: *remaining })
            }
            None => Found::Nothing(Known::default()),
        }
    }

    /// Gives back a spent hit that could have been spent until `until`, while its window lasts.
    pub(super) fn give_back(&mut self, fingerprint: u64, until: MonotonicInstant, now: MonotonicInstant) {
        if let Some(resident) = self.live(fingerprint, now)
            && resident.ahead < OVER - 1
            && resident.until.as_nanos().abs_diff(until.as_nanos()) <= SAME_WINDOW
        {
            resident.ahead += 1;
        }
    }

    /// Notes that `hits` more were charged ahead.
    pub(super) fn add(&mut self, fingerprint: u64, hits: u32, known: Known, now: MonotonicInstant) {
        let mut resident = self.take_out(fingerprint, now);
        // Of two answers the one that holds for less long: a hit must not outlive its window.
        resident.until = if resident.until > now { resident.until.min(known.until) } else { known.until };
        let ahead = if resident.ahead == OVER { 0 } else { resident.ahead };
        resident.ahead = ahead.saturating_add(hits).min(OVER - 1);
        resident.batch = known.batch;
        resident.remaining = known.remaining;
        self.residents.push(resident);
    }

    /// Notes that a key is over its limit until `until`, and that its reset is `then` nanoseconds later at the latest.
    /// Hits that are ahead stay: they were charged.
    pub(super) fn refuse(&mut self, fingerprint: u64, until: MonotonicInstant, then: u64, now: MonotonicInstant) {
        let mut resident = self.take_out(fingerprint, now);
        if resident.ahead == 0 || resident.ahead == OVER {
            let remaining = u32::try_from(then / 1_000_000).unwrap_or(u32::MAX);
            resident = Resident { fingerprint, until, ahead: OVER, batch: 0, remaining };
        }
        self.residents.push(resident);
    }

    /// Takes out a key to put it back changed, fresh if nothing was known of it. Where all places are taken it costs
    /// another key its own, one with few hits ahead.
    fn take_out(&mut self, fingerprint: u64, now: MonotonicInstant) -> Resident {
        self.residents.retain(|resident| resident.until > now);
        let worth = |resident: &Resident| (resident.ahead.wrapping_add(1), resident.until);
        let known = self.residents.iter().position(|resident| resident.fingerprint == fingerprint);
        if let Some(at) = known {
            return self.residents.swap_remove(at);
        }
        if self.residents.len() >= WAYS {
            let cheapest = self.residents.iter().map(worth).min();
            if let Some(at) = self.residents.iter().position(|resident| Some(worth(resident)) == cheapest) {
                self.residents.swap_remove(at);
            }
        }
        Resident { fingerprint, ..Resident::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    const NOW: MonotonicInstant = at(1_000_000_000_000);
    const UNTIL: MonotonicInstant = NOW.saturating_add(40_000_000_000);
    const KNOWN: Known = Known { until: UNTIL, batch: 10, remaining: 990 };

    #[test]
    fn hits_ahead_are_spent_once_and_not_after_their_window() {
        let mut quota = Quota::default();
        assert_eq!(quota.take(1, NOW), Found::Nothing(Known::default()));
        quota.add(1, 2, KNOWN, NOW);
        assert_eq!(quota.take(2, NOW), Found::Nothing(Known::default()), "another key");
        assert_eq!(quota.take(1, UNTIL), Found::Nothing(Known::default()), "the window is over");
        assert_eq!(quota.take(1, UNTIL.saturating_sub(1)), Found::Hit(UNTIL));
        assert_eq!(quota.take(1, NOW), Found::Hit(UNTIL));
        assert_eq!(quota.take(1, NOW), Found::Nothing(KNOWN));
        quota.give_back(1, UNTIL.saturating_add(1), NOW);
        quota.give_back(1, UNTIL, UNTIL);
        quota.give_back(1, UNTIL.saturating_sub(60_000_000_000), NOW);
        assert_eq!(quota.take(1, NOW), Found::Hit(UNTIL));
        assert_eq!(
            quota.take(1, NOW),
            Found::Nothing(KNOWN),
            "what comes back too late, or of another window, is lost"
        );
    }

    #[test]
    fn two_answers_hold_as_long_as_the_one_that_ends_first() {
        let mut quota = Quota::default();
        quota.add(1, 2, KNOWN, NOW);
        quota.add(1, 2, Known { until: UNTIL.saturating_add(500_000_000), ..KNOWN }, NOW);
        assert!((0..4).all(|_| quota.take(1, UNTIL.saturating_sub(1)) == Found::Hit(UNTIL)));
        quota.add(1, 2, Known { until: UNTIL.saturating_add(9), ..KNOWN }, NOW);
        assert_eq!(quota.take(1, UNTIL), Found::Nothing(Known::default()));
    }

    #[test]
    fn a_refusal_holds_until_its_time_and_spares_hits_that_were_charged() {
        let mut quota = Quota::default();
        quota.refuse(1, NOW.saturating_add(3_000_000_000), 1_000_000_000, NOW);
        assert_eq!(quota.take(1, NOW), Found::Over(4_000_000_000));
        assert_eq!(quota.take(1, NOW.saturating_add(2_999_999_999)), Found::Over(1_000_000_001));
        assert_eq!(quota.take(1, NOW.saturating_add(3_000_000_000)), Found::Nothing(Known::default()));
        quota.add(2, 1, KNOWN, NOW);
        quota.refuse(2, UNTIL, 0, NOW);
        assert_eq!(quota.take(2, NOW), Found::Hit(UNTIL));
        quota.give_back(1, NOW, NOW);
        assert_eq!(quota.take(1, NOW), Found::Over(4_000_000_000), "nothing is given back to a key that is over");
    }

    #[test]
    fn a_full_word_forgets_a_key_without_hits_first() {
        let mut quota = Quota::default();
        quota.refuse(0, UNTIL, 0, NOW);
        for key in 1..WAYS as u64 + 3 {
            quota.add(key, key as u32, KNOWN, NOW);
        }
        assert_eq!(quota.encode().len(), 1 + WAYS * RESIDENT);
        for forgotten in 0..3 {
            assert_eq!(quota.take(forgotten, NOW), Found::Nothing(Known::default()), "{forgotten}");
        }
        assert_eq!(quota.take(WAYS as u64 + 2, NOW), Found::Hit(UNTIL));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_something_or_nothing(word in proptest::collection::vec(any::<u8>(), 0..300), now: u64) {
            if let Some(mut quota) = Quota::decode(&word) {
                prop_assert_eq!(&quota.encode(), &word);
                let now = at(now);
                quota.take(7, now);
                quota.give_back(7, now, now);
                quota.add(7, 3, KNOWN, now);
                quota.refuse(8, now, u64::MAX, now);
                prop_assert!(quota.encode().len() <= 1 + WAYS * RESIDENT);
            }
        }

        /// However many keys crowd into one word, none spends more than was charged for it.
        #[test]
        fn crowding_forgets_and_never_invents(steps in proptest::collection::vec((0..20_u64, 0..9_u32), 1..300)) {
            let mut quota = Quota::default();
            let (mut charged, mut spent) = ([0; 20], [0; 20]);
            for (key, hits) in steps {
                match hits {
                    0..4 if quota.take(key, NOW) == Found::Hit(UNTIL) => spent[key as usize] += 1,
                    0..4 => {}
                    4 => quota.refuse(key, UNTIL, 0, NOW),
                    hits => {
                        quota.add(key, hits, KNOWN, NOW);
                        charged[key as usize] += hits;
                    }
                }
                quota = Quota::decode(&quota.encode()).unwrap();
                prop_assert!(spent[key as usize] <= charged[key as usize]);
            }
        }
    }
}
