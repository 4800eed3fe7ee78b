//! Which requests a route is for: Istio's `HTTPMatchRequest`, as far as a filter can honour it, and cookies and
//! Envoy's route name besides.
//!
//! A match is a list of conditions that must all hold; a route has a list of matches of which one must hold; the
//! first route wins. A condition is one subject and one test, whatever the field it was written in, so that one
//! function decides and the same function explains.

use crate::bytes::{begins_with, is_same};
use crate::document::{Fields, Value};
use crate::http::{HeaderId, HeaderNames, Request};
use regex_lite::{Regex, RegexBuilder};
use std::borrow::Cow;
use std::fmt;

/// The longest regular expression, in bytes, and the most memory that its program may take.
const MAX_REGEX_BYTES: usize = 1024;
const MAX_REGEX_PROGRAM: usize = 64 << 10;

/// The longest value that a regular expression is tried on: matching costs at most program times value.
pub const MAX_REGEX_INPUT: usize = 8 << 10;

/// Istio's `StringMatch`.
#[derive(Debug)]
pub enum StringMatch {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    /// RE2 syntax; the whole value has to match. Values that are not UTF-8, or longer than [`MAX_REGEX_INPUT`], do not.
    Regex(Box<Regex>),
    /// Any value, the empty one included.
    Present,
}

impl StringMatch {
    /// Whether `value` passes; ASCII letters fit in either case where the policy says so.
    pub fn matches(&self, value: &[u8], ignore_case: bool) -> bool {
        match self {
            StringMatch::Exact(exact) if ignore_case => value.eq_ignore_ascii_case(exact),
            StringMatch::Exact(exact) => is_same(value, exact),
            StringMatch::Prefix(prefix) if ignore_case => {
                value.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
            }
            StringMatch::Prefix(prefix) => begins_with(value, prefix),
            StringMatch::Regex(regex) => {
                value.len() <= MAX_REGEX_INPUT && std::str::from_utf8(value).is_ok_and(|text| regex.is_match(text))
            }
            StringMatch::Present => true,
        }
    }

    /// Reads `{exact: ..}`, `{prefix: ..}` or `{regex: ..}`; where `may_be_empty`, `{}` is presence.
    pub fn read(value: &Value<'_>, may_be_empty: bool) -> Option<StringMatch> {
        let mut fields = value.object()?;
        let exact = fields.optional("exact");
        let prefix = fields.optional("prefix");
        let regex = fields.optional("regex");
        fields.end();
        let literal = |text: &str| text.as_bytes().into();
        match (exact, prefix, regex) {
            (Some(exact), None, None) => exact.string().map(literal).map(StringMatch::Exact),
            (None, Some(prefix), None) => prefix.string().map(literal).map(StringMatch::Prefix),
            (None, None, Some(regex)) => read_regex(&regex),
            (None, None, None) if may_be_empty => Some(StringMatch::Present),
            (None, None, None) => {
                value.error("no condition", "write one of exact, prefix, regex");
                None
            }
            _ => {
                value.error("more than one condition", "write one of exact, prefix, regex");
                None
            }
        }
    }
}

impl fmt::Display for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StringMatch::Exact(text) => write!(f, "is {:?}", String::from_utf8_lossy(text)),
            StringMatch::Prefix(text) => write!(f, "starts with {:?}", String::from_utf8_lossy(text)),
            StringMatch::Regex(regex) => {
                let pattern = regex.as_str();
                let pattern =
                    pattern.strip_prefix(ANCHOR.0).and_then(|rest| rest.strip_suffix(ANCHOR.1)).unwrap_or(pattern);
                write!(f, "matches /{pattern}/")
            }
            StringMatch::Present => f.write_str("is present"),
        }
    }
}

/// What is written around an expression so that it has to match the whole value, as in Istio.
const ANCHOR: (&str, &str) = ("^(?:", ")$");

fn read_regex(value: &Value<'_>) -> Option<StringMatch> {
    let pattern = value.text()?;
    if pattern.len() > MAX_REGEX_BYTES {
        value.error(format!("{} bytes", pattern.len()), format!("a regex has at most {MAX_REGEX_BYTES} bytes"));
        return None;
    }
    let compile = |pattern: &str| RegexBuilder::new(pattern).size_limit(MAX_REGEX_PROGRAM).nest_limit(50).build();
    // The pattern alone has to be valid, so that `a)(b` cannot close the group that anchors it.
    match compile(pattern).and_then(|_| compile(&format!("{}{pattern}{}", ANCHOR.0, ANCHOR.1))) {
        Ok(regex) => Some(StringMatch::Regex(Box::new(regex))),
        Err(error) => {
            value.error(format!("not a regular expression: {error}"), "write RE2 syntax without Unicode classes");
            None
        }
    }
}

