//! An experiment at work in one worker: what is injected of what was drawn, and what becomes of the experiment.
//!
//! The state is one shared word for each destination of each experiment. Every worker reads it before it injects a
//! fault and at its ticks, judges by the totals that all workers count together, and writes a new state by
//! compare-and-swap: whoever comes first logs the change. A word that cannot be written lets nothing be injected.

use super::poll::sighting_word;
use crate::fault::{Cause, Evidence, Fault, Guard, Phase, State, Withheld, spend};
use crate::host::{Change, Host, update};
use crate::outlier::{Sighting, Window, health};
use crate::policy::{Policy, Route, Target, label};
use crate::telemetry::{DestinationMeters, Meters, RouteMeters};
use crate::units::{Fraction, MonotonicInstant};

/// How often, while a stream is held, a worker looks whether it has to be let go; in nanoseconds.
const HELD_PERIOD: u64 = 100_000_000;

/// Which experiment a fault belongs to: the route, and which of its destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experiment {
    pub route: u32,
    pub destination: u32,
}

/// What one worker remembers of one experiment and one of its destinations.
#[derive(Debug)]
pub(super) struct Watch {
    /// The key of the shared state.
    word: String,
    /// The key of the budget's shared word.
    budget: String,
    /// How log lines name it.
    name: String,
    window: Window,
    phase: Phase,
    is_over: bool,
    is_unknown: bool,
    /// The share of hosts that were ejected when it looked last.
    ejected: Fraction,
    /// The keys of the shared words about the target's hosts: what was observed, and what Envoy said.
    observed: Option<String>,
    sighting: Option<String>,
    look_again: MonotonicInstant,
}

/// What of the policy a watch looks at.
#[derive(Clone, Copy)]
pub(super) struct Post<'p> {
    pub fault: &'p Fault,
    pub meters: &'p RouteMeters,
    pub sent_to: &'p DestinationMeters,
}

/// The watches on the destinations of `route`; none where it injects no fault.
pub(super) fn watches(policy: &Policy, route: &Route, meters: &RouteMeters, host: &impl Host) -> Vec<Watch> {
    let Some(fault) = &route.fault else { return Vec::new() };
    let mut watches = Vec::new();
    for (index, (target, sent_to)) in route.targets.iter().zip(&meters.destinations).enumerate() {
        let destination = route.split.as_ref().and_then(|split| split.destinations.get(index));
        let destination = destination.map_or("", |(destination, _)| destination.label());
        let post = Post { fault, meters, sent_to };
        let mut name = format!("route={:?} destination={destination:?}", route.name);
        if !route.slo.owner.is_empty() {
            name = format!("{name} owner={:?}", route.slo.owner);
        }
        let Some(target) = policy.targets.get(target.0) else { continue };
        let mut watch = Watch {
            word: [&*word(policy, route, "guard/"), "/", &label(&target.name)].concat(),
            budget: word(policy, route, "budget/"),
            name,
            window: Window::new(fault.guard.window, host.now(), sent_to.totals(host)),
            phase: Phase::Armed,
            is_over: false,
            is_unknown: false,
            ejected: Fraction::NONE,
            observed: target.detection.map(|_| outliers_word(policy, target)),
            sighting: fault.guard.admin.as_ref().map(|_| sighting_word(policy, target)),
            look_again: MonotonicInstant::ZERO,
        };
        watch.look(&post, host);
        watches.push(watch);
    }
    if fault.guard.spacing.is_some() {
        // Whoever asks first begins; and nothing is spent by being asked for.
        let _ = spend(host, &word(policy, route, "budget/"), u64::MAX, meters.requests(host));
    }
    watches
}

/// The key of the shared table of the hosts of `target`.
pub(super) fn outliers_word(policy: &Policy, target: &Target) -> String {
    policy.word("outlier/", &target.name)
}

/// The key of an experiment's shared word for `what`.
fn word(policy: &Policy, route: &Route, what: &str) -> String {
    let guard = route.fault.as_ref().map(|fault| &fault.guard);
    let experiment = guard.and_then(|guard| guard.experiment.as_deref()).unwrap_or_default();
    [&*policy.word(what, &route.name), "/", experiment].concat()
}

impl<'p> Post<'p> {
    pub fn new(policy: &'p Policy, meters: &'p Meters, route: usize, destination: usize) -> Option<Post<'p>> {
        let (route, meters) = (policy.routes.get(route)?, meters.routes.get(route)?);
        Some(Post { fault: route.fault.as_ref()?, meters, sent_to: meters.destinations.get(destination)? })
    }

    fn guard(&self) -> &Guard {
        &self.fault.guard
    }

    /// Whether the experiment is not running by the clock of the wall.
    fn is_over(&self, host: &impl Host) -> bool {
        self.guard().term.is_some_and(|(begin, end)| !(begin..end).contains(&host.wall_now()))
    }
}

