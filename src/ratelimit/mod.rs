//! Rate limits of a route, exact over all workers of a proxy.
//!
//! A [`RateLimiter`] for each route is the interface to the filter. [`RateLimiter::check`] takes a request and its keys,
//! and decides whether the request is admitted, refused with a local reply, or paused until a rate limit service answers.
//! All limits of a route must admit a request. What the limits charge for it is a [`RouteLimitState`], which the filter
//! commits, refunds or settles on every path that the request takes. [`WorkerLimits`] is the state that one worker keeps
//! for all routes.
//!
//! | module | responsibility |
//! |---|---|
//! | `policy`, `config` | the compiled `rateLimits` block, and reading it |
//! | `limiter`, `metrics` | the limits of a route at work |
//! | `decision` | whether the proxy's own limits admit a request |
//! | `gcra` | the arithmetic of a rate: one number for each key, the theoretical arrival time |
//! | `table` | the keys of a limit in a fixed number of shared-data records, changed by compare-and-swap |
//! | `lease` | requests of hot keys that a worker reserves ahead |
//! | `reply` | the reply to a refused request, and the headers that announce the remaining quota |
//! | [`service`] | global limits, which a rate limit service keeps for a fleet |
//!
//! Invariants: all workers together never admit more than `burst + rate * time`. Shared data that is missing, garbage or
//! contended never admits more. The number of keys in shared data is bounded for each limit.

mod config;
mod decision;
mod gcra;
mod lease;
mod limiter;
mod metrics;
mod policy;
mod reply;
pub mod service;
mod table;

pub(crate) use config::read;
pub use decision::{LimitEvent, LocalCheck, QuotaStatus, Refusal, RefusalReason};
pub use gcra::Gcra;
pub use limiter::{LimitCheck, LimitDecision, RateLimiter, RouteLimitState, WorkerLimits};
pub use policy::{
    CandidateRate, Cost, Keyspace, Limit, OnMissing, Override, Rate, RateLimits, RejectionBody, ResponseOptions,
    Secret, StatusRanges,
};