/// What a condition looks at.
#[derive(Debug)]
enum Subject {
    /// The path without its query.
    Path,
    Header(HeaderId),
    QueryParameter(Box<str>),
    Cookie(Box<str>),
    /// The name of the route that Envoy itself chose before the filter ran.
    RouteName,
}

/// One condition of a match.
#[derive(Debug)]
pub struct Condition {
    subject: Subject,
    test: StringMatch,
    ignore_case: bool,
    /// From `withoutHeaders`: the test must fail. An absent header counts as empty there, as in Envoy.
    inverted: bool,
}

impl Condition {
    fn holds(&self, request: &Request<'_>) -> bool {
        // What nearly every condition looks at is there to be borrowed.
        match &self.subject {
            Subject::Path => self.holds_for(Some(request.path())),
            Subject::Header(id) if request.count(*id) <= 1 => self.holds_for(request.first(*id)),
            _ => self.holds_for(self.value(request).as_deref()),
        }
    }

    fn holds_for(&self, value: Option<&[u8]>) -> bool {
        match value {
            Some(value) => self.test.matches(value, self.ignore_case) != self.inverted,
            None if self.inverted => matches!(self.test, StringMatch::Present) || !self.test.matches(b"", false),
            None => false,
        }
    }

    /// What the condition looks at in `request`.
    pub fn value<'a>(&self, request: &Request<'a>) -> Option<Cow<'a, [u8]>> {
        match &self.subject {
            Subject::Path => Some(Cow::Borrowed(request.path())),
            Subject::Header(id) => request.joined(*id),
            Subject::QueryParameter(name) => request.query_parameter(name.as_bytes()).map(Cow::Borrowed),
            Subject::Cookie(name) => request.cookie(name.as_bytes()).map(Cow::Borrowed),
            Subject::RouteName => request.route_name().map(|name| Cow::Owned(name.to_vec())),
        }
    }

    /// The condition in words, such as `header x-canary is "true"`.
    pub fn describe(&self, names: &HeaderNames) -> String {
        let subject = match &self.subject {
            Subject::Path => "path".to_owned(),
            Subject::Header(id) => match names.name(*id).strip_prefix(':') {
                Some(pseudo) => pseudo.to_owned(),
                None => format!("header {}", names.name(*id)),
            },
            Subject::QueryParameter(name) => format!("query parameter {name}"),
            Subject::Cookie(name) => format!("cookie {name}"),
            Subject::RouteName => "Envoy's route name".to_owned(),
        };
        let test = self.test.to_string();
        let test = match &self.test {
            StringMatch::Present if self.inverted => "is absent".to_owned(),
            StringMatch::Exact(_) if self.inverted => test.replacen("is", "is not", 1),
            StringMatch::Prefix(_) if self.inverted => test.replacen("starts", "does not start", 1),
            StringMatch::Regex(_) if self.inverted => test.replacen("matches", "does not match", 1),
            _ => test,
        };
        let case = if self.ignore_case { ", in any letter case" } else { "" };
        format!("{subject} {test}{case}")
    }
}

/// One entry of `match`: all its conditions have to hold.
#[derive(Debug, Default)]
pub struct RequestMatch {
    conditions: Vec<Condition>,
}

/// A path that a match asks for in so many words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathLiteral<'m> {
    Exact(&'m [u8]),
    Prefix(&'m [u8]),
}

impl RequestMatch {
    /// The path that a request needs to match, where it is written out.
    pub fn path(&self) -> Option<PathLiteral<'_>> {
        self.conditions.iter().find_map(|condition| match (&condition.subject, &condition.test) {
            (Subject::Path, _) if condition.ignore_case => None,
            (Subject::Path, StringMatch::Exact(path)) => Some(PathLiteral::Exact(path)),
            (Subject::Path, StringMatch::Prefix(path)) => Some(PathLiteral::Prefix(path)),
            _ => None,
        })
    }

    /// The conditions, in the order in which they are tried.
    pub fn conditions(&self) -> &[Condition] {
        &self.conditions
    }

    /// The first condition that does not hold; `None` where the request matches.
    pub fn first_mismatch(&self, request: &Request<'_>) -> Option<&Condition> {
        self.conditions.iter().find(|condition| !condition.holds(request))
    }

    /// Whether a condition asks for Envoy's own route name, which costs a host call.
    pub fn reads_route_name(&self) -> bool {
        self.conditions.iter().any(|condition| matches!(condition.subject, Subject::RouteName))
    }

    /// Reads an `HTTPMatchRequest`.
    pub fn read(value: &Value<'_>, names: &mut HeaderNames) -> Option<RequestMatch> {
        let mut fields = value.object()?;
        let mut conditions = Vec::new();
        // A label that Istio adds to its own statistics; it has no part in matching.
        fields.optional("name").and_then(|name| name.string());
        for (field, id) in
            [("method", HeaderNames::METHOD), ("authority", HeaderNames::AUTHORITY), ("scheme", HeaderNames::SCHEME)]
        {
            let test = fields.optional(field).and_then(|value| StringMatch::read(&value, false));
            conditions.extend(test.map(|test| Condition::new(Subject::Header(id), test)));
        }
        conditions.extend(read_uri(&mut fields));
        conditions.extend(read_route_name(&mut fields));
        for field in ["headers", "withoutHeaders"] {
            for (name, test) in read_named(&mut fields, field) {
                let Some(id) = read_header_name(&test, name, names) else { continue };
                let Some(test) = StringMatch::read(&test, true) else { continue };
                conditions.push(Condition {
                    inverted: field == "withoutHeaders",
                    ..Condition::new(Subject::Header(id), test)
                });
            }
        }
        for (name, test) in read_named(&mut fields, "queryParams") {
            let test = StringMatch::read(&test, true);
            conditions.extend(test.map(|test| Condition::new(Subject::QueryParameter(name.into()), test)));
        }
        for (name, test) in read_named(&mut fields, "cookies") {
            let test = StringMatch::read(&test, true);
            conditions.extend(test.map(|test| Condition::new(Subject::Cookie(name.into()), test)));
        }
        for field in ["port", "gateways", "sourceLabels", "sourceNamespace", "statPrefix"] {
            fields.refuse(
                field,
                "keep it in the VirtualService, or select workloads and ports in the WasmPlugin's match",
            );
        }
        fields.end();
        Some(RequestMatch { conditions })
    }
}

