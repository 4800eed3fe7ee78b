//! The judge: whether the canary fails more than the other destinations, found as early as the answers allow it.
//!
//! # The test
//!
//! Every request of the route goes to the canary with probability *w*, its weight. If the canary fails no more often than
//! the others, then a failure is the canary's with a probability of at most *w*. If the canary's failures are *r* times as
//! likely, that probability is *w·r / (1 + w·(r - 1))*. So a failure of the canary multiplies the likelihood ratio of
//! "*r* times" to "no more often" by *r / (1 + w·(r - 1))*, and a failure of the others by *1 / (1 + w·(r - 1))*. With *h*
//! failures of the canary, and *n* failures of all destinations while the weight was *w*, the logarithm of the product is
//!
//! > h · ln r - Σ n · ln(1 + w·(r - 1))          (the sum over all weights of the rollout)
//!
//! and the *evidence* is the mean of the product over a fixed set of ratios *r*. While the canary is no worse, the
//! expectation of each factor is at most 1, whatever came before. The evidence is then a nonnegative supermartingale that
//! begins at 1, and by Ville's inequality the probability that it *ever* reaches 1/α is at most α. So the judge may
//! evaluate after every answer and act on the result. (Lindon and Malek, "Anytime-valid inference for multinomial count
//! data", NeurIPS 2022, arXiv 2205.14762; there the mixture is a Dirichlet distribution, here it is a handful of points,
//! which need no gamma function.) The formula uses counts only, which workers can add up in any order.
//!
//! # One test, three criteria, two conclusions each
//!
//! - *Errors*: the canary against the others. The tolerance is a handicap: of the successes of the others, the given
//!   share is drawn at random and counted as failures. The test is then whether the canary fails in more than
//!   *p + t·(1 - p)* of its requests, where *p* is the failure rate of the others and *t* the tolerance.
//! - *Slowness*: the same with slow answers in place of failures. An answer of the others is slow above a threshold near
//!   their 99th percentile, an answer of the canary above that threshold plus the tolerance.
//! - *Limit*: the canary against a fixed rate. Each request of the canary is a trial, which fails with a probability of
//!   at most that rate; *r* is the ratio of the odds. The formula is the same with the rate in place of *w* and the
//!   requests in place of the failures.
//!
//! The ratios above 1 are evidence that the canary is worse. The ratios below 1 are evidence that it fails *less* than the
//! tolerance allows. (For errors that tolerance is at least [`LEAST_MARGIN`], since no finite evidence shows that a canary
//! is no worse at all. For slowness the canary has to be slow less often than the others, or in less than one of a hundred
//! answers, which is the meaning of a 99th percentile: the evidence is the mean of both.) A canary fails if it fails one
//! criterion, so with *k* criteria the evidence has to be *k* times 1/α; it passes if it passes all of them. Otherwise the
//! verdict is that the evidence is insufficient.
//!
//! # The whole rollout and its recent part
//!
//! WeightCounts since the beginning contain all earlier successes of the canary, so a canary that breaks after an hour of good
//! service would fail late. Half of the evidence that it is worse is therefore taken from [`super::restarted_test`], which
//! begins the same test again and again.
//!
//! # Assumptions
//!
//! Requests are alike on both sides and fail independently of each other. A few heavy users of the canary make its real
//! share differ from its weight. The judge therefore uses the one of the two that makes the claim harder: the greater one
//! for the claim that the canary is worse, the smaller one for the claim that it is not. That only lowers the evidence, so
//! the bound on false alarms holds. One user whose every request fails still counts as many users, on whichever side the
//! cohort has put this user.

use super::logarithm::{exp, ln};
use crate::units::Fraction;

/// The `judge` block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judge {
    /// By how much the canary's failure rate may exceed the rate of the others.
    pub tolerance: Fraction,
    /// The failure rate that the canary may not exceed, whatever the rate of the others.
    pub limit: Option<Fraction>,
    /// By how many nanoseconds the canary's 99th percentile may exceed the percentile of the others.
    pub p99_increase: Option<u64>,
    pub confidence: Fraction,
    /// Whether a canary that failed gets no more requests. Otherwise the failure is only reported, and no further stage
    /// begins.
    pub rolls_back: bool,
    /// Whether the next stage begins only after the canary has passed. Otherwise it begins unless the canary has failed.
    pub waits_for_pass: bool,
}

