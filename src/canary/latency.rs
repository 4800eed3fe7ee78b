//! How slow is slow: an edge near the 99th percentile of answers that are not on trial.
//!
//! The edge has to stand before anything is counted against it, so it is taken from the first answers that one worker
//! sees and then stays. A histogram with eight buckets to every doubling finds it to within an eighth.

/// So many answers settle the edge.
const ENOUGH: u32 = 500;

/// Buckets begin at this power of two of nanoseconds: 65 µs.
const SHIFT: u32 = 16;

/// Eight to every doubling; the last begins past 100 seconds.
const BUCKETS: usize = 160;

/// What one worker has seen so far.
#[derive(Clone, Debug, Default)]
pub struct Latencies {
    /// Empty until the first answer.
    buckets: Vec<u32>,
    answers: u32,
}

impl Latencies {
    /// Adds an answer that took so many nanoseconds. The edge, once enough are known.
    pub fn add(&mut self, latency: u64) -> Option<u64> {
        self.buckets.resize(BUCKETS, 0);
        if let Some(bucket) = self.buckets.get_mut(bucket(latency)) {
            *bucket = bucket.saturating_add(1);
        }
        self.answers = self.answers.saturating_add(1);
        (self.answers >= ENOUGH).then(|| self.p99())
    }

    /// The upper edge of the bucket that the 99th percentile is in.
    fn p99(&self) -> u64 {
        let mut above = self.answers / 100;
        let highest = self.buckets.iter().enumerate().rev().find(|(_, count)| {
            let is_it = **count > above;
            above = above.saturating_sub(**count);
            is_it
        });
        upper_edge(highest.map_or(0, |(index, _)| index))
    }
}

fn bucket(latency: u64) -> usize {
    let units = latency >> SHIFT;
    let Some(octave) = units.max(1).ilog2().checked_sub(3) else { return units as usize };
    let index = ((u64::from(octave) + 1) << 3) + ((units >> octave) & 7);
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

fn upper_edge(bucket: usize) -> u64 {
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
    fn the_edge_is_where_one_in_a_hundred_is_slower() {
        let mut latencies = Latencies::default();
        let mut edge = None;
        for n in 0..ENOUGH {
            assert_eq!(edge, None);
            // Ten in a thousand take 300 ms, all others up to 90 ms.
            edge = latencies.add(if n % 100 == 7 { 300 } else { u64::from(n % 90) + 1 } * MILLISECOND);
        }
        let edge = edge.unwrap();
        assert!((90 * MILLISECOND..=102 * MILLISECOND).contains(&edge), "{edge}");
    }

    #[test]
    fn an_hour_is_only_very_slow() {
        let mut latencies = Latencies::default();
        let edge = (0..ENOUGH).filter_map(|_| latencies.add(u64::MAX)).last().unwrap();
        assert!(edge >= 60_000 * MILLISECOND);
        assert_eq!(latencies.buckets.len(), BUCKETS);
    }

    proptest! {
        #[test]
        fn an_edge_is_above_and_near(latency in 1_000_000..60_000_000_000_u64) {
            let edge = upper_edge(bucket(latency));
            prop_assert!(edge > latency && edge - latency <= latency / 8 + (1 << SHIFT), "{} {}", latency, edge);
        }
    }
}
