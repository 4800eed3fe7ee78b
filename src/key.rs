//! The keys that cohorts and limits are computed from, and the parts of a request that they are taken from.
//!
//! A key has one spelling, so that a client cannot have several cohorts or allowances by writing one key in several ways:
//!
//! - Query parameters, path segments and the values of cookies are percent-decoded, as Envoy decodes them (`decode`).
//! - Of a header that is sent several times, the first value is the key, as in Envoy's rate limit filter. An application
//!   that reads the last of several values can still be evaded.
//! - An empty value counts as absent.

use crate::address::Address;
use crate::document::Value;
use crate::host::Properties;
use crate::http::{HeaderId, HeaderNames, Request};
use crate::matcher::read_header_name;
use std::borrow::Cow;

/// One part of a request that a key is taken from.
#[derive(Debug)]
pub enum KeySource {
    /// The first value of a header.
    Header(HeaderId),
    /// The value of the first cookie with this name, percent-decoded.
    Cookie(Box<str>),
    /// The first value of the query parameter with this name. Names and values are percent-decoded.
    QueryParameter(Box<str>),
    /// The segment of the path with this index, counted from 0, percent-decoded.
    PathSegment(usize),
    /// The client's address without its port, as Envoy determined it from its trusted hops.
    SourceAddress,
    /// The client's address, or a network that contains it.
    Network(Network),
    /// The name of the policy's route.
    Route,
    /// An attribute of Envoy, such as a JWT claim or the peer's identity.
    Property(Box<[Box<str>]>),
    /// The subset of the destination that was chosen.
    Subset,
}

/// Where a client's address is taken from, and how many of its bits form the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The number of proxies in front of this one whose entries in X-Forwarded-For are trusted, as in Envoy's
    /// `xff_num_trusted_hops`. With `None` the header is ignored.
    trusted_hops: Option<usize>,
    forwarded_for: HeaderId,
    v4_prefix: u32,
    v6_prefix: u32,
}

/// The request that keys are taken from, and what has been decided about it.
#[derive(Clone, Copy)]
pub struct KeyContext<'r, 'a> {
    /// The request with its headers.
    pub request: &'r Request<'a>,
    /// The name of the policy's route.
    pub route: &'a str,
    /// The subset of the destination; `None` before the destination is chosen.
    pub subset: Option<&'a str>,
    /// The proxy's attributes of the request.
    pub properties: &'r dyn Properties,
}

impl KeySource {
    /// The key that a request has here. `None` if this part of the request is absent or empty.
    pub fn extract<'a>(&self, context: &KeyContext<'_, 'a>) -> Option<Cow<'a, [u8]>> {
        if let KeySource::Header(id) = self {
            return context.request.first(*id).filter(|key| !key.is_empty()).map(Cow::Borrowed);
        }
        self.extract_other(context).filter(|key| !key.is_empty())
    }

    /// The key from another part than a header. It is a function of its own to keep the case of a header short.
    #[inline(never)]
    fn extract_other<'a>(&self, context: &KeyContext<'_, 'a>) -> Option<Cow<'a, [u8]>> {
        let KeyContext { request, route, subset, properties } = *context;
        match self {
            KeySource::Header(id) => request.first(*id).map(Cow::Borrowed),
            KeySource::Cookie(name) => request.cookie(name.as_bytes()).map(decode),
            KeySource::QueryParameter(name) => {
                let is_it = |parameter: &(&[u8], &[u8])| *decode(parameter.0) == *name.as_bytes();
                request.query_parameters().find(is_it).map(|(_, value)| decode(value))
            }
            KeySource::PathSegment(index) => request.path_segment(*index).map(decode),
            KeySource::SourceAddress => peer(properties).map(Cow::Owned),
            KeySource::Network(network) => {
                network.find(request, properties).map(|network| Cow::Owned(network.into_bytes()))
            }
            KeySource::Route => Some(Cow::Borrowed(route.as_bytes())),
            KeySource::Property(path) => {
                let path: Vec<&str> = path.iter().map(|segment| &**segment).collect();
                properties.property(&path).map(Cow::Owned)
            }
            KeySource::Subset => subset.map(|subset| Cow::Borrowed(subset.as_bytes())),
        }
    }

    /// A description of the source for people, such as "header x-user-id".
    pub fn describe(&self, names: &HeaderNames) -> String {
        match self {
            KeySource::Header(HeaderNames::METHOD) => "method".into(),
            KeySource::Header(id) => format!("header {}", names.name(*id)),
            KeySource::Cookie(name) => format!("cookie {name}"),
            KeySource::QueryParameter(name) => format!("query parameter {name}"),
            KeySource::PathSegment(index) => format!("path segment {index}"),
            KeySource::SourceAddress => "source address".into(),
            KeySource::Network(Network { trusted_hops: None, .. }) => "source network".into(),
            KeySource::Network(_) => "forwarded source network".into(),
            KeySource::Route => "route".into(),
            KeySource::Property(path) => format!("property {}", path.join(".")),
            KeySource::Subset => "subset".into(),
        }
    }

