//! Circuit breaking: the requests of a route that fails too often are refused for a while, and pass again after a few
//! probes have succeeded.
//!
//! `config.rs` reads the `circuitBreaker` block, whose terms are those of Hystrix and opossum. `policy.rs` is what it is
//! compiled to. `state.rs` decides from plain values. `CircuitBreaker` is one route's breaker in one worker.

mod circuit_breaker;
mod config;
mod metrics;
mod policy;
mod state;

pub(crate) use circuit_breaker::{CircuitBreaker, Permit};
pub use policy::BreakerPolicy;
