//! The cap on exposure: how many requests a rollout may ever send to its canary, all workers together.
//!
//! The count is one shared word that only compare-and-swap moves on, so no interleaving of workers lets one request
//! too many through. A word that cannot be read admits nobody, nor does one that cannot be written: the others serve then.

use crate::host::{Change, Conflict, SharedData, update};

/// The first byte of the word, to be changed with the layout.
const SCHEMA: u8 = 1;

/// Counts one more request into `word`, if there were fewer than `most` before; whether there were.
///
/// # Errors
/// [`Conflict`] if the word could not be written; nothing was counted.
pub fn expose(store: &impl SharedData, word: &str, most: u64) -> Result<bool, Conflict> {
    update(store, word, |found| match found.map_or(Some(0), decode) {
        Some(count) if count < most => Change::Write(encode(count + 1), true),
        _ => Change::Keep(false),
    })
}

fn encode(count: u64) -> Vec<u8> {
    [&[SCHEMA], &count.to_le_bytes()[..]].concat()
}

fn decode(word: &[u8]) -> Option<u64> {
    let (&SCHEMA, count) = word.split_first()? else { return None };
    <[u8; 8]>::try_from(count).ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Version;
    use crate::host::sim::Sim;
    use crate::shared_data::SharedDataProblem;
    use proptest::prelude::*;
    use std::cell::{Cell, RefCell};
    use std::sync::Mutex;

    #[test]
    fn the_cap_is_met_exactly_and_a_higher_one_goes_on_from_there() {
        let host = Sim::new(1);
        assert_eq!((0..50).filter(|_| expose(&host, "w", 7).unwrap()).count(), 7);
        assert_eq!((0..50).filter(|_| expose(&host, "w", 10).unwrap()).count(), 3);
        assert!(!expose(&host, "x", 0).unwrap());
    }

    #[test]
    fn a_neighbours_garbage_exposes_nobody() {
        for garbage in [&b""[..], b"\x01", b"\x02\0\0\0\0\0\0\0\0", b"\x01\0\0\0\0\0\0\0\0\0"] {
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
