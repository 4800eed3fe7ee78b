//! One worker of a proxy between clients and upstreams, on a clock that jumps from event to event.
//!
//! It drives a worker as `host/proxy_wasm.rs` does in Envoy.

use super::journal;
use super::upstreams::Upstreams;
use crate::explain::OWN_ROUTE;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::time::Duration;
use trimtab::canary::Destination;
use trimtab::filter::Explanation;
use trimtab::host::Host;
use trimtab::host::sim::Sim;
use trimtab::http::HeaderMutation;
use trimtab::policy::Policy;
use trimtab::random::split_mix;
use trimtab::units::{MonotonicInstant, UnixNanos};
use trimtab::worker::{self, Action, Streams, Worker};

const MILLISECOND: u64 = 1_000_000;

/// What a gRPC service says where it fails.
const UNAVAILABLE: u16 = 14;

pub(super) struct Proxy<'a> {
    host: Sim,
    worker: Worker,
    upstreams: Upstreams<'a>,
    begin: MonotonicInstant,
    ticked: MonotonicInstant,
    streams: HashMap<u32, Stream>,
    next_stream: u32,
    /// When upstreams answer.
    answers: BinaryHeap<Reverse<(MonotonicInstant, u32)>>,
    /// The state of the upstreams' random numbers.
    draw: u64,
    /// By route and destination, as the policy numbers them.
    sent: BTreeMap<(Option<usize>, Option<usize>), Sent>,
    seen: BTreeMap<Seen, u64>,
    took: Vec<u64>,
}

/// A request on its way.
struct Stream {
    since: MonotonicInstant,
    reasons: Explanation,
    failed: bool,
    stream: worker::Stream,
}

/// What the worker asks to be done to held streams.
#[derive(Default)]
struct Releases {
    selected: u32,
    actions: Vec<(u32, Action)>,
}

impl Streams for Releases {
    fn select(&mut self, stream: u32) -> bool {
        self.selected = stream;
        true
    }

    /// Each request comes on a connection of its own.
    fn connection(&mut self) -> Option<u64> {
        Some(self.selected.into())
    }

    fn mutate(&mut self, _: &HeaderMutation<'_>) {}

    fn release(&mut self, stream: u32, action: Action) {
        self.actions.push((stream, action));
    }
}

/// What a destination got.
#[derive(Default)]
pub(super) struct Sent {
    /// `None` where no route matched.
    pub route: Option<String>,
    pub destination: String,
    pub requests: u64,
    pub failures: u64,
}

/// What a client saw.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seen {
    /// `None` where the stream was reset.
    pub status: Option<u16>,
    pub grpc_status: Option<u16>,
    /// Who said so: the upstream, or Envoy's response details.
    pub from: &'static str,
}

/// What is next.
enum Event {
    Tick,
    Answer(u32),
}

