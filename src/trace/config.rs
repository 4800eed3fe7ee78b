//! Reads the `trace` block.
//!
//! ```yaml
//! trace:
//!   extract: [tracecontext, b3]   # read in this order, the first valid context wins; default [tracecontext]
//!   inject: [tracecontext]        # all of them are written; a format that is only extracted is removed
//!   edge: continue                # continue restart restartExternal ignore restore
//!   sampling:                     # of new traces; a caller's decision is respected
//!     percentage: {value: 1}
//!     force: [fault]              # sampled in any case: fault rateLimit rollback
//!   tracestate:
//!     key: acme                   # our own member; restartExternal trusts callers that send it (default trimtab)
//!     allow: [acme, ot]           # the only keys that leave, inbound requests aside
//!   baggage: {allow: [tenant]}    # the same
//!   direction: auto               # auto inbound outbound
//!   bridge:                       # gives outbound requests what the application did not copy
//!     key: {header: x-request-id}
//!     capacity: 4096
//!     ttl: 60s
//!     carry: [baggage]
//!   response: none                # none serverTiming traceresponse
//!   filterState: [traceId]        # left for access logs and later filters: traceId context
//! ```

use super::bridge::Bridge;
use super::decision::threshold;
use super::formats::Format;
use super::policy::{Direction, Edge, FilterState, Force, Recognised, Response, Trace};
use super::tracestate::is_key;
use crate::document::{Fields, Value, quoted};
use crate::http::HeaderNames;
use crate::units::Fraction;

/// Istio's default: one new trace in a hundred is sampled.
const DEFAULT_SAMPLING: Fraction = Fraction::from_ppm(10_000);

/// Our own key in `tracestate`, where an edge needs one and the policy names none.
const DEFAULT_MARK: &str = "trimtab";

static EDGES: [(&str, Edge); 5] = [
    ("continue", Edge::Continue),
    ("restart", Edge::Restart),
    ("restartExternal", Edge::RestartExternal),
    ("ignore", Edge::Ignore),
    ("restore", Edge::Restore),
];
static DIRECTIONS: [(&str, Option<Direction>); 3] =
    [("auto", None), ("inbound", Some(Direction::Inbound)), ("outbound", Some(Direction::Outbound))];
static RESPONSES: [(&str, Response); 3] =
    [("none", Response::None), ("serverTiming", Response::ServerTiming), ("traceresponse", Response::Traceresponse)];

/// The most entries of an allow-list.
const MAX_ALLOWED: usize = 64;

impl Trace {
    /// Reads the block. `prefix` is what the policy's shared words start with.
    pub fn read(value: &Value<'_>, prefix: &str, names: &mut HeaderNames) -> Option<Trace> {
        let mut fields = value.object()?;
        let edge = fields.optional("edge").and_then(|value| value.one_of(&EDGES)).unwrap_or(Edge::Continue);
        if edge == Edge::Restore {
            for field in
                ["extract", "sampling", "tracestate", "baggage", "direction", "response", "bridge", "filterState"]
            {
                fields.refuse(field, "with edge: restore an earlier filter decides; write it there");
            }
        }
        let extract = read_formats(&mut fields, "extract");
        let inject = read_formats(&mut fields, "inject");
        let (sampling, force) = match fields.optional("sampling") {
            Some(value) => read_sampling(&value)?,
            None => (DEFAULT_SAMPLING, Force::default()),
        };
        let (mark, tracestate_allow) = match fields.optional("tracestate") {
            Some(value) => read_tracestate(&value)?,
            None => (None, None),
        };
        let mark = mark.or_else(|| (edge == Edge::RestartExternal).then(|| DEFAULT_MARK.into()));
        let baggage_allow = fields.optional("baggage").and_then(|value| {
            let mut fields = value.object()?;
            let allow = read_allow(&mut fields);
            fields.end();
            allow
        });
        let direction = fields.optional("direction").and_then(|value| value.one_of(&DIRECTIONS)).flatten();
        let response = fields.optional("response").and_then(|value| value.one_of(&RESPONSES));
        let left = fields.optional("filterState").map(|value| read_words(&value, &[("traceId", 1), ("context", 2)]));
        let left = left.unwrap_or_default();
        let filter_state = FilterState { trace_id: left & 1 != 0, context: left & 2 != 0 };
        let bridge = fields.optional("bridge").and_then(|value| Bridge::read(&value, prefix, names));
        fields.end();

        // An edge that starts traces anew lets no header of any format through, nor does one that overrules a tracer.
        let restarts = matches!(edge, Edge::Restart | Edge::RestartExternal);
        let mut formats: Vec<Recognised> = Vec::new();
        let others = Format::ALL.iter().filter(|_| restarts || edge == Edge::Restore).map(|(_, format)| format);
        for format in extract.iter().chain(&inject).chain(others) {
            if !formats.iter().any(|known| known.format == *format) {
                let (extracted, injected) = (extract.contains(format), inject.contains(format));
                formats.push(Recognised { extracted, injected, ..Recognised::intern(*format, names)? });
            }
        }
        const UNTRUSTED: [&str; 5] =
            ["baggage", "x-client-trace-id", "x-envoy-force-trace", "jaeger-debug-id", "jaeger-baggage"];
        let untrusted = UNTRUSTED.into_iter().filter(|_| restarts).filter_map(|name| Some((name, names.intern(name)?)));
        Some(Trace {
            edge,
            formats,
            threshold: threshold(sampling),
            sampling,
            force,
            mark,
            tracestate_allow,
            baggage_allow,
            untrusted: untrusted.collect(),
            baggage: names.intern("baggage")?,
            request_id: names.intern("x-request-id")?,
            direction,
            response: response.unwrap_or(Response::None),
            filter_state,
            bridge,
        })
    }
}

