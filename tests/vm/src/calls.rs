//! Calls of the guest to other clusters. They are kept until the test answers
//! them; no clock answers them, so a test also decides on timeouts.

use std::time::Duration;

use crate::abi::Status;
use crate::failure::Trap;
use crate::headers::Headers;
use crate::vm::{RootId, Vm};

/// The low bits of a token, which tell the types of calls apart.
pub(crate) const HTTP: u32 = 0;
pub(crate) const GRPC: u32 = 1;

/// An HTTP call that waits for its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpCall {
    pub token: u32,
    /// The root context that gets the answer.
    pub root: RootId,
    pub cluster: String,
    pub headers: Headers,
    pub body: Vec<u8>,
    pub trailers: Headers,
    pub timeout: Duration,
}

/// A unary gRPC call that waits for its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcCall {
    pub token: u32,
    /// The root context that gets the answer.
    pub root: RootId,
    pub cluster: String,
    pub service: String,
    pub method: String,
    pub metadata: Headers,
    pub message: Vec<u8>,
    pub timeout: Duration,
}

/// What the guest can read of an answer, while it is told of it.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) http: Option<(Headers, Vec<u8>)>,
    pub(crate) grpc: Option<Vec<u8>>,
    pub(crate) status: (u32, String),
}

impl Vm {
    /// The HTTP calls that wait for an answer, oldest first.
    pub fn http_calls(&self) -> impl Iterator<Item = &HttpCall> {
        self.store.data().http_calls.values()
    }

    /// The gRPC calls that wait for an answer, oldest first.
    pub fn grpc_calls(&self) -> impl Iterator<Item = &GrpcCall> {
        self.store.data().grpc_calls.values()
    }

    /// Answers an HTTP call. `:status` is one of the headers.
    ///
    /// # Errors
    /// When the guest traps.
    ///
    /// # Panics
    /// When no such call waits.
    pub fn answer_http_call<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        &mut self,
        token: u32,
        headers: &[(N, V)],
        body: impl AsRef<[u8]>,
    ) -> Result<(), Trap> {
        let sizes = [headers.len(), body.as_ref().len()];
        let answer = Answer { http: Some((Headers::new(headers), body.as_ref().to_vec())), ..Answer::default() };
        self.end_http_call(token, sizes, answer)
    }

    /// Ends an HTTP call without an answer, as a reset does.
    ///
    /// # Errors
    /// When the guest traps.
    ///
    /// # Panics
    /// When no such call waits.
    pub fn fail_http_call(&mut self, token: u32) -> Result<(), Trap> {
        let status = (Status::BrokenConnection as u32, "reset".to_owned());
        self.end_http_call(token, [0, 0], Answer { status, ..Answer::default() })
    }

    fn end_http_call(&mut self, token: u32, sizes: [usize; 2], answer: Answer) -> Result<(), Trap> {
        let call = self.store.data_mut().http_calls.remove(&token).expect("an HTTP call with this token waits");
        let [headers, body] = sizes.map(size);
        self.tell(call.root, "proxy_on_http_call_response", &[token, headers, body, 0], answer)
    }

    /// Answers a gRPC call: with a message where the status is 0, else with
    /// the text that goes with the status.
    ///
    /// # Errors
    /// When the guest traps.
    ///
    /// # Panics
    /// When no such call waits.
    pub fn answer_grpc_call(&mut self, token: u32, status: u32, message: impl AsRef<[u8]>) -> Result<(), Trap> {
        let call = self.store.data_mut().grpc_calls.remove(&token).expect("a gRPC call with this token waits");
        let message = message.as_ref().to_vec();
        if status == 0 {
            let length = size(message.len());
            let answer = Answer { grpc: Some(message), ..Answer::default() };
            self.tell(call.root, "proxy_on_grpc_receive", &[token, length], answer)
        } else {
            let text = String::from_utf8_lossy(&message).into_owned();
            let answer = Answer { status: (status, text), ..Answer::default() };
            self.tell(call.root, "proxy_on_grpc_close", &[token, status], answer)
        }
    }

    fn tell(&mut self, root: RootId, callback: &'static str, arguments: &[u32], answer: Answer) -> Result<(), Trap> {
        if !self.is_running(root) {
            return Ok(()); // Envoy cancels the calls of a root context with it.
        }
        self.store.data_mut().answer = answer;
        let outcome = self.callback(callback, root.0, arguments);
        self.store.data_mut().answer = Answer::default();
        outcome.map(|_| ())
    }
}

fn size(size: usize) -> u32 {
    u32::try_from(size).expect("an answer is far below 4 GiB")
}
