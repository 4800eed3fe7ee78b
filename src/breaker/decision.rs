//! Whether one request is let through, and what its answer changes.

use super::policy::Breaker;
use crate::http::LocalReply;
use crate::outlier::Totals;
use crate::units::{MonotonicInstant, seconds_rounded_up};

/// Whether requests pass. The instants are of the clock that all workers share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    #[default]
    Closed,
    /// None passes until this instant.
    Open(MonotonicInstant),
    /// Probes pass: so many have begun since this instant, so many of them have succeeded.
    HalfOpen { since: MonotonicInstant, begun: u32, passed: u32 },
}

/// The state of a breaker. All workers share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    pub phase: Phase,
    /// The totals when it was closed: what was counted before is forgotten.
    closed_at: Totals,
}

/// What is done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Through,
    /// It is let through to show how the target is; the probes of one half-open phase share this instant.
    Probe(MonotonicInstant),
    /// It is refused; so many nanoseconds are left until it is worth another try.
    Refused(u64),
}

impl Breaker {
    /// What is done with a request, and the new condition where that changes it.
    pub fn admit(&self, condition: Condition, now: MonotonicInstant) -> (Pass, Option<Condition>) {
        let probe = |since, begun, passed| {
            let phase = Phase::HalfOpen { since, begun, passed };
            (Pass::Probe(since), Some(Condition { phase, ..condition }))
        };
        match condition.phase {
            Phase::Closed => (Pass::Through, None),
            Phase::Open(until) if now < until => (Pass::Refused(until.saturating_since(now)), None),
            Phase::Open(_) => probe(now, 1, 0),
            Phase::HalfOpen { since, begun, passed } if begun < self.probes => {
                probe(since, begun.saturating_add(1), passed)
            }
            // A probe whose client has gone is never answered: the next ones begin when it could have been.
            Phase::HalfOpen { since, .. } => match since.saturating_add(self.reset).saturating_since(now) {
                0 => probe(now, 1, 0),
                left => (Pass::Refused(left), None),
            },
        }
    }

    /// The condition after an answer, where that changes it. `probe` is what the request passed as, `recent` what was
    /// counted within the window, and `totals` ever.
    pub fn learn(
        &self,
        condition: Condition,
        probe: Option<MonotonicInstant>,
        failed: bool,
        (recent, totals): (Totals, Totals),
        now: MonotonicInstant,
    ) -> Option<Condition> {
        let open = Phase::Open(now.saturating_add(self.reset));
        let phase = match (condition.phase, probe) {
            (Phase::Closed, None) if failed && self.is_unwell(condition, recent, totals) => open,
            (Phase::HalfOpen { since, .. }, Some(begun_at)) if failed && since == begun_at => open,
            (Phase::HalfOpen { since, begun, passed }, Some(begun_at)) if since == begun_at => {
                let passed = passed.saturating_add(1);
                if passed >= self.probes {
                    return Some(Condition { phase: Phase::Closed, closed_at: totals });
                }
                Phase::HalfOpen { since, begun, passed }
            }
            _ => return None,
        };
        Some(Condition { phase, ..condition })
    }

    fn is_unwell(&self, condition: Condition, recent: Totals, totals: Totals) -> bool {
        let since_closed = totals.since(condition.closed_at);
        let seen = if since_closed.requests < recent.requests { since_closed } else { recent };
        let share = |count: u64, percent: u8| u128::from(count) * u128::from(percent);
        seen.requests >= self.volume && share(seen.failures, 100) >= share(seen.requests, self.threshold)
    }

    /// The answer to a request that is refused.
    pub fn refusal(&self, route: &str, wait: u64, is_grpc: bool) -> LocalReply {
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

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Closed => "closed",
            Phase::Open(_) => "open",
            Phase::HalfOpen { .. } => "half-open",
        }
    }

    /// As a gauge shows it: 0 to 2, in the order above.
    pub fn number(self) -> u8 {
        match self {
            Phase::Closed => 0,
            Phase::Open(_) => 1,
            Phase::HalfOpen { .. } => 2,
        }
    }
}

impl Condition {
    /// The first byte of the shared word, to be changed with its layout.
    const SCHEMA: u8 = 1;

    /// As a shared word.
    pub fn encode(self) -> Vec<u8> {
        let (instant, begun, passed) = match self.phase {
            Phase::Closed => (0, 0, 0),
            Phase::Open(until) => (until.as_nanos(), 0, 0),
            Phase::HalfOpen { since, begun, passed } => (since.as_nanos(), begun, passed),
        };
        let mut word = vec![Self::SCHEMA, self.phase.number()];
        for value in
            [instant, self.closed_at.requests, self.closed_at.failures, u64::from(begun) << 32 | u64::from(passed)]
        {
            word.extend_from_slice(&value.to_le_bytes());
        }
        word
    }

