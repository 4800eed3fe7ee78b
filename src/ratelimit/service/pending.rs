//! The streams of one worker that wait for a call to a rate limit service.

use super::calls::{CallOutcome, NextStep};
use super::decision::ServiceOutcome;
use crate::host::CallId;

/// The streams of one worker that wait, in the order in which they came.
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
    /// Adds a stream that waits for `call`.
    pub fn wait(&mut self, call: CallId, stream: u32, request: T) {
        self.waiting.push((call, stream, request));
    }

    /// The number of streams that wait for `call`.
    pub fn count(&self, call: CallId) -> usize {
        self.waiting.iter().filter(|(awaited, ..)| *awaited == call).count()
    }

    /// Takes the streams that the result of `call` decides, each with its outcome. The others wait for the next call.
    /// Without a result the call has failed for all of them.
    pub fn settle(&mut self, call: CallId, settled: Option<CallOutcome>) -> Vec<(u32, T, ServiceOutcome)> {
        let (admitted, until, others) =
            settled.map_or((0, None, NextStep::Failed), |settled| (settled.admitted, settled.until, settled.others));
        let mut decided = Vec::new();
        let answered: Vec<_> = self.waiting.extract_if(.., |(awaited, ..)| *awaited == call).collect();
        for (at, (_, stream, request)) in answered.into_iter().enumerate() {
            let outcome = match others {
                _ if at < admitted => ServiceOutcome::Admitted(until),
                NextStep::Refused(wait) => ServiceOutcome::Refused(wait),
                NextStep::Failed => ServiceOutcome::Failed,
                NextStep::Wait(next) => {
                    self.wait(next, stream, request);
                    continue;
                }
            };
            decided.push((stream, request, outcome));
        }
        decided
    }

    /// Removes a stream that has ended.
    pub fn cancel(&mut self, stream: u32) -> Option<T> {
        let at = self.waiting.iter().position(|(_, waiting, _)| *waiting == stream)?;
        Some(self.waiting.remove(at).2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;

    #[test]
    fn streams_are_admitted_in_the_order_in_which_they_came() {
        let mut pending = PendingStreams::default();
        for (call, stream) in [(1, 10), (2, 20), (1, 11), (1, 12), (1, 13)] {
            pending.wait(CallId(call), stream, ());
        }
        pending.cancel(11);
        assert_eq!(pending.count(CallId(1)), 3);
        let settled = |admitted, others| {
            Some(CallOutcome { route: 0, limit: 0, admitted, until: Some(at(9)), others, failure: None })
        };
        let decided = pending.settle(CallId(1), settled(1, NextStep::Wait(CallId(3))));
        assert_eq!(decided, [(10, (), ServiceOutcome::Admitted(Some(at(9))))]);
        let decided = pending.settle(CallId(3), settled(0, NextStep::Refused(7)));
        assert_eq!(decided, [(12, (), ServiceOutcome::Refused(7)), (13, (), ServiceOutcome::Refused(7))]);
        assert_eq!(pending.settle(CallId(2), None), [(20, (), ServiceOutcome::Failed)]);
    }
}
