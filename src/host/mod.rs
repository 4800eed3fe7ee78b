//! What the core needs from its surroundings, and the hosts that there are.
//!
//! A [`Host`] provides time, randomness, shared data, metrics, request properties and calls to other services. Envoy
//! (`proxy_wasm.rs`, wasm32 only) and the simulation ([`sim`]) implement it, so Envoy, the tests and the command-line
//! program run the same decisions.

pub mod metric_buffer;
#[cfg(target_arch = "wasm32")]
mod proxy_wasm;
pub mod sim;

use crate::shared_data::SharedDataProblem;
use crate::units::{MonotonicInstant, UnixNanos};

/// Values that all workers of a proxy share, by key, with compare-and-swap. Nothing can be deleted, so the number of keys
/// has to be bounded. [`crate::shared_data::SharedCell`] is the way to use it.
pub trait SharedData {
    /// The value under `key` and its version.
    fn get(&self, key: &str) -> Option<(Vec<u8>, Version)>;

    /// Writes `value` if the version under `key` is still `expected`; with [`Version::ABSENT`], if there is no value.
    ///
    /// # Errors
    /// [`Conflict`] if another worker was faster; nothing was written.
    fn set(&self, key: &str, value: &[u8], expected: Version) -> Result<(), Conflict>;

    /// Writes `value`, whatever was there.
    fn overwrite(&self, key: &str, value: &[u8]);

    /// Notes a problem, to be counted.
    fn report(&self, problem: SharedDataProblem);
}

/// The version of a shared value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version(pub u32);

impl Version {
    /// The version of a key that has no value yet. Envoy accepts any version but 0 for such a key, and never counts up to
    /// this one.
    pub const ABSENT: Version = Version(u32::MAX);
}

/// A compare-and-swap that lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict;

/// A counter or gauge of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricId(pub u32);

/// Metrics of the proxy: output only, no decision reads them.
pub trait Metrics {
    /// The counter `name`, new or known.
    fn counter(&self, name: &str) -> MetricId;
    /// The gauge `name`, new or known.
    fn gauge(&self, name: &str) -> MetricId;
    /// Adds to a counter.
    fn add(&self, metric: MetricId, amount: u64);
    /// Sets a gauge.
    fn set_gauge(&self, metric: MetricId, value: u64);
}

/// What the proxy knows of a request besides its headers.
pub trait Properties {
    /// The value at `path` (Envoy's attributes, such as `xds.route_name`), if there is one.
    fn property(&self, path: &[&str]) -> Option<Vec<u8>>;

    /// Sets a property of the request, which later filters read under `name`. In Envoy's access logs it is the filter
    /// state `wasm.NAME`.
    fn set_property(&self, name: &str, value: &[u8]);
}

/// A unary gRPC call to a service behind one of the proxy's clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpcCall<'c> {
    pub cluster: &'c str,
    /// The service's full name.
    pub service: &'c str,
    pub method: &'c str,
    pub message: &'c [u8],
    /// Milliseconds that the answer may take.
    pub timeout: u32,
}

/// A call under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(pub u32);

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpcAnswer<'m> {
    pub call: CallId,
    /// gRPC's; 0 is success.
    pub status: u32,
    /// With another status than 0, the text that goes with it.
    pub message: &'m [u8],
}

/// gRPC calls to other services. The answer, or that there is none, comes later, and exactly once.
pub trait GrpcClient {
    /// Sends a call. `None` where the proxy cannot, because it does not know the cluster.
    fn call(&self, call: &GrpcCall<'_>) -> Option<CallId>;
}

/// HTTP calls to other services, through the proxy.
pub trait HttpClient {
    /// Sends a GET for `path` to `cluster`, to be given up after `timeout` nanoseconds. The answer comes later, with the
    /// number that is returned here. `None` where it cannot be sent, such as to an unknown cluster.
    fn http_get(&self, cluster: &str, path: &str, timeout: u64) -> Option<u32>;
}

/// Everything together.
pub trait Host: SharedData + Metrics + Properties + HttpClient + GrpcClient {
    /// The monotonic clock, one timeline for all workers of the process.
    fn now(&self) -> MonotonicInstant;
    /// The wall clock, for what proxies have to agree on.
    fn wall_now(&self) -> UnixNanos;
    /// A uniformly distributed number.
    fn random(&self) -> u64;
    /// 16 bytes from the system's random source, for a secret. They must not come from the generator of [`Host::random`],
    /// whose numbers are published as span ids.
    fn secret_bytes(&self) -> [u8; 16];
    /// Whether [`Host::publish`] would publish something, or [`Host::take_problems`] would return something.
    fn has_unpublished(&self) -> bool;
    /// Publishes what was added to metrics since the last time.
    fn publish(&self);
    /// How often each problem with shared data was reported since the last time.
    fn take_problems(&self) -> Vec<(SharedDataProblem, u64)>;
}
