//! When injection stops and when it may come back: the state of an experiment, seen from the requests that were not
//! faulted.
//!
//! ```text
//!          alarm                hold-down over, calm              calm for a window
//!  ARMED ────────► SUSPENDED ───────────────────────► PROBING ─────────────────────► ARMED
//!                      ▲                                 │ alarm
//!                      └─────────────────────────────────┘      the last suspension: LATCHED
//! ```
//!
//! An alarm is a threshold that was met within the window. Calm is more than the absence of an alarm: a whole window with
//! enough answers, and each of its figures below half of its threshold. Without answers nothing is known, so nothing is
//! resumed.

use crate::outlier::Totals;
use crate::units::{Fraction, MonotonicInstant, UnixNanos};

/// The `guard` block, and what ends the experiment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Injection stops at this share of failures ...
    pub error_rate: Fraction,
    /// ... or when more than one answer in twenty took longer than so many nanoseconds ...
    pub latency_p95: Option<u64>,
    /// ... among at least so many requests ...
    pub min_requests: u64,
    /// ... within so many nanoseconds; or at this share of hosts that are ejected.
    pub ejected: Fraction,
    pub window: u64,
    /// The first suspension lasts for at least so many nanoseconds, the second for twice as many, and so on.
    pub hold_down: u64,
    /// The suspension that ends the experiment.
    pub latch_after: u8,
    /// The experiment's own name, where it has one: its state is kept under it.
    pub experiment: Option<Box<str>>,
    /// The experiment lasts from the first of these instants to the second.
    pub term: Option<(UnixNanos, UnixNanos)>,
    /// How many requests have to come for each failure that is injected.
    pub spacing: Option<u64>,
    /// Where to ask Envoy itself which hosts are ejected.
    pub admin: Option<Admin>,
    /// Whether injection goes on while it cannot be learned which hosts are ejected.
    pub continues_unknown: bool,
}

/// The way to Envoy's admin endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// A cluster that leads there.
    pub cluster: Box<str>,
    /// Nanoseconds from one question to the next. An answer that is three times as old says nothing any more.
    pub interval: u64,
}

impl Default for Guard {
    fn default() -> Self {
        Guard {
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

/// What is known of a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// What was counted within the window.
    pub recent: Totals,
    /// Whether a whole window was watched.
    pub is_full: bool,
    /// The share of its hosts that are ejected.
    pub ejected: Fraction,
    /// Whether something that has to be known of it is not.
    pub is_unknown: bool,
}

/// Where an experiment stands. The instants are of the clock that all workers share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    #[default]
    Armed,
    /// Nothing is injected until this instant at least.
    Suspended(MonotonicInstant),
    /// A tenth is injected, since this instant.
    Probing(MonotonicInstant),
    /// Nothing is injected any more.
    Latched,
}

/// The state of an experiment. All workers share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub phase: Phase,
    /// How often it was suspended.
    pub suspensions: u8,
    /// How often since it was last armed.
    pub consecutive: u8,
}

/// Why a state changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Too many failures.
    Errors,
    /// Too many slow answers.
    Latency,
    /// Too many ejected hosts.
    Ejected,
    /// The proxy had no host to send a request to, or too many requests waiting.
    Outage,
    /// The state was overwritten by somebody else.
    Garbage,
    /// All is well.
    Calm,
}

impl Cause {
    pub fn name(self) -> &'static str {
        match self {
            Cause::Errors => "errors",
            Cause::Latency => "latency",
            Cause::Ejected => "ejected",
            Cause::Outage => "outage",
            Cause::Garbage => "garbage",
            Cause::Calm => "calm",
        }
    }
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Armed => "armed",
            Phase::Suspended(_) => "suspended",
            Phase::Probing(_) => "probing",
            Phase::Latched => "latched",
        }
    }

    /// As a gauge shows it: 0 to 3, in the order above.
    pub fn number(self) -> u8 {
        match self {
            Phase::Armed => 0,
            Phase::Suspended(_) => 1,
            Phase::Probing(_) => 2,
            Phase::Latched => 3,
        }
    }

    /// The instant that belongs to it, where there is one.
    pub fn instant(self) -> Option<MonotonicInstant> {
        match self {
            Phase::Suspended(at) | Phase::Probing(at) => Some(at),
            Phase::Armed | Phase::Latched => None,
        }
    }
}

