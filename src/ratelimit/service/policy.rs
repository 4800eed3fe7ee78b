//! The compiled global limits.

use crate::ratelimit::Limit;

/// A limit of a route that a rate limit service keeps for a whole fleet.
#[derive(Debug)]
pub struct GlobalLimit {
    /// The name, the key and the rate. This proxy applies the rate only while the service fails, with [`OnFailure::Local`].
    pub limit: Limit,
    /// The service that keeps the limit.
    pub service: RateLimitService,
}

/// A rate limit service, and how it is called.
#[derive(Debug)]
pub struct RateLimitService {
    /// Envoy's cluster of the service.
    pub cluster: Box<str>,
    /// The domain of the descriptors.
    pub domain: Box<str>,
    /// The timeout of a call in milliseconds.
    pub timeout: u32,
    /// The decision about a request whose call failed.
    pub on_failure: OnFailure,
    /// The most hits that one call prepays. With 1 a call charges one hit for each request that waits.
    pub batch: u32,
    /// The keys of the entries of the descriptor, in the order of the limit's key. One for a limit without a key.
    pub descriptor_keys: Vec<Box<str>>,
}

/// The decision about a request whose call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// The request is admitted.
    Allow,
    /// The request is refused.
    Deny,
    /// This proxy applies the rate of the limit alone.
    Local,
}
