//! Reads a route's `fault` block.

use super::active::ActiveFaults;
use super::guard::GuardPolicy;
use super::policy::{Abort, Delay, Distribution, DrawnFrom, FaultPolicy, FaultStatus, HeaderControl};
use super::target::FaultTarget;
use crate::decimal::parse_decimal;
use crate::document::{Fields, Value, quoted};
use crate::http::{HeaderNames, MAX_HEADER_NAMES};
use crate::matcher::{StringMatch, read_header_name, read_named};
use crate::slo::Slo;
use crate::units::{Fraction, nanoseconds, read_duration};
use std::time::Duration;
use xxhash_rust::xxh64::xxh64;

/// The names of gRPC's status codes, each at its number.
const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

const MIN_DELAY: Duration = Duration::from_millis(1);

/// The most quantiles of a distribution.
const MAX_QUANTILES: usize = 16;

/// The route of a `fault` block.
pub struct RouteContext<'a> {
    pub route: &'a str,
    /// The names of the route's destinations, in their order.
    pub destinations: Vec<&'a str>,
    pub slo: &'a Slo,
    /// The beginning of the keys of the fault's records.
    pub state_prefix: String,
    pub header_names: &'a mut HeaderNames,
}

impl FaultPolicy {
    /// Reads the block of a route. `None` if it is not an object; other errors are reported to the diagnostics.
    pub fn read(value: &Value<'_>, around: RouteContext<'_>) -> Option<FaultPolicy> {
        let RouteContext { route, destinations, slo, state_prefix, header_names } = around;
        let mut fields = value.object()?;
        let is_controlled = fields.optional("headerControl").and_then(|value| value.bool()).unwrap_or(false);
        let (delay, abort, response) =
            (fields.optional("delay"), fields.optional("abort"), fields.optional("response"));
        if delay.is_none() && abort.is_none() && (response.is_none() || is_controlled) {
            let help =
                if is_controlled { "write what may be asked for" } else { "write delay, abort, response or several" };
            value.error("a fault without delay or abort", help);
        }
        let target = read_target(&mut fields, &destinations, header_names);
        if let Some(abort) = abort.as_ref().filter(|_| target.is_upstream()) {
            abort.error(
                "an abort of one host or attempt is neither retried nor counted by Envoy",
                "write response: what the host has answered is replaced before the router sees it",
            );
        }
        let delay = delay.and_then(|value| read_delay(&value));
        let abort = abort.and_then(|value| read_abort(&value, is_controlled));
        let response = response.and_then(|value| read_response(&value));
        fields.refuse("responseRateLimit", RATE_LIMIT);
        let header_control = is_controlled.then(|| HeaderControl::intern(header_names));
        if header_control.is_some_and(|interned| interned.is_none()) {
            value.error("too many header names", format!("a policy refers to at most {MAX_HEADER_NAMES}"));
        }
        let max_active = fields.optional("maxActive").and_then(|value| value.integer(1..=1_000_000));
        let marks = fields.optional("markAnswers").and_then(|value| value.bool());
        let shadow = fields.optional("mode").and_then(|value| value.one_of(&[("enforce", false), ("shadow", true)]));
        let drawn_from = fields
            .optional("key")
            .and_then(|value| value.one_of(&[("traceId", DrawnFrom::TraceId), ("random", DrawnFrom::Random)]));
        let guard = GuardPolicy::read(&mut fields, slo);
        if guard.admin.is_some() && !target.hosts.is_empty() {
            value.error(
                "guard.admin where hosts are faulted",
                "remove admin: the experiment measures whether Envoy ejects the hosts, so an ejection must not stop it",
            );
        }
        fields.end();
        Some(FaultPolicy {
            delay,
            abort,
            response,
            header_control: header_control.flatten(),
            drawn_from: drawn_from.unwrap_or(DrawnFrom::TraceId),
            target,
            active: max_active.map(|max| ActiveFaults::new(max, [&*state_prefix, "active"].concat())),
            marks: marks.unwrap_or(true),
            shadow: shadow.unwrap_or(false),
            guard,
            salt: xxh64(route.as_bytes(), 0),
        })
    }
}

/// The alternatives to `responseRateLimit`.
const RATE_LIMIT: &str = "a WebAssembly filter cannot slow a body down; put envoy.filters.http.fault with \
                          response_rate_limit, or envoy.filters.http.bandwidth_limit, beside it";

