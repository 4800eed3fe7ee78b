//! Fault injection that stops when its target is unhealthy.
//!
//! The policy is Istio's `fault` block with additions. A delay, an abort and a replaced response are drawn independently
//! and exactly, from the trace id or at random. A [`FaultTarget`] selects the requests of an experiment, [`HeaderControl`]
//! lets requests ask for faults, and [`ActiveFaults`] caps how many faults are active at once.
//!
//! A `FaultInjector` is the policy of one route at work in one worker. Before it injects anything, an `ExperimentGuard`
//! checks how the target responds to the requests that were *not* faulted, and suspends the experiment if too many of them
//! fail. An `ErrorBudget` limits how many failures an experiment may cause in total. A `HostExperiment` measures what
//! faults of single hosts lead to.
//!
//! Invariants: every fault has passed the guard of its destination, and every [`ActiveFaultPermit`] is released once.

mod active;
mod budget;
mod config;
mod control;
mod decision;
mod delayed;
mod experiment_guard;
mod guard;
mod guard_config;
mod host_experiment;
mod injector;
mod metrics;
mod policy;
mod records;
mod target;

pub use active::{ActiveFaultPermit, ActiveFaults};
pub use config::RouteContext;
pub use control::RequestedFault;
pub use decision::{DrawPurpose, DrawnFaults, FAULT_HEADER, SkipReason};
pub(crate) use delayed::{DelayedStreams, Due};
pub use experiment_guard::ExperimentId;
pub use guard::GuardPolicy;
pub use host_experiment::Attempt;
pub use injector::ResponseReplacement;
pub(crate) use injector::{FaultDecision, FaultInjector, FaultRequest};
pub use policy::{Abort, Delay, Distribution, DrawnFrom, FaultPolicy, FaultStatus, HeaderControl};
pub use target::FaultTarget;
