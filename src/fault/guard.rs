//! The guard of an experiment: when injection stops, and when it resumes, judged by the requests that were not faulted.
//!
//! ```text
//!          threshold breached           hold-down over, recovered           recovered for a window
//!  ARMED ────────────────────► SUSPENDED ───────────────────────► PROBING ────────────────────────► ARMED
//!                                  ▲                                 │ threshold breached
//!                                  └─────────────────────────────────┘      the last suspension: LATCHED
//! ```
//!
//! A target has recovered if a whole window contains enough responses and each figure is below half of its threshold. The
//! absence of a breach is not enough: without responses the state of the target is unknown, so injection does not resume.
//!
//! This module decides from plain values. [`super::experiment_guard`] applies it in a worker.

use crate::outlier::{AdminEndpoint, Totals};
use crate::units::{Fraction, MonotonicInstant, UnixNanos};

/// The compiled `guard` block, and the term of the experiment. Times are in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardPolicy {
    /// Injection stops at this share of failures within the window, if the window has `min_requests`.
    pub error_rate: Fraction,
    /// Injection stops if more than one response in twenty took longer than this, if the window has `min_requests`.
    pub latency_p95: Option<u64>,
    pub min_requests: u64,
    /// Injection stops at this share of ejected hosts.
    pub ejected: Fraction,
    pub window: u64,
    /// How long the first suspension lasts at least. The second lasts twice as long, and so on.
    pub hold_down: u64,
    /// The number of the suspension that ends the experiment.
    pub latch_after: u8,
    /// The name of the experiment. The state of the experiment belongs to this name.
    pub experiment: Option<Box<str>>,
    /// The beginning and the end of the experiment.
    pub term: Option<(UnixNanos, UnixNanos)>,
    /// The number of requests of the route that permit one injected failure. `None` if the failures are not limited.
    pub spacing: Option<u64>,
    /// Where to poll Envoy for the hosts that are ejected.
    pub admin: Option<AdminEndpoint>,
    /// Whether injection continues while it is unknown which hosts are ejected.
    pub continues_unknown: bool,
}

impl Default for GuardPolicy {
    fn default() -> Self {
        GuardPolicy {
            error_rate: Fraction::from_ppm(50_000),
            latency_p95: None,
            min_requests: 20,
            ejected: Fraction::from_ppm(100_000),
            window: 10_000_000_000,
            hold_down: 30_000_000_000,
            latch_after: 3,
            experiment: None,
            term: None,
            spacing: None,
            admin: None,
            continues_unknown: false,
        }
    }
}

/// The health of a target, as a guard evaluates it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetHealth {
    /// The counts within the window.
    pub recent: Totals,
    /// Whether the window has existed for its whole length.
    pub is_full: bool,
    /// The share of hosts that are ejected.
    pub ejected: Fraction,
    /// Whether it is unknown which hosts are ejected, although the policy requires it.
    pub is_unknown: bool,
}

/// The phase of an experiment. The instants are of the clock that all workers share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuardPhase {
    #[default]
    Armed,
    /// Nothing is injected until this instant at least.
    Suspended(MonotonicInstant),
    /// Since this instant, a tenth of the faults is injected.
    Probing(MonotonicInstant),
    /// Nothing is injected any more.
    Latched,
}

/// The state of an experiment on one destination. All workers share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardState {
    pub phase: GuardPhase,
    /// The number of suspensions.
    pub suspensions: u8,
    /// The number of suspensions since the experiment was last armed.
    pub consecutive: u8,
}

/// Why a state changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransitionCause {
    /// Too many failures.
    Errors,
    /// Too many slow responses.
    Latency,
    /// Too many ejected hosts.
    Ejected,
    /// Envoy had no available host for a request, or too many pending requests.
    Outage,
    /// The record in shared data was not written by this filter.
    Garbage,
    /// The target has recovered.
    Recovered,
}

impl TransitionCause {
    /// The name in log lines.
    pub(super) fn name(self) -> &'static str {
        match self {
            TransitionCause::Errors => "errors",
            TransitionCause::Latency => "latency",
            TransitionCause::Ejected => "ejected",
            TransitionCause::Outage => "outage",
            TransitionCause::Garbage => "garbage",
            TransitionCause::Recovered => "recovered",
        }
    }
}

