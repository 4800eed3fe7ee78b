//! Bytes over TCP, for what no proper client sends: HTTP/1.0, absolute-form,
//! `*`, CONNECT, broken heads, and clients that leave early.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::PATIENCE;

/// Sends `request` on a connection of its own and returns the bytes of the one
/// response to it; those that had come when the peer closed, if it did.
///
/// # Panics
/// When the connection fails, or there is no end to the response.
pub async fn raw(address: SocketAddr, request: impl AsRef<[u8]>) -> Vec<u8> {
    let mut connection = RawConnection::open(address).await;
    connection.write(request.as_ref()).await;
    connection.read_response().await
}

/// A TCP connection. Dropping it closes it, with whatever was under way.
#[derive(Debug)]
pub struct RawConnection {
    stream: TcpStream,
    /// Received and not yet returned.
    received: Vec<u8>,
    /// The method of the last request decides whether a body follows.
    bodiless: bool,
}

impl RawConnection {
    /// Connects.
    ///
    /// # Panics
    /// When nobody listens.
    pub async fn open(address: SocketAddr) -> Self {
        let stream =
            TcpStream::connect(address).await.unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
        stream.set_nodelay(true).expect("TCP_NODELAY can be set");
        Self { stream, received: Vec::new(), bodiless: false }
    }

    /// Writes all of `bytes`. That the peer has closed shows in the reading.
    pub async fn write(&mut self, bytes: &[u8]) {
        self.bodiless = bytes.starts_with(b"HEAD ") || bytes.starts_with(b"CONNECT ");
        let _ = self.stream.write_all(bytes).await;
    }

    /// Reads one response, head and body as they came.
    ///
    /// # Panics
    /// When it does not end within [`PATIENCE`].
    pub async fn read_response(&mut self) -> Vec<u8> {
        loop {
            if let Some(end) = response_end(&self.received, self.bodiless) {
                let rest = self.received.split_off(end);
                return std::mem::replace(&mut self.received, rest);
            }
            if !self.read_some().await {
                return std::mem::take(&mut self.received);
            }
        }
    }

    /// Reads until the peer closes.
    ///
    /// # Panics
    /// When it does not within [`PATIENCE`].
    pub async fn read_to_end(&mut self) -> Vec<u8> {
        while self.read_some().await {}
        std::mem::take(&mut self.received)
    }

    /// False at the end of the stream, be it orderly or a reset.
    async fn read_some(&mut self) -> bool {
        let read = self.stream.read_buf(&mut self.received);
        match tokio::time::timeout(PATIENCE, read).await {
            Ok(result) => result.is_ok_and(|count| count > 0),
            Err(_) => panic!("nothing more for {PATIENCE:?} after {:?}", String::from_utf8_lossy(&self.received)),
        }
    }
}

/// Where the response at the start of `bytes` ends, if it is complete and does
/// not end with the connection.
pub(crate) fn response_end(bytes: &[u8], bodiless: bool) -> Option<usize> {
    let body = find(bytes, b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..body]).to_ascii_lowercase();
    let status = head.split(' ').nth(1).unwrap_or_default();
    if bodiless || matches!(status, "204" | "304") || status.starts_with('1') {
        return Some(body);
    }
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    if field("transfer-encoding").is_some_and(|coding| coding.ends_with("chunked")) {
        // The last chunk, then trailers, then an empty line.
        let last = match bytes[body..].starts_with(b"0\r\n") {
            true => body,
            false => body + find(&bytes[body..], b"\r\n0\r\n")? + 2,
        };
        return Some(last + 1 + find(&bytes[last + 1..], b"\r\n\r\n")? + 4);
    }
    let end = body + field("content-length")?.parse::<usize>().ok()?;
    (bytes.len() >= end).then_some(end)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
