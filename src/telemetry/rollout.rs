//! A rollout: its weight, the evidence that is collected, the verdict, and what is logged of them.

use super::{RouteMeters, Scope};
use crate::canary::{Arm, Canary, Counts, Finding, Question, Share, Split, Term, Verdict, decibans};
use crate::host::{MetricId, Metrics};
use crate::policy::{Route, label};
use crate::units::Fraction;
use std::fmt;
use xxhash_rust::xxh64::xxh64;

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
    /// Which answer of the canary was the first after that, counted from 1; 0 where there is none yet.
    timed_from: MetricId,
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

impl RolloutMeters {
    pub(super) fn define(split: &Split, canary: &Canary, route: &Scope<'_, impl Metrics>) -> RolloutMeters {
        let mut name = label(&canary.rollout);
        if *name != *canary.rollout {
            // What was replaced in the name is told apart by its hash.
            name = format!("{name}_{}", xxh64(canary.rollout.as_bytes(), 0) >> 32);
        }
        let rollout = route.within("rollout").within(&name);
        let weights = canary.weights(split.weight(canary.destination));
        RolloutMeters {
            weight: rollout.gauge("weight_ppm"),
            held: rollout.gauge("held"),
            capped: rollout.counter("capped"),
            shadow: rollout.counter("shadow"),
            judge: canary.judge.map(|_| JudgeMeters::define(&weights, &rollout.within("judge"))),
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
    fn define(weights: &[Fraction], judge: &Scope<'_, impl Metrics>) -> JudgeMeters {
        let weights = weights.iter().map(|weight| {
            let at = judge.within("weight").within(&weight.ppm().to_string());
            let arm = |name: &str| {
                let arm = at.within(name);
                ArmMeters {
                    requests: arm.counter("requests"),
                    failures: arm.counter("failures"),
                    slow: arm.counter("slow"),
                }
            };
            WeightMeters {
                weight: *weight,
                canary: arm("canary"),
                others: arm("others"),
                handicap: at.counter("handicap"),
                margin: at.counter("margin"),
            }
        });
        JudgeMeters {
            weights: weights.collect(),
            failed: judge.gauge("failed"),
            failed_weight: judge.gauge("failed_weight_ppm"),
            passed: judge.gauge("passed"),
            against: judge.gauge("against_decibans"),
            favour: judge.gauge("favour_decibans"),
            edge: judge.gauge("p99_edge_us"),
            timed_from: judge.gauge("p99_from_request"),
        }
    }

    /// How many of the canary's answers in `counts` have come since it is known which are slow.
    pub fn timed(&self, counts: &[Counts], metrics: &impl Metrics) -> u64 {
        match metrics.value(self.timed_from) {
            0 => 0,
            first => Counts::canary_requests(counts).saturating_add(1).saturating_sub(first),
        }
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
        // Counted after that is known, so that no answer is taken for a timed one that was not.
        metrics.set_gauge(self.timed_from, Counts::canary_requests(&self.counts(metrics)).saturating_add(1));
    }

    /// Logs that nothing was known of the rollout.
    pub fn log_begin(&self, stand: &Stand<'_>, metrics: &impl Metrics) {
        let answers = Counts::canary_requests(&self.counts(metrics));
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