    /// Reads a list of sources such as `[{cookie: session}, {sourceAddress: {}}]`. `is_for_cohort` is true if the key
    /// determines the subset, so that it cannot depend on the subset.
    pub fn read_list(value: &Value<'_>, is_for_cohort: bool, names: &mut HeaderNames) -> Vec<KeySource> {
        const MOST: usize = 8;
        let sources = value.array().unwrap_or_default();
        if sources.is_empty() || sources.len() > MOST {
            value.error(format!("{} sources", sources.len()), format!("write 1 to {MOST} sources, or no key at all"));
        }
        sources.iter().take(MOST).filter_map(|source| KeySource::read(source, is_for_cohort, names)).collect()
    }

    fn read(value: &Value<'_>, is_for_cohort: bool, names: &mut HeaderNames) -> Option<KeySource> {
        const KINDS: [&str; 9] =
            ["header", "cookie", "queryParam", "pathSegment", "sourceAddress", "method", "route", "property", "subset"];
        let mut fields = value.object()?;
        let found: Vec<(&str, Value<'_>)> =
            KINDS.iter().filter_map(|kind| fields.optional(kind).map(|value| (*kind, value))).collect();
        fields.end();
        let [(kind, source)] = found.as_slice() else {
            value.error(
                format!("{} sources in one entry", found.len()),
                "write one source in each entry, such as {header: x-user-id}",
            );
            return None;
        };
        match *kind {
            "header" => read_header_name(source, source.text()?, names).map(KeySource::Header),
            "cookie" => source.text().map(|name| KeySource::Cookie(name.into())),
            "queryParam" => source.text().map(|name| KeySource::QueryParameter(name.into())),
            "pathSegment" => source.integer(0..=63).map(|index| KeySource::PathSegment(index as usize)),
            "sourceAddress" => read_source_address(source, names),
            "property" => read_property(source),
            kind => {
                source.object()?.end();
                match kind {
                    "method" => Some(KeySource::Header(HeaderNames::METHOD)),
                    "route" => Some(KeySource::Route),
                    _ if is_for_cohort => {
                        source.error("the cohort decides on the subset", "take the key from the request");
                        None
                    }
                    _ => Some(KeySource::Subset),
                }
            }
        }
    }
}

impl Network {
    /// Whether the key omits a part of the address.
    pub fn masks(&self) -> bool {
        self.v4_prefix < 32 || self.v6_prefix < 128
    }

