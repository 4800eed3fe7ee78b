//! The counters of the limits of a route.

use super::decision::{LimitEvent, LocalCheck};
use super::policy::{Limit, RateLimits};
use super::service::{GlobalCheck, ServiceEvent, ServiceFailure};
use crate::host::{MetricId, Metrics};
use crate::telemetry::Scope;

/// The counters of the limits of a route.
#[derive(Debug)]
pub(super) struct RateLimitMetrics {
    /// In the order of the proxy's own limits.
    local: Vec<LocalLimitMetrics>,
    /// In the order of the global limits.
    global: Vec<GlobalLimitMetrics>,
    /// Keys that found their bucket full, in all routes of the policy.
    overflow: MetricId,
}

/// The counters of one of the proxy's own limits.
#[derive(Debug)]
struct LocalLimitMetrics {
    /// Requests that the limit refused, or would have refused in shadow mode.
    refused: MetricId,
    /// Requests that lacked a part of the key.
    incomplete: MetricId,
    /// In the order of the candidates: requests that each would have refused.
    candidates: Vec<MetricId>,
}

/// The counters of one global limit.
#[derive(Debug)]
struct GlobalLimitMetrics {
    refused: MetricId,
    /// In the order of [`SERVICE_EVENTS`].
    events: Vec<MetricId>,
}

/// The events of a rate limit service: calls that were sent, failed calls by their reason, requests that `onFailure`
/// decided about, and requests whose client left while they were paused.
const SERVICE_EVENTS: [&str; 9] =
    ["calls", "unreachable", "timeout", "status", "garbage", "unknown_code", "crowded", "undecided", "gone"];

impl RateLimitMetrics {
    /// Defines the counters of `limits` in the scopes of the route and of the policy.
    pub(super) fn define<M: Metrics>(
        limits: &RateLimits,
        route: &Scope<'_, M>,
        policy: &Scope<'_, M>,
    ) -> RateLimitMetrics {
        let scope = |limit: &Limit| route.within("limit").within(&limit.name);
        let local = |limit: &Limit| {
            let scope = scope(limit);
            let candidate = |name: &str| scope.within("candidate").within(name).counter("refused");
            LocalLimitMetrics {
                refused: scope.counter("refused"),
                incomplete: scope.counter("incomplete"),
                candidates: limit.candidates.iter().map(|candidate_rate| candidate(&candidate_rate.name)).collect(),
            }
        };
        let global = |limit: &Limit| {
            let scope = scope(limit);
            let service = scope.within("service");
            GlobalLimitMetrics {
                refused: scope.counter("refused"),
                events: SERVICE_EVENTS.iter().map(|event| service.counter(event)).collect(),
            }
        };
        RateLimitMetrics {
            local: limits.local.iter().map(local).collect(),
            global: limits.global.iter().map(|limit| global(&limit.limit)).collect(),
            overflow: policy.counter("state.overflow"),
        }
    }

    /// Counts what the proxy's own limits decided about a request.
    pub(super) fn count_local(&self, check: &LocalCheck, metrics: &impl Metrics) {
        let refusal = check.refusal.map(|refusal| LimitEvent::WouldRefuse(refusal.quota.limit));
        for event in refusal.iter().chain(&check.events) {
            let limit = |index: usize| self.local.get(index);
            let metric = match *event {
                LimitEvent::WouldRefuse(index) => limit(index).map(|metrics| metrics.refused),
                LimitEvent::IncompleteKey(index) => limit(index).map(|metrics| metrics.incomplete),
                LimitEvent::CandidateWouldRefuse(index, candidate) => {
                    limit(index).and_then(|metrics| metrics.candidates.get(candidate)).copied()
                }
            };
            if let Some(metric) = metric {
                metrics.add(metric, 1);
            }
        }
        self.count_overflows(check, metrics);
    }

    /// Counts the keys that found their bucket full.
    pub(super) fn count_overflows(&self, check: &LocalCheck, metrics: &impl Metrics) {
        if check.overflows > 0 {
            metrics.add(self.overflow, check.overflows);
        }
    }

    /// Counts what the global limits decided about a request.
    pub(super) fn count_global(&self, check: &GlobalCheck, metrics: &impl Metrics) {
        let refused = check.refusal.iter().map(|refusal| &refusal.limit).chain(&check.would_refuse);
        for limit in refused.filter_map(|limit| self.global.get(*limit)) {
            metrics.add(limit.refused, 1);
        }
        for limit in &check.failure_mode_applied {
            self.count_service(*limit, 7, metrics);
        }
    }

    /// Counts an event of the service of a global limit.
    pub(super) fn count_event(&self, limit: usize, event: ServiceEvent, metrics: &impl Metrics) {
        let place = match event {
            ServiceEvent::CallSent => 0,
            ServiceEvent::Failed(ServiceFailure::Unreachable) => 1,
            ServiceEvent::Failed(ServiceFailure::Timeout) => 2,
            ServiceEvent::Failed(ServiceFailure::Status) => 3,
            ServiceEvent::Failed(ServiceFailure::Garbage) => 4,
            ServiceEvent::Failed(ServiceFailure::UnknownCode) => 5,
            ServiceEvent::Failed(ServiceFailure::Overloaded) => 6,
            ServiceEvent::ClientLeft => 8,
        };
        self.count_service(limit, place, metrics);
    }

    #[inline(never)]
    fn count_service(&self, limit: usize, place: usize, metrics: &impl Metrics) {
        if let Some(metric) = self.global.get(limit).and_then(|limit| limit.events.get(place)) {
            metrics.add(*metric, 1);
        }
    }
}
