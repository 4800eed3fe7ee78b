//! The delayed streams of one worker, in the order in which they are due.
//!
//! Streams are grouped by a key, in Trimtab by the experiment that delays them: all streams of a group become due before
//! their time if the experiment is suspended. The cost per stream is logarithmic, and a cancelled stream occupies no place.

use crate::units::MonotonicInstant;
use hashbrown::HashMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The most streams that one worker delays. Further delays are not injected, but counted.
pub(crate) const MAX_DELAYED: usize = 10_000;

/// The delayed streams of one worker, each with a value that describes what follows its delay.
#[derive(Debug)]
pub(crate) struct DelayedStreams<K, T> {
    /// One queue for each key that has streams.
    queues: Vec<Queue<K>>,
    streams: HashMap<u32, Delayed<K, T>>,
}

#[derive(Debug)]
struct Delayed<K, T> {
    key: K,
    then: T,
}

/// The streams with one key.
#[derive(Debug)]
struct Queue<K> {
    key: K,
    /// The streams by their due times. A cancelled stream is removed when it is the first, or when more than half of the
    /// streams are cancelled.
    by_due: BinaryHeap<Reverse<(MonotonicInstant, u32)>>,
    cancelled: usize,
    /// Since when all streams of the queue are due; `None` if they are due at their own times.
    expedited: Option<MonotonicInstant>,
}

/// A stream whose delay is over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Due<T> {
    pub(crate) stream: u32,
    /// The value that was passed to [`DelayedStreams::hold`].
    pub(crate) then: T,
    /// Whether all streams of its group were due.
    pub(crate) is_expedited: bool,
}

impl<K, T> Default for DelayedStreams<K, T> {
    fn default() -> Self {
        DelayedStreams { queues: Vec::new(), streams: HashMap::new() }
    }
}

impl<K: Copy + PartialEq, T> DelayedStreams<K, T> {
    /// Whether another stream can be held.
    pub(crate) fn has_room(&self) -> bool {
        self.streams.len() < MAX_DELAYED
    }

    /// Holds `stream` until `due`.
    pub(crate) fn hold(&mut self, stream: u32, key: K, due: MonotonicInstant, then: T) {
        self.streams.insert(stream, Delayed { key, then });
        let entry = Reverse((due, stream));
        match self.queues.iter_mut().find(|queue| queue.key == key) {
            Some(queue) => queue.by_due.push(entry),
            None => {
                self.queues.push(Queue { key, by_due: BinaryHeap::from([entry]), cancelled: 0, expedited: None });
            }
        }
    }

    /// Removes a stream that has ended, and returns its value. `None` if the stream is not held.
    pub(crate) fn cancel(&mut self, stream: u32) -> Option<T> {
        let cancelled = self.streams.remove(&stream)?;
        if let Some(queue) = self.queues.iter_mut().find(|queue| queue.key == cancelled.key) {
            queue.cancelled += 1;
            if queue.cancelled > queue.by_due.len() / 2 {
                queue.by_due.retain(|Reverse((_, stream))| self.streams.contains_key(stream));
                queue.cancelled = 0;
            }
        }
        self.queues.retain(|queue| !queue.by_due.is_empty());
        Some(cancelled.then)
    }

    /// Makes all streams of those groups due for which `is_over` is true, and only those.
    pub(crate) fn expedite(&mut self, now: MonotonicInstant, is_over: impl Fn(K) -> bool) {
        for queue in &mut self.queues {
            queue.expedited = if is_over(queue.key) { queue.expedited.or(Some(now)) } else { None };
        }
    }

    /// The next stream and when it is due.
    pub(crate) fn next_due(&mut self) -> Option<(MonotonicInstant, u32)> {
        loop {
            let queue = self.next_queue()?;
            let (due, Reverse((_, stream))) = (queue.next_due()?, *queue.by_due.peek()?);
            if self.streams.contains_key(&stream) {
                return Some((due, stream));
            }
            self.drop_first();
        }
    }

    /// Removes and returns the stream that is due first, if it is due at `now`.
    pub(crate) fn take_due(&mut self, now: MonotonicInstant) -> Option<Due<T>> {
        self.next_due().filter(|(due, _)| *due <= now)?;
        let queue = self.next_queue()?;
        let is_expedited = queue.expedited.is_some();
        let Reverse((_, stream)) = queue.by_due.pop()?;
        self.queues.retain(|queue| !queue.by_due.is_empty());
        let Delayed { then, .. } = self.streams.remove(&stream)?;
        Some(Due { stream, then, is_expedited })
    }

