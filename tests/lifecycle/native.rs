//! The filter on the simulated host: what `host/proxy_wasm.rs` does for Envoy, done here for a clock that stands still.

use crate::proxy::{Call, ENVIRONMENT, GrpcCall, Headers, Outcome, Proxy, Reply, StreamId, has_body};
use std::collections::HashMap;
use std::time::Duration;
use trimtab::fault::HeldStreams;
use trimtab::filter::{Decision, Exchange, Filter, Hold, Verdict, Waiting};
use trimtab::host::sim::Sim;
use trimtab::host::{CallId, GrpcAnswer, Host, Properties, StateStore, Version};
use trimtab::http::{HeaderMutation, LocalReply, encode_headers};
use trimtab::outlier::MAX_ANSWER_BYTES;
use trimtab::policy::Policy;
use trimtab::ratelimit::service::Waiters;

#[derive(Default)]
struct Worker {
    filter: Option<Filter>,
    held: HeldStreams<Box<Hold>>,
    waiters: Waiters<Box<Waiting>>,
    grpc_calls: Vec<GrpcCall>,
    next_stream: u32,
    streams: HashMap<u32, Stream>,
}

struct Stream {
    exchange: Exchange,
    headers: Headers,
    outcome: Outcome,
}

pub struct Native {
    host: Sim,
    workers: [Worker; 2],
    calls: Vec<Call>,
}

impl Native {
    pub fn start(policy: &str) -> Box<dyn Proxy> {
        let mut native = Native { host: Sim::new(1), workers: Default::default(), calls: Vec::new() };
        native.update(policy).expect("the case's policy is valid");
        Box::new(native)
    }
}

impl Proxy for Native {
    fn update(&mut self, policy: &str) -> Result<(), String> {
        for worker in &mut self.workers {
            let (policy, _) = Policy::from_json(policy.as_bytes(), &environment)
                .map_err(|told| told.iter().map(|told| format!("policy refused: {told}\n")).collect::<String>())?;
            worker.filter = Some(Filter::new(policy, &self.host));
        }
        Ok(())
    }

    fn request(&mut self, worker: usize, headers: &[(&str, &[u8])]) -> (StreamId, Outcome) {
        let at = worker;
        let worker = &mut self.workers[worker];
        let id = worker.next_stream;
        worker.next_stream += 1;
        let filter = worker.filter.as_mut().expect("a policy is loaded");
        let block = encode_headers(headers);
        let decision = filter.on_request(&self.host, &block, has_body(headers), worker.held.has_room());
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect();
        let stream = Stream { exchange: Exchange::default(), headers, outcome: Outcome::Held };
        let stream = carry_out(id, stream, decision, &mut worker.held, &mut worker.waiters, &self.host);
        let outcome = stream.outcome.clone();
        worker.streams.insert(id, stream);
        worker.note_calls(&self.host);
        (StreamId { worker: at, id }, outcome)
    }

    fn response(&mut self, stream: StreamId, headers: &[(&str, &str)]) -> Headers {
        let worker = &mut self.workers[stream.worker];
        let exchange = &mut worker.streams.get_mut(&stream.id).expect("the stream is open").exchange;
        let filter = worker.filter.as_mut().unwrap();
        changed(headers, |change| filter.on_response(&self.host, exchange, &|name| find(headers, name), change))
    }

    fn response_trailers(&mut self, stream: StreamId, trailers: &[(&str, &str)]) -> Headers {
        let worker = &mut self.workers[stream.worker];
        let exchange = &mut worker.streams.get_mut(&stream.id).expect("the stream is open").exchange;
        let filter = worker.filter.as_mut().unwrap();
        changed(trailers, |change| {
            filter.on_response_trailers(&self.host, exchange, &|name| find(trailers, name), change);
        })
    }

    fn end(&mut self, stream: StreamId) {
        let worker = &mut self.workers[stream.worker];
        let ended = worker.streams.remove(&stream.id);
        let held = worker.held.forget(stream.id);
        if let Some(waiting) = worker.waiters.forget(stream.id) {
            worker.filter.as_mut().unwrap().on_gone(&self.host, *waiting);
        }
        let filter = worker.filter.as_ref().unwrap();
        let slots = [ended.and_then(|stream| stream.exchange.slot), held.and_then(|hold| hold.slot)];
        slots.into_iter().flatten().for_each(|slot| filter.free(slot, &self.host));
    }

    fn advance(&mut self, time: Duration) {
        const TICK: Duration = Duration::from_millis(1);
        let mut left = time;
        while !left.is_zero() {
            let step = left.min(TICK);
            left -= step;
            self.host.advance(step);
            for (at, worker) in self.workers.iter_mut().enumerate() {
                if let Some(filter) = &mut worker.filter {
                    filter.on_tick(&self.host);
                    self.calls.extend(self.host.take_calls().into_iter().map(|call| Call {
                        worker: at,
                        number: call.number,
                        cluster: call.cluster,
                        path: call.path,
                    }));
                    for (id, hold) in filter.release(&mut worker.held, &self.host) {
                        if let Some(stream) = worker.streams.get_mut(&id) {
                            stream.outcome = match hold.then {
                                Verdict::Answer(reply) => Outcome::Answered(answer(reply)),
                                Verdict::Reset => Outcome::Reset,
                                Verdict::Continue => Outcome::Continued(stream.headers.clone()),
                                Verdict::Delay(_) | Verdict::Wait(_) => panic!("a delay follows a delay"),
                            };
                        }
                        if let Some(slot) = hold.slot {
                            filter.free(slot, &self.host);
                        }
                    }
                }
            }
        }
    }

