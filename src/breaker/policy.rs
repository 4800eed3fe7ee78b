//! What a `circuitBreaker` block is compiled to.

/// The circuit breaker of a route. Times are in nanoseconds.
#[derive(Debug)]
pub struct BreakerPolicy {
    /// `errorThresholdPercentage`: the circuit opens at this percentage of failures ...
    pub threshold: u8,
    /// `volumeThreshold`: ... among at least this number of answers ...
    pub volume: u64,
    /// ... within this time.
    pub window: u64,
    /// `resetTimeout`: how long the circuit stays open.
    pub reset: u64,
    /// `halfOpenRequests`: how many probes have to succeed before the circuit closes.
    pub probes: u32,
    /// The key of the state in shared data.
    pub(super) key: Box<str>,
}
