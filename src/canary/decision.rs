//! Which destination one request goes to.

use super::cohort::{cohort, stable_draw};
use super::cohort_header::Decided;
use super::policy::{Canary, Split};
use crate::host::Properties;
use crate::http::Request;
use crate::key::KeyContext;
use crate::units::{Fraction, UnixNanos, point};
use std::borrow::Cow;

/// The destination chosen, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// An index into the split's destinations.
    pub destination: usize,
    pub why: Why,
}

/// Why a destination was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There is no other.
    Only,
    /// The request's key stands at this place of the rollout, in parts per million.
    Cohort { place: u32 },
    /// No key: this request was drawn at this place, in parts per million.
    Drawn { place: u32 },
    /// An earlier hop with the same rollout found it at this place, in parts per million.
    Carried { place: u32 },
}

/// How much of its route's traffic a canary gets, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub weight: Fraction,
    pub term: Term,
}

/// What a canary's share was taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// The weight of the route.
    Route,
    /// What an earlier hop with the same rollout gave it.
    Carried,
    /// Its start time is yet to come.
    NotStarted,
    /// This one of its stages, an index.
    Stage(usize),
    /// This request would have gone to the canary, and its cap on exposure is reached.
    Exhausted,
    /// The next stage is due, and the evidence does not let it begin.
    Held,
    /// It has failed.
    RolledBack,
}

impl Canary {
    /// The share by the clock; `now` is asked only where there are stages. `route` is the weight of the route.
    pub fn share(&self, route: Fraction, now: impl FnOnce() -> UnixNanos) -> Share {
        let Some(schedule) = &self.schedule else { return Share { weight: route, term: Term::Route } };
        let stage = schedule.stage(now());
        Share { weight: schedule.weight(stage), term: stage.map_or(Term::NotStarted, Term::Stage) }
    }
}

impl Split {
    /// The weight of a destination, as the route has it.
    pub fn weight(&self, destination: usize) -> Fraction {
        self.destinations.get(destination).map_or(Fraction::NONE, |(_, weight)| *weight)
    }

    /// The key that decides for `request`: that of the first source which it shows.
    pub fn key<'a>(&self, request: &Request<'a>, route: &'a str, properties: &dyn Properties) -> Option<Cow<'a, [u8]>> {
        self.canary
            .as_ref()?
            .key
            .iter()
            .find_map(|source| source.extract(&KeyContext { request, route, subset: None, properties }))
    }

    /// Chooses for a request with `key`; `draw` is a uniformly random number that is used where there is no key. The
    /// canary, if there is one, gets `weight`; the others share the rest by their relative weights.
    pub fn choose(&self, weight: Fraction, key: Option<&[u8]>, draw: impl FnOnce() -> u64) -> Choice {
        if self.destinations.len() == 1 {
            return Choice { destination: 0, why: Why::Only };
        }
        let Some(canary) = &self.canary else {
            let place = point(draw());
            return Choice { destination: self.at(place, None), why: Why::Drawn { place } };
        };
        match key {
            Some(key) => {
                let rollout = canary.rollout.as_bytes();
                let place = cohort(rollout, key);
                let destination = self.on_trial(canary, weight, place, || stable_draw(rollout, key));
                Choice { destination, why: Why::Cohort { place } }
            }
            None => {
                let drawn = draw();
                let place = point(drawn);
                // The low bits have no part in the place, so they draw among the others.
                let destination = self.on_trial(canary, weight, place, || drawn.wrapping_mul(1_000_000));
                Choice { destination, why: Why::Drawn { place } }
            }
        }
    }

    /// Chooses as an earlier hop did, but gives the canary `weight`; `key` is the request's key, if it shows one here.
    pub fn follow(&self, carried: Decided, weight: Fraction, key: Option<&[u8]>) -> Choice {
        let place = carried.place;
        let Some(canary) = self.canary.as_ref().filter(|_| self.destinations.len() > 1) else {
            return Choice { destination: 0, why: Why::Only };
        };
        let draw = || stable_draw(canary.rollout.as_bytes(), key.unwrap_or(&place.to_le_bytes()));
        Choice { destination: self.on_trial(canary, weight, place, draw), why: Why::Carried { place } }
    }

    /// The canary for those who stand below its weight; for the others, one of the rest by their relative weights.
    fn on_trial(&self, canary: &Canary, weight: Fraction, place: u32, draw: impl FnOnce() -> u64) -> usize {
        if place < weight.ppm() {
            return canary.destination;
        }
        let rest = Fraction::WHOLE.ppm() - self.weight(canary.destination).ppm();
        let place = (u128::from(draw()) * u128::from(rest)) >> 64;
        self.at(place as u32, Some(canary.destination))
    }

    /// The destination whose share of the line, `except` one, covers `place`.
    fn at(&self, place: u32, except: Option<usize>) -> usize {
        let mut end = 0;
        let mut last = 0;
        for (index, (_, weight)) in self.destinations.iter().enumerate() {
            if Some(index) == except || *weight == Fraction::NONE {
                continue;
            }
            last = index;
            end += weight.ppm();
            if place < end {
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
            canary: canary.map(|destination| Canary {
                destination,
                rollout: "r".into(),
                key: Vec::new(),
                schedule: None,
                max_requests: None,
                exposed_word: "".into(),
                judge: None,
                shadow: false,
                state_prefix: "".into(),
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
    fn a_cohort_has_its_size_and_raising_it_moves_nobody_out() {
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
        split.canary.as_mut().unwrap().schedule = Some(Schedule { start: UnixNanos::from_nanos(100), stages });
        for (now, term, canary) in [
            (99, Term::NotStarted, 0.0),
            (100, Term::Stage(0), 0.0),
            (110, Term::Stage(1), 0.4),
            (120, Term::Stage(2), 1.0),
        ] {
            let share = split.canary.as_ref().unwrap().share(Fraction::NONE, || UnixNanos::from_nanos(now));
            assert_eq!(share.term, term);
            let mut counts = [0_u32; 3];
            for n in 0..30_000 {
                counts[split.choose(share.weight, Some(format!("user-{n}").as_bytes()), || 0).destination] += 1;
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
        for place in 0..100_000 {
            let carried = Decided { place: place * 10, weight: Fraction::from_ppm(400_000) };
            let choice = split.follow(carried, carried.weight, None);
            assert_eq!(choice.destination == 2, carried.place < 400_000, "{carried:?}");
            assert_eq!(choice, split.follow(carried, carried.weight, None));
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
