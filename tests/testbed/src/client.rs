//! An HTTP/1.1 and HTTP/2 client that does what it is told: no redirects, no
//! retries, no headers of its own beyond what the protocol asks for.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::PATIENCE;
use crate::message::{Body, Request, Response};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A client of one address. Clones share its connections, but for those made
/// with [`without_reuse`](Self::without_reuse).
///
/// Over HTTP/1.1, requests sent one after the other share a connection and
/// requests sent at once get one each; over HTTP/2 all share one.
#[derive(Debug, Clone)]
pub struct Client {
    address: SocketAddr,
    protocol: Protocol,
    reuse: bool,
    idle: Arc<Mutex<Vec<Connection>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

#[derive(Debug)]
enum Connection {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

impl Client {
    /// A client that speaks HTTP/1.1.
    pub fn http1(address: SocketAddr) -> Self {
        Self::new(address, Protocol::Http1)
    }

    /// A client that speaks HTTP/2 with prior knowledge (h2c).
    pub fn http2(address: SocketAddr) -> Self {
        Self::new(address, Protocol::Http2)
    }

    fn new(address: SocketAddr, protocol: Protocol) -> Self {
        Self { address, protocol, reuse: true, idle: Arc::default() }
    }

    /// Whom it asks.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens a connection for each request, so that the requests spread over
    /// all the workers of an Envoy.
    #[must_use]
    pub fn without_reuse(mut self) -> Self {
        self.reuse = false;
        self.idle = Arc::default();
        self
    }

    /// Sends a request and reads the whole response.
    ///
    /// # Panics
    /// When there is no response: the connection is refused or breaks, or
    /// [`PATIENCE`] ends.
    pub async fn send(&self, request: Request) -> Response {
        match self.try_send(request).await {
            Ok(response) => response,
            Err(failure) => panic!("{failure}"),
        }
    }

    /// As [`send`](Self::send), for requests that may remain unanswered.
    /// Dropping the future resets the stream: the client went away.
    ///
    /// # Errors
    /// Which request failed, where to, and why.
    pub async fn try_send(&self, request: Request) -> Result<Response, String> {
        let what = format!("{} {}", request.method, request.path);
        let failed = |why: &dyn fmt::Display| format!("{what} to {}: {why}", self.address);
        match tokio::time::timeout(PATIENCE, self.exchange(request, &what)).await {
            Ok(result) => result.map_err(|error| failed(&chain(&*error))),
            Err(_) => Err(failed(&format_args!("no answer within {PATIENCE:?}"))),
        }
    }

    async fn exchange(&self, request: Request, what: &str) -> Result<Response, Error> {
        let request = self.encode(request)?;
        let mut connection = self.connection().await?;
        let started = Instant::now();
        let (head, body) = connection.send(request).await?.into_parts();
        let body = body.collect().await?;
        let elapsed = started.elapsed();
        if self.reuse && self.protocol == Protocol::Http1 {
            self.idle.lock().unwrap().push(connection);
        }
        Ok(Response {
            request: what.to_owned(),
            status: head.status,
            headers: head.headers,
            trailers: body.trailers().cloned(),
            body: body.to_bytes(),
            elapsed,
        })
    }

    fn encode(&self, request: Request) -> Result<http::Request<Body>, Error> {
        let uri = match self.protocol {
            Protocol::Http1 => request.path,
            Protocol::Http2 => format!("http://{}{}", request.authority, request.path),
        };
        let mut encoded =
            http::Request::builder().method(request.method).uri(uri).body(Body::new(request.body, request.trailers))?;
        if self.protocol == Protocol::Http1 && !request.headers.contains_key("host") {
            let host = request.authority.parse()?;
            encoded.headers_mut().insert("host", host);
        }
        encoded.headers_mut().extend(request.headers);
        Ok(encoded)
    }

    async fn connection(&self) -> Result<Connection, Error> {
        while let Some(mut idle) = self.take_idle() {
            if idle.is_usable().await {
                return Ok(idle);
            }
        }
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        match self.protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(io).await?;
                tokio::spawn(connection);
                Ok(Connection::Http1(sender))
            }
            Protocol::Http2 => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
                tokio::spawn(connection);
                if self.reuse {
                    let shared = Connection::Http2(sender.clone());
                    self.idle.lock().unwrap().push(shared);
                }
                Ok(Connection::Http2(sender))
            }
        }
    }

    fn take_idle(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap();
        match idle.last() {
            Some(Connection::Http2(shared)) if !shared.is_closed() => Some(Connection::Http2(shared.clone())),
            _ => idle.pop(),
        }
    }
}

impl Connection {
    async fn is_usable(&mut self) -> bool {
        match self {
            Self::Http1(sender) => sender.ready().await.is_ok(),
            Self::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    async fn send(&mut self, request: http::Request<Body>) -> hyper::Result<http::Response<Incoming>> {
        match self {
            Self::Http1(sender) => sender.send_request(request).await,
            Self::Http2(sender) => sender.send_request(request).await,
        }
    }
}

/// An error with its causes, in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
