//! The compiled `fault` block of a route.

use super::active::ActiveFaults;
use super::guard::GuardPolicy;
use super::target::FaultTarget;
use crate::http::HeaderId;
use crate::units::Fraction;

/// The `fault` block of a route.
#[derive(Debug)]
pub struct FaultPolicy {
    /// The share of requests that are delayed, and their delay.
    pub delay: Option<(Fraction, Delay)>,
    pub abort: Option<(Fraction, Abort)>,
    /// The share of upstream responses that are replaced, and the status that they get.
    pub response: Option<(Fraction, FaultStatus)>,
    /// The headers in which requests ask for faults. `delay` and `abort` are the maximum that they get.
    pub header_control: Option<HeaderControl>,
    pub drawn_from: DrawnFrom,
    pub target: FaultTarget,
    /// The cap of `maxActive`.
    pub active: Option<ActiveFaults>,
    /// Whether an injected response has the header [`super::FAULT_HEADER`].
    pub marks: bool,
    /// Whether faults are drawn and counted only, and not injected.
    pub shadow: bool,
    pub guard: GuardPolicy,
    /// Makes the draws of this route independent of those of other routes.
    pub salt: u64,
}

/// The length of a delay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delay {
    /// Nanoseconds.
    Fixed(u64),
    /// Drawn for each request.
    Distribution(Distribution),
}

/// A distribution of delays by its quantiles. Between two quantiles, and between 0 and the first one, the quantile function
/// is interpolated linearly; after the last quantile it is constant. So the given quantiles are exact, and no delay is
/// longer than the last one: with p50, p95 and p99, one request in a hundred gets the longest delay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribution {
    /// Shares of requests, each with the longest delay of this share in nanoseconds. Both increase from each to the next.
    pub quantiles: Box<[(Fraction, u64)]>,
}

/// The headers in which a request asks for a fault.
#[derive(Clone, Copy, Debug)]
pub struct HeaderControl {
    pub(super) delay: HeaderId,
    pub(super) delay_percentage: HeaderId,
    pub(super) abort: HeaderId,
    pub(super) abort_grpc: HeaderId,
    pub(super) abort_percentage: HeaderId,
}

/// The status of an injected response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultStatus {
    /// An HTTP status; a gRPC call gets the gRPC status that it maps to.
    Http(u16),
    /// A gRPC status code; a plain request gets the HTTP status that it maps to.
    Grpc(u8),
}

/// How a request is aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// With a response.
    Answer(FaultStatus),
    /// By a reset of the stream, without a response, as in a network partition. With HTTP/1.1 the connection is closed.
    Reset,
    /// With the status that the request asks for.
    Requested,
}

/// The source of the random numbers that decide whether a request is faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrawnFrom {
    /// The trace id: a request, its retries and every hop with the same policy get the same faults.
    TraceId,
    /// A new draw for each request.
    Random,
}

impl Delay {
    /// The longest delay in nanoseconds.
    pub fn longest(&self) -> u64 {
        match self {
            Delay::Fixed(time) => *time,
            Delay::Distribution(distribution) => distribution.quantiles.last().map_or(0, |(_, time)| *time),
        }
    }
}

impl Distribution {
    /// The delay in nanoseconds for a uniformly distributed number; exact to 2^-32 of the distance between two quantiles.
    pub(super) fn delay(&self, draw: u64) -> u64 {
        // Parts per million with 32 bits behind the point.
        let place = ((u128::from(draw) * 1_000_000) >> 32) as u64;
        let (mut start, mut shortest) = (0, 0);
        for (quantile, longest) in &self.quantiles {
            let end = u64::from(quantile.ppm());
            if place >> 32 < end {
                let share = place.saturating_sub(start << 32) / end.saturating_sub(start).max(1);
                let range = longest.saturating_sub(shortest);
                return shortest.saturating_add(((u128::from(range) * u128::from(share)) >> 32) as u64);
            }
            (start, shortest) = (end, *longest);
        }
        shortest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MILLISECOND: u64 = 1_000_000;

    fn distribution(quantiles: &[(u32, u64)]) -> Distribution {
        let quantiles = quantiles.iter().map(|(percent, time)| (Fraction::from_ppm(percent * 10_000), *time));
        Distribution { quantiles: quantiles.collect() }
    }

    fn typical() -> Distribution {
        distribution(&[(50, 100 * MILLISECOND), (95, 400 * MILLISECOND), (99, 1000 * MILLISECOND)])
    }

    /// The draw at so many parts per million.
    fn at(ppm: u64) -> u64 {
        ((u128::from(ppm) << 64) / 1_000_000) as u64
    }

    #[test]
    fn the_named_quantiles_are_met_and_the_last_is_the_bound() {
        let distribution = typical();
        for (ppm, milliseconds) in
            [(0, 0), (250_000, 50), (500_000, 100), (725_000, 250), (950_000, 400), (970_000, 700), (990_000, 1000)]
        {
            let found = distribution.delay(at(ppm));
            assert!(
                found.abs_diff(milliseconds * MILLISECOND) <= 1_000,
                "{ppm} ppm: {found} ns, not {milliseconds} ms"
            );
        }
        assert_eq!(distribution.delay(u64::MAX), 1000 * MILLISECOND);
        assert_eq!(Delay::Distribution(distribution).longest(), 1000 * MILLISECOND);
    }

    #[test]
    fn over_many_requests_the_quantiles_are_as_written() {
        let distribution = typical();
        let count = 100_000_u32;
        let mut state = 5;
        let delays: Vec<u64> = (0..count).map(|_| distribution.delay(crate::random::split_mix(&mut state))).collect();
        for (share, milliseconds) in [(0.25, 50), (0.5, 100), (0.95, 400), (0.99, 1000)] {
            let below = delays.iter().filter(|delay| **delay < milliseconds * MILLISECOND).count() as f64;
            let expected = f64::from(count) * share;
            let sigma = (expected * (1.0 - share)).sqrt();
            assert!((below - expected).abs() < 4.0 * sigma, "below {milliseconds} ms: {below}, not {expected}");
        }
    }

    proptest! {
        #[test]
        fn a_later_draw_is_never_a_shorter_delay(a: u64, b: u64, first in 0..86_400_000_000_000_u64, ppm in 1..999_999_u32) {
            let longest = 86_400_000_000_000;
            let quantiles = [(Fraction::from_ppm(ppm), first), (Fraction::from_ppm(1_000_000), longest)];
            let distribution = Distribution { quantiles: quantiles.into() };
            prop_assert!(distribution.delay(a.min(b)) <= distribution.delay(a.max(b)));
            prop_assert!(distribution.delay(a) <= longest);
        }
    }
}
