//! Fault injection that stops when its target is unwell.
//!
//! Istio's `fault` block and what chaos experiments need beyond it, drawn exactly: a delay, an abort and a replaced answer
//! have a draw each, from the trace id or anew. A [`Target`] says whom an experiment is aimed at, [`HeaderControl`] lets
//! requests ask for faults, [`Slots`] cap how many there are at once. Before anything is injected the [`Guard`] looks at
//! how the target answers the requests that were *not* faulted; where too many of them fail, injection is suspended.
//! What an experiment may break in all is its share of the error budget.

mod budget;
mod config;
mod control;
mod decision;
mod delayed;
mod experiment;
mod guard;
mod policy;
mod slots;
mod target;

pub use budget::spend;
pub use config::Surroundings;
pub use control::Asked;
pub use decision::{Draw, Injection, MARK, MESSAGE, Withheld};
pub use delayed::{DelayedStreams, Due, MAX_DELAYED};
pub use guard::{Admin, Cause, Evidence, Guard, Phase, State};
pub use policy::{Abort, Delay, Distribution, DrawnFrom, Fault, HeaderControl, Status};
pub use slots::{Slot, Slots, change};
pub use target::{Host, Target, attempt};
