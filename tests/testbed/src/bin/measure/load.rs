//! The request that is sent, and a client that sends it often.
//!
//! The client knows the answer's length and nothing else of HTTP, so that it costs little beside the Envoy that it
//! loads. Its connections are kept: what opening one costs is in no figure.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use trimtab_testbed::PATIENCE;
use trimtab_testbed::browser::{HEADERS, PATH};

/// The header that limits are keyed by. Its value is the browser's, or of its length.
pub const USER: &str = "x-user-id";

/// What the upstream answers.
pub const BODY_SIZE: usize = 256;

/// One connection.
pub struct Sender {
    stream: TcpStream,
    request: Vec<u8>,
    /// Where the user's number stands in `request`, ten digits.
    number: usize,
    answer: Vec<u8>,
}

impl Sender {
    pub fn connect(address: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect(address).map_err(|error| format!("cannot connect to {address}: {error}"))?;
        let ready = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(PATIENCE)));
        ready.map_err(|error| format!("cannot prepare a connection: {error}"))?;
        let mut request = format!("GET {PATH} HTTP/1.1\r\nhost: user-service\r\n");
        let mut number = 0;
        for (name, value) in HEADERS {
            request += &format!("{name}: {value}\r\n");
            if name == USER {
                number = request.len() - "\r\n".len() - DIGITS;
            }
        }
        request += "\r\n";
        Ok(Self { stream, request: request.into_bytes(), number, answer: vec![0; 16 * 1024] })
    }

    /// Sends the request of one user, which has to be admitted, and waits for its answer.
    pub fn send(&mut self, user: u64) -> Result<(), String> {
        if self.ask(user)? { Ok(()) } else { Err(format!("a request of user {user} was refused")) }
    }

    /// Sends the request of one user and waits for its answer: whether it is 200, where otherwise it has to be 429.
    pub fn ask(&mut self, user: u64) -> Result<bool, String> {
        let digits = format!("{user:0DIGITS$}");
        self.request[self.number..self.number + DIGITS].copy_from_slice(digits.as_bytes());
        self.stream.write_all(&self.request).map_err(|error| format!("cannot send a request: {error}"))?;
        let mut received = 0;
        loop {
            let count = self.stream.read(&mut self.answer[received..]);
            match count.map_err(|error| format!("no answer to a request: {error}"))? {
                0 => return Err("the connection was closed in place of an answer".to_owned()),
                count => received += count,
            }
            let answer = &self.answer[..received];
            let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(&answer[..end]);
            let admitted = head.starts_with("HTTP/1.1 200 ");
            if !admitted && !head.starts_with("HTTP/1.1 429 ") {
                return Err(format!("expected 200 or 429, got: {head}"));
            }
            let size = if admitted { BODY_SIZE } else { body_size(&head)? };
            if received >= end + 4 + size {
                return Ok(admitted);
            }
        }
    }
}

fn body_size(head: &str) -> Result<usize, String> {
    let size = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    size.ok_or_else(|| format!("an answer that does not tell its length: {head}"))
}

/// How many digits a user's number has.
const DIGITS: usize = 10;

/// Sends `count` requests over `connections`, the users in turn; how many were admitted.
pub fn count_admitted(address: SocketAddr, connections: u64, count: u64, users: u64) -> Result<u64, String> {
    let send = |first: u64| {
        let mut sender = Sender::connect(address)?;
        let mut admitted = 0;
        for number in (first..count).step_by(connections as usize) {
            admitted += u64::from(sender.ask(number % users)?);
        }
        Ok::<_, String>(admitted)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections).map(|first| scope.spawn(move || send(first))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| "a sender panicked".to_owned())?).sum()
    })
}

/// Sends requests of which all have to be admitted.
pub fn load(address: SocketAddr, connections: u64, count: u64, users: u64) -> Result<(), String> {
    match count_admitted(address, connections, count, users)? {
        admitted if admitted == count => Ok(()),
        admitted => Err(format!("{admitted} of {count} requests were admitted, expected all")),
    }
}
