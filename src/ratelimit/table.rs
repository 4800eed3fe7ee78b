//! Many keys in a fixed number of shared words.
//!
//! Shared data cannot be deleted, so keys are hashed to buckets, and a bucket is one word with room for [`WAYS`] keys:
//! each its fingerprint, its theoretical arrival time and what is reserved of it. A key whose time has passed is as
//! good as new and is dropped when the bucket is next written, so nothing is ever forgotten that matters.
//!
//! Where a bucket is full of live keys, the others share its *overflow* time: they may be refused too early, never
//! admitted too often. A key that gets a place of its own later starts from the overflow time, so that what it spent
//! there still counts. A bucket is read and written whole, in one compare-and-swap: no key can be in two places.
//!
//! A worker may *reserve* requests of a key, to admit them without asking again ([`super::lease`]). What is reserved is
//! room that nobody else gets; it is charged when its holder settles, or as if all of it had been used when its time
//! is over. So a worker that vanishes takes nothing away for good.

use super::gcra::{Gcra, Test};
use crate::units::Monotonic;

/// How many keys a bucket holds.
pub(super) const WAYS: usize = 8;

/// The first byte of every word, to be changed with the layout.
const SCHEMA: u8 = 2;

/// The bytes of one key in a word.
const RESIDENT: usize = 28;

/// The clock of reservations: one made in an epoch holds until the end of the next.
pub(super) const EPOCH: u64 = 1_000_000_000;

/// The epoch of an instant; it wraps after 136 years.
pub(super) fn epoch(now: Monotonic) -> u32 {
    (now / EPOCH) as u32
}

/// The keys of one bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bucket {
    overflow: Monotonic,
    residents: Vec<Resident>,
}

/// One key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Resident {
    fingerprint: u64,
    tat: Monotonic,
    /// The epoch of `reserved`; `reserved_before` is of the one before it.
    epoch: u32,
    reserved: u32,
    reserved_before: u32,
}

/// Where a charge was booked, to take it back from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Own,
    Overflow,
}

/// A worker's reservation, as it comes back to settle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reservation {
    pub(super) epoch: u32,
    pub(super) size: u32,
    pub(super) used: u32,
}

impl Resident {
    fn reserved(&self) -> u32 {
        self.reserved.saturating_add(self.reserved_before)
    }

    /// Charges what was reserved and is past its time as if it had been used, at the last instant at which it can have
    /// been.
    fn expire(&mut self, gcra: &Gcra, now: Monotonic) {
        let current = epoch(now);
        while self.epoch != current && self.reserved() > 0 {
            let end = u64::from(self.epoch).saturating_add(1).saturating_mul(EPOCH);
            if self.reserved_before > 0 {
                self.tat = gcra.charge(self.tat, self.reserved_before, end.min(now));
            }
            self.reserved_before = self.reserved;
            self.reserved = 0;
            self.epoch = self.epoch.wrapping_add(1);
        }
        self.epoch = current;
    }

    /// Charges what was used of a reservation, and frees the rest.
    fn settle(&mut self, reservation: Reservation, gcra: &Gcra, now: Monotonic) {
        let held = if reservation.epoch == self.epoch {
            &mut self.reserved
        } else if reservation.epoch.wrapping_add(1) == self.epoch {
            &mut self.reserved_before
        } else {
            return; // expired, and charged in full
        };
        // What is not there (any more) was charged already, or forgotten with its key.
        let size = reservation.size.min(*held);
        *held -= size;
        if size > 0 && reservation.used > 0 {
            self.tat = gcra.charge(self.tat, reservation.used.min(size), now);
        }
    }

    fn is_live(&self, now: Monotonic) -> bool {
        self.tat > now || self.reserved() > 0
    }
}