    /// The network of the address that the outermost trusted proxy has written. If there is no such address, the network
    /// of the connection's peer: the client can forge the entries further left in X-Forwarded-For.
    fn find(&self, request: &Request<'_>, properties: &dyn Properties) -> Option<String> {
        let forwarded = || {
            let entries = request.joined(self.forwarded_for)?;
            let entry = entries.rsplit(|byte| *byte == b',').nth(self.trusted_hops?)?;
            Address::parse(entry.trim_ascii())
        };
        let address = forwarded().or_else(|| Address::parse(&peer(properties)?))?;
        Some(address.network(self.v4_prefix, self.v6_prefix))
    }
}

/// The percent-decoded `text`. Like Envoy's `PercentEncoding::decode`, it keeps a `%` that two hexadecimal digits do not
/// follow, and a `+`.
fn decode(text: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr(b'%', text).is_some() { Cow::Owned(decode_escapes(text)) } else { Cow::Borrowed(text) }
}

#[cold]
#[inline(never)]
fn decode_escapes(mut text: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut decoded = Vec::with_capacity(text.len());
    while let Some((first, rest)) = text.split_first() {
        text = rest;
        if let (b'%', [high, low, after @ ..]) = (first, rest)
            && let (Some(high), Some(low)) = (digit(*high), digit(*low))
        {
            decoded.push((high << 4 | low) as u8);
            text = after;
        } else {
            decoded.push(*first);
        }
    }
    decoded
}

/// The address of the connection's peer without the port, as Envoy reports it.
fn peer(properties: &dyn Properties) -> Option<Vec<u8>> {
    let mut address = properties.property(&["source", "address"])?;
    let port = address.iter().rposition(|byte| *byte == b':')?;
    address.truncate(port);
    Some(address)
}

fn read_source_address(value: &Value<'_>, names: &mut HeaderNames) -> Option<KeySource> {
    let mut fields = value.object()?;
    let mut number = |field, range| fields.optional(field).map(|value| value.integer(range));
    let v4_prefix = number("v4PrefixMaskLen", 1..=32);
    let v6_prefix = number("v6PrefixMaskLen", 1..=128);
    let trusted_hops = number("xffNumTrustedHops", 0..=32);
    fields.end();
    if v4_prefix.is_none() && v6_prefix.is_none() && trusted_hops.is_none() {
        return Some(KeySource::SourceAddress);
    }
    Some(KeySource::Network(Network {
        trusted_hops: match trusted_hops {
            Some(hops) => Some(hops? as usize),
            None => None,
        },
        forwarded_for: read_header_name(value, "x-forwarded-for", names)?,
        v4_prefix: v4_prefix.unwrap_or(Some(32))? as u32,
        v6_prefix: v6_prefix.unwrap_or(Some(128))? as u32,
    }))
}

/// Reads the path of an attribute: a string such as "connection.requested_server_name", or a list of segments, which may
/// contain dots.
fn read_property(value: &Value<'_>) -> Option<KeySource> {
    let segments: Vec<Box<str>> = match value.as_string() {
        Some(path) => path.split('.').map(Box::from).collect(),
        None => value.array()?.iter().filter_map(|segment| segment.text().map(Box::from)).collect(),
    };
    if segments.is_empty() || segments.iter().any(|segment| segment.is_empty()) {
        value.unfit("expected an attribute's path, such as \"connection.requested_server_name\"");
        return None;
    }
    Some(KeySource::Property(segments.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;
    use crate::host::sim::Sim;
    use crate::http::encode_headers;

    #[test]
    fn each_source_finds_its_key() {
        let mut names = HeaderNames::default();
        let mut read = |text: &str| {
            let node = Node::from_json(text.as_bytes()).unwrap();
            let report = Report::default();
            let sources = KeySource::read_list(&Value::root(&node, &report), false, &mut names);
            assert_eq!(report.into_diagnostics(), []);
            sources
        };
        let mut sources = read(
            r#"[{"header": "X-User"}, {"cookie": "s"}, {"queryParam": "q"}, {"pathSegment": 1},
                {"sourceAddress": {}}, {"route": {}}, {"property": "a.b"}, {"property": ["a", "b"]}]"#,
        );
        sources.extend(read(r#"[{"method": {}}, {"subset": {}}, {"sourceAddress": {"v6PrefixMaskLen": 32}}]"#));
        let host = Sim::new(1);
        host.set_property("source.address", b"[2001:db8::1]:4711");
        host.set_property("a.b", b"claim");
        let block =
            encode_headers(&[("x-user", "ann"), ("cookie", "s=1"), (":path", "/users/42?q=z"), (":method", "PUT")]);
        let request = &Request::parse(&block, &names);
        let context = KeyContext { request, route: "default", subset: Some("v2"), properties: &host };
        let found: Vec<_> = sources
            .iter()
            .map(|source| String::from_utf8(source.extract(&context).unwrap().to_vec()).unwrap())
            .collect();
        let expected =
            ["ann", "1", "z", "42", "[2001:db8::1]", "default", "claim", "claim", "PUT", "v2", "2001:db8::/32"];
        assert_eq!(found, expected);
    }

    /// The sources of a key, and the names of the headers that they read.
    fn sources(text: &str) -> (Vec<KeySource>, HeaderNames) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let (report, mut names) = (Report::default(), HeaderNames::default());
        let sources = KeySource::read_list(&Value::root(&node, &report), false, &mut names);
        assert_eq!(report.into_diagnostics(), []);
        (sources, names)
    }

    /// The key from the first source that the request has.
    fn key(sources: &(Vec<KeySource>, HeaderNames), headers: &[(&str, &str)]) -> Option<String> {
        let host = Sim::new(1);
        let block = encode_headers(headers);
        let request = &Request::parse(&block, &sources.1);
        let context = KeyContext { request, route: "r", subset: None, properties: &host };
        let key = sources.0.iter().find_map(|source| source.extract(&context))?;
        Some(String::from_utf8_lossy(&key).into_owned())
    }

    #[test]
    fn percent_encoded_keys_have_one_spelling() {
        let sources = sources(r#"[{"queryParam": "key"}, {"cookie": "key"}, {"pathSegment": 1}]"#);
        for path in ["/?key=abc", "/?key=%61bc", "/?key=a%62c", "/?k%65y=abc", "/?x=1&%6b%65%79=ab%63#f", "/u/a%62c"] {
            assert_eq!(key(&sources, &[(":path", path)]).as_deref(), Some("abc"), "{path}");
        }
        for (sent, expected) in [("ann%40example.com", "ann@example.com"), ("\"a%3bb\"", "a;b"), ("a+b", "a+b")] {
            let cookie = format!("other=1; key={sent}");
            assert_eq!(key(&sources, &[(":path", "/"), ("cookie", &cookie)]).as_deref(), Some(expected));
        }
        // What is not an escape is kept, as Envoy keeps it.
        for text in ["%", "%4", "%zz", "100%", "%+1", "a%%"] {
            let path = format!("/?key={text}");
            assert_eq!(key(&sources, &[(":path", &path)]).as_deref(), Some(text));
        }
        assert_eq!(key(&sources, &[(":path", "/?key=%2561")]).as_deref(), Some("%61"), "decoded once");
    }

    #[test]
    fn the_first_value_of_a_repeated_header_is_the_key() {
        let sources = sources(r#"[{"header": "x-api-key"}]"#);
        for headers in [&[("x-api-key", "abc")][..], &[("x-api-key", "abc"), ("x-api-key", "n")]] {
            assert_eq!(key(&sources, headers).as_deref(), Some("abc"), "{headers:?}");
        }
    }

    #[test]
    fn an_empty_value_is_absent() {
        let sources = sources(
            r#"[{"cookie": "k"}, {"queryParam": "k"}, {"header": "x-k"}, {"property": "a.b"}, {"method": {}}]"#,
        );
        for headers in [
            &[(":method", "PUT"), (":path", "/?k="), ("cookie", "k="), ("x-k", "")][..],
            &[(":method", "PUT"), (":path", "/?k"), ("cookie", "k=\"\"")],
        ] {
            assert_eq!(key(&sources, headers).as_deref(), Some("PUT"), "{headers:?}");
        }
    }

    #[test]
    fn a_forged_address_is_never_a_key() {
        let address = |trusted_hops, forwarded: &[&str], peer: &[u8]| {
            let text = format!(r#"[{{"sourceAddress": {{"xffNumTrustedHops": {trusted_hops}}}}}]"#);
            let node = Node::from_json(text.as_bytes()).unwrap();
            let report = Report::default();
            let mut names = HeaderNames::default();
            let sources = KeySource::read_list(&Value::root(&node, &report), false, &mut names);
            assert_eq!(report.into_diagnostics(), []);
            let host = Sim::new(1);
            host.set_property("source.address", peer);
            let headers: Vec<_> = forwarded.iter().map(|entry| ("x-forwarded-for", entry)).collect();
            let block = encode_headers(&headers);
            let request = &Request::parse(&block, &names);
            let key = sources[0].extract(&KeyContext { request, route: "", subset: None, properties: &host });
            key.map(|key| String::from_utf8(key.to_vec()).unwrap())
        };
        let peer = b"10.0.0.9:4711";
        for (trusted_hops, forwarded, expected) in [
            (0, &["6.6.6.6, 192.0.2.1"][..], "192.0.2.1"),
            (1, &["6.6.6.6, 192.0.2.1,10.0.0.1"], "192.0.2.1"),
            (1, &["6.6.6.6", "192.0.2.1", "10.0.0.1"], "192.0.2.1"),
            (1, &["[2001:DB8:0::1] ,\t10.0.0.1"], "2001:db8::1"),
            // Fewer entries than trusted hops, or entries that are not addresses: no trusted proxy has written them.
            (2, &["6.6.6.6, 192.0.2.1"], "10.0.0.9"),
            (1, &["6.6.6.6, unknown, 10.0.0.1"], "10.0.0.9"),
            (1, &["6.6.6.6, 192.0.2.1:80, 10.0.0.1"], "10.0.0.9"),
            (1, &["6.6.6.6,,10.0.0.1"], "10.0.0.9"),
            (0, &[""], "10.0.0.9"),
            (0, &[], "10.0.0.9"),
        ] {
            let found = address(trusted_hops, forwarded, peer);
            assert_eq!(found.as_deref(), Some(expected), "{trusted_hops} hops, {forwarded:?}");
        }
        for peer in [&b"/run/envoy.sock"[..], b"", b"somewhere:80"] {
            assert_eq!(address(0, &[], peer), None, "a peer without an address has no key");
        }
    }

    #[test]
    fn an_entry_has_one_source() {
        for bad in [
            "[]",
            "[{}]",
            r#"[{"header": "a", "cookie": "b"}]"#,
            r#"[{"pathSegment": -1}]"#,
            r#"[{"property": ""}]"#,
            r#"[{"sourceAddress": {"v4PrefixMaskLen": 33}}]"#,
            r#"[{"sourceAddress": {"xffNumTrustedHops": -1}}]"#,
        ] {
            let node = Node::from_json(bad.as_bytes()).unwrap();
            let report = Report::default();
            KeySource::read_list(&Value::root(&node, &report), false, &mut HeaderNames::default());
            assert!(report.errors() > 0, "{bad}");
        }
    }
}
