//! What all workers know about the keys of a global limit between two calls: how many hits are prepaid, or that the key is
//! over its limit, and until when.
//!
//! Keys are kept in a fixed number of shared-data records with several keys in each, like the keys of local limits. An entry
//! may be dropped in favour of another key: dropped hits admit no request, and a dropped refusal costs one call. So memory
//! is bounded, and no key is admitted too often.

use crate::shared_data::Record;
use crate::units::MonotonicInstant;

/// The number of entries in a record.
pub(super) const WAYS: usize = 8;

/// The bytes of one entry in a record.
const ENTRY_SIZE: usize = 28;

/// The number of prepaid hits of a key that is over its limit.
const OVER: u32 = u32::MAX;

/// The most nanoseconds between the ends of one window in two responses. Windows with prepaid hits last a minute at least.
pub(super) const SAME_WINDOW: u64 = 2_000_000_000;

/// The keys of one record. Its size is at most 225 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PrepaidBucket {
    entries: Vec<PrepaidEntry>,
}

/// The state of one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PrepaidEntry {
    fingerprint: u64,
    /// The instant until which the rest is valid.
    until: MonotonicInstant,
    /// The number of prepaid hits, or [`OVER`].
    prepaid: u32,
    /// The number of hits that the last call charged.
    batch: u32,
    /// The remaining hits in the last response. For a key over its limit, the milliseconds from `until` to its reset.
    remaining: u32,
}

/// What the last response contained about the window of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WindowStatus {
    /// The instant until which the window lasts; 0 if it is unknown.
    pub(super) until: MonotonicInstant,
    pub(super) batch: u32,
    pub(super) remaining: u32,
}

/// The result of looking up a key for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    /// A prepaid hit, which is used now. It was valid until this instant.
    Hit(MonotonicInstant),
    /// The key is over its limit. The reset is in this number of nanoseconds.
    OverLimit(u64),
    /// The service has to be called.
    NotPrepaid(WindowStatus),
}

impl Record for PrepaidBucket {
    const SCHEMA: u8 = 1;
    const CAPACITY: usize = 2 + WAYS * ENTRY_SIZE;

    fn encode(&self, bytes: &mut Vec<u8>) {
        for entry in &self.entries {
            bytes.extend_from_slice(&entry.fingerprint.to_le_bytes());
            bytes.extend_from_slice(&entry.until.to_le_bytes());
            bytes.extend_from_slice(&entry.prepaid.to_le_bytes());
            bytes.extend_from_slice(&entry.batch.to_le_bytes());
            bytes.extend_from_slice(&entry.remaining.to_le_bytes());
        }
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<PrepaidBucket> {
        let (chunks, remainder) = bytes.as_chunks::<ENTRY_SIZE>();
        if schema != Self::SCHEMA || !remainder.is_empty() || chunks.len() > WAYS {
            return None;
        }
        let mut entries = Vec::with_capacity(chunks.len() + 1);
        for chunk in chunks {
            let (fingerprint, rest) = chunk.split_first_chunk::<8>()?;
            let (until, rest) = rest.split_first_chunk::<8>()?;
            let (prepaid, rest) = rest.split_first_chunk::<4>()?;
            let (batch, remaining) = rest.split_first_chunk::<4>()?;
            entries.push(PrepaidEntry {
                fingerprint: u64::from_le_bytes(*fingerprint),
                until: MonotonicInstant::from_le_bytes(*until),
                prepaid: u32::from_le_bytes(*prepaid),
                batch: u32::from_le_bytes(*batch),
                remaining: u32::from_le_bytes(*remaining.first_chunk()?),
            });
        }
        Some(PrepaidBucket { entries })
    }
}

impl PrepaidBucket {
    fn live(&mut self, fingerprint: u64, now: MonotonicInstant) -> Option<&mut PrepaidEntry> {
        self.entries.iter_mut().find(|entry| entry.fingerprint == fingerprint && entry.until > now)
    }

    /// Uses a prepaid hit of a key, if there is one.
    pub(super) fn take(&mut self, fingerprint: u64, now: MonotonicInstant) -> Lookup {
        match self.live(fingerprint, now) {
            Some(PrepaidEntry { until, prepaid: OVER, remaining, .. }) => Lookup::OverLimit(
                until.saturating_since(now).saturating_add(u64::from(*remaining).saturating_mul(1_000_000)),
            ),
            Some(entry) if entry.prepaid > 0 => {
                entry.prepaid -= 1;
                Lookup::Hit(entry.until)
            }
            Some(PrepaidEntry { until, batch, remaining, .. }) => {
                Lookup::NotPrepaid(WindowStatus { until: *until, batch: *batch, remaining: *remaining })
            }
            None => Lookup::NotPrepaid(WindowStatus::default()),
        }
    }

