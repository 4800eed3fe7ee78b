//! A rollout in one worker: the compiled `canary` block, its metrics, its evidence and its records in shared data.
//!
//! [`Rollout::select`] chooses the destination of a request, and returns a [`Sample`] if the judge wants to have its
//! answer. [`Rollout::complete`] counts the answer. A sample of a request without an answer is dropped: it is no evidence.
//! [`Rollout::tick`] merges and judges; the host calls it every [`TICK_PERIOD`].
//!
//! Invariants:
//! - A request reads shared data only if it is chosen for the canary. It is sent there only if the record that it has read
//!   holds no failed verdict with a rollback, and if the cap on exposure has counted it.
//! - The worker that finds a failure writes the verdict before it does anything else.
//! - Once a worker has learnt of a failed verdict, it keeps to it, and writes it again if the record is lost.
//! - When evidence is merged never depends on which side has failed. See [`crate::evidence`].

use super::cohort_header::CohortAssignment;
use super::decision::{EffectiveWeight, Selection, SelectionReason, WeightSource};
use super::exposure::{Exposure, try_expose};
use super::judge::{Analysis, Arm, Criterion, Judge, Verdict, WeightCounts, decibans};
use super::latency::LatencyHistogram;
use super::metrics::{JudgeMetrics, RolloutMetrics};
use super::policy::{Canary, Split};
use super::restarted_test::RestartedTest;
use super::slots::RolloutSlot;
use super::stages::Progress;
use super::state::RolloutState;
use crate::evidence::{MERGE_PERIOD, SharedCounts};
use crate::host::{Host, SharedData};
use crate::http::Request;
use crate::policy::label;
use crate::shared_data::{Change, SharedCell};
use crate::telemetry::Scope;
use crate::units::{Fraction, MonotonicInstant};
use std::fmt;
use std::sync::Arc;

/// How often [`Rollout::tick`] is called, in nanoseconds.
pub(crate) const TICK_PERIOD: u64 = MERGE_PERIOD;

/// How often a worker without new evidence reads the evidence of the others, in nanoseconds.
const REFRESH_PERIOD: u64 = 1_000_000_000;

/// The columns of the judge's counts: those of the counters in `metrics.rs`, and the last.
const CANARY: usize = 0;
const OTHERS: usize = 3;
/// Added to [`CANARY`] or [`OTHERS`].
const REQUESTS: usize = 0;
const FAILURES: usize = 1;
const SLOW: usize = 2;
const HANDICAP: usize = 6;
const MARGIN: usize = 7;
/// Answers of the canary that were compared with the latency threshold.
const TIMED: usize = 8;
const COLUMNS: usize = 9;

/// The rollout of one route in one worker.
#[derive(Debug)]
pub(crate) struct Rollout {
    /// The index of the route in the policy.
    route: usize,
    route_name: Arc<str>,
    split: Arc<Split>,
    canary: Arc<Canary>,
    metrics: RolloutMetrics,
    slot: RolloutSlot,
    /// The shared state, as this worker has read it last.
    state: RolloutState,
    /// The canary's weight at the last request or tick; `None` before the first request.
    weight: Option<EffectiveWeight>,
    /// Whether the cap on exposure is reached, which is final.
    is_cap_reached: bool,
    evidence: Option<Evidence>,
}

/// What the judge of a rollout needs.
#[derive(Debug)]
struct Evidence {
    judge: Judge,
    /// The weight of each row of the counts.
    weights: Vec<Fraction>,
    counts: SharedCounts,
    metrics: JudgeMetrics,
    latencies: LatencyHistogram,
    /// When the evidence of the other workers is read next.
    refresh_at: MonotonicInstant,
}

/// A request whose answer is evidence for the judge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The index of the route in the policy.
    route: usize,
    /// The row of the judge's counts for the canary's weight.
    row: usize,
    is_canary: bool,
    /// When the request was sent, if the judge compares latencies.
    sent: Option<MonotonicInstant>,
    /// How long the head of the answer took, in nanoseconds.
    latency: Option<u64>,
}

impl Sample {
    pub(crate) fn route(&self) -> usize {
        self.route
    }

    /// Starts the time of a request again that has waited before it is sent.
    pub(crate) fn restart(&mut self, now: impl FnOnce() -> MonotonicInstant) {
        if self.sent.is_some() {
            self.sent = Some(now());
        }
    }

