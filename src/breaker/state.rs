//! The state of a circuit: whether a request passes, and what evidence changes. Everything is decided from plain values.

use super::policy::BreakerPolicy;
use crate::http::LocalReply;
use crate::outlier::Totals;
use crate::shared_data::Record;
use crate::units::{MonotonicInstant, seconds_rounded_up};

/// The phase of a circuit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum CircuitPhase {
    #[default]
    Closed,
    /// No request passes before this instant.
    Open(MonotonicInstant),
    /// Probes pass: the number of those that have begun since this instant, and of those that have succeeded.
    HalfOpen { since: MonotonicInstant, begun: u32, passed: u32 },
}

/// The state of a circuit, which all workers share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CircuitState {
    pub(super) phase: CircuitPhase,
    /// The totals when the circuit was closed. What was counted before is no evidence.
    closed_at: Totals,
}

/// What is done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Permission {
    Pass,
    /// It passes, and its answer decides. The probes of one half-open phase share this instant.
    Probe(MonotonicInstant),
    /// It is refused. In this number of nanoseconds it is worth another try.
    Refused(u64),
}

impl BreakerPolicy {
    /// Whether a request passes, and the new state where that changes it.
    pub(super) fn admit(&self, state: CircuitState, now: MonotonicInstant) -> (Permission, Option<CircuitState>) {
        let probe = |since, begun, passed| {
            let phase = CircuitPhase::HalfOpen { since, begun, passed };
            (Permission::Probe(since), Some(CircuitState { phase, ..state }))
        };
        match state.phase {
            CircuitPhase::Closed => (Permission::Pass, None),
            CircuitPhase::Open(until) if now < until => (Permission::Refused(until.saturating_since(now)), None),
            CircuitPhase::Open(_) => probe(now, 1, 0),
            CircuitPhase::HalfOpen { since, begun, passed } if begun < self.probes => {
                probe(since, begun.saturating_add(1), passed)
            }
            // A probe that is lost with its worker is never answered: the next ones begin after another reset time.
            CircuitPhase::HalfOpen { since, .. } => match since.saturating_add(self.reset).saturating_since(now) {
                0 => probe(now, 1, 0),
                left => (Permission::Refused(left), None),
            },
        }
    }

    /// The new state, where evidence changes it. `probe` is the phase that an answered request was a probe of, `failed`
    /// whether it failed; without a probe, whether anything has failed. `recent` are the answers within the window, `totals`
    /// all answers.
    pub(super) fn judge(
        &self,
        state: CircuitState,
        probe: Option<MonotonicInstant>,
        failed: bool,
        (recent, totals): (Totals, Totals),
        now: MonotonicInstant,
    ) -> Option<CircuitState> {
        let open = CircuitPhase::Open(now.saturating_add(self.reset));
        let phase = match (state.phase, probe) {
            (CircuitPhase::Closed, None) if failed && self.is_unwell(state, recent, totals) => open,
            (CircuitPhase::HalfOpen { since, .. }, Some(begun_at)) if failed && since == begun_at => open,
            (CircuitPhase::HalfOpen { since, begun, passed }, Some(begun_at)) if since == begun_at => {
                let passed = passed.saturating_add(1);
                if passed >= self.probes {
                    return Some(CircuitState { phase: CircuitPhase::Closed, closed_at: totals });
                }
                CircuitPhase::HalfOpen { since, begun, passed }
            }
            _ => return None,
        };
        Some(CircuitState { phase, ..state })
    }

    fn is_unwell(&self, state: CircuitState, recent: Totals, totals: Totals) -> bool {
        // Totals below those of the closing began anew meanwhile.
        let began_anew = totals.requests < state.closed_at.requests;
        let since_closed = if began_anew { totals } else { totals.since(state.closed_at) };
        let seen = if since_closed.requests < recent.requests { since_closed } else { recent };
        let share = |count: u64, percent: u8| u128::from(count) * u128::from(percent);
        seen.requests >= self.volume && share(seen.failures, 100) >= share(seen.requests, self.threshold)
    }

    /// The answer to a request that is refused.
    pub(super) fn refusal(&self, route: &str, wait: u64, is_grpc: bool) -> LocalReply {
        let seconds = seconds_rounded_up(wait).max(1).to_string();
        let body = ["the circuit breaker of route ", route, " is open; try again in ", &seconds, " s"].concat();
        LocalReply {
            status: 503,
            details: "trimtab_circuit_open",
            headers: vec![("retry-after".into(), seconds), ("x-envoy-overloaded".into(), "true".to_owned())],
            body,
            grpc_status: is_grpc.then_some(14),
        }
    }
}

