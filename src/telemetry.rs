//! What an operator sees: the metrics.
//!
//! A name is a path of labelled parts, `trimtab.policy.<policy>.route.<route>.subset.<subset>.<what>`, so that a few
//! `stats_tags` expressions turn the parts into labels. All are defined when the policy is loaded; a request only adds.
//! What all workers have to see of each other at once, such as a target's failures, is counted here too: adding to a
//! metric is atomic and far cheaper than a shared word.

use crate::canary::{Arm, Canary, Carried, Counts, Finding, Question, Share, Split, Term, Verdict, decibans};
use crate::fault::{Abort, Injection, Phase, State, Withheld};
use crate::host::{MetricId, Metrics};
use crate::outlier::Totals;
use crate::policy::{Policy, Route, label};
use crate::ratelimit::service::{Event, Failure, Inquiry};
use crate::ratelimit::{Admission, Limit, Remark};
use crate::trace::w3c::Invalid;
use crate::trace::{Arrived, Continuation, Direction, Format, Note, Notes};
use crate::units::Fraction;
use std::fmt;
use xxhash_rust::xxh64::xxh64;

/// The metrics of a policy.
#[derive(Debug)]
pub struct Meters {
    /// Requests that no route matched.
    pub unmatched: MetricId,
    /// In the order of the policy's routes.
    pub routes: Vec<RouteMeters>,
    /// In the order of the policy's targets.
    pub targets: Vec<TargetMeters>,
    /// Where decisions are carried from hop to hop.
    cohort: Option<CohortMeters>,
    /// Of requests that leave the application.
    outbound: TraceMeters,
    /// Of all others.
    trace: TraceMeters,
}

/// A route with a destination on trial.
#[derive(Clone, Copy)]
pub struct Stand<'p> {
    pub route: &'p Route,
    pub split: &'p Split,
    pub canary: &'p Canary,
    pub meters: &'p RolloutMeters,
}

impl<'p> Stand<'p> {
    pub fn new(route: &'p Route, meters: &'p RouteMeters) -> Option<Stand<'p>> {
        let split = route.split.as_ref()?;
        Some(Stand { route, split, canary: split.canary.as_ref()?, meters: meters.rollout.as_ref()? })
    }

    /// What is done where the canary fails.
    fn action(&self) -> &'static str {
        match self.canary.judge {
            _ if self.canary.shadow => "shadow",
            Some(judge) if judge.rolls_back => "rollback",
            _ => "report",
        }
    }
}

impl fmt::Display for Stand<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route={:?} rollout={:?}", self.route.name, self.canary.rollout)
    }
}

/// The metrics of one route.
#[derive(Debug)]
pub struct RouteMeters {
    /// In the order of the route's destinations; of a route without any, its own.
    pub destinations: Vec<DestinationMeters>,
    /// Where a destination is on trial.
    pub rollout: Option<RolloutMeters>,
    /// Where the route injects faults.
    pub faults: Option<FaultMeters>,
    /// Where they are aimed at hosts or attempts.
    pub report: Option<ReportMeters>,
    /// Where the route has a circuit breaker.
    pub breaker: Option<BreakerMeters>,
    /// In the order of the route's limits.
    limits: Vec<LimitMeters>,
    /// In the order of the route's global limits.
    services: Vec<ServiceMeters>,
    state: StateMeters,
}

/// The metrics of one limit.
#[derive(Debug)]
struct LimitMeters {
    /// Requests refused, or in shadow those that would have been.
    refused: MetricId,
    /// Requests that lacked a part of the key.
    incomplete: MetricId,
    /// In the order of the candidates: the requests that each would have refused.
    candidates: Vec<MetricId>,
}

/// The metrics of one destination of a route.
#[derive(Clone, Debug)]
pub struct DestinationMeters {
    pub requests: MetricId,
    pub target: TargetMeters,
    /// Answers that were slower than the route's guard wants, where it asks for that.
    slow: Option<MetricId>,
    /// Where the route injects faults.
    guard: Option<GuardMeters>,
}

/// Where an experiment stands.
#[derive(Clone, Copy, Debug)]
struct GuardMeters {
    /// 0 armed, 1 suspended, 2 probing, 3 latched.
    state: MetricId,
    /// How often it was suspended.
    suspensions: MetricId,
    /// Until when at least, in milliseconds of the monotonic clock; 0 where it is not.
    suspended_until: MetricId,
}

