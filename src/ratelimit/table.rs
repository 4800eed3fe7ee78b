//! Many keys in a fixed number of shared-data records.
//!
//! Shared data cannot be deleted. So the keys of a limit are hashed to a fixed number of buckets. A [`Bucket`] is one record
//! with up to [`WAYS`] entries: the fingerprint of a key, its theoretical arrival time, and what is reserved of it. An entry
//! whose arrival time has passed equals a new one and is dropped at the next write, so nothing that matters is forgotten.
//!
//! If all entries of a bucket are in use, its further keys share the *overflow* time. They may be refused too early, and
//! are never admitted too often. A key that gets an entry later starts from the overflow time, so that what it spent there
//! still counts. A bucket is read and written as a whole with one compare-and-swap, so a key never has two entries.
//!
//! A worker may *reserve* requests of a key: to admit them without reading shared data ([`super::lease`]), or until a
//! response determines whether a request counts ([`super::decision`]). No other worker can use what is reserved. It is
//! charged when its holder settles it, or at the end of its time as if all of it had been used. So a worker that traps takes
//! away nothing for good.
//!
//! The keys of one limit may have different rates. The exact state of a key is computed only when that key is charged. For
//! the other entries the bucket only determines whether they may still matter, by the rate that takes the longest to
//! recover.

use super::gcra::{Conformance, Gcra};
use crate::shared_data::Record;
use crate::units::MonotonicInstant;

/// The number of entries in a bucket.
pub(super) const WAYS: usize = 8;

/// The bytes of one entry in a record.
const ENTRY_SIZE: usize = 28;

/// The parameters of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RateParams {
    pub(super) gcra: Gcra,
    /// The length of an epoch in nanoseconds. A reservation lasts until the end of the epoch after the one in which it was
    /// made.
    pub(super) epoch: u64,
}

impl RateParams {
    /// The epoch of an instant. The number wraps, after 136 years at the earliest.
    pub(super) fn epoch_of(&self, now: MonotonicInstant) -> u32 {
        (now.as_nanos() / self.epoch) as u32
    }
}

/// The remaining quota of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RemainingQuota {
    /// The number of requests that could be admitted now.
    pub(super) remaining: u64,
    /// Nanoseconds until the whole burst could be admitted. If nothing remains, nanoseconds until one request could.
    pub(super) reset: u64,
}

impl RemainingQuota {
    fn new(tat: MonotonicInstant, reserved: u32, gcra: &Gcra, now: MonotonicInstant) -> RemainingQuota {
        let remaining = gcra.room(tat, reserved, now);
        let reset = match gcra.test(tat, reserved, 1, now) {
            Conformance::TooEarly { wait } => wait,
            Conformance::Conforms { .. } => gcra.time_to_full(tat, reserved, now),
        };
        RemainingQuota { remaining, reset }
    }
}

/// The keys of one bucket, as a record. Its size is at most 240 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bucket {
    overflow: MonotonicInstant,
    entries: Vec<BucketEntry>,
}

/// The state of one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct BucketEntry {
    fingerprint: u64,
    tat: MonotonicInstant,
    /// The epoch of `reserved`. `reserved_before` was reserved in the epoch before it.
    epoch: u32,
    reserved: u32,
    reserved_before: u32,
}

/// The part of a bucket that a charge was made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// The entry of the key.
    Own,
    /// The overflow time that keys without an entry share.
    Overflow,
}

/// A reservation and how much of it was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reservation {
    pub(super) epoch: u32,
    pub(super) size: u32,
    pub(super) used: u32,
}

impl BucketEntry {
    fn reserved(&self) -> u32 {
        self.reserved.saturating_add(self.reserved_before)
    }

    /// Charges reservations whose time has ended as if they had been used, at the last instant at which they can have been.
    /// An arrival time further ahead than the rate can lead to was left by a slower rate: what was spent stays spent, and
    /// becomes available again at the present rate.
    fn catch_up(&mut self, params: &RateParams, now: MonotonicInstant) {
        let current = params.epoch_of(now);
        while self.epoch != current && self.reserved() > 0 {
            let end = u64::from(self.epoch).saturating_add(1).saturating_mul(params.epoch);
            if self.reserved_before > 0 {
                self.tat =
                    params.gcra.charge(self.tat, self.reserved_before, MonotonicInstant::from_nanos(end).min(now));
            }
            self.reserved_before = self.reserved;
            self.reserved = 0;
            self.epoch = self.epoch.wrapping_add(1);
        }
        self.epoch = current;
        self.tat = params.gcra.within_reach(self.tat, now);
    }

