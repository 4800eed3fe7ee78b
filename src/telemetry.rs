//! What an operator sees: the metrics.
//!
//! A name is a path of labelled parts, `trimtab.policy.<policy>.route.<route>.subset.<subset>.<what>`, so that a few
//! `stats_tags` expressions turn the parts into labels. All are defined when the policy is loaded; a request only adds.
//! What all workers have to see of each other at once, such as a target's failures, is counted here too: adding to a
//! metric is atomic and far cheaper than a shared word.

use crate::canary::{Canary, Share, Term};
use crate::fault::{Injection, Withheld};
use crate::host::{MetricId, Metrics};
use crate::outlier::Totals;
use crate::policy::{Policy, Route, label};
use crate::ratelimit::Admission;
use crate::trace::Arrived;

/// The metrics of a policy.
#[derive(Debug)]
pub struct Meters {
    /// Requests that no route matched.
    pub unmatched: MetricId,
    /// In the order of the policy's routes.
    pub routes: Vec<RouteMeters>,
    /// In the order of the policy's targets.
    pub targets: Vec<TargetMeters>,
    pub trace: TraceMeters,
}

/// The metrics of one route.
#[derive(Debug)]
pub struct RouteMeters {
    /// In the order of the route's destinations; of a route without any, its own.
    pub destinations: Vec<DestinationMeters>,
    /// Where a destination is on trial.
    pub rollout: Option<RolloutMeters>,
    /// Where the route injects faults.
    pub faults: Option<FaultMeters>,
    /// In the order of the route's limits: the requests refused, or in shadow those that would have been.
    refused: Vec<MetricId>,
    state: StateMeters,
}

/// The metrics of one destination of a route.
#[derive(Clone, Copy, Debug)]
pub struct DestinationMeters {
    pub requests: MetricId,
    pub target: TargetMeters,
    /// Until when injection is suspended, in milliseconds of the monotonic clock; 0 where it is not. All workers share
    /// it, so a suspension that one of them begins holds for all.
    pub suspended_until: MetricId,
}

/// The state of one rollout. All workers share it.
#[derive(Clone, Debug)]
pub struct RolloutMeters {
    rollout: Box<str>,
    stages: usize,
    /// The canary's weight in force, in parts per million.
    weight: MetricId,
    /// Requests that went to the others because the cap on exposure was reached.
    capped: MetricId,
}

/// What is observed of one target, from requests that were not faulted.
#[derive(Clone, Copy, Debug)]
pub struct TargetMeters {
    pub requests: MetricId,
    pub failures: MetricId,
}

/// The faults of one route, and why there were none.
#[derive(Clone, Copy, Debug)]
pub struct FaultMeters {
    delays: MetricId,
    aborts: MetricId,
    suspended: MetricId,
    shadow: MetricId,
    overflow: MetricId,
}

/// What requests arrived with.
#[derive(Clone, Copy, Debug)]
pub struct TraceMeters {
    valid: MetricId,
    missing: MetricId,
    invalid: MetricId,
}

/// The health of shared data.
#[derive(Clone, Copy, Debug)]
struct StateMeters {
    /// Words under our keys that were not ours.
    garbage: MetricId,
    /// Limit keys that shared their full bucket's overflow time.
    overflow: MetricId,
    /// Requests refused because a compare-and-swap was given up.
    contended: MetricId,
}

impl Meters {
    /// Defines the metrics of `policy`.
    pub fn define(policy: &Policy, metrics: &impl Metrics) -> Meters {
        let prefix = format!("trimtab.policy.{}", policy.name);
        let counter = |name: &str| metrics.counter(&format!("{prefix}.{name}"));
        let targets: Vec<TargetMeters> = policy
            .targets
            .iter()
            .map(|target| {
                let target = label(&target.name);
                TargetMeters {
                    requests: counter(&format!("target.{target}.requests")),
                    failures: counter(&format!("target.{target}.failures")),
                }
            })
            .collect();
        let state = StateMeters {
            garbage: counter("state.garbage"),
            overflow: counter("state.overflow"),
            contended: counter("state.contended"),
        };
        let routes = policy.routes.iter();
        Meters {
            unmatched: counter("unmatched"),
            routes: routes.map(|route| RouteMeters::define(&prefix, route, &targets, state, metrics)).collect(),
            targets,
            trace: TraceMeters {
                valid: counter("trace.valid"),
                missing: counter("trace.missing"),
                invalid: counter("trace.invalid"),
            },
        }
    }
}

