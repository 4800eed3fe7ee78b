//! Global limits: an Envoy rate limit service keeps them for a whole fleet (`envoy.service.ratelimit.v3`), and one call
//! serves many requests.
//!
//! A request spends a hit that was charged ahead (`quota`); where there is none, it waits for a call (`calls`) that asks
//! for some. All workers of a proxy share the hits ahead and the knowledge that a key is over its limit.

mod calls;
mod codec;
mod config;
mod decision;
mod pending;
mod policy;
mod quota;

pub use calls::{Calls, Failure, Place, Rest, Settled};
pub use codec::MAX_RESPONSE_BYTES;
pub(super) use config::read;
pub use decision::{Asker, Event, Inquiry, Outcome, Refusal, give_back};
pub use pending::PendingStreams;
pub use policy::{GlobalLimit, OnFailure, Service};
