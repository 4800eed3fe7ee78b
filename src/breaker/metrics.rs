//! The metrics of a circuit breaker.

use crate::host::{MetricId, Metrics};
use crate::telemetry::Scope;

/// The metrics of the circuit breaker of one route.
#[derive(Clone, Copy, Debug)]
pub(super) struct BreakerMetrics {
    /// Gauge: 0 closed, 1 open, 2 half-open.
    pub(super) state: MetricId,
    /// Counter: requests that were refused.
    pub(super) refused: MetricId,
    /// Counter: answers of the destination.
    pub(super) requests: MetricId,
    /// Counter: answers that were failures.
    pub(super) failures: MetricId,
}

impl BreakerMetrics {
    pub(super) fn define(breaker: &Scope<'_, impl Metrics>) -> BreakerMetrics {
        BreakerMetrics {
            state: breaker.gauge("state"),
            refused: breaker.counter("refused"),
            requests: breaker.counter("requests"),
            failures: breaker.counter("failures"),
        }
    }
}
