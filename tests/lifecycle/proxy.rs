//! What a lifecycle case sees of a proxy, whichever runs it.

use std::time::Duration;

/// A header, as bytes: HTTP does not promise text.
pub type Headers = Vec<(String, Vec<u8>)>;

/// What both proxies have in their environment.
pub const ENVIRONMENT: (&str, &str) = ("TRIMTAB_COHORT_KEY", "a key of more than thirty-two bytes");

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It went on to the upstream with these headers.
    Continued(Headers),
    /// It is held for now.
    Held,
    /// It was answered.
    Answered(Reply),
    /// It was reset.
    Reset,
}

/// An answer that the filter gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u32,
    pub details: String,
    pub headers: Headers,
    pub body: String,
    pub grpc_status: Option<u32>,
}

/// A request on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamId {
    pub worker: usize,
    pub id: u32,
}

/// A gRPC call that waits for its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcCall {
    pub id: u32,
    pub cluster: String,
    /// The path of the request.
    pub path: String,
    pub message: Vec<u8>,
    pub timeout: Duration,
}

/// An HTTP call of the filter to another cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub worker: usize,
    pub number: u32,
    pub cluster: String,
    pub path: String,
}

/// A proxy of two workers with one policy, on a clock that only [`Proxy::advance`] moves.
pub trait Proxy {
    /// Replaces the policy in all workers, as a configuration update does.
    ///
    /// # Errors
    /// What was logged, where the policy is refused; the old one serves on.
    fn update(&mut self, policy: &str) -> Result<(), String>;

    /// Sends the head of a request to a worker.
    fn request(&mut self, worker: usize, headers: &[(&str, &[u8])]) -> (StreamId, Outcome);

    /// Sends the head of the upstream's response, and returns what the client gets.
    fn response(&mut self, stream: StreamId, headers: &[(&str, &str)]) -> Headers;

    /// Sends the trailers of the upstream's response, and returns what the client gets.
    fn response_trailers(&mut self, stream: StreamId, trailers: &[(&str, &str)]) -> Headers;

    /// Ends a stream: its response is complete, or its client has gone.
    fn end(&mut self, stream: StreamId);

    /// Lets time pass, with the ticks that fall due.
    fn advance(&mut self, time: Duration);

    /// Steps the wall clock by so many seconds, as an operator might; the monotonic clock stays where it is.
    fn step_wall_clock(&mut self, seconds: i64);

    /// What became of a request that was held.
    fn outcome(&mut self, stream: StreamId) -> Outcome;

    /// The gRPC calls of a worker that wait for an answer, oldest first.
    fn grpc_calls(&mut self, worker: usize) -> Vec<GrpcCall>;

    /// Ends a gRPC call: with a message where the gRPC status is 0, else with the text that goes with the status.
    fn answer_grpc_call(&mut self, worker: usize, call: u32, status: u32, message: &[u8]);

    /// A property of the streams to come; its path is joined by dots.
    fn set_property(&mut self, path: &str, value: &[u8]);

    /// What the filter has left with a stream under `name`.
    fn left(&mut self, stream: StreamId, name: &str) -> Option<Vec<u8>>;

    /// Makes a cluster known, so that it can be called.
    fn add_cluster(&mut self, name: &str);

    /// The calls that the filter has sent and that wait for their answer.
    fn calls(&mut self) -> Vec<Call>;

    /// Answers a call; with `None`, by a reset.
    fn answer_call(&mut self, call: &Call, answer: Option<(&str, &[u8])>);

    /// Writes a shared word, as a neighbour could.
    fn write_shared(&mut self, key: &str, value: &[u8]);

    /// The value of a metric, all workers together.
    fn metric(&mut self, name: &str) -> u64;
}

/// Whether a body follows on the head of a request.
pub fn has_body(headers: &[(&str, &[u8])]) -> bool {
    headers.iter().any(|(name, _)| *name == "transfer-encoding")
}

/// Finds a header.
pub fn value<'h>(headers: &'h Headers, name: &str) -> Option<&'h str> {
    let (_, value) = headers.iter().find(|(found, _)| found == name)?;
    Some(std::str::from_utf8(value).expect("the header is text"))
}

impl Outcome {
    /// The headers with which a request went on.
    #[track_caller]
    pub fn continued(self) -> Headers {
        match self {
            Outcome::Continued(headers) => headers,
            other => panic!("the request was expected to go on, and was {other:?}"),
        }
    }

    /// The answer that a request got.
    #[track_caller]
    pub fn answered(self) -> Reply {
        match self {
            Outcome::Answered(reply) => reply,
            other => panic!("the request was expected to be answered, and was {other:?}"),
        }
    }
}

/// A GET with these headers besides the usual ones, in worker `worker`.
#[track_caller]
pub fn get(proxy: &mut dyn Proxy, worker: usize, path: &str, headers: &[(&str, &str)]) -> (StreamId, Outcome) {
    let usual = [(":method", "GET"), (":authority", "user-service"), (":scheme", "http"), (":path", path)];
    let all: Vec<(&str, &[u8])> = usual.iter().chain(headers).map(|(name, value)| (*name, value.as_bytes())).collect();
    proxy.request(worker, &all)
}

/// A GET that is answered by the upstream with `status`, whole.
#[track_caller]
pub fn exchange(proxy: &mut dyn Proxy, worker: usize, headers: &[(&str, &str)], status: &str) -> Outcome {
    let (stream, outcome) = get(proxy, worker, "/", headers);
    if matches!(outcome, Outcome::Continued(_)) {
        proxy.response(stream, &[(":status", status)]);
    }
    proxy.end(stream);
    outcome
}
