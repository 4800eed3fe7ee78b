//! The public metrics of one target. They are output only.

use crate::host::{MetricId, Metrics};
use crate::telemetry::Scope;

/// What is observed of one target, from requests that were not faulted.
#[derive(Debug)]
pub(super) struct TargetMetrics {
    pub(super) requests: MetricId,
    pub(super) failures: MetricId,
    /// Requests that Envoy answered itself because no host was available or too many requests were pending.
    pub(super) outages: MetricId,
    /// Responses that took longer than a latency threshold, in the order of the thresholds.
    pub(super) slow: Vec<MetricId>,
    /// The share of hosts that are ejected, in parts per million. `None` if the hosts are not observed.
    pub(super) ejected: Option<MetricId>,
}

impl TargetMetrics {
    /// Defines the metrics of a target with these latency thresholds, in nanoseconds.
    pub(super) fn define(thresholds: &[u64], observes_hosts: bool, scope: &Scope<'_, impl Metrics>) -> TargetMetrics {
        let slow = |threshold: &u64| scope.counter(&["slow_", &(threshold / 1_000).to_string(), "us"].concat());
        TargetMetrics {
            requests: scope.counter("requests"),
            failures: scope.counter("failures"),
            outages: scope.counter("outages"),
            ejected: observes_hosts.then(|| scope.gauge("ejected_ppm")),
            slow: thresholds.iter().map(slow).collect(),
        }
    }
}
