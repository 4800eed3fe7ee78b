//! The destinations of a route, and how its traffic is split between them: the compiled form of `route` and `canary`.

use super::judge::Judge;
use super::stages::Schedule;
use crate::key::KeySource;
use crate::units::Fraction;
use std::sync::Arc;

/// Where a request can be sent: the `Destination` of Istio's VirtualService, and the steering header's value for it.
#[derive(Debug)]
pub struct Destination {
    pub host: Box<str>,
    /// Empty if the destination has no subset.
    pub subset: Box<str>,
    /// The value of the steering header, after its template was filled in.
    pub steering: Box<str>,
}

impl Destination {
    /// The name of the destination in metrics and in messages: the subset, or the host if there is no subset.
    pub fn label(&self) -> &str {
        if self.subset.is_empty() { &self.host } else { &self.subset }
    }
}

/// The steering header, which names the chosen destination to the proxy's router.
#[derive(Debug)]
pub struct Steering {
    pub header: Box<str>,
    pub template: Box<str>,
}

/// The destinations of a route with their weights, which sum to the whole.
#[derive(Debug)]
pub struct Split {
    pub destinations: Vec<(Destination, Fraction)>,
    pub canary: Option<Arc<Canary>>,
}

/// The `canary` block: one destination that is tried on a cohort of users.
#[derive(Debug)]
pub struct Canary {
    /// An index into the split's destinations.
    pub destination: usize,
    /// The name of the rollout, which salts the cohort.
    pub rollout: Box<str>,
    /// The sources of the cohort's key; the first one that the request has is used. A request without a key is drawn at
    /// random.
    pub key: Vec<KeySource>,
    /// The stages; `None` if the canary has the weight of the route.
    pub schedule: Option<Schedule>,
    /// How many requests the rollout may ever send to the canary.
    pub max_requests: Option<u64>,
    pub judge: Option<Judge>,
    /// Whether stages, cap and judge only count what they would do. Requests are then split by the weights of the route.
    pub shadow: bool,
}

impl Canary {
    /// Whether other destinations may have to serve requests that the weight of the route gives to the canary.
    pub(super) fn may_be_refused(&self) -> bool {
        self.schedule.is_some() || self.is_exclusive()
    }

    /// Whether only one route may have this rollout, because its cap and its verdict are kept under its name.
    pub fn is_exclusive(&self) -> bool {
        self.max_requests.is_some() || self.judge.is_some()
    }

    /// The weights that the canary may have in the course of the rollout, each once; `route` is the weight of the route.
    pub(super) fn weights(&self, route: Fraction) -> Vec<Fraction> {
        let Some(schedule) = self.schedule.as_ref().filter(|_| !self.shadow) else {
            return if route > Fraction::NONE { vec![route] } else { Vec::new() };
        };
        let mut weights = Vec::new();
        for stage in &schedule.stages {
            if stage.weight > Fraction::NONE && weights.last() != Some(&stage.weight) {
                weights.push(stage.weight);
            }
        }
        weights
    }
}
