//! The choice of a destination for one request, from plain values.

use super::cohort::{cohort, stable_draw};
use super::cohort_header::CohortAssignment;
use super::policy::{Canary, Split};
use crate::host::Properties;
use crate::http::Request;
use crate::key::KeyContext;
use crate::units::{Fraction, UnixNanos, point};
use std::borrow::Cow;

/// The chosen destination, and the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// An index into the split's destinations.
    pub destination: usize,
    pub reason: SelectionReason,
}

/// Why a destination was chosen. A bucket is a position from 0 to 999,999; the canary has the buckets below its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelectionReason {
    /// The route has one destination.
    OnlyDestination,
    /// The bucket of the request's key in the rollout.
    Cohort { bucket_ppm: u32 },
    /// The request has no key, and its bucket was drawn at random.
    Drawn { bucket_ppm: u32 },
    /// An earlier hop with the same rollout has determined the bucket.
    Inherited { bucket_ppm: u32 },
}

/// The weight that the canary has for one request, and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EffectiveWeight {
    pub weight: Fraction,
    pub source: WeightSource,
}

/// Where the canary's weight comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightSource {
    /// The weight of the route.
    Route,
    /// The weight that an earlier hop with the same rollout has used.
    Inherited,
    /// The rollout's start time has not come.
    NotStarted,
    /// A stage, by its index.
    Stage(usize),
    /// The request was chosen for the canary, but the cap on exposure is reached.
    CapReached,
    /// The next stage is due, but the judge does not let it begin.
    Held,
    /// The canary has failed.
    RolledBack,
}

impl Canary {
    /// The weight that the wall clock gives to the canary. `now` is called only if there are stages. `route` is the weight
    /// of the route.
    pub fn scheduled_weight(&self, route: Fraction, now: impl FnOnce() -> UnixNanos) -> EffectiveWeight {
        let Some(schedule) = &self.schedule else {
            return EffectiveWeight { weight: route, source: WeightSource::Route };
        };
        let stage = schedule.stage(now());
        let source = stage.map_or(WeightSource::NotStarted, WeightSource::Stage);
        EffectiveWeight { weight: schedule.weight(stage), source }
    }
}

impl Split {
    /// The weight that the route gives to a destination.
    pub fn weight(&self, destination: usize) -> Fraction {
        self.destinations.get(destination).map_or(Fraction::NONE, |(_, weight)| *weight)
    }

    /// The cohort key of `request`, from the first source that the request has.
    pub fn key<'a>(&self, request: &Request<'a>, route: &'a str, properties: &dyn Properties) -> Option<Cow<'a, [u8]>> {
        self.canary
            .as_ref()?
            .key
            .iter()
            .find_map(|source| source.extract(&KeyContext { request, route, subset: None, properties }))
    }

    /// Chooses a destination for a request with `key`. `draw` returns a uniformly random number; it is called only if there
    /// is no key. A canary has `weight`; the other destinations share the rest in proportion to their weights.
    pub fn choose(&self, weight: Fraction, key: Option<&[u8]>, draw: impl FnOnce() -> u64) -> Selection {
        if self.destinations.len() == 1 {
            return Selection { destination: 0, reason: SelectionReason::OnlyDestination };
        }
        let Some(canary) = &self.canary else {
            let bucket_ppm = point(draw());
            return Selection { destination: self.at(bucket_ppm, None), reason: SelectionReason::Drawn { bucket_ppm } };
        };
        match key {
            Some(key) => {
                let rollout = canary.rollout.as_bytes();
                let bucket_ppm = cohort(rollout, key);
                let destination = self.canary_or_other(canary, weight, bucket_ppm, || stable_draw(rollout, key));
                Selection { destination, reason: SelectionReason::Cohort { bucket_ppm } }
            }
            None => {
                let drawn = draw();
                let bucket_ppm = point(drawn);
                // The bucket does not depend on the low bits, so these can choose among the other destinations.
                let destination = self.canary_or_other(canary, weight, bucket_ppm, || drawn.wrapping_mul(1_000_000));
                Selection { destination, reason: SelectionReason::Drawn { bucket_ppm } }
            }
        }
    }

