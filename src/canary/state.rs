//! What the workers of a proxy have agreed on about a rollout: its verdict, its stage, its latency threshold, and what was
//! logged of it.
//!
//! The record outlasts the configuration, so a configuration update changes nothing. A worker reads it for each request
//! that would go to the canary, and at ticks.

use super::judge::Verdict;
use super::stages::Progress;
use crate::host::SharedData;
use crate::shared_data::{Change, Contended, Record, SharedCell};
use crate::units::{Fraction, UnixNanos};

/// The state of a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RolloutState {
    /// The hash of the rollout's name; 0 in a record of the first schema.
    pub rollout: u64,
    pub verdict: Verdict,
    /// The canary's weight when the verdict was found.
    pub verdict_weight: Fraction,
    /// `None` while the rollout is in its first stage, or if its stages do not wait for evidence.
    pub progress: Option<Progress>,
    /// In microseconds; 0 while it is unknown.
    pub latency_threshold: u64,
    /// The stage that was logged last: the canary's weight, and whether the next stage was held back.
    pub logged: Option<(Fraction, bool)>,
}

impl RolloutState {
    /// The state of a rollout that has just begun.
    pub(super) fn new(rollout: u64) -> RolloutState {
        RolloutState {
            rollout,
            verdict: Verdict::Insufficient,
            verdict_weight: Fraction::NONE,
            progress: None,
            latency_threshold: 0,
            logged: None,
        }
    }

    /// Takes over what `part`, a record of the first schema, has.
    pub(super) fn take_over(&mut self, part: RolloutState) {
        if part.verdict != Verdict::Insufficient {
            (self.verdict, self.verdict_weight) = (part.verdict, part.verdict_weight);
        }
        self.progress = part.progress.or(self.progress);
        self.latency_threshold = self.latency_threshold.max(part.latency_threshold);
    }
}

const NO_STAGE: u8 = u8::MAX;
const NOT_LOGGED: u32 = u32::MAX;

/// The second schema. In the first one verdict, stage and threshold had a key each, and different lengths.
impl Record for RolloutState {
    const SCHEMA: u8 = 2;

    fn encode(&self, bytes: &mut Vec<u8>) {
        let (stage, entered) = match self.progress {
            Some(progress) => (u8::try_from(progress.stage).unwrap_or(NO_STAGE), progress.entered),
            None => (NO_STAGE, UnixNanos::ZERO),
        };
        let (logged, is_held) = self.logged.map_or((NOT_LOGGED, false), |(weight, is_held)| (weight.ppm(), is_held));
        bytes.extend_from_slice(&self.rollout.to_le_bytes());
        bytes.push(self.verdict.to_byte());
        bytes.extend_from_slice(&self.verdict_weight.ppm().to_le_bytes());
        bytes.push(stage);
        bytes.extend_from_slice(&entered.to_le_bytes());
        bytes.extend_from_slice(&self.latency_threshold.to_le_bytes());
        bytes.extend_from_slice(&logged.to_le_bytes());
        bytes.push(u8::from(is_held));
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<RolloutState> {
        if schema == 1 {
            return decode_first_schema(bytes);
        }
        let (rollout, bytes) = bytes.split_first_chunk()?;
        let (verdict, bytes) = bytes.split_first()?;
        let (verdict_weight, bytes) = bytes.split_first_chunk()?;
        let (stage, bytes) = bytes.split_first()?;
        let (entered, bytes) = bytes.split_first_chunk()?;
        let (latency_threshold, bytes) = bytes.split_first_chunk()?;
        let (logged, bytes) = bytes.split_first_chunk()?;
        let ([is_held @ 0..=1], Self::SCHEMA) = (bytes, schema) else { return None };
        let logged = u32::from_le_bytes(*logged);
        let progress = Progress { stage: usize::from(*stage), entered: UnixNanos::from_le_bytes(*entered) };
        Some(RolloutState {
            rollout: u64::from_le_bytes(*rollout),
            verdict: Verdict::from_byte(*verdict)?,
            verdict_weight: Fraction::from_ppm(u32::from_le_bytes(*verdict_weight)),
            progress: (*stage != NO_STAGE).then_some(progress),
            latency_threshold: u64::from_le_bytes(*latency_threshold),
            logged: (logged != NOT_LOGGED).then(|| (Fraction::from_ppm(logged), *is_held == 1)),
        })
    }
}

/// Reads one part of the state: five bytes are a verdict, eight are a threshold, nine are a stage.
fn decode_first_schema(bytes: &[u8]) -> Option<RolloutState> {
    let mut state = RolloutState::new(0);
    if let Ok(threshold) = <[u8; 8]>::try_from(bytes) {
        state.latency_threshold = u64::from_le_bytes(threshold);
        return Some(state);
    }
    let (first, rest) = bytes.split_first()?;
    if let Ok(weight) = <[u8; 4]>::try_from(rest) {
        state.verdict = Verdict::from_byte(*first)?;
        state.verdict_weight = Fraction::from_ppm(u32::from_le_bytes(weight));
    } else {
        let entered = <[u8; 8]>::try_from(rest).ok().map(UnixNanos::from_le_bytes)?;
        state.progress = Some(Progress { stage: usize::from(*first), entered });
    }
    Some(state)
}

impl Verdict {
    fn to_byte(self) -> u8 {
        match self {
            Verdict::Insufficient => 0,
            Verdict::Pass => 1,
            Verdict::Fail => 2,
        }
    }