/// The most entries of a list, and the most properties, of a fault.
const MAX_NAMED: usize = 16;

fn read_target(fields: &mut Fields<'_>, destinations: &[&str], header_names: &mut HeaderNames) -> FaultTarget {
    let mut target = FaultTarget::default();
    if let Some(mut source) = fields.optional("source").and_then(|value| value.object()) {
        for (name, test) in &read_named(&mut source, "headers") {
            let id = read_header_name(test, name, header_names);
            target.headers.extend(id.zip(StringMatch::read(test, true)));
        }
        for (path, test) in &read_named(&mut source, "properties") {
            if path.split('.').any(str::is_empty) || target.properties.len() >= MAX_NAMED {
                let help = format!("expected up to {MAX_NAMED} such as connection.uri_san_peer_certificate");
                test.error(format!("{} as an attribute's path", quoted(path)), help);
            }
            target.properties.extend(StringMatch::read(test, true).map(|test| (Box::from(*path), test)));
        }
        if target.headers.is_empty() && target.properties.is_empty() {
            source.value().error("a source without a condition", "write headers, properties, or both");
        }
        source.end();
    }
    for value in &read_named_list(fields, "destinations") {
        let Some(name) = value.string() else { continue };
        match destinations.iter().position(|known| *known == name) {
            Some(index) => target.destinations.push(index),
            None => value.unfit("expected the subset, or the host without one, of a destination of this route"),
        }
    }
    for value in &read_named_list(fields, "hosts") {
        let Some(host) = value.text() else { continue };
        let is_address = |byte: u8| byte.is_ascii_hexdigit() || b".:[]".contains(&byte);
        let has_port = host.rsplit_once(':').is_some_and(|(address, port)| {
            let is_bracketed = address.starts_with('[') && address.ends_with(']');
            !address.is_empty() && is_bracketed == address.contains(':') && port.parse::<u16>().is_ok()
        });
        if !has_port || !host.bytes().all(is_address) {
            value
                .unfit("expected a host's address and port as Envoy knows it, such as 10.0.0.7:8080 or [fd00::7]:8080");
        }
        target.hosts.push(host.into());
    }
    for value in &read_named_list(fields, "attempts") {
        target.attempts.extend(value.integer(1..=100));
    }
    target
}

/// The items of an optional list, which must not be empty.
fn read_named_list<'a>(fields: &mut Fields<'a>, name: &'static str) -> Vec<Value<'a>> {
    let Some(list) = fields.optional(name) else { return Vec::new() };
    let items = list.array();
    if let Some(items) = items.as_ref().filter(|items| items.is_empty() || items.len() > MAX_NAMED) {
        list.error(format!("{} entries", items.len()), format!("write 1 to {MAX_NAMED}, or remove the field"));
    }
    items.unwrap_or_default()
}

/// Reads Istio's `percentage`, or its deprecated integer `percent`. Without both no request is faulted, as in Istio.
fn read_percentage(fields: &mut Fields<'_>) -> Option<Fraction> {
    let percent = fields.optional("percent");
    let percentage = fields.optional("percentage");
    if let Some(percent) = &percent {
        percent.warning("percent is deprecated in Istio", "write percentage: {value: 5.0}");
    }
    match (percentage, percent) {
        (Some(percentage), _) => Fraction::read(&percentage),
        (None, Some(percent)) => Fraction::read_number(&percent),
        (None, None) => {
            fields.value().warning("without a percentage no request is faulted", "write percentage: {value: 5.0}");
            Some(Fraction::NONE)
        }
    }
}

fn read_delay(value: &Value<'_>) -> Option<(Fraction, Delay)> {
    let mut fields = value.object()?;
    let percentage = read_percentage(&mut fields);
    let fixed = fields.optional("fixedDelay");
    let distribution = fields.optional("distribution");
    fields.refuse("exponentialDelay", "Istio does not implement it either; write fixedDelay or distribution");
    fields.end();
    let delay = match (fixed, distribution) {
        (Some(fixed), None) => read_duration(&fixed, MIN_DELAY).map(|delay| Delay::Fixed(nanoseconds(delay))),
        (None, Some(distribution)) => read_distribution(&distribution).map(Delay::Distribution),
        _ => {
            value.error("a delay needs one length", "write fixedDelay or distribution");
            None
        }
    };
    Some((percentage?, delay?))
}