/// The state of one rollout. All workers share it.
#[derive(Clone, Debug)]
pub struct RolloutMeters {
    /// The canary's weight in force, in parts per million.
    weight: MetricId,
    /// Whether a stage is due that the evidence does not let begin.
    held: MetricId,
    /// Requests that went to the others because the cap on exposure was reached.
    capped: MetricId,
    /// Requests in shadow that would have gone elsewhere.
    pub shadow: MetricId,
    pub judge: Option<JudgeMeters>,
}

/// What the judge of a rollout knows, and what it found.
#[derive(Clone, Debug)]
pub struct JudgeMeters {
    /// One entry for each weight that there may be.
    pub weights: Vec<WeightMeters>,
    /// 1 from the moment on that the canary failed; never taken back.
    failed: MetricId,
    /// The weight that it failed at, in parts per million.
    failed_weight: MetricId,
    passed: MetricId,
    against: MetricId,
    favour: MetricId,
    /// Past how many microseconds an answer of the others is slow; 0 where that is not known yet.
    edge: MetricId,
}

/// The evidence from the requests that were sent by one weight.
#[derive(Clone, Copy, Debug)]
pub struct WeightMeters {
    pub weight: Fraction,
    pub canary: ArmMeters,
    pub others: ArmMeters,
    pub handicap: MetricId,
    pub margin: MetricId,
}

/// The answers of one side.
#[derive(Clone, Copy, Debug)]
pub struct ArmMeters {
    pub requests: MetricId,
    pub failures: MetricId,
    pub slow: MetricId,
}

/// What is observed of one target, from requests that were not faulted.
#[derive(Clone, Debug)]
pub struct TargetMeters {
    pub requests: MetricId,
    pub failures: MetricId,
    /// Requests for which there was no host, or no room.
    pub outages: MetricId,
    /// Answers that took longer than so many nanoseconds.
    pub slow: Vec<(u64, MetricId)>,
    /// The share of its hosts that are ejected, in parts per million, where anybody knows.
    pub ejected: Option<MetricId>,
}

/// The faults of one route, and why there were none.
#[derive(Clone, Copy, Debug)]
pub struct FaultMeters {
    delays: MetricId,
    aborts: MetricId,
    resets: MetricId,
    responses: MetricId,
    not_drawn: MetricId,
    max_active: MetricId,
    suspended: MetricId,
    unknown: MetricId,
    probing: MetricId,
    expired: MetricId,
    budget: MetricId,
    shadow: MetricId,
    overflow: MetricId,
}

/// The metrics of a limit that a service keeps.
#[derive(Debug)]
struct ServiceMeters {
    refused: MetricId,
    /// In the order of [`SERVICE`].
    events: Vec<MetricId>,
}

/// What happens when a service is asked: calls sent, those without an answer by why, requests that the limit's
/// `onFailure` decided on, and requests whose client went away while they waited.
const SERVICE: [&str; 9] =
    ["calls", "unreachable", "timeout", "status", "garbage", "unknown_code", "crowded", "undecided", "gone"];

/// What an experiment on hosts or attempts has shown so far.
#[derive(Debug)]
pub struct ReportMeters {
    /// First attempts.
    pub requests: MetricId,
    /// Later ones.
    pub retries: MetricId,
    /// Attempts whose answer was no failure.
    pub succeeded: MetricId,
    /// Those of them that were retries.
    pub masked: MetricId,
    /// Requests that came by where hosts and attempts are not known.
    pub misplaced: MetricId,
    /// In the order of the fault's hosts.
    pub hosts: Vec<HostMeters>,
}

/// What became of one host. All workers share it.
#[derive(Clone, Copy, Debug)]
pub struct HostMeters {
    /// Attempts that reached it, and those of them that were faulted.
    pub attempts: MetricId,
    pub faults: MetricId,
    /// How often it has been ejected, whether it is now, after how many faults it was, and for how long the last time.
    pub ejections: MetricId,
    pub ejected: MetricId,
    pub errors_until_ejection: MetricId,
    pub ejected_ms: MetricId,
    /// When an attempt last reached it, and how many had gone elsewhere by then.
    pub seen_ms: MetricId,
    pub elsewhere_before: MetricId,
    /// How many faults there were when it last came back.
    pub faults_before: MetricId,
}