impl<'a> Proxy<'a> {
    /// Puts `policy` to work at `wall`. The seeds are the filter's and the upstreams'.
    pub fn new(policy: Policy, wall: UnixNanos, seed: u64, upstreams: Upstreams<'a>, upstreams_seed: u64) -> Proxy<'a> {
        let host = Sim::new(seed);
        host.set_wall(wall);
        // Whatever answers is an upstream.
        host.set_property("response.code_details", b"via_upstream");
        journal::set_now(0);
        let worker = Worker::new(policy, &host);
        let begin = host.now();
        Proxy {
            host,
            worker,
            upstreams,
            begin,
            ticked: begin,
            streams: HashMap::new(),
            next_stream: 0,
            answers: BinaryHeap::new(),
            draw: upstreams_seed,
            sent: BTreeMap::new(),
            seen: BTreeMap::new(),
            took: Vec::new(),
        }
    }

    pub fn host(&self) -> &Sim {
        &self.host
    }

    pub fn sent(&self) -> impl Iterator<Item = &Sent> {
        self.sent.values()
    }

    pub fn seen(&self) -> impl Iterator<Item = (&Seen, &u64)> {
        self.seen.iter()
    }

    /// The number of requests without a response yet.
    pub fn under_way(&self) -> usize {
        self.streams.len()
    }

    /// Within how many nanoseconds half of the clients had their answer, and so on.
    pub fn percentiles(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let mut took = self.took.clone();
        took.sort_unstable();
        let at =
            move |percent: usize| took.get((took.len() * percent / 100).min(took.len().saturating_sub(1))).copied();
        [("p50", 50), ("p95", 95), ("p99", 99)]
            .into_iter()
            .filter_map(move |(name, percent)| Some((name, at(percent)?)))
    }

    /// Lets everything happen up to `time`, in nanoseconds since the beginning.
    pub fn run_until(&mut self, time: u64) {
        let time = self.begin.saturating_add(time);
        while let Some((at, event)) = self.next().filter(|(at, _)| *at <= time) {
            self.advance(at);
            match event {
                Event::Tick => self.tick(),
                Event::Answer(stream) => self.answer(stream),
            }
        }
        self.advance(time);
    }

    fn advance(&mut self, to: MonotonicInstant) {
        self.host.advance(Duration::from_nanos(to.saturating_since(self.host.now())));
        journal::set_now(self.host.now().saturating_since(self.begin));
    }

    fn next(&mut self) -> Option<(MonotonicInstant, Event)> {
        let now = self.host.now();
        // A host has no tick finer than a millisecond.
        let tick = self
            .worker
            .next_tick(&self.host)
            .map(|at| (if at <= self.ticked { self.ticked.saturating_add(MILLISECOND) } else { at }, Event::Tick));
        let answer = self.answers.peek().map(|Reverse((at, stream))| (*at, Event::Answer(*stream)));
        [answer, tick].into_iter().flatten().min_by_key(|(at, _)| (*at).max(now))
    }

    /// Sends a request, whose headers are serialised as a proxy hands them over.
    pub fn request(&mut self, headers: &[u8]) {
        let id = self.next_stream;
        self.next_stream = id.wrapping_add(1);
        let (mut stream, mut reasons) = (worker::Stream::new(id), Explanation::default());
        let explain = |explained: &mut Explanation| reasons = std::mem::take(explained);
        let action = self.worker.on_request(&self.host, &mut stream, headers.to_vec(), false, |_| {}, explain);
        self.streams.insert(id, Stream { since: self.host.now(), reasons, failed: false, stream });
        self.act(id, action);
    }

    fn act(&mut self, id: u32, action: Action) {
        match action {
            Action::Continue => self.send(id),
            Action::Pause => {}
            Action::Reply(reply) => {
                // gRPC's own status travels with 200.
                let status = if reply.grpc_status.is_some() { 200 } else { reply.status };
                let grpc_status = reply.grpc_status.map(u16::from);
                self.end(id, Seen { status: Some(status), grpc_status, from: reply.details });
            }
            Action::Reset => self.end(id, Seen { status: None, grpc_status: None, from: "wasm_close_stream" }),
        }
    }

    /// To the upstream.
    fn send(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let (policy, reasons) = (self.worker.policy(), &stream.reasons);
        let destination = reasons.destination(policy).map_or(OWN_ROUTE, Destination::label);
        let now = self.host.now();
        let (failed, takes) =
            self.upstreams.answer(destination, now.saturating_since(self.begin), || split_mix(&mut self.draw));
        stream.failed = failed;
        self.answers.push(Reverse((now.saturating_add(takes), id)));
        let place = (reasons.route, reasons.choice.map(|choice| choice.destination));
        let sent = self.sent.entry(place).or_insert_with(|| Sent {
            route: reasons.route.and_then(|route| policy.routes.get(route)).map(|route| route.name.to_string()),
            destination: destination.to_owned(),
            ..Sent::default()
        });
        sent.requests += 1;
        sent.failures += u64::from(failed);
    }

    /// From the upstream. A gRPC service answers with trailers alone.
    fn answer(&mut self, id: u32) {
        self.answers.pop();
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let is_grpc = stream.stream.is_grpc();
        let status: u16 = if stream.failed && !is_grpc { 503 } else { 200 };
        let grpc_status = is_grpc.then_some(if stream.failed { UNAVAILABLE } else { 0 });
        let header = |name: &str| match name {
            ":status" => Some(status.to_string().into_bytes()),
            "grpc-status" => Some(grpc_status?.to_string().into_bytes()),
            _ => None,
        };
        let mut seen = Seen { status: Some(status), grpc_status, from: "upstream" };
        let mut change = |mutation: HeaderMutation<'static>| {
            if let HeaderMutation::Set(name @ (":status" | "grpc-status"), value) = mutation {
                let number = std::str::from_utf8(&value).ok().and_then(|value| value.parse().ok());
                seen.from = "upstream, replaced";
                if name == ":status" { seen.status = number } else { seen.grpc_status = number }
            }
        };
        self.worker.on_response(&self.host, &mut stream.stream, &header, &mut change);
        self.end(id, seen);
    }

    fn end(&mut self, id: u32, seen: Seen) {
        let Some(mut stream) = self.streams.remove(&id) else { return };
        self.took.push(self.host.now().saturating_since(stream.since));
        *self.seen.entry(seen).or_default() += 1;
        self.worker.on_end(&self.host, &mut stream.stream);
    }

    fn tick(&mut self) {
        self.ticked = self.host.now();
        let mut releases = Releases::default();
        self.worker.on_tick(&self.host, &mut releases);
        for (id, action) in releases.actions {
            self.act(id, action);
        }
    }
}
