//! What was done to a request's trace, for the counters: a platform team sees which workload breaks traces.

/// Something that was done, and that an operator wants to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceEvent {
    /// A context was set aside and a new trace begun, because the edge says so.
    Restarted,
    /// The context came from what was remembered, because the application had copied none.
    Bridged,
    /// The application had copied a part of the context, and got the rest back.
    Repaired,
    /// Several different contexts arrived under one id.
    Ambiguous,
    /// A list was too long, and members of it were dropped.
    Truncated,
    /// The context came in a format that is not injected.
    Converted,
    /// A `tracestate` was invalid and dropped.
    InvalidTracestate,
    /// Another request's context, still alive, lost its place to this one's.
    Displaced,
}

/// A set of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceEvents(u16);

impl TraceEvents {
    pub fn add(&mut self, event: TraceEvent) {
        self.0 |= 1 << event as u16;
    }

    pub fn add_if(&mut self, condition: bool, event: TraceEvent) {
        self.0 |= u16::from(condition) << event as u16;
    }

    pub fn extend(&mut self, events: TraceEvents) {
        self.0 |= events.0;
    }

    pub fn contains(self, event: TraceEvent) -> bool {
        self.0 & 1 << event as u16 != 0
    }
}