/// Whether `part` is at least `share` of `whole`, and there is any.
fn meets(part: u64, whole: u64, share: Fraction) -> bool {
    part > 0 && u128::from(part) * 1_000_000 >= u128::from(whole) * u128::from(share.ppm())
}

impl Guard {
    /// The longest hold-down, in nanoseconds, unless the first one is longer.
    const LONGEST: u64 = 300_000_000_000;
    /// More than one slow answer in twenty is a 95th percentile above the limit.
    const ONE_IN_TWENTY: Fraction = Fraction::from_ppm(50_001);
    /// What is injected while probing, of what else would be.
    pub const PROBE: Fraction = Fraction::from_ppm(100_000);

    /// The threshold that was met, if any; with `times`, the figures so many times as high.
    fn alarm(&self, evidence: &Evidence, times: u64) -> Option<Cause> {
        let Totals { requests, failures, slow, outages } = evidence.recent;
        let is_enough = requests >= self.min_requests;
        if outages > 0 {
            Some(Cause::Outage)
        } else if meets(u64::from(evidence.ejected.ppm()).saturating_mul(times), 1_000_000, self.ejected) {
            Some(Cause::Ejected)
        } else if is_enough && meets(failures.saturating_mul(times), requests, self.error_rate) {
            Some(Cause::Errors)
        } else if is_enough
            && self.latency_p95.is_some()
            && meets(slow.saturating_mul(times), requests, Self::ONE_IN_TWENTY)
        {
            Some(Cause::Latency)
        } else {
            None
        }
    }

    fn is_calm(&self, evidence: &Evidence) -> bool {
        evidence.is_full
            && !evidence.is_unknown
            && evidence.recent.requests >= self.min_requests
            && self.alarm(evidence, 2).is_none()
    }

    /// The state after `state`, where the evidence changes it.
    pub fn next(&self, state: State, evidence: &Evidence, now: MonotonicInstant) -> Option<(State, Cause)> {
        let alarm = self.alarm(evidence, 1);
        let calm = |phase| self.is_calm(evidence).then_some((State { phase, ..state }, Cause::Calm));
        match (state.phase, alarm) {
            (Phase::Armed | Phase::Probing(_), Some(cause)) => Some((self.suspend(state, now), cause)),
            (Phase::Suspended(until), None) if now >= until => calm(Phase::Probing(now)),
            (Phase::Probing(since), None) if now.saturating_since(since) >= self.window => {
                calm(Phase::Armed).map(|(state, cause)| (State { consecutive: 0, ..state }, cause))
            }
            _ => None,
        }
    }

    /// `state`, suspended once more.
    pub fn suspend(&self, state: State, now: MonotonicInstant) -> State {
        let suspensions = state.suspensions.saturating_add(1);
        let consecutive = state.consecutive.saturating_add(1);
        let longest = self.hold_down.max(Self::LONGEST);
        let hold_down = self.hold_down.saturating_mul(u64::from(consecutive)).min(longest);
        let phase = match suspensions >= self.latch_after {
            true => Phase::Latched,
            false => Phase::Suspended(now.saturating_add(hold_down)),
        };
        State { phase, suspensions, consecutive }
    }
}

impl State {
    /// The first byte of the shared word, to be changed with its layout.
    const SCHEMA: u8 = 1;

    /// As a shared word.
    pub fn encode(self) -> Vec<u8> {
        let head = [Self::SCHEMA, self.phase.number(), self.suspensions, self.consecutive];
        [&head[..], &self.phase.instant().unwrap_or_default().to_le_bytes()].concat()
    }