    fn step_wall_clock(&mut self, seconds: i64) {
        self.host.set_wall(self.host.wall_now().checked_add_signed(seconds * 1_000_000_000).expect("after 1970"));
    }

    fn outcome(&mut self, stream: StreamId) -> Outcome {
        self.workers[stream.worker].streams[&stream.id].outcome.clone()
    }

    fn grpc_calls(&mut self, worker: usize) -> Vec<GrpcCall> {
        self.workers[worker].grpc_calls.clone()
    }

    fn answer_grpc_call(&mut self, worker: usize, call: u32, status: u32, message: &[u8]) {
        let Worker { filter, held, waiters, grpc_calls, streams, .. } = &mut self.workers[worker];
        let filter = filter.as_mut().unwrap();
        grpc_calls.retain(|known| known.id != call);
        let answer = GrpcAnswer { call: CallId(call), status, message };
        let settled = filter.on_answer(&self.host, answer, waiters.count(CallId(call)));
        for (id, waiting, outcome) in waiters.settle(CallId(call), settled) {
            let stream = streams.remove(&id).expect("who has gone was forgotten");
            let headers = encode_headers(&stream.headers);
            let decision = filter.on_settled(&self.host, &headers, held.has_room(), waiting, outcome);
            streams.insert(id, carry_out(id, stream, decision, held, waiters, &self.host));
        }
        self.workers[worker].note_calls(&self.host);
    }

    fn set_property(&mut self, path: &str, value: &[u8]) {
        self.host.set_property(path, value);
    }

    fn left(&mut self, _: StreamId, name: &str) -> Option<Vec<u8>> {
        self.host.property(&[name])
    }

    fn add_cluster(&mut self, name: &str) {
        self.host.add_cluster(name);
    }

    fn calls(&mut self) -> Vec<Call> {
        self.calls.clone()
    }

    fn answer_call(&mut self, call: &Call, answer: Option<(&str, &[u8])>) {
        self.calls.retain(|waiting| waiting != call);
        let filter = self.workers[call.worker].filter.as_mut().unwrap();
        let status = answer.map(|(status, _)| status.as_bytes().to_vec());
        let body = answer.map_or(&b""[..], |(_, body)| body);
        let body = (body.len() <= MAX_ANSWER_BYTES).then_some(body);
        filter.on_call_answered(&self.host, call.number, status, body);
    }

    fn write_shared(&mut self, key: &str, value: &[u8]) {
        let version = self.host.get(key).map_or(Version::ABSENT, |(_, version)| version);
        self.host.set(key, value, version).expect("nobody else writes");
    }

    fn metric(&mut self, name: &str) -> u64 {
        self.host.metric(name)
    }
}

impl Worker {
    fn note_calls(&mut self, host: &Sim) {
        self.grpc_calls.extend(host.take_grpc_calls().into_iter().map(|call| GrpcCall {
            id: call.id.0,
            cluster: call.cluster,
            path: call.path,
            message: call.message,
            timeout: Duration::from_millis(call.timeout.into()),
        }));
    }
}

/// Does to a stream's request what was decided.
fn carry_out(
    id: u32,
    mut stream: Stream,
    decision: Decision<'_>,
    held: &mut HeldStreams<Box<Hold>>,
    waiters: &mut Waiters<Box<Waiting>>,
    host: &Sim,
) -> Stream {
    let mut headers: Vec<(Vec<u8>, Vec<u8>)> =
        stream.headers.iter().map(|(name, value)| (name.clone().into_bytes(), value.clone())).collect();
    decision.mutations.iter().for_each(|mutation| mutation.apply(&mut headers));
    stream.headers = headers.into_iter().map(|(name, value)| (String::from_utf8(name).unwrap(), value)).collect();
    stream.exchange = decision.exchange;
    stream.outcome = match decision.verdict {
        Verdict::Continue => Outcome::Continued(stream.headers.clone()),
        Verdict::Answer(reply) => Outcome::Answered(answer(reply)),
        Verdict::Reset => Outcome::Reset,
        Verdict::Delay(hold) => {
            held.hold(id, host.now() + hold.delay, hold);
            Outcome::Held
        }
        Verdict::Wait(waiting) => {
            waiters.wait(waiting.call, id, waiting);
            Outcome::Held
        }
    };
    stream
}

/// The same variable as the module's virtual machine has.
fn environment(name: &str) -> Option<Vec<u8>> {
    let (known, value) = ENVIRONMENT;
    (name == known).then(|| value.as_bytes().to_vec())
}

/// `headers` as they are after the mutations that `act` asks for.
fn changed(headers: &[(&str, &str)], act: impl FnOnce(&mut dyn FnMut(HeaderMutation<'static>))) -> Headers {
    let mut all: Vec<(Vec<u8>, Vec<u8>)> =
        headers.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect();
    act(&mut |mutation| mutation.apply(&mut all));
    all.into_iter().map(|(name, value)| (String::from_utf8(name).unwrap(), value)).collect()
}

fn find(headers: &[(&str, &str)], name: &str) -> Option<Vec<u8>> {
    headers.iter().find(|(found, _)| *found == name).map(|(_, value)| value.as_bytes().to_vec())
}

fn answer(reply: LocalReply) -> Reply {
    Reply {
        status: u32::from(reply.status),
        details: reply.details.to_owned(),
        headers: reply.headers.into_iter().map(|(name, value)| (name.into_owned(), value.into_bytes())).collect(),
        body: reply.body,
        grpc_status: reply.grpc_status.map(u32::from),
    }
}