/// The least margin of the failure rate within which a canary has to be shown to be.
const LEAST_MARGIN: Fraction = Fraction::from_ppm(10_000);

/// The share of answers above a 99th percentile.
const PAST_P99: f64 = 0.01;

/// The answers of one side while the canary had one weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arm {
    pub requests: u64,
    pub failures: u64,
    pub slow: u64,
}

/// The answers of both sides while the canary had one weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightCounts {
    pub weight: Fraction,
    pub canary: Arm,
    pub others: Arm,
    /// Successes of the others that count as failures: those that the draw for [`Judge::tolerance`] has chosen.
    pub handicap: u64,
    /// Successes of the others that the draw for [`Judge::margin`] has chosen.
    pub margin: u64,
}

/// The conclusion about a canary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// The evidence is insufficient.
    #[default]
    Insufficient,
    Pass,
    Fail,
}

/// A criterion that a canary is judged by. Its number is its index in [`LogLikelihoodRatios`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Criterion {
    Errors,
    Limit,
    Slowness,
}

/// A verdict, and its evidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Analysis {
    pub verdict: Verdict,
    /// The criterion with the most evidence that the canary is worse.
    pub criterion: Criterion,
    /// The natural logarithm of the evidence that the canary is worse, divided by the number of criteria.
    pub log_evidence_worse: f64,
    /// The natural logarithm of the evidence that the canary is not worse, in the criterion with the least.
    pub log_evidence_not_worse: f64,
    pub canary: Arm,
    pub others: Arm,
}

/// For each criterion the natural logarithm of the likelihood ratio of each of [`DEGRADED_RATIOS`].
pub type LogLikelihoodRatios = [[f64; DEGRADED_RATIOS.len()]; 3];

/// The ratios of the hypotheses that the canary is worse: how many times as likely its failures are.
const DEGRADED_RATIOS: [f64; 8] = [1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 32.0, 64.0];
/// The ratios of the hypotheses that the canary is not worse.
const IMPROVED_RATIOS: [f64; 6] = [1.0 / 1.5, 1.0 / 2.0, 1.0 / 3.0, 1.0 / 5.0, 1.0 / 16.0, 1.0 / 64.0];

impl Judge {
    /// The margin of the failure rate within which the canary has to be shown to be before it passes.
    pub fn margin(&self) -> Fraction {
        self.tolerance.max(LEAST_MARGIN)
    }

    /// The natural logarithm of the evidence that a verdict needs.
    pub fn needed(&self) -> f64 {
        let alpha = Fraction::WHOLE.ppm().saturating_sub(self.confidence.ppm()).max(1);
        ln(1_000_000.0 / f64::from(alpha))
    }

