//! The generic cell rate algorithm (ITU-T I.371, Annex A, virtual scheduling).
//!
//! The state of a key is its theoretical arrival time (TAT): the instant from which on the whole burst is available again.
//! Each request moves it forward by one emission interval. A request that would move it more than the burst ahead of now
//! is refused; the excess is the time after which it would be admitted. In any span of length `t` at most
//! `burst + t / interval` requests are admitted.

use crate::units::{LATENESS, MonotonicInstant};

/// A rate and a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gcra {
    /// Nanoseconds between two requests at the sustained rate, rounded up so that the rate is never exceeded.
    interval: u64,
    /// The most nanoseconds that the theoretical arrival time may be ahead of now: burst times interval.
    tolerance: u64,
}

/// Whether a request conforms to the rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conformance {
    /// The request is admitted, and `tat` is the new theoretical arrival time.
    Conforms { tat: MonotonicInstant },
    /// The request is refused. It would be admitted in `wait` nanoseconds.
    TooEarly { wait: u64 },
}

impl Gcra {
    /// A rate of `requests` in `unit` nanoseconds, with up to `burst` requests at once. `None` if a number is 0, or if the
    /// burst takes more than about 146 years to become available again.
    pub fn new(requests: u64, unit: u64, burst: u64) -> Option<Gcra> {
        if requests == 0 || burst == 0 || unit == 0 {
            return None;
        }
        let interval = unit.div_ceil(requests);
        let tolerance = interval.checked_mul(burst).filter(|tolerance| *tolerance < u64::MAX / 4)?;
        Some(Gcra { interval, tolerance })
    }

    /// The most requests that are admitted at once.
    pub fn burst(&self) -> u64 {
        self.tolerance / self.interval
    }

    /// Tests a request that counts as `cost` requests. `tat` is the key's theoretical arrival time; all instants that have
    /// passed mean that the whole burst is available. `reserved` requests are set aside for others. A cost above the burst
    /// never conforms.
    pub fn test(&self, tat: MonotonicInstant, reserved: u32, cost: u32, now: MonotonicInstant) -> Conformance {
        let after = self.charge(tat, cost, now);
        let ahead = after.saturating_since(now).saturating_add(self.interval.saturating_mul(reserved.into()));
        if ahead <= self.tolerance {
            Conformance::Conforms { tat: after }
        } else {
            Conformance::TooEarly { wait: ahead - self.tolerance }
        }
    }

    /// The number of requests that could be admitted at `now`.
    pub fn room(&self, tat: MonotonicInstant, reserved: u32, now: MonotonicInstant) -> u64 {
        let ahead = tat.saturating_since(now);
        (self.tolerance.saturating_sub(ahead) / self.interval).saturating_sub(reserved.into())
    }

    /// The theoretical arrival time after `requests` that were admitted at `now` or earlier.
    pub fn charge(&self, tat: MonotonicInstant, requests: u32, now: MonotonicInstant) -> MonotonicInstant {
        tat.max(now).saturating_add(self.interval.saturating_mul(requests.into()))
    }

    /// The theoretical arrival time after the refund of `requests`.
    pub fn refund(&self, tat: MonotonicInstant, requests: u32) -> MonotonicInstant {
        tat.saturating_sub(self.interval.saturating_mul(requests.into()))
    }

    /// Nanoseconds until the whole burst is available again.
    pub fn time_to_full(&self, tat: MonotonicInstant, reserved: u32, now: MonotonicInstant) -> u64 {
        self.charge(tat, reserved, now).saturating_since(now)
    }

    /// Nanoseconds after which a spent burst is available again.
    pub fn window(&self) -> u64 {
        self.tolerance
    }

    /// The rate whose theoretical arrival times may be further ahead of now.
    pub fn longer(self, other: Gcra) -> Gcra {
        if other.tolerance > self.tolerance { other } else { self }
    }

    /// The latest theoretical arrival time that requests can lead to.
    pub fn latest(&self, now: MonotonicInstant) -> MonotonicInstant {
        now.saturating_add(self.tolerance)
    }

    /// `tat`, or the latest possible arrival time if `tat` is later than other workers can have made it. A slower rate of
    /// an earlier policy can leave such a time.
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
    fn a_burst_is_admitted_and_then_the_rate() {
        let gcra = Gcra::new(100, 60_000_000_000, 3).unwrap();
        let mut tat = at(0);
        let now = at(5_000_000_000);
        for _ in 0..3 {
            let Conformance::Conforms { tat: after } = gcra.test(tat, 0, 1, now) else {
                panic!("the burst is admitted")
            };
            tat = after;
        }
        assert_eq!(gcra.test(tat, 0, 1, now), Conformance::TooEarly { wait: 600_000_000 });
        assert_eq!(gcra.test(tat, 0, 1, now.saturating_add(599_999_999)), Conformance::TooEarly { wait: 1 });
        assert!(matches!(gcra.test(tat, 0, 1, now.saturating_add(600_000_000)), Conformance::Conforms { .. }));
        let back = gcra.refund(tat, 1);
        assert!(matches!(gcra.test(back, 0, 1, now), Conformance::Conforms { .. }));
    }

    #[test]
    fn rates_that_overflow_are_rejected() {
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
                if let Conformance::Conforms { tat: after } = gcra.test(tat, 0, 1, now) {
                    tat = after;
                    admitted += 1;
                }
                let allowed = burst + now.saturating_since(start) * requests / unit;
                prop_assert!(admitted <= allowed, "{admitted} of {allowed}");
            }
        }
    }
}
