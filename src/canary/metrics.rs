//! The metrics of canary routing. They are output only: no decision reads them.

use super::cohort_header::InboundAssignments;
use super::decision::{EffectiveWeight, WeightSource};
use super::judge::{Analysis, Verdict, decibans};
use super::policy::Canary;
use crate::host::{MetricId, Metrics};
use crate::policy::label;
use crate::telemetry::Scope;
use crate::units::Fraction;
use xxhash_rust::xxh64::xxh64;

/// The metrics of one rollout.
#[derive(Debug)]
pub(super) struct RolloutMetrics {
    /// The canary's weight in force, in parts per million.
    weight: MetricId,
    /// 1 while a stage is due and the judge does not let it begin.
    held: MetricId,
    /// Requests that went to other destinations because the cap on exposure was reached.
    pub capped: MetricId,
    /// Requests in shadow mode that would have gone to another destination.
    pub shadow: MetricId,
}

/// The metrics of a rollout's judge.
#[derive(Debug)]
pub(super) struct JudgeMetrics {
    /// For each weight the counters of [`COUNTERS`], one weight after the other.
    counters: Vec<MetricId>,
    /// 1 from the moment on that the canary has failed.
    failed: MetricId,
    /// The weight that it failed at, in parts per million.
    failed_weight: MetricId,
    passed: MetricId,
    worse: MetricId,
    not_worse: MetricId,
    /// The latency above which an answer of the others is slow, in microseconds; 0 while it is unknown.
    latency_threshold: MetricId,
    /// The number of the canary's answer that was the first one after the threshold was found.
    timed_from: MetricId,
    /// The gauges `passed`, `worse` and `not_worse` as this worker has set them last.
    shown: Option<[u64; 3]>,
}

/// The counters of one weight. Their indices are the columns of the judge's counts.
pub(super) const COUNTERS: [&str; 8] = [
    "canary.requests",
    "canary.failures",
    "canary.slow",
    "others.requests",
    "others.failures",
    "others.slow",
    "handicap",
    "margin",
];

impl RolloutMetrics {
    /// The scope of a rollout within the scope of its route.
    pub(super) fn scope<'m, M: Metrics>(canary: &Canary, route: &Scope<'m, M>) -> Scope<'m, M> {
        let mut name = label(&canary.rollout);
        if *name != *canary.rollout {
            // The hash distinguishes names in which the same characters were replaced.
            name = format!("{name}_{}", xxh64(canary.rollout.as_bytes(), 0) >> 32);
        }
        route.within("rollout").within(&name)
    }

    pub(super) fn define(rollout: &Scope<'_, impl Metrics>) -> RolloutMetrics {
        RolloutMetrics {
            weight: rollout.gauge("weight_ppm"),
            held: rollout.gauge("held"),
            capped: rollout.counter("capped"),
            shadow: rollout.counter("shadow"),
        }
    }

    pub(super) fn show_weight(&self, weight: EffectiveWeight, metrics: &impl Metrics) {
        metrics.set_gauge(self.weight, u64::from(weight.weight.ppm()));
        metrics.set_gauge(self.held, u64::from(weight.source == WeightSource::Held));
    }
}

impl JudgeMetrics {
    pub(super) fn define(weights: &[Fraction], judge: &Scope<'_, impl Metrics>) -> JudgeMetrics {
        let of_weight = |weight: &Fraction| {
            let scope = judge.within("weight").within(&weight.ppm().to_string());
            COUNTERS.map(|name| scope.counter(name))
        };
        JudgeMetrics {
            counters: weights.iter().flat_map(of_weight).collect(),
            failed: judge.gauge("failed"),
            failed_weight: judge.gauge("failed_weight_ppm"),
            passed: judge.gauge("passed"),
            worse: judge.gauge("against_decibans"),
            not_worse: judge.gauge("favour_decibans"),
            latency_threshold: judge.gauge("p99_edge_us"),
            timed_from: judge.gauge("p99_from_request"),
            shown: None,
        }
    }

    /// Adds 1 to a counter of a weight; a column without a counter is skipped.
    pub(super) fn count(&self, row: usize, column: usize, metrics: &impl Metrics) {
        if column < COUNTERS.len()
            && let Some(counter) = self.counters.get(row * COUNTERS.len() + column)
        {
            metrics.add(*counter, 1);
        }
    }

    pub(super) fn show_failure(&self, weight: Fraction, metrics: &impl Metrics) {
        metrics.set_gauge(self.failed_weight, u64::from(weight.ppm()));
        metrics.set_gauge(self.failed, 1);
    }

    pub(super) fn show_evidence(&mut self, analysis: &Analysis, metrics: &impl Metrics) {
        let values = [
            u64::from(analysis.verdict == Verdict::Pass),
            decibans(analysis.log_evidence_worse),
            decibans(analysis.log_evidence_not_worse),
        ];
        if self.shown.replace(values) == Some(values) {
            return;
        }
        for (gauge, value) in [self.passed, self.worse, self.not_worse].into_iter().zip(values) {
            metrics.set_gauge(gauge, value);
        }
    }

    /// `threshold` is in microseconds; `answers` is the number of the canary's answers before it was found.
    pub(super) fn show_threshold(&self, threshold: u64, answers: u64, metrics: &impl Metrics) {
        metrics.set_gauge(self.latency_threshold, threshold);
        metrics.set_gauge(self.timed_from, answers.saturating_add(1));
    }
}

/// The metrics of the cohort header: what happened to the assignments that requests arrived with.
#[derive(Debug)]
pub(crate) struct CohortMetrics {
    followed: MetricId,
    /// Assignments of rollouts that the policy does not have.
    foreign: MetricId,
    malformed: MetricId,
    forged: MetricId,
    stale: MetricId,
}

impl CohortMetrics {
    /// Defines the metrics in the scope of the policy.
    pub(crate) fn define(policy: &Scope<'_, impl Metrics>) -> CohortMetrics {
        let cohort = policy.within("cohort");
        CohortMetrics {
            followed: cohort.counter("followed"),
            foreign: cohort.counter("foreign"),
            malformed: cohort.counter("malformed"),
            forged: cohort.counter("forged"),
            stale: cohort.counter("stale"),
        }
    }

    /// Counts the assignments of a request. `weight` is the canary's weight for it, if its route has a canary; `has` returns
    /// whether the policy has a rollout.
    pub(crate) fn count(
        &self,
        inbound: &InboundAssignments,
        weight: Option<EffectiveWeight>,
        has: impl Fn(&str) -> bool,
        metrics: &impl Metrics,
    ) {
        let is_followed = weight.is_some_and(|weight| weight.source == WeightSource::Inherited);
        for (metric, count) in [
            (self.followed, u64::from(is_followed)),
            (self.foreign, inbound.rollouts().filter(|rollout| !has(rollout)).count() as u64),
            (self.malformed, inbound.refused.malformed),
            (self.forged, inbound.refused.forged),
            (self.stale, inbound.refused.stale),
        ] {
            if count > 0 {
                metrics.add(metric, count);
            }
        }
    }
}
