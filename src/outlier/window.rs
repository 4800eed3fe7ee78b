//! A sliding window over growing totals: what was counted in the last seconds.

use crate::units::MonotonicInstant;
use std::collections::VecDeque;

/// Counts of observed responses, in total or within a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub requests: u64,
    pub failures: u64,
    /// Responses that took longer than the latency threshold.
    pub slow: u64,
    /// Requests that Envoy answered itself because no host was available or too many requests were pending.
    pub outages: u64,
}

impl Totals {
    /// The counts after `earlier`.
    pub fn since(self, earlier: Totals) -> Totals {
        Totals {
            requests: self.requests.saturating_sub(earlier.requests),
            failures: self.failures.saturating_sub(earlier.failures),
            slow: self.slow.saturating_sub(earlier.slow),
            outages: self.outages.saturating_sub(earlier.outages),
        }
    }
}

/// The number of steps in which a window moves over its length.
const STEPS: u64 = 10;

/// A sliding window over totals. It covers its length and up to a tenth more, if [`Window::mark`] is called at least
/// every tenth of its length.
#[derive(Debug)]
pub struct Window {
    length: u64,
    /// Earlier totals, oldest first, a tenth of the length apart; at most [`STEPS`] + 1.
    marks: VecDeque<(MonotonicInstant, Totals)>,
}

impl Window {
    /// A window of `length` nanoseconds that begins now. It does not cover what was counted before.
    pub fn new(length: u64, now: MonotonicInstant, totals: Totals) -> Window {
        Window { length, marks: VecDeque::from([(now, totals)]) }
    }

    /// The distance between two marks, in nanoseconds.
    pub fn step(&self) -> u64 {
        self.length / STEPS
    }

    /// Stores `totals` as the totals at `now`, if the last mark is at least one step old.
    pub fn mark(&mut self, now: MonotonicInstant, totals: impl FnOnce() -> Totals) {
        let due = self.marks.back().is_none_or(|(last, _)| now.saturating_since(*last) >= self.step());
        if !due {
            return;
        }
        self.marks.push_back((now, totals()));
        let start = now.saturating_sub(self.length);
        while self.marks.get(1).is_some_and(|(second, _)| *second <= start) {
            self.marks.pop_front();
        }
    }

    /// Whether the window has existed for its whole length.
    pub fn is_full(&self, now: MonotonicInstant) -> bool {
        self.marks.front().is_some_and(|(first, _)| now.saturating_since(*first) >= self.length)
    }

    /// The counts within the window that ends now; `totals` are the totals of now.
    pub fn recent(&self, now: MonotonicInstant, totals: Totals) -> Totals {
        let start = now.saturating_sub(self.length);
        let base = self.marks.iter().rev().find(|(at, _)| *at <= start).or(self.marks.front());
        base.map_or(Totals::default(), |(_, earlier)| totals.since(*earlier))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;

    const SECOND: u64 = 1_000_000_000;

    fn totals(requests: u64, failures: u64) -> Totals {
        Totals { requests, failures, ..Totals::default() }
    }

    #[test]
    fn covers_the_last_seconds_only() {
        let mut window = Window::new(10 * SECOND, at(0), totals(500, 400));
        assert_eq!(window.recent(at(0), totals(500, 400)), totals(0, 0));
        assert!(!window.is_full(at(10 * SECOND - 1)) && window.is_full(at(10 * SECOND)));
        for second in 1..=30 {
            window.mark(at(second * SECOND), || totals(500 + second * 10, 400 + second));
        }
        assert_eq!(window.recent(at(30 * SECOND), totals(800, 430)), totals(100, 10));
        assert_eq!(window.recent(at(30 * SECOND + SECOND / 2), totals(810, 431)), totals(110, 11));
        assert_eq!(window.marks.len(), STEPS as usize + 1);
    }

    #[test]
    fn the_number_of_marks_is_bounded() {
        let mut window = Window::new(10 * SECOND, at(0), totals(0, 0));
        for n in 0..100_000 {
            window.mark(at(n * SECOND / 1000), || totals(n, 0));
        }
        assert!(window.marks.len() <= STEPS as usize + 2);
    }

    #[test]
    fn counts_leave_the_window_while_there_are_no_requests() {
        let mut window = Window::new(10 * SECOND, at(0), totals(0, 0));
        window.mark(at(SECOND), || totals(100, 100));
        window.mark(at(60 * SECOND), || totals(100, 100));
        assert_eq!(window.recent(at(60 * SECOND), totals(101, 100)), totals(1, 0));
        assert_eq!(window.recent(at(71 * SECOND), totals(102, 100)), totals(2, 0));
    }
}
