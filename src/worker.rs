//! One worker: a filter and the streams that it holds.
//!
//! A host calls a [`Worker`] with each event of a stream (request, response, end), each answer to a call, and at the time
//! that [`Worker::next_tick`] asks for. The worker returns what to do with that stream, and calls [`Streams`] for others
//! that it releases. It has no thread and no clock of its own, so Envoy, the tests and the command-line program drive the
//! same code.
//!
//! Invariants:
//! - One call of [`Worker::on_tick`] or [`Worker::on_grpc_answer`] releases at most [`MAX_RELEASES`] streams. The others
//!   follow at the next ticks, in the order in which they became due. Envoy carries out what a module asks for only after
//!   the call into the module, and nests: a stream that Envoy answers at once calls the module again, and that call
//!   carries out what is left. Several hundred releases in one call exhaust the stack.
//! - In one call nothing is released on a connection after a reset on it. Envoy closes a connection, in the middle of the
//!   250th reset of a stream younger than two seconds (`overload.premature_reset_total_stream_count`), and destroys all its
//!   streams. What was asked for them in the same call would then act on streams that are gone.
//! - [`Worker::on_end`] gives back whatever a stream still has: a place among the delayed streams, a place under `maxActive`,
//!   a request that waits for a service and what it has charged.

use crate::fault::{DelayedStreams, Due, ExperimentId};
use crate::filter::{DelayedRequest, Explanation, Filter, Header, PendingRequest, RequestAction, StreamState};
use crate::host::{GrpcAnswer, Host};
use crate::http::{HeaderMutation, LocalReply};
use crate::policy::Policy;
use crate::ratelimit::service::{PendingStreams, ServiceOutcome};
use crate::units::MonotonicInstant;
use hashbrown::HashMap;
use std::collections::VecDeque;

/// The most streams that are released in one call. In Envoy 1.40 the virtual machine traps at 272 streams that are
/// answered at once, with no other filter in the chain; the distance leaves room for other filters.
pub const MAX_RELEASES: usize = 32;

/// The longest time, in nanoseconds, that what a worker adds to metrics stays unpublished.
pub const PUBLICATION_PERIOD: u64 = 100_000_000;

/// A filter and the streams that it holds.
#[derive(Debug)]
pub struct Worker {
    filter: Filter,
    delayed: DelayedStreams<ExperimentId, Box<DelayedRequest>>,
    /// Streams that wait for the answer to a call.
    pending: PendingStreams<Pending>,
    /// Streams whose call is answered and which are not released yet, in the order of the answers.
    answered: VecDeque<Answered>,
    /// The exchanges of streams that waited for a call, until their response or their end.
    resumed: HashMap<u32, StreamState>,
    ticked: MonotonicInstant,
}

/// A request that waits for a call.
#[derive(Debug)]
struct Pending {
    headers: Vec<u8>,
    waiting: Box<PendingRequest>,
}

/// A stream whose call is answered.
#[derive(Debug)]
struct Answered {
    stream: u32,
    pending: Pending,
    outcome: ServiceOutcome,
    at: MonotonicInstant,
}

/// What a host keeps of a stream from its beginning to its end, when it is handed to [`Worker::on_end`].
#[derive(Debug)]
pub struct Stream {
    id: u32,
    exchange: StreamState,
    is_held: bool,
}

impl Stream {
    /// A new stream. `id` is a number that no other open stream of the worker has.
    pub fn new(id: u32) -> Stream {
        Stream { id, exchange: StreamState::default(), is_held: false }
    }

    pub fn is_grpc(&self) -> bool {
        self.exchange.is_grpc
    }
}

/// What a host does with a request now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The request goes on.
    Continue,
    /// The client is answered in the upstream's place.
    Reply(LocalReply),
    /// The stream is reset. No answer is sent.
    Reset,
    /// The request is held until [`Streams::release`] is called for it.
    Pause,
}

/// The streams of a host, to which a worker applies what it decides about held streams.
///
/// The worker must not be called from here. A host that acts at once, and may be called again while it acts, collects
/// what it is asked for and acts afterwards.
pub trait Streams {
    /// Makes `stream` the one that [`Streams::mutate`] and the host's properties are about. Whether it still exists.
    fn select(&mut self, stream: u32) -> bool;

    /// A number of the connection of the stream that is selected; `None` where it is not known.
    fn connection(&mut self) -> Option<u64>;

    /// Changes a request header of the stream that is selected.
    fn mutate(&mut self, mutation: &HeaderMutation<'_>);

    /// Releases the stream that is selected; `action` is never [`Action::Pause`].
    fn release(&mut self, stream: u32, action: Action);
}

/// The connections on which a stream was reset in this call.
#[derive(Default)]
struct Resets {
    connections: Vec<u64>,
    /// Whether one of them is not known.
    any: bool,
}

impl Resets {
    /// Whether nothing may be released any more on the connection of `stream`.
    fn forbid(&self, stream: u32, streams: &mut impl Streams) -> bool {
        if self.connections.is_empty() && !self.any {
            return false;
        }
        let connection = if streams.select(stream) { streams.connection() } else { None };
        self.any || connection.is_none_or(|connection| self.connections.contains(&connection))
    }

