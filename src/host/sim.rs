//! A host without a proxy: a clock that stands still until it is moved, a seeded random source, words and metrics in
//! memory. Tests and the command-line program run the filter on it.

use super::{
    CallId, Conflict, GrpcCall, GrpcClient, Host, HttpClient, MetricId, Metrics, Properties, SharedData, Version,
};
use crate::shared_data::SharedDataProblem;
use crate::units::{MonotonicInstant, UnixNanos};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// The simulated host. Every method takes `&self`, as a host call would.
#[derive(Debug)]
pub struct Sim {
    now: Cell<MonotonicInstant>,
    wall: Cell<UnixNanos>,
    seed: Cell<u64>,
    version: Cell<u32>,
    words: RefCell<BTreeMap<String, (Vec<u8>, Version)>>,
    metrics: RefCell<Vec<(String, u64)>>,
    properties: RefCell<BTreeMap<String, Vec<u8>>>,
    clusters: RefCell<Vec<String>>,
    calls: RefCell<Vec<HttpCall>>,
    grpc_calls: RefCell<Vec<SentCall>>,
    next_call: Cell<u32>,
    problems: RefCell<Vec<SharedDataProblem>>,
    reads: Cell<u64>,
}

/// A gRPC call that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentCall {
    pub id: CallId,
    pub cluster: String,
    /// Service and method, as in the path of the request.
    pub path: String,
    pub message: Vec<u8>,
    /// In milliseconds.
    pub timeout: u32,
}

/// An HTTP call that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpCall {
    pub number: u32,
    pub cluster: String,
    pub path: String,
}

impl Sim {
    pub fn new(seed: u64) -> Sim {
        Sim {
            now: Cell::new(MonotonicInstant::from_nanos(1_000_000_000_000)),
            wall: Cell::new(UnixNanos::from_nanos(1_735_689_600_000_000_000)),
            seed: Cell::new(seed),
            version: Cell::new(0),
            words: RefCell::default(),
            metrics: RefCell::default(),
            properties: RefCell::default(),
            clusters: RefCell::default(),
            calls: RefCell::default(),
            grpc_calls: RefCell::default(),
            next_call: Cell::new(1),
            problems: RefCell::default(),
            reads: Cell::new(0),
        }
    }

    /// Moves both clocks forward.
    pub fn advance(&self, by: std::time::Duration) {
        self.now.set(self.now.get().saturating_add(crate::units::nanoseconds(by)));
        self.wall.set(self.wall.get().saturating_add(crate::units::nanoseconds(by)));
    }

    /// Sets the wall clock, as an operator might.
    pub fn set_wall(&self, to: UnixNanos) {
        self.wall.set(to);
    }

    /// What [`Properties::property`] answers from now on for `path`, its segments joined by dots.
    pub fn set_property(&self, path: &str, value: &[u8]) {
        self.properties.borrow_mut().insert(path.to_owned(), value.to_vec());
    }

    /// Makes a cluster known: others cannot be called.
    pub fn add_cluster(&self, name: &str) {
        self.clusters.borrow_mut().push(name.to_owned());
    }

    /// The HTTP calls since the last time.
    pub fn take_calls(&self) -> Vec<HttpCall> {
        self.calls.take()
    }

    /// The gRPC calls since the last time.
    pub fn take_grpc_calls(&self) -> Vec<SentCall> {
        self.grpc_calls.take()
    }

    /// The value of the metric `name`; 0 where there is none.
    pub fn metric(&self, name: &str) -> u64 {
        self.metrics.borrow().iter().find(|(known, _)| known == name).map_or(0, |(_, value)| *value)
    }

    /// The names and values of all metrics that are not 0, in the order defined.
    pub fn metrics(&self) -> Vec<(String, u64)> {
        self.metrics.borrow().iter().filter(|(_, value)| *value != 0).cloned().collect()
    }

    /// The problems with shared data that were reported and not taken yet.
    pub fn problems(&self) -> Vec<SharedDataProblem> {
        self.problems.borrow().clone()
    }

    /// How often shared data was read.
    pub fn reads(&self) -> u64 {
        self.reads.get()
    }

    /// How many writes of shared words have succeeded.
    pub fn writes(&self) -> u64 {
        u64::from(self.version.get())
    }