    /// From a shared word; `None` where it is not one of these.
    pub fn decode(word: &[u8]) -> Option<Condition> {
        let ([Self::SCHEMA, phase], rest) = word.split_first_chunk::<2>()? else { return None };
        let ([instant, requests, failures, probes], []) = rest.as_chunks::<8>() else { return None };
        let [instant, requests, failures, probes] =
            [instant, requests, failures, probes].map(|bytes| u64::from_le_bytes(*bytes));
        let phase = match (phase, instant, probes) {
            (0, 0, 0) => Phase::Closed,
            (1, until, 0) => Phase::Open(MonotonicInstant::from_nanos(until)),
            (2, since, probes) => Phase::HalfOpen {
                since: MonotonicInstant::from_nanos(since),
                begun: (probes >> 32) as u32,
                passed: probes as u32,
            },
            _ => return None,
        };
        Some(Condition { phase, closed_at: Totals { requests, failures, ..Totals::default() } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn breaker(probes: u32) -> Breaker {
        let (window, reset) = (10 * SECOND, 30 * SECOND);
        Breaker { threshold: 50, volume: 20, window, reset, probes, word: "w".into() }
    }

    fn totals(requests: u64, failures: u64) -> Totals {
        Totals { requests, failures, ..Totals::default() }
    }

    fn open(until: MonotonicInstant) -> Condition {
        Condition { phase: Phase::Open(until), ..Condition::default() }
    }

    #[test]
    fn it_opens_at_the_threshold_and_not_before() {
        let learn = |requests, failures, failed| {
            let seen = (totals(requests, failures), totals(requests, failures));
            breaker(1).learn(Condition::default(), None, failed, seen, at(5)).map(|condition| condition.phase)
        };
        assert_eq!(learn(19, 19, true), None, "too few to tell");
        assert_eq!(learn(20, 10, true), Some(Phase::Open(at(5 + 30 * SECOND))));
        assert_eq!(learn(21, 10, true), None);
        assert_eq!(learn(20, 20, false), None, "a success opens nothing");
    }

    #[test]
    fn what_was_counted_before_it_closed_is_forgotten() {
        let breaker = breaker(1);
        let half_open =
            Condition { phase: Phase::HalfOpen { since: at(7), begun: 1, passed: 0 }, ..Condition::default() };
        let closed = breaker.learn(half_open, Some(at(7)), false, (totals(30, 29), totals(30, 29)), at(8)).unwrap();
        assert_eq!(closed.phase, Phase::Closed);
        let learn = |requests, failures| {
            let seen = (totals(requests, failures), totals(requests, failures));
            breaker.learn(closed, None, true, seen, at(9)).is_some()
        };
        assert!(!learn(31, 30) && !learn(49, 48));
        assert!(learn(50, 49));
    }

    #[test]
    fn half_open_lets_the_stated_number_through() {
        let breaker = breaker(3);
        let mut condition = open(at(100));
        let (mut probes, mut refused) = (0, 0);
        for now in 90..120 {
            let (pass, changed) = breaker.admit(condition, at(now));
            condition = changed.unwrap_or(condition);
            match pass {
                Pass::Through => panic!("let through at {now}"),
                Pass::Probe(since) => {
                    assert_eq!(since, at(100));
                    probes += 1;
                }
                Pass::Refused(_) => refused += 1,
            }
        }
        assert_eq!((probes, refused), (3, 27));
        assert_eq!(breaker.admit(condition, at(110)).0, Pass::Refused(30 * SECOND - 10));
        assert_eq!(
            breaker.admit(condition, at(100 + 30 * SECOND)).0,
            Pass::Probe(at(100 + 30 * SECOND)),
            "none was answered"
        );

        let learn =
            |condition, probe, failed| breaker.learn(condition, probe, failed, (totals(0, 0), totals(0, 0)), at(200));
        assert_eq!(learn(condition, Some(at(99)), true), None, "a probe of an earlier time");
        assert_eq!(learn(condition, None, true), None, "a request from before it opened");
        assert_eq!(learn(condition, Some(at(100)), true).unwrap().phase, Phase::Open(at(200 + 30 * SECOND)));
        for _ in 0..2 {
            condition = learn(condition, Some(at(100)), false).unwrap();
            assert_ne!(condition.phase, Phase::Closed);
        }
        assert_eq!(learn(condition, Some(at(100)), false).unwrap().phase, Phase::Closed);
    }

    #[test]
    fn a_refusal_says_when_to_come_back() {
        let reply = breaker(1).refusal("users", 1_500_000_000, true);
        assert_eq!((reply.status, reply.grpc_status), (503, Some(14)));
        assert_eq!(reply.headers[0], ("retry-after".into(), "2".to_owned()));
        assert_eq!(reply.body, "the circuit breaker of route users is open; try again in 2 s");
    }

    proptest! {
        #[test]
        fn a_condition_is_read_as_it_was_written(
            phase in prop_oneof![
                Just(Phase::Closed),
                any::<u64>().prop_map(|until| Phase::Open(at(until))),
                (any::<u64>(), any::<u32>(), any::<u32>())
                    .prop_map(|(since, begun, passed)| Phase::HalfOpen { since: at(since), begun, passed }),
            ],
            requests: u64,
            failures: u64,
        ) {
            let condition = Condition { phase, closed_at: totals(requests, failures) };
            prop_assert_eq!(Condition::decode(&condition.encode()), Some(condition));
        }

        #[test]
        fn no_word_is_too_odd(word in proptest::collection::vec(any::<u8>(), 0..40), now: u64) {
            if let Some(condition) = Condition::decode(&word) {
                let now = at(now);
                breaker(1).admit(condition, now);
                breaker(1).learn(condition, Some(now), false, (totals(1, 1), totals(0, 0)), now);
            }
        }
    }
}
