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
use super::decision::rejection_threshold;
use super::formats::TraceFormat;
use super::policy::{
    ConfiguredFormat, EdgeMode, FilterStateFields, ForcedSampling, ResponseHeader, TracePolicy, TrafficDirection,
};
use super::tracestate::is_key;
use crate::document::{Fields, Value, quoted};
use crate::http::HeaderNames;
use crate::units::Fraction;

/// Istio's default: one new trace in a hundred is sampled.
const DEFAULT_SAMPLING: Fraction = Fraction::from_ppm(10_000);

/// Our own key in `tracestate`, where an edge needs one and the policy names none.
const DEFAULT_TRACESTATE_KEY: &str = "trimtab";

static EDGES: [(&str, EdgeMode); 5] = [
    ("continue", EdgeMode::Continue),
    ("restart", EdgeMode::Restart),
    ("restartExternal", EdgeMode::RestartExternal),
    ("ignore", EdgeMode::Ignore),
    ("restore", EdgeMode::Restore),
];
static DIRECTIONS: [(&str, Option<TrafficDirection>); 3] =
    [("auto", None), ("inbound", Some(TrafficDirection::Inbound)), ("outbound", Some(TrafficDirection::Outbound))];
static RESPONSES: [(&str, ResponseHeader); 3] = [
    ("none", ResponseHeader::None),
    ("serverTiming", ResponseHeader::ServerTiming),
    ("traceresponse", ResponseHeader::Traceresponse),
];

/// The most entries of an allow-list.
const MAX_ALLOWED: usize = 64;

impl TracePolicy {
    /// Reads the block. `prefix` is what the policy's shared words start with.
    pub fn read(value: &Value<'_>, prefix: &str, names: &mut HeaderNames) -> Option<TracePolicy> {
        let mut fields = value.object()?;
        let edge = fields.optional("edge").and_then(|value| value.one_of(&EDGES)).unwrap_or(EdgeMode::Continue);
        if edge == EdgeMode::Restore {
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
            None => (DEFAULT_SAMPLING, ForcedSampling::default()),
        };
        let (tracestate_key, tracestate_allow) = match fields.optional("tracestate") {
            Some(value) => read_tracestate(&value)?,
            None => (None, None),
        };
        let tracestate_key =
            tracestate_key.or_else(|| (edge == EdgeMode::RestartExternal).then(|| DEFAULT_TRACESTATE_KEY.into()));
        let baggage_allow = fields.optional("baggage").and_then(|value| {
            let mut fields = value.object()?;
            let allow = read_allow(&mut fields);
            fields.end();
            allow
        });
        let direction = fields.optional("direction").and_then(|value| value.one_of(&DIRECTIONS)).flatten();
        let response = fields.optional("response").and_then(|value| value.one_of(&RESPONSES));
        let fields_set =
            fields.optional("filterState").map(|value| read_words(&value, &[("traceId", 1), ("context", 2)]));
        let fields_set = fields_set.unwrap_or_default();
        let filter_state = FilterStateFields { trace_id: fields_set & 1 != 0, context: fields_set & 2 != 0 };
        let bridge = fields.optional("bridge").and_then(|value| Bridge::read(&value, prefix, names));
        fields.end();

        // An edge that starts traces anew lets no header of any format through, nor does one that overrules a tracer.
        let restarts = matches!(edge, EdgeMode::Restart | EdgeMode::RestartExternal);
        let mut formats: Vec<ConfiguredFormat> = Vec::new();
        let others =
            TraceFormat::ALL.iter().filter(|_| restarts || edge == EdgeMode::Restore).map(|(_, format)| format);
        for format in extract.iter().chain(&inject).chain(others) {
            if !formats.iter().any(|configured| configured.format == *format) {
                let (extracted, injected) = (extract.contains(format), inject.contains(format));
                formats.push(ConfiguredFormat { extracted, injected, ..ConfiguredFormat::intern(*format, names)? });
            }
        }
        const UNTRUSTED_HEADERS: [&str; 5] =
            ["baggage", "x-client-trace-id", "x-envoy-force-trace", "jaeger-debug-id", "jaeger-baggage"];
        let untrusted_headers =
            UNTRUSTED_HEADERS.into_iter().filter(|_| restarts).filter_map(|name| Some((name, names.intern(name)?)));
        Some(TracePolicy {
            edge,
            formats,
            threshold: rejection_threshold(sampling),
            sampling,
            force,
            tracestate_key,
            tracestate_allow,
            baggage_allow,
            untrusted_headers: untrusted_headers.collect(),
            baggage: names.intern("baggage")?,
            request_id: names.intern("x-request-id")?,
            direction,
            response: response.unwrap_or(ResponseHeader::None),
            filter_state,
            bridge,
        })
    }
}

/// A list of formats, each once; W3C's where none is written.
fn read_formats(fields: &mut Fields<'_>, field: &'static str) -> Vec<TraceFormat> {
    let Some(value) = fields.optional(field) else { return vec![TraceFormat::TraceContext] };
    let mut formats = Vec::new();
    let items = value.array().unwrap_or_default();
    for item in &items {
        match item.one_of(&TraceFormat::ALL) {
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

fn read_sampling(value: &Value<'_>) -> Option<(Fraction, ForcedSampling)> {
    let mut fields = value.object()?;
    let percentage = fields.optional("percentage").map(|value| Fraction::read(&value));
    let words = [("fault", 1), ("rateLimit", 2), ("rollback", 4)];
    let forced = fields.optional("force").map_or(0, |value| read_words(&value, &words));
    fields.end();
    let force = ForcedSampling { fault: forced & 1 != 0, rate_limit: forced & 2 != 0, rollback: forced & 4 != 0 };
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

    fn diagnostics(text: &str) -> Vec<String> {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        TracePolicy::read(&Value::root(&node, &report), "t/", &mut HeaderNames::default());
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
        assert_eq!(diagnostics(full), [] as [&str; 0]);
        assert_eq!(diagnostics("{}"), [] as [&str; 0]);
        assert_eq!(diagnostics(r#"{"bridge": {}}"#), [] as [&str; 0]);
    }

    #[test]
    fn mistakes_are_told_where_they_are() {
        let bad = diagnostics(
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
        let diagnostics = diagnostics(r#"{"edge": "restore", "inject": ["b3"], "bridge": {}}"#);
        let expected = "error: /bridge: bridge cannot be honoured here; with edge: restore an earlier filter decides; write it there";
        assert_eq!(diagnostics, [expected]);
    }
}
