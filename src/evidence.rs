//! Counts that decisions rest on: a worker's own, and those of all workers in one record of shared data.
//!
//! A worker counts locally, which costs a request no call to the host. It merges what it has counted into the shared
//! record with one compare-and-swap: all columns of all rows at once, so that the record always holds whole snapshots.
//! When to merge must not depend on which side of a comparison has failed; otherwise the record would hold the failures of
//! one side before the successes that belong to it. The rule is the same for all evidence:
//!
//! - after a failure of either side at once, as long as the [`MergePace`] permits it,
//! - otherwise at a tick, at most [`MERGE_PERIOD`] later.
//!
//! A worker that traps loses what it has counted since its last merge, of both sides alike. A configuration that goes
//! away merges what it has.

use crate::host::SharedData;
use crate::shared_data::{Change, Contended, Record, SharedCell};
use crate::units::MonotonicInstant;

/// The longest time, in nanoseconds, that a worker's counts stay its own.
pub const MERGE_PERIOD: u64 = 100_000_000;

/// The most rows of a record. What is counted in further rows is not shared.
const MAX_ROWS: usize = 32;

/// The counts of all workers, as a record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    width: usize,
    /// Each with its key and `width` numbers.
    rows: Vec<(u64, Vec<u64>)>,
}

impl Record for Counts {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.push(u8::try_from(self.width).unwrap_or(u8::MAX));
        for (key, numbers) in &self.rows {
            bytes.extend_from_slice(&key.to_le_bytes());
            numbers.iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
        }
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<Counts> {
        let (width, rest) = bytes.split_first()?;
        let width = usize::from(*width);
        let (numbers, remainder) = rest.as_chunks::<8>();
        let rows = numbers.chunks(width + 1);
        let fits = schema == Self::SCHEMA && remainder.is_empty() && numbers.len() % (width + 1) == 0;
        if !fits || rows.len() > MAX_ROWS {
            return None;
        }
        let row = |row: &[[u8; 8]]| {
            let (key, numbers) = row.split_first()?;
            Some((u64::from_le_bytes(*key), numbers.iter().map(|number| u64::from_le_bytes(*number)).collect()))
        };
        Some(Counts { width, rows: rows.filter_map(row).collect() })
    }
}

/// Counts of one worker and of all workers, in rows of one width.
///
/// Invariant: what is added is either in `own` or in the shared record, never in both.
#[derive(Debug)]
pub struct SharedCounts {
    cell: SharedCell<Counts>,
    width: usize,
    keys: Vec<u64>,
    /// Added since the last merge; the rows one after another.
    own: Vec<u64>,
    /// The counts of all workers at the last merge or refresh.
    totals: Vec<u64>,
    is_dirty: bool,
    pace: MergePace,
}

impl SharedCounts {
    /// The counts in `cell_key`, with a row for each of `keys` and `width` columns. Rows that earlier policies counted in
    /// are kept as long as there is room.
    pub fn new(cell_key: impl Into<Box<str>>, keys: Vec<u64>, width: usize) -> SharedCounts {
        let numbers = keys.len() * width;
        SharedCounts {
            cell: SharedCell::new(cell_key),
            width,
            keys,
            own: vec![0; numbers],
            totals: vec![0; numbers],
            is_dirty: false,
            pace: MergePace::default(),
        }
    }

    /// Adds to a count of this worker.
    pub fn add(&mut self, row: usize, column: usize, amount: u64) {
        if let Some(own) = self.own.get_mut(row * self.width + column) {
            *own = own.saturating_add(amount);
            self.is_dirty = true;
        }
    }

    /// Whether something was added since the last merge.
    pub fn is_dirty(&self) -> bool {
        self.is_dirty
    }

    /// A row of all workers' counts, as of the last merge or refresh.
    pub fn totals(&self, row: usize) -> &[u64] {
        self.totals.get(row * self.width..(row + 1) * self.width).unwrap_or_default()
    }

    /// What this worker has added to a row since the last merge.
    pub fn own(&self, row: usize) -> &[u64] {
        self.own.get(row * self.width..(row + 1) * self.width).unwrap_or_default()
    }

    /// Merges after a failure, if the pace permits it. Whether it did.
    pub fn merge_soon(&mut self, now: MonotonicInstant, store: &impl SharedData) -> bool {
        self.pace.permits(now) && self.merge(store).is_ok()
    }

    /// Merges what was added, or reads what others have merged where nothing was.
    ///
    /// # Errors
    /// [`Contended`] if the record could not be written; what was added stays for the next merge.
    #[inline(never)]
    pub fn merge(&mut self, store: &impl SharedData) -> Result<(), Contended> {
        let SharedCounts { cell, width, keys, own, is_dirty, .. } = self;
        self.totals = cell.update(store, |stored| {
            let mut counts = stored.record().filter(|counts| counts.width == *width).unwrap_or_default();
            counts.width = *width;
            let mut totals = Vec::with_capacity(own.len());
            for (key, own) in keys.iter().zip(own.chunks(*width)) {
                let known = counts.rows.iter().position(|(known, _)| known == key);
                let at = known.unwrap_or_else(|| counts.insert(*key, keys));
                let Some((_, numbers)) = counts.rows.get_mut(at) else { continue };
                numbers.iter_mut().zip(own).for_each(|(number, own)| *number = number.saturating_add(*own));
                totals.extend_from_slice(numbers);
            }
            if *is_dirty { Change::Write(counts, totals) } else { Change::Keep(totals) }
        })?;
        self.own.fill(0);
        self.is_dirty = false;
        Ok(())
    }
}

