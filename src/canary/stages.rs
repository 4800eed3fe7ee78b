//! Stages: how the canary's weight grows with the wall clock.
//!
//! The stage is a function of the policy and the time and of nothing else, so every proxy whose clock is right is in
//! the same one, without a push, a restart or a word between them. Only where a stage is to wait for evidence, each
//! proxy keeps its own [`Progress`], because each has its own evidence.

use crate::host::{Change, Conflict, SharedData, update};
use crate::units::{Fraction, UnixNanos};

/// The `stages` of a rollout, from its `startTime` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    pub start: UnixNanos,
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

    /// The canary's weight in `stage`: nothing before the first.
    pub fn weight(&self, stage: Option<usize>) -> Fraction {
        stage.and_then(|stage| self.stages.get(stage)).map_or(Fraction::NONE, |stage| stage.weight)
    }
}

/// How far a proxy has come whose stages wait for evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub stage: usize,
    pub entered: UnixNanos,
}

/// The first byte of the word that keeps the progress, to be changed with its layout.
const SCHEMA: u8 = 1;

impl Schedule {
    /// When the stage after `progress` is due, at the earliest. `None` in the last.
    pub fn due(&self, progress: Progress) -> Option<UnixNanos> {
        let stage = self.stages.get(progress.stage).filter(|_| progress.stage + 1 < self.stages.len())?;
        Some(progress.entered.saturating_add(stage.duration))
    }

    /// How far the workers have come together, kept under `word`: one stage further, if it is due at `now` and
    /// `may_enter`. Every stage takes at least as long as it is written.
    ///
    /// # Errors
    /// [`Conflict`] if the word could not be written.
    pub fn advance(
        &self,
        store: &impl SharedData,
        word: &str,
        now: UnixNanos,
        mut may_enter: impl FnMut() -> bool,
    ) -> Result<Progress, Conflict> {
        update(store, word, |found| {
            let known = found.and_then(Progress::decode);
            let mut progress = known.unwrap_or(Progress { stage: 0, entered: self.start });
            progress.stage = progress.stage.min(self.stages.len().saturating_sub(1));
            if self.due(progress).is_some_and(|due| now >= due) && may_enter() {
                progress = Progress { stage: progress.stage + 1, entered: now };
            }
            if known == Some(progress) { Change::Keep(progress) } else { Change::Write(progress.encode(), progress) }
        })
    }
}

impl Progress {
    fn encode(self) -> Vec<u8> {
        let stage = u8::try_from(self.stage).unwrap_or(u8::MAX);
        [&[SCHEMA, stage], &self.entered.to_le_bytes()[..]].concat()
    }

    fn decode(word: &[u8]) -> Option<Progress> {
        let ([SCHEMA, stage], entered) = word.split_first_chunk::<2>()? else { return None };
        let entered = <[u8; 8]>::try_from(entered).ok().map(UnixNanos::from_le_bytes)?;
        Some(Progress { stage: usize::from(*stage), entered })
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
    fn where_stages_wait_each_takes_its_time_and_none_is_skipped() {
        use crate::host::sim::Sim;
        let (host, schedule) = (Sim::new(1), schedule(&[100, 200, 0]));
        let stage = |now: u64, may: bool| schedule.advance(&host, "w", at(now), || may).unwrap().stage;
        assert_eq!(stage(1_000, true), 0);
        assert_eq!(stage(1_099, true), 0);
        assert_eq!(stage(5_000, false), 0, "held");
        assert_eq!(stage(5_000, true), 1, "one stage, however late it is");
        assert_eq!(stage(5_199, true), 1);
        assert_eq!(stage(5_200, true), 2);
        assert_eq!(stage(9_000, true), 2, "the last one stays");
        assert_eq!(schedule.advance(&host, "w", at(1_000), || false).unwrap().stage, 2, "nothing goes back");
        let shorter = Schedule { stages: schedule.stages[..2].to_vec(), ..schedule.clone() };
        assert_eq!(shorter.advance(&host, "w", at(9_000), || true).unwrap().stage, 1);
    }

    #[test]
    fn a_neighbours_garbage_is_no_progress() {
        use crate::host::Version;
        use crate::host::sim::Sim;
        for garbage in [&b""[..], b"\x01", b"\x02\x01\0\0\0\0\0\0\0\0", b"\x01\x01\0"] {
            let host = Sim::new(1);
            host.set("w", garbage, Version::ABSENT).unwrap();
            let progress = schedule(&[100, 0]).advance(&host, "w", at(1_050), || true).unwrap();
            assert_eq!(progress, Progress { stage: 0, entered: at(1_000) });
        }
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
