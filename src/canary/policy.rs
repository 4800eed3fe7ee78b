//! A route's destinations, and how its traffic is split between them.

use super::judge::Judge;
use super::stages::Schedule;
use crate::key::KeySource;
use crate::units::Fraction;

/// Where a request can be sent: Istio's `Destination`, and what the steering header says for it.
#[derive(Debug)]
pub struct Destination {
    pub host: Box<str>,
    pub subset: Box<str>,
    /// The value of the steering header, its template filled in.
    pub steering: Box<str>,
}

impl Destination {
    /// The subset, or the host where there is none: what metrics and people call it.
    pub fn label(&self) -> &str {
        if self.subset.is_empty() { &self.host } else { &self.subset }
    }
}

/// How a chosen destination reaches the router.
#[derive(Debug)]
pub struct Steering {
    pub header: Box<str>,
    pub template: Box<str>,
}

/// The destinations of a route with their weights, which sum to the whole.
#[derive(Debug)]
pub struct Split {
    pub destinations: Vec<(Destination, Fraction)>,
    pub canary: Option<Canary>,
}

/// One destination on trial, with a cohort that sticks to it.
#[derive(Debug)]
pub struct Canary {
    /// Which of the split's destinations is on trial.
    pub destination: usize,
    /// The identity of the rollout, which salts the cohort.
    pub rollout: Box<str>,
    /// The first source that the request shows is its key; none, or no key: a draw for each request.
    pub key: Vec<KeySource>,
    /// What its weight is and when; none: the weight of the route.
    pub schedule: Option<Schedule>,
    /// How many requests may ever be sent to it.
    pub max_requests: Option<u64>,
    /// The shared word that counts them.
    pub exposed_word: Box<str>,
    pub judge: Option<Judge>,
    /// Stages, cap and judge decide and are counted, and the weight of the route stands.
    pub shadow: bool,
    /// What the keys of all shared words start with.
    pub state_prefix: Box<str>,
}

impl Canary {
    /// Whether others have to serve some of those whom the route's weight would send to the canary.
    pub(super) fn may_be_refused(&self) -> bool {
        self.schedule.is_some() || self.is_exclusive()
    }

    /// Whether what is shared between workers is kept under the rollout's name, which then stands for one route only.
    pub fn is_exclusive(&self) -> bool {
        self.max_requests.is_some() || self.judge.is_some()
    }

    /// The key of the shared word for `what`.
    pub fn word(&self, what: &str) -> String {
        format!("{}{what}/{}", self.state_prefix, self.rollout)
    }

    /// Every weight that requests may be sent to it by, each once; `route` is the weight of the route.
    pub fn weights(&self, route: Fraction) -> Vec<Fraction> {
        let mut weights: Vec<Fraction> = match &self.schedule {
            Some(schedule) if !self.shadow => schedule.stages.iter().map(|stage| stage.weight).collect(),
            _ => vec![route],
        };
        weights.dedup();
        weights.retain(|weight| *weight > Fraction::NONE);
        weights
    }
}