    /// Refunds a hit that was valid until `until`, while its window lasts.
    pub(super) fn refund(&mut self, fingerprint: u64, until: MonotonicInstant, now: MonotonicInstant) {
        if let Some(entry) = self.live(fingerprint, now)
            && entry.prepaid < OVER - 1
            && entry.until.as_nanos().abs_diff(until.as_nanos()) <= SAME_WINDOW
        {
            entry.prepaid += 1;
        }
    }

    /// Adds `hits` prepaid hits.
    pub(super) fn add(&mut self, fingerprint: u64, hits: u32, known: WindowStatus, now: MonotonicInstant) {
        let mut entry = self.take_out(fingerprint, now);
        // The earlier end of two responses: a hit must not be used after its window.
        entry.until = if entry.until > now { entry.until.min(known.until) } else { known.until };
        let prepaid = if entry.prepaid == OVER { 0 } else { entry.prepaid };
        entry.prepaid = prepaid.saturating_add(hits).min(OVER - 1);
        entry.batch = known.batch;
        entry.remaining = known.remaining;
        self.entries.push(entry);
    }

    /// Stores that a key is over its limit until `until`, and that its reset is at most `then` nanoseconds later. Prepaid
    /// hits stay valid: they were charged.
    pub(super) fn refuse(&mut self, fingerprint: u64, until: MonotonicInstant, then: u64, now: MonotonicInstant) {
        let mut entry = self.take_out(fingerprint, now);
        if entry.prepaid == 0 || entry.prepaid == OVER {
            let remaining = u32::try_from(then / 1_000_000).unwrap_or(u32::MAX);
            entry = PrepaidEntry { fingerprint, until, prepaid: OVER, batch: 0, remaining };
        }
        self.entries.push(entry);
    }

