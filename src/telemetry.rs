//! What an operator sees: the metrics.
//!
//! A name is a path of labelled parts, `trimtab.policy.<policy>.route.<route>.subset.<subset>.<what>`, so that a few
//! `stats_tags` expressions turn the parts into labels. All are defined when the policy is loaded; a request only adds.
//! What all workers have to see of each other at once, such as a target's failures, is counted here too: adding to a
//! metric is atomic and far cheaper than a shared word.

use crate::fault::{Injection, Withheld};
use crate::host::{MetricId, Metrics};
use crate::outlier::Totals;
use crate::policy::{Policy, Route, label};
use crate::ratelimit::Admission;
use crate::trace::w3c::Invalid;
use crate::trace::{Arrived, Continuation, Direction, Format, Note, Notes};

/// The metrics of a policy.
#[derive(Debug)]
pub struct Meters {
    /// Requests that no route matched.
    pub unmatched: MetricId,
    /// In the order of the policy's routes.
    pub routes: Vec<RouteMeters>,
    /// In the order of the policy's targets.
    pub targets: Vec<TargetMeters>,
    /// Of requests that leave the application.
    outbound: TraceMeters,
    /// Of all others.
    trace: TraceMeters,
}

/// The metrics of one route.
#[derive(Debug)]
pub struct RouteMeters {
    /// In the order of the route's destinations; of a route without any, its own.
    pub destinations: Vec<DestinationMeters>,
    /// Where the route injects faults.
    pub faults: Option<FaultMeters>,
    /// In the order of the route's limits: the requests refused, or in shadow those that would have been.
    refused: Vec<MetricId>,
    state: StateMeters,
}

/// The metrics of one destination of a route.
#[derive(Clone, Copy, Debug)]
pub struct DestinationMeters {
    pub requests: MetricId,
    pub target: TargetMeters,
    /// Until when injection is suspended, in milliseconds of the monotonic clock; 0 where it is not. All workers share
    /// it, so a suspension that one of them begins holds for all.
    pub suspended_until: MetricId,
}

/// What is observed of one target, from requests that were not faulted.
#[derive(Clone, Copy, Debug)]
pub struct TargetMeters {
    pub requests: MetricId,
    pub failures: MetricId,
}

/// The faults of one route, and why there were none.
#[derive(Clone, Copy, Debug)]
pub struct FaultMeters {
    delays: MetricId,
    aborts: MetricId,
    suspended: MetricId,
    shadow: MetricId,
    overflow: MetricId,
}

/// What requests arrived with, and what was done about it.
#[derive(Debug, Default)]
struct TraceMeters {
    /// In the order of [`ARRIVED`].
    arrived: Vec<MetricId>,
    /// In the order of [`NOTES`].
    notes: Vec<MetricId>,
    /// In the order of [`Format::ALL`].
    from: Vec<MetricId>,
}

/// What a request arrives with; after the first three the reasons of the third.
const ARRIVED: [&str; 9] = [
    "valid",
    "missing",
    "invalid",
    "invalid.duplicate",
    "invalid.shape",
    "invalid.version",
    "invalid.character",
    "invalid.zero_trace_id",
    "invalid.zero_parent_id",
];

/// What is done about it.
const NOTES: [(Note, &str); 8] = [
    (Note::Restarted, "restarted"),
    (Note::Bridged, "bridged"),
    (Note::Repaired, "repaired"),
    (Note::Ambiguous, "ambiguous"),
    (Note::Truncated, "truncated"),
    (Note::Converted, "converted"),
    (Note::BadTracestate, "tracestate_invalid"),
    (Note::Displaced, "displaced"),
];

/// The health of shared data.
#[derive(Clone, Copy, Debug)]
struct StateMeters {
    /// Words under our keys that were not ours.
    garbage: MetricId,
    /// Limit keys that shared their full bucket's overflow time.
    overflow: MetricId,
    /// Requests refused because a compare-and-swap was given up.
    contended: MetricId,
}

impl Meters {
    /// Defines the metrics of `policy`.
    pub fn define(policy: &Policy, metrics: &impl Metrics) -> Meters {
        let prefix = format!("trimtab.policy.{}", policy.name);
        let counter = |name: &str| metrics.counter(&format!("{prefix}.{name}"));
        let targets: Vec<TargetMeters> = policy
            .targets
            .iter()
            .map(|target| {
                let target = label(&target.name);
                TargetMeters {
                    requests: counter(&format!("target.{target}.requests")),
                    failures: counter(&format!("target.{target}.failures")),
                }
            })
            .collect();
        let state = StateMeters {
            garbage: counter("state.garbage"),
            overflow: counter("state.overflow"),
            contended: counter("state.contended"),
        };
        let routes = policy.routes.iter();
        Meters {
            unmatched: counter("unmatched"),
            routes: routes.map(|route| RouteMeters::define(&prefix, route, &targets, state, metrics)).collect(),
            targets,
            outbound: match &policy.trace {
                Some(trace) if trace.bridge.is_some() => {
                    TraceMeters::define(&|name| counter(&format!("outbound.trace.{name}")))
                }
                _ => TraceMeters::default(),
            },
            trace: match &policy.trace {
                Some(_) => TraceMeters::define(&|name| counter(&format!("trace.{name}"))),
                None => TraceMeters::default(),
            },
        }
    }