    /// The bytes of all shared words, their keys included.
    pub fn bytes(&self) -> usize {
        self.words.borrow().iter().map(|(key, (value, _))| key.len() + value.len()).sum()
    }

    /// The keys of all shared words.
    pub fn keys(&self) -> Vec<String> {
        self.words.borrow().keys().cloned().collect()
    }

    fn define(&self, name: &str) -> MetricId {
        let mut metrics = self.metrics.borrow_mut();
        let place = metrics.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            metrics.push((name.to_owned(), 0));
            metrics.len() - 1
        });
        MetricId(place as u32)
    }
}

impl SharedData for Sim {
    fn get(&self, key: &str) -> Option<(Vec<u8>, Version)> {
        self.reads.set(self.reads.get() + 1);
        self.words.borrow().get(key).cloned()
    }

    fn set(&self, key: &str, value: &[u8], expected: Version) -> Result<(), Conflict> {
        let words = self.words.borrow();
        let found = words.get(key).map_or(Version::ABSENT, |(_, version)| *version);
        if found != expected {
            return Err(Conflict);
        }
        drop(words);
        self.overwrite(key, value);
        Ok(())
    }

    fn overwrite(&self, key: &str, value: &[u8]) {
        self.version.set(self.version.get() + 1);
        self.words.borrow_mut().insert(key.to_owned(), (value.to_vec(), Version(self.version.get())));
    }

    fn report(&self, problem: SharedDataProblem) {
        self.problems.borrow_mut().push(problem);
    }
}

impl Metrics for Sim {
    fn counter(&self, name: &str) -> MetricId {
        self.define(name)
    }

    fn gauge(&self, name: &str) -> MetricId {
        self.define(name)
    }

    fn add(&self, metric: MetricId, amount: u64) {
        if let Some((_, value)) = self.metrics.borrow_mut().get_mut(metric.0 as usize) {
            *value += amount;
        }
    }

    fn set_gauge(&self, metric: MetricId, to: u64) {
        if let Some((_, value)) = self.metrics.borrow_mut().get_mut(metric.0 as usize) {
            *value = to;
        }
    }
}

impl Properties for Sim {
    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        self.properties.borrow().get(&path.join(".")).cloned()
    }

    fn set_property(&self, name: &str, value: &[u8]) {
        Sim::set_property(self, name, value);
    }
}

impl GrpcClient for Sim {
    fn call(&self, call: &GrpcCall<'_>) -> Option<CallId> {
        if !self.clusters.borrow().iter().any(|cluster| cluster == call.cluster) {
            return None;
        }
        let id = CallId(self.next_call.get());
        self.next_call.set(id.0 + 1);
        self.grpc_calls.borrow_mut().push(SentCall {
            id,
            cluster: call.cluster.to_owned(),
            path: format!("/{}/{}", call.service, call.method),
            message: call.message.to_vec(),
            timeout: call.timeout,
        });
        Some(id)
    }
}

impl HttpClient for Sim {
    fn http_get(&self, cluster: &str, path: &str, _: u64) -> Option<u32> {
        if !self.clusters.borrow().iter().any(|known| known == cluster) {
            return None;
        }
        let number = self.random() as u32;
        self.calls.borrow_mut().push(HttpCall { number, cluster: cluster.to_owned(), path: path.to_owned() });
        Some(number)
    }
}

impl Host for Sim {
    fn now(&self) -> MonotonicInstant {
        self.now.get()
    }

    fn wall_now(&self) -> UnixNanos {
        self.wall.get()
    }

    fn random(&self) -> u64 {
        let mut state = self.seed.get();
        let drawn = crate::random::split_mix(&mut state);
        self.seed.set(state);
        drawn
    }

    /// From the seeded generator, so that a simulation can be repeated.
    fn secret_bytes(&self) -> [u8; 16] {
        (u128::from(self.random()) | u128::from(self.random()) << 64).to_le_bytes()
    }

    /// Metrics are written at once.
    fn has_unpublished(&self) -> bool {
        false
    }

    fn publish(&self) {}

    fn take_problems(&self) -> Vec<(SharedDataProblem, u64)> {
        self.problems.take().into_iter().map(|problem| (problem, 1)).collect()
    }
}
