//! A request that can be sent, and shown as a line for the shell.

use std::net::SocketAddr;

use trimtab_testbed::Request;

/// A request to the service.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    pub(crate) grpc: bool,
}

impl Ask {
    /// A GET for the same user's profile as ever.
    pub(crate) fn get() -> Self {
        Self { path: "/users/7", headers: Vec::new(), grpc: false }
    }

    /// A call of a method of the same service, with an empty message.
    pub(crate) fn grpc() -> Self {
        Self { path: "/users.Users/Get", headers: Vec::new(), grpc: true }
    }

    #[must_use]
    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// The user who asks.
    #[must_use]
    pub(crate) fn user(self, id: impl Into<String>) -> Self {
        self.header("x-user-id", id)
    }

    pub(crate) fn request(&self, to: SocketAddr) -> Request {
        let request = if self.grpc { Request::grpc(self.path) } else { Request::get(self.path) };
        let request = request.authority(&to.to_string());
        self.headers.iter().fold(request, |request, (name, value)| request.header(name, value))
    }

    /// The words of a command that does the same.
    pub(crate) fn curl(&self, to: SocketAddr) -> Vec<String> {
        let url = format!("http://{to}{}", self.path);
        let headers = self.headers.iter().map(|(name, value)| format!("-H '{name}: {value}'"));
        if !self.grpc {
            return [format!("curl -i {url}")].into_iter().chain(headers).collect();
        }
        let message = [r"printf '\0\0\0\0\0' |".to_owned(), format!("curl -i --http2-prior-knowledge {url}")];
        let call = ["-H 'content-type: application/grpc'", "-H 'te: trailers'", "--data-binary @-"];
        message.into_iter().chain(headers).chain(call.map(str::to_owned)).collect()
    }
}
