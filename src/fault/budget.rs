//! The share of a route's error budget that an experiment may spend.
//!
//! An objective of 99.9 % permits one failure in a thousand requests; a quarter of that is one injected failure in four
//! thousand requests. Each injected failure waits until the route has had this number of requests since the failure before
//! it, or since the experiment began. So no failure is spent before it is earned, and failures are not saved up.
//!
//! Invariants: from the beginning of an experiment up to any moment, all workers together inject at most
//! `requests / spacing` failures. The requests of a worker and the failure that it spends are merged with one
//! compare-and-swap.

use super::records::{Balances, ExperimentHash, import_balance};
use crate::host::SharedData;
use crate::shared_data::{Change, Contended, SharedCell, Stored};
use crate::units::Fraction;

/// The number of requests that permit one failure: `share` of the failures that `availability` permits. `None` if it
/// permits none.
pub(super) fn spacing(availability: Fraction, share: Fraction) -> Option<u64> {
    const SQUARE_OF_A_MILLION: u64 = 1_000_000_000_000;
    let failures = u64::from(Fraction::WHOLE.ppm() - availability.ppm()) * u64::from(share.ppm());
    (failures > 0).then(|| SQUARE_OF_A_MILLION.div_ceil(failures))
}

/// The error budget of a route's experiment in one worker.
#[derive(Debug)]
pub(super) struct ErrorBudget {
    cell: SharedCell<Balances>,
    experiment: ExperimentHash,
    /// The number of requests that permit one failure.
    spacing: u64,
    /// The requests since the last merge.
    unmerged: u64,
}

impl ErrorBudget {
    /// The budget of the experiment `name` of a route. `key` is the route's key.
    pub(super) fn new(store: &impl SharedData, key: &str, name: Option<&str>, spacing: u64) -> ErrorBudget {
        let (cell, experiment) = (SharedCell::new(key), ExperimentHash::new(name));
        if let Some(name) = name {
            import_balance(store, &cell, [key, name].concat(), experiment);
        }
        ErrorBudget { cell, experiment, spacing, unmerged: 0 }
    }

    /// Counts a request of the route.
    pub(super) fn count_request(&mut self) {
        self.unmerged = self.unmerged.saturating_add(1);
    }

    /// Spends a failure if one is earned. Returns whether it did; a record that cannot be written permits no failure.
    pub(super) fn spend(&mut self, store: &impl SharedData) -> bool {
        self.update(store, self.spacing) == Ok(true)
    }

    /// Merges the requests of this worker. What cannot be merged is merged the next time.
    pub(super) fn merge(&mut self, store: &impl SharedData) {
        if self.unmerged > 0 {
            let _ = self.update(store, u64::MAX);
        }
    }

    /// Merges the requests of this worker, and spends a failure if `spacing` requests have come since the last one.
    #[inline(never)]
    fn update(&mut self, store: &impl SharedData, spacing: u64) -> Result<bool, Contended> {
        let ErrorBudget { cell, experiment, unmerged, .. } = self;
        let spent = cell.update(store, |stored| {
            let is_garbage = matches!(stored, Stored::Garbage);
            let mut balances = stored.record().unwrap_or_default();
            let mut balance = balances.get(*experiment).unwrap_or_default();
            balance.requests = balance.requests.saturating_add(*unmerged);
            if is_garbage {
                // The last failure is unknown: the next one has to be earned from now on.
                balance.last_failure = balance.requests;
            }
            let earned = balance.requests.saturating_sub(balance.last_failure);
            let spends = earned >= spacing;
            if spends {
                balance.last_failure = balance.requests;
            }
            if *unmerged == 0 && !spends && !is_garbage {
                return Change::Keep(false);
            }
            balances.set(*experiment, balance);
            Change::Write(balances, spends)
        })?;
        self.unmerged = 0;
        Ok(spent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;
    use proptest::prelude::*;

    #[test]
    fn a_quarter_of_three_nines_is_one_in_four_thousand() {
        let percent = |ppm| Fraction::from_ppm(ppm);
        assert_eq!(spacing(percent(999_000), percent(250_000)), Some(4_000));
        assert_eq!(spacing(percent(990_000), Fraction::WHOLE), Some(100));
        assert_eq!(spacing(percent(970_000), Fraction::WHOLE), Some(34), "rounded to fewer failures");
        assert_eq!(spacing(Fraction::NONE, Fraction::WHOLE), Some(1));
        assert_eq!(spacing(Fraction::WHOLE, Fraction::WHOLE), None);
        assert_eq!(spacing(percent(999_000), Fraction::NONE), None);
    }

    #[test]
    fn no_failure_is_spent_before_it_is_earned() {
        let host = Sim::new(1);
        let mut budget = ErrorBudget::new(&host, "w", None, 100);
        let mut spends = |requests: u64| {
            (0..requests).for_each(|_| budget.count_request());
            budget.spend(&host)
        };
        assert!(!spends(99));
        assert!(spends(1));
        assert!(!spends(0));
        assert!(spends(5_000));
        assert!(!spends(99), "failures are not saved up");
        let mut renamed = ErrorBudget::new(&host, "w", Some("next"), 100);
        renamed.count_request();
        assert!(!renamed.spend(&host), "an experiment earns its own failures");
        for garbage in [&b""[..], b"\x02\0\0\0\0\0\0\0\0", b"\x01\0"] {
            let mut budget = ErrorBudget::new(&host, "w", None, 1);
            host.overwrite("w", garbage);
            (0..1_000).for_each(|_| budget.count_request());
            assert!(!budget.spend(&host), "{garbage:?}");
            budget.count_request();
            assert!(budget.spend(&host), "{garbage:?}");
        }
    }

    proptest! {
        /// Workers that merge at different times never spend too much together.
        #[test]
        fn all_workers_together_stay_within_the_budget(
            steps in proptest::collection::vec((0..3_usize, 0..30_u64, any::<bool>(), any::<bool>()), 1..300),
            spacing in 1..50_u64,
        ) {
            let host = Sim::new(1);
            let mut workers: Vec<_> = (0..3).map(|_| ErrorBudget::new(&host, "w", None, spacing)).collect();
            let (mut requests, mut spent) = (0, 0);
            for (worker, more, merges, spends) in steps {
                requests += more;
                (0..more).for_each(|_| workers[worker].count_request());
                if merges {
                    workers[worker].merge(&host);
                }
                spent += u64::from(spends && workers[worker].spend(&host));
                prop_assert!(spent <= requests / spacing);
            }
            workers.iter_mut().for_each(|worker| worker.merge(&host));
            let total = SharedCell::<Balances>::new("w").read(&host).record();
            let total = total.and_then(|balances| balances.get(ExperimentHash::new(None))).unwrap_or_default();
            prop_assert_eq!(total.requests, requests);
        }
    }
}