impl GuardPhase {
    /// The name in log lines.
    pub(super) fn name(self) -> &'static str {
        match self {
            GuardPhase::Armed => "armed",
            GuardPhase::Suspended(_) => "suspended",
            GuardPhase::Probing(_) => "probing",
            GuardPhase::Latched => "latched",
        }
    }

    /// The number in the metric and in the record: 0 to 3, in the order of the declaration.
    pub(super) fn number(self) -> u8 {
        match self {
            GuardPhase::Armed => 0,
            GuardPhase::Suspended(_) => 1,
            GuardPhase::Probing(_) => 2,
            GuardPhase::Latched => 3,
        }
    }

    /// The instant of the phase, if it has one.
    pub(super) fn instant(self) -> Option<MonotonicInstant> {
        match self {
            GuardPhase::Suspended(at) | GuardPhase::Probing(at) => Some(at),
            GuardPhase::Armed | GuardPhase::Latched => None,
        }
    }
}

/// Whether `part` is at least `share` of `whole`, and not 0.
fn meets(part: u64, whole: u64, share: Fraction) -> bool {
    part > 0 && u128::from(part) * 1_000_000 >= u128::from(whole) * u128::from(share.ppm())
}

impl GuardPolicy {
    /// The longest hold-down in nanoseconds, if the first one is not longer.
    const MAX_HOLD_DOWN: u64 = 300_000_000_000;
    /// The share of slow responses above which the 95th percentile is above the threshold.
    const MAX_SLOW_SHARE: Fraction = Fraction::from_ppm(50_001);
    /// The share of faults that is injected while the experiment is probing.
    pub(super) const PROBE_SHARE: Fraction = Fraction::from_ppm(100_000);

    /// The threshold that is breached, if any, after multiplying each figure by `times`.
    pub(super) fn breached_threshold(&self, health: &TargetHealth, times: u64) -> Option<TransitionCause> {
        let Totals { requests, failures, slow, outages } = health.recent;
        let is_enough = requests >= self.min_requests;
        if outages > 0 {
            Some(TransitionCause::Outage)
        } else if meets(u64::from(health.ejected.ppm()).saturating_mul(times), 1_000_000, self.ejected) {
            Some(TransitionCause::Ejected)
        } else if is_enough && meets(failures.saturating_mul(times), requests, self.error_rate) {
            Some(TransitionCause::Errors)
        } else if is_enough
            && self.latency_p95.is_some()
            && meets(slow.saturating_mul(times), requests, Self::MAX_SLOW_SHARE)
        {
            Some(TransitionCause::Latency)
        } else {
            None
        }
    }

    /// Whether further requests alone can breach a threshold: one is breached, but for `min_requests`.
    pub(super) fn lacks_requests(&self, health: &TargetHealth) -> bool {
        let Totals { requests, failures, slow, .. } = health.recent;
        let is_slow = self.latency_p95.is_some() && meets(slow, requests, Self::MAX_SLOW_SHARE);
        requests < self.min_requests && (meets(failures, requests, self.error_rate) || is_slow)
    }

    /// Whether the target has recovered.
    fn has_recovered(&self, health: &TargetHealth) -> bool {
        health.is_full
            && !health.is_unknown
            && health.recent.requests >= self.min_requests
            && self.breached_threshold(health, 2).is_none()
    }

    /// The state that follows `state`. `None` if the state stays.
    pub(super) fn next(
        &self,
        state: GuardState,
        health: &TargetHealth,
        now: MonotonicInstant,
    ) -> Option<(GuardState, TransitionCause)> {
        let breach = self.breached_threshold(health, 1);
        let recovered =
            |phase| self.has_recovered(health).then_some((GuardState { phase, ..state }, TransitionCause::Recovered));
        match (state.phase, breach) {
            (GuardPhase::Armed | GuardPhase::Probing(_), Some(cause)) => Some((self.suspend(state, now), cause)),
            (GuardPhase::Suspended(until), None) if now >= until => recovered(GuardPhase::Probing(now)),
            (GuardPhase::Probing(since), None) if now.saturating_since(since) >= self.window => {
                recovered(GuardPhase::Armed).map(|(state, cause)| (GuardState { consecutive: 0, ..state }, cause))
            }
            _ => None,
        }
    }

    /// `state` after another suspension.
    pub(super) fn suspend(&self, state: GuardState, now: MonotonicInstant) -> GuardState {
        let suspensions = state.suspensions.saturating_add(1);
        let consecutive = state.consecutive.saturating_add(1);
        let longest = self.hold_down.max(Self::MAX_HOLD_DOWN);
        let hold_down = self.hold_down.saturating_mul(u64::from(consecutive)).min(longest);
        let phase = match suspensions >= self.latch_after {
            true => GuardPhase::Latched,
            false => GuardPhase::Suspended(now.saturating_add(hold_down)),
        };
        GuardState { phase, suspensions, consecutive }
    }
}

impl GuardState {
    /// As two numbers of a record.
    pub(super) fn to_numbers(self) -> [u64; 2] {
        let packed = [self.phase.number(), self.suspensions, self.consecutive, 0, 0, 0, 0, 0];
        [u64::from_le_bytes(packed), self.phase.instant().unwrap_or_default().as_nanos()]
    }

