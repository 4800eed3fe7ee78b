//! A request as a test writes it and a response as a test reads it.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use hyper::body::{Frame, SizeHint};
use serde_json::Value;

/// A request under construction. Headers are sent as written: duplicates,
/// empty values and bytes that are not UTF-8 included.
#[derive(Debug, Clone)]
pub struct Request {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) authority: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Request {
    /// A request for `path` (which may have a query), to the authority
    /// `user-service`.
    ///
    /// # Panics
    /// When `method` is no token.
    pub fn new(method: &str, path: &str) -> Self {
        Self {
            method: Method::from_bytes(method.as_bytes()).expect("a method is a token"),
            path: path.to_owned(),
            authority: "user-service".to_owned(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            trailers: None,
        }
    }

    /// A GET.
    pub fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    /// A POST.
    pub fn post(path: &str, body: impl Into<Bytes>) -> Self {
        Self::new("POST", path).body(body)
    }

    /// A unary gRPC call with an empty message: `method` is
    /// `/package.Service/Method`. For a client of HTTP/2.
    pub fn grpc(method: &str) -> Self {
        Self::post(method, &EMPTY_GRPC_MESSAGE[..]).header("content-type", "application/grpc").header("te", "trailers")
    }

    /// Adds a header; a second one of the same name stands beside the first.
    ///
    /// # Panics
    /// When HTTP cannot express the name or the value. [`crate::raw`] can.
    #[must_use]
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        append(&mut self.headers, name, value.as_ref());
        self
    }

    /// Adds a trailer.
    ///
    /// # Panics
    /// As [`header`](Self::header).
    #[must_use]
    pub fn trailer(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        append(self.trailers.get_or_insert_default(), name, value.as_ref());
        self
    }

    /// Sets the body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// Sets the authority (HTTP/1.1: the `host` header).
    #[must_use]
    pub fn authority(mut self, authority: &str) -> Self {
        authority.clone_into(&mut self.authority);
        self
    }
}

/// The whole of a response.
#[derive(Clone)]
pub struct Response {
    /// What was asked, for messages: `GET /users/7`.
    pub request: String,
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, to its end.
    pub body: Bytes,
    /// The trailers, if there were any.
    pub trailers: Option<HeaderMap>,
    /// From just before the request was sent to the end of the response.
    pub elapsed: Duration,
}

impl Response {
    /// The first value of a header, if there is one and it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The first value of a trailer, if there is one and it is text.
    pub fn trailer(&self, name: &str) -> Option<&str> {
        self.trailers.as_ref()?.get(name)?.to_str().ok()
    }

    /// gRPC's status, from the trailers or (trailers-only) from the headers.
    pub fn grpc_status(&self) -> Option<&str> {
        self.trailer("grpc-status").or_else(|| self.header("grpc-status"))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("the body is no JSON ({error}): {self:?}"))
    }

    /// The version of the [`crate::Upstream`] that answered; `""` if none did.
    pub fn version(&self) -> &str {
        self.header("x-upstream-version").unwrap_or_default()
    }

    /// The first value of a request header as it reached the upstream,
    /// from its echo.
    pub fn echoed(&self, name: &str) -> Option<String> {
        self.json()["headers"]
            .as_array()?
            .iter()
            .find_map(|pair| (pair[0] == name).then(|| pair[1].as_str().unwrap_or_default().to_owned()))
    }
}

impl std::fmt::Debug for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} -> {} in {:?}, headers {:?}, trailers {:?}, body {:?}",
            self.request,
            self.status,
            self.elapsed,
            self.headers,
            self.trailers,
            self.text()
        )
    }
}

/// A body that is there at once, and its trailers. Only without trailers does
/// it have a known length, which over HTTP/1.1 would leave no room for them.
#[derive(Debug)]
pub(crate) struct Body {
    data: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl Body {
    pub(crate) fn new(data: Bytes, trailers: Option<HeaderMap>) -> Self {
        Self { data: Some(data).filter(|data| !data.is_empty()), trailers }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = self.data.take().map(Frame::data);
        let frame = data.or_else(|| self.trailers.take().map(Frame::trailers));
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.trailers {
            Some(_) => SizeHint::default(),
            None => SizeHint::with_exact(self.data.as_ref().map_or(0, Bytes::len) as u64),
        }
    }
}

/// A gRPC frame: not compressed, length 0.
pub(crate) const EMPTY_GRPC_MESSAGE: [u8; 5] = [0; 5];

/// Appends a header given as a test writes it.
pub(crate) fn append(headers: &mut HeaderMap, name: &str, value: &[u8]) {
    let key = HeaderName::from_bytes(name.as_bytes()).unwrap_or_else(|_| panic!("{name:?} is no header name"));
    let value =
        HeaderValue::from_bytes(value).unwrap_or_else(|_| panic!("{value:?} is no header value (header {name})"));
    headers.append(key, value);
}
