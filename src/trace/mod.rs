//! Trace-header propagation: a valid context goes on with a new parent, in every format that the policy names; anything
//! else starts a new trace; and what an application forgot to copy is given back.
//!
//! A format is read and written in a file of its own (`formats`); [`w3c`] holds the context that all of them are
//! translated to. `tracestate` and `baggage` are lists with rules of their own. `bridge` remembers what arrived
//! for what leaves; `filter_state` leaves what was decided for those who come later.

mod baggage;
mod bridge;
mod config;
#[cfg(test)]
mod conformance;
mod decision;
mod events;
mod filter_state;
mod formats;
#[cfg(test)]
mod fuzz;
mod metrics;
mod policy;
mod propagator;
mod tracestate;
pub mod w3c;

pub use decision::{Extraction, PropagatedContext, extract_traceparent};
pub use formats::TraceFormat;
pub use policy::{EdgeMode, FilterStateFields, ForcedSampling, TracePolicy};
pub use propagator::TracePropagator;
