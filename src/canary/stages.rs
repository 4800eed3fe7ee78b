//! Stages: how the canary's weight grows with the wall clock.
//!
//! The stage is a function of the policy and the time and of nothing else, so every proxy whose clock is right is in
//! the same one, without a push, a restart or a word between them.

use crate::units::{Fraction, Wall};

/// The `stages` of a rollout, from its `startTime` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    pub start: Wall,
    /// Never empty. The weights never go down, so that a cohort only grows.
    pub stages: Vec<Stage>,
}

/// One stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    pub weight: Fraction,
    /// In nanoseconds. The last stage stays, whatever stands here.
    pub duration: u64,
}

impl Schedule {
    /// The stage at `now`, an index; `None` before the start.
    pub fn stage(&self, now: Wall) -> Option<usize> {
        let mut left = now.checked_sub(self.start)?;
        let last = self.stages.len().saturating_sub(1);
        for (index, stage) in self.stages.iter().enumerate().take(last) {
            match left.checked_sub(stage.duration) {
                Some(rest) => left = rest,
                None => return Some(index),
            }
        }
        Some(last)
    }

    /// The canary's weight in `stage`: nothing before the first.
    pub fn weight(&self, stage: Option<usize>) -> Fraction {
        stage.and_then(|stage| self.stages.get(stage)).map_or(Fraction::NONE, |stage| stage.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn schedule(durations: &[u64]) -> Schedule {
        let stage = |(index, duration): (usize, &u64)| Stage {
            weight: Fraction::from_ppm((index as u32 + 1) * 10_000),
            duration: *duration,
        };
        Schedule { start: 1_000, stages: durations.iter().enumerate().map(stage).collect() }
    }

    #[test]
    fn a_stage_begins_on_its_nanosecond_and_the_last_one_stays() {
        let schedule = schedule(&[100, 200, 0]);
        for (now, stage) in [
            (0, None),
            (999, None),
            (1_000, Some(0)),
            (1_099, Some(0)),
            (1_100, Some(1)),
            (1_299, Some(1)),
            (1_300, Some(2)),
            (u64::MAX, Some(2)),
        ] {
            assert_eq!(schedule.stage(now), stage, "at {now}");
        }
        assert_eq!(schedule.weight(None), Fraction::NONE);
        assert_eq!(schedule.weight(Some(1)), Fraction::from_ppm(20_000));
    }

    proptest! {
        #[test]
        fn time_never_takes_a_stage_back(
            durations in proptest::collection::vec(1..1_000_u64, 1..16),
            now in 0..20_000_u64,
            later in 0..20_000_u64,
        ) {
            let schedule = schedule(&durations);
            prop_assert!(schedule.stage(now) <= schedule.stage(now + later));
        }
    }
}
