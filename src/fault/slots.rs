//! How many faults may be active at once: `maxActive`.
//!
//! The count is one shared word that every worker changes by compare-and-swap, so it is exact: no more than `maxActive`
//! requests are faulted at any moment, whichever workers they are in. A request has its slot from the moment it is
//! faulted until nothing more of the fault is to come: its delay is over and what follows is done, or its stream has
//! ended because the client left.

use crate::host::{Change, Conflict, SharedData, update};

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
    pub fn take(&self, store: &impl SharedData) -> bool {
        change(store, &self.word, &|taken| (taken < self.most).then_some(taken + 1)) == Ok(true)
    }

    /// Gives a slot back.
    pub fn give_back(&self, store: &impl SharedData) {
        if change(store, &self.word, &|taken| taken.checked_sub(1)).is_err() {
            log::warn!("{}: a slot is lost, shared data was too contended", self.word);
        }
    }
}

/// Changes a shared number to what `next` makes of it; whether it did.
///
/// # Errors
/// [`Conflict`] if others were faster a thousand times in a row.
#[inline(never)]
pub fn change(store: &impl SharedData, word: &str, next: &dyn Fn(u64) -> Option<u64>) -> Result<bool, Conflict> {
    update(store, word, |found| match next(count(found)) {
        Some(number) => Change::Write(number.to_le_bytes().to_vec(), true),
        None => Change::Keep(false),
    })
}

/// The number in a shared word. What is no number of ours is 0.
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
        store.overwrite("w", b"nine bytes");
        assert!(slots.take(&store) && !slots.take(&store));
    }
}
