//! The evidence against a canary from the moment on that speaks most against it.
//!
//! A test that begins at some moment is as good as one that begins with the rollout, and knows nothing of what went well
//! before. Here it begins anew with every fifty answers of the canary, and of all these tests the one that has found most
//! is listened to. To look at so many costs: the *k*-th has to find *k(k + 1)* times as much evidence. These shares,
//! *1 / k(k + 1)*, sum to 1, so the sum of all tests, each with its share, is again a nonnegative supermartingale that
//! begins with at most 1 while the canary is no worse, and the greatest of them is no more than their sum. (Shin, Ramdas
//! and Rinaldo, "E-detectors", arXiv 2203.03532, begin one with every observation and give up the bound on ever being
//! wrong; the shares keep it.)
//!
//! Which moment speaks most against the canary need not be searched for. For each ratio, a running number is either what
//! it was, with what came since, or the share of a test that begins now, whichever is greater.

use super::judge::{Arm, Counts, Judge, Levels};
use super::logarithm::ln;
use crate::units::Fraction;

/// After how many answers of the canary the test begins again.
const EVERY: u64 = 50;

/// The most weights that are told apart: those of one policy, and others that the rollout once had. What is sent by
/// further ones is no evidence here.
const MAX_WEIGHTS: usize = 32;

/// The first byte of the word, to be changed with its layout.
const SCHEMA: u8 = 1;

/// What workers remember together, in one shared word.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recent {
    /// How often the test has begun.
    beginnings: u32,
    /// What was asked.
    terms: Terms,
    /// What was known at the last beginning.
    counts: Vec<Counts>,
    levels: Levels,
}

/// What the evidence is for; with other terms it is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Terms {
    tolerance: u32,
    limit: u32,
    p99_increase: u64,
}

impl Terms {
    fn of(judge: &Judge) -> Terms {
        Terms {
            tolerance: judge.tolerance.ppm(),
            limit: judge.limit.map_or(u32::MAX, Fraction::ppm),
            p99_increase: judge.p99_increase.unwrap_or(u64::MAX),
        }
    }
}

impl Recent {
    /// What speaks against the canary now that `counts` are known. `None` before the first beginning.
    pub fn levels(&self, judge: &Judge, counts: &[Counts]) -> Option<Levels> {
        self.knows(judge).then(|| self.with(judge, &self.since(counts)))
    }

    /// What is to be remembered now that `counts` are known, where that is something else.
    pub fn next(&self, judge: &Judge, counts: &[Counts]) -> Option<Recent> {
        let (is_known, new) = (self.knows(judge), self.since(counts));
        if is_known && Counts::canary_requests(&new) < EVERY {
            return None;
        }
        let beginnings = self.beginnings.saturating_add(1);
        let share = -ln(f64::from(beginnings)) - ln(f64::from(beginnings) + 1.0);
        let mut levels = if is_known { self.with(judge, &new) } else { [[share; _]; _] };
        levels.as_flattened_mut().iter_mut().for_each(|level| *level = level.max(share));
        let mut now = counts.to_vec();
        let gone = self.counts.iter().filter(|old| counts.iter().all(|new| new.weight != old.weight));
        now.extend(gone.copied());
        now.truncate(MAX_WEIGHTS);
        Some(Recent { beginnings, terms: Terms::of(judge), counts: now, levels })
    }

    /// Whether it has begun, and what was asked is what `judge` asks.
    fn knows(&self, judge: &Judge) -> bool {
        self.beginnings > 0 && self.terms == Terms::of(judge)
    }

    /// The levels, with what is `new`.
    fn with(&self, judge: &Judge, new: &[Counts]) -> Levels {
        let mut levels = self.levels;
        let new = judge.levels(new);
        for (level, new) in levels.as_flattened_mut().iter_mut().zip(new.as_flattened()) {
            *level += new;
        }
        levels
    }

    /// What is new in `counts`.
    fn since(&self, counts: &[Counts]) -> Vec<Counts> {
        let is_full = self.counts.len() >= MAX_WEIGHTS;
        let new = |now: &Counts| match self.counts.iter().find(|old| old.weight == now.weight) {
            Some(old) => now.since(old),
            None if is_full => Counts { weight: now.weight, ..Counts::default() },
            None => *now,
        };
        counts.iter().map(new).collect()
    }

