//! Streams that are held for a delay, by when they are due.

use crate::units::Monotonic;
use hashbrown::HashMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The most streams that one worker holds. A further delay is not injected, and counted.
pub const MAX_HELD: usize = 10_000;

/// The held streams of one worker, each with what follows its delay.
#[derive(Debug)]
pub struct HeldStreams<T> {
    due: BinaryHeap<Reverse<(Monotonic, u32)>>,
    streams: HashMap<u32, T>,
}

impl<T> Default for HeldStreams<T> {
    fn default() -> Self {
        HeldStreams { due: BinaryHeap::new(), streams: HashMap::new() }
    }
}

impl<T> HeldStreams<T> {
    /// Whether another stream can be held.
    pub fn has_room(&self) -> bool {
        // A stream that was forgotten stays in the heap until it is due.
        self.due.len() < MAX_HELD
    }

    /// Holds `stream` until `until`.
    pub fn hold(&mut self, stream: u32, until: Monotonic, then: T) {
        self.due.push(Reverse((until, stream)));
        self.streams.insert(stream, then);
    }

    /// Forgets a stream whose client has gone, and returns what would have followed if it was still held.
    pub fn forget(&mut self, stream: u32) -> Option<T> {
        self.streams.remove(&stream)
    }

    /// Takes every stream that `is_wanted` is true of, due or not.
    pub fn take_all(&mut self, is_wanted: impl Fn(&T) -> bool) -> Vec<(u32, T)> {
        self.streams.extract_if(|_, then| is_wanted(then)).collect()
    }

    /// Takes the next stream that is due at `now`.
    pub fn take_due(&mut self, now: Monotonic) -> Option<(u32, T)> {
        loop {
            let Reverse((until, stream)) = self.due.peek()?;
            if *until > now {
                return None;
            }
            let stream = *stream;
            self.due.pop();
            if let Some(then) = self.streams.remove(&stream) {
                return Some((stream, then));
            }
        }
    }

    /// When the next stream is due.
    pub fn next_due(&self) -> Option<Monotonic> {
        self.due.peek().map(|Reverse((until, _))| *until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_come_back_in_order_and_never_early() {
        let mut held = HeldStreams::default();
        held.hold(1, 300, 'a');
        held.hold(2, 100, 'b');
        held.hold(3, 200, 'c');
        assert_eq!(held.next_due(), Some(100));
        assert_eq!(held.take_due(99), None);
        assert_eq!(held.take_due(250), Some((2, 'b')));
        assert_eq!(held.take_due(250), Some((3, 'c')));
        assert_eq!(held.take_due(250), None);
    }

    #[test]
    fn a_client_that_left_is_not_answered() {
        let mut held = HeldStreams::default();
        held.hold(1, 100, ());
        held.hold(2, 100, ());
        assert_eq!((held.forget(1), held.forget(1)), (Some(()), None));
        assert_eq!(held.take_due(100), Some((2, ())));
        assert_eq!(held.take_due(100), None);
        assert_eq!(held.next_due(), None);
    }

    #[test]
    fn those_that_are_wanted_come_back_at_once_and_not_again() {
        let mut held = HeldStreams::default();
        for stream in 0..6 {
            held.hold(stream, 100, stream % 2);
        }
        let mut taken = held.take_all(|parity| *parity == 1);
        taken.sort_unstable();
        assert_eq!(taken, [(1, 1), (3, 1), (5, 1)]);
        let rest: Vec<_> = std::iter::from_fn(|| held.take_due(100)).collect();
        assert_eq!(rest, [(0, 0), (2, 0), (4, 0)]);
    }

    #[test]
    fn the_number_of_held_streams_is_bounded() {
        let mut held = HeldStreams::default();
        let mut stream = 0;
        while held.has_room() {
            held.hold(stream, 1, ());
            stream += 1;
        }
        assert_eq!(stream as usize, MAX_HELD);
    }
}