    /// From two numbers of a record. `None` if they are not a state.
    pub(super) fn from_numbers([packed, instant]: [u64; 2]) -> Option<GuardState> {
        let [phase, suspensions, consecutive, 0, 0, 0, 0, 0] = packed.to_le_bytes() else { return None };
        let phase = match (phase, instant) {
            (0, 0) => GuardPhase::Armed,
            (1, until) => GuardPhase::Suspended(MonotonicInstant::from_nanos(until)),
            (2, since) => GuardPhase::Probing(MonotonicInstant::from_nanos(since)),
            (3, 0) => GuardPhase::Latched,
            _ => return None,
        };
        Some(GuardState { phase, suspensions, consecutive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn recent(requests: u64, failures: u64) -> TargetHealth {
        TargetHealth {
            recent: Totals { requests, failures, ..Totals::default() },
            is_full: true,
            ..TargetHealth::default()
        }
    }

    fn armed() -> GuardState {
        GuardState::default()
    }

    fn ends(guard: &GuardPolicy, state: GuardState, evidence: &TargetHealth, now: MonotonicInstant) -> GuardPhase {
        guard.next(state, evidence, now).map_or(state.phase, |(state, _)| state.phase)
    }

    #[test]
    fn each_threshold_is_met_exactly() {
        let guard = GuardPolicy { latency_p95: Some(1), ..GuardPolicy::default() };
        let cause = |evidence: TargetHealth| guard.next(armed(), &evidence, at(0)).map(|(_, cause)| cause);
        assert_eq!(cause(recent(100, 5)), Some(TransitionCause::Errors));
        assert_eq!(cause(recent(101, 5)), None);
        assert_eq!(cause(recent(19, 19)), None, "too few to tell");
        assert_eq!(cause(recent(20, 19)), Some(TransitionCause::Errors));
        let slow = |slow| TargetHealth { recent: Totals { slow, ..recent(100, 0).recent }, ..recent(0, 0) };
        assert_eq!(cause(slow(5)), None, "the 95th percentile is just within the limit");
        assert_eq!(cause(slow(6)), Some(TransitionCause::Latency));
        let ejected = |ppm| TargetHealth { ejected: Fraction::from_ppm(ppm), ..recent(0, 0) };
        assert_eq!(cause(ejected(99_999)), None);
        assert_eq!(cause(ejected(100_000)), Some(TransitionCause::Ejected), "hosts speak without requests");
        let outage = TargetHealth { recent: Totals { outages: 1, ..Totals::default() }, ..recent(0, 0) };
        assert_eq!(cause(outage), Some(TransitionCause::Outage));
        let zero = GuardPolicy { error_rate: Fraction::NONE, ..GuardPolicy::default() };
        assert_eq!(zero.next(armed(), &recent(100, 0), at(0)), None, "no failure, no alarm");
        assert!(zero.next(armed(), &recent(100, 1), at(0)).is_some());
    }

    #[test]
    fn injection_resumes_by_way_of_probing() {
        let guard = GuardPolicy::default();
        let (state, cause) = guard.next(armed(), &recent(20, 4), at(SECOND)).unwrap();
        assert_eq!((state.phase, cause), (GuardPhase::Suspended(at(31 * SECOND)), TransitionCause::Errors));
        assert_eq!(guard.next(state, &recent(100, 100), at(30 * SECOND)), None, "no second suspension");
        assert_eq!(guard.next(state, &recent(1000, 0), at(30 * SECOND)), None, "held down");
        for (evidence, why) in [
            (recent(19, 0), "too few answers to tell"),
            (recent(1000, 25), "not below half of the threshold"),
            (TargetHealth { is_full: false, ..recent(1000, 0) }, "no whole window"),
            (TargetHealth { is_unknown: true, ..recent(1000, 0) }, "hosts unknown"),
            (TargetHealth { ejected: Fraction::from_ppm(50_000), ..recent(1000, 0) }, "a host in twenty is ejected"),
        ] {
            assert_eq!(guard.next(state, &evidence, at(31 * SECOND)), None, "{why}");
        }
        let (probing, cause) = guard.next(state, &recent(1000, 24), at(31 * SECOND)).unwrap();
        assert_eq!((probing.phase, cause), (GuardPhase::Probing(at(31 * SECOND)), TransitionCause::Recovered));
        assert_eq!(ends(&guard, probing, &recent(1000, 0), at(40 * SECOND)), probing.phase, "not a whole window yet");
        let (armed, _) = guard.next(probing, &recent(1000, 0), at(41 * SECOND)).unwrap();
        assert_eq!(armed, GuardState { phase: GuardPhase::Armed, suspensions: 1, consecutive: 0 });
    }

    #[test]
    fn hold_down_grows_to_a_cap_and_the_third_suspension_latches() {
        let guard = GuardPolicy::default();
        let bad = recent(20, 20);
        let mut state = armed();
        for (phase, why) in [
            (GuardPhase::Suspended(at(30 * SECOND)), "once"),
            (GuardPhase::Suspended(at(60 * SECOND)), "twice as long"),
            (GuardPhase::Latched, "for good"),
        ] {
            state = guard.next(GuardState { phase: GuardPhase::Probing(at(0)), ..state }, &bad, at(0)).unwrap().0;
            assert_eq!(state.phase, phase, "{why}");
        }
        assert_eq!(guard.next(state, &recent(1000, 0), MonotonicInstant::MAX), None);
        let patient = GuardPolicy { latch_after: 100, ..GuardPolicy::default() };
        let twentieth = GuardState { phase: GuardPhase::Armed, suspensions: 19, consecutive: 19 };
        assert_eq!(patient.suspend(twentieth, at(0)).phase, GuardPhase::Suspended(at(300 * SECOND)));
        let long = GuardPolicy { hold_down: 3600 * SECOND, ..GuardPolicy::default() };
        assert_eq!(long.suspend(armed(), at(0)).phase, GuardPhase::Suspended(at(3600 * SECOND)));
    }

    fn phases() -> impl Strategy<Value = GuardPhase> {
        prop_oneof![
            Just(GuardPhase::Armed),
            any::<u64>().prop_map(|until| GuardPhase::Suspended(at(until))),
            any::<u64>().prop_map(|since| GuardPhase::Probing(at(since))),
            Just(GuardPhase::Latched),
        ]
    }

    proptest! {
        #[test]
        fn a_state_is_read_as_it_was_written(phase in phases(), suspensions: u8, consecutive: u8) {
            let state = GuardState { phase, suspensions, consecutive };
            prop_assert_eq!(GuardState::from_numbers(state.to_numbers()), Some(state));
        }

        #[test]
        fn any_numbers_can_be_read(packed: u64, instant in prop_oneof![Just(0), any::<u64>()]) {
            if let Some(state) = GuardState::from_numbers([packed, instant]) {
                prop_assert_eq!(state.to_numbers(), [packed, instant]);
            }
        }

        /// For any sequence of observations: no experiment is armed again without probing for a whole window, no suspension
        /// ends early, a latched experiment stays latched, and a breach always stops injection.
        #[test]
        fn every_resumption_passes_through_probing(
            seen in proptest::collection::vec((0..200_u64, 0..40_u64, 0..4_000_u64, any::<bool>()), 1..200),
        ) {
            let guard = GuardPolicy { latch_after: 4, ..GuardPolicy::default() };
            let (mut state, mut now, mut suspensions) = (armed(), at(0), 0);
            for (requests, failures, milliseconds, is_full) in seen {
                now = now.saturating_add(milliseconds * 1_000_000);
                let evidence = TargetHealth { is_full, ..recent(requests, failures.min(requests)) };
                let before = state;
                if let Some((next, _)) = guard.next(state, &evidence, now) {
                    state = next;
                }
                if guard.breached_threshold(&evidence, 1).is_some() {
                    prop_assert!(matches!(state.phase, GuardPhase::Suspended(_) | GuardPhase::Latched));
                }
                match (before.phase, state.phase) {
                    (GuardPhase::Suspended(until), GuardPhase::Probing(since)) => {
                        prop_assert!(now >= until && since == now && guard.has_recovered(&evidence));
                    }
                    (GuardPhase::Probing(since), GuardPhase::Armed) => {
                        prop_assert!(now.saturating_since(since) >= guard.window && guard.has_recovered(&evidence));
                    }
                    (GuardPhase::Suspended(_), GuardPhase::Armed) => prop_assert!(false, "armed without probing"),
                    (GuardPhase::Latched, phase) => prop_assert_eq!(phase, GuardPhase::Latched),
                    (GuardPhase::Armed | GuardPhase::Probing(_), GuardPhase::Suspended(until)) => {
                        suspensions += 1;
                        prop_assert!(until.saturating_since(now) == guard.hold_down * u64::from(state.consecutive));
                    }
                    (GuardPhase::Armed | GuardPhase::Probing(_), GuardPhase::Latched) => {
                        suspensions += 1;
                        prop_assert_eq!(suspensions, guard.latch_after);
                    }
                    (before, after) => prop_assert_eq!(before, after),
                }
                prop_assert_eq!(state.suspensions, suspensions);
            }
        }
    }
}
