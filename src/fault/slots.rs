//! How many faults may be active at once: `maxActive`.
//!
//! The count is one shared word that every worker changes by compare-and-swap, so it is exact: no more than `maxActive`
//! requests are faulted at any moment, whichever workers they are in. A request has its slot from the moment it is
//! faulted until nothing more of the fault is to come: its delay is over and what follows is done, or its stream has
//! ended because the client left.

use crate::host::{Change, StateStore, update};

/// The slots of one route.
#[derive(Debug)]
pub struct Slots {
    pub most: u64,
    /// The key of the shared word.
    pub word: Box<str>,
}

/// A slot that was taken: of the route with this index into the policy's routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub usize);

impl Slots {
    /// Takes a slot, if one is free. A compare-and-swap that is given up takes none.
    pub fn take(&self, store: &(impl StateStore + ?Sized)) -> bool {
        let taken = update(store, &self.word, |found| match count(found) {
            taken if taken < self.most => Change::Write((taken + 1).to_le_bytes().to_vec(), true),
            _ => Change::Keep(false),
        });
        taken == Ok(true)
    }

    /// Gives a slot back.
    pub fn give_back(&self, store: &(impl StateStore + ?Sized)) {
        let given =
            update(store, &self.word, |found| Change::Write(count(found).saturating_sub(1).to_le_bytes().to_vec(), ()));
        if given.is_err() {
            log::warn!("{}: a slot is lost, shared data was too contended", self.word);
        }
    }
}

/// How many slots are taken. What is no count of ours is none.
fn count(word: Option<&[u8]>) -> u64 {
    word.and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Version;
    use crate::host::sim::Sim;

    #[test]
    fn there_are_exactly_so_many_slots() {
        let store = Sim::new(1);
        let slots = Slots { most: 3, word: "w".into() };
        let taken = |times| (0..times).filter(|_| slots.take(&store)).count();
        assert_eq!(taken(10), 3);
        slots.give_back(&store);
        slots.give_back(&store);
        assert_eq!(taken(10), 2);
        for _ in 0..10 {
            slots.give_back(&store);
        }
        assert_eq!(taken(10), 3, "what was never taken is not given back");
    }

    #[test]
    fn garbage_counts_as_none() {
        let store = Sim::new(1);
        let slots = Slots { most: 1, word: "w".into() };
        store.set("w", b"not ours", Version::ABSENT).unwrap();
        assert!(!slots.take(&store), "eight bytes are a count");
        store.put("w", b"nine bytes");
        assert!(slots.take(&store) && !slots.take(&store));
    }
}
