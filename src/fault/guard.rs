//! When injection stops: the state of the target, seen from the requests that were not faulted.

use crate::outlier::{Totals, Window};
use crate::units::{Fraction, Monotonic};

/// The `guard` block: what counts as unwell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Injection stops at this share of failures ...
    pub error_rate: Fraction,
    /// ... among at least so many requests ...
    pub min_requests: u64,
    /// ... within so many nanoseconds.
    pub window: u64,
    /// It stays off for at least so many nanoseconds.
    pub hold_down: u64,
}

impl Default for Guard {
    fn default() -> Self {
        Guard {
            error_rate: Fraction::from_ppm(50_000),
            min_requests: 20,
            window: 10_000_000_000,
            hold_down: 30_000_000_000,
        }
    }
}

impl Guard {
    fn trips(&self, recent: Totals) -> bool {
        let share = u128::from(recent.failures) * 1_000_000;
        recent.requests >= self.min_requests
            && recent.failures > 0
            && share >= u128::from(recent.requests) * u128::from(self.error_rate.ppm())
    }
}

/// Whether faults may be injected now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Armed,
    /// Off until this instant at least.
    Suspended {
        until: Monotonic,
    },
    /// The target has just been found unwell: what was seen, and until when injection is off.
    Tripped {
        recent: Totals,
        until: Monotonic,
    },
}

/// A guard's eye on one target. Every worker has its own; the totals and the end of a suspension are shared.
#[derive(Debug)]
pub struct Watch {
    guard: Guard,
    window: Window,
}

impl Watch {
    pub fn new(guard: Guard, now: Monotonic, totals: Totals) -> Watch {
        Watch { guard, window: Window::new(guard.window, now, totals) }
    }

    /// How often [`Watch::mark`] wants to be called, in nanoseconds.
    pub fn step(&self) -> u64 {
        self.window.step()
    }

    /// Lets the window move on.
    pub fn mark(&mut self, now: Monotonic, totals: impl FnOnce() -> Totals) {
        self.window.mark(now, totals);
    }

    /// Judges the target from `totals`; `suspended_until` is what the workers have agreed on so far.
    pub fn judge(&mut self, now: Monotonic, totals: Totals, suspended_until: Monotonic) -> State {
        self.window.mark(now, || totals);
        if now < suspended_until {
            return State::Suspended { until: suspended_until };
        }
        let recent = self.window.recent(now, totals);
        if self.guard.trips(recent) {
            State::Tripped { recent, until: now.saturating_add(self.guard.hold_down) }
        } else {
            State::Armed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn totals(requests: u64, failures: u64) -> Totals {
        Totals { requests, failures }
    }

    #[test]
    fn trips_on_enough_failures_holds_down_and_comes_back() {
        let mut watch = Watch::new(Guard::default(), 0, totals(0, 0));
        assert_eq!(watch.judge(SECOND, totals(19, 19), 0), State::Armed, "too few to tell");
        let tripped = watch.judge(SECOND, totals(20, 19), 0);
        let until = 31 * SECOND;
        assert_eq!(tripped, State::Tripped { recent: totals(20, 19), until });
        assert_eq!(watch.judge(2 * SECOND, totals(30, 19), until), State::Suspended { until });
        for second in 3..=30 {
            watch.mark(second * SECOND, || totals(second * 10, 19));
        }
        assert_eq!(watch.judge(31 * SECOND, totals(310, 19), until), State::Armed);
    }

    #[test]
    fn trips_again_while_the_target_stays_unwell() {
        let mut watch = Watch::new(Guard::default(), 0, totals(0, 0));
        let mut until = 0;
        let mut trips = 0;
        for second in 1..=100 {
            if let State::Tripped { until: end, .. } = watch.judge(second * SECOND, totals(second * 10, second), until)
            {
                until = end;
                trips += 1;
            }
        }
        assert_eq!(trips, 4);
    }

    #[test]
    fn the_threshold_is_met_exactly() {
        let guard = Guard { error_rate: Fraction::from_ppm(50_000), ..Guard::default() };
        assert!(guard.trips(totals(100, 5)));
        assert!(!guard.trips(totals(101, 5)));
        assert!(!Guard { error_rate: Fraction::NONE, ..guard }.trips(totals(100, 0)), "no failure, no alarm");
    }
}
