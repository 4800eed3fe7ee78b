//! A test that begins again and again: the evidence that the canary is worse, from the moment that makes it greatest.
//!
//! A test that begins at some moment is as valid as one that begins with the rollout, and ignores all successes before.
//! This one begins again after every fifty answers of the canary, and of all these tests the one with the most evidence
//! counts. Running so many tests has a price: the *k*-th test needs *k(k + 1)* times as much evidence. The shares
//! *1 / k(k + 1)* sum to 1, so the sum of all tests, each multiplied by its share, is again a nonnegative supermartingale
//! that begins with at most 1 while the canary is no worse, and the greatest of them is no more than their sum. (Shin,
//! Ramdas and Rinaldo, "E-detectors", arXiv 2203.03532, begin one with every observation and give up the bound on the
//! probability of a false alarm at any time; the shares keep it.)
//!
//! The best moment need not be searched for. For each ratio one running number suffices: the greater one of its previous
//! value together with the new counts, and the share of a test that begins now.

use super::judge::{Arm, Judge, LogLikelihoodRatios, WeightCounts};
use super::logarithm::ln;
use crate::shared_data::Record;
use crate::units::Fraction;

/// The number of the canary's answers after which the test begins again.
const EVERY: u64 = 50;

/// The most weights with counts of their own: those of the policy, and earlier ones of the rollout. The answers at further
/// weights are no evidence here.
const MAX_WEIGHTS: usize = 32;

/// The test, as all workers share it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct RestartedTest {
    /// The hash of the rollout's name.
    pub rollout: u64,
    /// How often the test has begun.
    restarts: u32,
    /// The judge that the ratios are for.
    terms: JudgeTerms,
    /// The counts when the test began last.
    counts: Vec<WeightCounts>,
    /// For each ratio the evidence at that time.
    ratios: LogLikelihoodRatios,
}

/// The fields of the judge that give the ratios their meaning. Under other terms they are no evidence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct JudgeTerms {
    tolerance: u32,
    limit: u32,
    p99_increase: u64,
}

impl JudgeTerms {
    fn of(judge: &Judge) -> JudgeTerms {
        JudgeTerms {
            tolerance: judge.tolerance.ppm(),
            limit: judge.limit.map_or(u32::MAX, Fraction::ppm),
            p99_increase: judge.p99_increase.unwrap_or(u64::MAX),
        }
    }
}

impl RestartedTest {
    /// This test as the one of `rollout`.
    pub(super) fn of(self, rollout: u64) -> RestartedTest {
        RestartedTest { rollout, ..self }
    }

    /// The likelihood ratios that the canary is worse, given `counts`. `None` before the test has begun.
    pub(super) fn log_likelihood_ratios(&self, judge: &Judge, counts: &[WeightCounts]) -> Option<LogLikelihoodRatios> {
        self.is_for(judge).then(|| self.with(judge, &self.since(counts)))
    }

    /// The test after another beginning. `None` if it does not begin again at `counts`.
    pub(super) fn next(&self, judge: &Judge, counts: &[WeightCounts]) -> Option<RestartedTest> {
        let (is_known, new) = (self.is_for(judge), self.since(counts));
        if is_known && WeightCounts::canary_requests(&new) < EVERY {
            return None;
        }
        let restarts = self.restarts.saturating_add(1);
        let share = -ln(f64::from(restarts)) - ln(f64::from(restarts) + 1.0);
        let mut ratios = if is_known { self.with(judge, &new) } else { [[share; _]; _] };
        ratios.as_flattened_mut().iter_mut().for_each(|ratio| *ratio = ratio.max(share));
        let mut now = counts.to_vec();
        let gone = self.counts.iter().filter(|old| counts.iter().all(|new| new.weight != old.weight));
        now.extend(gone.copied());
        now.truncate(MAX_WEIGHTS);
        Some(RestartedTest { rollout: self.rollout, restarts, terms: JudgeTerms::of(judge), counts: now, ratios })
    }

    /// Whether the test has begun with the terms of `judge`.
    fn is_for(&self, judge: &Judge) -> bool {
        self.restarts > 0 && self.terms == JudgeTerms::of(judge)
    }

    /// The ratios together with the `new` counts.
    fn with(&self, judge: &Judge, new: &[WeightCounts]) -> LogLikelihoodRatios {
        let mut ratios = self.ratios;
        let new = judge.log_likelihood_ratios(new);
        for (ratio, new) in ratios.as_flattened_mut().iter_mut().zip(new.as_flattened()) {
            *ratio += new;
        }
        ratios
    }

