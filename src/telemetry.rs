//! What an operator sees: the metrics.
//!
//! A name is a path of labelled parts, `trimtab.policy.<policy>.route.<route>.subset.<subset>.<what>`, so that a few
//! `stats_tags` expressions turn the parts into labels. All are defined when the policy is loaded; a request only adds.
//! What all workers have to see of each other at once, such as a target's failures, is counted here too: adding to a
//! metric is atomic and far cheaper than a shared word.

use crate::host::{MetricId, Metrics};
use crate::policy::{Policy, Route, label};
use crate::shared_data::SharedDataProblem;

/// The metrics of a policy.
#[derive(Debug)]
pub struct Meters {
    /// Requests that no route matched.
    pub unmatched: MetricId,
    /// In the order of the policy's routes.
    pub routes: Vec<RouteMeters>,
    state: StateMeters,
}

/// The metrics of one route.
#[derive(Debug)]
pub struct RouteMeters {
    /// In the order of the route's destinations; of a route without any, its own.
    pub destinations: Vec<DestinationMeters>,
}

/// The metrics of one destination of a route.
#[derive(Clone, Copy, Debug)]
pub struct DestinationMeters {
    /// Requests that the route has sent on or faulted.
    pub requests: MetricId,
}

/// The health of shared data.
#[derive(Clone, Copy, Debug)]
struct StateMeters {
    /// Words under our keys that were not ours.
    garbage: MetricId,
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
        Meters {
            unmatched: scope.counter("unmatched"),
            routes: policy.routes.iter().map(|route| RouteMeters::define(route, &scope)).collect(),
            state: StateMeters::define(&scope.within("state")),
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
}

impl StateMeters {
    fn define(state: &Scope<'_, impl Metrics>) -> StateMeters {
        StateMeters { garbage: state.counter("garbage"), contended: state.counter("contended") }
    }
}

impl RouteMeters {
    fn define(route: &Route, policy: &Scope<'_, impl Metrics>) -> RouteMeters {
        let scope = policy.within("route").within(&label(&route.name));
        let destination = |scope: &Scope<'_, _>| DestinationMeters { requests: scope.counter("requests") };
        let destinations = match &route.split {
            Some(split) => {
                let subsets = split.destinations.iter().map(|(subset, _)| label(subset.label()));
                subsets.map(|subset| destination(&scope.within("subset").within(&subset))).collect()
            }
            None => vec![destination(&scope)],
        };
        RouteMeters { destinations }
    }
}
