//! Records of experiments in shared data.
//!
//! The state of an experiment belongs to its name. A route's experiments change their names over months, and keys of shared
//! data cannot be deleted, so the states of a route's latest [`MAX_EXPERIMENTS`] experiments are rows of one record. Each
//! row has the hash of the experiment's name. A row that is written moves to the front; the last one is dropped if there
//! are too many.
//!
//! The first layout of these records was one state without a name, with one key for each experiment. It is read as the
//! state of the experiment without a name, and imported from the key of a named experiment.

use super::guard::GuardState;
use crate::host::SharedData;
use crate::shared_data::{Change, Record, SharedCell};
use xxhash_rust::xxh64::xxh64;

/// The most experiments of one record.
const MAX_EXPERIMENTS: usize = 16;

const ROW_SIZE: usize = 24;

/// The hash of an experiment's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExperimentHash(u64);

impl ExperimentHash {
    pub(super) fn new(name: Option<&str>) -> ExperimentHash {
        ExperimentHash(xxh64(name.unwrap_or_default().as_bytes(), 0))
    }
}

/// Two numbers for each experiment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rows(Vec<(u64, [u64; 2])>);

impl Rows {
    fn get(&self, experiment: ExperimentHash) -> Option<[u64; 2]> {
        self.0.iter().find(|(hash, _)| *hash == experiment.0).map(|(_, numbers)| *numbers)
    }

    fn set(&mut self, experiment: ExperimentHash, numbers: [u64; 2]) {
        self.0.retain(|(hash, _)| *hash != experiment.0);
        self.0.insert(0, (experiment.0, numbers));
        self.0.truncate(MAX_EXPERIMENTS);
    }

    /// The rows of a record in its first layout.
    fn unnamed(numbers: [u64; 2]) -> Rows {
        Rows(vec![(ExperimentHash::new(None).0, numbers)])
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        for (hash, [first, second]) in &self.0 {
            [hash, first, second].into_iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
        }
    }

    fn decode(bytes: &[u8]) -> Option<Rows> {
        let (rows, rest) = bytes.as_chunks::<ROW_SIZE>();
        let row = |row: &[u8; ROW_SIZE]| match row.as_chunks::<8>() {
            ([hash, first, second], []) => {
                let [hash, first, second] = [hash, first, second].map(|bytes| u64::from_le_bytes(*bytes));
                Some((hash, [first, second]))
            }
            _ => None,
        };
        let fits = rest.is_empty() && !rows.is_empty() && rows.len() <= MAX_EXPERIMENTS;
        if fits { rows.iter().map(row).collect::<Option<Vec<_>>>().map(Rows) } else { None }
    }
}

/// The states of the experiments on one destination of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct GuardStates(Rows);

impl GuardStates {
    /// The state of `experiment`; armed if there is none.
    pub(super) fn get(&self, experiment: ExperimentHash) -> GuardState {
        self.0.get(experiment).and_then(GuardState::from_numbers).unwrap_or_default()
    }

    pub(super) fn set(&mut self, experiment: ExperimentHash, state: GuardState) {
        self.0.set(experiment, state.to_numbers());
    }
}

impl Record for GuardStates {
    const SCHEMA: u8 = 2;

    fn encode(&self, bytes: &mut Vec<u8>) {
        self.0.encode(bytes);
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<GuardStates> {
        let rows = match schema {
            1 => {
                let ([phase, suspensions, consecutive], instant) = bytes.split_first_chunk::<3>()?;
                let packed = u64::from_le_bytes([*phase, *suspensions, *consecutive, 0, 0, 0, 0, 0]);
                Rows::unnamed([packed, u64::from_le_bytes(instant.try_into().ok()?)])
            }
            Self::SCHEMA => Rows::decode(bytes)?,
            _ => return None,
        };
        let is_valid = rows.0.iter().all(|(_, numbers)| GuardState::from_numbers(*numbers).is_some());
        is_valid.then_some(GuardStates(rows))
    }
}

/// How many requests a route has had during an experiment, and at which of them the last failure was injected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Balance {
    pub(super) requests: u64,
    pub(super) last_failure: u64,
}

/// The error budgets of a route's experiments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Balances(Rows);

impl Balances {
    pub(super) fn get(&self, experiment: ExperimentHash) -> Option<Balance> {
        self.0.get(experiment).map(|[requests, last_failure]| Balance { requests, last_failure })
    }

    pub(super) fn set(&mut self, experiment: ExperimentHash, balance: Balance) {
        self.0.set(experiment, [balance.requests, balance.last_failure]);
    }
}

impl Record for Balances {
    const SCHEMA: u8 = 2;

    fn encode(&self, bytes: &mut Vec<u8>) {
        self.0.encode(bytes);
    }

