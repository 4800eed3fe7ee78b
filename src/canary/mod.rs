//! Canary routing: which destination of a route a request goes to.
//!
//! A filter cannot change a weight that the proxy's router draws, so it owns the split: it chooses the destination and
//! names it in the steering header, which the router only matches. Where the filter is absent the header is too, and
//! the router's default, stable, is taken.

mod cohort;
mod cohort_header;
mod config;
mod decision;
mod exposure;
mod judge;
mod latency;
mod logarithm;
mod policy;
mod recent;
mod stages;
mod verdict;

pub use cohort::cohort;
pub use cohort_header::{Accept, Carried, CohortHeader, Decided, can_be_carried};
pub use decision::{Choice, Share, Term, Why};
pub use exposure::expose;
pub use judge::{Arm, Counts, Finding, Judge, Question, Verdict, decibans};
pub use latency::Latencies;
pub use policy::{Canary, Destination, Split, Steering};
pub use recent::Recent;
pub use stages::{Progress, Schedule, Stage};
pub use verdict::{Settled, agree_on_edge, settle};
