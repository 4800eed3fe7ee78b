//! What an operator sees: the metrics.
//!
//! A name is a path of labelled parts, `trimtab.policy.<policy>.route.<route>.subset.<subset>.<what>`, so that a few
//! `stats_tags` expressions turn the parts into labels. All are defined when the policy is loaded; a request only adds.
//! What all workers have to see of each other at once, such as a target's failures, is counted here too: adding to a
//! metric is atomic and far cheaper than a shared word.

mod limit;
mod rollout;

use crate::canary::{Carried, Share, Term};
use crate::host::{MetricId, Metrics};
use crate::outlier::Totals;
use crate::policy::{Policy, Route, label};
use crate::shared_data::SharedDataProblem;
use limit::{LimitMeters, ServiceMeters};

pub use rollout::{JudgeMeters, RolloutMeters, Stand};

/// The metrics of a policy.
#[derive(Debug)]
pub struct Meters {
    /// Requests that no route matched.
    pub unmatched: MetricId,
    /// In the order of the policy's routes.
    pub routes: Vec<RouteMeters>,
    state: StateMeters,
    /// Where decisions are carried from hop to hop.
    cohort: Option<CohortMeters>,
}

/// The metrics of one route.
#[derive(Debug)]
pub struct RouteMeters {
    /// In the order of the route's destinations; of a route without any, its own.
    pub destinations: Vec<DestinationMeters>,
    /// Where a destination is on trial.
    pub rollout: Option<RolloutMeters>,
    /// Where the route has a circuit breaker.
    pub breaker: Option<BreakerMeters>,
    /// In the order of the route's limits.
    limits: Vec<LimitMeters>,
    /// In the order of the route's global limits.
    services: Vec<ServiceMeters>,
    state: StateMeters,
}

/// The metrics of one destination of a route.
#[derive(Clone, Copy, Debug)]
pub struct DestinationMeters {
    /// Requests that the route has sent on or faulted.
    pub requests: MetricId,
}

/// The circuit breaker of one route.
#[derive(Clone, Copy, Debug)]
pub struct BreakerMeters {
    /// 0 closed, 1 open, 2 half-open.
    pub state: MetricId,
    /// Requests that were answered in the target's place.
    pub refused: MetricId,
    /// Answers of the target.
    requests: MetricId,
    failures: MetricId,
}

/// The decisions of canaries that requests arrived with.
#[derive(Clone, Copy, Debug)]
struct CohortMeters {
    followed: MetricId,
    /// Of rollouts that the policy does not know.
    foreign: MetricId,
    malformed: MetricId,
    forged: MetricId,
    stale: MetricId,
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

/// Metrics whose names begin alike.
pub(crate) struct Scope<'m, M> {
    prefix: String,
    metrics: &'m M,
}

// Not inlined: a policy has metrics of a hundred kinds, and the module would pay for each.
impl<'m, M: Metrics> Scope<'m, M> {
    /// The scope of all metrics of a policy.
    pub(crate) fn policy(name: &str, metrics: &'m M) -> Scope<'m, M> {
        Scope { prefix: "trimtab.policy".into(), metrics }.within(name)
    }

    #[inline(never)]
    fn name(&self, name: &str) -> String {
        [&*self.prefix, ".", name].concat()
    }

    #[inline(never)]
    pub(crate) fn counter(&self, name: &str) -> MetricId {
        self.metrics.counter(&self.name(name))
    }

    #[inline(never)]
    pub(crate) fn gauge(&self, name: &str) -> MetricId {
        self.metrics.gauge(&self.name(name))
    }

    #[inline(never)]
    pub(crate) fn within(&self, name: &str) -> Self {
        Scope { prefix: self.name(name), metrics: self.metrics }
    }
}

impl Meters {
    /// Defines the metrics of `policy`.
    pub fn define(policy: &Policy, metrics: &impl Metrics) -> Meters {
        let scope = Scope::policy(&policy.name, metrics);
        let state = StateMeters::define(&scope.within("state"));
        Meters {
            unmatched: scope.counter("unmatched"),
            routes: policy.routes.iter().map(|route| RouteMeters::define(route, state, &scope)).collect(),
            state,
            cohort: policy.cohort.as_ref().map(|_| CohortMeters::define(&scope.within("cohort"))),
        }
    }

