//! Passive observation of upstream health, from the responses that this filter sees and has not faulted.
//!
//! - `TargetObserver` counts the responses of one target, and of its hosts if the policy has an `outlierDetection` block.
//! - [`Window`] reduces growing [`Totals`] to what happened in the last seconds. Guards and circuit breakers use it.
//! - `AdminPoller` polls Envoy's admin endpoint for the hosts that Envoy itself has ejected.
//!
//! Invariant: decisions read shared data. The metrics are output only.

mod admin;
mod config;
mod hosts;
mod metrics;
mod observer;
mod policy;
mod poller;
mod window;

pub use admin::MAX_ANSWER_BYTES;
pub use hosts::{EjectionStats, ResponseClass};
pub(crate) use observer::{ObservedResponse, TargetObserver};
pub use policy::{AdminEndpoint, IntervalCheck, OutlierDetection};
pub(crate) use poller::AdminPoller;
pub use window::{Totals, Window};

/// Whether Envoy answered a request itself because no host was available or too many requests were pending. `details` is
/// Envoy's attribute `response.code_details`.
fn is_outage(details: &[u8]) -> bool {
    [&b"no_healthy_upstream"[..], b"upstream_reset_before_response_started{overflow}"]
        .iter()
        .any(|outage| details.starts_with(outage))
}

/// Whether a response is a failure of the upstream, as Envoy's outlier detection defines it: a 5xx, or a gRPC status that
/// maps to a 5xx (gRPC over HTTP/2, "Mapping to HTTP status": UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL,
/// UNAVAILABLE, DATA_LOSS).
pub fn is_failure(http_status: u16, grpc_status: Option<u16>) -> bool {
    http_status >= 500 || matches!(grpc_status, Some(2 | 4 | 12 | 13 | 14 | 15))
}
