//! The guard of an experiment on one destination, at work in one worker.
//!
//! The state of the experiment is one record that all workers share. A guard evaluates the counts of its target at ticks,
//! and after a response with which a threshold is breached; the worker whose compare-and-swap succeeds logs the change.
//! A request for which a fault was drawn reads the record, so that injection stops in all workers at once.
//!
//! Invariant: a record that is not readable or not writable permits no injection.

use super::decision::SkipReason;
use super::guard::{GuardPhase, GuardPolicy, GuardState, TargetHealth, TransitionCause};
use super::metrics::GuardMetrics;
use super::records::{ExperimentHash, GuardStates, import_guard_state};
use crate::evidence::MERGE_PERIOD;
use crate::host::Host;
use crate::outlier::{EjectionStats, TargetObserver, Window};
use crate::shared_data::{Change, SharedCell, Stored};
use crate::units::{Fraction, MonotonicInstant};

/// The experiment of a fault: the index of the route, and the index of its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExperimentId {
    pub route: u32,
    pub destination: u32,
}

/// The guard of one destination in one worker.
#[derive(Debug)]
pub(super) struct ExperimentGuard {
    /// The index of the target among the policy's targets.
    pub(super) target: usize,
    cell: SharedCell<GuardStates>,
    experiment: ExperimentHash,
    /// The name of the experiment in log lines.
    name: String,
    metrics: GuardMetrics,
    window: Window,
    /// The phase that was read last.
    phase: GuardPhase,
    is_expired: bool,
    /// Whether it is unknown which hosts are ejected, although the policy requires it.
    is_unknown: bool,
    next_evaluation: MonotonicInstant,
}

/// Where the state of a destination's experiment is kept, and how it is called.
pub(super) struct GuardKeys {
    /// The key of the states of the destination's experiments.
    pub(super) key: String,
    /// The key that the first layout had for a named experiment.
    pub(super) first_key: String,
    /// The name in log lines.
    pub(super) name: String,
}

impl ExperimentGuard {
    /// The guard of the target with the index `target`, which `observer` observes.
    pub(super) fn new(
        policy: &GuardPolicy,
        keys: GuardKeys,
        metrics: GuardMetrics,
        (target, observer): (usize, &mut TargetObserver),
        host: &impl Host,
    ) -> ExperimentGuard {
        let (cell, experiment) = (SharedCell::new(keys.key), ExperimentHash::new(policy.experiment.as_deref()));
        if policy.experiment.is_some() {
            import_guard_state(host, &cell, keys.first_key, experiment);
        }
        let mut guard = ExperimentGuard {
            target,
            cell,
            experiment,
            name: keys.name,
            metrics,
            window: Window::new(policy.window, host.now(), observer.totals(policy.latency_p95)),
            phase: GuardPhase::Armed,
            is_expired: false,
            is_unknown: false,
            next_evaluation: MonotonicInstant::ZERO,
        };
        guard.evaluate(policy, observer, host);
        guard
    }

    /// Whether a fault in progress has to end, as of the last evaluation.
    pub(super) fn must_stop(&self) -> bool {
        self.is_expired || self.is_unknown || matches!(self.phase, GuardPhase::Suspended(_) | GuardPhase::Latched)
    }

    /// Why a fault that was drawn must not be injected; `None` if it may be. `draw` selects the share that is injected
    /// while the experiment is probing.
    pub(super) fn blocked_by(
        &mut self,
        policy: &GuardPolicy,
        observer: &mut TargetObserver,
        draw: impl FnOnce() -> u64,
        host: &impl Host,
    ) -> Option<SkipReason> {
        self.refresh(policy, observer, host);
        if self.is_expired {
            return Some(SkipReason::Expired);
        }
        match self.phase {
            GuardPhase::Suspended(_) | GuardPhase::Latched => Some(SkipReason::Suspended),
            _ if self.is_unknown => Some(SkipReason::Unknown),
            GuardPhase::Armed => None,
            GuardPhase::Probing(_) => (!GuardPolicy::PROBE_SHARE.includes(draw())).then_some(SkipReason::Probing),
        }
    }

    /// Reads the state of the experiment. If the guard depends on the admin endpoint, it is evaluated: the answer of the
    /// endpoint can be newer than the last tick.
    pub(super) fn refresh(&mut self, policy: &GuardPolicy, observer: &mut TargetObserver, host: &impl Host) {
        if policy.admin.is_some() {
            observer.refresh_hosts(host.now(), host);
            self.evaluate(policy, observer, host);
            return;
        }
        self.is_expired = is_expired(policy, host);
        let state = match self.cell.read(host) {
            Stored::Absent => GuardState::default(),
            Stored::Record(states) => states.get(self.experiment),
            Stored::Garbage => return self.evaluate(policy, observer, host),
        };
        self.set_phase(state, host);
    }