    /// Ends the time of a request when the head of its answer arrives.
    pub(crate) fn answered(&mut self, now: impl FnOnce() -> MonotonicInstant) {
        if let (Some(sent), None) = (self.sent, self.latency) {
            self.latency = Some(now().saturating_since(sent));
        }
    }
}

/// The decision on one request.
#[derive(Debug)]
pub(crate) struct RolloutDecision {
    pub selection: Selection,
    pub weight: EffectiveWeight,
    /// The assignment for later hops; `None` if they get the one of an earlier hop, or none.
    pub assignment: Option<CohortAssignment>,
    pub sample: Option<Sample>,
}

impl fmt::Display for Rollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route={:?} rollout={:?}", self.route_name, self.canary.rollout)
    }
}

impl Rollout {
    /// Resumes the rollout of `route`, which is given by its index and its name. `None` if the route has no canary.
    /// `state_prefix` begins the keys of the policy, `scope` is the scope of the route's metrics.
    pub(crate) fn new<H: Host>(
        (route, name): (usize, &str),
        split: Option<&Arc<Split>>,
        state_prefix: &str,
        scope: &Scope<'_, H>,
        host: &H,
    ) -> Option<Box<Rollout>> {
        let split = split?;
        let canary = split.canary.as_ref()?;
        let (rollout_name, scope) = (&canary.rollout, RolloutMetrics::scope(canary, scope));
        let slot = RolloutSlot::claim(state_prefix, &label(name), rollout_name, host);
        if canary.max_requests.is_some() {
            slot.open_exposed(state_prefix, rollout_name, host);
        }
        let evidence = canary.judge.map(|judge| {
            let weights = canary.weights(split.weight(canary.destination));
            // The record may have rows of a rollout that had the slot before.
            let key = |weight: &Fraction| slot.rollout & !0xf_ffff | u64::from(weight.ppm());
            let mut counts = SharedCounts::new(slot.counts_key(), weights.iter().map(key).collect(), COLUMNS);
            // Without the counts of the others the worker begins with none, and reads them at a tick.
            let _ = counts.merge(host);
            let metrics = JudgeMetrics::define(&weights, &scope.within("judge"));
            let refresh_at = MonotonicInstant::ZERO;
            Evidence { judge, weights, counts, metrics, latencies: LatencyHistogram::default(), refresh_at }
        });
        let mut rollout = Box::new(Rollout {
            route,
            route_name: name.into(),
            split: split.clone(),
            canary: canary.clone(),
            metrics: RolloutMetrics::define(&scope),
            state: RolloutState::new(slot.rollout),
            slot,
            weight: None,
            is_cap_reached: false,
            evidence,
        });
        rollout.resume(state_prefix, host);
        Some(rollout)
    }

    /// Reads the state that the rollout has reached.
    fn resume(&mut self, state_prefix: &str, host: &impl Host) {
        let Some(evidence) = &self.evidence else { return };
        let answers = WeightCounts::canary_requests(&evidence.weight_counts());
        let (state, is_new) = self.slot.open_state(state_prefix, &self.canary.rollout, host);
        self.adopt(state, host);
        if is_new {
            log::info!("canary judge: {self} verdict=insufficient canary_requests={answers}");
        } else if self.has_failed() && self.slot.is_switched {
            log::warn!("canary judge: {self} verdict=fail action={} since=earlier", self.action());
        }
    }

    /// The name of the rollout.
    pub(crate) fn name(&self) -> &str {
        &self.canary.rollout
    }

    /// The weight that the route gives to the canary.
    fn route_weight(&self) -> Fraction {
        self.split.weight(self.canary.destination)
    }

    fn has_failed(&self) -> bool {
        self.state.verdict == Verdict::Fail
    }

