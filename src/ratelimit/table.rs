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
//! A worker may *reserve* requests of a key, to admit them without asking again ([`super::lease`]), or until the
//! answer tells whether a request counts ([`super::decision`]). What is reserved is room that nobody else gets; it is charged when its
//! holder settles, or as if all of it had been used when its time is over. So a worker that vanishes takes nothing away
//! for good.
//!
//! Keys of one limit may have different rates. So what a key spent is worked out when that key is asked for; of the
//! others it is only known whether they could still matter, by the rate that takes the longest to regain.

use super::gcra::{Gcra, Test};
use crate::units::MonotonicInstant;

/// How many keys a bucket holds.
pub(super) const WAYS: usize = 8;

/// The first byte of every word, to be changed with the layout.
const SCHEMA: u8 = 2;

/// The bytes of one key in a word.
const RESIDENT: usize = 28;

/// The terms of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    pub(super) gcra: Gcra,
    /// The clock of reservations, in nanoseconds: one made in an epoch holds until the end of the next.
    pub(super) epoch: u64,
}

impl Terms {
    /// The epoch of an instant. It wraps, in 136 years at the soonest.
    pub(super) fn epoch_of(&self, now: MonotonicInstant) -> u32 {
        (now.as_nanos() / self.epoch) as u32
    }
}

/// What is left to a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// How many requests could be admitted now.
    pub(super) remaining: u64,
    /// Nanoseconds until the whole burst could be admitted; where nothing remains, until one request could.
    pub(super) reset: u64,
}

impl Standing {
    fn of(tat: MonotonicInstant, reserved: u32, gcra: &Gcra, now: MonotonicInstant) -> Standing {
        let remaining = gcra.room(tat, reserved, now);
        let reset = match gcra.test(tat, reserved, 1, now) {
            Test::TooEarly { wait } => wait,
            Test::Conforms { .. } => gcra.regained(tat, reserved, now),
        };
        Standing { remaining, reset }
    }
}

/// The keys of one bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bucket {
    overflow: MonotonicInstant,
    residents: Vec<Resident>,
}

/// One key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Resident {
    fingerprint: u64,
    tat: MonotonicInstant,
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
    /// been. A time further ahead than the rate leads to was left by a slower one: what was spent stays spent, and is
    /// regained at the rate of today.
    fn catch_up(&mut self, terms: &Terms, now: MonotonicInstant) {
        let current = terms.epoch_of(now);
        while self.epoch != current && self.reserved() > 0 {
            let end = u64::from(self.epoch).saturating_add(1).saturating_mul(terms.epoch);
            if self.reserved_before > 0 {
                self.tat =
                    terms.gcra.charge(self.tat, self.reserved_before, MonotonicInstant::from_nanos(end).min(now));
            }
            self.reserved_before = self.reserved;
            self.reserved = 0;
            self.epoch = self.epoch.wrapping_add(1);
        }
        self.epoch = current;
        self.tat = terms.gcra.within_reach(self.tat, now);
    }

    /// Charges what was used of a reservation, and frees the rest.
    fn settle(&mut self, reservation: Reservation, gcra: &Gcra, now: MonotonicInstant) {
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

    /// Whether the key may differ from a fresh one, `longest` being the terms that take the longest to regain.
    fn is_live(&self, longest: &Terms, now: MonotonicInstant) -> bool {
        let held_until = u64::from(self.epoch).saturating_add(2).saturating_mul(longest.epoch);
        self.tat > now || self.reserved() > 0 && longest.gcra.latest(MonotonicInstant::from_nanos(held_until)) > now
    }
}