/// The circuit breaker of one route.
#[derive(Clone, Copy, Debug)]
pub struct BreakerMeters {
    /// 0 closed, 1 open, 2 half-open.
    pub state: MetricId,
    /// Requests that were answered in the target's place.
    pub refused: MetricId,
    /// Answers of the target.
    requests: MetricId,
    failures: MetricId,
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

/// The decisions of canaries that requests arrived with.
#[derive(Clone, Copy, Debug)]
struct CohortMeters {
    followed: MetricId,
    /// Of rollouts that the policy does not know.
    foreign: MetricId,
    malformed: MetricId,
    forged: MetricId,
    stale: MetricId,
}

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
                let edges = &target.edges;
                let name = label(&target.name);
                let counter = |what: &str| counter(&format!("target.{name}.{what}"));
                TargetMeters {
                    requests: counter("requests"),
                    failures: counter("failures"),
                    outages: counter("outages"),
                    ejected: target
                        .knows_hosts()
                        .then(|| metrics.gauge(&format!("{prefix}.target.{name}.ejected_ppm"))),
                    slow: edges.iter().map(|edge| (*edge, counter(&format!("slow_{}us", edge / 1_000)))).collect(),
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
            cohort: policy.cohort.as_ref().map(|_| CohortMeters {
                followed: counter("cohort.followed"),
                foreign: counter("cohort.foreign"),
                malformed: counter("cohort.malformed"),
                forged: counter("cohort.forged"),
                stale: counter("cohort.stale"),
            }),
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

    /// Counts the decisions that a request arrived with; `share` is what the canary of its route got.
    pub fn count_carried(&self, carried: &Carried, policy: &Policy, share: Option<Share>, metrics: &impl Metrics) {
        let Some(meters) = &self.cohort else { return };
        let is_followed = share.is_some_and(|share| share.term == Term::Carried);
        let is_foreign = |rollout: &&str| !policy.knows(rollout);
        for (metric, count) in [
            (meters.followed, u64::from(is_followed)),
            (meters.foreign, carried.rollouts().filter(is_foreign).count() as u64),
            (meters.malformed, carried.refused.malformed),
            (meters.forged, carried.refused.forged),
            (meters.stale, carried.refused.stale),
        ] {
            if count > 0 {
                metrics.add(metric, count);
            }
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
            Arrived::Decided => return,
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
                    slow: route.fault.as_ref().and_then(|fault| {
                        let edge = fault.guard.latency_p95?;
                        target.slow.iter().find(|(known, _)| *known == edge).map(|(_, metric)| *metric)
                    }),
                    target: target.clone(),
                    guard: route.fault.as_ref().map(|_| {
                        let [state, suspensions, suspended_until] = ["state", "suspensions", "suspended_until_ms"]
                            .map(|name| metrics.gauge(&format!("{prefix}.{subset}fault.{name}")));
                        GuardMeters { state, suspensions, suspended_until }
                    }),
                })
                .collect(),
            rollout: route.split.as_ref().and_then(|split| {
                split.canary.as_ref().map(|canary| RolloutMeters::define(&prefix, split, canary, metrics))
            }),
            faults: route.fault.as_ref().map(|_| FaultMeters {
                delays: counter("fault.delays"),
                aborts: counter("fault.aborts"),
                resets: counter("fault.resets"),
                responses: counter("fault.responses"),
                not_drawn: counter("fault.not_drawn"),
                max_active: counter("fault.max_active"),
                suspended: counter("fault.suspended"),
                unknown: counter("fault.unknown"),
                probing: counter("fault.probing"),
                expired: counter("fault.expired"),
                budget: counter("fault.budget"),
                shadow: counter("fault.shadow"),
                overflow: counter("fault.overflow"),
            }),
            report: route.fault.as_ref().filter(|fault| fault.target.is_upstream()).map(|fault| {
                let [requests, retries, succeeded, masked, misplaced] =
                    ["requests", "retries", "succeeded", "masked", "misplaced"]
                        .map(|name| counter(&format!("fault.experiment.{name}")));
                let hosts = fault.target.hosts.iter();
                let hosts = hosts.map(|host| HostMeters::define(&prefix, &host.address, metrics)).collect();
                ReportMeters { requests, retries, succeeded, masked, misplaced, hosts }
            }),
            breaker: route.breaker.as_ref().map(|_| BreakerMeters {
                state: metrics.gauge(&format!("{prefix}.breaker.state")),
                refused: counter("breaker.refused"),
                requests: counter("breaker.requests"),
                failures: counter("breaker.failures"),
            }),
            limits: route.limits.iter().map(|limit| LimitMeters::define(&prefix, limit, metrics)).collect(),
            services: route
                .global_limits
                .iter()
                .map(|global| {
                    let limit = format!("limit.{}", global.limit.name);
                    ServiceMeters {
                        refused: counter(&format!("{limit}.refused")),
                        events: SERVICE.iter().map(|event| counter(&format!("{limit}.service.{event}"))).collect(),
                    }
                })
                .collect(),
            state,
        }
    }

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

    /// How many requests the route has sent on or faulted so far.
    pub fn requests(&self, metrics: &impl Metrics) -> u64 {
        self.destinations.iter().map(|destination| metrics.value(destination.requests)).sum()
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

impl LimitMeters {
    fn define(route: &str, limit: &Limit, metrics: &impl Metrics) -> LimitMeters {
        let prefix = format!("{route}.limit.{}", limit.name);
        let refused = |of: &str| metrics.counter(&format!("{prefix}.{of}refused"));
        LimitMeters {
            refused: refused(""),
            incomplete: metrics.counter(&format!("{prefix}.incomplete")),
            candidates: limit.candidates.iter().map(|tried| refused(&format!("candidate.{}.", tried.name))).collect(),
        }
    }
}

impl RolloutMeters {
    fn define(route: &str, split: &Split, canary: &Canary, metrics: &impl Metrics) -> RolloutMeters {
        let mut prefix = format!("{route}.rollout.{}", label(&canary.rollout));
        if !prefix.ends_with(&*canary.rollout) {
            // What was replaced in the name is told apart by its hash.
            prefix = format!("{prefix}_{}", xxh64(canary.rollout.as_bytes(), 0) >> 32);
        }
        let weights = canary.weights(split.weight(canary.destination));
        RolloutMeters {
            weight: metrics.gauge(&format!("{prefix}.weight_ppm")),
            held: metrics.gauge(&format!("{prefix}.held")),
            capped: metrics.counter(&format!("{prefix}.capped")),
            shadow: metrics.counter(&format!("{prefix}.shadow")),
            judge: canary.judge.map(|_| JudgeMeters::define(&prefix, &weights, metrics)),
        }
    }

    /// The weight that requests are sent by, as any worker has told it last. A worker without requests of its own knows
    /// no other.
    pub fn weight_in_force(&self, stand: &Stand<'_>, metrics: &impl Metrics) -> Fraction {
        if stand.canary.shadow {
            return stand.split.weight(stand.canary.destination);
        }
        Fraction::from_ppm(u32::try_from(metrics.value(self.weight)).unwrap_or(u32::MAX))
    }

    /// Shows the share in force, and logs it where no other worker has done so.
    #[cold]
    #[inline(never)]
    pub fn tell(&self, share: Share, stand: &Stand<'_>, metrics: &impl Metrics) {
        let weight = u64::from(share.weight.ppm());
        let held = u64::from(share.term == Term::Held);
        if (metrics.value(self.weight), metrics.value(self.held)) == (weight, held) {
            return;
        }
        metrics.set_gauge(self.weight, weight);
        metrics.set_gauge(self.held, held);
        if !matches!(share.term, Term::Stage(_) | Term::Held) {
            return;
        }
        let is_set = |gauge: fn(&JudgeMeters) -> MetricId| {
            self.judge.as_ref().is_some_and(|judge| metrics.value(gauge(judge)) == 1)
        };
        let verdict = match &self.judge {
            None => "none",
            Some(_) if is_set(|judge| judge.failed) => "fail",
            Some(_) if is_set(|judge| judge.passed) => "pass",
            Some(_) => "insufficient",
        };
        let what = if share.term == Term::Held { "held" } else { "entered" };
        log::info!("canary stage: {stand} stage={what} weight={} verdict={verdict}", share.weight);
    }

    /// Counts a request that the cap on exposure kept from the canary; the first one is logged.
    #[cold]
    #[inline(never)]
    pub fn count_capped(&self, most: u64, stand: &Stand<'_>, metrics: &impl Metrics) {
        if metrics.value(self.capped) == 0 {
            log::info!("canary capped: {stand} requests={most}");
        }
        metrics.add(self.capped, 1);
    }
}

impl JudgeMeters {
    fn define(rollout: &str, weights: &[Fraction], metrics: &impl Metrics) -> JudgeMeters {
        let weights = weights.iter().map(|weight| {
            let counters = [
                "canary.requests",
                "canary.failures",
                "canary.slow",
                "others.requests",
                "others.failures",
                "others.slow",
                "handicap",
                "margin",
            ];
            let [requests, failures, slow, others_requests, others_failures, others_slow, handicap, margin] =
                counters.map(|name| metrics.counter(&format!("{rollout}.judge.weight.{}.{name}", weight.ppm())));
            WeightMeters {
                weight: *weight,
                canary: ArmMeters { requests, failures, slow },
                others: ArmMeters { requests: others_requests, failures: others_failures, slow: others_slow },
                handicap,
                margin,
            }
        });
        let gauges = ["failed", "failed_weight_ppm", "passed", "against_decibans", "favour_decibans", "p99_edge_us"];
        let [failed, failed_weight, passed, against, favour, edge] =
            gauges.map(|name| metrics.gauge(&format!("{rollout}.judge.{name}")));
        JudgeMeters { weights: weights.collect(), failed, failed_weight, passed, against, favour, edge }
    }

    /// Everything that is known, all workers together.
    pub fn counts(&self, metrics: &impl Metrics) -> Vec<Counts> {
        let arm = |arm: &ArmMeters| Arm {
            requests: metrics.value(arm.requests),
            failures: metrics.value(arm.failures),
            slow: metrics.value(arm.slow),
        };
        let counts = |meters: &WeightMeters| Counts {
            weight: meters.weight,
            canary: arm(&meters.canary),
            others: arm(&meters.others),
            handicap: metrics.value(meters.handicap),
            margin: metrics.value(meters.margin),
        };
        self.weights.iter().map(counts).collect()
    }

    /// Whether the canary has failed, in the eyes of any worker.
    pub fn has_failed(&self, metrics: &impl Metrics) -> bool {
        metrics.value(self.failed) > 0
    }

    /// The weight that the canary failed at.
    pub fn failed_at(&self, metrics: &impl Metrics) -> Fraction {
        Fraction::from_ppm(u32::try_from(metrics.value(self.failed_weight)).unwrap_or(u32::MAX))
    }

    /// Tells all workers that the canary has failed; whether that is news.
    pub fn fail(&self, weight: Fraction, metrics: &impl Metrics) -> bool {
        let is_news = !self.has_failed(metrics);
        if is_news {
            metrics.set_gauge(self.failed_weight, u64::from(weight.ppm()));
            metrics.set_gauge(self.failed, 1);
        }
        is_news
    }

    /// Shows the evidence.
    pub fn show(&self, finding: &Finding, metrics: &impl Metrics) {
        metrics.set_gauge(self.passed, u64::from(finding.verdict == Verdict::Pass));
        metrics.set_gauge(self.against, decibans(finding.against));
        metrics.set_gauge(self.favour, decibans(finding.favour));
    }

    /// Past how many microseconds an answer of the others is slow; 0 where that is not known yet.
    pub fn edge(&self, metrics: &impl Metrics) -> u64 {
        metrics.value(self.edge)
    }

    pub fn set_edge(&self, edge: u64, metrics: &impl Metrics) {
        metrics.set_gauge(self.edge, edge);
    }

    /// Logs that nothing was known of the rollout.
    pub fn log_begin(&self, stand: &Stand<'_>, metrics: &impl Metrics) {
        let answers: u64 = self.counts(metrics).iter().map(|known| known.canary.requests).sum();
        log::info!("canary judge: {stand} verdict=insufficient canary_requests={answers}");
    }

    /// Logs that the rollout had failed before.
    pub fn log_kept(&self, stand: &Stand<'_>) {
        log::warn!("canary judge: {stand} verdict=fail action={} since=earlier", stand.action());
    }

    /// Logs a new verdict with the numbers that decided.
    pub fn log_verdict(&self, finding: &Finding, weight: Fraction, stand: &Stand<'_>) {
        let (verdict, action) = match finding.verdict {
            Verdict::Insufficient => ("insufficient", "none"),
            Verdict::Pass => ("pass", "none"),
            Verdict::Fail => ("fail", stand.action()),
        };
        let question = match finding.question {
            Question::Errors => "errors",
            Question::Limit => "limit",
            Question::Slowness => "p99",
        };
        let Finding { canary, others, .. } = finding;
        let needed = stand.canary.judge.map_or(0, |judge| decibans(judge.needed()));
        log::warn!(
            "canary verdict: {stand} verdict={verdict} action={action} question={question} weight={weight} \
             canary_requests={} canary_failures={} canary_slow={} others_requests={} others_failures={} \
             others_slow={} against_db={} favour_db={} needed_db={needed}",
            canary.requests,
            canary.failures,
            canary.slow,
            others.requests,
            others.failures,
            others.slow,
            decibans(finding.against),
            decibans(finding.favour),
        );
    }
}

impl FaultMeters {
    /// Counts what was injected, or why nothing was. An answer is counted when it has been replaced.
    pub fn count(&self, drawn: &Injection, withheld: Option<Withheld>, metrics: &impl Metrics) {
        let reason = match withheld {
            Some(Withheld::NotAimed) => return,
            Some(Withheld::NotDrawn) => self.not_drawn,
            Some(Withheld::Suspended) => self.suspended,
            Some(Withheld::Unknown) => self.unknown,
            Some(Withheld::Probing) => self.probing,
            Some(Withheld::Expired) => self.expired,
            Some(Withheld::Budget) => self.budget,
            Some(Withheld::Shadow) => self.shadow,
            Some(Withheld::Overflow) => self.overflow,
            Some(Withheld::MaxActive) => self.max_active,
            None => {
                if drawn.delay.is_some() {
                    metrics.add(self.delays, 1);
                }
                match drawn.abort {
                    Some(Abort::Reset) => metrics.add(self.resets, 1),
                    Some(_) => metrics.add(self.aborts, 1),
                    None => {}
                }
                return;
            }
        };
        metrics.add(reason, 1);
    }

    /// Counts an answer that was replaced.
    pub fn count_response(&self, metrics: &impl Metrics) {
        metrics.add(self.responses, 1);
    }
}

impl HostMeters {
    fn define(route: &str, address: &str, metrics: &impl Metrics) -> HostMeters {
        let address = label(address);
        let name = |name: &str| format!("{route}.fault.host.{address}.{name}");
        let [attempts, faults, ejections] =
            ["attempts", "faults", "ejections"].map(|counter| metrics.counter(&name(counter)));
        let [ejected, errors_until_ejection, ejected_ms, seen_ms, elsewhere_before, faults_before] =
            ["ejected", "errors_until_ejection", "ejected_ms", "seen_ms", "elsewhere_before", "faults_before"]
                .map(|gauge| metrics.gauge(&name(gauge)));
        HostMeters {
            attempts,
            faults,
            ejections,
            ejected,
            errors_until_ejection,
            ejected_ms,
            seen_ms,
            elsewhere_before,
            faults_before,
        }
    }
}

impl DestinationMeters {
    /// What has been observed so far of the destination, all workers together, from whatever route.
    pub fn totals(&self, metrics: &impl Metrics) -> Totals {
        Totals {
            requests: metrics.value(self.target.requests),
            failures: metrics.value(self.target.failures),
            outages: metrics.value(self.target.outages),
            slow: self.slow.map_or(0, |slow| metrics.value(slow)),
        }
    }

    /// Shows where the experiment stands.
    pub fn show(&self, state: State, metrics: &impl Metrics) {
        const MILLISECOND: u64 = 1_000_000;
        let Some(guard) = &self.guard else { return };
        let until = match state.phase {
            Phase::Suspended(until) => until.div_ceil(MILLISECOND),
            _ => 0,
        };
        metrics.set_gauge(guard.suspended_until, until);
        metrics.set_gauge(guard.suspensions, u64::from(state.suspensions));
        metrics.set_gauge(guard.state, u64::from(state.phase.number()));
    }
}

impl BreakerMeters {
    /// What was answered so far, all workers together.
    pub fn totals(&self, metrics: &impl Metrics) -> Totals {
        let (requests, failures) = (metrics.value(self.requests), metrics.value(self.failures));
        Totals { requests, failures, ..Totals::default() }
    }

    /// Counts an answer.
    pub fn count(&self, failed: bool, metrics: &impl Metrics) {
        metrics.add(self.requests, 1);
        if failed {
            metrics.add(self.failures, 1);
        }
    }
}

impl TargetMeters {
    /// Counts an answer that was observed, and whether the nanoseconds that it took are too many for somebody.
    pub fn count(&self, failed: bool, is_outage: bool, took: u64, metrics: &impl Metrics) {
        metrics.add(self.requests, 1);
        if failed {
            metrics.add(self.failures, 1);
        }
        if is_outage {
            metrics.add(self.outages, 1);
        }
        for (edge, slow) in &self.slow {
            if took > *edge {
                metrics.add(*slow, 1);
            }
        }
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
