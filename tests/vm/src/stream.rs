//! HTTP streams: the callbacks of one request and its response, and what the
//! guest did to them.

use std::collections::BTreeMap;

use crate::abi::Status;
use crate::failure::Trap;
use crate::headers::Headers;
use crate::vm::{RootId, Vm};

/// What a callback answered, or what has become of it since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The request, or the response, goes on.
    Continue,
    /// It is held until it is resumed or answered.
    Pause,
}

/// A stream of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub(crate) u32);

/// An answer that the guest gave in the upstream's place, as it asked for it.
/// What the client gets is in [`Stream::response_headers`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalReply {
    pub status: u32,
    /// The response code details, as they appear in an access log.
    pub details: String,
    /// The headers that the guest added.
    pub headers: Headers,
    pub body: Vec<u8>,
    /// `None` is the guest's -1.
    pub grpc_status: Option<u32>,
}

/// The state of a stream.
#[derive(Clone, Debug)]
pub struct Stream {
    pub(crate) root: RootId,
    /// Whether the guest knows it.
    created: bool,
    /// What the request was before the guest changed it.
    grpc: bool,
    head: bool,
    pub(crate) logging: bool,
    pub(crate) properties: BTreeMap<String, Vec<u8>>,
    pub(crate) written_properties: Vec<(String, Vec<u8>)>,
    pub(crate) filter_states: Vec<Vec<u8>>,
    pub(crate) route_cache_clears: u32,
    /// Request headers, request trailers, response headers, response
    /// trailers: numbered as in the ABI.
    maps: [Map; 4],
    /// The part of a body that a callback is about, by direction.
    pub(crate) chunks: [Option<Vec<u8>>; 2],
    bodies: [Vec<u8>; 2],
    actions: [Action; 2],
    reset: bool,
    reply: Option<LocalReply>,
}

const REQUEST_HEADERS: usize = 0;
const REQUEST_TRAILERS: usize = 1;
const RESPONSE_HEADERS: usize = 2;
const RESPONSE_TRAILERS: usize = 3;

#[derive(Clone, Debug, Default)]
struct Map {
    headers: Headers,
    received: bool,
    /// Whether the host still points the guest to it.
    live: bool,
}

/// The two ways through a filter, numbered as in the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Request,
    Response,
}

/// What waits for the end of the callback that asked for it.
pub(crate) enum Deferred {
    Continue(u32, Direction),
    Reset(u32),
    Reply(u32, LocalReply),
    Delete(RootId),
}

impl Stream {
    fn new(root: RootId) -> Self {
        Self {
            root,
            created: false,
            grpc: false,
            head: false,
            logging: false,
            properties: BTreeMap::new(),
            written_properties: Vec::new(),
            filter_states: Vec::new(),
            route_cache_clears: 0,
            maps: Default::default(),
            chunks: Default::default(),
            bodies: Default::default(),
            actions: [Action::Continue; 2],
            reset: false,
            reply: None,
        }
    }

    /// The request's headers, as the next filter gets them.
    pub fn request_headers(&self) -> &Headers {
        &self.maps[REQUEST_HEADERS].headers
    }

    /// The request's trailers.
    pub fn request_trailers(&self) -> &Headers {
        &self.maps[REQUEST_TRAILERS].headers
    }

    /// The response's headers, as the client gets them: the upstream's, or
    /// those of a local reply.
    pub fn response_headers(&self) -> &Headers {
        &self.maps[RESPONSE_HEADERS].headers
    }

    /// The response's trailers.
    pub fn response_trailers(&self) -> &Headers {
        &self.maps[RESPONSE_TRAILERS].headers
    }

    /// What the guest let pass of the request's body.
    pub fn request_body(&self) -> &[u8] {
        &self.bodies[0]
    }

    /// What the guest let pass of the response's body.
    pub fn response_body(&self) -> &[u8] {
        &self.bodies[1]
    }

    /// Whether the request is held now.
    pub fn request_action(&self) -> Action {
        self.actions[0]
    }

    /// Whether the response is held now.
    pub fn response_action(&self) -> Action {
        self.actions[1]
    }

    /// The local reply, if one was sent.
    pub fn reply(&self) -> Option<&LocalReply> {
        self.reply.as_ref()
    }

    /// Whether the guest reset the stream. The test then closes it.
    pub fn is_reset(&self) -> bool {
        self.reset
    }

    /// How often the route was to be chosen anew.
    pub fn route_cache_clears(&self) -> u32 {
        self.route_cache_clears
    }

