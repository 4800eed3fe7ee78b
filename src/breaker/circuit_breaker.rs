//! The circuit breaker of one route in one worker.
//!
//! The state is one record in shared data, which every request of the route reads, so all workers refuse from the same
//! moment on. The evidence is counted by each worker and merged ([`SharedCounts`]): after a failure at once, as long as
//! the pace permits it, otherwise at the next tick.
//!
//! Invariant: a [`Permit`] is completed by [`CircuitBreaker::on_response`] or given back by [`CircuitBreaker::cancel`], so
//! a probe whose request was refused later, or whose client has left, is available to the next request.

use super::metrics::BreakerMetrics;
use super::policy::BreakerPolicy;
use super::state::{CircuitState, Permission};
use crate::evidence::SharedCounts;
use crate::host::{Host, Metrics};
use crate::http::LocalReply;
use crate::outlier::{Totals, Window};
use crate::shared_data::{Change, SharedCell};
use crate::telemetry::Scope;
use crate::units::MonotonicInstant;
use std::sync::Arc;

/// The columns of the evidence.
const REQUESTS: usize = 0;
const FAILURES: usize = 1;

/// The circuit breaker of one route.
#[derive(Debug)]
pub(crate) struct CircuitBreaker {
    policy: Arc<BreakerPolicy>,
    route: Box<str>,
    metrics: BreakerMetrics,
    state: SharedCell<CircuitState>,
    counts: SharedCounts,
    window: Window,
    /// When the window is to be moved on next.
    next_mark: MonotonicInstant,
    /// The failures that the state was judged by last.
    judged_failures: u64,
    /// The state as this worker has shown it last, as a number.
    shown: u8,
}

/// The permission of one request to pass, until its answer.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a permit is completed by an answer or cancelled"]
pub(crate) struct Permit {
    /// The half-open phase that the request probes for; `None` where it does not.
    probe: Option<MonotonicInstant>,
}

impl Permit {
    /// Whether the request has to show how the destination is.
    pub(crate) fn is_probe(&self) -> bool {
        self.probe.is_some()
    }
}

impl CircuitBreaker {
    /// The breaker of `route`, whose metrics are defined in `scope`.
    pub(crate) fn new(
        policy: &Arc<BreakerPolicy>,
        route: &str,
        scope: &Scope<'_, impl Metrics>,
        host: &impl Host,
    ) -> CircuitBreaker {
        let mut counts = SharedCounts::new([&*policy.key, "/counts"].concat(), vec![0], 2);
        let _ = counts.merge(host);
        CircuitBreaker {
            window: Window::new(policy.window, host.now(), totals(&counts)),
            policy: Arc::clone(policy),
            route: route.into(),
            metrics: BreakerMetrics::define(&scope.within("breaker")),
            state: SharedCell::new(policy.key.clone()),
            counts,
            next_mark: MonotonicInstant::ZERO,
            judged_failures: 0,
            shown: 0,
        }
    }

    /// Nanoseconds between two ticks, where nothing was counted meanwhile.
    pub(crate) fn period(&self) -> u64 {
        self.window.step()
    }

    /// Whether a request may pass; if not, nanoseconds until it is worth another try.
    pub(crate) fn admit(&mut self, host: &impl Host) -> Result<Permit, u64> {
        /// Where the state cannot be written, the request is not admitted.
        const CONTENDED: u64 = 1;
        let policy = &self.policy;
        let admitted = self.state.update(host, |stored| {
            let state = stored.record().unwrap_or_default();
            match policy.admit(state, host.now()) {
                (permission, Some(changed)) => Change::Write(changed, (permission, Some((state, changed)))),
                (permission, None) => Change::Keep((permission, None)),
            }
        });
        let (permission, change) = admitted.map_err(|_| CONTENDED)?;
        if let Some((before, after)) = change {
            self.on_change(before, after, host);
        }
        match permission {
            Permission::Pass => Ok(Permit { probe: None }),
            Permission::Probe(since) => Ok(Permit { probe: Some(since) }),
            Permission::Refused(wait) => {
                host.add(self.metrics.refused, 1);
                Err(wait)
            }
        }
    }

    /// The answer to a request that may not pass for `wait` nanoseconds.
    pub(crate) fn refusal(&self, wait: u64, is_grpc: bool) -> LocalReply {
        self.policy.refusal(&self.route, wait, is_grpc)
    }

    /// Completes a permit: the request was answered, and `failed` or not.
    pub(crate) fn on_response(&mut self, permit: Permit, failed: bool, host: &impl Host) {
        host.add(self.metrics.requests, 1);
        self.counts.add(0, REQUESTS, 1);
        if failed {
            host.add(self.metrics.failures, 1);
            self.counts.add(0, FAILURES, 1);
        }
        let now = host.now();
        if permit.is_probe() {
            let _ = self.counts.merge(host);
            self.judge(permit.probe, failed, now, host);
        } else if failed && self.counts.merge_soon(now, host) {
            self.judge(None, true, now, host);
        }
    }

    /// Gives back a permit whose request is not answered by its destination.
    pub(crate) fn cancel(&mut self, permit: Permit, host: &impl Host) {
        let Some(probe) = permit.probe else { return };
        let _ = self.state.update(host, |stored| match stored.record().and_then(|state| state.without_probe(probe)) {
            Some(state) => Change::Write(state, ()),
            None => Change::Keep(()),
        });
    }

