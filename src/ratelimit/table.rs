//! Many keys in a fixed number of shared words.
//!
//! Shared data cannot be deleted, so keys are hashed to buckets, and a bucket is one word with room for [`WAYS`] keys:
//! each its fingerprint and its theoretical arrival time. A key whose time has passed is as good as new and is dropped
//! when the bucket is next written, so nothing is ever forgotten that matters.
//!
//! Where a bucket is full of live keys, the others share its *overflow* time: they may be refused too early, never
//! admitted too often. A key that gets a place of its own later starts from the overflow time, so that what it spent
//! there still counts. A bucket is read and written whole, in one compare-and-swap: no key can be in two places.

use super::gcra::{Gcra, Test};
use crate::units::Monotonic;

/// How many keys a bucket holds.
pub(super) const WAYS: usize = 8;

/// The first byte of every word, to be changed with the layout.
const SCHEMA: u8 = 1;

/// The keys of one bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bucket {
    overflow: Monotonic,
    residents: Vec<Resident>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Resident {
    fingerprint: u64,
    tat: Monotonic,
}

/// Where a charge was booked, to take it back from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Own,
    Overflow,
}

impl Bucket {
    /// Reads a word; `None` where it is not one of ours. A time further ahead than `gcra` leads to was left by a slower
    /// rate: what was spent stays spent, and is regained at the rate of today.
    pub(super) fn decode(word: &[u8], gcra: &Gcra, now: Monotonic) -> Option<Bucket> {
        let (schema, rest) = word.split_first()?;
        let (overflow, rest) = rest.split_first_chunk::<8>()?;
        let (chunks, remainder) = rest.as_chunks::<16>();
        if *schema != SCHEMA || !remainder.is_empty() || chunks.len() > WAYS {
            return None;
        }
        let latest = gcra.latest(now);
        let mut bucket = Bucket { overflow: u64::from_le_bytes(*overflow).min(latest), residents: Vec::new() };
        for chunk in chunks {
            let (fingerprint, tat) = chunk.split_first_chunk::<8>()?;
            let tat = u64::from_le_bytes(*tat.first_chunk()?).min(latest);
            bucket.residents.push(Resident { fingerprint: u64::from_le_bytes(*fingerprint), tat });
        }
        Some(bucket)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut word = Vec::with_capacity(9 + self.residents.len() * 16);
        word.push(SCHEMA);
        word.extend(self.overflow.to_le_bytes());
        for resident in &self.residents {
            word.extend(resident.fingerprint.to_le_bytes());
            word.extend(resident.tat.to_le_bytes());
        }
        word
    }

    /// Charges one request of the key with `fingerprint`; the bucket has changed only if it conforms.
    pub(super) fn charge(&mut self, fingerprint: u64, gcra: &Gcra, now: Monotonic) -> (Test, Place) {
        if let Some(resident) = self.residents.iter_mut().find(|resident| resident.fingerprint == fingerprint) {
            let test = gcra.test(resident.tat, now);
            if let Test::Conforms { tat } = test {
                resident.tat = tat;
            }
            return (test, Place::Own);
        }
        let test = gcra.test(self.overflow, now);
        let Test::Conforms { tat } = test else { return (test, Place::Overflow) };
        self.residents.retain(|resident| resident.tat > now);
        if self.residents.len() < WAYS {
            self.residents.push(Resident { fingerprint, tat });
            (test, Place::Own)
        } else {
            self.overflow = tat;
            (test, Place::Overflow)
        }
    }

    /// Takes one charge back from where it was booked.
    pub(super) fn take_back(&mut self, fingerprint: u64, place: Place, gcra: &Gcra) {
        match place {
            Place::Overflow => self.overflow = gcra.take_back(self.overflow),
            Place::Own => {
                if let Some(resident) = self.residents.iter_mut().find(|resident| resident.fingerprint == fingerprint) {
                    resident.tat = gcra.take_back(resident.tat);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn gcra() -> Gcra {
        Gcra::new(10, 1_000_000_000, 5).unwrap()
    }

    #[test]
    fn garbage_is_told_from_a_word() {
        let now = 1_000_000_000_000;
        let mut bucket = Bucket::default();
        for fingerprint in 0..20 {
            bucket.charge(fingerprint, &gcra(), now);
        }
        let word = bucket.encode();
        assert_eq!(word.len(), 1 + 8 + WAYS * 16);
        assert_eq!(Bucket::decode(&word, &gcra(), now), Some(bucket));
        let mut newer = word.clone();
        newer[0] = 2;
        let long: Vec<u8> = word.iter().chain(&[0; 16]).copied().collect();
        for garbage in [&b""[..], b"x", &word[..word.len() - 1], &newer, &long] {
            assert_eq!(Bucket::decode(garbage, &gcra(), now), None, "{garbage:?}");
        }
    }

    #[test]
    fn a_faster_rate_forgives_nothing_and_punishes_no_longer() {
        let now = 1_000_000_000_000;
        let slow = Gcra::new(2, 86_400_000_000_000, 2).unwrap();
        let mut bucket = Bucket::default();
        while let (Test::Conforms { .. }, _) = bucket.charge(1, &slow, now) {}
        let mut bucket = Bucket::decode(&bucket.encode(), &gcra(), now).unwrap();
        assert_eq!(bucket.charge(1, &gcra(), now).0, Test::TooEarly { wait: 100_000_000 });
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_something_or_nothing(word in proptest::collection::vec(any::<u8>(), 0..300), now: u64) {
            let _ = Bucket::decode(&word, &gcra(), now);
        }

        /// However many keys crowd into one bucket, none is admitted more often than alone.
        #[test]
        fn crowding_never_over_admits(
            requests in proptest::collection::vec((0..24_u64, 0..200_000_000_u64), 1..600),
        ) {
            let start = 1_000_000_000_000;
            let mut now = start;
            let mut bucket = Bucket::default();
            let mut admitted: HashMap<u64, Vec<u64>> = HashMap::new();
            for (key, step) in requests {
                now += step;
                if let (Test::Conforms { .. }, _) = bucket.charge(key, &gcra(), now) {
                    let times = admitted.entry(key).or_default();
                    times.push(now);
                    for (index, since) in times.iter().enumerate() {
                        let count = (times.len() - index) as u64;
                        prop_assert!(count <= 5 + (now - since) / 100_000_000, "key {key}");
                    }
                }
                bucket = Bucket::decode(&bucket.encode(), &gcra(), now).unwrap();
            }
        }

        #[test]
        fn what_is_taken_back_can_be_spent_again(keys in proptest::collection::vec(0..12_u64, 1..60)) {
            let now = 1_000_000_000_000;
            let mut bucket = Bucket::default();
            for key in keys {
                let before = bucket.clone();
                let (test, place) = bucket.charge(key, &gcra(), now);
                if let Test::Conforms { .. } = test {
                    bucket.take_back(key, place, &gcra());
                    let (again, _) = bucket.clone().charge(key, &gcra(), now);
                    let conforms = matches!(again, Test::Conforms { .. });
                    prop_assert!(conforms);
                    bucket.charge(key, &gcra(), now);
                } else {
                    prop_assert_eq!(&before, &bucket);
                }
            }
        }
    }
}
