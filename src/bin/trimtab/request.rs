//! A request as it is written on a command line.

use clap::Args;
use std::borrow::Cow;
use trimtab::host::sim::Sim;
use trimtab::http::encode_headers;

/// A request, and what the proxy knows of it.
#[derive(Args)]
pub(crate) struct RequestArgs {
    /// Method and target; GET where there is no method
    #[arg(long = "request", short = 'r', value_name = "REQUEST", value_parser = RequestLine::parse)]
    pub(crate) line: RequestLine,

    /// A header of the request; may be repeated
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE", value_parser = Header::parse)]
    headers: Vec<Header>,

    /// The request's authority, or host
    #[arg(long, value_parser = field_value)]
    authority: Option<String>,

    /// The request's scheme
    #[arg(long, default_value = "http", value_parser = ["http", "https"])]
    scheme: String,

    /// An attribute of the proxy, such as source.address or xds.route_name; may be repeated
    #[arg(long = "property", value_name = "PATH=VALUE", value_parser = Property::parse)]
    properties: Vec<Property>,
}

impl RequestArgs {
    /// The headers, serialised as the proxy hands them over, with `fill` done to the target and to every value. Like the
    /// proxy, takes a `host` header for the authority.
    pub(crate) fn block<'a>(&'a self, fill: impl Fn(&'a str) -> Cow<'a, str>) -> Vec<u8> {
        let host = self.headers.iter().find(|header| header.name == "host").map(|header| header.value.as_str());
        let mut all = vec![
            (":method", Cow::Borrowed(&*self.line.method)),
            (":path", fill(&self.line.target)),
            (":scheme", Cow::Borrowed(&*self.scheme)),
        ];
        all.extend(self.authority.as_deref().or(host).map(|authority| (":authority", fill(authority))));
        let plain = self.headers.iter().filter(|header| header.name != "host");
        all.extend(plain.map(|header| (header.name.as_str(), fill(&header.value))));
        let all: Vec<(&str, &str)> = all.iter().map(|(name, value)| (*name, &**value)).collect();
        encode_headers(&all)
    }

    /// Lets `host` know the attributes.
    pub(crate) fn show_properties(&self, host: &Sim) {
        for property in &self.properties {
            host.set_property(&property.path, property.value.as_bytes());
        }
    }
}

/// `GET /users/42`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestLine {
    pub(crate) method: String,
    pub(crate) target: String,
}

/// `x-user-id: ann`, the name in lower case, as the proxy has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    name: String,
    value: String,
}

/// `xds.route_name=default`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Property {
    path: String,
    value: String,
}

impl RequestLine {
    /// Reads a method and a target; the method may be left out.
    fn parse(text: &str) -> Result<RequestLine, String> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let (method, target) = match words.as_slice() {
            [target] => ("GET", *target),
            [method, target] => (*method, *target),
            _ => return Err("write a method and a target, such as 'GET /users/42'".into()),
        };
        if !is_token(method) {
            return Err(format!("{method:?} is no method"));
        }
        if !(target.starts_with('/') || target == "*") || target.chars().any(char::is_control) {
            return Err(format!("the target {target:?} does not start with /"));
        }
        Ok(RequestLine { method: method.into(), target: target.into() })
    }
}

impl Header {
    fn parse(text: &str) -> Result<Header, String> {
        if text.starts_with(':') {
            return Err("name pseudo-headers with --request, --authority and --scheme".into());
        }
        let (name, value) = text.split_once(':').ok_or("no colon; write 'name: value'")?;
        if !is_token(name) {
            return Err(format!("{name:?} is no header name"));
        }
        Ok(Header { name: name.to_ascii_lowercase(), value: field_value(value)? })
    }
}

impl Property {
    fn parse(text: &str) -> Result<Property, String> {
        let (path, value) = text.split_once('=').ok_or("no equals sign; write path=value")?;
        if path.split('.').any(str::is_empty) {
            return Err(format!("{path:?} is no path such as source.address"));
        }
        Ok(Property { path: path.into(), value: value.into() })
    }
}

/// The value of a header without the space around it (RFC 9110, section 5.5).
fn field_value(text: &str) -> Result<String, String> {
    let value = text.trim_matches([' ', '\t']);
    if value.chars().any(|c| c.is_control() && c != '\t') {
        return Err("a control character, which no header can carry".into());
    }
    Ok(value.into())
}

/// A token (RFC 9110, section 5.6.2).
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_line_has_a_target_and_perhaps_a_method() {
        let parsed = |text| RequestLine::parse(text).map(|line| format!("{} {}", line.method, line.target));
        assert_eq!(parsed("/a?b=c").as_deref(), Ok("GET /a?b=c"));
        assert_eq!(parsed(" POST  /a ").as_deref(), Ok("POST /a"));
        assert_eq!(parsed("OPTIONS *").as_deref(), Ok("OPTIONS *"));
        for bad in ["", "GET", "GET / HTTP/1.1", "http://a/", "G[T /"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_header_has_a_name_and_perhaps_a_value() {
        let parsed = |text| Header::parse(text).map(|header| format!("{}={}", header.name, header.value));
        assert_eq!(parsed("X-A:b: c ").as_deref(), Ok("x-a=b: c"));
        assert_eq!(parsed("x-a:").as_deref(), Ok("x-a="));
        for bad in ["", "x", ":path: /", "a b: c", ": c", "a: b\r\nc: d"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