/// A list of formats, each once; W3C's where none is written.
fn read_formats(fields: &mut Fields<'_>, field: &'static str) -> Vec<Format> {
    let Some(value) = fields.optional(field) else { return vec![Format::TraceContext] };
    let mut formats = Vec::new();
    let items = value.array().unwrap_or_default();
    for item in &items {
        match item.one_of(&Format::ALL) {
            Some(format) if formats.contains(&format) => item.unfit("write each format once"),
            Some(format) => formats.push(format),
            None => {}
        }
    }
    if items.is_empty() {
        value.unfit("expected a list of formats, such as [tracecontext, b3]");
    }
    formats
}

/// A list of words, each once; the sum of their bits.
fn read_words(value: &Value<'_>, words: &[(&str, u8)]) -> u8 {
    let mut found = 0;
    for item in value.array().unwrap_or_default() {
        match item.one_of(words) {
            Some(bit) if found & bit != 0 => item.unfit("write each word once"),
            bit => found |= bit.unwrap_or_default(),
        }
    }
    found
}

fn read_sampling(value: &Value<'_>) -> Option<(Fraction, Force)> {
    let mut fields = value.object()?;
    let percentage = fields.optional("percentage").map(|value| Fraction::read(&value));
    let words = [("fault", 1), ("rateLimit", 2), ("rollback", 4)];
    let forced = fields.optional("force").map_or(0, |value| read_words(&value, &words));
    fields.end();
    let force = Force { fault: forced & 1 != 0, rate_limit: forced & 2 != 0, rollback: forced & 4 != 0 };
    Some((percentage.unwrap_or(Some(DEFAULT_SAMPLING))?, force))
}

type Allow = Option<Box<[Box<str>]>>;

fn read_tracestate(value: &Value<'_>) -> Option<(Option<Box<str>>, Allow)> {
    let mut fields = value.object()?;
    let key = fields.optional("key").and_then(|value| {
        let key = value.text()?;
        // OpenTelemetry's is not ours to take.
        if !is_key(key.as_bytes()) || key == "ot" || key.len() > 64 {
            value.unfit("expected 1 to 64 of a-z, 0-9 and _-*/@, a letter or digit first, and not ot");
            return None;
        }
        Some(key.into())
    });
    let allow = read_allow(&mut fields);
    fields.end();
    Some((key, allow))
}