    /// Judges a canary. `counts` has one entry for each weight of the rollout. `timed` is the number of the canary's answers
    /// that were compared with the latency threshold. `recent` are the likelihood ratios of the restarted test.
    pub fn judge(&self, counts: &[WeightCounts], timed: u64, recent: Option<LogLikelihoodRatios>) -> Analysis {
        let sum = |side: fn(&WeightCounts) -> Arm| {
            counts.iter().map(side).fold(Arm::default(), |sum, arm| Arm {
                requests: sum.requests.saturating_add(arm.requests),
                failures: sum.failures.saturating_add(arm.failures),
                slow: sum.slow.saturating_add(arm.slow),
            })
        };
        let (canary, others) = (sum(|counts| counts.canary), sum(|counts| counts.others));
        let mut analysis = Analysis {
            verdict: Verdict::Insufficient,
            criterion: Criterion::Errors,
            log_evidence_worse: f64::NEG_INFINITY,
            log_evidence_not_worse: f64::INFINITY,
            canary,
            others,
        };
        let whole = self.log_likelihood_ratios(counts);
        let mut criteria = 0_u32;
        let mut add = |criterion: Criterion, not_worse: f64| {
            let of =
                |ratios: &LogLikelihoodRatios| ratios.get(criterion as usize).map_or(f64::NEG_INFINITY, |of| mean(of));
            analysis.add(criterion, mean(&[of(&whole), recent.as_ref().map_or(f64::NEG_INFINITY, of)]), not_worse);
            criteria += 1;
        };
        let not_worse = |hits: u64, trials: &[(u64, f64)]| mean(&likelihoods(&IMPROVED_RATIOS, hits, trials));
        add(
            Criterion::Errors,
            not_worse(
                canary.failures,
                &arm_totals(counts, |c| c.failures().saturating_add(c.margin), WeightCounts::least),
            ),
        );
        if let Some(limit) = self.limit {
            add(Criterion::Limit, not_worse(canary.failures, &[(canary.requests, limit.as_part())]));
        }
        if self.p99_increase.is_some() {
            let than_others = not_worse(canary.slow, &arm_totals(counts, WeightCounts::slow, WeightCounts::least));
            let than_one_in_a_hundred = not_worse(canary.slow, &[(timed, PAST_P99)]);
            add(Criterion::Slowness, mean(&[than_others, than_one_in_a_hundred]));
        }
        analysis.log_evidence_worse -= ln(f64::from(criteria));
        if analysis.log_evidence_worse >= self.needed() {
            analysis.verdict = Verdict::Fail;
        } else if analysis.log_evidence_not_worse >= self.needed() {
            analysis.verdict = Verdict::Pass;
        }
        analysis
    }

    /// The likelihood ratios that the canary is worse, given `counts`; zeros for a criterion that the judge does not have.
    pub(super) fn log_likelihood_ratios(&self, counts: &[WeightCounts]) -> LogLikelihoodRatios {
        let sum = |of: fn(&WeightCounts) -> u64| counts.iter().map(of).fold(0, u64::saturating_add);
        let failures = sum(|counts| counts.canary.failures);
        let limit = self.limit.map(|limit| (WeightCounts::canary_requests(counts), limit.as_part()));
        [
            likelihoods(
                &DEGRADED_RATIOS,
                failures,
                &arm_totals(counts, |c| c.failures().saturating_add(c.handicap), WeightCounts::most),
            ),
            limit.map_or_else(Default::default, |trials| likelihoods(&DEGRADED_RATIOS, failures, &[trials])),
            match self.p99_increase {
                Some(_) => likelihoods(
                    &DEGRADED_RATIOS,
                    sum(|counts| counts.canary.slow),
                    &arm_totals(counts, WeightCounts::slow, WeightCounts::most),
                ),
                None => Default::default(),
            },
        ]
    }
}

/// The hits of both sides at each weight, and the canary's share of the requests.
#[inline(never)]
fn arm_totals(
    counts: &[WeightCounts],
    hits: fn(&WeightCounts) -> u64,
    share: fn(&WeightCounts) -> f64,
) -> Vec<(u64, f64)> {
    counts.iter().map(|counts| (hits(counts), share(counts))).collect()
}

impl Analysis {
    fn add(&mut self, criterion: Criterion, worse: f64, not_worse: f64) {
        if worse > self.log_evidence_worse {
            (self.criterion, self.log_evidence_worse) = (criterion, worse);
        }
        self.log_evidence_not_worse = self.log_evidence_not_worse.min(not_worse);
    }
}

impl WeightCounts {
    /// The number of the canary's answers at all weights.
    pub fn canary_requests(all: &[WeightCounts]) -> u64 {
        all.iter().fold(0, |sum, counts| sum.saturating_add(counts.canary.requests))
    }

    fn failures(&self) -> u64 {
        self.canary.failures.saturating_add(self.others.failures)
    }

    fn slow(&self) -> u64 {
        self.canary.slow.saturating_add(self.others.slow)
    }

    /// The smaller one of the canary's weight and its real share of the requests.
    fn least(&self) -> f64 {
        self.weight().min(self.share())
    }

