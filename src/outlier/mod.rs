//! What is known of an upstream's health from the answers it gives: passive outlier observation.
//!
//! Requests and failures are counted in the host's metrics, which all workers share; a [`Window`] turns those growing
//! totals into what happened lately. Where an `outlierDetection` block asks for it, answers are also told apart by the
//! host that gave them.

mod admin;
mod config;
mod hosts;
mod policy;
mod window;

pub use admin::{Clusters, MAX_ANSWER_BYTES, Sighting, path};
pub use hosts::{Answer, Health, MOST_HOSTS, Noted, health, note};
pub use policy::{Detection, Sweep};
pub use window::{Totals, Window};

/// Whether Envoy gave the answer itself because there was no host to ask, or too many requests waited already: what it
/// says in `response.code_details`.
pub fn is_outage(details: &[u8]) -> bool {
    [&b"no_healthy_upstream"[..], b"upstream_reset_before_response_started{overflow}"]
        .iter()
        .any(|outage| details.starts_with(outage))
}

/// What an answer says of the host that gave it; `is_local` where the host gave none and the proxy answered for it.
pub fn answer(http_status: u16, grpc_status: Option<u16>, is_local: bool) -> Answer {
    if !is_failure(http_status, grpc_status) {
        Answer::Success
    } else if is_local {
        Answer::LocalFailure
    } else {
        // UNAVAILABLE and DEADLINE_EXCEEDED map to 503 and 504.
        Answer::Error { gateway: matches!(http_status, 502..=504) || matches!(grpc_status, Some(4 | 14)) }
    }
}

/// Whether an answer is a failure of the upstream, as Envoy's outlier detection sees it: a 5xx, or a gRPC status that
/// maps to one (gRPC over HTTP/2, "Mapping to HTTP status": UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL,
/// UNAVAILABLE, DATA_LOSS).
pub fn is_failure(http_status: u16, grpc_status: Option<u16>) -> bool {
    http_status >= 500 || matches!(grpc_status, Some(2 | 4 | 12 | 13 | 14 | 15))
}
