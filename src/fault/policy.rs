//! The faults of a route.

use super::guard::Guard;
use crate::units::Fraction;

/// A route's `fault` block.
#[derive(Debug)]
pub struct Fault {
    /// How many requests are delayed, and by how many nanoseconds.
    pub delay: Option<(Fraction, u64)>,
    pub abort: Option<(Fraction, Abort)>,
    pub drawn_from: DrawnFrom,
    /// Faults are drawn and counted, and none is injected.
    pub shadow: bool,
    pub guard: Guard,
    /// Sets the draws of this route apart from those of others.
    pub salt: u64,
}

/// The answer of an abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// An HTTP status; a gRPC call gets the gRPC status that it maps to.
    Http(u16),
    /// A gRPC status code; a plain request gets the HTTP status that it maps to.
    Grpc(u8),
}

/// What decides whether a request is faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrawnFrom {
    /// The trace id, so that a request, its retries and every hop with the same policy agree.
    TraceId,
    /// A new draw for each request.
    Random,
}