    /// What was added to the counts since the test began last.
    fn since(&self, counts: &[WeightCounts]) -> Vec<WeightCounts> {
        let is_full = self.counts.len() >= MAX_WEIGHTS;
        let new = |now: &WeightCounts| match self.counts.iter().find(|old| old.weight == now.weight) {
            Some(old) => now.since(old),
            None if is_full => WeightCounts { weight: now.weight, ..WeightCounts::default() },
            None => *now,
        };
        counts.iter().map(new).collect()
    }
}

/// The second schema. The first one had no rollout, and belonged to counts that were kept in metrics; it is not read.
impl Record for RestartedTest {
    const SCHEMA: u8 = 2;

    fn encode(&self, bytes: &mut Vec<u8>) {
        let JudgeTerms { tolerance, limit, p99_increase } = self.terms;
        bytes.extend_from_slice(&self.rollout.to_le_bytes());
        bytes.extend_from_slice(&self.restarts.to_le_bytes());
        bytes.extend_from_slice(&tolerance.to_le_bytes());
        bytes.extend_from_slice(&limit.to_le_bytes());
        bytes.extend_from_slice(&p99_increase.to_le_bytes());
        self.ratios.as_flattened().iter().for_each(|ratio| bytes.extend_from_slice(&ratio.to_le_bytes()));
        for counts in &self.counts {
            bytes.extend_from_slice(&u64::from(counts.weight.ppm()).to_le_bytes());
            counts.numbers().iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
        }
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<RestartedTest> {
        if schema != Self::SCHEMA {
            return None;
        }
        let (rollout, bytes) = bytes.split_first_chunk()?;
        let (restarts, rest) = bytes.split_first_chunk()?;
        let (tolerance, rest) = rest.split_first_chunk()?;
        let (limit, rest) = rest.split_first_chunk()?;
        let terms = (u32::from_le_bytes(*tolerance), u32::from_le_bytes(*limit));
        let ([p99_increase, numbers @ ..], []) = rest.as_chunks::<8>() else { return None };
        let mut test = RestartedTest {
            rollout: u64::from_le_bytes(*rollout),
            restarts: u32::from_le_bytes(*restarts),
            terms: JudgeTerms { tolerance: terms.0, limit: terms.1, p99_increase: u64::from_le_bytes(*p99_increase) },
            ..RestartedTest::default()
        };
        let ratios = test.ratios.as_flattened_mut();
        let (known, numbers) = numbers.split_at_checked(ratios.len())?;
        for (ratio, number) in ratios.iter_mut().zip(known) {
            *ratio = Some(f64::from_le_bytes(*number)).filter(|ratio| ratio.is_finite())?;
        }
        let (counts, []) = numbers.as_chunks::<8>() else { return None };
        if counts.len() > MAX_WEIGHTS {
            return None;
        }
        for entry in counts {
            let [weight, numbers @ ..] = entry.map(u64::from_le_bytes);
            test.counts.push(WeightCounts::new(Fraction::from_ppm(u32::try_from(weight).ok()?), numbers));
        }
        Some(test)
    }
}

impl WeightCounts {
    fn since(&self, old: &WeightCounts) -> WeightCounts {
        let mut numbers = self.numbers();
        for (number, old) in numbers.iter_mut().zip(old.numbers()) {
            *number = number.saturating_sub(old);
        }
        WeightCounts::new(self.weight, numbers)
    }

    /// The counts that [`RestartedTest`] uses.
    fn numbers(&self) -> [u64; 7] {
        let WeightCounts { canary, others, handicap, .. } = self;
        [canary.requests, canary.failures, canary.slow, others.requests, others.failures, others.slow, *handicap]
    }