    /// Evaluates at a tick, if the last evaluation at a tick is [`MERGE_PERIOD`] ago.
    pub(super) fn on_tick(&mut self, policy: &GuardPolicy, observer: &mut TargetObserver, host: &impl Host) {
        let now = host.now();
        if now >= self.next_evaluation {
            self.next_evaluation = now.saturating_add(MERGE_PERIOD);
            self.evaluate(policy, observer, host);
        }
    }

    /// Evaluates after a response if a threshold is breached by what this worker has counted and what others have merged.
    pub(super) fn on_response(&mut self, policy: &GuardPolicy, observer: &mut TargetObserver, host: &impl Host) {
        if !matches!(self.phase, GuardPhase::Armed | GuardPhase::Probing(_)) {
            return;
        }
        let health = self.health(policy, observer, host.now());
        if policy.breached_threshold(&health, 1).is_some() {
            self.evaluate(policy, observer, host);
        } else if policy.lacks_requests(&health) {
            observer.await_requests();
        }
    }

    /// The health of the target.
    fn health(&mut self, policy: &GuardPolicy, observer: &TargetObserver, now: MonotonicInstant) -> TargetHealth {
        let mut ejected = observer.ejected_share();
        if let Some(admin) = &policy.admin {
            let stats = observer.snapshot(now, admin.interval);
            self.is_unknown = stats.is_none() && !policy.continues_unknown;
            ejected = ejected.max(stats.map_or(Fraction::NONE, EjectionStats::ejected_share));
        }
        let totals = observer.totals(policy.latency_p95);
        TargetHealth {
            recent: self.window.recent(now, totals),
            is_full: self.window.is_full(now),
            ejected,
            is_unknown: self.is_unknown,
        }
    }

    /// Evaluates the target, and changes the state of the experiment if its policy requires it.
    #[inline(never)]
    pub(super) fn evaluate(&mut self, policy: &GuardPolicy, observer: &mut TargetObserver, host: &impl Host) {
        let now = host.now();
        self.is_expired = is_expired(policy, host);
        self.window.mark(now, || observer.totals(policy.latency_p95));
        let health = self.health(policy, observer, now);
        if policy.lacks_requests(&health) {
            observer.await_requests();
        }
        let experiment = self.experiment;
        let evaluated = self.cell.update(host, |stored| {
            let is_garbage = matches!(stored, Stored::Garbage);
            let mut states = stored.record().unwrap_or_default();
            let state = states.get(experiment);
            let next = if is_garbage {
                Some((policy.suspend(state, now), TransitionCause::Garbage))
            } else {
                policy.next(state, &health, now)
            };
            match next {
                Some((next, cause)) => {
                    states.set(experiment, next);
                    Change::Write(states, (next, Some((state.phase, cause))))
                }
                None => Change::Keep((state, None)),
            }
        });
        let Ok((state, change)) = evaluated else {
            self.phase = GuardPhase::Suspended(now);
            return;
        };
        if let Some((before, cause)) = change {
            self.phase = state.phase;
            self.metrics.show(state, host);
            self.log(before, state, cause, &health, now);
        } else {
            self.set_phase(state, host);
        }
    }

    /// Stores the phase that was read. The metrics show a change that another worker has made, so that the last worker
    /// that reads it shows the newest state.
    fn set_phase(&mut self, state: GuardState, host: &impl Host) {
        if state.phase != self.phase {
            self.phase = state.phase;
            self.metrics.show(state, host);
        }
    }

    #[cold]
    #[inline(never)]
    fn log(
        &self,
        before: GuardPhase,
        state: GuardState,
        cause: TransitionCause,
        health: &TargetHealth,
        now: MonotonicInstant,
    ) {
        const SECOND: u64 = 1_000_000_000;
        let hold_down = match state.phase {
            GuardPhase::Suspended(until) => until.saturating_since(now) / SECOND,
            _ => 0,
        };
        let TargetHealth { recent, ejected, .. } = health;
        log::warn!(
            "fault guard: {} state={} was={} cause={} requests={} failures={} slow={} outages={} ejected={ejected} \
             suspensions={} hold_down_s={hold_down}",
            self.name,
            state.phase.name(),
            before.name(),
            cause.name(),
            recent.requests,
            recent.failures,
            recent.slow,
            recent.outages,
            state.suspensions,
        );
    }
}

/// Whether the term of the experiment excludes the time of the wall clock.
fn is_expired(policy: &GuardPolicy, host: &impl Host) -> bool {
    policy.term.is_some_and(|(begin, end)| !(begin..end).contains(&host.wall_now()))
}