    /// Chooses a destination in the bucket that an earlier hop has determined. The canary has `weight`; `key` is the key
    /// that the request has at this hop.
    pub fn follow(&self, inherited: CohortAssignment, weight: Fraction, key: Option<&[u8]>) -> Selection {
        let bucket_ppm = inherited.bucket_ppm;
        let Some(canary) = self.canary.as_ref().filter(|_| self.destinations.len() > 1) else {
            return Selection { destination: 0, reason: SelectionReason::OnlyDestination };
        };
        let draw = || stable_draw(canary.rollout.as_bytes(), key.unwrap_or(&bucket_ppm.to_le_bytes()));
        Selection {
            destination: self.canary_or_other(canary, weight, bucket_ppm, draw),
            reason: SelectionReason::Inherited { bucket_ppm },
        }
    }

    /// The canary if the bucket lies below its weight, else one of the other destinations in proportion to their weights.
    fn canary_or_other(&self, canary: &Canary, weight: Fraction, bucket_ppm: u32, draw: impl FnOnce() -> u64) -> usize {
        if bucket_ppm < weight.ppm() {
            return canary.destination;
        }
        let rest = Fraction::WHOLE.ppm() - self.weight(canary.destination).ppm();
        let bucket_ppm = (u128::from(draw()) * u128::from(rest)) >> 64;
        self.at(bucket_ppm as u32, Some(canary.destination))
    }