    pub fn encode(&self) -> Vec<u8> {
        let Terms { tolerance, limit, p99_increase } = self.terms;
        let mut word = vec![SCHEMA];
        word.extend(self.beginnings.to_le_bytes());
        word.extend(tolerance.to_le_bytes());
        word.extend(limit.to_le_bytes());
        word.extend(p99_increase.to_le_bytes());
        self.levels.as_flattened().iter().for_each(|level| word.extend(level.to_le_bytes()));
        for counts in &self.counts {
            word.extend(u64::from(counts.weight.ppm()).to_le_bytes());
            counts.numbers().iter().for_each(|number| word.extend(number.to_le_bytes()));
        }
        word
    }

    /// `None` where the word holds something else.
    pub fn decode(word: &[u8]) -> Option<Recent> {
        let ([SCHEMA], rest) = word.split_first_chunk()? else { return None };
        let (beginnings, rest) = rest.split_first_chunk()?;
        let (tolerance, rest) = rest.split_first_chunk()?;
        let (limit, rest) = rest.split_first_chunk()?;
        let terms = (u32::from_le_bytes(*tolerance), u32::from_le_bytes(*limit));
        let ([p99_increase, words @ ..], []) = rest.as_chunks::<8>() else { return None };
        let mut recent = Recent {
            beginnings: u32::from_le_bytes(*beginnings),
            terms: Terms { tolerance: terms.0, limit: terms.1, p99_increase: u64::from_le_bytes(*p99_increase) },
            ..Recent::default()
        };
        let levels = recent.levels.as_flattened_mut();
        let (known, words) = words.split_at_checked(levels.len())?;
        for (level, word) in levels.iter_mut().zip(known) {
            *level = Some(f64::from_le_bytes(*word)).filter(|level| level.is_finite())?;
        }
        let (counts, []) = words.as_chunks::<8>() else { return None };
        if counts.len() > MAX_WEIGHTS {
            return None;
        }
        for entry in counts {
            let [weight, numbers @ ..] = entry.map(u64::from_le_bytes);
            recent.counts.push(Counts::new(Fraction::from_ppm(u32::try_from(weight).ok()?), numbers));
        }
        Some(recent)
    }
}

impl Counts {
    fn since(&self, old: &Counts) -> Counts {
        let mut numbers = self.numbers();
        for (number, old) in numbers.iter_mut().zip(old.numbers()) {
            *number = number.saturating_sub(old);
        }
        Counts::new(self.weight, numbers)
    }

    /// Without what [`Recent`] does not ask for.
    fn numbers(&self) -> [u64; 7] {
        let Counts { canary, others, handicap, .. } = self;
        [canary.requests, canary.failures, canary.slow, others.requests, others.failures, others.slow, *handicap]
    }