    /// Charges the used part of a reservation, and releases the rest.
    fn settle(&mut self, reservation: Reservation, gcra: &Gcra, now: MonotonicInstant) {
        let held = if reservation.epoch == self.epoch {
            &mut self.reserved
        } else if reservation.epoch.wrapping_add(1) == self.epoch {
            &mut self.reserved_before
        } else {
            return; // it has expired and was charged in full
        };
        // The rest of the reservation was charged already, or dropped with its entry.
        let size = reservation.size.min(*held);
        *held -= size;
        if size > 0 && reservation.used > 0 {
            self.tat = gcra.charge(self.tat, reservation.used.min(size), now);
        }
    }

    /// Whether the entry may differ from a new one. `longest` are the parameters that take the longest to recover.
    fn is_live(&self, longest: &RateParams, now: MonotonicInstant) -> bool {
        let held_until = u64::from(self.epoch).saturating_add(2).saturating_mul(longest.epoch);
        self.tat > now || self.reserved() > 0 && longest.gcra.latest(MonotonicInstant::from_nanos(held_until)) > now
    }
}

impl Record for Bucket {
    const SCHEMA: u8 = 2;
    const CAPACITY: usize = 10 + WAYS * ENTRY_SIZE;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.overflow.to_le_bytes());
        for entry in &self.entries {
            bytes.extend_from_slice(&entry.fingerprint.to_le_bytes());
            bytes.extend_from_slice(&entry.tat.to_le_bytes());
            bytes.extend_from_slice(&entry.epoch.to_le_bytes());
            bytes.extend_from_slice(&entry.reserved.to_le_bytes());
            bytes.extend_from_slice(&entry.reserved_before.to_le_bytes());
        }
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<Bucket> {
        let (overflow, rest) = bytes.split_first_chunk::<8>()?;
        let (chunks, remainder) = rest.as_chunks::<ENTRY_SIZE>();
        if schema != Self::SCHEMA || !remainder.is_empty() || chunks.len() > WAYS {
            return None;
        }
        let mut entries = Vec::with_capacity(chunks.len() + 1);
        for chunk in chunks {
            let (fingerprint, rest) = chunk.split_first_chunk::<8>()?;
            let (tat, rest) = rest.split_first_chunk::<8>()?;
            let (epoch, rest) = rest.split_first_chunk::<4>()?;
            let (reserved, reserved_before) = rest.split_first_chunk::<4>()?;
            entries.push(BucketEntry {
                fingerprint: u64::from_le_bytes(*fingerprint),
                tat: MonotonicInstant::from_le_bytes(*tat),
                epoch: u32::from_le_bytes(*epoch),
                reserved: u32::from_le_bytes(*reserved),
                reserved_before: u32::from_le_bytes(*reserved_before.first_chunk()?),
            });
        }
        Some(Bucket { overflow: MonotonicInstant::from_le_bytes(*overflow), entries })
    }
}

impl Bucket {
    /// Moves arrival times that are further ahead than `longest` can lead to back to the latest possible one. To be called
    /// after each read, before the bucket is used.
    pub(super) fn limit_arrival_times(&mut self, longest: &RateParams, now: MonotonicInstant) {
        self.overflow = longest.gcra.within_reach(self.overflow, now);
        for entry in &mut self.entries {
            entry.tat = longest.gcra.within_reach(entry.tat, now);
        }
    }

    fn entry(&mut self, fingerprint: u64, params: &RateParams, now: MonotonicInstant) -> Option<&mut BucketEntry> {
        let entry = self.entries.iter_mut().find(|entry| entry.fingerprint == fingerprint)?;
        entry.catch_up(params, now);
        Some(entry)
    }

    /// Settles a reservation of the key with `fingerprint`.
    pub(super) fn settle(
        &mut self,
        fingerprint: u64,
        reservation: Reservation,
        params: &RateParams,
        now: MonotonicInstant,
    ) {
        if let Some(entry) = self.entry(fingerprint, params, now) {
            entry.settle(reservation, &params.gcra, now);
        }
    }

