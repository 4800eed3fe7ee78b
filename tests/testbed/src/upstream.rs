//! An HTTP server that tells what reached it and fails on demand.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::PATIENCE;
use crate::message::{Body, EMPTY_GRPC_MESSAGE, append};

/// A server on a port of its own that speaks HTTP/1.1 and h2c. It answers 200
/// with a JSON echo of the request and the header `x-upstream-version`, unless
/// its [`Behaviour`] says otherwise. It ends when dropped.
#[derive(Debug)]
pub struct Upstream {
    address: SocketAddr,
    state: Arc<State>,
    accepting: AbortHandle,
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    /// HTTP/1.1 or HTTP/2.
    pub protocol: Version,
    /// The method.
    pub method: Method,
    /// The path with its query.
    pub path: String,
    /// The authority (HTTP/1.1: the `host` header).
    pub authority: String,
    /// The headers, in the order in which their names first appeared.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The trailers, if there were any.
    pub trailers: Option<HeaderMap>,
}

impl Received {
    /// The first value of a header, if there is one and it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// How an [`Upstream`] answers. Two request headers change single answers:
/// `x-upstream-status: 503` and `x-upstream-latency: 250` (milliseconds).
#[derive(Debug, Clone)]
pub struct Behaviour {
    status: StatusCode,
    latency: Duration,
    failing: Option<(u64, StatusCode)>,
    headers: HeaderMap,
    body: Option<Bytes>,
    trailers: Option<HeaderMap>,
    ending: Ending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Answer,
    Reset,
    Silence,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            status: StatusCode::OK,
            latency: Duration::ZERO,
            failing: None,
            headers: HeaderMap::new(),
            body: None,
            trailers: None,
            ending: Ending::Answer,
        }
    }
}

impl Behaviour {
    /// The echo, at once.
    pub fn echo() -> Self {
        Self::default()
    }

    /// A gRPC answer: 200, an empty message, and `grpc-status` in trailers.
    pub fn grpc(status: u8) -> Self {
        Self::default()
            .header("content-type", "application/grpc")
            .body(&EMPTY_GRPC_MESSAGE[..])
            .trailer("grpc-status", status.to_string())
    }

    /// Resets the connection (TCP RST) when a request has arrived.
    pub fn reset() -> Self {
        Self { ending: Ending::Reset, ..Self::default() }
    }

    /// Accepts requests and never answers.
    pub fn silent() -> Self {
        Self { ending: Ending::Silence, ..Self::default() }
    }

    /// Answers with this status.
    ///
    /// # Panics
    /// When it is outside 100..=999.
    #[must_use]
    pub fn status(mut self, status: u16) -> Self {
        self.status = status_code(status);
        self
    }

    /// Waits before it answers (or resets).
    #[must_use]
    pub fn latency(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    /// Answers this share of the requests with this status: evenly spread and
    /// exact, so that of any n requests `floor(n * ratio)` have failed.
    #[must_use]
    pub fn failing(mut self, ratio: f64, status: u16) -> Self {
        let per_million = (ratio * 1e6).round() as u64;
        self.failing = Some((per_million, status_code(status)));
        self
    }

    /// Adds a response header.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        append(&mut self.headers, name, value.as_ref());
        self
    }

    /// Sends this body in place of the echo.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = Some(body.into());
        self
    }

    /// Sends a body of this many bytes in place of the echo.
    #[must_use]
    pub fn body_size(self, bytes: usize) -> Self {
        self.body(vec![b'x'; bytes])
    }

    /// Adds a trailer. Over HTTP/1.1 trailers are sent to a client that asks
    /// for them with `te: trailers`.
    #[must_use]
    pub fn trailer(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let trailers = self.trailers.get_or_insert_default();
        append(trailers, name, value.as_ref());
        self
    }
}

