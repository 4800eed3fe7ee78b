//! A limit that a service keeps, ready to be asked for.

use crate::ratelimit::Limit;

/// A limit of a route that a rate limit service keeps for a whole fleet.
#[derive(Debug)]
pub struct GlobalLimit {
    /// Its name, its key, and what is promised; kept here only where the service fails and [`OnFailure::Local`] says so.
    pub limit: Limit,
    pub service: Service,
}

/// The service, and how it is asked.
#[derive(Debug)]
pub struct Service {
    /// Envoy's cluster of it.
    pub cluster: Box<str>,
    pub domain: Box<str>,
    /// Milliseconds that a call may take.
    pub timeout: u32,
    pub on_failure: OnFailure,
    /// The most hits that one call charges ahead; 1: only as many as requests wait.
    pub batch: u32,
    /// The keys of the descriptor's entries, in the order of the limit's key; of a limit without one, one entry's.
    pub descriptor_keys: Vec<Box<str>>,
}

/// What becomes of a request that the service could not be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    Allow,
    Deny,
    /// This proxy keeps the limit for itself meanwhile.
    Local,
}
