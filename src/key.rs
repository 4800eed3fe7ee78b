//! What tells one client from another: where a cohort's and a limit's key come from.

use crate::document::Value;
use crate::host::Properties;
use crate::http::{HeaderId, HeaderNames, Request};
use crate::matcher::read_header_name;
use std::borrow::Cow;

/// One place to take a key from.
#[derive(Debug)]
pub enum KeySource {
    /// All values of a header, joined by commas.
    Header(HeaderId),
    Cookie(Box<str>),
    QueryParameter(Box<str>),
    /// Counted from 0.
    PathSegment(usize),
    /// The client's address without its port, as Envoy worked it out from its trusted hops.
    SourceAddress,
    /// The name of the policy's route.
    Route,
    /// An attribute of Envoy, such as a JWT claim or the peer's identity.
    Property(Box<[Box<str>]>),
}

impl KeySource {
    /// The key that `request` shows here, if any.
    pub fn find<'a>(
        &self,
        request: &Request<'a>,
        route: &'a str,
        properties: &dyn Properties,
    ) -> Option<Cow<'a, [u8]>> {
        match self {
            KeySource::Header(id) => request.joined(*id),
            KeySource::Cookie(name) => request.cookie(name.as_bytes()).map(Cow::Borrowed),
            KeySource::QueryParameter(name) => request.query_parameter(name.as_bytes()).map(Cow::Borrowed),
            KeySource::PathSegment(index) => request.path_segment(*index).map(Cow::Borrowed),
            KeySource::SourceAddress => {
                let mut address = properties.property(&["source", "address"])?;
                let port = address.iter().rposition(|byte| *byte == b':')?;
                address.truncate(port);
                Some(Cow::Owned(address))
            }
            KeySource::Route => Some(Cow::Borrowed(route.as_bytes())),
            KeySource::Property(path) => {
                let path: Vec<&str> = path.iter().map(|segment| &**segment).collect();
                properties.property(&path).map(Cow::Owned)
            }
        }
    }

    /// The source in words.
    pub fn describe(&self, names: &HeaderNames) -> String {
        match self {
            KeySource::Header(id) => format!("header {}", names.name(*id)),
            KeySource::Cookie(name) => format!("cookie {name}"),
            KeySource::QueryParameter(name) => format!("query parameter {name}"),
            KeySource::PathSegment(index) => format!("path segment {index}"),
            KeySource::SourceAddress => "source address".into(),
            KeySource::Route => "route".into(),
            KeySource::Property(path) => format!("property {}", path.join(".")),
        }
    }

    /// Reads a list of sources such as `[{cookie: session}, {sourceAddress: {}}]`.
    pub fn read_list(value: &Value<'_>, names: &mut HeaderNames) -> Vec<KeySource> {
        const MOST: usize = 8;
        let sources = value.array().unwrap_or_default();
        if sources.is_empty() || sources.len() > MOST {
            value.error(format!("{} sources", sources.len()), format!("write 1 to {MOST} sources, or no key at all"));
        }
        sources.iter().take(MOST).filter_map(|source| KeySource::read(source, names)).collect()
    }

    fn read(value: &Value<'_>, names: &mut HeaderNames) -> Option<KeySource> {
        let mut fields = value.object()?;
        let name = |value: Value<'_>| value.text().map(Box::<str>::from);
        let found: Vec<Option<KeySource>> = [
            fields.optional("header").map(|value| {
                let name = value.text()?;
                read_header_name(&value, name, names).map(KeySource::Header)
            }),
            fields.optional("cookie").map(|value| name(value).map(KeySource::Cookie)),
            fields.optional("queryParam").map(|value| name(value).map(KeySource::QueryParameter)),
            fields
                .optional("pathSegment")
                .map(|value| value.integer(0..=63).map(|index| KeySource::PathSegment(index as usize))),
            fields.optional("sourceAddress").map(|value| {
                value.object()?.end();
                Some(KeySource::SourceAddress)
            }),
            fields.optional("route").map(|value| {
                value.object()?.end();
                Some(KeySource::Route)
            }),
            fields.optional("property").map(|value| read_property(&value)),
        ]
        .into_iter()
        .flatten()
        .collect();
        fields.not_yet("subset");
        let value = fields.value().clone();
        fields.end();
        if found.len() != 1 {
            value.error(
                format!("{} sources in one entry", found.len()),
                "write one source in each entry, such as {header: x-user-id}",
            );
            return None;
        }
        found.into_iter().next().flatten()
    }
}

/// Reads the path of an attribute: "connection.requested_server_name", or a list where a segment holds a dot.
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
        let text = br#"[{"header": "X-User"}, {"cookie": "s"}, {"queryParam": "q"}, {"pathSegment": 1},
                        {"sourceAddress": {}}, {"route": {}}, {"property": "a.b"}, {"property": ["a", "b"]}]"#;
        let node = Node::from_json(text).unwrap();
        let report = Report::default();
        let mut names = HeaderNames::default();
        let sources = KeySource::read_list(&Value::root(&node, &report), &mut names);
        assert_eq!(report.into_diagnostics(), []);
        let host = Sim::new(1);
        host.set_property("source.address", b"[2001:db8::1]:4711");
        host.set_property("a.b", b"claim");
        let block = encode_headers(&[("x-user", "ann"), ("cookie", "s=1"), (":path", "/users/42?q=z")]);
        let request = Request::parse(&block, &names);
        let found: Vec<_> = sources
            .iter()
            .map(|source| String::from_utf8(source.find(&request, "default", &host).unwrap().to_vec()).unwrap())
            .collect();
        assert_eq!(found, ["ann", "1", "z", "42", "[2001:db8::1]", "default", "claim", "claim"]);
    }

    #[test]
    fn an_entry_has_one_source() {
        for bad in
            ["[]", "[{}]", r#"[{"header": "a", "cookie": "b"}]"#, r#"[{"pathSegment": -1}]"#, r#"[{"property": ""}]"#]
        {
            let node = Node::from_json(bad.as_bytes()).unwrap();
            let report = Report::default();
            KeySource::read_list(&Value::root(&node, &report), &mut HeaderNames::default());
            assert!(report.errors() > 0, "{bad}");
        }
    }
}
