//! The streams of one worker that wait for a rate limit service, by the call that they wait for.

use super::calls::{Rest, Settled};
use super::decision::Outcome;
use crate::host::CallId;

/// The waiting streams of one worker, in the order in which they came.
#[derive(Debug)]
pub struct PendingStreams<T> {
    waiting: Vec<(CallId, u32, T)>,
}

impl<T> Default for PendingStreams<T> {
    fn default() -> Self {
        PendingStreams { waiting: Vec::new() }
    }
}

impl<T> PendingStreams<T> {
    /// Lets `stream` wait for `call`.
    pub fn wait(&mut self, call: CallId, stream: u32, request: T) {
        self.waiting.push((call, stream, request));
    }

    /// How many streams wait for `call`.
    pub fn count(&self, call: CallId) -> usize {
        self.waiting.iter().filter(|(awaited, ..)| *awaited == call).count()
    }

    /// Takes the streams that `settled` decides, each with its outcome; the others wait for the next call. Without a
    /// `settled` the outcome of all that wait for `call` is a failure.
    pub fn settle(&mut self, call: CallId, settled: Option<Settled>) -> Vec<(u32, T, Outcome)> {
        let (admitted, until, rest) =
            settled.map_or((0, None, Rest::Failed), |settled| (settled.admitted, settled.until, settled.rest));
        let mut decided = Vec::new();
        let answered: Vec<_> = self.waiting.extract_if(.., |(awaited, ..)| *awaited == call).collect();
        for (at, (_, stream, request)) in answered.into_iter().enumerate() {
            let outcome = match rest {
                _ if at < admitted => Outcome::Admitted(until),
                Rest::Refused(wait) => Outcome::Refused(wait),
                Rest::Failed => Outcome::Failed,
                Rest::Waits(next) => {
                    self.wait(next, stream, request);
                    continue;
                }
            };
            decided.push((stream, request, outcome));
        }
        decided
    }

    /// Removes a stream whose client has left.
    pub fn cancel(&mut self, stream: u32) -> Option<T> {
        let at = self.waiting.iter().position(|(_, waiting, _)| *waiting == stream)?;
        Some(self.waiting.remove(at).2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ratelimit::service::Place;
    use crate::units::at;

    #[test]
    fn the_first_to_come_are_admitted_first() {
        let mut pending = PendingStreams::default();
        for (call, stream) in [(1, 10), (2, 20), (1, 11), (1, 12), (1, 13)] {
            pending.wait(CallId(call), stream, ());
        }
        pending.cancel(11);
        assert_eq!(pending.count(CallId(1)), 3);
        let place = Place { route: 0, limit: 0 };
        let settled = |admitted, rest| Some(Settled { place, admitted, until: Some(at(9)), rest, failure: None });
        let decided = pending.settle(CallId(1), settled(1, Rest::Waits(CallId(3))));
        assert_eq!(decided, [(10, (), Outcome::Admitted(Some(at(9))))]);
        let decided = pending.settle(CallId(3), settled(0, Rest::Refused(7)));
        assert_eq!(decided, [(12, (), Outcome::Refused(7)), (13, (), Outcome::Refused(7))]);
        assert_eq!(pending.settle(CallId(2), None), [(20, (), Outcome::Failed)]);
    }
}
