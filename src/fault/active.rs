//! The cap on active faults: `maxActive`.
//!
//! The number of active faults is one record that every worker changes by compare-and-swap, so it is exact: no more than
//! `maxActive` requests are faulted at any moment in all workers together. A request holds an [`ActiveFaultPermit`] from
//! the moment it is faulted until nothing more of the fault is to come: its delay is over and the following action is
//! done, or its stream has ended.

use crate::host::SharedData;
use crate::shared_data::{Change, Record, SharedCell};

/// The cap on the active faults of one route.
#[derive(Debug)]
pub struct ActiveFaults {
    max: u64,
    cell: SharedCell<ActiveCount>,
}

/// A place under `maxActive`. It is not copied, and [`crate::filter::Filter::release`] takes it: so it is released once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a permit that is dropped occupies a place for ever"]
pub struct ActiveFaultPermit {
    /// The index of the route.
    pub(super) route: u32,
}

impl ActiveFaultPermit {
    /// The index of the route among the policy's routes.
    pub(crate) fn route(&self) -> usize {
        self.route as usize
    }
}

/// The number of active faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ActiveCount(u64);

impl Record for ActiveCount {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.0.to_le_bytes());
    }

    /// The first layout was the number without a schema.
    fn decode(schema: u8, bytes: &[u8]) -> Option<ActiveCount> {
        match *bytes {
            [b, c, d, e, f, g, h] => Some(ActiveCount(u64::from_le_bytes([schema, b, c, d, e, f, g, h]))),
            _ if schema == Self::SCHEMA => bytes.try_into().ok().map(|bytes| ActiveCount(u64::from_le_bytes(bytes))),
            _ => None,
        }
    }
}

impl ActiveFaults {
    /// A cap of `max` active faults, counted under `key`.
    pub(super) fn new(max: u64, key: String) -> ActiveFaults {
        ActiveFaults { max, cell: SharedCell::new(key) }
    }

    /// Takes a place for a request of the route with the index `route`. `None` if all places are taken, or if the record
    /// cannot be written.
    pub(super) fn acquire(&self, route: u32, store: &impl SharedData) -> Option<ActiveFaultPermit> {
        let acquired = self.change(store, &|count| (count < self.max).then_some(count + 1));
        acquired.then_some(ActiveFaultPermit { route })
    }

    /// Gives a place back.
    pub(super) fn release(&self, permit: ActiveFaultPermit, store: &impl SharedData) {
        let ActiveFaultPermit { route: _ } = permit;
        self.change(store, &|count| count.checked_sub(1));
    }

    #[inline(never)]
    fn change(&self, store: &impl SharedData, next: &dyn Fn(u64) -> Option<u64>) -> bool {
        let changed =
            self.cell.update(store, |stored| match next(stored.record().map_or(0, |ActiveCount(count)| count)) {
                Some(count) => Change::Write(ActiveCount(count), true),
                None => Change::Keep(false),
            });
        if changed.is_err() {
            log::warn!(
                "{}: the number of active faults could not be changed: too many workers change it",
                self.cell.key()
            );
        }
        changed == Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;

    #[test]
    fn the_number_of_active_faults_is_capped_exactly() {
        let store = Sim::new(1);
        let active = ActiveFaults::new(3, "w".into());
        let acquire = |times: u32| (0..times).filter_map(|route| active.acquire(route, &store)).collect::<Vec<_>>();
        let permits = acquire(10);
        assert_eq!(permits.len(), 3);
        permits.into_iter().take(2).for_each(|permit| active.release(permit, &store));
        assert_eq!(acquire(10).len(), 2);
    }

    #[test]
    fn a_count_of_the_first_layout_is_read_and_garbage_counts_as_none() {
        let store = Sim::new(1);
        let active = ActiveFaults::new(1, "w".into());
        store.overwrite("w", &1_u64.to_le_bytes());
        assert_eq!(active.acquire(0, &store), None);
        store.overwrite("w", b"ten  bytes");
        assert!(active.acquire(0, &store).is_some());
        assert_eq!(active.acquire(0, &store), None);
    }
}