impl Bucket {
    /// Reads a word; `None` where it is not one of ours. A time further ahead than `gcra` leads to was left by a slower
    /// rate: what was spent stays spent, and is regained at the rate of today.
    pub(super) fn decode(word: &[u8], gcra: &Gcra, now: Monotonic) -> Option<Bucket> {
        let (schema, rest) = word.split_first()?;
        let (overflow, rest) = rest.split_first_chunk::<8>()?;
        let (chunks, remainder) = rest.as_chunks::<RESIDENT>();
        if *schema != SCHEMA || !remainder.is_empty() || chunks.len() > WAYS {
            return None;
        }
        let latest = gcra.latest(now);
        let mut residents = Vec::with_capacity(chunks.len() + 1);
        for chunk in chunks {
            let (fingerprint, rest) = chunk.split_first_chunk::<8>()?;
            let (tat, rest) = rest.split_first_chunk::<8>()?;
            let (epoch, rest) = rest.split_first_chunk::<4>()?;
            let (reserved, reserved_before) = rest.split_first_chunk::<4>()?;
            let mut resident = Resident {
                fingerprint: u64::from_le_bytes(*fingerprint),
                tat: u64::from_le_bytes(*tat).min(latest),
                epoch: u32::from_le_bytes(*epoch),
                reserved: u32::from_le_bytes(*reserved),
                reserved_before: u32::from_le_bytes(*reserved_before.first_chunk()?),
            };
            resident.expire(gcra, now);
            resident.tat = resident.tat.min(latest);
            residents.push(resident);
        }
        Some(Bucket { overflow: u64::from_le_bytes(*overflow).min(latest), residents })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut word = Vec::with_capacity(9 + self.residents.len() * RESIDENT);
        word.push(SCHEMA);
        word.extend(self.overflow.to_le_bytes());
        for resident in &self.residents {
            word.extend(resident.fingerprint.to_le_bytes());
            word.extend(resident.tat.to_le_bytes());
            word.extend(resident.epoch.to_le_bytes());
            word.extend(resident.reserved.to_le_bytes());
            word.extend(resident.reserved_before.to_le_bytes());
        }
        word
    }

    fn resident(&mut self, fingerprint: u64) -> Option<&mut Resident> {
        self.residents.iter_mut().find(|resident| resident.fingerprint == fingerprint)
    }

    /// Settles a reservation of the key with `fingerprint`.
    pub(super) fn settle(&mut self, fingerprint: u64, reservation: Reservation, gcra: &Gcra, now: Monotonic) {
        if let Some(resident) = self.resident(fingerprint) {
            resident.settle(reservation, gcra, now);
        }
    }

    /// Charges one request of the key with `fingerprint`; nothing has changed if it does not conform.
    pub(super) fn charge(&mut self, fingerprint: u64, gcra: &Gcra, now: Monotonic) -> (Test, Place) {
        if let Some(resident) = self.resident(fingerprint) {
            let test = gcra.test(resident.tat, resident.reserved(), now);
            if let Test::Conforms { tat } = test {
                resident.tat = tat;
            }
            return (test, Place::Own);
        }
        let test = gcra.test(self.overflow, 0, now);
        let Test::Conforms { tat } = test else { return (test, Place::Overflow) };
        self.residents.retain(|resident| resident.is_live(now));
        if self.residents.len() < WAYS {
            self.residents.push(Resident { fingerprint, tat, epoch: epoch(now), reserved: 0, reserved_before: 0 });
            (test, Place::Own)
        } else {
            self.overflow = tat;
            (test, Place::Overflow)
        }
    }

    /// Reserves up to `wanted` requests of a key that has a place of its own; how many it has got.
    pub(super) fn reserve(&mut self, fingerprint: u64, wanted: u32, gcra: &Gcra, now: Monotonic) -> u32 {
        let Some(resident) = self.resident(fingerprint) else { return 0 };
        let room = gcra.room(resident.tat, resident.reserved(), now);
        let granted = wanted.min(u32::try_from(room).unwrap_or(u32::MAX));
        resident.reserved = resident.reserved.saturating_add(granted);
        granted
    }

    /// Takes one charge back from where it was booked.
    pub(super) fn take_back(&mut self, fingerprint: u64, place: Place, gcra: &Gcra) {
        match place {
            Place::Overflow => self.overflow = gcra.take_back(self.overflow),
            Place::Own => {
                if let Some(resident) = self.resident(fingerprint) {
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
        assert_eq!(word.len(), 1 + 8 + WAYS * RESIDENT);
        assert_eq!(Bucket::decode(&word, &gcra(), now), Some(bucket));
        let mut newer = word.clone();
        newer[0] += 1;
        let long: Vec<u8> = word.iter().chain(&[0; RESIDENT]).copied().collect();
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

    #[test]
    fn what_a_vanished_worker_reserved_is_charged_once_and_comes_back() {
        let now = 1_000_000_000_000;
        let mut bucket = Bucket::default();
        bucket.charge(1, &gcra(), now);
        assert_eq!(bucket.reserve(1, 10, &gcra(), now), 4, "the rest of the burst");
        assert!(matches!(bucket.charge(1, &gcra(), now + 100_000_000).0, Test::Conforms { .. }));
        assert!(matches!(bucket.charge(1, &gcra(), now + 100_000_000).0, Test::TooEarly { .. }));
        let later = now + 2_000_000_000;
        let mut after = Bucket::decode(&bucket.encode(), &gcra(), later).unwrap();
        assert_eq!(after.residents[0].reserved(), 0);
        let admitted = (0..10).filter(|_| matches!(after.charge(1, &gcra(), later).0, Test::Conforms { .. })).count();
        assert_eq!(admitted, 1, "charged at the end of the reservation's time, as if all had been used then");
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