impl CircuitPhase {
    pub(super) fn name(self) -> &'static str {
        match self {
            CircuitPhase::Closed => "closed",
            CircuitPhase::Open(_) => "open",
            CircuitPhase::HalfOpen { .. } => "half-open",
        }
    }

    /// As a gauge shows it: 0 to 2, in the order above.
    pub(super) fn number(self) -> u8 {
        match self {
            CircuitPhase::Closed => 0,
            CircuitPhase::Open(_) => 1,
            CircuitPhase::HalfOpen { .. } => 2,
        }
    }
}

impl CircuitState {
    /// The state without one of the probes that began with the phase `since`, if it is one of this phase.
    pub(super) fn without_probe(self, since: MonotonicInstant) -> Option<CircuitState> {
        match self.phase {
            CircuitPhase::HalfOpen { since: begun_at, begun, passed } if begun_at == since && begun > passed => {
                Some(CircuitState { phase: CircuitPhase::HalfOpen { since, begun: begun - 1, passed }, ..self })
            }
            _ => None,
        }
    }
}

impl Record for CircuitState {
    const SCHEMA: u8 = 2;

    fn encode(&self, bytes: &mut Vec<u8>) {
        let (instant, begun, passed) = match self.phase {
            CircuitPhase::Closed => (MonotonicInstant::ZERO, 0, 0),
            CircuitPhase::Open(until) => (until, 0, 0),
            CircuitPhase::HalfOpen { since, begun, passed } => (since, begun, passed),
        };
        let probes = u64::from(begun) << 32 | u64::from(passed);
        bytes.push(self.phase.number());
        for value in [instant.as_nanos(), self.closed_at.requests, self.closed_at.failures, probes] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    }