/// Reads quantiles such as `{p50: 100ms, p95: 400ms, p99.9: 1s}`, in any order.
fn read_distribution(value: &Value<'_>) -> Option<Distribution> {
    let entries = value.entries()?;
    if entries.is_empty() || entries.len() > MAX_QUANTILES {
        let help = format!("write 1 to {MAX_QUANTILES}, such as {{p50: 100ms, p99: 1s}}");
        value.error(format!("{} quantiles", entries.len()), help);
        return None;
    }
    let mut quantiles = Vec::new();
    for (name, delay) in &entries {
        let quantile = name.strip_prefix('p').and_then(|percent| parse_decimal(percent, 10_000));
        let Some(quantile @ 1..=1_000_000) = quantile else {
            let help = "expected a percentile from p0.0001 to p100, such as p95 or p99.9";
            delay.error(format!("{} is no percentile", quoted(name)), help);
            return None;
        };
        let quantile = Fraction::from_ppm(quantile as u32);
        let place = quantiles.iter().take_while(|(lower, _)| *lower < quantile).count();
        quantiles.insert(place, (quantile, nanoseconds(read_duration(delay, MIN_DELAY)?)));
    }
    let rises = |pair: &[(Fraction, u64)]| matches!(pair, [(a, shorter), (b, longer)] if a < b && shorter < longer);
    if !quantiles.windows(2).all(rises) {
        value.error("a distribution that does not increase", "write a longer delay for each higher percentile");
        return None;
    }
    Some(Distribution { quantiles: quantiles.into() })
}

fn read_abort(value: &Value<'_>, is_controlled: bool) -> Option<(Fraction, Abort)> {
    let mut fields = value.object()?;
    let percentage = read_percentage(&mut fields);
    let resets = fields.optional("reset");
    fields.refuse("http2Error", "Istio does not implement it either; write httpStatus, grpcStatus or reset");
    let abort = match (resets, is_controlled) {
        (None, true) => {
            if let Some(status) = fields.optional("httpStatus").or_else(|| fields.optional("grpcStatus")) {
                status.error("a status where headerControl lets the request name it", "remove the status");
            }
            Some(Abort::Requested)
        }
        (Some(resets), true) => {
            resets.error("reset where headerControl lets the request name a status", "remove reset or headerControl");
            None
        }
        (None, false) => read_status(&mut fields).map(Abort::Answer),
        (Some(resets), false) => {
            if !resets.bool()? {
                resets.unfit("expected true; for an answer write httpStatus or grpcStatus");
            }
            for status in ["httpStatus", "grpcStatus"] {
                fields.refuse(status, "a request that is reset gets no response; remove the status or reset");
            }
            Some(Abort::Reset)
        }
    };
    fields.end();
    Some((percentage?, abort?))
}

fn read_response(value: &Value<'_>) -> Option<(Fraction, FaultStatus)> {
    let mut fields = value.object()?;
    let percentage = read_percentage(&mut fields);
    let status = read_status(&mut fields);
    fields.end();
    if let Some(FaultStatus::Http(204 | 205 | 304)) = status {
        value.error("a status whose answers have no body", "write another: the upstream's body is kept");
    }
    Some((percentage?, status?))
}

fn read_status(fields: &mut Fields<'_>) -> Option<FaultStatus> {
    let http = fields.optional("httpStatus");
    let grpc = fields.optional("grpcStatus");
    match (http, grpc) {
        (Some(http), None) => http.integer(200..=599).map(|status| FaultStatus::Http(status as u16)),
        (None, Some(grpc)) => read_grpc_status(&grpc),
        _ => {
            fields.value().error("it needs one status", "write httpStatus or grpcStatus");
            None
        }
    }
}