    /// The properties that the guest set, in order.
    pub fn written_properties(&self) -> &[(String, Vec<u8>)] {
        &self.written_properties
    }

    /// The arguments of `set_envoy_filter_state`, in order.
    pub fn filter_states(&self) -> &[Vec<u8>] {
        &self.filter_states
    }

    /// A map that the guest may read now.
    pub(crate) fn readable(&self, map: usize) -> Option<&Headers> {
        let found = self.maps.get(map)?;
        // The access log shows what there was, but no request trailers.
        let logged = self.logging && map != REQUEST_TRAILERS && found.received;
        (logged || found.live && !self.logging).then_some(&found.headers)
    }

    /// A map that the guest may change now.
    pub(crate) fn writable(&mut self, map: usize) -> Result<&mut Headers, Status> {
        self.maps.get_mut(map).filter(|map| map.live).map(|map| &mut map.headers).ok_or(Status::BadArgument)
    }

    /// What a resumption does at once, whichever way is resumed.
    pub(crate) fn forget_request(&mut self) {
        self.maps[REQUEST_HEADERS].live = false;
        self.maps[REQUEST_TRAILERS].live = false;
        self.chunks[0] = None;
    }
}

/// Whether Envoy takes a request for one of gRPC.
fn is_grpc(headers: &Headers) -> bool {
    let content_type = headers.get("content-type").unwrap_or_default();
    let of_grpc = content_type.strip_prefix(b"application/grpc");
    headers.get(":path").is_some() && of_grpc.is_some_and(|rest| rest.is_empty() || rest[0] == b'+')
}

impl LocalReply {
    /// The response that Envoy makes of it, and its body.
    fn respond(&self, stream: &Stream) -> (Headers, Vec<u8>) {
        let mut headers = Headers::default();
        headers.add(b":status", if stream.grpc { "200".to_owned() } else { self.status.to_string() });
        for (name, value) in self.headers.iter() {
            headers.add(name.as_bytes(), value);
        }
        headers.remove(b"content-length");
        if stream.grpc {
            headers.replace(b"content-type", "application/grpc");
            if headers.get("grpc-status").is_none() {
                let status = self.grpc_status.unwrap_or_else(|| grpc_status(self.status));
                headers.add(b"grpc-status", status.to_string());
            }
            if !self.body.is_empty() && !stream.head {
                headers.add(b"grpc-message", percent_encode(&self.body));
            }
            return (headers, Vec::new());
        }
        if self.body.is_empty() {
            headers.remove(b"content-type");
        } else {
            headers.add(b"content-length", self.body.len().to_string());
            if headers.get("content-type").is_none() {
                headers.add(b"content-type", "text/plain");
            }
        }
        (headers, if stream.head { Vec::new() } else { self.body.clone() })
    }
}

/// The gRPC status that goes with an HTTP status.
fn grpc_status(status: u32) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

fn percent_encode(text: &[u8]) -> String {
    let encode = |byte: &u8| match byte {
        b'%' | ..b' ' | b'~'.. => format!("%{byte:02X}"),
        _ => char::from(*byte).to_string(),
    };
    text.iter().map(encode).collect()
}

impl Vm {
    /// Opens a stream. The guest learns of it with its first callback, as in
    /// Envoy.
    ///
    /// # Panics
    /// When the root context has been stopped.
    pub fn open_stream(&mut self, root: RootId) -> StreamId {
        let state = self.store.data().roots.get(&root.0);
        assert!(state.is_some_and(|state| !state.stopped), "the root context was stopped");
        let id = self.new_context();
        self.store.data_mut().streams.insert(id, Stream::new(root));
        StreamId(id)
    }

    /// Sets a property of a stream. The parts of its path are joined by dots.
    pub fn set_property(&mut self, stream: StreamId, path: &str, value: impl AsRef<[u8]>) {
        self.stream_mut(stream).properties.insert(path.to_owned(), value.as_ref().to_vec());
    }

    /// The state of an open stream.
    ///
    /// # Panics
    /// When it is closed.
    pub fn stream(&self, stream: StreamId) -> &Stream {
        self.store.data().streams.get(&stream.0).expect("the stream is open")
    }

    fn stream_mut(&mut self, stream: StreamId) -> &mut Stream {
        self.store.data_mut().streams.get_mut(&stream.0).expect("the stream is open")
    }

