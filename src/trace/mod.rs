//! Trace-header propagation: a valid context goes on with a new parent, anything else starts a new trace.

mod config;
mod decision;
mod policy;
pub mod w3c;

pub use decision::{Arrived, Continuation, extract};
pub use policy::{Edge, Trace};