    /// Merges what was counted, moves the window on and judges.
    pub(crate) fn tick(&mut self, host: &impl Host) {
        let now = host.now();
        let is_due = now >= self.next_mark;
        if !is_due && !self.counts.is_dirty() {
            return;
        }
        self.merge(host);
        self.window.mark(now, || totals(&self.counts));
        if totals(&self.counts).failures != self.judged_failures {
            self.judge(None, true, now, host);
        }
        if is_due {
            self.next_mark = now.saturating_add(self.period());
            // Another worker may have changed the state.
            let phase = self.state.read(host).record().unwrap_or_default().phase.number();
            if phase != self.shown {
                self.shown = phase;
                host.set_gauge(self.metrics.state, u64::from(phase));
            }
        }
    }

    /// Merges what this worker has counted.
    pub(crate) fn merge(&mut self, host: &impl Host) {
        let _ = self.counts.merge(host);
    }

    /// Changes the state by what all workers have counted, and by the answer to a probe.
    fn judge(&mut self, probe: Option<MonotonicInstant>, failed: bool, now: MonotonicInstant, host: &impl Host) {
        let totals = totals(&self.counts);
        self.judged_failures = totals.failures;
        self.window.mark(now, || totals);
        let seen = (self.window.recent(now, totals), totals);
        let policy = &self.policy;
        let changed = self.state.update(host, |stored| {
            let state = stored.record().unwrap_or_default();
            match policy.judge(state, probe, failed, seen, now) {
                Some(changed) => Change::Write(changed, Some((state, changed))),
                None => Change::Keep(None),
            }
        });
        if let Ok(Some((before, after))) = changed {
            self.on_change(before, after, host);
        }
    }

    /// Shows and logs a change that this worker has made.
    fn on_change(&mut self, before: CircuitState, after: CircuitState, host: &impl Host) {
        if before.phase.number() == after.phase.number() {
            return;
        }
        self.shown = after.phase.number();
        host.set_gauge(self.metrics.state, u64::from(self.shown));
        let totals = totals(&self.counts);
        log::warn!(
            "circuit breaker: route={:?} state={} was={} requests={} failures={}",
            self.route,
            after.phase.name(),
            before.phase.name(),
            totals.requests,
            totals.failures
        );
    }
}

/// The answers of all workers, as of the last merge.
fn totals(counts: &SharedCounts) -> Totals {
    match *counts.totals(0) {
        [requests, failures] => Totals { requests, failures, ..Totals::default() },
        _ => Totals::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::MERGE_PERIOD;
    use crate::host::sim::Sim;
    use std::time::Duration;

    const SECOND: u64 = 1_000_000_000;

    fn workers(count: usize, host: &Sim) -> Vec<CircuitBreaker> {
        let (window, reset) = (10 * SECOND, 30 * SECOND);
        let policy =
            Arc::new(BreakerPolicy { threshold: 50, volume: 20, window, reset, probes: 1, key: "breaker".into() });
        let scope = Scope::policy("p", host);
        (0..count).map(|_| CircuitBreaker::new(&policy, "r", &scope, host)).collect()
    }

    /// Sends a request, which fails or not, if it may pass. Whether it did.
    fn send(breaker: &mut CircuitBreaker, fails: bool, host: &Sim) -> bool {
        let Ok(permit) = breaker.admit(host) else { return false };
        breaker.on_response(permit, fails, host);
        true
    }

    #[test]
    fn workers_together_open_the_circuit_at_the_exact_failure() {
        for count in [1, 2, 4, 8] {
            let host = Sim::new(1);
            let mut workers = workers(count, &host);
            let passed = (0..100).filter(|n| send(&mut workers[n % count], true, &host)).count();
            assert_eq!(passed, 20, "{count} workers: the circuit opens at volumeThreshold");
        }
    }

    #[test]
    fn under_a_flood_of_failures_the_circuit_opens_within_the_merge_period() {
        const RATE: u64 = 30_000;
        for count in [1, 2, 4, 8] {
            let host = Sim::new(1);
            let mut workers = workers(count, &host);
            let (mut requests, mut failures, mut met_at, mut opened_at) = (0_u64, 0_u64, None, None);
            let mut writes = host.writes();
            for n in 0..6 * RATE {
                host.advance(Duration::from_nanos(SECOND / RATE));
                // A tenth of the requests fail at first, which is far from the threshold, and later all of them.
                let fails = n >= 2 * RATE || n % 10 == 0;
                let now = host.now().as_nanos();
                if !send(&mut workers[n as usize % count], fails, &host) {
                    opened_at = Some(now);
                    break;
                }
                (requests, failures) = (requests + 1, failures + u64::from(fails));
                if failures * 2 >= requests && requests >= 20 && met_at.is_none() && n > 20 {
                    met_at = Some(now);
                }
                if n % (RATE / 10) == 0 {
                    workers.iter_mut().for_each(|worker| worker.tick(&host));
                }
                if n % RATE == 0 {
                    let written = host.writes() - writes;
                    assert!(written <= 110 * count as u64, "{count} workers wrote {written} times in a second");
                    writes = host.writes();
                }
            }
            let lag = opened_at.expect("the circuit opens") - met_at.expect("the threshold is met");
            assert!(lag <= MERGE_PERIOD, "{count} workers: opened {lag} ns after the threshold was met");
        }
    }

    #[test]
    fn what_a_worker_counted_is_not_lost_with_its_configuration() {
        let host = Sim::new(1);
        let mut before = workers(1, &host);
        (0..19).for_each(|_| assert!(send(&mut before[0], false, &host)));
        before[0].merge(&host);
        let mut after = workers(1, &host);
        let passed = (0..100).take_while(|_| send(&mut after[0], true, &host)).count();
        assert_eq!(passed, 20, "answers before the update are not in the window of the new worker");
        assert_eq!(after[0].counts.totals(0), [39, 20]);
    }
}
