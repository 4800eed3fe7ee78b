//! One worker of a proxy between clients and upstreams, on a clock that jumps from event to event.
//!
//! It does for the filter what `host/proxy_wasm.rs` does in Envoy: ticks, held streams, answers.

use super::journal;
use super::upstreams::Upstreams;
use crate::explain::OWN_ROUTE;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::time::Duration;
use trimtab::canary::Destination;
use trimtab::fault::HeldStreams;
use trimtab::filter::{Decision, Exchange, Filter, Hold, Reasons, Verdict};
use trimtab::host::Host;
use trimtab::host::sim::Sim;
use trimtab::http::HeaderMutation;
use trimtab::policy::Policy;
use trimtab::random::split_mix;
use trimtab::units::{Monotonic, Wall};

/// What a gRPC service says where it fails.
const UNAVAILABLE: u16 = 14;

pub(super) struct Proxy<'a> {
    host: Sim,
    filter: Filter,
    upstreams: Upstreams<'a>,
    begin: Monotonic,
    ticked: Monotonic,
    held: HeldStreams<Box<Hold>>,
    streams: HashMap<u32, Stream>,
    next_stream: u32,
    /// When upstreams answer.
    answers: BinaryHeap<Reverse<(Monotonic, u32)>>,
    /// The state of the upstreams' random numbers.
    draw: u64,
    /// By route and destination, as the policy numbers them.
    sent: BTreeMap<(Option<usize>, Option<usize>), Sent>,
    seen: BTreeMap<Seen, u64>,
    took: Vec<u64>,
}

/// A request on its way.
struct Stream {
    since: Monotonic,
    reasons: Reasons,
    failed: bool,
    exchange: Exchange,
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
    Due,
}

impl<'a> Proxy<'a> {
    /// Puts `policy` to work at `wall`. The seeds are the filter's and the upstreams'.
    pub fn new(policy: Policy, wall: Wall, seed: u64, upstreams: Upstreams<'a>, upstreams_seed: u64) -> Proxy<'a> {
        let host = Sim::new(seed);
        host.set_wall(wall);
        // Whatever answers is an upstream.
        host.set_property("response.code_details", b"via_upstream");
        journal::set_now(0);
        let filter = Filter::new(policy, &host);
        let begin = host.now();
        Proxy {
            host,
            filter,
            upstreams,
            begin,
            ticked: begin,
            held: HeldStreams::default(),
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

    /// How many requests nobody has answered yet.
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
                Event::Due => self.release(),
            }
        }
        self.advance(time);
    }

    fn advance(&mut self, to: Monotonic) {
        self.host.advance(Duration::from_nanos(to.saturating_sub(self.host.now())));
        journal::set_now(self.host.now().saturating_sub(self.begin));
    }

    fn next(&self) -> Option<(Monotonic, Event)> {
        let due = self.held.next_due();
        let tick =
            self.filter.tick_period(due.is_some()).map(|period| (self.ticked.saturating_add(period), Event::Tick));
        let answer = self.answers.peek().map(|Reverse((at, stream))| (*at, Event::Answer(*stream)));
        let events = [answer, due.map(|at| (at, Event::Due)), tick];
        events.into_iter().flatten().min_by_key(|(at, _)| (*at).max(self.host.now()))
    }

    /// Sends a request, whose headers are serialised as a proxy hands them over.
    pub fn request(&mut self, headers: &[u8]) {
        let decision = self.filter.on_request(&self.host, headers, false, self.held.has_room());
        let Decision { verdict, exchange, reasons, .. } = decision;
        let id = self.next_stream;
        self.next_stream = id.wrapping_add(1);
        self.streams.insert(id, Stream { since: self.host.now(), reasons, failed: false, exchange });
        self.go_on(id, verdict);
    }

    fn go_on(&mut self, id: u32, verdict: Verdict) {
        match verdict {
            Verdict::Continue => self.send(id),
            Verdict::Delay(hold) => self.held.hold(id, self.host.now().saturating_add(hold.delay), hold),
            Verdict::Answer(reply) => {
                // gRPC's own status travels with 200.
                let status = if reply.grpc_status.is_some() { 200 } else { reply.status };
                let grpc_status = reply.grpc_status.map(u16::from);
                self.end(id, Seen { status: Some(status), grpc_status, from: reply.details });
            }
            Verdict::Reset => self.end(id, Seen { status: None, grpc_status: None, from: "wasm_close_stream" }),
            // No service is asked here.
            Verdict::Wait(waiting) => self.filter.on_gone(&self.host, *waiting),
        }
    }

    /// To the upstream.
    fn send(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let (policy, reasons) = (self.filter.policy(), &stream.reasons);
        let destination = reasons.destination(policy).map_or(OWN_ROUTE, Destination::label);
        let now = self.host.now();
        let (failed, takes) =
            self.upstreams.answer(destination, now.saturating_sub(self.begin), || split_mix(&mut self.draw));
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
        let is_grpc = stream.exchange.is_grpc;
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
        self.filter.on_response(&self.host, &mut stream.exchange, &header, &mut change);
        self.end(id, seen);
    }

    fn end(&mut self, id: u32, seen: Seen) {
        let Some(stream) = self.streams.remove(&id) else { return };
        if let Some(slot) = stream.exchange.slot {
            self.filter.free(slot, &self.host);
        }
        self.took.push(self.host.now().saturating_sub(stream.since));
        *self.seen.entry(seen).or_default() += 1;
    }

    fn tick(&mut self) {
        self.ticked = self.host.now();
        self.filter.on_tick(&self.host);
        self.release();
    }

    /// Lets go of every stream that is to be let go now.
    fn release(&mut self) {
        for (id, hold) in self.filter.release(&mut self.held, &self.host) {
            self.go_on(id, hold.then);
            if let Some(slot) = hold.slot {
                self.filter.free(slot, &self.host);
            }
        }
    }
}