    /// The greater one of the canary's weight and its real share of the requests.
    fn most(&self) -> f64 {
        self.weight().max(self.share())
    }

    fn weight(&self) -> f64 {
        self.weight.as_part()
    }

    fn share(&self) -> f64 {
        match self.canary.requests.saturating_add(self.others.requests) {
            0 => self.weight(),
            requests => part(self.canary.requests, requests),
        }
    }
}

fn part(of: u64, whole: u64) -> f64 {
    of as f64 / whole as f64
}

/// The natural logarithm of the likelihood ratio of each of `ratios`, given `hits` hits. `trials` are numbers of trials,
/// each with the probability of a hit under the null hypothesis.
#[inline(never)]
fn likelihoods<const N: usize>(ratios: &[f64; N], hits: u64, trials: &[(u64, f64)]) -> [f64; N] {
    ratios.map(|ratio| {
        let mut sum = hits as f64 * ln(ratio);
        for (number, chance) in trials {
            sum -= *number as f64 * ln(1.0 + chance * (ratio - 1.0));
        }
        sum
    })
}

/// The natural logarithm of the mean of the numbers with these natural logarithms.
fn mean(logarithms: &[f64]) -> f64 {
    // Dividing by the greatest number first prevents an overflow of the exponentials.
    let greatest = logarithms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logarithms.iter().map(|logarithm| exp(logarithm - greatest)).sum();
    greatest + ln(sum / logarithms.len() as f64)
}

