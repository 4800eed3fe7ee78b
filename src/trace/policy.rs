//! What is done with trace headers.

use crate::units::Fraction;

/// The `trace` block.
#[derive(Debug)]
pub struct Trace {
    pub edge: Edge,
    /// The share of new traces that are sampled. A caller's decision is respected.
    pub sampling: Fraction,
}

/// What is done with the context that a request arrives with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// A valid context goes on.
    Continue,
    /// Every request starts a new trace.
    Restart,
    /// Trace headers are left as they are.
    Ignore,
}
