//! The latency threshold above which an answer is slow: a value near the 99th percentile of the other destinations.
//!
//! The threshold has to be fixed before answers are compared with it. It is therefore computed from the first answers of
//! one worker, and never changes. The histogram has eight buckets for every doubling, so the error is at most one eighth.

/// The number of answers that the threshold is computed from.
const ENOUGH: u32 = 500;

/// Buckets begin at this power of two of nanoseconds: 65 µs.
const SHIFT: u32 = 16;

/// Eight buckets for every doubling; the last one begins above 100 seconds.
const BUCKETS: usize = 160;

/// The latencies that one worker has measured.
#[derive(Clone, Debug, Default)]
pub(super) struct LatencyHistogram {
    /// Empty until the first answer.
    buckets: Vec<u32>,
    answers: u32,
}

impl LatencyHistogram {
    /// Adds a latency in nanoseconds. Returns the threshold once there are enough latencies.
    pub(super) fn add(&mut self, latency: u64) -> Option<u64> {
        self.buckets.resize(BUCKETS, 0);
        if let Some(bucket) = self.buckets.get_mut(bucket(latency)) {
            *bucket = bucket.saturating_add(1);
        }
        self.answers = self.answers.saturating_add(1);
        (self.answers >= ENOUGH).then(|| self.p99())
    }

    /// The upper bound of the bucket that contains the 99th percentile.
    fn p99(&self) -> u64 {
        let mut above = self.answers / 100;
        let highest = self.buckets.iter().enumerate().rev().find(|(_, count)| {
            let is_it = **count > above;
            above = above.saturating_sub(**count);
            is_it
        });
        upper_bound(highest.map_or(0, |(index, _)| index))
    }
}

fn bucket(latency: u64) -> usize {
    let units = latency >> SHIFT;
    let Some(octave) = units.max(1).ilog2().checked_sub(3) else { return units as usize };
    let index = ((u64::from(octave) + 1) << 3) + ((units >> octave) & 7);
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

fn upper_bound(bucket: usize) -> u64 {
    let next = bucket as u64 + 1;
    let units = match (next >> 3).checked_sub(1) {
        Some(octave) => (8 + (next & 7)) << octave,
        None => next,
    };
    units << SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MILLISECOND: u64 = 1_000_000;

    #[test]
    fn one_in_a_hundred_answers_is_slower_than_the_threshold() {
        let mut latencies = LatencyHistogram::default();
        let mut threshold = None;
        for n in 0..ENOUGH {
            assert_eq!(threshold, None);
            // Ten in a thousand take 300 ms, all others up to 90 ms.
            threshold = latencies.add(if n % 100 == 7 { 300 } else { u64::from(n % 90) + 1 } * MILLISECOND);
        }
        let threshold = threshold.unwrap();
        assert!((90 * MILLISECOND..=102 * MILLISECOND).contains(&threshold), "{threshold}");
    }

    #[test]
    fn a_very_long_latency_is_counted_in_the_last_bucket() {
        let mut latencies = LatencyHistogram::default();
        let threshold = (0..ENOUGH).filter_map(|_| latencies.add(u64::MAX)).last().unwrap();
        assert!(threshold >= 60_000 * MILLISECOND);
        assert_eq!(latencies.buckets.len(), BUCKETS);
    }

    proptest! {
        #[test]
        fn the_bound_of_a_bucket_is_above_its_latencies_and_near_them(latency in 1_000_000..60_000_000_000_u64) {
            let threshold = upper_bound(bucket(latency));
            prop_assert!(threshold > latency && threshold - latency <= latency / 8 + (1 << SHIFT), "{} {}", latency, threshold);
        }
    }
}
