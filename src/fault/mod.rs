//! Fault injection that stops when its target is unwell.
//!
//! Istio's `fault` block, drawn exactly: a delay and an abort have a draw each. Before what was drawn is done the
//! [`Guard`] looks at how the target answers the requests that were *not* faulted; where too many of them fail, injection
//! is suspended. What an experiment may break in all is its share of the error budget.

mod budget;
mod config;
mod decision;
mod experiment;
mod guard;
mod held;
mod policy;

pub use budget::spend;
pub use decision::{Draws, Injection, Withheld};
pub use guard::{Admin, Cause, Evidence, Guard, Phase, State};
pub use held::{HeldStreams, MAX_HELD};
pub use policy::{Abort, DrawnFrom, Fault};