    /// From a shared word; `None` where it is not one of these.
    pub fn decode(word: &[u8]) -> Option<State> {
        let (&[Self::SCHEMA, phase, suspensions, consecutive], instant) = word.split_first_chunk::<4>()? else {
            return None;
        };
        let instant = u64::from_le_bytes(instant.try_into().ok()?);
        let phase = match (phase, instant) {
            (0, 0) => Phase::Armed,
            (1, until) => Phase::Suspended(MonotonicInstant::from_nanos(until)),
            (2, since) => Phase::Probing(MonotonicInstant::from_nanos(since)),
            (3, 0) => Phase::Latched,
            _ => return None,
        };
        Some(State { phase, suspensions, consecutive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn recent(requests: u64, failures: u64) -> Evidence {
        Evidence { recent: Totals { requests, failures, ..Totals::default() }, is_full: true, ..Evidence::default() }
    }

    fn armed() -> State {
        State::default()
    }

    fn ends(guard: &Guard, state: State, evidence: &Evidence, now: MonotonicInstant) -> Phase {
        guard.next(state, evidence, now).map_or(state.phase, |(state, _)| state.phase)
    }

    #[test]
    fn each_threshold_is_met_exactly() {
        let guard = Guard { latency_p95: Some(1), ..Guard::default() };
        let cause = |evidence: Evidence| guard.next(armed(), &evidence, at(0)).map(|(_, cause)| cause);
        assert_eq!(cause(recent(100, 5)), Some(Cause::Errors));
        assert_eq!(cause(recent(101, 5)), None);
        assert_eq!(cause(recent(19, 19)), None, "too few to tell");
        assert_eq!(cause(recent(20, 19)), Some(Cause::Errors));
        let slow = |slow| Evidence { recent: Totals { slow, ..recent(100, 0).recent }, ..recent(0, 0) };
        assert_eq!(cause(slow(5)), None, "the 95th percentile is just within the limit");
        assert_eq!(cause(slow(6)), Some(Cause::Latency));
        let ejected = |ppm| Evidence { ejected: Fraction::from_ppm(ppm), ..recent(0, 0) };
        assert_eq!(cause(ejected(99_999)), None);
        assert_eq!(cause(ejected(100_000)), Some(Cause::Ejected), "hosts speak without requests");
        let outage = Evidence { recent: Totals { outages: 1, ..Totals::default() }, ..recent(0, 0) };
        assert_eq!(cause(outage), Some(Cause::Outage));
        let zero = Guard { error_rate: Fraction::NONE, ..Guard::default() };
        assert_eq!(zero.next(armed(), &recent(100, 0), at(0)), None, "no failure, no alarm");
        assert!(zero.next(armed(), &recent(100, 1), at(0)).is_some());
    }

    #[test]
    fn it_comes_back_by_way_of_probing() {
        let guard = Guard::default();
        let (state, cause) = guard.next(armed(), &recent(20, 4), at(SECOND)).unwrap();
        assert_eq!((state.phase, cause), (Phase::Suspended(at(31 * SECOND)), Cause::Errors));
        assert_eq!(guard.next(state, &recent(100, 100), at(30 * SECOND)), None, "no second suspension");
        assert_eq!(guard.next(state, &recent(1000, 0), at(30 * SECOND)), None, "held down");
        for (evidence, why) in [
            (recent(19, 0), "too few answers to tell"),
            (recent(1000, 25), "not below half of the threshold"),
            (Evidence { is_full: false, ..recent(1000, 0) }, "no whole window"),
            (Evidence { is_unknown: true, ..recent(1000, 0) }, "hosts unknown"),
            (Evidence { ejected: Fraction::from_ppm(50_000), ..recent(1000, 0) }, "a host in twenty is ejected"),
        ] {
            assert_eq!(guard.next(state, &evidence, at(31 * SECOND)), None, "{why}");
        }
        let (probing, cause) = guard.next(state, &recent(1000, 24), at(31 * SECOND)).unwrap();
        assert_eq!((probing.phase, cause), (Phase::Probing(at(31 * SECOND)), Cause::Calm));
        assert_eq!(ends(&guard, probing, &recent(1000, 0), at(40 * SECOND)), probing.phase, "not a whole window yet");
        let (armed, _) = guard.next(probing, &recent(1000, 0), at(41 * SECOND)).unwrap();
        assert_eq!(armed, State { phase: Phase::Armed, suspensions: 1, consecutive: 0 });
    }

    #[test]
    fn hold_down_grows_to_a_cap_and_the_third_suspension_latches() {
        let guard = Guard::default();
        let bad = recent(20, 20);
        let mut state = armed();
        for (phase, why) in [
            (Phase::Suspended(at(30 * SECOND)), "once"),
            (Phase::Suspended(at(60 * SECOND)), "twice as long"),
            (Phase::Latched, "for good"),
        ] {
            state = guard.next(State { phase: Phase::Probing(at(0)), ..state }, &bad, at(0)).unwrap().0;
            assert_eq!(state.phase, phase, "{why}");
        }
        assert_eq!(guard.next(state, &recent(1000, 0), MonotonicInstant::MAX), None);
        let patient = Guard { latch_after: 100, ..Guard::default() };
        let twentieth = State { phase: Phase::Armed, suspensions: 19, consecutive: 19 };
        assert_eq!(patient.suspend(twentieth, at(0)).phase, Phase::Suspended(at(300 * SECOND)));
        let long = Guard { hold_down: 3600 * SECOND, ..Guard::default() };
        assert_eq!(long.suspend(armed(), at(0)).phase, Phase::Suspended(at(3600 * SECOND)));
    }

    fn phases() -> impl Strategy<Value = Phase> {
        prop_oneof![
            Just(Phase::Armed),
            any::<u64>().prop_map(|until| Phase::Suspended(at(until))),
            any::<u64>().prop_map(|since| Phase::Probing(at(since))),
            Just(Phase::Latched),
        ]
    }

    proptest! {
        #[test]
        fn a_state_is_read_as_it_was_written(phase in phases(), suspensions: u8, consecutive: u8) {
            let state = State { phase, suspensions, consecutive };
            prop_assert_eq!(State::decode(&state.encode()), Some(state));
        }

        #[test]
        fn no_word_is_too_odd(word in proptest::collection::vec(any::<u8>(), 0..16)) {
            if let Some(state) = State::decode(&word) {
                prop_assert_eq!(state.encode(), word);
            }
        }

        /// Whatever is seen: nobody goes from suspended to armed without probing for a whole window, no suspension ends
        /// early, latched is for good, and an alarm is never followed by an injection.
        #[test]
        fn no_way_leads_around_probing(
            seen in proptest::collection::vec((0..200_u64, 0..40_u64, 0..4_000_u64, any::<bool>()), 1..200),
        ) {
            let guard = Guard { latch_after: 4, ..Guard::default() };
            let (mut state, mut now, mut suspensions) = (armed(), at(0), 0);
            for (requests, failures, milliseconds, is_full) in seen {
                now = now.saturating_add(milliseconds * 1_000_000);
                let evidence = Evidence { is_full, ..recent(requests, failures.min(requests)) };
                let before = state;
                if let Some((next, _)) = guard.next(state, &evidence, now) {
                    state = next;
                }
                if guard.alarm(&evidence, 1).is_some() {
                    prop_assert!(matches!(state.phase, Phase::Suspended(_) | Phase::Latched));
                }
                match (before.phase, state.phase) {
                    (Phase::Suspended(until), Phase::Probing(since)) => {
                        prop_assert!(now >= until && since == now && guard.is_calm(&evidence));
                    }
                    (Phase::Probing(since), Phase::Armed) => {
                        prop_assert!(now.saturating_since(since) >= guard.window && guard.is_calm(&evidence));
                    }
                    (Phase::Suspended(_), Phase::Armed) => prop_assert!(false, "armed without probing"),
                    (Phase::Latched, phase) => prop_assert_eq!(phase, Phase::Latched),
                    (Phase::Armed | Phase::Probing(_), Phase::Suspended(until)) => {
                        suspensions += 1;
                        prop_assert!(until.saturating_since(now) == guard.hold_down * u64::from(state.consecutive));
                    }
                    (Phase::Armed | Phase::Probing(_), Phase::Latched) => {
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