    /// What is done about a canary that fails.
    fn action(&self) -> &'static str {
        match self.canary.judge {
            _ if self.canary.shadow => "shadow",
            Some(judge) if judge.rolls_back => "rollback",
            _ => "report",
        }
    }

    /// Chooses the destination of a request. `inherited` is the assignment of an earlier hop. It is followed unless the
    /// canary has failed here.
    pub(crate) fn select(
        &mut self,
        request: &Request<'_>,
        inherited: Option<CohortAssignment>,
        host: &impl Host,
    ) -> RolloutDecision {
        let (split, canary, route) = (self.split.clone(), self.canary.clone(), self.route_name.clone());
        let key = split.key(request, &route, host);
        let mut drawn = None;
        let mut choose = |inherited: Option<CohortAssignment>, weight: Fraction| match inherited {
            Some(inherited) => split.follow(inherited, weight, key.as_deref()),
            None => split.choose(weight, key.as_deref(), || *drawn.get_or_insert_with(|| host.random())),
        };
        let (mut inherited, mut effective) = self.weight_for(inherited, host);
        let mut selection = choose(inherited, effective.weight);

        // Read the state after the choice: only a request that would go to the canary needs the latest verdict.
        if selection.destination == canary.destination && self.learns_of_failure(host) {
            (inherited, effective) = self.weight_for(inherited, host);
            selection = choose(inherited, effective.weight);
        }

        // The cap last: it counts only requests that would be sent to the canary.
        if selection.destination == canary.destination
            && let Some(cap) = canary.max_requests
            && !self.is_exposed(cap, host)
        {
            host.add(self.metrics.capped, 1);
            effective = EffectiveWeight { weight: Fraction::NONE, source: WeightSource::CapReached };
            selection = choose(inherited, effective.weight);
        }
        if canary.shadow {
            let actual = choose(inherited, self.route_weight());
            if actual.destination != selection.destination {
                host.add(self.metrics.shadow, 1);
            }
            selection = actual;
        }
        RolloutDecision {
            selection,
            weight: effective,
            assignment: self.assignment(selection, effective),
            sample: self.sample(selection, effective, host),
        }
    }

    /// The assignment that is followed, and the weight of the canary for a request.
    fn weight_for(
        &mut self,
        inherited: Option<CohortAssignment>,
        host: &impl Host,
    ) -> (Option<CohortAssignment>, EffectiveWeight) {
        let effective = self.effective_weight(host);
        if self.weight != Some(effective) {
            self.announce(effective, host);
        }
        let inherited = inherited.filter(|_| effective.source != WeightSource::RolledBack && !self.canary.shadow);
        let of_inherited =
            |inherited: CohortAssignment| EffectiveWeight { weight: inherited.weight, source: WeightSource::Inherited };
        (inherited, inherited.map_or(effective, of_inherited))
    }

    /// Reads the shared state. Whether the worker has learnt only now that the canary has failed.
    fn learns_of_failure(&mut self, host: &impl Host) -> bool {
        if self.evidence.is_none() || self.has_failed() {
            return false;
        }
        if let Some(state) = self.slot.state.read(host) {
            self.adopt(state, host);
        }
        self.has_failed()
    }

    /// Counts a request for the canary. Whether the cap on exposure admits it.
    fn is_exposed(&mut self, cap: u64, host: &impl Host) -> bool {
        if self.is_cap_reached {
            return false;
        }
        match try_expose(&self.slot.exposed, self.slot.rollout, cap, host) {
            Ok(Exposure::Admitted { is_last }) => {
                if is_last {
                    log::info!("canary capped: {self} requests={cap}");
                }
                true
            }
            Ok(Exposure::CapReached) => {
                self.is_cap_reached = true;
                false
            }
            // The request was not counted, so it must not be sent to the canary.
            Err(_) => false,
        }
    }

    /// The weight that the canary has now, or would have if it were not in shadow mode.
    fn effective_weight(&self, host: &impl Host) -> EffectiveWeight {
        let scheduled = || self.canary.scheduled_weight(self.route_weight(), || host.wall_now());
        let Some(Evidence { judge, .. }) = &self.evidence else { return scheduled() };
        if self.has_failed() && judge.rolls_back {
            return EffectiveWeight { weight: Fraction::NONE, source: WeightSource::RolledBack };
        }
        let waiting = if judge.waits_for_pass { self.waiting_weight(host) } else { None };
        let effective = waiting.unwrap_or_else(scheduled);
        // A failure that is only reported leaves the canary at the weight that it failed at.
        let most = if self.has_failed() { self.state.verdict_weight } else { Fraction::WHOLE };
        if effective.weight > most {
            return EffectiveWeight { weight: most, source: WeightSource::Held };
        }
        effective
    }

    /// The canary's weight if a stage begins only after the canary has passed. `None` before the first stage.
    fn waiting_weight(&self, host: &impl Host) -> Option<EffectiveWeight> {
        let schedule = self.canary.schedule.as_ref()?;
        let now = host.wall_now();
        schedule.stage(now)?;
        let progress = schedule.progress(self.state.progress);
        let is_due = schedule.due(progress).is_some_and(|due| now >= due);
        let source = if is_due { WeightSource::Held } else { WeightSource::Stage(progress.stage) };
        Some(EffectiveWeight { weight: schedule.weight(Some(progress.stage)), source })
    }

    /// The weight that requests are really sent by.
    fn weight_in_force(&self, host: &impl Host) -> Fraction {
        if self.canary.shadow { self.route_weight() } else { self.effective_weight(host).weight }
    }

    /// Shows a new weight, and logs a new stage unless another worker has logged it.
    #[cold]
    #[inline(never)]
    fn announce(&mut self, effective: EffectiveWeight, host: &impl Host) {
        self.weight = Some(effective);
        self.metrics.show_weight(effective, host);
        let stage = match effective.source {
            WeightSource::Stage(_) => "entered",
            WeightSource::Held => "held",
            _ => return,
        };
        let logged = Some((effective.weight, effective.source == WeightSource::Held));
        let mut is_new = false;
        let updated = self.slot.state.update(host, self.state, &mut |state| {
            is_new = state.logged != logged;
            state.logged = logged;
        });
        if let Ok((state, _)) = updated {
            self.adopt(state, host);
        }
        if is_new {
            let verdict = match self.state.verdict {
                _ if self.evidence.is_none() => "none",
                Verdict::Insufficient => "insufficient",
                Verdict::Pass => "pass",
                Verdict::Fail => "fail",
            };
            log::info!("canary stage: {self} stage={stage} weight={} verdict={verdict}", effective.weight);
        }
    }

    /// The assignment that later hops get.
    fn assignment(&self, selection: Selection, effective: EffectiveWeight) -> Option<CohortAssignment> {
        let bucket_ppm = match selection.reason {
            SelectionReason::Inherited { .. } if effective.source == WeightSource::Inherited => return None,
            SelectionReason::OnlyDestination => return None,
            SelectionReason::Cohort { bucket_ppm }
            | SelectionReason::Drawn { bucket_ppm }
            | SelectionReason::Inherited { bucket_ppm } => bucket_ppm,
        };
        let weight = if self.canary.shadow { self.route_weight() } else { effective.weight };
        Some(CohortAssignment { bucket_ppm, weight })
    }

    /// The sample of a request. Evidence is evaluated by the weight in force, so a request that an earlier hop has decided
    /// by another weight is none.
    fn sample(&self, selection: Selection, effective: EffectiveWeight, host: &impl Host) -> Option<Sample> {
        let evidence = self.evidence.as_ref().filter(|_| !self.has_failed())?;
        let weight = match self.weight {
            Some(effective) if !self.canary.shadow => effective.weight,
            _ => self.route_weight(),
        };
        if effective.source == WeightSource::Inherited && effective.weight != weight {
            return None;
        }
        Some(Sample {
            route: self.route,
            row: evidence.weights.iter().position(|known| *known == weight)?,
            is_canary: selection.destination == self.canary.destination,
            sent: evidence.judge.p99_increase.map(|_| host.now()),
            latency: None,
        })
    }

    /// Counts the answer to a sample, and judges if that is due.
    pub(crate) fn complete(&mut self, sample: Sample, failed: bool, host: &impl Host) {
        let Some(evidence) = &mut self.evidence else { return };
        let judge = evidence.judge;
        let Sample { row, is_canary, latency, .. } = sample;
        let arm = if is_canary { CANARY } else { OTHERS };
        evidence.count(row, arm + REQUESTS, host);
        let mut is_failure = failed;
        if failed {
            evidence.count(row, arm + FAILURES, host);
        } else if !is_canary {
            let draw = host.random();
            for (share, column) in [(judge.tolerance, HANDICAP), (judge.margin(), MARGIN)] {
                if share.includes(draw) {
                    evidence.count(row, column, host);
                    is_failure = true;
                }
            }
        }
        let mut threshold = None;
        if let (Some(increase), Some(latency)) = (judge.p99_increase, latency) {
            let known = self.state.latency_threshold.saturating_mul(1_000);
            if known > 0 {
                let most = if is_canary { known.saturating_add(increase) } else { known };
                if is_canary {
                    evidence.count(row, TIMED, host);
                }
                if latency > most {
                    evidence.count(row, arm + SLOW, host);
                    is_failure = true;
                }
            } else if !is_canary {
                threshold = evidence.latencies.add(latency);
            }
        }
        if let Some(threshold) = threshold {
            self.agree_on_threshold(threshold.div_ceil(1_000).max(1), host);
        }
        if is_failure && !self.has_failed() && self.merges_soon(host) {
            self.evaluate(host);
        }
    }

    fn merges_soon(&mut self, host: &impl Host) -> bool {
        self.evidence.as_mut().is_some_and(|evidence| evidence.counts.merge_soon(host.now(), host))
    }

    /// Agrees with the other workers on the latency threshold: the first one, in microseconds, is everyone's.
    #[cold]
    #[inline(never)]
    fn agree_on_threshold(&mut self, threshold: u64, host: &impl Host) {
        let mut is_new = false;
        let updated = self.slot.state.update(host, self.state, &mut |state| {
            is_new = state.latency_threshold == 0;
            if is_new {
                state.latency_threshold = threshold;
            }
        });
        let (Ok((state, _)), Some(evidence)) = (updated, &mut self.evidence) else { return };
        evidence.latencies = LatencyHistogram::default();
        if is_new {
            let answers = WeightCounts::canary_requests(&evidence.weight_counts());
            evidence.metrics.show_threshold(threshold, answers, host);
        }
        self.adopt(state, host);
    }

    /// Takes over the shared state. A failed verdict that this worker has learnt of stays.
    fn adopt(&mut self, state: RolloutState, host: &impl Host) {
        let had_failed = self.has_failed();
        if had_failed && state.verdict != Verdict::Fail {
            return;
        }
        self.state = state;
        if self.has_failed()
            && !had_failed
            && let Some(evidence) = &self.evidence
        {
            evidence.metrics.show_failure(state.verdict_weight, host);
        }
    }

    /// Merges the evidence and judges, if there is new evidence or the evidence of the other workers is to be read.
    pub(crate) fn tick(&mut self, host: &impl Host) {
        let Some(evidence) = &mut self.evidence else { return };
        let now = host.now();
        let is_due = now >= evidence.refresh_at;
        if !is_due && !evidence.counts.is_dirty() {
            return;
        }
        if is_due {
            evidence.refresh_at = now.saturating_add(REFRESH_PERIOD);
        }
        // A merge that was given up keeps the counts for the next one.
        let _ = evidence.counts.merge(host);
        self.refresh(host);
        if self.evaluate(host) == Verdict::Pass {
            self.enter_next_stage(host);
        }
        let effective = self.effective_weight(host);
        if self.weight.is_some_and(|known| known != effective) {
            self.announce(effective, host);
        }
    }

    /// Reads the shared state, and writes a failed verdict again that the record has lost.
    fn refresh(&mut self, host: &impl Host) {
        let known = self.state;
        let state = if self.has_failed() {
            let restore = &mut |state: &mut RolloutState| {
                if state.verdict != Verdict::Fail {
                    (state.verdict, state.verdict_weight) = (known.verdict, known.verdict_weight);
                }
            };
            self.slot.state.update(host, known, restore).ok().map(|(state, _)| state)
        } else {
            self.slot.state.read(host)
        };
        if let Some(state) = state {
            self.adopt(state, host);
        }
    }

    /// Judges by the merged evidence, and records a new verdict.
    #[inline(never)]
    fn evaluate(&mut self, host: &impl Host) -> Verdict {
        if self.has_failed() {
            return Verdict::Fail;
        }
        let Some(evidence) = &self.evidence else { return Verdict::Insufficient };
        let analysis = evidence.analyse(&self.slot.restarted, self.slot.rollout, host);
        if analysis.verdict != self.state.verdict {
            self.record_verdict(&analysis, host);
        }
        if let Some(evidence) = &mut self.evidence {
            evidence.metrics.show_evidence(&analysis, host);
        }
        analysis.verdict
    }

    /// Writes a verdict to the shared state, and logs it if it is new. A failed verdict is final.
    #[cold]
    #[inline(never)]
    fn record_verdict(&mut self, analysis: &Analysis, host: &impl Host) {
        let weight = self.weight_in_force(host);
        let mut is_new = false;
        let updated = self.slot.state.update(host, self.state, &mut |state| {
            is_new = state.verdict != Verdict::Fail && state.verdict != analysis.verdict;
            if is_new {
                (state.verdict, state.verdict_weight) = (analysis.verdict, weight);
            }
        });
        match updated {
            Ok((state, _)) => self.adopt(state, host),
            // The verdict holds for this worker at least; it is written again at a tick.
            Err(_) if analysis.verdict == Verdict::Fail => {
                let state = RolloutState { verdict: Verdict::Fail, verdict_weight: weight, ..self.state };
                self.adopt(state, host);
            }
            Err(_) => return,
        }
        if is_new {
            self.log_verdict(analysis, weight);
        }
    }

    /// Lets the next stage begin if it is due. To be called while the canary has passed.
    fn enter_next_stage(&mut self, host: &impl Host) {
        let canary = self.canary.clone();
        let (Some(schedule), Some(Judge { waits_for_pass: true, .. })) = (&canary.schedule, &canary.judge) else {
            return;
        };
        let now = host.wall_now();
        let next = |known: Option<Progress>| schedule.enter_next(schedule.progress(known), now);
        if schedule.stage(now).is_none() || next(self.state.progress).is_none() {
            return;
        }
        let updated = self.slot.state.update(host, self.state, &mut |state| {
            state.progress = next(state.progress).or(state.progress);
        });
        if let Ok((state, _)) = updated {
            self.adopt(state, host);
        }
    }

    /// Merges what this worker has counted. To be called when the configuration goes away.
    pub(crate) fn on_shutdown(&mut self, host: &impl Host) {
        if let Some(evidence) = &mut self.evidence
            && evidence.counts.is_dirty()
        {
            // If the merge is given up, the counts of both sides are lost.
            let _ = evidence.counts.merge(host);
        }
    }

    /// Logs a new verdict with the numbers that have decided.
    fn log_verdict(&self, analysis: &Analysis, weight: Fraction) {
        let (verdict, action) = match analysis.verdict {
            Verdict::Insufficient => ("insufficient", "none"),
            Verdict::Pass => ("pass", "none"),
            Verdict::Fail => ("fail", self.action()),
        };
        let criterion = match analysis.criterion {
            Criterion::Errors => "errors",
            Criterion::Limit => "limit",
            Criterion::Slowness => "p99",
        };
        let Analysis { canary, others, .. } = analysis;
        let needed = self.canary.judge.map_or(0, |judge| decibans(judge.needed()));
        log::warn!(
            "canary verdict: {self} verdict={verdict} action={action} question={criterion} weight={weight} \
             canary_requests={} canary_failures={} canary_slow={} others_requests={} others_failures={} \
             others_slow={} against_db={} favour_db={} needed_db={needed}",
            canary.requests,
            canary.failures,
            canary.slow,
            others.requests,
            others.failures,
            others.slow,
            decibans(analysis.log_evidence_worse),
            decibans(analysis.log_evidence_not_worse),
        );
    }
}

