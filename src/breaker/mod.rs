//! Circuit breaking: a route that fails too often is answered here for a while, and let through again when a few
//! requests have shown that it is well.
//!
//! The words are opossum's and Hystrix's. The state is one shared word of the route, so that all workers open at once and
//! half-open lets exactly the stated number of probes through, all workers together.

mod config;
mod decision;
mod policy;

pub use decision::{Condition, Pass, Phase};
pub use policy::Breaker;