    /// The first layout was the number of requests at the last failure. The requests after it were counted by a metric,
    /// so they do not count any more: too few failures are injected then, not too many.
    fn decode(schema: u8, bytes: &[u8]) -> Option<Balances> {
        match schema {
            1 => {
                let requests = u64::from_le_bytes(bytes.try_into().ok()?);
                Some(Balances(Rows::unnamed([requests, requests])))
            }
            Self::SCHEMA => Rows::decode(bytes).map(Balances),
            _ => None,
        }
    }
}

/// Copies the state of a named experiment from `key`, the key of its first layout, if `cell` does not have it.
pub(super) fn import_guard_state(
    store: &impl SharedData,
    cell: &SharedCell<GuardStates>,
    key: String,
    experiment: ExperimentHash,
) {
    let imported = SharedCell::<GuardStates>::new(key).read(store).record();
    let Some(state) = imported.map(|states| states.get(ExperimentHash::new(None))) else { return };
    let _ = cell.update(store, |stored| {
        let mut states = stored.record().unwrap_or_default();
        if states.0.get(experiment).is_some() {
            return Change::Keep(());
        }
        states.set(experiment, state);
        Change::Write(states, ())
    });
}

/// Copies the budget of a named experiment from `key`, the key of its first layout, if `cell` does not have it.
pub(super) fn import_balance(
    store: &impl SharedData,
    cell: &SharedCell<Balances>,
    key: String,
    experiment: ExperimentHash,
) {
    let imported = SharedCell::<Balances>::new(key).read(store).record();
    let Some(balance) = imported.and_then(|balances| balances.get(ExperimentHash::new(None))) else { return };
    let _ = cell.update(store, |stored| {
        let mut balances = stored.record().unwrap_or_default();
        if balances.get(experiment).is_some() {
            return Change::Keep(());
        }
        balances.set(experiment, balance);
        Change::Write(balances, ())
    });
}

#[cfg(test)]
mod tests {
    use super::super::guard::GuardPhase;
    use super::*;
    use crate::host::sim::Sim;
    use crate::units::at;
    use proptest::prelude::*;

    fn state(suspensions: u8) -> GuardState {
        GuardState { phase: GuardPhase::Suspended(at(7)), suspensions, consecutive: 1 }
    }

    #[test]
    fn each_experiment_has_its_own_state_and_their_number_is_bounded() {
        let mut states = GuardStates::default();
        let name = |n: usize| ExperimentHash::new(Some(&format!("experiment-{n}")));
        for n in 0..100 {
            assert_eq!(states.get(name(n)), GuardState::default());
            states.set(name(n), state(n as u8));
            states.set(name(0), state(200));
            assert_eq!((states.get(name(0)), states.0.0.len()), (state(200), MAX_EXPERIMENTS.min(n + 1)));
        }
        assert_eq!(states.get(name(99)), state(99));
        assert_eq!(states.get(name(50)), GuardState::default(), "dropped");
        let mut bytes = Vec::new();
        states.encode(&mut bytes);
        assert_eq!(GuardStates::decode(2, &bytes), Some(states));
    }

    #[test]
    fn a_state_of_the_first_layout_is_read_and_imported() {
        let (host, cell) = (Sim::new(1), SharedCell::new("new"));
        let latched = [&[1, 3, 3, 3][..], &[0; 8]].concat();
        let name = ExperimentHash::new(Some("named"));
        host.overwrite("new", &latched);
        host.overwrite("old", &[&[1, 1, 2, 1][..], &7_u64.to_le_bytes()].concat());
        import_guard_state(&host, &cell, "old".into(), name);
        let states: GuardStates = cell.read(&host).record().unwrap();
        assert_eq!(states.get(ExperimentHash::new(None)).phase, GuardPhase::Latched);
        assert_eq!(states.get(name), state(2));
        host.overwrite("old", &latched);
        import_guard_state(&host, &cell, "old".into(), name);
        assert_eq!(cell.read(&host).record().unwrap().get(name), state(2), "it is imported once");
    }

    #[test]
    fn a_budget_of_the_first_layout_is_read_and_imported() {
        let (host, cell) = (Sim::new(1), SharedCell::new("new"));
        host.overwrite("old", &[&[1][..], &500_u64.to_le_bytes()].concat());
        let name = ExperimentHash::new(Some("named"));
        import_balance(&host, &cell, "old".into(), name);
        let balance = Balance { requests: 500, last_failure: 500 };
        assert_eq!(cell.read(&host).record().unwrap().get(name), Some(balance));
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(schema in 0..4_u8, bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some(states) = GuardStates::decode(schema, &bytes) {
                states.get(ExperimentHash::new(None));
            }
            Balances::decode(schema, &bytes);
        }
    }
}
