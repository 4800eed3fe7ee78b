//! Targets: what is observed of them, and where the experiments on them stand.

use super::Scope;
use crate::fault::{Fault, Phase, State};
use crate::host::{MetricId, Metrics};
use crate::outlier::Totals;
use crate::policy::{Target, label};

/// The metrics of one destination of a route.
#[derive(Clone, Debug)]
pub struct DestinationMeters {
    pub requests: MetricId,
    pub target: TargetMeters,
    /// Answers that were slower than the route's guard wants, where it asks for that.
    slow: Option<MetricId>,
    /// Where the route injects faults.
    guard: Option<GuardMeters>,
}

/// Where an experiment stands.
#[derive(Clone, Copy, Debug)]
struct GuardMeters {
    /// 0 armed, 1 suspended, 2 probing, 3 latched.
    state: MetricId,
    /// How often it was suspended.
    suspensions: MetricId,
    /// Until when at least, in milliseconds of the monotonic clock; 0 where it is not.
    suspended_until: MetricId,
}

/// What is observed of one target, from requests that were not faulted.
#[derive(Clone, Debug)]
pub struct TargetMeters {
    pub requests: MetricId,
    pub failures: MetricId,
    /// Requests for which there was no host, or no room.
    pub outages: MetricId,
    /// Answers that took longer than so many nanoseconds.
    pub slow: Vec<(u64, MetricId)>,
    /// The share of its hosts that are ejected, in parts per million, where anybody knows.
    pub ejected: Option<MetricId>,
}

impl DestinationMeters {
    pub(super) fn define(
        fault: Option<&Fault>,
        target: &TargetMeters,
        scope: &Scope<'_, impl Metrics>,
    ) -> DestinationMeters {
        let slow = |fault: &Fault| {
            let edge = fault.guard.latency_p95?;
            target.slow.iter().find(|(known, _)| *known == edge).map(|(_, metric)| *metric)
        };
        DestinationMeters {
            requests: scope.counter("requests"),
            slow: fault.and_then(slow),
            target: target.clone(),
            guard: fault.map(|_| GuardMeters::define(&scope.within("fault"))),
        }
    }

    /// What has been observed so far of the destination, all workers together, from whatever route.
    pub fn totals(&self, metrics: &impl Metrics) -> Totals {
        Totals {
            requests: metrics.value(self.target.requests),
            failures: metrics.value(self.target.failures),
            outages: metrics.value(self.target.outages),
            slow: self.slow.map_or(0, |slow| metrics.value(slow)),
        }
    }

    /// Shows where the experiment stands.
    pub fn show(&self, state: State, metrics: &impl Metrics) {
        const MILLISECOND: u64 = 1_000_000;
        let Some(guard) = &self.guard else { return };
        let until = match state.phase {
            Phase::Suspended(until) => until.as_nanos().div_ceil(MILLISECOND),
            _ => 0,
        };
        metrics.set_gauge(guard.suspended_until, until);
        metrics.set_gauge(guard.suspensions, u64::from(state.suspensions));
        metrics.set_gauge(guard.state, u64::from(state.phase.number()));
    }
}

impl GuardMeters {
    fn define(fault: &Scope<'_, impl Metrics>) -> GuardMeters {
        GuardMeters {
            state: fault.gauge("state"),
            suspensions: fault.gauge("suspensions"),
            suspended_until: fault.gauge("suspended_until_ms"),
        }
    }
}

impl TargetMeters {
    pub(super) fn define(target: &Target, policy: &Scope<'_, impl Metrics>) -> TargetMeters {
        let scope = policy.within("target").within(&label(&target.name));
        let slow = |edge: &u64| (*edge, scope.counter(&format!("slow_{}us", edge / 1_000)));
        TargetMeters {
            requests: scope.counter("requests"),
            failures: scope.counter("failures"),
            outages: scope.counter("outages"),
            ejected: target.knows_hosts().then(|| scope.gauge("ejected_ppm")),
            slow: target.edges.iter().map(slow).collect(),
        }
    }

    /// Counts an answer that was observed, and whether the nanoseconds that it took are too many for somebody.
    pub fn count(&self, failed: bool, is_outage: bool, took: u64, metrics: &impl Metrics) {
        metrics.add(self.requests, 1);
        if failed {
            metrics.add(self.failures, 1);
        }
        if is_outage {
            metrics.add(self.outages, 1);
        }
        for (edge, slow) in &self.slow {
            if took > *edge {
                metrics.add(*slow, 1);
            }
        }
    }
}