/// Evidence in decibans: ten times its decimal logarithm. A likelihood ratio of 100 to 1 is 20 decibans.
pub fn decibans(logarithm: f64) -> u64 {
    const DECIBAN: f64 = std::f64::consts::LN_10 / 10.0;
    (logarithm.max(0.0) / DECIBAN + 0.5) as u64
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::restarted_test::RestartedTest;
    use super::*;
    use crate::random::split_mix;
    use proptest::prelude::*;

    /// Asks for errors alone, and tolerates none.
    pub const JUDGE: Judge = Judge {
        tolerance: Fraction::NONE,
        limit: None,
        p99_increase: None,
        confidence: Fraction::from_ppm(990_000),
        rolls_back: true,
        waits_for_pass: false,
    };

    /// One stream of requests, drawn from a seed.
    struct Run {
        judge: Judge,
        state: u64,
        counts: Vec<WeightCounts>,
        recent: RestartedTest,
    }

    impl Run {
        fn new(judge: Judge, seed: u64, percent: u32) -> Run {
            let weight = Fraction::from_ppm(percent * 10_000);
            Run {
                judge,
                state: seed << 20,
                counts: vec![WeightCounts { weight, ..WeightCounts::default() }],
                recent: RestartedTest::default(),
            }
        }

        fn draw(&mut self, chance: Fraction) -> bool {
            chance.includes(split_mix(&mut self.state))
        }

        /// One request; a analysis where it could have changed for the worse.
        fn step(&mut self, stable: Fraction, trial: Fraction) -> Option<Analysis> {
            let weight = self.counts.last().unwrap().weight;
            let on_trial = self.draw(weight);
            let failed = self.draw(if on_trial { trial } else { stable });
            let handicap = split_mix(&mut self.state);
            let judge = self.judge;
            let counts = self.counts.last_mut().unwrap();
            let arm = if on_trial { &mut counts.canary } else { &mut counts.others };
            arm.requests += 1;
            arm.failures += u64::from(failed);
            if !failed && !on_trial {
                counts.handicap += u64::from(judge.tolerance.includes(handicap));
                counts.margin += u64::from(judge.margin().includes(handicap));
            }
            if on_trial && let Some(next) = self.recent.next(&judge, &self.counts) {
                self.recent = next;
            }
            (on_trial && failed)
                .then(|| judge.judge(&self.counts, 0, self.recent.log_likelihood_ratios(&judge, &self.counts)))
        }

        fn requests(&self) -> u64 {
            self.counts.iter().map(|counts| counts.canary.requests).sum()
        }
    }

    fn ppm(ppm: u32) -> Fraction {
        Fraction::from_ppm(ppm)
    }

    /// How many of `runs` end in a rollback within `requests`, looking after every failure of the canary.
    fn false_alarms(judge: Judge, runs: u64, requests: u32, rate: Fraction, weights: &[u32]) -> usize {
        let alarm = |seed: u64| {
            let mut run = Run::new(judge, seed, weights[0]);
            for weight in weights {
                if *weight != weights[0] {
                    run.counts.push(WeightCounts { weight: ppm(weight * 10_000), ..WeightCounts::default() });
                }
                for _ in 0..requests / weights.len() as u32 {
                    if run.step(rate, rate).is_some_and(|analysis| analysis.verdict == Verdict::Fail) {
                        return true;
                    }
                }
            }
            false
        };
        (0..runs).filter(|seed| alarm(seed + 1)).count()
    }

    #[test]
    fn a_canary_like_the_others_is_rolled_back_in_two_of_a_hundred_runs_at_most() {
        // 50,000 requests in all, and 50,000 of each side.
        for (requests, weight) in [(50_000, 10), (100_000, 50)] {
            let alarms = false_alarms(JUDGE, 500, requests, ppm(10_000), &[weight]);
            assert!(alarms <= 10, "{alarms} of 500 at {weight} %");
            println!("false alarms at {weight} %: {alarms} of 500");
        }
    }

    #[test]
    fn nor_while_its_weight_grows_or_with_every_question_asked() {
        let alarms = false_alarms(JUDGE, 200, 20_000, ppm(20_000), &[1, 5, 25, 50]);
        assert!(alarms <= 4, "{alarms} of 200");
        let judge = Judge { tolerance: ppm(10_000), limit: Some(ppm(20_000)), ..JUDGE };
        let all = false_alarms(judge, 200, 20_000, ppm(20_000), &[5, 25]);
        assert!(all <= 4, "{all} of 200");
        println!("false alarms at growing weights: {alarms} of 200; with a limit at the true rate: {all} of 200");
    }

    fn median_to_roll_back(judge: Judge, stable: Fraction, trial: Fraction) -> u64 {
        let mut needed: Vec<u64> = (0..201)
            .map(|seed| {
                let mut run = Run::new(judge, seed + 1_000, 10);
                while run.requests() < 20_000 {
                    if run.step(stable, trial).is_some_and(|analysis| analysis.verdict == Verdict::Fail) {
                        return run.requests();
                    }
                }
                u64::MAX
            })
            .collect();
        needed.sort_unstable();
        needed[100]
    }

    #[test]
    fn a_bad_canary_is_found_within_few_of_its_requests() {
        for (stable, trial, at_most) in [(10_000, 200_000, 25), (10_000, 50_000, 200), (1_000, 10_000, 600)] {
            let median = median_to_roll_back(JUDGE, ppm(stable), ppm(trial));
            assert!(median <= at_most, "{stable} against {trial} ppm: {median}");
            println!("{stable} against {trial} ppm: median {median} canary requests");
        }
        let judge = Judge { limit: Some(ppm(20_000)), ..JUDGE };
        assert!(median_to_roll_back(judge, ppm(100_000), ppm(100_000)) <= 200, "equally bad, and past the limit");
    }

    #[test]
    fn a_canary_that_turns_bad_is_found_however_well_it_did_before() {
        let median = |judge: Judge, percent: u32, trial: u32| {
            let more = |seed: u64| {
                let mut run = Run::new(judge, seed + 20_000, percent);
                for _ in 0..20_000 {
                    run.step(ppm(10_000), ppm(10_000));
                }
                let before = run.requests();
                while run.requests() < before + 5_000 {
                    if run.step(ppm(10_000), ppm(trial)).is_some_and(|analysis| analysis.verdict == Verdict::Fail) {
                        return run.requests() - before;
                    }
                }
                u64::MAX
            };
            let mut needed: Vec<u64> = (0..31).map(more).collect();
            needed.sort_unstable();
            needed[15]
        };
        let limited = Judge { limit: Some(ppm(50_000)), ..JUDGE };
        for (judge, percent, trial, at_most) in
            [(JUDGE, 10, 200_000, 120), (JUDGE, 10, 50_000, 700), (limited, 100, 200_000, 250)]
        {
            let median = median(judge, percent, trial);
            assert!(median <= at_most, "{trial} ppm at {percent} %: {median}");
            println!("{trial} ppm at {percent} %, after 20,000 requests: median {median} canary requests");
        }
    }

    #[test]
    fn what_is_within_the_tolerance_is_tolerated() {
        let judge = Judge { tolerance: ppm(10_000), ..JUDGE };
        let alarms = (0..100)
            .filter(|seed| {
                let mut run = Run::new(judge, seed + 5_000, 20);
                (0..20_000)
                    .any(|_| run.step(ppm(10_000), ppm(19_000)).is_some_and(|found| found.verdict == Verdict::Fail))
            })
            .count();
        assert!(alarms <= 2, "{alarms} of 100");
    }

    #[test]
    fn a_good_canary_passes_and_a_bad_one_does_not() {
        let passes = |trial: u32, requests: u64| {
            let passes = |seed: &u64| {
                let mut run = Run::new(JUDGE, seed + 9_000, 10);
                for _ in 0..requests {
                    run.step(ppm(1_000), ppm(trial));
                }
                JUDGE.judge(&run.counts, 0, run.recent.log_likelihood_ratios(&JUDGE, &run.counts)).verdict
                    == Verdict::Pass
            };
            (0..50).filter(passes).count()
        };
        assert_eq!(passes(1_000, 500), 0, "50 requests are insufficient evidence");
        assert!(passes(1_000, 20_000) >= 45);
        assert_eq!(passes(12_000, 20_000), 0);
    }

    /// The verdict on 2,000 answers of a canary of 10 % where no failure was seen, one answer in `stable` of the others was
    /// slow, and one in `trial` of the canary.
    fn verdict_on_slowness(timed: u64, stable: u64, trial: u64) -> Verdict {
        let side = |requests: u64, every: u64| Arm { requests, failures: 0, slow: requests / every };
        let (canary, others) = (side(2_000, trial), side(18_000, stable));
        let counts = WeightCounts { weight: ppm(100_000), canary, others, handicap: 0, margin: 180 };
        Judge { p99_increase: Some(1), ..JUDGE }.judge(&[counts], timed, None).verdict
    }

    #[test]
    fn a_canary_is_no_slower_where_fewer_than_one_in_a_hundred_answers_are_slow() {
        const NEVER: u64 = u64::MAX;
        assert_eq!(verdict_on_slowness(2_000, NEVER, NEVER), Verdict::Pass, "no answer is slow");
        assert_eq!(verdict_on_slowness(2_000, NEVER, 2_000), Verdict::Pass, "one slow answer");
        assert_eq!(verdict_on_slowness(0, NEVER, NEVER), Verdict::Insufficient, "the threshold of slowness is unknown");
        assert_eq!(verdict_on_slowness(300, NEVER, NEVER), Verdict::Insufficient, "too few to know");
        assert_eq!(verdict_on_slowness(0, 100, NEVER), Verdict::Pass, "fewer than the others");
        assert_eq!(verdict_on_slowness(2_000, 100, 100), Verdict::Insufficient, "as many as one in a hundred");
        assert_eq!(verdict_on_slowness(2_000, 100, 20), Verdict::Fail, "five times as many");
    }

    #[test]
    fn a_canary_with_one_slow_answer_in_a_hundred_passes_in_one_of_a_hundred_runs_at_most() {
        let judge = Judge { p99_increase: Some(1), ..JUDGE };
        let passes = |seed: &u64| {
            let mut state = seed << 20;
            let (mut canary, mut others) = (Arm::default(), Arm::default());
            (0..20_000).any(|_| {
                let arm = if ppm(100_000).includes(split_mix(&mut state)) { &mut canary } else { &mut others };
                arm.requests += 1;
                arm.slow += u64::from(ppm(10_000).includes(split_mix(&mut state)));
                // Nothing else stands in the way.
                let margin = 100_000;
                let counts = WeightCounts { weight: ppm(100_000), canary, others, handicap: 0, margin };
                (canary.requests + others.requests) % 16 == 0
                    && judge.judge(&[counts], canary.requests, None).verdict == Verdict::Pass
            })
        };
        let passed = (1..=200).filter(passes).count();
        assert!(passed <= 4, "{passed} of 200");
        println!("passed without being better: {passed} of 200");
    }

    #[test]
    fn one_failure_decides_nothing() {
        for weight in [1, 100, 10_000, 500_000] {
            for limit in [None, Some(ppm(1))] {
                let canary = Arm { requests: 1, failures: 1, slow: 0 };
                let counts = WeightCounts { weight: ppm(weight), canary, ..WeightCounts::default() };
                let analysis = Judge { limit, ..JUDGE }.judge(&[counts], 0, None);
                assert_eq!(analysis.verdict, Verdict::Insufficient, "at {weight} ppm: {analysis:?}");
            }
        }
    }

    #[test]
    fn a_heavy_user_in_the_canary_is_no_evidence_against_it() {
        let side = |requests| Arm { requests, failures: requests / 50, slow: 0 };
        let counts =
            WeightCounts { weight: ppm(50_000), canary: side(4_000), others: side(6_000), ..WeightCounts::default() };
        let analysis = JUDGE.judge(&[counts], 0, None);
        assert!(
            analysis.log_evidence_worse < 0.0,
            "40 % of the requests and of the failures, at a weight of 5 %: {analysis:?}"
        );
    }

    #[test]
    fn evidence_is_weighed_in_decibans() {
        assert_eq!(decibans(JUDGE.needed()), 20);
        assert_eq!(decibans(f64::NEG_INFINITY), 0);
        assert_eq!(decibans(f64::NAN), 0);
        // By hand: 3 of 3 failures in a canary of 10 %, at each ratio r the cube of r / (1 + 0.1 (r - 1)).
        let by_hand: f64 = DEGRADED_RATIOS.iter().map(|r| (r / (1.0 + 0.1 * (r - 1.0))).powi(3)).sum::<f64>() / 8.0;
        assert!((mean(&likelihoods(&DEGRADED_RATIOS, 3, &[(3, 0.1)])) - by_hand.ln()).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn any_counts_are_judged(
            arms in proptest::collection::vec((any::<[u64; 3]>(), any::<[u64; 3]>(), any::<u32>()), 0..5),
            timed in any::<u64>(),
        ) {
            let arm = |[requests, failures, slow]: [u64; 3]| Arm {
                requests, failures, slow,
            };
            let counts: Vec<WeightCounts> = arms.iter().map(|(canary, others, weight)| WeightCounts {
                weight: ppm(*weight), canary: arm(*canary), others: arm(*others), handicap: 3, margin: 5,
            }).collect();
            let judge = Judge { limit: Some(ppm(0)), p99_increase: Some(1), ..JUDGE };
            let analysis = judge.judge(&counts, timed, None);
            let _ = (decibans(analysis.log_evidence_worse), decibans(analysis.log_evidence_not_worse));
        }

        #[test]
        fn how_the_workers_shared_the_counting_does_not_matter(failures in 0..50_u64, more in 0..50_u64) {
            let counts = |canary: u64, others: u64| WeightCounts {
                weight: ppm(100_000),
                canary: Arm { requests: 100, failures: canary, slow: 0 },
                others: Arm { requests: 900, failures: others, slow: 0 },
                ..WeightCounts::default()
            };
            let whole = JUDGE.judge(&[WeightCounts {
                canary: Arm { requests: 200, failures: failures + more, slow: 0 },
                others: Arm { requests: 1_800, failures: failures + more, slow: 0 },
                ..counts(0, 0)
            }], 0, None);
            let parts = JUDGE.judge(&[counts(failures, more), counts(more, failures)], 0, None);
            prop_assert!((whole.log_evidence_worse - parts.log_evidence_worse).abs() < 1e-9);
        }
    }
}
