//! What a run takes from its surroundings unless it is told: the time, and a seed for what is random.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::SystemTime;
use trimtab::units::{UnixNanos, nanoseconds, parse_instant};

/// An instant as it is written on a command line.
pub(crate) fn instant(text: &str) -> Result<UnixNanos, &'static str> {
    parse_instant(text).ok_or("write an RFC 3339 instant, such as 2026-11-21T09:00:00Z")
}

pub(crate) fn now() -> UnixNanos {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(UnixNanos::ZERO, |since| UnixNanos::from_nanos(nanoseconds(since)))
}

/// A new seed, small enough to be typed again.
pub(crate) fn draw_seed() -> u64 {
    RandomState::new().hash_one(0) % 1_000_000
}