    /// The destination whose interval contains `bucket_ppm`, when the weights are laid side by side without `except`.
    fn at(&self, bucket_ppm: u32, except: Option<usize>) -> usize {
        let mut end = 0;
        let mut last = 0;
        for (index, (_, weight)) in self.destinations.iter().enumerate() {
            if Some(index) == except || *weight == Fraction::NONE {
                continue;
            }
            last = index;
            end += weight.ppm();
            if bucket_ppm < end {
                break;
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::super::policy::Destination;
    use super::super::stages::{Schedule, Stage};
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn split(weights: &[u32], canary: Option<usize>) -> Split {
        let destination = |name: usize| Destination {
            host: "h".into(),
            subset: format!("v{name}").into(),
            steering: format!("v{name}").into(),
        };
        Split {
            destinations: weights
                .iter()
                .enumerate()
                .map(|(name, percent)| (destination(name), Fraction::from_ppm(percent * 10_000)))
                .collect(),
            canary: canary.map(|destination| {
                Arc::new(Canary {
                    destination,
                    rollout: "r".into(),
                    key: Vec::new(),
                    schedule: None,
                    max_requests: None,
                    judge: None,
                    shadow: false,
                })
            }),
        }
    }

    fn weight(split: &Split) -> Fraction {
        split.canary.as_ref().map_or(Fraction::NONE, |canary| split.weight(canary.destination))
    }

    fn chosen(split: &Split, key: &str) -> usize {
        split.choose(weight(split), Some(key.as_bytes()), || unreachable!("a key needs no draw")).destination
    }

    #[test]
    fn a_cohort_has_its_size_and_a_higher_weight_moves_no_key_out() {
        let keys: Vec<String> = (0..20_000).map(|n| format!("user-{n}")).collect();
        let five = split(&[95, 5], Some(1));
        let quarter = split(&[75, 25], Some(1));
        let inside: Vec<&String> = keys.iter().filter(|key| chosen(&five, key) == 1).collect();
        let sigma = (20_000.0_f64 * 0.05 * 0.95).sqrt();
        assert!((inside.len() as f64 - 1000.0).abs() < 3.0 * sigma, "{} of 20000 at 5 %", inside.len());
        assert!(inside.iter().all(|key| chosen(&quarter, key) == 1));
    }

    #[test]
    fn raising_the_canary_does_not_shuffle_the_others() {
        let before = split(&[60, 30, 10], Some(2));
        let after = split(&[40, 20, 40], Some(2));
        for n in 0..5_000 {
            let key = format!("user-{n}");
            let now = chosen(&after, &key);
            assert!(now == 2 || now == chosen(&before, &key), "{key}");
        }
    }

    #[test]
    fn a_stage_replaces_the_weight_and_the_others_keep_their_proportion() {
        let mut split = split(&[60, 30, 10], Some(2));
        let stage = |percent: u32| Stage { weight: Fraction::from_ppm(percent * 10_000), duration: 10 };
        let stages = vec![stage(0), stage(40), stage(100)];
        let schedule = Schedule { start: UnixNanos::from_nanos(100), stages };
        Arc::get_mut(split.canary.as_mut().unwrap()).unwrap().schedule = Some(schedule);
        for (now, source, canary) in [
            (99, WeightSource::NotStarted, 0.0),
            (100, WeightSource::Stage(0), 0.0),
            (110, WeightSource::Stage(1), 0.4),
            (120, WeightSource::Stage(2), 1.0),
        ] {
            let effective =
                split.canary.as_ref().unwrap().scheduled_weight(Fraction::NONE, || UnixNanos::from_nanos(now));
            assert_eq!(effective.source, source);
            let mut counts = [0_u32; 3];
            for n in 0..30_000 {
                counts[split.choose(effective.weight, Some(format!("user-{n}").as_bytes()), || 0).destination] += 1;
            }
            let expected = [(1.0 - canary) * 2.0 / 3.0, (1.0 - canary) / 3.0, canary];
            for (count, expected) in counts.into_iter().zip(expected) {
                assert!((f64::from(count) / 30_000.0 - expected).abs() < 0.015, "at {now}: {counts:?}");
            }
        }
    }

    #[test]
    fn without_a_key_the_weights_are_drawn() {
        for canary in [None, Some(1)] {
            let split = split(&[60, 30, 10], canary);
            let mut state = 7;
            let mut counts = [0_u32; 3];
            for _ in 0..100_000 {
                let choice = split.choose(weight(&split), None, || crate::random::split_mix(&mut state));
                counts[choice.destination] += 1;
            }
            for (count, expected) in counts.into_iter().zip([60_000.0_f64, 30_000.0, 10_000.0]) {
                let sigma = (expected * (1.0 - expected / 100_000.0)).sqrt();
                assert!((f64::from(count) - expected).abs() < 4.0 * sigma, "{counts:?}");
            }
        }
    }

    #[test]
    fn a_hop_follows_what_was_decided_and_chooses_the_others_by_its_own_weights() {
        let split = split(&[60, 30, 10], Some(2));
        let mut counts = [0_u32; 3];
        for bucket in 0..100_000 {
            let inherited = CohortAssignment { bucket_ppm: bucket * 10, weight: Fraction::from_ppm(400_000) };
            let choice = split.follow(inherited, inherited.weight, None);
            assert_eq!(choice.destination == 2, inherited.bucket_ppm < 400_000, "{inherited:?}");
            assert_eq!(choice, split.follow(inherited, inherited.weight, None));
            counts[choice.destination] += 1;
        }
        assert!((counts[0] as i32 - 40_000).abs() < 600, "{counts:?}");
    }

    proptest! {
        #[test]
        fn a_weight_of_nothing_is_never_chosen(draw in any::<u64>(), key in ".*") {
            let split = split(&[0, 100, 0], Some(2));
            prop_assert_eq!(split.choose(weight(&split), None, || draw).destination, 1);
            prop_assert_eq!(chosen(&split, &key), 1);
        }

        #[test]
        fn monotone_for_every_key(key in ".*", low in 0..100_u32, more in 0..100_u32) {
            let high = (low + more).min(100);
            if chosen(&split(&[100 - low, low], Some(1)), &key) == 1 {
                prop_assert_eq!(chosen(&split(&[100 - high, high], Some(1)), &key), 1);
            }
        }
    }
}