impl Condition {
    fn new(subject: Subject, test: StringMatch) -> Condition {
        Condition { subject, test, ignore_case: false, inverted: false }
    }
}

fn read_uri(fields: &mut Fields<'_>) -> Option<Condition> {
    let ignore_case = fields.optional("ignoreUriCase");
    let uri = fields.optional("uri").and_then(|value| StringMatch::read(&value, false));
    let ignores = ignore_case.as_ref().and_then(Value::bool).unwrap_or(false);
    match (&uri, ignore_case) {
        (Some(StringMatch::Regex(_)), Some(value)) if ignores => {
            value.error("ignoreUriCase with a regex", "write (?i) into the regex");
        }
        (None, Some(value)) => value.warning("ignoreUriCase without uri", "remove it"),
        _ => {}
    }
    uri.map(|test| Condition { ignore_case: ignores, ..Condition::new(Subject::Path, test) })
}

fn read_route_name(fields: &mut Fields<'_>) -> Option<Condition> {
    let test = StringMatch::read(&fields.optional("routeName")?, false)?;
    Some(Condition::new(Subject::RouteName, test))
}

/// The entries of `field`, by the names that the user gave them.
pub fn read_named<'a>(fields: &mut Fields<'a>, field: &'static str) -> Vec<(&'a str, Value<'a>)> {
    fields.optional(field).and_then(|value| value.entries()).unwrap_or_default()
}

/// Whether `name` is a token (RFC 9110, section 5.6.2) of a plausible length.
pub fn is_header_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    (1..=128).contains(&name.len()) && name.bytes().all(fits)
}

