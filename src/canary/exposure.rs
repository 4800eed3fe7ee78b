//! The cap on exposure: how many requests a rollout may ever send to its canary, counted over all workers.
//!
//! The count is one record, which only a compare-and-swap increases, so no interleaving of workers admits a request past
//! the cap. A record that cannot be read or written admits no request; the other destinations serve it then.

use crate::host::SharedData;
use crate::shared_data::{Change, Contended, Record, SharedCell, Stored};

/// How many requests a rollout has sent to its canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExposureCount {
    /// The hash of the rollout's name; 0 in a record of the first schema.
    pub rollout: u64,
    pub count: u64,
}

impl Record for ExposureCount {
    const SCHEMA: u8 = 2;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.rollout.to_le_bytes());
        bytes.extend_from_slice(&self.count.to_le_bytes());
    }

    /// The first schema had the count alone, under the name of the rollout.
    fn decode(schema: u8, bytes: &[u8]) -> Option<ExposureCount> {
        let (rollout, count) = match (schema, bytes.as_chunks::<8>()) {
            (1, ([count], [])) => (0, count),
            (Self::SCHEMA, ([rollout, count], [])) => (u64::from_le_bytes(*rollout), count),
            _ => return None,
        };
        Some(ExposureCount { rollout, count: u64::from_le_bytes(*count) })
    }
}

/// Whether a request may be sent to the canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exposure {
    /// The request was counted. `is_last`: it has reached the cap.
    Admitted {
        is_last: bool,
    },
    CapReached,
}

/// Counts a request, if `rollout` has sent fewer than `cap` requests to its canary.
///
/// # Errors
/// [`Contended`] if the record could not be written; the request was not counted.
pub(super) fn try_expose(
    cell: &SharedCell<ExposureCount>,
    rollout: u64,
    cap: u64,
    store: &impl SharedData,
) -> Result<Exposure, Contended> {
    cell.update(store, |stored| {
        let count = match stored {
            Stored::Absent => 0,
            Stored::Record(record) if record.rollout == rollout => record.count,
            Stored::Record(_) | Stored::Garbage => return Change::Keep(Exposure::CapReached),
        };
        if count >= cap {
            return Change::Keep(Exposure::CapReached);
        }
        let count = count + 1;
        Change::Write(ExposureCount { rollout, count }, Exposure::Admitted { is_last: count == cap })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;
    use crate::host::{Conflict, Version};
    use crate::shared_data::SharedDataProblem;
    use proptest::prelude::*;
    use std::cell::{Cell, RefCell};
    use std::sync::Mutex;

    /// Whether a request of rollout 7 is admitted.
    fn expose(store: &impl SharedData, key: &str, cap: u64) -> Result<bool, Contended> {
        let exposure = try_expose(&SharedCell::new(key), 7, cap, store)?;
        Ok(exposure != Exposure::CapReached)
    }

    #[test]
    fn the_cap_is_met_exactly_and_a_higher_one_goes_on_from_there() {
        let host = Sim::new(1);
        assert_eq!((0..50).filter(|_| expose(&host, "w", 7).unwrap()).count(), 7);
        assert_eq!((0..50).filter(|_| expose(&host, "w", 10).unwrap()).count(), 3);
        assert!(!expose(&host, "x", 0).unwrap());
    }

    #[test]
    fn garbage_and_another_rollouts_count_admit_no_request() {
        let another = [&[2], &8_u64.to_le_bytes()[..], &[0; 8]].concat();
        for garbage in [&b""[..], b"\x01", b"\x02\0\0\0\0\0\0\0\0", b"\x01\0\0\0\0\0\0\0\0\0", &another] {
            let host = Sim::new(1);
            host.set("w", garbage, Version::ABSENT).unwrap();
            assert!(!expose(&host, "w", 10).unwrap(), "{garbage:?}");
        }
    }

    /// A store in which other workers run between any read and the write that follows it.
    struct Interleaved<'a> {
        store: Sim,
        others: RefCell<std::slice::Iter<'a, u8>>,
        depth: Cell<u32>,
        admitted: Cell<u64>,
    }

    impl SharedData for Interleaved<'_> {
        fn get(&self, key: &str) -> Option<(Vec<u8>, Version)> {
            let read = self.store.get(key);
            let others = if self.depth.get() < 4 { self.others.borrow_mut().next().copied() } else { None };
            self.depth.set(self.depth.get() + 1);
            for _ in 0..others.unwrap_or(0) {
                let admitted = expose(self, key, MOST).unwrap();
                self.admitted.set(self.admitted.get() + u64::from(admitted));
            }
            self.depth.set(self.depth.get() - 1);
            read
        }

        fn set(&self, key: &str, value: &[u8], expected: Version) -> Result<(), Conflict> {
            self.store.set(key, value, expected)
        }

        fn overwrite(&self, key: &str, value: &[u8]) {
            self.store.overwrite(key, value);
        }

        fn report(&self, _: SharedDataProblem) {}
    }

    const MOST: u64 = 10;

    proptest! {
        #[test]
        fn no_interleaving_admits_one_too_many(others in proptest::collection::vec(0..4_u8, 0..40)) {
            let store = Interleaved {
                store: Sim::new(1),
                others: RefCell::new(others.iter()),
                depth: Cell::new(0),
                admitted: Cell::new(0),
            };
            let admitted = (0..50).filter(|_| expose(&store, "w", MOST).unwrap()).count() as u64;
            prop_assert_eq!(admitted + store.admitted.get(), MOST);
        }
    }

    #[derive(Default)]
    struct Locked(Mutex<Option<(Vec<u8>, u32)>>);

    impl SharedData for Locked {
        fn get(&self, _: &str) -> Option<(Vec<u8>, Version)> {
            self.0.lock().unwrap().clone().map(|(value, version)| (value, Version(version)))
        }

        fn set(&self, _: &str, value: &[u8], expected: Version) -> Result<(), Conflict> {
            let mut word = self.0.lock().unwrap();
            let version = word.as_ref().map_or(Version::ABSENT, |(_, version)| Version(*version));
            if version != expected {
                return Err(Conflict);
            }
            *word = Some((value.to_vec(), if version == Version::ABSENT { 1 } else { version.0 + 1 }));
            Ok(())
        }

        fn report(&self, _: SharedDataProblem) {}

        fn overwrite(&self, _: &str, value: &[u8]) {
            let mut word = self.0.lock().unwrap();
            let version = word.as_ref().map_or(1, |(_, version)| version + 1);
            *word = Some((value.to_vec(), version));
        }
    }

    #[test]
    fn threads_together_are_admitted_exactly_as_often_as_the_cap_says() {
        let store = Locked::default();
        let worker = || (0..2_000).filter(|_| expose(&store, "w", 3_000).unwrap()).count();
        let admitted: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert_eq!(admitted, 3_000);
    }
}
