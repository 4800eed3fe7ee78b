//! A route's circuit breaker.

/// The `circuitBreaker` block.
#[derive(Debug)]
pub struct Breaker {
    /// `errorThresholdPercentage`: it opens at this share of failures ...
    pub threshold: u8,
    /// `volumeThreshold`: ... among at least so many answers ...
    pub volume: u64,
    /// ... within so many nanoseconds.
    pub window: u64,
    /// `resetTimeout`, in nanoseconds: how long it stays open.
    pub reset: u64,
    /// `halfOpenRequests`: how many requests then have to succeed, and no other is let through.
    pub probes: u32,
    /// The key of the shared word.
    pub word: Box<str>,
}