impl Evidence {
    /// Counts an answer.
    fn count(&mut self, row: usize, column: usize, host: &impl Host) {
        self.counts.add(row, column, 1);
        self.metrics.count(row, column, host);
    }

    /// The merged counts of all workers.
    fn weight_counts(&self) -> Vec<WeightCounts> {
        let of = |(row, weight): (usize, &Fraction)| {
            let at = |column: usize| self.counts.totals(row).get(column).copied().unwrap_or_default();
            let arm = |side: usize| Arm {
                requests: at(side + REQUESTS),
                failures: at(side + FAILURES),
                slow: at(side + SLOW),
            };
            WeightCounts {
                weight: *weight,
                canary: arm(CANARY),
                others: arm(OTHERS),
                handicap: at(HANDICAP),
                margin: at(MARGIN),
            }
        };
        self.weights.iter().enumerate().map(of).collect()
    }

    /// Judges by the merged counts of all workers.
    fn analyse(&self, restarted: &SharedCell<RestartedTest>, rollout: u64, store: &impl SharedData) -> Analysis {
        let counts = self.weight_counts();
        let timed = (0..self.weights.len()).filter_map(|row| self.counts.totals(row).get(TIMED)).sum();
        let ratios = restarted.update(store, |stored| {
            let known = stored.record().filter(|test| test.rollout == rollout);
            let known = known.unwrap_or_else(|| RestartedTest::default().of(rollout));
            let next = known.next(&self.judge, &counts);
            let ratios = next.as_ref().unwrap_or(&known).log_likelihood_ratios(&self.judge, &counts);
            match next {
                Some(next) => Change::Write(next, ratios),
                None => Change::Keep(ratios),
            }
        });
        // If the update is given up, the whole rollout is evidence, and its recent part is not.
        let recent = ratios.unwrap_or_default();
        self.judge.judge(&counts, timed, recent)
    }
}

