//! A circuit breaker at work in one worker.
//!
//! The condition is one shared word, which every request of the route reads, so that no worker is late. Answers are
//! counted in metrics, which add up by themselves.

use crate::breaker::{Breaker, Condition, Pass, Phase};
use crate::host::{Change, Host, update};
use crate::outlier::Window;
use crate::policy::Route;
use crate::telemetry::{BreakerMeters, RouteMeters};
use crate::units::MonotonicInstant;

/// What one worker remembers of one route's breaker.
#[derive(Debug)]
pub(super) struct Circuit {
    window: Window,
    look_again: MonotonicInstant,
}

/// What is remembered of a request until its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passage {
    route: u32,
    /// The half-open phase that it probes for, where it does.
    probe: Option<MonotonicInstant>,
}

impl Passage {
    pub(super) fn route(self) -> usize {
        self.route as usize
    }

    pub(super) fn is_probe(self) -> bool {
        self.probe.is_some()
    }
}

/// What of the policy a circuit looks at.
#[derive(Clone, Copy)]
pub(super) struct Fuse<'p> {
    name: &'p str,
    pub breaker: &'p Breaker,
    pub meters: &'p BreakerMeters,
}

impl<'p> Fuse<'p> {
    pub fn new(route: &'p Route, meters: &'p RouteMeters) -> Option<Fuse<'p>> {
        let (breaker, meters) = (route.breaker.as_ref()?, meters.breaker.as_ref()?);
        Some(Fuse { name: &route.name, breaker, meters })
    }

    /// How the request may pass; or for how long it is refused, in nanoseconds.
    pub fn admit(&self, route: usize, host: &impl Host) -> Result<Passage, u64> {
        const CONTENDED: u64 = 1;
        let admitted = update(host, &self.breaker.word, |found| {
            let condition = found.and_then(Condition::decode).unwrap_or_default();
            match self.breaker.admit(condition, host.now()) {
                (pass, Some(changed)) => Change::Write(changed.encode(), (pass, Some((condition, changed)))),
                (pass, None) => Change::Keep((pass, None)),
            }
        });
        let (pass, change) = admitted.map_err(|_| CONTENDED)?;
        if let Some((was, is)) = change {
            self.tell(was, is, host);
        }
        let route = route as u32;
        match pass {
            Pass::Through => Ok(Passage { route, probe: None }),
            Pass::Probe(since) => Ok(Passage { route, probe: Some(since) }),
            Pass::Refused(wait) => {
                host.add(self.meters.refused, 1);
                Err(wait)
            }
        }
    }

    /// Shows the condition, and logs it where it is another phase.
    fn tell(&self, was: Condition, is: Condition, host: &impl Host) {
        if was.phase.number() == is.phase.number() {
            return;
        }
        host.set_gauge(self.meters.state, u64::from(is.phase.number()));
        let totals = self.meters.totals(host);
        log::warn!(
            "circuit breaker: route={:?} state={} was={} requests={} failures={}",
            self.name,
            is.phase.name(),
            was.phase.name(),
            totals.requests,
            totals.failures
        );
    }
}

impl Circuit {
    pub fn new(fuse: &Fuse<'_>, host: &impl Host) -> Circuit {
        let window = Window::new(fuse.breaker.window, host.now(), fuse.meters.totals(host));
        Circuit { window, look_again: MonotonicInstant::ZERO }
    }

    pub fn period(&self) -> u64 {
        self.window.step()
    }

    /// Learns from the answer to a request that passed.
    pub fn learn(&mut self, fuse: &Fuse<'_>, passage: Passage, failed: bool, host: &impl Host) {
        fuse.meters.count(failed, host);
        if !failed && !passage.is_probe() {
            return;
        }
        let (now, totals) = (host.now(), fuse.meters.totals(host));
        self.window.mark(now, || totals);
        let seen = (self.window.recent(now, totals), totals);
        let learned = update(host, &fuse.breaker.word, |found| {
            let condition = found.and_then(Condition::decode).unwrap_or_default();
            match fuse.breaker.learn(condition, passage.probe, failed, seen, now) {
                Some(changed) => Change::Write(changed.encode(), Some((condition, changed))),
                None => Change::Keep(None),
            }
        });
        if let Ok(Some((was, is))) = learned {
            fuse.tell(was, is, host);
        }
    }

    /// Lets the window move on, and shows what another worker may have shown too late.
    pub fn tick(&mut self, fuse: &Fuse<'_>, host: &impl Host) {
        let now = host.now();
        if now < self.look_again {
            return;
        }
        self.look_again = now.saturating_add(self.period());
        self.window.mark(now, || fuse.meters.totals(host));
        let known = host.get(&fuse.breaker.word).and_then(|(word, _)| Condition::decode(&word));
        let state = u64::from(known.map_or(Phase::Closed, |known| known.phase).number());
        if host.value(fuse.meters.state) != state {
            host.set_gauge(fuse.meters.state, state);
        }
    }
}
