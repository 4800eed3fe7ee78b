//! The generic cell rate algorithm (ITU-T I.371, Annex A, virtual scheduling).
//!
//! A key's whole state is its theoretical arrival time (TAT): the instant at which it will have been quiet for long
//! enough to be as good as new. Each request moves it on by one emission interval; a request that would move it more
//! than the burst ahead of now is refused, and the excess is how long to wait. Over any span of length `t` it admits
//! at most `burst + t / interval` requests.

use crate::units::{LATENESS, MonotonicInstant};

/// A rate and a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gcra {
    /// Nanoseconds between two requests at the steady rate; rounded up, so that the rate is never exceeded.
    interval: u64,
    /// How far ahead of now the TAT may get, in nanoseconds: burst times interval.
    tolerance: u64,
}

/// What one request found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// Admitted; this is the TAT from now on.
    Conforms { tat: MonotonicInstant },
    /// Refused; nothing has changed, and this many nanoseconds from now one would be admitted.
    TooEarly { wait: u64 },
}

impl Gcra {
    /// `requests` in every `unit` nanoseconds, `burst` of them at once. `None` where a number is 0 or the burst takes
    /// more than about 146 years to regain.
    pub fn new(requests: u64, unit: u64, burst: u64) -> Option<Gcra> {
        if requests == 0 || burst == 0 || unit == 0 {
            return None;
        }
        let interval = unit.div_ceil(requests);
        let tolerance = interval.checked_mul(burst).filter(|tolerance| *tolerance < u64::MAX / 4)?;
        Some(Gcra { interval, tolerance })
    }

    /// How many requests may come at once.
    pub fn burst(&self) -> u64 {
        self.tolerance / self.interval
    }

    /// Tests a request that counts as `cost` requests at `now` against the arrival time `tat`, of which any instant that
    /// has passed means "fresh", where `reserved` further requests have been promised already. A cost above the burst
    /// never conforms, however long one waits.
    pub fn test(&self, tat: MonotonicInstant, reserved: u32, cost: u32, now: MonotonicInstant) -> Test {
        let after = self.charge(tat, cost, now);
        let ahead = after.saturating_since(now).saturating_add(self.interval.saturating_mul(reserved.into()));
        if ahead <= self.tolerance {
            Test::Conforms { tat: after }
        } else {
            Test::TooEarly { wait: ahead - self.tolerance }
        }
    }

    /// How many more requests could be admitted at `now`.
    pub fn room(&self, tat: MonotonicInstant, reserved: u32, now: MonotonicInstant) -> u64 {
        let ahead = tat.saturating_since(now);
        (self.tolerance.saturating_sub(ahead) / self.interval).saturating_sub(reserved.into())
    }

    /// The TAT after `requests` that were admitted by `now` at the latest.
    pub fn charge(&self, tat: MonotonicInstant, requests: u32, now: MonotonicInstant) -> MonotonicInstant {
        tat.max(now).saturating_add(self.interval.saturating_mul(requests.into()))
    }

    /// The TAT after `requests` that had been admitted are taken back.
    pub fn take_back(&self, tat: MonotonicInstant, requests: u32) -> MonotonicInstant {
        tat.saturating_sub(self.interval.saturating_mul(requests.into()))
    }

    /// Nanoseconds until the whole burst could be admitted again.
    pub fn regained(&self, tat: MonotonicInstant, reserved: u32, now: MonotonicInstant) -> u64 {
        self.charge(tat, reserved, now).saturating_since(now)
    }

    /// In how many nanoseconds a burst is regained.
    pub fn window(&self) -> u64 {
        self.tolerance
    }

    /// The one of two rates whose arrival times may lie further ahead.
    pub fn longer(self, other: Gcra) -> Gcra {
        if other.tolerance > self.tolerance { other } else { self }
    }

    /// The latest arrival time that requests can have led to.
    pub fn latest(&self, now: MonotonicInstant) -> MonotonicInstant {
        now.saturating_add(self.tolerance)
    }

    /// The arrival time that was found, or the latest that there can be: what is later than other workers can have made
    /// it was left by a slower rate.
    pub fn within_reach(&self, tat: MonotonicInstant, now: MonotonicInstant) -> MonotonicInstant {
        let latest = self.latest(now);
        if tat > latest.saturating_add(LATENESS) { latest } else { tat }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    #[test]
    fn a_burst_then_the_rate() {
        let gcra = Gcra::new(100, 60_000_000_000, 3).unwrap();
        let mut tat = at(0);
        let now = at(5_000_000_000);
        for _ in 0..3 {
            let Test::Conforms { tat: after } = gcra.test(tat, 0, 1, now) else { panic!("the burst is admitted") };
            tat = after;
        }
        assert_eq!(gcra.test(tat, 0, 1, now), Test::TooEarly { wait: 600_000_000 });
        assert_eq!(gcra.test(tat, 0, 1, now.saturating_add(599_999_999)), Test::TooEarly { wait: 1 });
        assert!(matches!(gcra.test(tat, 0, 1, now.saturating_add(600_000_000)), Test::Conforms { .. }));
        let back = gcra.take_back(tat, 1);
        assert!(matches!(gcra.test(back, 0, 1, now), Test::Conforms { .. }));
    }

    #[test]
    fn what_overflows_is_no_rate() {
        assert_eq!(Gcra::new(0, 1, 1), None);
        assert_eq!(Gcra::new(1, 1, 0), None);
        assert_eq!(Gcra::new(1, 86_400_000_000_000, u64::MAX), None);
    }

    proptest! {
        #[test]
        fn never_more_than_burst_plus_rate_times_time(
            requests in 1..1000_u64,
            burst in 1..50_u64,
            steps in proptest::collection::vec(0..2_000_000_u64, 1..400),
        ) {
            let unit = 1_000_000_000;
            let gcra = Gcra::new(requests, unit, burst).unwrap();
            let (start, mut tat) = (at(7), at(0));
            let mut now = start;
            let mut admitted = 0_u64;
            for step in steps {
                now = now.saturating_add(step);
                if let Test::Conforms { tat: after } = gcra.test(tat, 0, 1, now) {
                    tat = after;
                    admitted += 1;
                }
                let allowed = burst + now.saturating_since(start) * requests / unit;
                prop_assert!(admitted <= allowed, "{admitted} of {allowed}");
            }
        }
    }
}