    fn new(weight: Fraction, numbers: [u64; 7]) -> WeightCounts {
        let [requests, failures, slow, others_requests, others_failures, others_slow, handicap] = numbers;
        let canary = Arm { requests, failures, slow };
        let others = Arm { requests: others_requests, failures: others_failures, slow: others_slow };
        WeightCounts { weight, canary, others, handicap, margin: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::judge::tests::JUDGE;
    use super::*;
    use proptest::prelude::*;

    fn counts(ppm: u32, canary: [u64; 2], others: [u64; 2]) -> WeightCounts {
        let arm = |[requests, failures]: [u64; 2]| Arm { requests, failures, slow: 0 };
        WeightCounts {
            weight: Fraction::from_ppm(ppm),
            canary: arm(canary),
            others: arm(others),
            ..WeightCounts::default()
        }
    }

    #[test]
    fn it_begins_again_with_every_fifty_answers_of_the_canary() {
        let known = |requests| [counts(100_000, [requests, 0], [requests * 9, 0])];
        let first = RestartedTest::default().next(&JUDGE, &known(0)).unwrap();
        assert_eq!(first.next(&JUDGE, &known(49)), None);
        let second = first.next(&JUDGE, &known(50)).unwrap();
        assert_eq!((first.restarts, second.restarts), (1, 2));
        assert!((second.ratios[0][0] - (-ln(2.0))).abs() < 1e-9, "nothing happened: the first has the greatest share");
        assert_eq!(second.next(&JUDGE, &known(40)), None, "of two workers, one counted earlier");
    }

    #[test]
    fn what_went_well_before_is_forgotten() {
        let mut recent = RestartedTest::default();
        let mut known = counts(500_000, [0, 0], [0, 0]);
        for _ in 0..100 {
            (known.canary.requests, known.others.requests) = (known.canary.requests + 50, known.others.requests + 50);
            known.others.failures += 10;
            recent = recent.next(&JUDGE, &[known]).unwrap();
        }
        let least = -ln(100.0) - ln(101.0);
        let levels = recent.log_likelihood_ratios(&JUDGE, &[known]).unwrap();
        assert!(levels[0].iter().all(|level| (level - least).abs() < 1e-9), "{levels:?}");
        known.canary.failures += 10;
        let (lately, whole) =
            (recent.log_likelihood_ratios(&JUDGE, &[known]).unwrap(), JUDGE.log_likelihood_ratios(&[known]));
        let greatest = |levels: &LogLikelihoodRatios| levels[0].iter().copied().fold(f64::MIN, f64::max);
        assert!(greatest(&lately) > least + 5.0 && greatest(&whole) < -190.0, "{lately:?} {whole:?}");
    }

    #[test]
    fn evidence_for_another_question_is_none() {
        let known = [counts(500_000, [100, 20], [100, 0])];
        let recent = RestartedTest::default().next(&JUDGE, &[]).unwrap();
        assert!(recent.log_likelihood_ratios(&JUDGE, &known).is_some());
        let stricter = Judge { limit: Some(Fraction::from_ppm(1)), ..JUDGE };
        assert_eq!(recent.log_likelihood_ratios(&stricter, &known), None);
        let next = recent.next(&stricter, &known).unwrap();
        assert_eq!(next.since(&known), [counts(500_000, [0, 0], [0, 0])], "what was known is not evidence");
        assert_eq!(next.restarts, 2, "and what was spent is spent");
    }

    #[test]
    fn a_weight_that_comes_again_is_not_counted_twice() {
        let [five, ten] = [counts(50_000, [100, 1], [0, 0]), counts(100_000, [100, 2], [0, 0])];
        let recent = RestartedTest::default().next(&JUDGE, &[five]).unwrap();
        let recent = recent.next(&JUDGE, &[ten]).unwrap();
        assert_eq!(recent.since(&[five, ten]), [counts(50_000, [0, 0], [0, 0]), counts(100_000, [0, 0], [0, 0])]);
        let many: Vec<WeightCounts> = (1..=40).map(|ppm| counts(ppm, [100, 50], [100, 0])).collect();
        let full = recent.next(&JUDGE, &many).unwrap();
        assert_eq!(full.counts.len(), MAX_WEIGHTS);
        assert!(full.since(&many).iter().all(|new| new.canary.requests == 0));
    }

    proptest! {
        #[test]
        fn a_test_is_read_as_it_was_written(
            entries in proptest::collection::vec((0..1_000_000_u32, any::<[u64; 7]>()), 0..20),
            levels in any::<[i32; 24]>(),
            (rollout, restarts, terms) in any::<(u64, u32, (u32, u32, u64))>(),
        ) {
            let mut recent = RestartedTest {
                rollout,
                restarts,
                terms: JudgeTerms { tolerance: terms.0, limit: terms.1, p99_increase: terms.2 },
                counts: entries.iter().map(|(ppm, numbers)| WeightCounts::new(Fraction::from_ppm(*ppm), *numbers)).collect(),
                ..RestartedTest::default()
            };
            for (level, given) in recent.ratios.as_flattened_mut().iter_mut().zip(levels) {
                *level = f64::from(given) / 7.0;
            }
            let mut bytes = Vec::new();
            recent.encode(&mut bytes);
            prop_assert_eq!(RestartedTest::decode(2, &bytes), Some(recent));
            prop_assert_eq!(RestartedTest::decode(2, &bytes[..bytes.len() - 1]), None);
        }

        #[test]
        fn any_bytes_decode_to_something_or_nothing(word in proptest::collection::vec(any::<u8>(), 0..600)) {
            let known = [counts(500_000, [u64::MAX, 20], [100, u64::MAX])];
            for schema in [1, 2] {
                let recent = RestartedTest::decode(schema, &word).unwrap_or_default();
                let next = recent.next(&JUDGE, &known).unwrap_or_default();
                let _ = JUDGE.judge(&known, 0, next.log_likelihood_ratios(&JUDGE, &known));
            }
        }
    }
}
