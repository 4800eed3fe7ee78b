//! Envoy as a [`Host`].

use super::abi::{self, Clock};
use crate::host::metric_buffer::MetricBuffer;
use crate::host::{
    CallId, Conflict, GrpcCall, GrpcClient, Host, HttpClient, MetricId, Metrics, Properties, SharedData, Version,
};
use crate::http::encode_headers;
use crate::random::split_mix;
use crate::shared_data::SharedDataProblem;
use crate::units::{MonotonicInstant, UnixNanos};
use hashbrown::HashMap;
use proxy_wasm::types::MetricType;
use std::cell::{Cell, RefCell};
use std::time::Duration;
use xxhash_rust::xxh64::xxh64;

/// Envoy, as one configuration in one worker thread sees it.
#[derive(Debug)]
pub(super) struct Envoy {
    /// The state of the generator, whose seed is the host's randomness.
    random: Cell<u64>,
    metrics: MetricBuffer,
    garbage: Cell<u64>,
    contended: Cell<u64>,
}

impl Default for Envoy {
    fn default() -> Self {
        let mut seed = [0; 8];
        abi::random(&mut seed);
        let random = Cell::new(u64::from_le_bytes(seed));
        Envoy { random, metrics: MetricBuffer::default(), garbage: Cell::new(0), contended: Cell::new(0) }
    }
}

impl SharedData for Envoy {
    fn get(&self, key: &str) -> Option<(Vec<u8>, Version)> {
        abi::shared_data(key).map(|(value, version)| (value, Version(version)))
    }

    fn set(&self, key: &str, value: &[u8], expected: Version) -> Result<(), Conflict> {
        if abi::set_shared_data(key, value, expected.0) { Ok(()) } else { Err(Conflict) }
    }

    fn overwrite(&self, key: &str, value: &[u8]) {
        abi::set_shared_data(key, value, 0);
    }

    fn report(&self, problem: SharedDataProblem) {
        let counted = match problem {
            SharedDataProblem::Garbage => &self.garbage,
            SharedDataProblem::Contended => &self.contended,
        };
        counted.set(counted.get().saturating_add(1));
    }
}

/// The id of a gauge is Envoy's, the id of a counter is a place in the buffer.
impl Metrics for Envoy {
    fn counter(&self, name: &str) -> MetricId {
        self.metrics.define(define(MetricType::Counter, name))
    }

    fn gauge(&self, name: &str) -> MetricId {
        MetricId(define(MetricType::Gauge, name))
    }

    fn add(&self, metric: MetricId, amount: u64) {
        self.metrics.add(metric, amount);
    }

    fn set_gauge(&self, metric: MetricId, value: u64) {
        abi::record_metric(metric.0, value);
    }
}

thread_local! {
    /// Envoy's ids of the metrics that were defined in this virtual machine, by the hash of their names. Envoy makes a
    /// new id, which it never frees, each time that a metric is defined.
    static METRICS: RefCell<HashMap<u64, u32>> = RefCell::default();
}

fn define(kind: MetricType, name: &str) -> u32 {
    let hash = xxh64(name.as_bytes(), kind as u64);
    if let Some(known) = METRICS.with_borrow(|metrics| metrics.get(&hash).copied()) {
        return known;
    }
    let Some(id) = abi::define_metric(kind, name) else { return u32::MAX };
    METRICS.with_borrow_mut(|metrics| metrics.insert(hash, id));
    id
}

impl Properties for Envoy {
    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        abi::property(&path.join("\0"))
    }

    fn set_property(&self, name: &str, value: &[u8]) {
        abi::set_property(name, value);
    }
}

impl GrpcClient for Envoy {
    fn call(&self, call: &GrpcCall<'_>) -> Option<CallId> {
        let GrpcCall { cluster, service, method, message, timeout } = *call;
        let metadata = encode_headers::<&str, &str>(&[]);
        abi::grpc_call(cluster, (service, method), &metadata, message, timeout).map(CallId)
    }
}

impl HttpClient for Envoy {
    /// Through the SDK, because it passes on only the answers to calls that it has made itself. It panics on no status that
    /// Envoy returns here.
    fn http_get(&self, cluster: &str, path: &str, timeout: u64) -> Option<u32> {
        let headers = vec![(":method", "GET"), (":path", path), (":authority", "trimtab")];
        let timeout = Duration::from_nanos(timeout);
        proxy_wasm::hostcalls::dispatch_http_call(cluster, headers, None, Vec::new(), timeout).ok()
    }
}

impl Host for Envoy {
    fn now(&self) -> MonotonicInstant {
        MonotonicInstant::from_nanos(abi::clock_time(Clock::Monotonic))
    }

    fn wall_now(&self) -> UnixNanos {
        UnixNanos::from_nanos(abi::clock_time(Clock::Realtime))
    }

    fn random(&self) -> u64 {
        let mut state = self.random.get();
        let drawn = split_mix(&mut state);
        self.random.set(state);
        drawn
    }

    fn secret_bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        abi::random(&mut bytes);
        bytes
    }

    fn has_unpublished(&self) -> bool {
        !self.metrics.is_empty() || self.garbage.get() > 0 || self.contended.get() > 0
    }

    fn publish(&self) {
        self.metrics.publish(abi::increment_metric);
    }

    fn take_problems(&self) -> Vec<(SharedDataProblem, u64)> {
        let problems = [(SharedDataProblem::Garbage, &self.garbage), (SharedDataProblem::Contended, &self.contended)];
        problems.into_iter().map(|(problem, count)| (problem, count.take())).filter(|(_, count)| *count > 0).collect()
    }
}