fn read_allow(fields: &mut Fields<'_>) -> Allow {
    let value = fields.optional("allow")?;
    let items = value.array()?;
    if items.len() > MAX_ALLOWED {
        value.error(format!("{} keys", items.len()), format!("write at most {MAX_ALLOWED}"));
        return None;
    }
    items
        .iter()
        .map(|item| {
            let key = item.text()?;
            if key.len() > 256 || key.bytes().any(|byte| !byte.is_ascii_graphic() || b",;=".contains(&byte)) {
                item.error(format!("{} is not a key", quoted(key)), "expected printable characters but , ; and =");
                return None;
            }
            Some(key.into())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;

    fn told(text: &str) -> Vec<String> {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        Trace::read(&Value::root(&node, &report), "t/", &mut HeaderNames::default());
        report.into_diagnostics().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_whole_block_is_read() {
        let full = r#"{"extract": ["tracecontext", "b3", "b3multi", "jaeger", "xray", "gcp", "datadog", "ottrace", "grpc"],
            "inject": ["tracecontext", "b3"], "edge": "restartExternal",
            "sampling": {"percentage": "5%", "force": ["fault", "rateLimit", "rollback"]}, "filterState": ["traceId", "context"],
            "tracestate": {"key": "acme@mesh", "allow": ["acme@mesh", "ot"]}, "baggage": {"allow": []},
            "direction": "inbound", "response": "serverTiming",
            "bridge": {"key": {"header": "x-correlation-id"}, "capacity": 16, "ttl": "5s", "carry": ["baggage", "x-cohort"]}}"#;
        assert_eq!(told(full), [] as [&str; 0]);
        assert_eq!(told("{}"), [] as [&str; 0]);
        assert_eq!(told(r#"{"bridge": {}}"#), [] as [&str; 0]);
    }

    #[test]
    fn mistakes_are_told_where_they_are() {
        let bad = told(
            r#"{"extract": ["b3", "b3", "sw8"], "inject": [], "edge": "drop", "sampling": {"force": ["fault", "fault", "all"]},
                "filterState": ["spanId"],
                "tracestate": {"key": "ot", "allow": ["a=b"]}, "baggage": {"deny": []}, "direction": "both",
                "response": "header", "bridge": {"key": {"cookie": "a"}, "capacity": 0, "ttl": "1ms", "carry": ["a b"]}}"#,
        );
        let expected = [
            "error: /edge: found \"drop\"; expected one of continue, restart, restartExternal, ignore, restore",
            "error: /extract/1: found \"b3\"; write each format once",
            "error: /extract/2: found \"sw8\"; expected one of tracecontext, b3, b3multi, jaeger, xray, gcp, datadog, \
             ottrace, grpc",
            "error: /inject: found a list; expected a list of formats, such as [tracecontext, b3]",
            "error: /sampling/force/1: found \"fault\"; write each word once",
            "error: /sampling/force/2: found \"all\"; expected one of fault, rateLimit, rollback",
            "error: /tracestate/key: found \"ot\"; expected 1 to 64 of a-z, 0-9 and _-*/@, a letter or digit first, and \
             not ot",
            "error: /tracestate/allow/0: \"a=b\" is not a key; expected printable characters but , ; and =",
            "error: /baggage/deny: unknown field \"deny\"; expected one of allow",
            "error: /direction: found \"both\"; expected one of auto, inbound, outbound",
            "error: /response: found \"header\"; expected one of none, serverTiming, traceresponse",
            "error: /filterState/0: found \"spanId\"; expected one of traceId, context",
            "error: /bridge/key: header is missing; write header",
            "error: /bridge/key/cookie: unknown field \"cookie\"; expected one of header",
            "error: /bridge/capacity: found 0; expected a whole number from 1 to 65536",
            "error: /bridge/ttl: found \"1ms\"; expected a duration such as \"250ms\", \"30s\" or \"5m\", from 1s to 24h",
            "error: /bridge/carry/0: \"a b\" is not a header name; expected letters, digits and -",
        ];
        assert_eq!(bad, expected);
        let told = told(r#"{"edge": "restore", "inject": ["b3"], "bridge": {}}"#);
        let expected = "error: /bridge: bridge cannot be honoured here; with edge: restore an earlier filter decides; write it there";
        assert_eq!(told, [expected]);
    }
}