    /// Charges `cost` requests of the key with `fingerprint`. If they do not conform, nothing changes. `longest` is as in
    /// [`Bucket::limit_arrival_times`].
    pub(super) fn charge(
        &mut self,
        fingerprint: u64,
        cost: u32,
        params: &RateParams,
        longest: &RateParams,
        now: MonotonicInstant,
    ) -> (Conformance, EntryKind) {
        if let Some(entry) = self.entry(fingerprint, params, now) {
            let test = params.gcra.test(entry.tat, entry.reserved(), cost, now);
            if let Conformance::Conforms { tat } = test {
                entry.tat = tat;
            }
            return (test, EntryKind::Own);
        }
        let test = params.gcra.test(self.overflow, 0, cost, now);
        let Conformance::Conforms { tat } = test else { return (test, EntryKind::Overflow) };
        self.entries.retain(|entry| entry.is_live(longest, now));
        if self.entries.len() < WAYS {
            let epoch = params.epoch_of(now);
            self.entries.push(BucketEntry { fingerprint, tat, epoch, reserved: 0, reserved_before: 0 });
            (test, EntryKind::Own)
        } else {
            self.overflow = tat;
            (test, EntryKind::Overflow)
        }
    }

    /// Turns the charge that was made last into a reservation, because it is not known yet whether it counts.
    pub(super) fn make_pending(&mut self, fingerprint: u64, cost: u32, params: &RateParams, now: MonotonicInstant) {
        if let Some(entry) = self.entry(fingerprint, params, now) {
            entry.tat = params.gcra.refund(entry.tat, cost);
            entry.reserved = entry.reserved.saturating_add(cost);
        }
    }

    /// Reserves up to `wanted` requests of a key that has an entry. Returns the number that was reserved.
    pub(super) fn reserve(&mut self, fingerprint: u64, wanted: u32, params: &RateParams, now: MonotonicInstant) -> u32 {
        let Some(entry) = self.entry(fingerprint, params, now) else { return 0 };
        let room = params.gcra.room(entry.tat, entry.reserved(), now);
        let granted = wanted.min(u32::try_from(room).unwrap_or(u32::MAX));
        entry.reserved = entry.reserved.saturating_add(granted);
        granted
    }

    /// Refunds a charge to the part of the bucket that it was made in.
    pub(super) fn refund(
        &mut self,
        fingerprint: u64,
        cost: u32,
        kind: EntryKind,
        params: &RateParams,
        now: MonotonicInstant,
    ) {
        match kind {
            EntryKind::Overflow => self.overflow = params.gcra.refund(self.overflow, cost),
            EntryKind::Own => {
                if let Some(entry) = self.entry(fingerprint, params, now) {
                    entry.tat = params.gcra.refund(entry.tat, cost);
                }
            }
        }
    }

