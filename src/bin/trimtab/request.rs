//! A request as it is written on a command line.

use trimtab::http::encode_headers;

/// `GET /users/42`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestLine {
    pub(crate) method: String,
    pub(crate) target: String,
}

/// `x-user-id: ann`, the name in lower case, as the proxy has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) name: String,
    pub(crate) value: String,
}

/// `xds.route_name=default`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Property {
    pub(crate) path: String,
    pub(crate) value: String,
}

impl RequestLine {
    /// Reads a method and a target; the method may be left out.
    pub(crate) fn parse(text: &str) -> Result<RequestLine, String> {
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
    pub(crate) fn parse(text: &str) -> Result<Header, String> {
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
    pub(crate) fn parse(text: &str) -> Result<Property, String> {
        let (path, value) = text.split_once('=').ok_or("no equals sign; write path=value")?;
        if path.split('.').any(str::is_empty) {
            return Err(format!("{path:?} is no path such as source.address"));
        }
        Ok(Property { path: path.into(), value: value.into() })
    }
}

/// The value of a header without the space around it (RFC 9110, section 5.5).
pub(crate) fn field_value(text: &str) -> Result<String, String> {
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

/// A request's headers, serialised as the proxy hands them over. Like the proxy, takes a `host` header for the
/// authority.
pub(crate) fn block(line: &RequestLine, scheme: &str, authority: Option<&str>, headers: &[Header]) -> Vec<u8> {
    let host = headers.iter().find(|header| header.name == "host").map(|header| header.value.as_str());
    let mut all = vec![(":method", line.method.as_str()), (":path", &line.target), (":scheme", scheme)];
    all.extend(authority.or(host).map(|authority| (":authority", authority)));
    let plain = headers.iter().filter(|header| header.name != "host");
    all.extend(plain.map(|header| (header.name.as_str(), header.value.as_str())));
    encode_headers(&all)
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
