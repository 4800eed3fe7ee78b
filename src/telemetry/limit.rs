//! Limits: what they refused, and how the services that keep some of them answer.

use super::{RouteMeters, Scope};
use crate::host::{MetricId, Metrics};
use crate::ratelimit::service::{Event, Failure, Inquiry};
use crate::ratelimit::{Admission, Limit, Remark};

/// The metrics of one limit.
#[derive(Debug)]
pub(super) struct LimitMeters {
    /// Requests refused, or in shadow those that would have been.
    refused: MetricId,
    /// Requests that lacked a part of the key.
    incomplete: MetricId,
    /// In the order of the candidates: the requests that each would have refused.
    candidates: Vec<MetricId>,
}

/// The metrics of a limit that a service keeps.
#[derive(Debug)]
pub(super) struct ServiceMeters {
    refused: MetricId,
    /// In the order of [`SERVICE`].
    events: Vec<MetricId>,
}

/// What happens when a service is asked: calls sent, those without an answer by why, requests that the limit's
/// `onFailure` decided on, and requests whose client went away while they waited.
const SERVICE: [&str; 9] =
    ["calls", "unreachable", "timeout", "status", "garbage", "unknown_code", "crowded", "undecided", "gone"];

impl LimitMeters {
    pub(super) fn define(limit: &Limit, route: &Scope<'_, impl Metrics>) -> LimitMeters {
        let scope = route.within("limit").within(&limit.name);
        let candidate = |name: &str| scope.within("candidate").within(name).counter("refused");
        LimitMeters {
            refused: scope.counter("refused"),
            incomplete: scope.counter("incomplete"),
            candidates: limit.candidates.iter().map(|tried| candidate(&tried.name)).collect(),
        }
    }
}

impl ServiceMeters {
    pub(super) fn define(limit: &Limit, route: &Scope<'_, impl Metrics>) -> ServiceMeters {
        let scope = route.within("limit").within(&limit.name);
        let service = scope.within("service");
        ServiceMeters {
            refused: scope.counter("refused"),
            events: SERVICE.iter().map(|event| service.counter(event)).collect(),
        }
    }
}

impl RouteMeters {
    /// Counts what services said of a request.
    pub fn count_inquiry(&self, inquiry: &Inquiry, metrics: &impl Metrics) {
        let refused = inquiry.refused.iter().map(|refusal| &refusal.limit).chain(&inquiry.would_refuse);
        for meters in refused.filter_map(|limit| self.services.get(*limit)) {
            metrics.add(meters.refused, 1);
        }
        for limit in &inquiry.undecided {
            self.count_service(*limit, 7, metrics);
        }
    }

    /// Counts what happened when the service of a global limit was asked.
    pub fn count_event(&self, limit: usize, event: Event, metrics: &impl Metrics) {
        let place = match event {
            Event::Sent => 0,
            Event::Failed(Failure::Unreachable) => 1,
            Event::Failed(Failure::Timeout) => 2,
            Event::Failed(Failure::Status) => 3,
            Event::Failed(Failure::Garbage) => 4,
            Event::Failed(Failure::UnknownCode) => 5,
            Event::Failed(Failure::Crowded) => 6,
            Event::Gone => 8,
            Event::Garbage => return metrics.add(self.state.garbage, 1),
            Event::Overflow => return metrics.add(self.state.overflow, 1),
            Event::Contended => return metrics.add(self.state.contended, 1),
        };
        self.count_service(limit, place, metrics);
    }

    fn count_service(&self, limit: usize, place: usize, metrics: &impl Metrics) {
        if let Some(metric) = self.services.get(limit).and_then(|meters| meters.events.get(place)) {
            metrics.add(*metric, 1);
        }
    }

    /// Counts what the limits said of a request.
    pub fn count_admission(&self, admission: &Admission, metrics: &impl Metrics) {
        let refused = admission.refused.map(|refusal| Remark::WouldRefuse(refusal.told.limit));
        for remark in refused.iter().chain(&admission.remarks) {
            let limit = |index: usize| self.limits.get(index);
            let metric = match *remark {
                Remark::WouldRefuse(index) => limit(index).map(|meters| meters.refused),
                Remark::Incomplete(index) => limit(index).map(|meters| meters.incomplete),
                Remark::CandidateWouldRefuse(index, candidate) => {
                    limit(index).and_then(|meters| meters.candidates.get(candidate)).copied()
                }
            };
            if let Some(metric) = metric {
                metrics.add(metric, 1);
            }
        }
        for (metric, count) in [
            (self.state.garbage, admission.garbage),
            (self.state.overflow, admission.overflows),
            (self.state.contended, u64::from(admission.contended)),
        ] {
            if count > 0 {
                metrics.add(metric, count);
            }
        }
    }
}