    fn from_byte(byte: u8) -> Option<Verdict> {
        match byte {
            0 => Some(Verdict::Insufficient),
            1 => Some(Verdict::Pass),
            2 => Some(Verdict::Fail),
            _ => None,
        }
    }
}

/// The state of one rollout in shared data.
#[derive(Debug)]
pub(super) struct SharedState {
    cell: SharedCell<RolloutState>,
    rollout: u64,
}

impl SharedState {
    pub(super) fn new(key: String, rollout: u64) -> SharedState {
        SharedState { cell: SharedCell::new(key), rollout }
    }

    /// The state; `None` if the record is missing, garbage, or another rollout's.
    pub(super) fn read(&self, store: &impl SharedData) -> Option<RolloutState> {
        self.cell.read(store).record().filter(|state| state.rollout == self.rollout)
    }

    /// Changes the state, or `known` if there is none. Returns the new state, and whether it was written.
    ///
    /// # Errors
    /// [`Contended`] if the record could not be written.
    #[inline(never)]
    pub(super) fn update(
        &self,
        store: &impl SharedData,
        known: RolloutState,
        change: &mut dyn FnMut(&mut RolloutState),
    ) -> Result<(RolloutState, bool), Contended> {
        self.cell.update(store, |stored| {
            let found = stored.record().filter(|state| state.rollout == self.rollout);
            let mut state = found.unwrap_or(known);
            change(&mut state);
            if found == Some(state) { Change::Keep((state, false)) } else { Change::Write(state, (state, true)) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;
    use proptest::prelude::*;

    #[test]
    fn garbage_is_no_state_and_is_replaced_by_what_the_worker_knows() {
        let failed = RolloutState { verdict: Verdict::Fail, ..RolloutState::new(7) };
        for garbage in [&b""[..], b"\x01", b"\x01\x03\0\0\0\0", b"\x02\x02\0\0\0\0", b"\x01\x02\0\0\0", b"\x03"] {
            let (host, state) = (Sim::new(1), SharedState::new("w".into(), 7));
            host.overwrite("w", garbage);
            assert_eq!(state.read(&host), None, "{garbage:?}");
            assert_eq!(state.update(&host, failed, &mut |_| {}), Ok((failed, true)), "{garbage:?}");
            assert_eq!(state.read(&host), Some(failed), "{garbage:?}");
            assert_eq!(state.update(&host, RolloutState::new(7), &mut |_| {}), Ok((failed, false)));
        }
    }

    #[test]
    fn the_state_of_another_rollout_counts_as_absent() {
        let host = Sim::new(1);
        let [one, two] = [1, 2].map(|rollout| SharedState::new("w".into(), rollout));
        one.update(&host, RolloutState::new(1), &mut |state| state.verdict = Verdict::Fail).unwrap();
        assert_eq!(two.read(&host), None);
        assert_eq!(two.update(&host, RolloutState::new(2), &mut |_| {}), Ok((RolloutState::new(2), true)));
    }

    proptest! {
        #[test]
        fn a_state_is_read_as_it_was_written(
            (rollout, latency_threshold, entered) in any::<(u64, u64, u64)>(),
            verdict in 0..3_u8,
            weights in [0..=1_000_000_u32, 0..=1_000_000_u32],
            stage in proptest::option::of(0..16_usize),
            is_held in proptest::option::of(any::<bool>()),
        ) {
            let [verdict_weight, logged] = weights.map(Fraction::from_ppm);
            let state = RolloutState {
                rollout,
                verdict: Verdict::from_byte(verdict).unwrap(),
                verdict_weight,
                progress: stage.map(|stage| Progress { stage, entered: UnixNanos::from_nanos(entered) }),
                latency_threshold,
                logged: is_held.map(|is_held| (logged, is_held)),
            };
            let mut bytes = Vec::new();
            state.encode(&mut bytes);
            prop_assert_eq!(RolloutState::decode(2, &bytes), Some(state));
            prop_assert_eq!(RolloutState::decode(2, &bytes[1..]), None);
        }

        #[test]
        fn any_bytes_decode_to_a_state_or_to_nothing(
            schema in 0..4_u8,
            bytes in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            let _ = RolloutState::decode(schema, &bytes);
        }
    }
}
