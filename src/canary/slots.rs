//! The records of rollouts in shared data, and their keys.
//!
//! Shared data cannot be deleted, and the name of a rollout changes with every release, so the keys do not contain it.
//! Each route has [`SLOTS`] slots, and a directory of the rollouts that have one. A rollout that has none takes the slot
//! that was claimed longest ago. Each record carries the hash of its rollout, and a record of another rollout counts as
//! absent. A worker of an old configuration whose slot was taken therefore never reads what another rollout has written.
//!
//! | key, after the policy's prefix | record |
//! |---|---|
//! | `rollout/ROUTE` | [`Directory`] |
//! | `rollout/ROUTE/SLOT/state` | [`RolloutState`](super::state::RolloutState) |
//! | `rollout/ROUTE/SLOT/exposed` | [`ExposureCount`](super::exposure::ExposureCount) |
//! | `rollout/ROUTE/SLOT/counts` | the judge's counts; the hash is in the key of each row |
//! | `rollout/ROUTE/SLOT/restarted` | [`RestartedTest`](super::restarted_test::RestartedTest) |
//!
//! Earlier versions kept verdict, stage, latency threshold and exposed requests under the rollout's name. These are read
//! once, when the rollout finds no record in its slot. The evidence of earlier versions was in metrics, and is not read.

use super::exposure::ExposureCount;
use super::restarted_test::RestartedTest;
use super::state::{RolloutState, SharedState};
use crate::host::SharedData;
use crate::shared_data::{Change, Record, SharedCell, Stored};
use xxhash_rust::xxh64::xxh64;

/// How many rollouts of a route are remembered.
const SLOTS: usize = 8;

/// The rollouts of a route that have a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Directory {
    /// For each slot the hash of its rollout and the number of the claim; 0 if the slot is free.
    slots: [(u64, u32); SLOTS],
}

impl Record for Directory {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        for (rollout, claim) in &self.slots {
            bytes.extend_from_slice(&rollout.to_le_bytes());
            bytes.extend_from_slice(&claim.to_le_bytes());
        }
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<Directory> {
        let mut directory = Directory::default();
        let (slots, rest) = bytes.as_chunks::<12>();
        if schema != Self::SCHEMA || slots.len() != SLOTS || !rest.is_empty() {
            return None;
        }
        for (slot, bytes) in directory.slots.iter_mut().zip(slots) {
            let (rollout, claim) = bytes.split_first_chunk()?;
            *slot = (u64::from_le_bytes(*rollout), u32::from_le_bytes(*claim.first_chunk()?));
        }
        Some(directory)
    }
}

impl Directory {
    /// Claims a slot for `rollout`. Returns the slot, and whether another rollout has claimed a slot last.
    fn claim(&mut self, rollout: u64) -> (usize, bool) {
        let (mut last, mut found, mut oldest) = (0, None, (0, u32::MAX));
        for (slot, (known, claim)) in self.slots.iter().enumerate() {
            last = last.max(*claim);
            if *claim > 0 && *known == rollout {
                found = Some((slot, *claim));
            }
            if *claim < oldest.1 {
                oldest = (slot, *claim);
            }
        }
        let (slot, claim) = found.unwrap_or((oldest.0, 0));
        let is_switched = claim == 0 || claim < last;
        if is_switched && let Some(claimed) = self.slots.get_mut(slot) {
            *claimed = (rollout, last.saturating_add(1));
        }
        (slot, is_switched)
    }
}

/// Where the records of one rollout are.
#[derive(Debug)]
pub(super) struct RolloutSlot {
    /// The hash of the rollout's name.
    pub rollout: u64,
    /// What the keys of the records begin with.
    prefix: String,
    /// Whether this worker was the first one that claimed the slot after another rollout of the route.
    pub is_switched: bool,
    pub state: SharedState,
    pub exposed: SharedCell<ExposureCount>,
    pub restarted: SharedCell<RestartedTest>,
}

impl RolloutSlot {
    /// Claims a slot of the route for `rollout`. `state_prefix` begins the keys of the policy, `route` is the label of the
    /// route.
    #[inline(never)]
    pub(super) fn claim(state_prefix: &str, route: &str, rollout: &str, store: &impl SharedData) -> RolloutSlot {
        let directory_key = [state_prefix, "rollout/", route].concat();
        let hash = xxh64(rollout.as_bytes(), 0);
        let claimed = SharedCell::<Directory>::new(&*directory_key).update(store, |stored| {
            let mut directory = stored.record().unwrap_or_default();
            let claimed = directory.claim(hash);
            if claimed.1 { Change::Write(directory, claimed) } else { Change::Keep(claimed) }
        });
        let (slot, is_switched) = claimed.unwrap_or_default();
        let prefix = [&*directory_key, "/", &slot.to_string(), "/"].concat();
        let key = |record: &str| [&*prefix, record].concat();
        RolloutSlot {
            rollout: hash,
            is_switched,
            state: SharedState::new(key("state"), hash),
            exposed: SharedCell::new(key("exposed")),
            restarted: SharedCell::new(key("restarted")),
            prefix,
        }
    }

    /// The key of the judge's counts.
    pub(super) fn counts_key(&self) -> String {
        [&*self.prefix, "counts"].concat()
    }

    /// The state of the rollout, and whether it has just begun. If the slot has no state, what an earlier version has
    /// written under the rollout's name is taken over.
    #[inline(never)]
    pub(super) fn open_state(
        &self,
        state_prefix: &str,
        rollout: &str,
        store: &impl SharedData,
    ) -> (RolloutState, bool) {
        if let Some(state) = self.state.read(store) {
            return (state, false);
        }
        let mut earlier = RolloutState::new(self.rollout);
        for part in ["verdict/", "stage/", "edge/"] {
            let cell = SharedCell::<RolloutState>::new([state_prefix, part, rollout].concat());
            if let Some(part) = cell.read(store).record() {
                earlier.take_over(part);
            }
        }
        let (state, is_new) = self.state.update(store, earlier, &mut |_| {}).unwrap_or((earlier, false));
        (state, is_new && state == RolloutState::new(self.rollout))
    }