impl Watch {
    /// How often [`Watch::look`] has to be called, in nanoseconds.
    pub fn period(&self, is_holding: bool) -> u64 {
        let step = self.window.step();
        if is_holding { step.min(HELD_PERIOD) } else { step }
    }

    /// Whether a fault that goes on must be ended.
    pub fn ends_faults(&self) -> bool {
        self.is_over || self.is_unknown || matches!(self.phase, Phase::Suspended(_) | Phase::Latched)
    }

    /// Why a fault that was drawn must not be injected now, if it must not; `probe` draws which are of those that may be
    /// while it is probing.
    pub fn withholds(&mut self, post: &Post<'_>, probe: impl FnOnce() -> u64, host: &impl Host) -> Option<Withheld> {
        self.look(post, host);
        if self.is_over {
            return Some(Withheld::Expired);
        }
        match self.phase {
            Phase::Suspended(_) | Phase::Latched => Some(Withheld::Suspended),
            _ if self.is_unknown => Some(Withheld::Unknown),
            Phase::Armed => None,
            Phase::Probing(_) => (!Guard::PROBE.includes(probe())).then_some(Withheld::Probing),
        }
    }

    /// Whether the budget allows another failure, which is spent then.
    pub fn spend(&self, post: &Post<'_>, host: &impl Host) -> bool {
        let Some(spacing) = post.guard().spacing else { return true };
        spend(host, &self.budget, spacing, post.meters.requests(host)) == Ok(true)
    }

    /// Looks if it is time to; to be called at every tick.
    pub fn tick(&mut self, post: &Post<'_>, host: &impl Host) {
        let now = host.now();
        if now >= self.look_again {
            self.look_again = now.saturating_add(self.period(true));
            self.look(post, host);
        }
    }

    /// Judges the target, and tells everybody where that changes the state.
    pub fn look(&mut self, post: &Post<'_>, host: &impl Host) {
        let now = host.now();
        self.is_over = post.is_over(host);
        let totals = post.sent_to.totals(host);
        self.window.mark(now, || totals);
        let guard = post.guard();
        self.look_at_hosts(post, now, host);
        let evidence = Evidence {
            recent: self.window.recent(now, totals),
            is_full: self.window.is_full(now),
            ejected: self.ejected,
            is_unknown: self.is_unknown,
        };
        let known = self.phase;
        let looked = update(host, &self.word, |found| {
            let (state, next) = match found.map(State::decode) {
                None => (State::default(), guard.next(State::default(), &evidence, now)),
                Some(Some(state)) => (state, guard.next(state, &evidence, now)),
                Some(None) => (State::default(), Some((guard.suspend(State::default(), now), Cause::Garbage))),
            };
            match next {
                Some((next, cause)) => Change::Write(next.encode(), (next, Some((state.phase, cause)))),
                None => Change::Keep((state, None)),
            }
        });
        let Ok((state, change)) = looked else {
            self.phase = Phase::Suspended(now);
            return;
        };
        self.phase = state.phase;
        if change.is_some() || state.phase != known {
            post.sent_to.show(state, host);
        }
        if let Some((was, cause)) = change {
            self.log(was, state, cause, &evidence, now);
        }
    }

    /// Learns which share of the hosts is ejected: the larger of what was observed and what Envoy said.
    fn look_at_hosts(&mut self, post: &Post<'_>, now: MonotonicInstant, host: &impl Host) {
        let mut ejected = Fraction::NONE;
        if let Some(word) = &self.observed {
            ejected = health(host, word, now).ejected_share();
        }
        if let (Some(word), Some(admin)) = (&self.sighting, &post.guard().admin) {
            let sighting = host.get(word).and_then(|(word, _)| Sighting::decode(&word));
            // Seen by another worker a moment after this one has read the clock, it is not old.
            let known = sighting.filter(|seen| now.saturating_since(seen.at) <= admin.interval.saturating_mul(3));
            self.is_unknown = known.is_none() && !post.guard().continues_unknown;
            ejected = ejected.max(known.map_or(Fraction::NONE, |seen| seen.health.ejected_share()));
        }
        if let Some(gauge) = post.sent_to.target.ejected.filter(|_| ejected != self.ejected) {
            host.set_gauge(gauge, u64::from(ejected.ppm()));
        }
        self.ejected = ejected;
    }

    #[cold]
    #[inline(never)]
    fn log(&self, was: Phase, state: State, cause: Cause, evidence: &Evidence, now: MonotonicInstant) {
        const SECOND: u64 = 1_000_000_000;
        let hold_down = match state.phase {
            Phase::Suspended(until) => until.saturating_since(now) / SECOND,
            _ => 0,
        };
        let Evidence { recent, ejected, .. } = evidence;
        log::warn!(
            "fault guard: {} state={} was={} cause={} requests={} failures={} slow={} outages={} ejected={ejected} \
             suspensions={} hold_down_s={hold_down}",
            self.name,
            state.phase.name(),
            was.name(),
            cause.name(),
            recent.requests,
            recent.failures,
            recent.slow,
            recent.outages,
            state.suspensions,
        );
    }
}