#[derive(Debug)]
struct State {
    version: String,
    log: Mutex<Log>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Log {
    behaviour: Behaviour,
    received: Vec<Received>,
    /// How many of `received` [`Upstream::next_request`] has returned.
    taken: usize,
    /// How many requests came since the behaviour was set.
    served: u64,
}

impl Upstream {
    /// Starts a server. It runs on the current tokio runtime.
    ///
    /// # Panics
    /// When the machine has no port left.
    pub async fn start(version: &str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has a name");
        let state = Arc::new(State { version: version.to_owned(), log: Mutex::default(), arrived: Notify::new() });
        let accepting = tokio::spawn(accept(listener, state.clone())).abort_handle();
        Self { address, state, accepting }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes how it answers, from the next request on.
    pub fn set_behaviour(&self, behaviour: Behaviour) {
        let mut log = self.state.log.lock().unwrap();
        log.behaviour = behaviour;
        log.served = 0;
    }

    /// Every request since the start or the last [`clear`](Self::clear).
    pub fn requests(&self) -> Vec<Received> {
        self.state.log.lock().unwrap().received.clone()
    }

    /// How many requests came since the start or the last `clear`.
    pub fn count(&self) -> usize {
        self.state.log.lock().unwrap().received.len()
    }

    /// Forgets the requests seen so far.
    pub fn clear(&self) {
        let mut log = self.state.log.lock().unwrap();
        log.received.clear();
        log.taken = 0;
    }

    /// Waits for the first request that it has not yet returned.
    ///
    /// # Panics
    /// When none comes within [`PATIENCE`].
    pub async fn next_request(&self) -> Received {
        let next = async {
            loop {
                let arrived = self.state.arrived.notified();
                if let Some(request) = self.state.log.lock().unwrap().take() {
                    return request;
                }
                arrived.await;
            }
        };
        tokio::time::timeout(PATIENCE, next).await.unwrap_or_else(|_| {
            let Self { state, .. } = self;
            panic!("no request reached {} in {PATIENCE:?}", state.version)
        })
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Log {
    fn take(&mut self) -> Option<Received> {
        let request = self.received.get(self.taken)?.clone();
        self.taken += 1;
        Some(request)
    }

    /// Notes a request and says how to answer it.
    fn note(&mut self, request: Received) -> Behaviour {
        let mut behaviour = self.behaviour.clone();
        if let Some((per_million, status)) = behaviour.failing {
            let failed = |served: u64| served * per_million / 1_000_000;
            if failed(self.served + 1) > failed(self.served) {
                behaviour.status = status;
            }
        }
        let number = |name| request.header(name)?.parse::<u16>().ok();
        if let Some(status) = number("x-upstream-status") {
            behaviour.status = status_code(status);
        }
        if let Some(milliseconds) = number("x-upstream-latency") {
            behaviour.latency = Duration::from_millis(milliseconds.into());
        }
        self.served += 1;
        self.received.push(request);
        behaviour
    }
}

/// Serves connections. They live in a set of this task's: they end with it.
async fn accept(listener: TcpListener, state: Arc<State>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            connections.spawn(serve(stream, state.clone()));
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: TcpStream, state: Arc<State>) {
    let _ = stream.set_nodelay(true);
    let Ok(stream) = stream.into_std() else {
        return;
    };
    // A second handle, because hyper takes the first.
    let (Ok(handle), Ok(stream)) = (stream.try_clone(), TcpStream::from_std(stream)) else {
        return;
    };
    let reset = Arc::new(Notify::new());
    let server = auto::Builder::new(TokioExecutor::new());
    let service = service_fn({
        let reset = reset.clone();
        move |request| answer(request, state.clone(), reset.clone())
    });
    tokio::select! {
        _ = server.serve_connection(TokioIo::new(stream), service) => {}
        () = reset.notified() => {
            // Closing a socket that does not linger sends RST.
            let _ = socket2::SockRef::from(&handle).set_linger(Some(Duration::ZERO));
        }
    }
}

async fn answer(
    request: http::Request<Incoming>,
    state: Arc<State>,
    reset: Arc<Notify>,
) -> Result<http::Response<Body>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?;
    let host = || Some(head.headers.get("host")?.to_str().ok()?.to_owned());
    let received = Received {
        protocol: head.version,
        method: head.method.clone(),
        path: head
            .uri
            .path_and_query()
            .map_or_else(|| head.uri.to_string(), |path_and_query| path_and_query.to_string()),
        authority: head.uri.authority().map(ToString::to_string).or_else(host).unwrap_or_default(),
        trailers: body.trailers().cloned(),
        body: body.to_bytes(),
        headers: head.headers,
    };
    let echo = echo(&state.version, &received);
    let behaviour = state.log.lock().unwrap().note(received);
    state.arrived.notify_waiters();

    tokio::time::sleep(behaviour.latency).await;
    match behaviour.ending {
        Ending::Answer => {}
        Ending::Reset => {
            reset.notify_one();
            std::future::pending().await
        }
        Ending::Silence => std::future::pending().await,
    }

    let mut response = http::Response::new(match behaviour.body {
        Some(ref body) => Body::new(body.clone(), behaviour.trailers.clone()),
        None => Body::new(echo, behaviour.trailers.clone()),
    });
    *response.status_mut() = behaviour.status;
    let headers = response.headers_mut();
    if behaviour.body.is_none() {
        append(headers, "content-type", b"application/json");
    }
    append(headers, "x-upstream-version", state.version.as_bytes());
    for name in behaviour.trailers.iter().flat_map(HeaderMap::keys) {
        append(headers, "trailer", name.as_str().as_bytes());
    }
    headers.extend(behaviour.headers);
    Ok(response)
}

fn echo(version: &str, request: &Received) -> Bytes {
    let headers: Vec<_> = request
        .headers
        .iter()
        .map(|(name, value)| json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())]))
        .collect();
    let echo = json!({
        "version": version,
        "method": request.method.as_str(),
        "authority": request.authority,
        "path": request.path,
        "headers": headers,
    });
    Bytes::from(format!("{echo}\n"))
}

fn status_code(status: u16) -> StatusCode {
    StatusCode::from_u16(status).unwrap_or_else(|_| panic!("{status} is no HTTP status"))
}