    fn new(weight: Fraction, numbers: [u64; 7]) -> Counts {
        let [requests, failures, slow, others_requests, others_failures, others_slow, handicap] = numbers;
        let canary = Arm { requests, failures, slow };
        let others = Arm { requests: others_requests, failures: others_failures, slow: others_slow };
        Counts { weight, canary, others, handicap, margin: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::judge::tests::JUDGE;
    use super::*;
    use proptest::prelude::*;

    fn counts(ppm: u32, canary: [u64; 2], others: [u64; 2]) -> Counts {
        let arm = |[requests, failures]: [u64; 2]| Arm { requests, failures, slow: 0 };
        Counts { weight: Fraction::from_ppm(ppm), canary: arm(canary), others: arm(others), ..Counts::default() }
    }

    #[test]
    fn it_begins_again_with_every_fifty_answers_of_the_canary() {
        let known = |requests| [counts(100_000, [requests, 0], [requests * 9, 0])];
        let first = Recent::default().next(&JUDGE, &known(0)).unwrap();
        assert_eq!(first.next(&JUDGE, &known(49)), None);
        let second = first.next(&JUDGE, &known(50)).unwrap();
        assert_eq!((first.beginnings, second.beginnings), (1, 2));
        assert!((second.levels[0][0] - (-ln(2.0))).abs() < 1e-9, "nothing happened: the first has the greatest share");
        assert_eq!(second.next(&JUDGE, &known(40)), None, "of two workers, one counted earlier");
    }

    #[test]
    fn what_went_well_before_is_forgotten() {
        let mut recent = Recent::default();
        let mut known = counts(500_000, [0, 0], [0, 0]);
        for _ in 0..100 {
            (known.canary.requests, known.others.requests) = (known.canary.requests + 50, known.others.requests + 50);
            known.others.failures += 10;
            recent = recent.next(&JUDGE, &[known]).unwrap();
        }
        let least = -ln(100.0) - ln(101.0);
        let levels = recent.levels(&JUDGE, &[known]).unwrap();
        assert!(levels[0].iter().all(|level| (level - least).abs() < 1e-9), "{levels:?}");
        known.canary.failures += 10;
        let (lately, whole) = (recent.levels(&JUDGE, &[known]).unwrap(), JUDGE.levels(&[known]));
        let greatest = |levels: &Levels| levels[0].iter().copied().fold(f64::MIN, f64::max);
        assert!(greatest(&lately) > least + 5.0 && greatest(&whole) < -190.0, "{lately:?} {whole:?}");
    }

    #[test]
    fn evidence_for_another_question_is_none() {
        let known = [counts(500_000, [100, 20], [100, 0])];
        let recent = Recent::default().next(&JUDGE, &[]).unwrap();
        assert!(recent.levels(&JUDGE, &known).is_some());
        let stricter = Judge { limit: Some(Fraction::from_ppm(1)), ..JUDGE };
        assert_eq!(recent.levels(&stricter, &known), None);
        let next = recent.next(&stricter, &known).unwrap();
        assert_eq!(next.since(&known), [counts(500_000, [0, 0], [0, 0])], "what was known is not evidence");
        assert_eq!(next.beginnings, 2, "and what was spent is spent");
    }

    #[test]
    fn a_weight_that_comes_again_is_not_counted_twice() {
        let [five, ten] = [counts(50_000, [100, 1], [0, 0]), counts(100_000, [100, 2], [0, 0])];
        let recent = Recent::default().next(&JUDGE, &[five]).unwrap();
        let recent = recent.next(&JUDGE, &[ten]).unwrap();
        assert_eq!(recent.since(&[five, ten]), [counts(50_000, [0, 0], [0, 0]), counts(100_000, [0, 0], [0, 0])]);
        let many: Vec<Counts> = (1..=40).map(|ppm| counts(ppm, [100, 50], [100, 0])).collect();
        let full = recent.next(&JUDGE, &many).unwrap();
        assert_eq!(full.counts.len(), MAX_WEIGHTS);
        assert!(full.since(&many).iter().all(|new| new.canary.requests == 0));
    }

    proptest! {
        #[test]
        fn words_are_read_as_they_were_written(
            entries in proptest::collection::vec((0..1_000_000_u32, any::<[u64; 7]>()), 0..20),
            levels in any::<[i32; 24]>(),
            (beginnings, terms) in any::<(u32, (u32, u32, u64))>(),
        ) {
            let mut recent = Recent {
                beginnings,
                terms: Terms { tolerance: terms.0, limit: terms.1, p99_increase: terms.2 },
                counts: entries.iter().map(|(ppm, numbers)| Counts::new(Fraction::from_ppm(*ppm), *numbers)).collect(),
                ..Recent::default()
            };
            for (level, given) in recent.levels.as_flattened_mut().iter_mut().zip(levels) {
                *level = f64::from(given) / 7.0;
            }
            let word = recent.encode();
            prop_assert_eq!(Recent::decode(&word), Some(recent));
            prop_assert_eq!(Recent::decode(&word[..word.len() - 1]), None);
        }

        #[test]
        fn any_bytes_decode_to_something_or_nothing(word in proptest::collection::vec(any::<u8>(), 0..600)) {
            let known = [counts(500_000, [u64::MAX, 20], [100, u64::MAX])];
            for word in [word.clone(), [&[SCHEMA], &*word].concat()] {
                let recent = Recent::decode(&word).unwrap_or_default();
                let next = recent.next(&JUDGE, &known).unwrap_or_default();
                let _ = JUDGE.judge(&known, 0, next.levels(&JUDGE, &known));
            }
        }
    }
}