    /// Takes over the exposed requests that an earlier version has counted, if the slot has no count.
    #[inline(never)]
    pub(super) fn open_exposed(&self, state_prefix: &str, rollout: &str, store: &impl SharedData) {
        let is_missing = |stored: &Stored<ExposureCount>| match stored {
            Stored::Absent => true,
            Stored::Garbage => false,
            Stored::Record(record) => record.rollout != self.rollout,
        };
        if !is_missing(&self.exposed.read(store)) {
            return;
        }
        let earlier = SharedCell::<ExposureCount>::new([state_prefix, "exposed/", rollout].concat());
        let count = match earlier.read(store) {
            Stored::Absent => 0,
            Stored::Record(record) => record.count,
            // Without a count nothing shows that another request is within the cap.
            Stored::Garbage => u64::MAX,
        };
        let opened = ExposureCount { rollout: self.rollout, count };
        // If the update is given up, the record stays another rollout's, and the cap admits no request.
        let _ = self
            .exposed
            .update(store, |stored| if is_missing(&stored) { Change::Write(opened, ()) } else { Change::Keep(()) });
    }
}

#[cfg(test)]
mod tests {
    use super::super::exposure::{Exposure, try_expose};
    use super::super::judge::Verdict;
    use super::*;
    use crate::host::sim::Sim;
    use crate::units::{Fraction, UnixNanos};

    const TEN: Fraction = Fraction::from_ppm(100_000);

    fn claim(rollout: &str, host: &Sim) -> RolloutSlot {
        RolloutSlot::claim("t/", "default", rollout, host)
    }

    #[test]
    fn the_number_of_keys_is_bounded_while_rollouts_come_and_go() {
        let host = Sim::new(1);
        for month in 0..100 {
            let rollout = format!("release-{month}");
            let slot = claim(&rollout, &host);
            assert!(slot.is_switched && !claim(&rollout, &host).is_switched, "{rollout}");
            let (state, is_new) = slot.open_state("t/", &rollout, &host);
            assert!(is_new && state == RolloutState::new(slot.rollout), "{rollout} starts without a verdict");
            slot.open_exposed("t/", &rollout, &host);
            for _ in 0..3 {
                let exposure = try_expose(&slot.exposed, slot.rollout, 3, &host).unwrap();
                assert!(matches!(exposure, Exposure::Admitted { .. }), "{rollout} starts without exposed requests");
            }
            let fail = &mut |state: &mut RolloutState| (state.verdict, state.verdict_weight) = (Verdict::Fail, TEN);
            slot.state.update(&host, state, fail).unwrap();
        }
        assert_eq!(host.keys().len(), 1 + 2 * SLOTS, "{:?}", host.keys());
        for month in 100 - SLOTS..100 {
            let rollout = format!("release-{month}");
            let (state, _) = claim(&rollout, &host).open_state("t/", &rollout, &host);
            assert_eq!(state.verdict, Verdict::Fail, "{rollout} is remembered");
        }
    }

    #[test]
    fn records_of_the_previous_version_are_taken_over_once() {
        let host = Sim::new(1);
        host.overwrite("t/verdict/r", &[&[1, 2], &100_000_u32.to_le_bytes()[..]].concat());
        host.overwrite("t/stage/r", &[&[1, 3], &77_u64.to_le_bytes()[..]].concat());
        host.overwrite("t/edge/r", &[&[1], &90_000_u64.to_le_bytes()[..]].concat());
        host.overwrite("t/exposed/r", &[&[1], &24_u64.to_le_bytes()[..]].concat());
        let slot = claim("r", &host);
        let (state, is_new) = slot.open_state("t/", "r", &host);
        assert!(!is_new);
        assert_eq!((state.verdict, state.verdict_weight), (Verdict::Fail, TEN));
        let progress = state.progress.unwrap();
        assert_eq!((progress.stage, progress.entered), (3, UnixNanos::from_nanos(77)));
        assert_eq!(state.latency_threshold, 90_000);
        slot.open_exposed("t/", "r", &host);
        let expose = || try_expose(&slot.exposed, slot.rollout, 25, &host).unwrap();
        assert_eq!([expose(), expose()], [Exposure::Admitted { is_last: true }, Exposure::CapReached]);
        slot.open_exposed("t/", "r", &host);
        assert_eq!(try_expose(&slot.exposed, slot.rollout, 25, &host), Ok(Exposure::CapReached));
    }

    #[test]
    fn an_exposure_count_that_cannot_be_read_admits_no_request() {
        let host = Sim::new(1);
        host.overwrite("t/exposed/r", b"\x01\0");
        let slot = claim("r", &host);
        slot.open_exposed("t/", "r", &host);
        assert_eq!(try_expose(&slot.exposed, slot.rollout, 25, &host), Ok(Exposure::CapReached));
    }

    #[test]
    fn garbage_is_no_directory_and_no_state() {
        for garbage in [&b""[..], b"\x01", b"\x01\0", b"\x02\0\0\0\0\0\0\0\0\x01", &[2; 97], &[1; 96]] {
            let host = Sim::new(1);
            host.overwrite("t/rollout/default", garbage);
            host.overwrite("t/rollout/default/0/state", garbage);
            let slot = claim("r", &host);
            let (state, is_new) = slot.open_state("t/", "r", &host);
            assert!(is_new && state == RolloutState::new(slot.rollout), "{garbage:?}");
        }
    }
}