    /// Removes the entry of a key, which the caller adds again, or makes a new one. In a full record the entry with the
    /// fewest prepaid hits is dropped.
    fn take_out(&mut self, fingerprint: u64, now: MonotonicInstant) -> PrepaidEntry {
        self.entries.retain(|entry| entry.until > now);
        let worth = |entry: &PrepaidEntry| (entry.prepaid.wrapping_add(1), entry.until);
        let known = self.entries.iter().position(|entry| entry.fingerprint == fingerprint);
        if let Some(at) = known {
            return self.entries.swap_remove(at);
        }
        if self.entries.len() >= WAYS {
            let cheapest = self.entries.iter().map(worth).min();
            if let Some(at) = self.entries.iter().position(|entry| Some(worth(entry)) == cheapest) {
                self.entries.swap_remove(at);
            }
        }
        PrepaidEntry { fingerprint, ..PrepaidEntry::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    const NOW: MonotonicInstant = at(1_000_000_000_000);
    const UNTIL: MonotonicInstant = NOW.saturating_add(40_000_000_000);
    const WINDOW: WindowStatus = WindowStatus { until: UNTIL, batch: 10, remaining: 990 };

    fn encode(bucket: &PrepaidBucket) -> Vec<u8> {
        let mut bytes = vec![PrepaidBucket::SCHEMA];
        bucket.encode(&mut bytes);
        bytes
    }

    fn decode(record: &[u8]) -> Option<PrepaidBucket> {
        let (schema, bytes) = record.split_first()?;
        PrepaidBucket::decode(*schema, bytes)
    }

    #[test]
    fn prepaid_hits_are_spent_once_and_not_after_their_window() {
        let mut bucket = PrepaidBucket::default();
        assert_eq!(bucket.take(1, NOW), Lookup::NotPrepaid(WindowStatus::default()));
        bucket.add(1, 2, WINDOW, NOW);
        assert_eq!(bucket.take(2, NOW), Lookup::NotPrepaid(WindowStatus::default()), "another key");
        assert_eq!(bucket.take(1, UNTIL), Lookup::NotPrepaid(WindowStatus::default()), "the window is over");
        assert_eq!(bucket.take(1, UNTIL.saturating_sub(1)), Lookup::Hit(UNTIL));
        assert_eq!(bucket.take(1, NOW), Lookup::Hit(UNTIL));
        assert_eq!(bucket.take(1, NOW), Lookup::NotPrepaid(WINDOW));
        bucket.refund(1, UNTIL.saturating_add(1), NOW);
        bucket.refund(1, UNTIL, UNTIL);
        bucket.refund(1, UNTIL.saturating_sub(60_000_000_000), NOW);
        assert_eq!(bucket.take(1, NOW), Lookup::Hit(UNTIL));
        assert_eq!(
            bucket.take(1, NOW),
            Lookup::NotPrepaid(WINDOW),
            "what comes back too late, or of another window, is lost"
        );
    }

    #[test]
    fn two_answers_hold_as_long_as_the_one_that_ends_first() {
        let mut bucket = PrepaidBucket::default();
        bucket.add(1, 2, WINDOW, NOW);
        bucket.add(1, 2, WindowStatus { until: UNTIL.saturating_add(500_000_000), ..WINDOW }, NOW);
        assert!((0..4).all(|_| bucket.take(1, UNTIL.saturating_sub(1)) == Lookup::Hit(UNTIL)));
        bucket.add(1, 2, WindowStatus { until: UNTIL.saturating_add(9), ..WINDOW }, NOW);
        assert_eq!(bucket.take(1, UNTIL), Lookup::NotPrepaid(WindowStatus::default()));
    }

    #[test]
    fn a_refusal_holds_until_its_time_and_spares_hits_that_were_charged() {
        let mut bucket = PrepaidBucket::default();
        bucket.refuse(1, NOW.saturating_add(3_000_000_000), 1_000_000_000, NOW);
        assert_eq!(bucket.take(1, NOW), Lookup::OverLimit(4_000_000_000));
        assert_eq!(bucket.take(1, NOW.saturating_add(2_999_999_999)), Lookup::OverLimit(1_000_000_001));
        assert_eq!(bucket.take(1, NOW.saturating_add(3_000_000_000)), Lookup::NotPrepaid(WindowStatus::default()));
        bucket.add(2, 1, WINDOW, NOW);
        bucket.refuse(2, UNTIL, 0, NOW);
        assert_eq!(bucket.take(2, NOW), Lookup::Hit(UNTIL));
        bucket.refund(1, NOW, NOW);
        assert_eq!(
            bucket.take(1, NOW),
            Lookup::OverLimit(4_000_000_000),
            "nothing is given back to a key that is over"
        );
    }

    #[test]
    fn a_full_word_forgets_a_key_without_hits_first() {
        let mut bucket = PrepaidBucket::default();
        bucket.refuse(0, UNTIL, 0, NOW);
        for key in 1..WAYS as u64 + 3 {
            bucket.add(key, key as u32, WINDOW, NOW);
        }
        assert_eq!(encode(&bucket).len(), 1 + WAYS * ENTRY_SIZE);
        for forgotten in 0..3 {
            assert_eq!(bucket.take(forgotten, NOW), Lookup::NotPrepaid(WindowStatus::default()), "{forgotten}");
        }
        assert_eq!(bucket.take(WAYS as u64 + 2, NOW), Lookup::Hit(UNTIL));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_something_or_nothing(word in proptest::collection::vec(any::<u8>(), 0..300), now: u64) {
            if let Some(mut bucket) = decode(&word) {
                prop_assert_eq!(&encode(&bucket), &word);
                let now = at(now);
                bucket.take(7, now);
                bucket.refund(7, now, now);
                bucket.add(7, 3, WINDOW, now);
                bucket.refuse(8, now, u64::MAX, now);
                prop_assert!(encode(&bucket).len() <= 1 + WAYS * ENTRY_SIZE);
            }
        }

        /// However many keys crowd into one word, none spends more than was charged for it.
        #[test]
        fn crowding_forgets_and_never_invents(steps in proptest::collection::vec((0..20_u64, 0..9_u32), 1..300)) {
            let mut bucket = PrepaidBucket::default();
            let (mut charged, mut spent) = ([0; 20], [0; 20]);
            for (key, hits) in steps {
                match hits {
                    0..4 if bucket.take(key, NOW) == Lookup::Hit(UNTIL) => spent[key as usize] += 1,
                    0..4 => {}
                    4 => bucket.refuse(key, UNTIL, 0, NOW),
                    hits => {
                        bucket.add(key, hits, WINDOW, NOW);
                        charged[key as usize] += hits;
                    }
                }
                bucket = decode(&encode(&bucket)).unwrap();
                prop_assert!(spent[key as usize] <= charged[key as usize]);
            }
        }
    }
}
