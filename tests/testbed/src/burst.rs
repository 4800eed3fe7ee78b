//! Many requests at once: all requests of a connection arrive at the proxy in one read, or as near to that as TCP
//! allows, and how each of them ends is counted.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::message::Request;
use crate::raw::response_end;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// A whole response with this status.
    Answered(u16),
    /// HTTP/2: the stream was reset with this error code.
    Reset(u32),
    /// The connection was closed before the response was whole.
    Closed,
    /// There was neither at the deadline.
    Open,
}

/// How many requests ended in which way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcomes(BTreeMap<Outcome, usize>);

impl Outcomes {
    /// How many ended so.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.0.get(&outcome).copied().unwrap_or(0)
    }

    /// How many requests there were.
    pub fn total(&self) -> usize {
        self.0.values().sum()
    }

    /// How many ended in a way that `is_wanted` is true of.
    pub fn count_if(&self, is_wanted: impl Fn(Outcome) -> bool) -> usize {
        self.0.iter().filter(|(outcome, _)| is_wanted(**outcome)).map(|(_, count)| count).sum()
    }
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (outcome, count)) in self.0.iter().enumerate() {
            write!(f, "{}{count} {outcome:?}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// Requests that have been sent. Dropping it closes the connections.
#[derive(Debug)]
pub struct Burst {
    requests: JoinSet<Outcome>,
    /// HTTP/2: what drives each connection.
    connections: JoinSet<()>,
}

impl Burst {
    /// Opens `connections` and sends `count` copies of `request`, without its body, on each. The HEADERS frames of a
    /// connection, and its preface, are one write.
    ///
    /// The client is the `h2` crate's, the one below hyper: it acknowledges SETTINGS and PING, keeps the windows open
    /// and decodes what is answered. What it writes is kept back until every request is encoded.
    ///
    /// # Panics
    /// When a connection is refused, or one write does not take all requests.
    pub async fn http2(address: SocketAddr, connections: usize, count: usize, request: &Request) -> Self {
        let mut burst = Self { requests: JoinSet::new(), connections: JoinSet::new() };
        for _ in 0..connections {
            burst.open_http2(address, count, request).await;
        }
        burst
    }

    async fn open_http2(&mut self, address: SocketAddr, count: usize, request: &Request) {
        const WINDOW: u32 = 64 << 20;
        let (socket, handle) = connect(address).await;
        let kept = Arc::new(Mutex::new(Some(Vec::new())));
        let (client, mut connection) = h2::client::Builder::new()
            .initial_max_send_streams(usize::MAX)
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .handshake::<_, Bytes>(Corked { socket, kept: Arc::clone(&kept) })
            .await
            .expect("a preface can be written");
        let uri = format!("http://{}{}", request.authority, request.path);
        let mut head = http::Request::builder().method(&request.method).uri(uri).body(()).expect("a request's head");
        head.headers_mut().extend(request.headers.clone());
        for _ in 0..count {
            // A copy for each: one that has a request which is not yet encoded takes no other.
            let (response, _) = client.clone().send_request(head.clone(), true).expect("a request can be sent");
            self.requests.spawn(async { ended_http2(response).await });
        }
        std::future::poll_fn(|context| {
            let is_over = Pin::new(&mut connection).poll(context).is_ready();
            assert!(!is_over, "the connection ended before the requests were sent");
            Poll::Ready(())
        })
        .await;
        // From here on the connection writes for itself.
        let bytes = kept.lock().unwrap().take().unwrap_or_default();
        assert_eq!(headers_frames(&bytes), count, "requests in the first write");
        write_at_once(&handle, &bytes).await;
        drop(handle);
        self.connections.spawn(async move {
            // How it ends is seen in its streams.
            let _ = connection.await;
        });
    }

    /// Opens `count` connections, then sends `request`, without its body, on each of them over HTTP/1.1.
    ///
    /// # Panics
    /// When a connection is refused or breaks while it is written to.
    pub async fn http1(address: SocketAddr, count: usize, request: &Request) -> Self {
        let mut head = format!("{} {} HTTP/1.1\r\nhost: {}\r\n", request.method, request.path, request.authority);
        for (name, value) in &request.headers {
            head += &format!("{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes()));
        }
        head += "\r\n";
        let mut sockets = Vec::with_capacity(count);
        for _ in 0..count {
            let socket = TcpStream::connect(address).await;
            sockets.push(socket.unwrap_or_else(|error| panic!("cannot connect to {address}: {error}")));
        }
        for socket in &mut sockets {
            socket.write_all(head.as_bytes()).await.expect("the connection is open");
        }
        let mut burst = Self { requests: JoinSet::new(), connections: JoinSet::new() };
        for socket in sockets {
            burst.requests.spawn(ended_http1(socket));
        }
        burst
    }

    /// Waits until every request has ended, at most for `patience`.
    pub async fn outcomes(mut self, patience: Duration) -> Outcomes {
        let deadline = tokio::time::Instant::now() + patience;
        let mut outcomes = Outcomes::default();
        let mut count = |outcome, number| {
            if number > 0 {
                *outcomes.0.entry(outcome).or_default() += number;
            }
        };
        while let Ok(Some(outcome)) = tokio::time::timeout_at(deadline, self.requests.join_next()).await {
            count(outcome.expect("a request's task does not panic"), 1);
        }
        count(Outcome::Open, self.requests.len());
        outcomes
    }

    /// Closes the connections with whatever is under way, as a client that leaves.
    pub async fn leave(mut self) {
        self.connections.shutdown().await;
        self.requests.shutdown().await;
    }
}

/// A connection, and a second handle of it.
async fn connect(address: SocketAddr) -> (TcpStream, TcpStream) {
    let open = async || {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let socket = socket.into_std()?;
        let handle = socket.try_clone()?;
        Ok((TcpStream::from_std(socket)?, TcpStream::from_std(handle)?))
    };
    open().await.unwrap_or_else(|error: io::Error| panic!("cannot connect to {address}: {error}"))
}

async fn write_at_once(socket: &TcpStream, bytes: &[u8]) {
    socket.writable().await.expect("the connection is open");
    let written = socket.try_write(bytes).expect("a new connection takes bytes");
    assert_eq!(written, bytes.len(), "bytes that one write takes: send fewer requests on a connection");
}

/// How many frames of the kind HEADERS follow the preface in `bytes`.
fn headers_frames(bytes: &[u8]) -> usize {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const HEADERS: u8 = 1;
    let mut rest = bytes.strip_prefix(PREFACE).expect("a client begins with the preface");
    let mut count = 0;
    while let [a, b, c, kind, ..] = *rest {
        count += usize::from(kind == HEADERS);
        let length = 9 + u32::from_be_bytes([0, a, b, c]) as usize;
        rest = rest.get(length..).expect("whole frames are written");
    }
    count
}

async fn ended_http2(response: h2::client::ResponseFuture) -> Outcome {
    let read = async {
        let (head, mut body) = response.await?.into_parts();
        while let Some(data) = body.data().await {
            body.flow_control().release_capacity(data?.len())?;
        }
        body.trailers().await?;
        Ok(head.status.as_u16())
    };
    match read.await {
        Ok(status) => Outcome::Answered(status),
        Err(error) => outcome_of(&error),
    }
}

fn outcome_of(error: &h2::Error) -> Outcome {
    match error.reason() {
        Some(reason) if error.is_reset() => Outcome::Reset(reason.into()),
        _ => Outcome::Closed,
    }
}

async fn ended_http1(mut socket: TcpStream) -> Outcome {
    let mut received = Vec::new();
    while !matches!(socket.read_buf(&mut received).await, Ok(0) | Err(_)) {
        if response_end(&received, false).is_some() {
            let status =
                received.split(|byte| *byte == b' ').nth(1).and_then(|status| std::str::from_utf8(status).ok());
            return Outcome::Answered(status.and_then(|status| status.parse().ok()).expect("a status line"));
        }
    }
    Outcome::Closed
}

/// A connection that keeps what is written to it for as long as there is a place to keep it in.
struct Corked {
    socket: TcpStream,
    kept: Arc<Mutex<Option<Vec<u8>>>>,
}

impl AsyncRead for Corked {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for Corked {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(kept) = self.kept.lock().unwrap().as_mut() {
            kept.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

/// Raises this process's limit of open files, which the programs that it starts inherit, as far as the system allows,
/// and returns it.
pub fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
