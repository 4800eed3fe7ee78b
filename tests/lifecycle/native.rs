//! The worker on the simulated host: what `host/proxy_wasm.rs` does in Envoy, with a clock that a test moves.

use crate::proxy::{Call, ENVIRONMENT, GrpcCall, Headers, Outcome, Proxy, Reply, StreamId, has_body};
use std::time::Duration;
use trimtab::host::sim::Sim;
use trimtab::host::{CallId, GrpcAnswer, Host, Properties, SharedData, Version};
use trimtab::http::{HeaderMutation, LocalReply, encode_headers};
use trimtab::outlier::MAX_ANSWER_BYTES;
use trimtab::policy::Policy;
use trimtab::units::UnixNanos;
use trimtab::worker::{self, Action, Worker};

/// One worker thread.
#[derive(Default)]
struct Thread {
    /// A worker for each configuration, the newest last. The old ones serve the streams that they have.
    workers: Vec<Worker>,
    /// The number of workers that were shut down, the oldest first.
    shut_down: usize,
    grpc_calls: Vec<GrpcCall>,
    streams: Vec<Stream>,
    /// The request of each stream.
    requests: Vec<Request>,
}

struct Stream {
    /// An index into the workers of the thread.
    worker: usize,
    /// `None` after its end.
    stream: Option<worker::Stream>,
}

/// A request as it was sent, and what became of it.
struct Request {
    headers: Headers,
    outcome: Outcome,
}

pub struct Native {
    host: Sim,
    threads: [Thread; 2],
    calls: Vec<Call>,
}

/// The requests of a thread, and what its workers ask to be done to them.
struct Releases<'t> {
    requests: &'t mut [Request],
    selected: u32,
    actions: Vec<(u32, Action)>,
}

impl worker::Streams for Releases<'_> {
    fn select(&mut self, stream: u32) -> bool {
        self.selected = stream;
        true
    }

    fn connection(&mut self) -> Option<u64> {
        Some(self.selected.into())
    }

    fn mutate(&mut self, mutation: &HeaderMutation<'_>) {
        apply(&mut self.requests[self.selected as usize].headers, mutation);
    }

    fn release(&mut self, stream: u32, action: Action) {
        assert_eq!(stream, self.selected, "the stream that is released is not the one that is selected");
        self.actions.push((stream, action));
    }
}

impl Native {
    pub fn start(policy: &str) -> Box<dyn Proxy> {
        let mut native = Native { host: Sim::new(1), threads: Default::default(), calls: Vec::new() };
        native.update(policy).expect("the case's policy is valid");
        Box::new(native)
    }
}

impl Proxy for Native {
    fn update(&mut self, policy: &str) -> Result<(), String> {
        for thread in &mut self.threads {
            let (policy, _) = Policy::from_json(policy.as_bytes(), &environment)
                .map_err(|told| told.iter().map(|told| format!("policy refused: {told}\n")).collect::<String>())?;
            thread.workers.push(Worker::new(policy, &self.host));
            thread.shut_down_unused_workers(&self.host);
        }
        Ok(())
    }

    fn request(&mut self, worker: usize, headers: &[(&str, &[u8])]) -> (StreamId, Outcome) {
        let thread = &mut self.threads[worker];
        let id = thread.streams.len() as u32;
        let mut sent = headers.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect();
        let newest = thread.workers.len() - 1;
        let mutate = |mutation: &HeaderMutation<'_>| apply(&mut sent, mutation);
        let block = encode_headers(headers);
        let mut stream = worker::Stream::new(id);
        let (newest_worker, has_body) = (&mut thread.workers[newest], has_body(headers));
        let action = newest_worker.on_request(&self.host, &mut stream, block, has_body, mutate, |_| {});
        thread.streams.push(Stream { worker: newest, stream: Some(stream) });
        thread.requests.push(Request { headers: sent, outcome: Outcome::Held });
        thread.carry_out(vec![(id, action)], &self.host);
        (StreamId { worker, id }, thread.requests[id as usize].outcome.clone())
    }

    fn response(&mut self, stream: StreamId, headers: &[(&str, &str)]) -> Headers {
        let (worker, stream) = self.threads[stream.worker].open(stream.id);
        changed(headers, |change| worker.on_response(&self.host, stream, &|name| find(headers, name), change))
    }

    fn response_trailers(&mut self, stream: StreamId, trailers: &[(&str, &str)]) -> Headers {
        let (worker, stream) = self.threads[stream.worker].open(stream.id);
        changed(trailers, |change| {
            worker.on_response_trailers(&self.host, stream, &|name| find(trailers, name), change);
        })
    }

    fn end(&mut self, stream: StreamId) {
        let thread = &mut self.threads[stream.worker];
        let ended = &mut thread.streams[stream.id as usize];
        let mut stream = ended.stream.take().expect("a stream ends once");
        thread.workers[ended.worker].on_end(&self.host, &mut stream);
        thread.shut_down_unused_workers(&self.host);
    }

