//! Canary routing: the choice of a route's destination, and the progress of a rollout.
//!
//! A filter cannot change a weight that the proxy's router draws, so it draws itself: it chooses the destination and names
//! it in the steering header, and the router only matches this header. A request that the filter did not see has no such
//! header and takes the router's default, which is the stable version.
//!
//! `Rollout` is the runtime type, one for each route with a `canary` block and worker. Its input is a request or the
//! answer to one; its output is the chosen destination, and a verdict. A route without `canary` uses [`Split::choose`]
//! alone. The workers of a proxy agree through shared data; `slots.rs` describes the records.
//!
//! Invariants:
//! - Once the record of a failed verdict is written, no worker sends another request to the canary.
//! - No worker sends a request past the cap on exposure.
//! - A request that goes to another destination than the canary reads no shared data.

mod cohort;
mod cohort_header;
mod config;
mod decision;
mod exposure;
mod judge;
mod latency;
mod logarithm;
mod metrics;
mod policy;
mod restarted_test;
mod rollout;
mod slots;
mod stages;
mod state;

pub use cohort::cohort;
pub use cohort_header::{Accept, CohortAssignment, CohortHeader, InboundAssignments, can_be_carried};
pub use decision::{EffectiveWeight, Selection, SelectionReason, WeightSource};
pub(crate) use metrics::CohortMetrics;
pub use policy::{Canary, Destination, Split, Steering};
pub use rollout::Sample;
pub(crate) use rollout::{Rollout, RolloutDecision, TICK_PERIOD};