    /// Counts what a request arrived with and what was done about it.
    pub fn count_trace(&self, continuation: &Continuation, remembered: Notes, metrics: &impl Metrics) {
        let is_outbound = continuation.direction == Direction::Outbound && !self.outbound.arrived.is_empty();
        let meters = if is_outbound { &self.outbound } else { &self.trace };
        let add = |metric: Option<&MetricId>| {
            if let Some(metric) = metric {
                metrics.add(*metric, 1);
            }
        };
        let (arrived, reason) = match continuation.arrived {
            Arrived::Valid => (0, None),
            Arrived::Missing => (1, None),
            Arrived::Invalid(Invalid::Duplicate) => (2, Some(3)),
            Arrived::Invalid(Invalid::Shape) => (2, Some(4)),
            Arrived::Invalid(Invalid::Version) => (2, Some(5)),
            Arrived::Invalid(Invalid::Character) => (2, Some(6)),
            Arrived::Invalid(Invalid::ZeroTraceId) => (2, Some(7)),
            Arrived::Invalid(Invalid::ZeroParentId) => (2, Some(8)),
        };
        add(meters.arrived.get(arrived));
        add(reason.and_then(|reason| meters.arrived.get(reason)));
        // Where it came from tells nothing new of W3C's own format.
        if let Some(from) = continuation.from.filter(|from| *from != Format::TraceContext) {
            add(meters.from.get(from as usize));
        }
        let mut notes = continuation.notes;
        notes.add_all(remembered);
        if notes != Notes::default() {
            for ((note, _), metric) in NOTES.iter().zip(&meters.notes) {
                add(notes.contains(*note).then_some(metric));
            }
        }
    }
}

impl RouteMeters {
    fn define(
        policy: &str,
        route: &Route,
        targets: &[TargetMeters],
        state: StateMeters,
        metrics: &impl Metrics,
    ) -> RouteMeters {
        let prefix = format!("{policy}.route.{}", label(&route.name));
        let counter = |name: &str| metrics.counter(&format!("{prefix}.{name}"));
        let subsets: Vec<String> = match &route.split {
            Some(split) => split
                .destinations
                .iter()
                .map(|(destination, _)| format!("subset.{}.", label(destination.label())))
                .collect(),
            None => vec![String::new()],
        };
        let targets = route.targets.iter().filter_map(|target| targets.get(target.0));
        RouteMeters {
            destinations: subsets
                .iter()
                .zip(targets)
                .map(|(subset, target)| DestinationMeters {
                    requests: counter(&format!("{subset}requests")),
                    target: *target,
                    suspended_until: metrics.gauge(&format!("{prefix}.{subset}fault.suspended_until_ms")),
                })
                .collect(),
            faults: route.fault.as_ref().map(|_| FaultMeters {
                delays: counter("fault.delays"),
                aborts: counter("fault.aborts"),
                suspended: counter("fault.suspended"),
                shadow: counter("fault.shadow"),
                overflow: counter("fault.overflow"),
            }),
            refused: route.limits.iter().map(|limit| counter(&format!("limit.{}.refused", limit.name))).collect(),
            state,
        }
    }

    /// Counts what the limits said of a request.
    pub fn count_admission(&self, admission: &Admission, metrics: &impl Metrics) {
        let refused = admission.refused.iter().map(|(limit, _)| limit).chain(&admission.would_refuse);
        for metric in refused.filter_map(|limit| self.refused.get(*limit)) {
            metrics.add(*metric, 1);
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

impl FaultMeters {
    /// Counts what was injected, or why it was withheld.
    pub fn count(&self, drawn: &Injection, withheld: Option<Withheld>, metrics: &impl Metrics) {
        match withheld {
            Some(Withheld::Suspended) => metrics.add(self.suspended, 1),
            Some(Withheld::Shadow) => metrics.add(self.shadow, 1),
            Some(Withheld::Overflow) => metrics.add(self.overflow, 1),
            None => {
                if drawn.delay.is_some() {
                    metrics.add(self.delays, 1);
                }
                if drawn.abort.is_some() {
                    metrics.add(self.aborts, 1);
                }
            }
        }
    }
}

impl TargetMeters {
    /// What has been observed so far, all workers together.
    pub fn totals(&self, metrics: &impl Metrics) -> Totals {
        Totals { requests: metrics.value(self.requests), failures: metrics.value(self.failures) }
    }
}

impl TraceMeters {
    fn define(counter: &dyn Fn(&str) -> MetricId) -> TraceMeters {
        TraceMeters {
            arrived: ARRIVED.iter().map(|name| counter(name)).collect(),
            notes: NOTES.iter().map(|(_, name)| counter(name)).collect(),
            from: Format::ALL.iter().map(|(name, _)| counter(&format!("from.{name}"))).collect(),
        }
    }
}