impl Counts {
    /// Makes a row for `key`, in the place of one that is not in `keys` where there is no room. Where it is.
    fn insert(&mut self, key: u64, keys: &[u64]) -> usize {
        let row = (key, vec![0; self.width]);
        if self.rows.len() < MAX_ROWS {
            self.rows.push(row);
            return self.rows.len() - 1;
        }
        let replaced = self.rows.iter().position(|(known, _)| !keys.contains(known));
        if let Some(replaced) = replaced.and_then(|at| self.rows.get_mut(at)) {
            *replaced = row;
        }
        replaced.unwrap_or(MAX_ROWS)
    }
}

/// How often a worker merges one record because of failures: a hundred times in any second at the most, and whatever the
/// failures, the first ones at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct MergePace {
    /// When the permissions that were given would be used up at the sustained rate.
    used_until: MonotonicInstant,
}

impl MergePace {
    /// Merges that may follow each other at once.
    const BURST: u64 = 50;
    /// Nanoseconds between two merges after that.
    const INTERVAL: u64 = 20_000_000;

    /// Whether a merge is permitted now, which is used then.
    pub fn permits(&mut self, now: MonotonicInstant) -> bool {
        let used_until = self.used_until.max(now);
        if used_until.saturating_since(now) > (Self::BURST - 1) * Self::INTERVAL {
            return false;
        }
        self.used_until = used_until.saturating_add(Self::INTERVAL);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;
    use proptest::prelude::*;

    fn counts(keys: &[u64]) -> SharedCounts {
        SharedCounts::new("counts", keys.to_vec(), 2)
    }

    #[test]
    fn workers_see_each_others_counts_after_a_merge_and_not_before() {
        let host = Sim::new(1);
        let (mut one, mut two) = (counts(&[7]), counts(&[7]));
        one.add(0, 0, 3);
        two.add(0, 1, 4);
        assert_eq!((one.totals(0), two.totals(0)), (&[0, 0][..], &[0, 0][..]));
        one.merge(&host).unwrap();
        assert_eq!((one.totals(0), one.own(0)), (&[3, 0][..], &[0, 0][..]));
        two.merge(&host).unwrap();
        assert_eq!(two.totals(0), [3, 4]);
        one.merge(&host).unwrap();
        assert_eq!(one.totals(0), [3, 4]);
        assert!(!one.is_dirty() && !two.is_dirty());
    }

    #[test]
    fn rows_keep_their_counts_when_a_policy_has_others() {
        let host = Sim::new(1);
        let mut before = counts(&[5, 25]);
        before.add(0, 0, 1);
        before.add(1, 0, 2);
        before.merge(&host).unwrap();
        let mut after = counts(&[25, 50]);
        after.add(1, 0, 4);
        after.merge(&host).unwrap();
        assert_eq!((after.totals(0), after.totals(1)), (&[2, 0][..], &[4, 0][..]));
        before.merge(&host).unwrap();
        assert_eq!(before.totals(0), [1, 0]);
    }

    #[test]
    fn the_record_is_bounded() {
        let host = Sim::new(1);
        for key in 0..10 * MAX_ROWS as u64 {
            let mut counts = counts(&[key]);
            counts.add(0, 0, 1);
            counts.merge(&host).unwrap();
            assert_eq!(counts.totals(0), [1, 0], "the row {key}");
        }
        assert!(host.bytes() < 32 * 3 * 8 + 64, "{} bytes", host.bytes());
    }

    #[test]
    fn what_is_no_record_counts_as_nothing() {
        for garbage in [&b""[..], b"\x01", b"\x01\x02\0", b"\x01\x03\0\0\0\0\0\0\0\0", b"\x02\x02"] {
            let (host, mut counts) = (Sim::new(1), counts(&[7]));
            host.overwrite("counts", garbage);
            counts.add(0, 0, 3);
            counts.merge(&host).unwrap();
            assert_eq!(counts.totals(0), [3, 0], "{garbage:?}");
        }
    }

    proptest! {
        #[test]
        fn no_second_has_more_than_a_hundred_merges(steps in proptest::collection::vec(0..40_000_000_u64, 1..2_000)) {
            const SECOND: u64 = 1_000_000_000;
            let (mut pace, mut now, mut merges) = (MergePace::default(), 5 * SECOND, Vec::new());
            for step in steps {
                now += step;
                if pace.permits(MonotonicInstant::from_nanos(now)) {
                    merges.push(now);
                }
                let recent = merges.iter().filter(|at| now - **at < SECOND).count();
                prop_assert!(recent <= 100, "{recent} merges in one second");
            }
        }

        #[test]
        fn no_count_is_lost_or_added_twice(
            events in proptest::collection::vec((0..4_usize, 0..2_usize, 0..2_usize, any::<bool>()), 0..200),
        ) {
            let host = Sim::new(1);
            let mut workers: Vec<SharedCounts> = (0..4).map(|_| counts(&[1, 2])).collect();
            let mut expected = [[0; 2]; 2];
            for (worker, row, column, merges) in events {
                workers[worker].add(row, column, 1);
                expected[row][column] += 1;
                if merges {
                    workers[worker].merge(&host).unwrap();
                }
            }
            workers.iter_mut().for_each(|worker| worker.merge(&host).unwrap());
            workers[0].merge(&host).unwrap();
            prop_assert_eq!([workers[0].totals(0), workers[0].totals(1)], [&expected[0][..], &expected[1][..]]);
        }
    }
}