/// Reads a header's name where `value` stands: a token (RFC 9110, section 5.6.2), or one of HTTP/2's pseudo-headers.
pub fn read_header_name(value: &Value<'_>, name: &str, names: &mut HeaderNames) -> Option<HeaderId> {
    if !is_header_name(name.strip_prefix(':').unwrap_or(name)) {
        value
            .error(format!("{} is not a header name", crate::document::quoted(name)), "expected letters, digits and -");
        return None;
    }
    let id = names.intern(name);
    if id.is_none() {
        value.error("too many header names", format!("a policy refers to at most {}", crate::http::MAX_HEADER_NAMES));
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;
    use crate::http::encode_headers;

    fn read(text: &str) -> Result<(RequestMatch, HeaderNames), Vec<String>> {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let mut names = HeaderNames::default();
        let read = RequestMatch::read(&Value::root(&node, &report), &mut names);
        let told: Vec<_> = report.into_diagnostics().iter().map(ToString::to_string).collect();
        if told.is_empty() { Ok((read.unwrap(), names)) } else { Err(told) }
    }

    /// Which of the requests match.
    fn matching(text: &str, requests: &[&[(&str, &str)]]) -> Vec<bool> {
        let (found, names) = read(text).unwrap();
        requests
            .iter()
            .map(|headers| found.first_mismatch(&Request::parse(&encode_headers(headers), &names)).is_none())
            .collect()
    }

    #[test]
    fn uri_is_matched_without_its_query() {
        let paths = |text| {
            matching(
                text,
                &[&[(":path", "/a/b?x=1")], &[(":path", "/A/b")], &[(":path", "/a/bc")], &[(":path", "*")], &[]],
            )
        };
        assert_eq!(paths(r#"{"uri": {"exact": "/a/b"}}"#), [true, false, false, false, false]);
        assert_eq!(paths(r#"{"uri": {"prefix": "/a/b"}}"#), [true, false, true, false, false]);
        assert_eq!(paths(r#"{"uri": {"regex": "/a/."}}"#), [true, false, false, false, false]);
        assert_eq!(paths(r#"{"uri": {"exact": "/a/B"}, "ignoreUriCase": true}"#), [true, true, false, false, false]);
        assert_eq!(paths(r#"{"uri": {"prefix": "/A"}, "ignoreUriCase": true}"#), [true, true, true, false, false]);
    }

    #[test]
    fn headers_match_as_in_envoy() {
        let twice: &[(&str, &str)] = &[("x", "a"), ("x", "b")];
        assert_eq!(matching(r#"{"headers": {"X": {"exact": "a,b"}}}"#, &[twice, &[("x", "a")]]), [true, false]);
        assert_eq!(matching(r#"{"headers": {"x": {}}}"#, &[&[("x", "")], &[]]), [true, false]);
        assert_eq!(
            matching(r#"{"headers": {"x": {"regex": "a|b"}}}"#, &[&[("x", "b")], &[("x", "ab")]]),
            [true, false]
        );
        assert_eq!(matching(r#"{"withoutHeaders": {"x": {}}}"#, &[&[("x", "")], &[]]), [false, true]);
        let without = r#"{"withoutHeaders": {"x": {"exact": "a"}}}"#;
        assert_eq!(matching(without, &[&[("x", "a")], &[("x", "b")], &[]]), [false, true, true]);
    }

    #[test]
    fn the_other_subjects() {
        assert_eq!(
            matching(
                r#"{"queryParams": {"v": {"exact": "2"}}, "cookies": {"s": {"prefix": "a"}}, "method": {"exact": "GET"}}"#,
                &[
                    &[(":method", "GET"), (":path", "/?v=2"), ("cookie", "s=ab")],
                    &[(":method", "PUT"), (":path", "/?v=2"), ("cookie", "s=ab")],
                    &[(":method", "GET"), (":path", "/?v=3"), ("cookie", "s=ab")],
                    &[(":method", "GET"), (":path", "/?v=2"), ("cookie", "s=b")],
                ]
            ),
            [true, false, false, false]
        );
    }

    #[test]
    fn a_regex_is_anchored_bounded_and_never_tried_on_what_is_no_text() {
        let (found, names) = read(r#"{"headers": {"x": {"regex": ".*"}}}"#).unwrap();
        let matches =
            |value: &[u8]| found.first_mismatch(&Request::parse(&encode_headers(&[("x", value)]), &names)).is_none();
        assert!(matches(b""));
        assert!(!matches(b"\xff"));
        assert!(matches(&[b'a'; MAX_REGEX_INPUT]));
        assert!(!matches(&[b'a'; MAX_REGEX_INPUT + 1]));
        for bad in ["a)(b", "(", r"\\p{L}", "((((a{100}){100}){100}){100})"] {
            let told = read(&format!(r#"{{"headers": {{"x": {{"regex": "{bad}"}}}}}}"#)).unwrap_err();
            assert!(told.first().unwrap().contains("not a regular expression"), "{told:?}");
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let told = read(
            r#"{"port": 80, "uri": {}, "headers": {"a b": {}, "c": {"exact": "x", "prefix": "y"}, "d": {"suffix": "z"}}}"#,
        )
        .unwrap_err();
        assert_eq!(told.len(), 5, "{told:#?}");
        assert!(told.iter().any(|told| told.starts_with("error: /port: port cannot be honoured here; keep it in")));
    }

    #[test]
    fn a_condition_says_what_it_wants() {
        let (found, names) = read(r#"{"headers": {"x-canary": {"regex": "t.*"}}}"#).unwrap();
        let block = encode_headers(&[("x-canary", "false")]);
        let mismatch =
            found.first_mismatch(&Request::parse(&block, &names)).map(|condition| condition.describe(&names));
        assert_eq!(mismatch.as_deref(), Some("header x-canary matches /t.*/"));
        let (found, names) = read(
            r#"{"uri": {"prefix": "/A"}, "ignoreUriCase": true,
                "withoutHeaders": {"a": {}, "b": {"exact": "is"}, "c": {"prefix": "p"}, "d": {"regex": "r"}}}"#,
        )
        .unwrap();
        let told: Vec<_> = found.conditions().iter().map(|condition| condition.describe(&names)).collect();
        assert_eq!(
            told,
            [
                "path starts with \"/A\", in any letter case",
                "header a is absent",
                "header b is not \"is\"",
                "header c does not start with \"p\"",
                "header d does not match /r/",
            ]
        );
    }
}
