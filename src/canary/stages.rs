//! Stages: how the canary's weight grows with the wall clock.
//!
//! The stage is a function of the policy and the time alone, so all proxies with correct clocks are in the same stage,
//! without a configuration update, a restart or a message. The exception are stages that wait for evidence: each proxy
//! records its own [`Progress`], because each proxy has its own evidence.

use crate::units::{Fraction, UnixNanos};

/// The `stages` of a rollout, from its `startTime` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    pub start: UnixNanos,
    /// Never empty. The weights never decrease, so that a cohort only grows.
    pub stages: Vec<Stage>,
}

/// One stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    pub weight: Fraction,
    /// In nanoseconds. The last stage has no end, whatever its duration.
    pub duration: u64,
}

impl Schedule {
    /// The stage at `now`, an index into [`Schedule::stages`]; `None` before the start.
    pub fn stage(&self, now: UnixNanos) -> Option<usize> {
        let mut left = now.checked_since(self.start)?;
        let last = self.stages.len().saturating_sub(1);
        for (index, stage) in self.stages.iter().enumerate().take(last) {
            match left.checked_sub(stage.duration) {
                Some(rest) => left = rest,
                None => return Some(index),
            }
        }
        Some(last)
    }

    /// The canary's weight in `stage`; before the first stage it is zero.
    pub fn weight(&self, stage: Option<usize>) -> Fraction {
        stage.and_then(|stage| self.stages.get(stage)).map_or(Fraction::NONE, |stage| stage.weight)
    }
}

/// The stage of a proxy whose stages wait for evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub stage: usize,
    pub entered: UnixNanos,
}

impl Schedule {
    /// The earliest instant at which the stage after `progress` may begin. `None` in the last stage.
    pub(super) fn due(&self, progress: Progress) -> Option<UnixNanos> {
        let stage = self.stages.get(progress.stage).filter(|_| progress.stage + 1 < self.stages.len())?;
        Some(progress.entered.saturating_add(stage.duration))
    }

    /// The stage that a proxy is in whose stages wait for evidence; `known` is what it has recorded.
    pub(super) fn progress(&self, known: Option<Progress>) -> Progress {
        let progress = known.unwrap_or(Progress { stage: 0, entered: self.start });
        Progress { stage: progress.stage.min(self.stages.len().saturating_sub(1)), ..progress }
    }

    /// The progress after the next stage has begun. `None` if that stage is not due at `now`.
    ///
    /// No stage is skipped, and each stage lasts at least as long as its duration.
    pub(super) fn enter_next(&self, progress: Progress, now: UnixNanos) -> Option<Progress> {
        let is_due = self.due(progress).is_some_and(|due| now >= due);
        is_due.then_some(Progress { stage: progress.stage + 1, entered: now })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(nanoseconds: u64) -> UnixNanos {
        UnixNanos::from_nanos(nanoseconds)
    }

    fn schedule(durations: &[u64]) -> Schedule {
        let stage = |(index, duration): (usize, &u64)| Stage {
            weight: Fraction::from_ppm((index as u32 + 1) * 10_000),
            duration: *duration,
        };
        Schedule { start: at(1_000), stages: durations.iter().enumerate().map(stage).collect() }
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
            assert_eq!(schedule.stage(at(now)), stage, "at {now}");
        }
        assert_eq!(schedule.weight(None), Fraction::NONE);
        assert_eq!(schedule.weight(Some(1)), Fraction::from_ppm(20_000));
    }

    #[test]
    fn stages_that_wait_last_their_duration_and_are_not_skipped() {
        let schedule = schedule(&[100, 200, 0]);
        let mut known = None;
        let mut stage = |schedule: &Schedule, now: u64, may: bool| {
            let progress = schedule.progress(known);
            known = if may { schedule.enter_next(progress, at(now)) } else { None }.or(Some(progress));
            schedule.progress(known).stage
        };
        assert_eq!(stage(&schedule, 1_000, true), 0);
        assert_eq!(stage(&schedule, 1_099, true), 0);
        assert_eq!(stage(&schedule, 5_000, false), 0, "held");
        assert_eq!(stage(&schedule, 5_000, true), 1, "one stage, however late it is");
        assert_eq!(stage(&schedule, 5_199, true), 1);
        assert_eq!(stage(&schedule, 5_200, true), 2);
        assert_eq!(stage(&schedule, 9_000, true), 2, "the last one stays");
        assert_eq!(stage(&schedule, 1_000, false), 2, "nothing goes back");
        let shorter = Schedule { stages: schedule.stages[..2].to_vec(), ..schedule.clone() };
        assert_eq!(stage(&shorter, 9_000, true), 1);
    }

    proptest! {
        #[test]
        fn time_never_takes_a_stage_back(
            durations in proptest::collection::vec(1..1_000_u64, 1..16),
            now in 0..20_000_u64,
            later in 0..20_000_u64,
        ) {
            let schedule = schedule(&durations);
            prop_assert!(schedule.stage(at(now)) <= schedule.stage(at(now + later)));
        }
    }
}