    /// Notes that the stream that is selected was reset.
    fn add(&mut self, streams: &mut impl Streams) {
        match streams.connection() {
            Some(connection) => self.connections.push(connection),
            None => self.any = true,
        }
    }
}

impl Worker {
    /// Puts `policy` to work.
    pub fn new(policy: Policy, host: &impl Host) -> Worker {
        Worker {
            filter: Filter::new(policy, host),
            delayed: DelayedStreams::default(),
            pending: PendingStreams::default(),
            answered: VecDeque::new(),
            resumed: HashMap::new(),
            ticked: host.now(),
        }
    }

    pub fn policy(&self) -> &Policy {
        self.filter.policy()
    }

    /// Decides on a request. `headers` are serialised (see [`crate::http::encode_headers`]). `mutate` is called with each
    /// change of them, and then `explain` with the reasons; those of a request that waits for a service are not complete.
    pub fn on_request(
        &mut self,
        host: &impl Host,
        stream: &mut Stream,
        headers: Vec<u8>,
        has_body: bool,
        mutate: impl FnMut(&HeaderMutation<'_>),
        explain: impl FnOnce(&mut Explanation),
    ) -> Action {
        let mut decision = self.filter.on_request(host, &headers, has_body, self.delayed.has_room());
        decision.mutations.iter().for_each(mutate);
        explain(&mut decision.reasons);
        stream.exchange = decision.exchange;
        match decision.verdict {
            RequestAction::Continue => Action::Continue,
            verdict => {
                let action = self.act_on(host, stream.id, headers, verdict);
                stream.is_held = action == Action::Pause;
                action
            }
        }
    }

    /// Observes the head of a response, and changes it. `header` returns a header of the response by its name.
    pub fn on_response(
        &mut self,
        host: &impl Host,
        stream: &mut Stream,
        header: Header<'_>,
        change: &mut dyn FnMut(HeaderMutation<'static>),
    ) {
        if stream.is_held
            && let Some(exchange) = self.resumed.remove(&stream.id)
        {
            stream.exchange = exchange;
        }
        self.filter.on_response(host, &mut stream.exchange, header, change);
    }

    /// Observes the trailers of a response, and changes them.
    pub fn on_response_trailers(
        &mut self,
        host: &impl Host,
        stream: &mut Stream,
        header: Header<'_>,
        change: &mut dyn FnMut(HeaderMutation<'static>),
    ) {
        self.filter.on_response_trailers(host, &mut stream.exchange, header, change);
    }

    /// Gives back what an ended stream still has. To be called for each stream when it has ended, however it ended.
    pub fn on_end(&mut self, host: &impl Host, stream: &mut Stream) {
        let mut reached_upstream = true;
        let mut held = None;
        if std::mem::take(&mut stream.is_held) {
            if let Some(exchange) = self.resumed.remove(&stream.id) {
                stream.exchange = exchange;
            }
            if let Some(delayed) = self.delayed.cancel(stream.id) {
                (held, reached_upstream) = (delayed.fault_permit, false);
            } else {
                self.cancel(host, stream.id);
            }
        }
        self.filter.on_end(host, &mut stream.exchange, reached_upstream);
        for permit in held.into_iter().chain(stream.exchange.fault_permit.take()) {
            self.filter.release(permit, host);
        }
    }

    /// Removes a stream that waits for a call, or whose call is answered.
    #[inline(never)]
    fn cancel(&mut self, host: &impl Host, stream: u32) {
        if let Some(pending) = self.pending.cancel(stream) {
            self.filter.on_cancel(host, *pending.waiting, None);
        } else if let Some(at) = self.answered.iter().position(|answered| answered.stream == stream)
            && let Some(Answered { pending, outcome, .. }) = self.answered.remove(at)
        {
            self.filter.on_cancel(host, *pending.waiting, Some(outcome));
        }
    }

    /// Takes the answer to a gRPC call, and releases streams that waited for it.
    pub fn on_grpc_answer(&mut self, host: &impl Host, answer: GrpcAnswer<'_>, streams: &mut impl Streams) {
        let settled = self.filter.on_answer(host, answer, self.pending.count(answer.call));
        let at = host.now();
        let decided = self.pending.settle(answer.call, settled).into_iter();
        self.answered.extend(decided.map(|(stream, pending, outcome)| Answered { stream, pending, outcome, at }));
        self.release(host, streams);
    }

    /// Takes the answer to an HTTP call. `body` is `None` where it is longer than
    /// [`crate::outlier::MAX_ANSWER_BYTES`].
    pub fn on_http_answer(&mut self, host: &impl Host, call: u32, status: Option<Vec<u8>>, body: Option<&[u8]>) {
        self.filter.on_call_answered(host, call, status, body);
    }

    /// Does what is due: lets windows move on, judges, and releases streams.
    pub fn on_tick(&mut self, host: &impl Host, streams: &mut impl Streams) {
        self.ticked = host.now();
        self.filter.on_tick(host);
        self.release(host, streams);
        self.publish(host);
    }

    /// Merges and publishes what this worker has counted. To be called when its configuration goes away, after the last
    /// stream has ended.
    pub fn on_shutdown(&mut self, host: &impl Host) {
        self.filter.on_shutdown(host);
        self.publish(host);
    }

    fn publish(&self, host: &impl Host) {
        for (problem, count) in host.take_problems() {
            self.filter.count_problem(problem, count, host);
        }
        host.publish();
    }

    /// When [`Worker::on_tick`] is to be called next, by the host's monotonic clock; a time that has passed means as soon
    /// as possible. It changes with every other call.
    pub fn next_tick(&mut self, host: &impl Host) -> Option<MonotonicInstant> {
        let due =
            if self.answered.is_empty() { self.delayed.next_due().map(|(due, _)| due) } else { Some(self.ticked) };
        let period = self.filter.tick_period();
        let periodic = period.map(|period| self.ticked.saturating_add(period));
        let unpublished = host.has_unpublished().then(|| self.ticked.saturating_add(PUBLICATION_PERIOD));
        [due, periodic, unpublished].into_iter().flatten().min()
    }

    /// Releases streams that are due, up to [`MAX_RELEASES`].
    fn release(&mut self, host: &impl Host, streams: &mut impl Streams) {
        let now = host.now();
        let filter = &self.filter;
        self.delayed.expedite(now, |experiment| filter.must_stop(experiment));
        let mut resets = Resets::default();
        for _ in 0..MAX_RELEASES {
            let answered = self.answered.front().map(|answered| (answered.at, answered.stream));
            let delayed = self.delayed.next_due().filter(|(due, _)| *due <= now);
            let Some((_, stream)) = [delayed, answered].into_iter().flatten().min_by_key(|(at, _)| *at) else { break };
            if resets.forbid(stream, streams) {
                break;
            }
            let is_reset = if delayed.is_some_and(|(_, next)| next == stream) {
                self.release_delayed(host, now, streams)
            } else {
                self.release_answered(host, streams)
            };
            if is_reset {
                resets.add(streams);
            }
        }
    }

    /// Releases the next delayed stream, unfaulted where its experiment may inject nothing any more. Whether it was reset.
    fn release_delayed(&mut self, host: &impl Host, now: MonotonicInstant, streams: &mut impl Streams) -> bool {
        let Some(Due { stream, then: delayed, is_expedited }) = self.delayed.take_due(now) else { return false };
        // It may have been suspended since the last tick.
        let is_faulted = delayed.action_after != RequestAction::Continue
            && !is_expedited
            && self.filter.may_continue(host, delayed.experiment);
        let action = match delayed.action_after {
            RequestAction::Answer(reply) if is_faulted => Action::Reply(reply),
            RequestAction::Reset if is_faulted => Action::Reset,
            _ => Action::Continue,
        };
        let is_reset = action == Action::Reset;
        if streams.select(stream) {
            streams.release(stream, action);
        }
        if let Some(permit) = delayed.fault_permit {
            self.filter.release(permit, host);
        }
        is_reset
    }

    /// Decides on the next stream whose call is answered, and releases it unless it is held again. Whether it was reset.
    fn release_answered(&mut self, host: &impl Host, streams: &mut impl Streams) -> bool {
        let Some(answered) = self.answered.pop_front() else { return false };
        let Answered { stream, pending: Pending { headers, waiting }, outcome, .. } = answered;
        if !streams.select(stream) {
            self.filter.on_cancel(host, *waiting, Some(outcome));
            return false;
        }
        let decision = self.filter.on_resume(host, &headers, self.delayed.has_room(), waiting, outcome);
        decision.mutations.iter().for_each(|mutation| streams.mutate(mutation));
        let (verdict, exchange) = (decision.verdict, decision.exchange);
        self.resumed.insert(stream, exchange);
        let action = self.act_on(host, stream, headers, verdict);
        let is_reset = action == Action::Reset;
        if action != Action::Pause {
            streams.release(stream, action);
        }
        is_reset
    }

    /// What the host does about a verdict. A request that does not go on yet is kept.
    #[inline(never)]
    fn act_on(&mut self, host: &impl Host, stream: u32, headers: Vec<u8>, verdict: RequestAction) -> Action {
        match verdict {
            RequestAction::Continue => Action::Continue,
            RequestAction::Answer(reply) => Action::Reply(reply),
            RequestAction::Reset => Action::Reset,
            RequestAction::Delay(delayed) => {
                let due = host.now().saturating_add(delayed.delay);
                self.delayed.hold(stream, delayed.experiment, due, delayed);
                Action::Pause
            }
            RequestAction::Wait(waiting) => {
                self.pending.wait(waiting.call, stream, Pending { headers, waiting });
                Action::Pause
            }
        }
    }
}