impl RouteMeters {
    fn define(
        policy: &str,
        route: &Route,
        targets: &[TargetMeters],
        state: StateMeters,
        metrics: &impl Metrics,
    ) -> RouteMeters {
        let prefix = format!("{policy}.route.{}", label(&route.name));
        let counter = |name: &str| metrics.counter(&format!("{prefix}.{name}"));
        let subsets: Vec<String> = match &route.split {
            Some(split) => split
                .destinations
                .iter()
                .map(|(destination, _)| format!("subset.{}.", label(destination.label())))
                .collect(),
            None => vec![String::new()],
        };
        let targets = route.targets.iter().filter_map(|target| targets.get(target.0));
        RouteMeters {
            destinations: subsets
                .iter()
                .zip(targets)
                .map(|(subset, target)| DestinationMeters {
                    requests: counter(&format!("{subset}requests")),
                    target: *target,
                    suspended_until: metrics.gauge(&format!("{prefix}.{subset}fault.suspended_until_ms")),
                })
                .collect(),
            rollout: route
                .split
                .as_ref()
                .and_then(|split| split.canary.as_ref())
                .map(|canary| RolloutMeters::define(&prefix, canary, metrics)),
            faults: route.fault.as_ref().map(|_| FaultMeters {
                delays: counter("fault.delays"),
                aborts: counter("fault.aborts"),
                suspended: counter("fault.suspended"),
                shadow: counter("fault.shadow"),
                overflow: counter("fault.overflow"),
            }),
            refused: route.limits.iter().map(|limit| counter(&format!("limit.{}.refused", limit.name))).collect(),
            state,
        }
    }

    /// Counts what the limits said of a request.
    pub fn count_admission(&self, admission: &Admission, metrics: &impl Metrics) {
        let refused = admission.refused.iter().map(|(limit, _)| limit).chain(&admission.would_refuse);
        for metric in refused.filter_map(|limit| self.refused.get(*limit)) {
            metrics.add(*metric, 1);
        }
        for (metric, count) in [
            (self.state.garbage, admission.garbage),
            (self.state.overflow, admission.overflows),
            (self.state.contended, u64::from(admission.contended)),
        ] {
            if count > 0 {
                metrics.add(metric, count);
            }
        }
    }
}

impl RolloutMeters {
    fn define(route: &str, canary: &Canary, metrics: &impl Metrics) -> RolloutMeters {
        let prefix = format!("{route}.rollout.{}", canary.label());
        RolloutMeters {
            rollout: canary.rollout.clone(),
            stages: canary.schedule.as_ref().map_or(0, |schedule| schedule.stages.len()),
            weight: metrics.gauge(&format!("{prefix}.weight_ppm")),
            capped: metrics.counter(&format!("{prefix}.capped")),
        }
    }

    /// Shows the share in force, and logs it where no other worker has done so.
    pub fn tell(&self, share: Share, route: &str, metrics: &impl Metrics) {
        let weight = u64::from(share.weight.ppm());
        if metrics.value(self.weight) == weight {
            return;
        }
        metrics.set_gauge(self.weight, weight);
        if let Term::Stage(stage) = share.term {
            log::info!(
                "canary stage: route={route} rollout={:?} stage={} of={} weight={}",
                self.rollout,
                stage + 1,
                self.stages,
                share.weight
            );
        }
    }
}

impl RolloutMeters {
    /// Counts a request that the cap on exposure kept from the canary; the first one is logged.
    pub fn count_capped(&self, most: u64, route: &str, metrics: &impl Metrics) {
        if metrics.value(self.capped) == 0 {
            log::info!("canary capped: route={route} rollout={:?} requests={most}", self.rollout);
        }
        metrics.add(self.capped, 1);
    }
}

impl FaultMeters {
    /// Counts what was injected, or why it was withheld.
    pub fn count(&self, drawn: &Injection, withheld: Option<Withheld>, metrics: &impl Metrics) {
        match withheld {
            Some(Withheld::Suspended) => metrics.add(self.suspended, 1),
            Some(Withheld::Shadow) => metrics.add(self.shadow, 1),
            Some(Withheld::Overflow) => metrics.add(self.overflow, 1),
            None => {
                if drawn.delay.is_some() {
                    metrics.add(self.delays, 1);
                }
                if drawn.abort.is_some() {
                    metrics.add(self.aborts, 1);
                }
            }
        }
    }
}

impl TargetMeters {
    /// What has been observed so far, all workers together.
    pub fn totals(&self, metrics: &impl Metrics) -> Totals {
        Totals { requests: metrics.value(self.requests), failures: metrics.value(self.failures) }
    }
}

impl TraceMeters {
    /// The counter of what a request arrived with.
    pub fn of(&self, arrived: Arrived) -> MetricId {
        match arrived {
            Arrived::Valid => self.valid,
            Arrived::Missing => self.missing,
            Arrived::Invalid(_) => self.invalid,
        }
    }
}
