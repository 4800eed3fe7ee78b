//! Global limits: an Envoy rate limit service keeps them for a whole fleet (`envoy.service.ratelimit.v3`), and one call
//! serves many requests.
//!
//! A request uses a prepaid hit (`prepaid`). If there is none, it waits for a call (`calls`) that charges some. All workers
//! of a proxy share the prepaid hits, and the fact that a key is over its limit.

mod calls;
mod codec;
mod config;
mod decision;
mod pending;
mod policy;
mod prepaid;

pub(super) use calls::ServiceCalls;
pub use calls::{CallOutcome, NextStep, ServiceFailure};
pub use codec::MAX_RESPONSE_BYTES;
pub(super) use config::read;
pub use decision::{GlobalCheck, GlobalRefusal, PrepaidHit, ServiceOutcome};
pub(super) use decision::{GlobalLimiter, ServiceEvent};
pub use pending::PendingStreams;
pub use policy::{GlobalLimit, OnFailure, RateLimitService};