    /// Counts problems with shared data.
    pub fn count_problem(&self, problem: SharedDataProblem, count: u64, metrics: &impl Metrics) {
        let counter = match problem {
            SharedDataProblem::Garbage => self.state.garbage,
            SharedDataProblem::Contended => self.state.contended,
        };
        metrics.add(counter, count);
    }

    /// Counts the decisions that a request arrived with; `share` is what the canary of its route got.
    pub fn count_carried(&self, carried: &Carried, policy: &Policy, share: Option<Share>, metrics: &impl Metrics) {
        let Some(meters) = &self.cohort else { return };
        let is_followed = share.is_some_and(|share| share.term == Term::Carried);
        let is_foreign = |rollout: &&str| !policy.knows(rollout);
        for (metric, count) in [
            (meters.followed, u64::from(is_followed)),
            (meters.foreign, carried.rollouts().filter(is_foreign).count() as u64),
            (meters.malformed, carried.refused.malformed),
            (meters.forged, carried.refused.forged),
            (meters.stale, carried.refused.stale),
        ] {
            if count > 0 {
                metrics.add(metric, count);
            }
        }
    }
}

impl CohortMeters {
    fn define(cohort: &Scope<'_, impl Metrics>) -> CohortMeters {
        CohortMeters {
            followed: cohort.counter("followed"),
            foreign: cohort.counter("foreign"),
            malformed: cohort.counter("malformed"),
            forged: cohort.counter("forged"),
            stale: cohort.counter("stale"),
        }
    }
}

impl StateMeters {
    fn define(state: &Scope<'_, impl Metrics>) -> StateMeters {
        StateMeters {
            garbage: state.counter("garbage"),
            overflow: state.counter("overflow"),
            contended: state.counter("contended"),
        }
    }
}

impl RouteMeters {
    fn define(route: &Route, state: StateMeters, policy: &Scope<'_, impl Metrics>) -> RouteMeters {
        let scope = policy.within("route").within(&label(&route.name));
        let destination = |scope: &Scope<'_, _>| DestinationMeters { requests: scope.counter("requests") };
        let destinations = match &route.split {
            Some(split) => {
                let subsets = split.destinations.iter().map(|(subset, _)| label(subset.label()));
                subsets.map(|subset| destination(&scope.within("subset").within(&subset))).collect()
            }
            None => vec![destination(&scope)],
        };
        let on_trial = route.split.as_ref().and_then(|split| Some((split, split.canary.as_ref()?)));
        RouteMeters {
            destinations,
            rollout: on_trial.map(|(split, canary)| RolloutMeters::define(split, canary, &scope)),
            breaker: route.breaker.as_ref().map(|_| BreakerMeters::define(&scope.within("breaker"))),
            limits: route.limits.iter().map(|limit| LimitMeters::define(limit, &scope)).collect(),
            services: route.global_limits.iter().map(|limit| ServiceMeters::define(&limit.limit, &scope)).collect(),
            state,
        }
    }
}

impl BreakerMeters {
    fn define(breaker: &Scope<'_, impl Metrics>) -> BreakerMeters {
        BreakerMeters {
            state: breaker.gauge("state"),
            refused: breaker.counter("refused"),
            requests: breaker.counter("requests"),
            failures: breaker.counter("failures"),
        }
    }

    /// What was answered so far, all workers together.
    pub fn totals(&self, metrics: &impl Metrics) -> Totals {
        let (requests, failures) = (metrics.value(self.requests), metrics.value(self.failures));
        Totals { requests, failures, ..Totals::default() }
    }

    /// Counts an answer.
    pub fn count(&self, failed: bool, metrics: &impl Metrics) {
        metrics.add(self.requests, 1);
        if failed {
            metrics.add(self.failures, 1);
        }
    }
}