/// Reads a gRPC status by its name, or by its number as a string, as Envoy accepts it.
fn read_grpc_status(value: &Value<'_>) -> Option<FaultStatus> {
    let text = value.string()?;
    let by_name = GRPC_CODES.iter().position(|name| *name == text);
    let code = by_name.or_else(|| text.parse().ok().filter(|code| *code < GRPC_CODES.len()));
    if code.is_none() {
        value.unfit("expected a gRPC status such as UNAVAILABLE");
    }
    code.map(|code| FaultStatus::Grpc(code as u8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;

    fn read(text: &str) -> (Option<FaultPolicy>, Vec<String>) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let mut header_names = HeaderNames::default();
        let around = RouteContext {
            route: "r",
            destinations: vec!["v1", "v2"],
            slo: &Slo::default(),
            state_prefix: "p/fault/r/".into(),
            header_names: &mut header_names,
        };
        let fault = FaultPolicy::read(&Value::root(&node, &report), around);
        (fault, report.into_diagnostics().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn istios_block_pastes_in() {
        let (fault, told) = read(
            r#"{"delay": {"percentage": {"value": 0.1}, "fixedDelay": "5s"},
                "abort": {"percentage": {"value": 50}, "httpStatus": 400}}"#,
        );
        let fault = fault.unwrap();
        assert_eq!(told, [] as [&str; 0]);
        assert_eq!(fault.delay, Some((Fraction::from_ppm(1_000), Delay::Fixed(5_000_000_000))));
        assert_eq!(fault.abort, Some((Fraction::from_ppm(500_000), Abort::Answer(FaultStatus::Http(400)))));
        let (fault, _) = read(r#"{"abort": {"percentage": {"value": 1}, "grpcStatus": "UNAVAILABLE"}}"#);
        assert_eq!(fault.unwrap().abort, Some((Fraction::from_ppm(10_000), Abort::Answer(FaultStatus::Grpc(14)))));
    }

    #[test]
    fn a_distribution_is_read_in_any_order() {
        let (fault, told) = read(
            r#"{"delay": {"percentage": {"value": 1}, "distribution": {"p99.9": "1s", "p50": "100ms", "p95": "400ms"}}}"#,
        );
        assert_eq!(told, [] as [&str; 0]);
        let Some((_, Delay::Distribution(distribution))) = fault.unwrap().delay else { panic!("no distribution") };
        let expected = [(500_000, 100_000_000), (950_000, 400_000_000), (999_000, 1_000_000_000)];
        assert_eq!(*distribution.quantiles, expected.map(|(ppm, time)| (Fraction::from_ppm(ppm), time)));
    }

    #[test]
    fn distributions_that_are_none_are_refused() {
        for (quantiles, expected) in [
            ("{}", "0 quantiles"),
            (r#"{"p50": "2s", "p99": "1s"}"#, "does not increase"),
            (r#"{"p50": "1s", "p99": "1s"}"#, "does not increase"),
            (r#"{"p50": "1s", "p50.0": "2s"}"#, "does not increase"),
            (r#"{"p0": "1s"}"#, "no percentile"),
            (r#"{"p101": "1s"}"#, "no percentile"),
            (r#"{"p-1": "1s"}"#, "no percentile"),
            (r#"{"median": "1s"}"#, "no percentile"),
            (r#"{"p50": "-1s"}"#, "expected a duration"),
            (r#"{"p50": "25h"}"#, "expected a duration"),
            ("7", "expected an object"),
        ] {
            let text = format!(r#"{{"delay": {{"percentage": {{"value": 1}}, "distribution": {quantiles}}}}}"#);
            let (fault, told) = read(&text);
            assert!(told.iter().any(|told| told.starts_with("error") && told.contains(expected)), "{text}: {told:?}");
            assert!(fault.is_none_or(|fault| fault.delay.is_none()), "{text}");
        }
    }

    #[test]
    fn bad_faults_are_refused() {
        for (text, expected) in [
            (r#"{}"#, "without delay or abort"),
            (r#"{"abort": {"percentage": {"value": 1}}}"#, "needs one status"),
            (r#"{"abort": {"percentage": {"value": 1}, "httpStatus": 199}}"#, "from 200 to 599"),
            (r#"{"abort": {"percentage": {"value": 1}, "grpcStatus": "BANANA"}}"#, "gRPC status"),
            (r#"{"abort": {"percentage": {"value": 1}, "grpcStatus": "17"}}"#, "gRPC status"),
            (r#"{"delay": {"percentage": {"value": 101}, "fixedDelay": "1s"}}"#, "from 0 to 100"),
            (r#"{"delay": {"percentage": {"value": 1}, "fixedDelay": "-1s"}}"#, "expected a duration"),
            (r#"{"delay": {"percentage": {"value": 1}, "fixedDelay": "0s"}}"#, "expected a duration"),
            (r#"{"delay": {"percentage": {"value": 1}}}"#, "needs one length"),
            (r#"{"delay": {"percentage": {"value": 1}, "fixedDelay": "1s"}, "maxActive": 0}"#, "from 1 to"),
            (
                r#"{"delay": {"percentage": {"value": 1}, "fixedDelay": "1s", "distribution": {"p50": "1s"}}}"#,
                "one length",
            ),
            (r#"{"abort": {"percentage": {"value": 1}, "reset": false}}"#, "expected true"),
            (r#"{"abort": {"percentage": {"value": 1}, "reset": true, "httpStatus": 500}}"#, "gets no response"),
            (
                r#"{"abort": {"percentage": {"value": 1}, "reset": true}, "headerControl": true}"#,
                "reset or headerControl",
            ),
            (
                r#"{"abort": {"percentage": {"value": 1}, "httpStatus": 500}, "headerControl": true}"#,
                "remove the status",
            ),
            (
                r#"{"response": {"percentage": {"value": 1}, "httpStatus": 500}, "headerControl": true}"#,
                "may be asked for",
            ),
            (r#"{"response": {"percentage": {"value": 1}}}"#, "needs one status"),
            (r#"{"response": {"percentage": {"value": 1}, "httpStatus": 204}}"#, "have no body"),
            (r#"{"response": {"percentage": {"value": 1}, "httpStatus": 600}}"#, "from 200 to 599"),
            (r#"{"responseRateLimit": {"fixedLimit": {}}}"#, "bandwidth_limit"),
            (r#"{"source": {}}"#, "without a condition"),
            (r#"{"source": {"properties": {"a..b": {}}}}"#, "attribute's path"),
            (r#"{"source": {"headers": {"b@d": {}}}}"#, "not a header name"),
            (r#"{"source": {"namespace": "shop"}}"#, "unknown field"),
            (r#"{"destinations": ["v3"]}"#, "of a destination of this route"),
            (r#"{"destinations": []}"#, "0 entries"),
            (r#"{"hosts": ["localhost:80"]}"#, "address and port"),
            (r#"{"hosts": ["10.0.0.7"]}"#, "address and port"),
            (r#"{"hosts": ["fd00::7:80"]}"#, "address and port"),
            (
                r#"{"hosts": ["10.0.0.7:80"], "abort": {"percentage": {"value": 1}, "httpStatus": 500}}"#,
                "neither retried",
            ),
            (
                r#"{"hosts": ["10.0.0.7:80"], "response": {"percentage": {"value": 1}, "httpStatus": 500}, "guard": {"admin": {"cluster": "admin"}}}"#,
                "guard.admin where hosts are faulted",
            ),
            (r#"{"attempts": [0]}"#, "from 1 to 100"),
            (r#"{"attempts": "1"}"#, "expected a list"),
        ] {
            let (_, told) = read(text);
            assert!(told.iter().any(|told| told.starts_with("error") && told.contains(expected)), "{text}: {told:?}");
        }
    }

    #[test]
    fn no_block_is_too_odd() {
        let values = [
            "null",
            "true",
            "-1",
            "0.5",
            "1e308",
            r#""""#,
            r#""-1s""#,
            r#""1s""#,
            r#""100%""#,
            r#""\u0000:99999""#,
            "[]",
            "[null]",
            r#"["", "::", ":1", "[]:1", "1:1", "v1"]"#,
            "{}",
            r#"{"": ""}"#,
            r#"{"p": "1s"}"#,
            r#"{"p50": null}"#,
            r#"{"value": 1e9}"#,
            r#"{"exact": "\u0000"}"#,
            r#"{"a": {"regex": "("}}"#,
            r#"{".": {}}"#,
        ];
        let fields = [
            "headerControl",
            "maxActive",
            "markAnswers",
            "mode",
            "key",
            "guard",
            "destinations",
            "hosts",
            "attempts",
            "responseRateLimit",
            "delay",
            "abort",
            "response",
            "source",
            "delay/percentage",
            "delay/percent",
            "delay/fixedDelay",
            "delay/distribution",
            "abort/percentage",
            "abort/httpStatus",
            "abort/grpcStatus",
            "abort/reset",
            "response/percentage",
            "response/httpStatus",
            "response/grpcStatus",
            "source/headers",
            "source/properties",
        ];
        let good = r#""percentage": {"value": 1}"#;
        for field in fields {
            for value in values {
                let text = match field.split_once('/') {
                    None => format!(r#"{{"abort": {{{good}, "httpStatus": 500}}, "{field}": {value}}}"#),
                    Some((block, field)) => format!(r#"{{"{block}": {{{good}, "{field}": {value}}}}}"#),
                };
                let (fault, told) = read(&text);
                let is_refused = told.iter().any(|told| told.starts_with("error"));
                assert!(is_refused || fault.is_some(), "{text}: refused without a reason");
            }
        }
    }
}