    fn advance(&mut self, time: Duration) {
        const TICK: Duration = Duration::from_millis(1);
        let mut left = time;
        while !left.is_zero() {
            let step = left.min(TICK);
            left -= step;
            self.host.advance(step);
            for at in 0..self.threads.len() {
                let actions = self.threads[at].each_worker(|worker, releases| worker.on_tick(&self.host, releases));
                self.calls.extend(self.host.take_calls().into_iter().map(|call| Call {
                    worker: at,
                    number: call.number,
                    cluster: call.cluster,
                    path: call.path,
                }));
                self.threads[at].carry_out(actions, &self.host);
            }
        }
    }

    fn step_wall_clock(&mut self, seconds: i64) {
        let wall = self.host.wall_now().as_nanos().checked_add_signed(seconds * 1_000_000_000).expect("after 1970");
        self.host.set_wall(UnixNanos::from_nanos(wall));
    }

    fn outcome(&mut self, stream: StreamId) -> Outcome {
        self.threads[stream.worker].requests[stream.id as usize].outcome.clone()
    }

    fn grpc_calls(&mut self, worker: usize) -> Vec<GrpcCall> {
        self.threads[worker].grpc_calls.clone()
    }

    fn answer_grpc_call(&mut self, worker: usize, call: u32, status: u32, message: &[u8]) {
        let thread = &mut self.threads[worker];
        thread.grpc_calls.retain(|known| known.id != call);
        let answer = GrpcAnswer { call: CallId(call), status, message };
        let actions = thread.each_worker(|worker, releases| worker.on_grpc_answer(&self.host, answer, releases));
        thread.carry_out(actions, &self.host);
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
        let status = answer.map(|(status, _)| status.as_bytes().to_vec());
        let body = answer.map_or(&b""[..], |(_, body)| body);
        let body = (body.len() <= MAX_ANSWER_BYTES).then_some(body);
        for worker in &mut self.threads[call.worker].workers {
            worker.on_http_answer(&self.host, call.number, status.clone(), body);
        }
    }

    fn write_shared(&mut self, key: &str, value: &[u8]) {
        let version = self.host.get(key).map_or(Version::ABSENT, |(_, version)| version);
        self.host.set(key, value, version).expect("nobody else writes");
    }

    /// Problems with shared data are counted by ticks.
    fn metric(&mut self, name: &str) -> u64 {
        for thread in &mut self.threads {
            let actions = thread.each_worker(|worker, releases| worker.on_tick(&self.host, releases));
            thread.carry_out(actions, &self.host);
        }
        self.host.metric(name)
    }
}

impl Thread {
    /// Calls all workers, and returns what they ask to be done to held streams.
    fn each_worker(&mut self, call: impl Fn(&mut Worker, &mut Releases<'_>)) -> Vec<(u32, Action)> {
        let mut releases = Releases { requests: &mut self.requests, selected: 0, actions: Vec::new() };
        self.workers.iter_mut().for_each(|worker| call(worker, &mut releases));
        releases.actions
    }

    /// Shuts down the workers of earlier configurations that have no open stream, as Envoy ends their root contexts.
    fn shut_down_unused_workers(&mut self, host: &Sim) {
        for at in self.shut_down..self.workers.len().saturating_sub(1) {
            if self.streams.iter().any(|stream| stream.worker == at && stream.stream.is_some()) {
                break;
            }
            self.workers[at].on_shutdown(host);
            self.shut_down = at + 1;
        }
    }

    /// Does to requests what was decided, as Envoy does after the callback. A local reply goes back through the filter.
    fn carry_out(&mut self, actions: Vec<(u32, Action)>, host: &Sim) {
        for (id, action) in actions {
            let request = &self.requests[id as usize];
            let outcome = match action {
                Action::Continue => Outcome::Continued(request.headers.clone()),
                Action::Pause => Outcome::Held,
                Action::Reset => Outcome::Reset,
                Action::Reply(reply) => {
                    let reply = answer(reply);
                    let (worker, stream) = self.open(id);
                    let header = |name: &str| reply_header(&reply, name);
                    worker.on_response(host, stream, &header, &mut |_| {});
                    Outcome::Answered(reply)
                }
            };
            self.requests[id as usize].outcome = outcome;
        }
        self.note_calls(host);
    }

    /// An open stream, and the worker that serves it.
    fn open(&mut self, id: u32) -> (&mut Worker, &mut worker::Stream) {
        let stream = &mut self.streams[id as usize];
        (&mut self.workers[stream.worker], stream.stream.as_mut().expect("the stream is open"))
    }

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

/// Changes `headers` as a proxy does.
fn apply(headers: &mut Headers, mutation: &HeaderMutation<'_>) {
    let mut all: Vec<(Vec<u8>, Vec<u8>)> = headers.drain(..).map(|(name, value)| (name.into_bytes(), value)).collect();
    mutation.apply(&mut all);
    *headers = all.into_iter().map(|(name, value)| (String::from_utf8(name).unwrap(), value)).collect();
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

/// A header of the response that Envoy makes of a local reply.
fn reply_header(reply: &Reply, name: &str) -> Option<Vec<u8>> {
    match (name, reply.grpc_status) {
        (":status", Some(_)) => Some(b"200".to_vec()),
        (":status", None) => Some(reply.status.to_string().into_bytes()),
        ("grpc-status", status) => Some(status?.to_string().into_bytes()),
        _ => reply.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone()),
    }
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