    /// The queue with the stream that is due first.
    fn next_queue(&mut self) -> Option<&mut Queue<K>> {
        self.queues.iter_mut().min_by_key(|queue| queue.next_due().unwrap_or(MonotonicInstant::MAX))
    }

    /// Removes the first entry of the first queue, which is a cancelled stream.
    fn drop_first(&mut self) {
        if let Some(queue) = self.next_queue() {
            queue.by_due.pop();
            queue.cancelled = queue.cancelled.saturating_sub(1);
        }
        self.queues.retain(|queue| !queue.by_due.is_empty());
    }
}

impl<K> Queue<K> {
    fn next_due(&self) -> Option<MonotonicInstant> {
        let Reverse((due, _)) = *self.by_due.peek()?;
        Some(self.expedited.map_or(due, |expedited| expedited.min(due)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;

    /// Takes everything that is due.
    fn all<K: Copy + PartialEq>(delayed: &mut DelayedStreams<K, ()>, now: MonotonicInstant) -> Vec<u32> {
        std::iter::from_fn(|| delayed.take_due(now)).map(|due| due.stream).collect()
    }

    #[test]
    fn streams_are_released_in_the_order_of_their_due_times_and_never_early() {
        let mut delayed = DelayedStreams::default();
        delayed.hold(1, 'a', at(300), 'x');
        delayed.hold(2, 'b', at(100), 'y');
        delayed.hold(3, 'a', at(200), 'z');
        assert_eq!(delayed.next_due(), Some((at(100), 2)));
        assert_eq!(delayed.take_due(at(99)), None);
        assert_eq!(delayed.take_due(at(250)), Some(Due { stream: 2, then: 'y', is_expedited: false }));
        assert_eq!(delayed.take_due(at(250)), Some(Due { stream: 3, then: 'z', is_expedited: false }));
        assert_eq!(delayed.take_due(at(250)), None);
        assert_eq!(delayed.next_due(), Some((at(300), 1)));
    }

    #[test]
    fn a_cancelled_stream_is_not_released() {
        let mut delayed = DelayedStreams::default();
        delayed.hold(1, 'a', at(100), ());
        delayed.hold(2, 'a', at(100), ());
        assert_eq!((delayed.cancel(1), delayed.cancel(1)), (Some(()), None));
        assert_eq!(all(&mut delayed, at(100)), [2]);
        assert_eq!(delayed.next_due(), None);
    }

    #[test]
    fn cancelled_streams_occupy_neither_a_place_nor_memory() {
        let mut delayed = DelayedStreams::default();
        for stream in 0..10 * MAX_DELAYED as u32 {
            assert!(delayed.has_room(), "stream {stream} finds no room although all before it have left");
            delayed.hold(stream, (), at(1_000), ());
            delayed.cancel(stream);
        }
        assert!(delayed.queues.is_empty());
        for stream in 0..MAX_DELAYED as u32 {
            delayed.hold(stream, (), at(1_000), ());
        }
        assert!(!delayed.has_room());
        for stream in 1..MAX_DELAYED as u32 {
            delayed.cancel(stream);
        }
        assert!(delayed.queues[0].by_due.len() <= 2, "{} entries for one stream", delayed.queues[0].by_due.len());
        assert_eq!(all(&mut delayed, at(1_000)), [0]);
    }

    #[test]
    fn an_expedited_group_is_due_at_once_and_delays_no_other_group() {
        let mut delayed = DelayedStreams::default();
        for stream in 0..6 {
            delayed.hold(stream, stream % 2, at(100 + u64::from(stream)), ());
        }
        delayed.expedite(at(50), |key| key == 1);
        assert_eq!(delayed.next_due(), Some((at(50), 1)));
        assert_eq!(delayed.take_due(at(50)), Some(Due { stream: 1, then: (), is_expedited: true }));
        // A stream of the other group that was due earlier than the expedition comes first.
        delayed.hold(9, 0, at(40), ());
        assert_eq!(all(&mut delayed, at(60)), [9, 3, 5]);
        assert_eq!(all(&mut delayed, at(200)), [0, 2, 4]);
    }

    #[test]
    fn a_group_that_is_resumed_holds_its_remaining_streams() {
        let mut delayed = DelayedStreams::default();
        delayed.hold(1, (), at(100), ());
        delayed.hold(2, (), at(100), ());
        delayed.expedite(at(50), |()| true);
        assert_eq!(delayed.take_due(at(50)).map(|due| due.stream), Some(1));
        delayed.expedite(at(60), |()| false);
        assert_eq!(delayed.take_due(at(60)), None);
        assert_eq!(all(&mut delayed, at(100)), [2]);
    }
}