impl Bucket {
    /// Reads a word; `None` where it is not one of ours. No time is taken to be further ahead than `longest` leads to.
    pub(super) fn decode(word: &[u8], longest: &Terms, now: MonotonicInstant) -> Option<Bucket> {
        let (schema, rest) = word.split_first()?;
        let (overflow, rest) = rest.split_first_chunk::<8>()?;
        let (chunks, remainder) = rest.as_chunks::<RESIDENT>();
        if *schema != SCHEMA || !remainder.is_empty() || chunks.len() > WAYS {
            return None;
        }
        let within_reach = |tat: &[u8; 8]| longest.gcra.within_reach(MonotonicInstant::from_le_bytes(*tat), now);
        let mut residents = Vec::with_capacity(chunks.len() + 1);
        for chunk in chunks {
            let (fingerprint, rest) = chunk.split_first_chunk::<8>()?;
            let (tat, rest) = rest.split_first_chunk::<8>()?;
            let (epoch, rest) = rest.split_first_chunk::<4>()?;
            let (reserved, reserved_before) = rest.split_first_chunk::<4>()?;
            residents.push(Resident {
                fingerprint: u64::from_le_bytes(*fingerprint),
                tat: within_reach(tat),
                epoch: u32::from_le_bytes(*epoch),
                reserved: u32::from_le_bytes(*reserved),
                reserved_before: u32::from_le_bytes(*reserved_before.first_chunk()?),
            });
        }
        Some(Bucket { overflow: within_reach(overflow), residents })
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

    fn resident(&mut self, fingerprint: u64, terms: &Terms, now: MonotonicInstant) -> Option<&mut Resident> {
        let resident = self.residents.iter_mut().find(|resident| resident.fingerprint == fingerprint)?;
        resident.catch_up(terms, now);
        Some(resident)
    }

    /// Settles a reservation of the key with `fingerprint`.
    pub(super) fn settle(&mut self, fingerprint: u64, reservation: Reservation, terms: &Terms, now: MonotonicInstant) {
        if let Some(resident) = self.resident(fingerprint, terms, now) {
            resident.settle(reservation, &terms.gcra, now);
        }
    }

    /// Charges `cost` requests of the key with `fingerprint`; nothing has changed if they do not conform. `longest` is
    /// as in [`Bucket::decode`].
    pub(super) fn charge(
        &mut self,
        fingerprint: u64,
        cost: u32,
        terms: &Terms,
        longest: &Terms,
        now: MonotonicInstant,
    ) -> (Test, Place) {
        if let Some(resident) = self.resident(fingerprint, terms, now) {
            let test = terms.gcra.test(resident.tat, resident.reserved(), cost, now);
            if let Test::Conforms { tat } = test {
                resident.tat = tat;
            }
            return (test, Place::Own);
        }
        let test = terms.gcra.test(self.overflow, 0, cost, now);
        let Test::Conforms { tat } = test else { return (test, Place::Overflow) };
        self.residents.retain(|resident| resident.is_live(longest, now));
        if self.residents.len() < WAYS {
            let epoch = terms.epoch_of(now);
            self.residents.push(Resident { fingerprint, tat, epoch, reserved: 0, reserved_before: 0 });
            (test, Place::Own)
        } else {
            self.overflow = tat;
            (test, Place::Overflow)
        }
    }

    /// Makes the charge of a moment ago a reservation: it is not known yet whether it counts.
    pub(super) fn hold(&mut self, fingerprint: u64, cost: u32, terms: &Terms, now: MonotonicInstant) {
        if let Some(resident) = self.resident(fingerprint, terms, now) {
            resident.tat = terms.gcra.take_back(resident.tat, cost);
            resident.reserved = resident.reserved.saturating_add(cost);
        }
    }

    /// Reserves up to `wanted` requests of a key that has a place of its own; how many it has got.
    pub(super) fn reserve(&mut self, fingerprint: u64, wanted: u32, terms: &Terms, now: MonotonicInstant) -> u32 {
        let Some(resident) = self.resident(fingerprint, terms, now) else { return 0 };
        let room = terms.gcra.room(resident.tat, resident.reserved(), now);
        let granted = wanted.min(u32::try_from(room).unwrap_or(u32::MAX));
        resident.reserved = resident.reserved.saturating_add(granted);
        granted
    }

    /// Takes a charge back from where it was booked.
    pub(super) fn take_back(
        &mut self,
        fingerprint: u64,
        cost: u32,
        place: Place,
        terms: &Terms,
        now: MonotonicInstant,
    ) {
        match place {
            Place::Overflow => self.overflow = terms.gcra.take_back(self.overflow, cost),
            Place::Own => {
                if let Some(resident) = self.resident(fingerprint, terms, now) {
                    resident.tat = terms.gcra.take_back(resident.tat, cost);
                }
            }
        }
    }

    /// What is left to the key with `fingerprint`.
    pub(super) fn standing(&mut self, fingerprint: u64, terms: &Terms, now: MonotonicInstant) -> Standing {
        let overflow = self.overflow;
        let (tat, reserved) = match self.resident(fingerprint, terms, now) {
            Some(resident) => (resident.tat, resident.reserved()),
            None => (overflow, 0),
        };
        Standing::of(tat, reserved, &terms.gcra, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn terms(requests: u64, unit: u64, burst: u64) -> Terms {
        Terms { gcra: Gcra::new(requests, unit, burst).unwrap(), epoch: 1_000_000_000 }
    }

    fn usual() -> Terms {
        terms(10, 1_000_000_000, 5)
    }

    fn charge(bucket: &mut Bucket, fingerprint: u64, terms: &Terms, now: MonotonicInstant) -> (Test, Place) {
        bucket.charge(fingerprint, 1, terms, terms, now)
    }

    #[test]
    fn garbage_is_told_from_a_word() {
        let now = at(1_000_000_000_000);
        let mut bucket = Bucket::default();
        for fingerprint in 0..20 {
            charge(&mut bucket, fingerprint, &usual(), now);
        }
        let word = bucket.encode();
        assert_eq!(word.len(), 1 + 8 + WAYS * RESIDENT);
        assert_eq!(Bucket::decode(&word, &usual(), now), Some(bucket));
        let mut newer = word.clone();
        newer[0] += 1;
        let long: Vec<u8> = word.iter().chain(&[0; RESIDENT]).copied().collect();
        for garbage in [&b""[..], b"x", &word[..word.len() - 1], &newer, &long] {
            assert_eq!(Bucket::decode(garbage, &usual(), now), None, "{garbage:?}");
        }
    }

    #[test]
    fn a_faster_rate_forgives_nothing_and_punishes_no_longer() {
        let now = at(1_000_000_000_000);
        let slow = terms(2, 86_400_000_000_000, 2);
        let mut bucket = Bucket::default();
        while let (Test::Conforms { .. }, _) = charge(&mut bucket, 1, &slow, now) {}
        let mut bucket = Bucket::decode(&bucket.encode(), &usual(), now).unwrap();
        assert_eq!(charge(&mut bucket, 1, &usual(), now).0, Test::TooEarly { wait: 100_000_000 });
    }

    #[test]
    fn a_worker_that_read_the_clock_earlier_forgives_nothing() {
        let now = at(1_000_000_000_000);
        let later = now.saturating_add(20_000_000);
        let mut bucket = Bucket::default();
        for fingerprint in 1..=2 {
            while let (Test::Conforms { .. }, _) = charge(&mut bucket, fingerprint, &usual(), later) {}
        }
        let known = bucket.encode();
        let mut bucket = Bucket::decode(&known, &usual(), now).unwrap();
        assert_eq!(charge(&mut bucket, 1, &usual(), now).0, Test::TooEarly { wait: 120_000_000 });
        bucket.settle(2, Reservation::default(), &usual(), now);
        assert_eq!(bucket.encode(), known);
    }

    #[test]
    fn what_a_vanished_worker_reserved_is_charged_once_and_comes_back() {
        let now = at(1_000_000_000_000);
        let mut bucket = Bucket::default();
        charge(&mut bucket, 1, &usual(), now);
        assert_eq!(bucket.reserve(1, 10, &usual(), now), 4, "the rest of the burst");
        assert!(matches!(charge(&mut bucket, 1, &usual(), now.saturating_add(100_000_000)).0, Test::Conforms { .. }));
        assert!(matches!(charge(&mut bucket, 1, &usual(), now.saturating_add(100_000_000)).0, Test::TooEarly { .. }));
        let later = now.saturating_add(2_000_000_000);
        let mut after = Bucket::decode(&bucket.encode(), &usual(), later).unwrap();
        assert_eq!(after.resident(1, &usual(), later).unwrap().reserved(), 0);
        let admitted =
            (0..10).filter(|_| matches!(charge(&mut after, 1, &usual(), later).0, Test::Conforms { .. })).count();
        assert_eq!(admitted, 1, "charged at the end of the reservation's time, as if all had been used then");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_something_or_nothing(word in proptest::collection::vec(any::<u8>(), 0..300), now: u64) {
            let _ = Bucket::decode(&word, &usual(), at(now));
        }

        /// However many keys crowd into one bucket, none is admitted more often than alone.
        #[test]
        fn crowding_never_over_admits(
            requests in proptest::collection::vec((0..24_u64, 0..200_000_000_u64), 1..600),
        ) {
            let start = at(1_000_000_000_000);
            let mut now = start;
            let mut bucket = Bucket::default();
            let mut admitted: HashMap<u64, Vec<MonotonicInstant>> = HashMap::new();
            for (key, step) in requests {
                now = now.saturating_add(step);
                if let (Test::Conforms { .. }, _) = charge(&mut bucket, key, &usual(), now) {
                    let times = admitted.entry(key).or_default();
                    times.push(now);
                    for (index, since) in times.iter().enumerate() {
                        let count = (times.len() - index) as u64;
                        prop_assert!(count <= 5 + now.saturating_since(*since) / 100_000_000, "key {key}");
                    }
                }
                bucket = Bucket::decode(&bucket.encode(), &usual(), now).unwrap();
            }
        }

        /// The same where keys differ in their rates and requests in their costs.
        #[test]
        fn crowding_keys_of_several_rates_never_over_admits(
            requests in proptest::collection::vec((0..24_u64, 1..4_u32, 0..200_000_000_u64), 1..600),
        ) {
            const INTERVAL: u64 = 100_000_000;
            let rates = [usual(), terms(5, 1_000_000_000, 3), terms(1, 1_000_000_000, 4)];
            let longest = rates[2];
            let start = at(1_000_000_000_000);
            let mut now = start;
            let mut bucket = Bucket::default();
            let mut admitted: HashMap<u64, Vec<(MonotonicInstant, u64)>> = HashMap::new();
            for (key, cost, step) in requests {
                now = now.saturating_add(step);
                let rate = (key % 3) as usize;
                if let (Test::Conforms { .. }, _) = bucket.charge(key, cost, &rates[rate], &longest, now) {
                    let times = admitted.entry(key).or_default();
                    times.push((now, cost.into()));
                    let (interval, burst) = [(INTERVAL, 5), (2 * INTERVAL, 3), (10 * INTERVAL, 4)][rate];
                    for (index, (since, _)) in times.iter().enumerate() {
                        let count: u64 = times[index..].iter().map(|(_, cost)| cost).sum();
                        prop_assert!(count <= burst + now.saturating_since(*since) / interval, "key {key}");
                    }
                }
                bucket = Bucket::decode(&bucket.encode(), &longest, now).unwrap();
            }
        }

        #[test]
        fn what_is_taken_back_can_be_spent_again(keys in proptest::collection::vec(0..12_u64, 1..60)) {
            let now = at(1_000_000_000_000);
            let mut bucket = Bucket::default();
            for key in keys {
                let before = bucket.clone();
                let (test, place) = charge(&mut bucket, key, &usual(), now);
                if let Test::Conforms { .. } = test {
                    bucket.take_back(key, 1, place, &usual(), now);
                    let (again, _) = charge(&mut bucket.clone(), key, &usual(), now);
                    let conforms = matches!(again, Test::Conforms { .. });
                    prop_assert!(conforms);
                    charge(&mut bucket, key, &usual(), now);
                } else {
                    prop_assert_eq!(&before, &bucket);
                }
            }
        }
    }
}