    /// Shows the guest the request's headers.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn request_headers<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        &mut self,
        stream: StreamId,
        headers: &[(N, V)],
        end_of_stream: bool,
    ) -> Result<Action, Trap> {
        self.create(stream)?;
        let headers = Headers::new(headers);
        let state = self.stream_mut(stream);
        state.grpc = is_grpc(&headers);
        state.head = headers.get(":method") == Some(b"HEAD");
        self.show_map(stream, REQUEST_HEADERS, headers, Some(end_of_stream))
    }

    /// Shows the guest a part of the request's body.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn request_body(
        &mut self,
        stream: StreamId,
        body: impl AsRef<[u8]>,
        end_of_stream: bool,
    ) -> Result<Action, Trap> {
        self.show_body(stream, Direction::Request, body.as_ref(), end_of_stream)
    }

    /// Shows the guest the request's trailers.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn request_trailers<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        &mut self,
        stream: StreamId,
        trailers: &[(N, V)],
    ) -> Result<Action, Trap> {
        self.show_map(stream, REQUEST_TRAILERS, Headers::new(trailers), None)
    }

    /// Shows the guest the headers of the upstream's response.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn response_headers<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        &mut self,
        stream: StreamId,
        headers: &[(N, V)],
        end_of_stream: bool,
    ) -> Result<Action, Trap> {
        self.show_map(stream, RESPONSE_HEADERS, Headers::new(headers), Some(end_of_stream))
    }

    /// Shows the guest a part of the response's body.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn response_body(
        &mut self,
        stream: StreamId,
        body: impl AsRef<[u8]>,
        end_of_stream: bool,
    ) -> Result<Action, Trap> {
        self.show_body(stream, Direction::Response, body.as_ref(), end_of_stream)
    }

    /// Shows the guest the trailers of the upstream's response.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn response_trailers<N: AsRef<[u8]>, V: AsRef<[u8]>>(
        &mut self,
        stream: StreamId,
        trailers: &[(N, V)],
    ) -> Result<Action, Trap> {
        self.show_map(stream, RESPONSE_TRAILERS, Headers::new(trailers), None)
    }

    /// Ends a stream, complete or not: the access log, then the end, then the
    /// deletion. Gives the state in which it ended. The last stream of a root
    /// context that was stopped takes it along.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn close(&mut self, stream: StreamId) -> Result<Stream, Trap> {
        self.create(stream)?;
        self.stream_mut(stream).logging = true;
        self.callback("proxy_on_log", stream.0, &[])?;
        self.stream_mut(stream).logging = false;
        self.callback("proxy_on_done", stream.0, &[])?;
        self.callback("proxy_on_delete", stream.0, &[])?;
        let state = self.store.data_mut().streams.remove(&stream.0).expect("the stream is open");
        self.end_root(state.root)?;
        Ok(state)
    }

    fn create(&mut self, stream: StreamId) -> Result<(), Trap> {
        let state = self.stream_mut(stream);
        if !std::mem::replace(&mut state.created, true) {
            let root = state.root;
            self.callback("proxy_on_context_create", stream.0, &[root.0])?;
        }
        Ok(())
    }

    fn show_map(
        &mut self,
        stream: StreamId,
        map: usize,
        headers: Headers,
        end_of_stream: Option<bool>,
    ) -> Result<Action, Trap> {
        let (callback, direction) = match map {
            REQUEST_HEADERS => ("proxy_on_request_headers", Direction::Request),
            REQUEST_TRAILERS => ("proxy_on_request_trailers", Direction::Request),
            RESPONSE_HEADERS => ("proxy_on_response_headers", Direction::Response),
            _ => ("proxy_on_response_trailers", Direction::Response),
        };
        let count = u32::try_from(headers.len()).expect("few headers");
        let arguments: Vec<u32> = std::iter::once(count).chain(end_of_stream.map(u32::from)).collect();
        self.stream_mut(stream).maps[map] = Map { headers, received: true, live: true };
        self.filter(stream, direction, callback, &arguments, |stream, action| {
            if action == Action::Continue {
                stream.maps[map].live = false;
            }
        })
    }

    fn show_body(
        &mut self,
        stream: StreamId,
        direction: Direction,
        body: &[u8],
        end_of_stream: bool,
    ) -> Result<Action, Trap> {
        let callback = match direction {
            Direction::Request => "proxy_on_request_body",
            Direction::Response => "proxy_on_response_body",
        };
        let arguments = [u32::try_from(body.len()).expect("a body below 4 GiB"), u32::from(end_of_stream)];
        self.stream_mut(stream).chunks[direction as usize] = Some(body.to_vec());
        self.filter(stream, direction, callback, &arguments, |stream, action| {
            if let Some(chunk) = stream.chunks[direction as usize].take_if(|_| action == Action::Continue) {
                stream.bodies[direction as usize].extend(chunk);
            }
        })
    }

    /// Runs a callback that may hold the stream: its own result first, then
    /// what it asked for. The action is what both come to.
    fn filter(
        &mut self,
        stream: StreamId,
        direction: Direction,
        callback: &'static str,
        arguments: &[u32],
        apply: impl FnOnce(&mut Stream, Action),
    ) -> Result<Action, Trap> {
        let result = self.enter(callback, stream.0, arguments)?;
        let stop = std::mem::take(&mut self.store.data_mut().stop_iteration);
        let action = if stop || result.unwrap_or(0) != 0 { Action::Pause } else { Action::Continue };
        let state = self.stream_mut(stream);
        state.actions[direction as usize] = action;
        apply(state, action);
        self.settle()?;
        Ok(self.stream(stream).actions[direction as usize])
    }

    /// Does what the last callback asked for to happen after it.
    pub(crate) fn settle(&mut self) -> Result<(), Trap> {
        while let Some(deferred) = self.store.data_mut().deferred.pop_front() {
            let streams = &mut self.store.data_mut().streams;
            match deferred {
                Deferred::Continue(id, direction) => {
                    if let Some(stream) = streams.get_mut(&id).filter(|stream| stream.reply.is_none()) {
                        stream.actions[direction as usize] = Action::Continue;
                    }
                }
                Deferred::Reset(id) => {
                    if let Some(stream) = streams.get_mut(&id) {
                        stream.reset = true;
                    }
                }
                Deferred::Reply(id, reply) if streams.contains_key(&id) => self.reply(StreamId(id), reply)?,
                Deferred::Reply(..) => {}
                Deferred::Delete(root) => self.delete_root(root)?,
            }
        }
        Ok(())
    }

    /// Answers in the upstream's place. The reply passes the filter as any
    /// response does, unless the filter has a response already.
    fn reply(&mut self, stream: StreamId, reply: LocalReply) -> Result<(), Trap> {
        let state = self.stream_mut(stream);
        if state.reset || state.reply.is_some() {
            return Ok(()); // One stream, one reply.
        }
        let response = &state.maps[RESPONSE_HEADERS];
        if response.received && !response.live {
            state.reset = true; // Half of another response is with the client.
            return Ok(());
        }
        let passes_the_filter = !response.received;
        let (headers, body) = reply.respond(state);
        state.actions[0] = Action::Pause;
        state.reply = Some(reply);
        if passes_the_filter {
            self.show_map(stream, RESPONSE_HEADERS, headers, Some(body.is_empty()))?;
            if !body.is_empty() {
                self.show_body(stream, Direction::Response, &body, true)?;
            }
        } else {
            state.maps[RESPONSE_HEADERS].headers = headers;
            state.maps[RESPONSE_HEADERS].live = false;
            state.bodies[1] = body;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_message_is_percent_encoded() {
        assert_eq!(percent_encode("50% é~\n".as_bytes()), "50%25 %C3%A9%7E%0A");
    }

    #[test]
    fn a_local_reply_suits_the_request() {
        let mut stream = Stream::new(RootId(1));
        let reply = LocalReply {
            status: 429,
            details: String::new(),
            headers: Headers::new(&[("retry-after", "1")]),
            body: b"slow down".to_vec(),
            grpc_status: None,
        };
        let expected: &[(&str, &str)] =
            &[(":status", "429"), ("retry-after", "1"), ("content-length", "9"), ("content-type", "text/plain")];
        assert_eq!(reply.respond(&stream), (Headers::new(expected), b"slow down".to_vec()));
        stream.head = true;
        assert_eq!(reply.respond(&stream), (Headers::new(expected), Vec::new()));

        stream.head = false;
        stream.grpc = true;
        let expected = [
            (":status", "200"),
            ("retry-after", "1"),
            ("content-type", "application/grpc"),
            ("grpc-status", "14"),
            ("grpc-message", "slow down"),
        ];
        assert_eq!(reply.respond(&stream), (Headers::new(&expected), Vec::new()));
    }

    #[test]
    fn a_request_of_grpc_is_known_by_its_content_type() {
        let of = |content_type| is_grpc(&Headers::new(&[(":path", "/"), ("content-type", content_type)]));
        assert!(of("application/grpc") && of("application/grpc+proto"));
        assert!(!of("application/grpc-web") && !of("text/plain"));
    }
}