    /// In schema 1 the totals were those of metrics, with which the totals of today cannot be compared.
    fn decode(schema: u8, bytes: &[u8]) -> Option<CircuitState> {
        let (phase, rest) = bytes.split_first().filter(|_| matches!(schema, 1 | 2))?;
        let ([instant, requests, failures, probes], []) = rest.as_chunks::<8>() else { return None };
        let [requests, failures, probes] = [requests, failures, probes].map(|bytes| u64::from_le_bytes(*bytes));
        let phase = match (phase, MonotonicInstant::from_le_bytes(*instant), probes) {
            (0, MonotonicInstant::ZERO, 0) => CircuitPhase::Closed,
            (1, until, 0) => CircuitPhase::Open(until),
            (2, since, probes) => CircuitPhase::HalfOpen { since, begun: (probes >> 32) as u32, passed: probes as u32 },
            _ => return None,
        };
        let closed_at = Totals { requests, failures, ..Totals::default() };
        Some(CircuitState { phase, closed_at: if schema == 1 { Totals::default() } else { closed_at } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn breaker(probes: u32) -> BreakerPolicy {
        let (window, reset) = (10 * SECOND, 30 * SECOND);
        BreakerPolicy { threshold: 50, volume: 20, window, reset, probes, key: "w".into() }
    }

    fn totals(requests: u64, failures: u64) -> Totals {
        Totals { requests, failures, ..Totals::default() }
    }

    fn open(until: MonotonicInstant) -> CircuitState {
        CircuitState { phase: CircuitPhase::Open(until), ..CircuitState::default() }
    }

    #[test]
    fn the_circuit_opens_at_the_threshold_and_not_before() {
        let judge = |requests, failures, failed| {
            let seen = (totals(requests, failures), totals(requests, failures));
            breaker(1).judge(CircuitState::default(), None, failed, seen, at(5)).map(|state| state.phase)
        };
        assert_eq!(judge(19, 19, true), None, "too few to tell");
        assert_eq!(judge(20, 10, true), Some(CircuitPhase::Open(at(5 + 30 * SECOND))));
        assert_eq!(judge(21, 10, true), None);
        assert_eq!(judge(20, 20, false), None, "a success opens nothing");
    }

    #[test]
    fn answers_before_the_closing_are_no_evidence() {
        let breaker = breaker(1);
        let half_open = CircuitState {
            phase: CircuitPhase::HalfOpen { since: at(7), begun: 1, passed: 0 },
            ..CircuitState::default()
        };
        let closed = breaker.judge(half_open, Some(at(7)), false, (totals(30, 29), totals(30, 29)), at(8)).unwrap();
        assert_eq!(closed.phase, CircuitPhase::Closed);
        let judge = |requests, failures| {
            let seen = (totals(requests, failures), totals(requests, failures));
            breaker.judge(closed, None, true, seen, at(9)).is_some()
        };
        assert!(!judge(31, 30) && !judge(49, 48));
        assert!(judge(50, 49));
    }

    #[test]
    fn a_half_open_circuit_passes_the_configured_number_of_probes() {
        let breaker = breaker(3);
        let mut state = open(at(100));
        let (mut probes, mut refused) = (0, 0);
        for now in 90..120 {
            let (pass, changed) = breaker.admit(state, at(now));
            state = changed.unwrap_or(state);
            match pass {
                Permission::Pass => panic!("let through at {now}"),
                Permission::Probe(since) => {
                    assert_eq!(since, at(100));
                    probes += 1;
                }
                Permission::Refused(_) => refused += 1,
            }
        }
        assert_eq!((probes, refused), (3, 27));
        assert_eq!(breaker.admit(state, at(110)).0, Permission::Refused(30 * SECOND - 10));
        assert_eq!(
            breaker.admit(state, at(100 + 30 * SECOND)).0,
            Permission::Probe(at(100 + 30 * SECOND)),
            "none was answered"
        );

        let judge = |state, probe, failed| breaker.judge(state, probe, failed, (totals(0, 0), totals(0, 0)), at(200));
        assert_eq!(judge(state, Some(at(99)), true), None, "a probe of an earlier time");
        assert_eq!(judge(state, None, true), None, "a request from before it opened");
        assert_eq!(judge(state, Some(at(100)), true).unwrap().phase, CircuitPhase::Open(at(200 + 30 * SECOND)));
        for _ in 0..2 {
            state = judge(state, Some(at(100)), false).unwrap();
            assert_ne!(state.phase, CircuitPhase::Closed);
        }
        assert_eq!(judge(state, Some(at(100)), false).unwrap().phase, CircuitPhase::Closed);
    }

    #[test]
    fn a_cancelled_probe_is_available_again() {
        let breaker = breaker(1);
        let (_, probing) = breaker.admit(open(at(100)), at(100));
        let probing = probing.unwrap();
        assert!(matches!(breaker.admit(probing, at(101)).0, Permission::Refused(_)));
        assert_eq!(probing.without_probe(at(99)), None, "a probe of an earlier phase");
        let cancelled = probing.without_probe(at(100)).unwrap();
        assert_eq!(cancelled.without_probe(at(100)), None, "there was one probe only");
        assert_eq!(breaker.admit(cancelled, at(101)).0, Permission::Probe(at(100)));
    }

    #[test]
    fn a_refusal_has_the_time_of_the_next_try() {
        let reply = breaker(1).refusal("users", 1_500_000_000, true);
        assert_eq!((reply.status, reply.grpc_status), (503, Some(14)));
        assert_eq!(reply.headers[0], ("retry-after".into(), "2".to_owned()));
        assert_eq!(reply.body, "the circuit breaker of route users is open; try again in 2 s");
    }

    proptest! {
        #[test]
        fn a_state_is_read_as_it_was_written(
            phase in prop_oneof![
                Just(CircuitPhase::Closed),
                any::<u64>().prop_map(|until| CircuitPhase::Open(at(until))),
                (any::<u64>(), any::<u32>(), any::<u32>())
                    .prop_map(|(since, begun, passed)| CircuitPhase::HalfOpen { since: at(since), begun, passed }),
            ],
            requests: u64,
            failures: u64,
        ) {
            let state = CircuitState { phase, closed_at: totals(requests, failures) };
            let mut bytes = Vec::new();
            state.encode(&mut bytes);
            prop_assert_eq!(CircuitState::decode(CircuitState::SCHEMA, &bytes), Some(state));
            let earlier = CircuitState { closed_at: totals(0, 0), ..state };
            prop_assert_eq!(CircuitState::decode(1, &bytes), Some(earlier));
        }

        #[test]
        fn any_bytes_are_a_state_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..40), now: u64) {
            if let Some(state) = CircuitState::decode(CircuitState::SCHEMA, &bytes) {
                let now = at(now);
                breaker(1).admit(state, now);
                breaker(1).judge(state, Some(now), false, (totals(1, 1), totals(0, 0)), now);
            }
        }
    }
}