#[cfg(test)]
mod tests {
    use super::super::policy::Steering;
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::{Node, Value};
    use crate::host::sim::Sim;
    use crate::http::{HeaderNames, encode_headers};
    use std::time::Duration;

    const SECOND: u64 = 1_000_000_000;

    /// The rollouts of several workers of one proxy, and when each ticks.
    struct Proxy {
        host: Sim,
        split: Arc<Split>,
        workers: Vec<Rollout>,
    }

    impl Proxy {
        fn new(workers: usize, seed: u64, weight: u32, canary: &str) -> Proxy {
            let stable = 100 - weight;
            let text = format!(
                r#"{{"route": [{{"destination": {{"host": "h", "subset": "v1"}}, "weight": {stable}}},
                               {{"destination": {{"host": "h", "subset": "v2"}}, "weight": {weight}}}],
                    "canary": {{"destination": "v2", "rollout": "r", {canary}}}}}"#
            );
            let (node, report) = (Node::from_json(text.as_bytes()).unwrap(), Report::default());
            let mut fields = Value::root(&node, &report).object().unwrap();
            let split = Split::read(&mut fields, &Steering::default(), &mut HeaderNames::default());
            fields.end();
            assert_eq!(report.into_diagnostics().len(), 0, "the policy of the test has no errors");
            let mut proxy = Proxy { host: Sim::new(seed), split: Arc::new(split.unwrap()), workers: Vec::new() };
            proxy.workers = (0..workers).map(|_| proxy.worker()).collect();
            proxy
        }

        /// Another worker, as a new configuration makes one.
        fn worker(&self) -> Rollout {
            let scope = Scope::policy("p", &self.host);
            *Rollout::new((0, "default"), Some(&self.split), "t/", &scope, &self.host).unwrap()
        }

        /// Sends a request through `worker`; whether it goes to the canary.
        fn select(&mut self, worker: usize) -> (bool, Option<Sample>) {
            let headers = encode_headers(&[(":method", &b"GET"[..]), (":path", b"/")]);
            let names = HeaderNames::default();
            let request = Request::parse(&headers, &names);
            let decision = self.workers[worker].select(&request, None, &self.host);
            (decision.selection.destination == 1, decision.sample)
        }

        /// Sends a request through `worker`, which the canary or the others answer with a failure as `fails` decides.
        fn exchange(&mut self, worker: usize, fails: impl Fn(bool, u64) -> bool) -> bool {
            let (is_canary, sample) = self.select(worker);
            let draw = self.host.random();
            if let Some(sample) = sample {
                self.workers[worker].complete(sample, fails(is_canary, draw), &self.host);
            }
            is_canary
        }

        /// Moves the clock, and ticks those workers that are due in this step. Their ticks are evenly spread.
        fn advance(&mut self, nanoseconds: u64) {
            let before = self.host.now().as_nanos();
            self.host.advance(Duration::from_nanos(nanoseconds));
            let after = self.host.now().as_nanos();
            let phase = TICK_PERIOD / self.workers.len() as u64;
            for (worker, offset) in self.workers.iter_mut().zip((0..).step_by(phase as usize)) {
                if (before + offset) / TICK_PERIOD != (after + offset) / TICK_PERIOD {
                    worker.tick(&self.host);
                }
            }
        }
    }

    fn percent(percent: u32) -> Fraction {
        Fraction::from_ppm(percent * 10_000)
    }

    /// The number of requests that a canary of 10 % gets which fails in 20 % of its answers, while the others fail in 1 %.
    fn exposed(workers: usize, seed: u64, requests_per_second: u64) -> u64 {
        let mut proxy = Proxy::new(workers, seed, 10, r#""judge": {}"#);
        let mut exposed = 0;
        for _ in 0..40_000 {
            proxy.advance(SECOND / requests_per_second);
            let worker = proxy.host.random() as usize % workers;
            let fails = |is_canary, draw| percent(if is_canary { 20 } else { 1 }).includes(draw);
            exposed += u64::from(proxy.exchange(worker, fails));
            if proxy.workers.iter().any(|worker| worker.has_failed()) {
                break;
            }
        }
        for request in 0..1_000 {
            proxy.advance(SECOND / requests_per_second);
            let is_canary = proxy.exchange(request % workers, |_, _| false);
            assert!(!is_canary, "a worker sent another request to a canary that has failed");
        }
        exposed
    }

    #[test]
    fn eight_workers_find_a_bad_canary_almost_as_early_as_exact_counting() {
        let median = |workers: usize| {
            let mut exposed: Vec<u64> = (0..101).map(|seed| exposed(workers, seed + 1, 1_000)).collect();
            exposed.sort_unstable();
            exposed[50]
        };
        for workers in [1, 2, 4, 8] {
            let median = median(workers);
            println!("{workers} workers: median {median} canary requests");
            assert!(median <= 25, "{workers} workers: median {median} canary requests");
        }
    }

    #[test]
    fn a_flood_of_failures_is_merged_a_hundred_times_a_second_at_the_most() {
        for workers in [1, 2, 4] {
            // Both sides fail always, so there is no verdict that would end the evidence.
            let mut proxy = Proxy::new(workers, 1, 10, r#""judge": {}"#);
            let counts = proxy.workers[0].slot.counts_key();
            let mut merges = vec![Vec::new(); workers];
            for request in 0..90_000 {
                proxy.advance(SECOND / 30_000);
                let worker = request % workers;
                let version = |proxy: &Proxy| proxy.host.get(&counts).map(|(_, version)| version);
                let before = version(&proxy);
                proxy.exchange(worker, |_, _| true);
                if version(&proxy) != before {
                    merges[worker].push(proxy.host.now().as_nanos());
                }
            }
            for merges in &merges {
                for (at, first) in merges.iter().enumerate() {
                    let within = merges[at..].iter().take_while(|merge| **merge < first + SECOND).count();
                    assert!(within <= 100, "{within} merges in one second with {workers} workers");
                }
                assert!(merges.len() >= 150, "the failures are merged: {}", merges.len());
            }
            proxy.workers.iter_mut().for_each(|worker| worker.on_shutdown(&proxy.host));
            let counted = proxy.worker().evidence.unwrap().weight_counts()[0];
            assert_eq!(counted.canary.requests + counted.others.requests, 90_000, "no answer is lost");
        }
    }

    #[test]
    fn a_request_that_goes_to_the_others_reads_no_shared_data() {
        let mut proxy = Proxy::new(2, 1, 50, r#""judge": {}, "maxRequests": 1000000"#);
        proxy.select(0);
        let reads = |proxy: &Proxy| proxy.host.reads();
        for _ in 0..200 {
            let before = reads(&proxy);
            let (is_canary, _) = proxy.select(0);
            assert_eq!(reads(&proxy) - before, if is_canary { 2 } else { 0 }, "one for the state, one for the cap");
        }
    }

    #[test]
    fn a_verdict_holds_for_another_worker_and_after_its_record_is_lost() {
        let mut proxy = Proxy::new(2, 1, 50, r#""judge": {}"#);
        while !proxy.workers[0].has_failed() {
            proxy.exchange(0, |is_canary, _| is_canary);
        }
        for _ in 0..100 {
            assert!(!proxy.exchange(1, |_, _| false));
        }
        proxy.host.overwrite("t/rollout/default/0/state", b"garbage");
        proxy.advance(2 * SECOND);
        assert!(proxy.worker().has_failed(), "the verdict was written again");
    }

    #[test]
    fn a_stage_is_logged_once_over_all_workers() {
        let stages =
            r#""startTime": "2024-01-01T00:00:00Z", "stages": [{"weight": 10, "duration": "1s"}, {"weight": 50}]"#;
        let mut proxy = Proxy::new(3, 1, 10, stages);
        let writes = |proxy: &Proxy| proxy.host.writes();
        let before = writes(&proxy);
        for worker in [0, 1, 2, 0, 1, 2] {
            proxy.select(worker);
        }
        assert_eq!(writes(&proxy) - before, 1, "the worker that logs the stage writes that it is logged");
    }
}