    /// The remaining quota of the key with `fingerprint`.
    pub(super) fn remaining_quota(
        &mut self,
        fingerprint: u64,
        params: &RateParams,
        now: MonotonicInstant,
    ) -> RemainingQuota {
        let overflow = self.overflow;
        let (tat, reserved) = match self.entry(fingerprint, params, now) {
            Some(entry) => (entry.tat, entry.reserved()),
            None => (overflow, 0),
        };
        RemainingQuota::new(tat, reserved, &params.gcra, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn terms(requests: u64, unit: u64, burst: u64) -> RateParams {
        RateParams { gcra: Gcra::new(requests, unit, burst).unwrap(), epoch: 1_000_000_000 }
    }

    fn encode(bucket: &Bucket) -> Vec<u8> {
        let mut bytes = vec![Bucket::SCHEMA];
        bucket.encode(&mut bytes);
        bytes
    }

    fn decode(record: &[u8], longest: &RateParams, now: MonotonicInstant) -> Option<Bucket> {
        let (schema, bytes) = record.split_first()?;
        let mut bucket = Bucket::decode(*schema, bytes)?;
        bucket.limit_arrival_times(longest, now);
        Some(bucket)
    }

    fn usual() -> RateParams {
        terms(10, 1_000_000_000, 5)
    }

    fn charge(
        bucket: &mut Bucket,
        fingerprint: u64,
        terms: &RateParams,
        now: MonotonicInstant,
    ) -> (Conformance, EntryKind) {
        bucket.charge(fingerprint, 1, terms, terms, now)
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_garbage_is_not() {
        let now = at(1_000_000_000_000);
        let mut bucket = Bucket::default();
        for fingerprint in 0..20 {
            charge(&mut bucket, fingerprint, &usual(), now);
        }
        let word = encode(&bucket);
        assert_eq!(word.len(), 1 + 8 + WAYS * ENTRY_SIZE);
        assert_eq!(decode(&word, &usual(), now), Some(bucket));
        let mut newer = word.clone();
        newer[0] += 1;
        let long: Vec<u8> = word.iter().chain(&[0; ENTRY_SIZE]).copied().collect();
        for garbage in [&b""[..], b"x", &word[..word.len() - 1], &newer, &long] {
            assert_eq!(decode(garbage, &usual(), now), None, "{garbage:?}");
        }
    }

    #[test]
    fn a_faster_rate_forgives_nothing_and_punishes_no_longer() {
        let now = at(1_000_000_000_000);
        let slow = terms(2, 86_400_000_000_000, 2);
        let mut bucket = Bucket::default();
        while let (Conformance::Conforms { .. }, _) = charge(&mut bucket, 1, &slow, now) {}
        let mut bucket = decode(&encode(&bucket), &usual(), now).unwrap();
        assert_eq!(charge(&mut bucket, 1, &usual(), now).0, Conformance::TooEarly { wait: 100_000_000 });
    }

    #[test]
    fn a_worker_that_read_the_clock_earlier_forgives_nothing() {
        let now = at(1_000_000_000_000);
        let later = now.saturating_add(20_000_000);
        let mut bucket = Bucket::default();
        for fingerprint in 1..=2 {
            while let (Conformance::Conforms { .. }, _) = charge(&mut bucket, fingerprint, &usual(), later) {}
        }
        let known = encode(&bucket);
        let mut bucket = decode(&known, &usual(), now).unwrap();
        assert_eq!(charge(&mut bucket, 1, &usual(), now).0, Conformance::TooEarly { wait: 120_000_000 });
        bucket.settle(2, Reservation::default(), &usual(), now);
        assert_eq!(encode(&bucket), known);
    }

    #[test]
    fn what_a_vanished_worker_reserved_is_charged_once_and_comes_back() {
        let now = at(1_000_000_000_000);
        let mut bucket = Bucket::default();
        charge(&mut bucket, 1, &usual(), now);
        assert_eq!(bucket.reserve(1, 10, &usual(), now), 4, "the rest of the burst");
        assert!(matches!(
            charge(&mut bucket, 1, &usual(), now.saturating_add(100_000_000)).0,
            Conformance::Conforms { .. }
        ));
        assert!(matches!(
            charge(&mut bucket, 1, &usual(), now.saturating_add(100_000_000)).0,
            Conformance::TooEarly { .. }
        ));
        let later = now.saturating_add(2_000_000_000);
        let mut after = decode(&encode(&bucket), &usual(), later).unwrap();
        assert_eq!(after.entry(1, &usual(), later).unwrap().reserved(), 0);
        let admitted = (0..10)
            .filter(|_| matches!(charge(&mut after, 1, &usual(), later).0, Conformance::Conforms { .. }))
            .count();
        assert_eq!(admitted, 1, "charged at the end of the reservation's time, as if all had been used then");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_something_or_nothing(word in proptest::collection::vec(any::<u8>(), 0..300), now: u64) {
            let _ = decode(&word, &usual(), at(now));
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
                if let (Conformance::Conforms { .. }, _) = charge(&mut bucket, key, &usual(), now) {
                    let times = admitted.entry(key).or_default();
                    times.push(now);
                    for (index, since) in times.iter().enumerate() {
                        let count = (times.len() - index) as u64;
                        prop_assert!(count <= 5 + now.saturating_since(*since) / 100_000_000, "key {key}");
                    }
                }
                bucket = decode(&encode(&bucket), &usual(), now).unwrap();
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
                if let (Conformance::Conforms { .. }, _) = bucket.charge(key, cost, &rates[rate], &longest, now) {
                    let times = admitted.entry(key).or_default();
                    times.push((now, cost.into()));
                    let (interval, burst) = [(INTERVAL, 5), (2 * INTERVAL, 3), (10 * INTERVAL, 4)][rate];
                    for (index, (since, _)) in times.iter().enumerate() {
                        let count: u64 = times[index..].iter().map(|(_, cost)| cost).sum();
                        prop_assert!(count <= burst + now.saturating_since(*since) / interval, "key {key}");
                    }
                }
                bucket = decode(&encode(&bucket), &longest, now).unwrap();
            }
        }

        #[test]
        fn what_is_taken_back_can_be_spent_again(keys in proptest::collection::vec(0..12_u64, 1..60)) {
            let now = at(1_000_000_000_000);
            let mut bucket = Bucket::default();
            for key in keys {
                let before = bucket.clone();
                let (test, place) = charge(&mut bucket, key, &usual(), now);
                if let Conformance::Conforms { .. } = test {
                    bucket.refund(key, 1, place, &usual(), now);
                    let (again, _) = charge(&mut bucket.clone(), key, &usual(), now);
                    let conforms = matches!(again, Conformance::Conforms { .. });
                    prop_assert!(conforms);
                    charge(&mut bucket, key, &usual(), now);
                } else {
                    prop_assert_eq!(&before, &bucket);
                }
            }
        }
    }
}
