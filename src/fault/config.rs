//! Reads a route's `fault` block.

use super::guard::Guard;
use super::policy::{Abort, Delay, Distribution, DrawnFrom, Fault};
use crate::decimal::parse_decimal;
use crate::document::{Fields, Value, quoted};
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

const LEAST_DELAY: Duration = Duration::from_millis(1);

/// The most quantiles of a distribution.
const MAX_QUANTILES: usize = 16;

impl Fault {
    /// Reads the block of the route called `route`.
    pub fn read(value: &Value<'_>, route: &str) -> Option<Fault> {
        let mut fields = value.object()?;
        let delay = fields.optional("delay").and_then(|value| read_delay(&value));
        let abort = fields.optional("abort").and_then(|value| read_abort(&value));
        let shadow = fields.optional("mode").and_then(|value| value.one_of(&[("enforce", false), ("shadow", true)]));
        let drawn_from = fields
            .optional("key")
            .and_then(|value| value.one_of(&[("traceId", DrawnFrom::TraceId), ("random", DrawnFrom::Random)]));
        let guard = fields.optional("guard").map_or(Some(Guard::default()), |value| read_guard(&value));
        for field in ["headerControl", "maxActive", "until", "lease", "response", "target"] {
            fields.not_yet(field);
        }
        if delay.is_none() && abort.is_none() && !value_has(&mut fields, ["delay", "abort"]) {
            value.error("a fault without delay or abort", "write delay, abort, or both");
        }
        fields.end();
        Some(Fault {
            delay,
            abort,
            drawn_from: drawn_from.unwrap_or(DrawnFrom::TraceId),
            shadow: shadow.unwrap_or(false),
            guard: guard?,
            salt: xxh64(route.as_bytes(), 0),
        })
    }
}

fn value_has(fields: &mut Fields<'_>, names: [&'static str; 2]) -> bool {
    names.into_iter().any(|name| fields.optional(name).is_some())
}

/// Istio's `percentage`, or its deprecated integer `percent`. Neither: no request, as in Istio.
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
            fields.value().warning("no percentage: no request is faulted", "write percentage: {value: 5.0}");
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
        (Some(fixed), None) => read_duration(&fixed, LEAST_DELAY).map(|delay| Delay::Fixed(nanoseconds(delay))),
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
    for (name, delay) in entries {
        let quantile = name.strip_prefix('p').and_then(|percent| parse_decimal(percent, 10_000));
        let Some(quantile @ 1..=1_000_000) = quantile else {
            let help = "expected a percentile from p0.0001 to p100, such as p95 or p99.9";
            delay.error(format!("{} is no percentile", quoted(name)), help);
            return None;
        };
        quantiles.push((Fraction::from_ppm(quantile as u32), nanoseconds(read_duration(&delay, LEAST_DELAY)?)));
    }
    quantiles.sort_unstable();
    let rises = |pair: &[(Fraction, u64)]| matches!(pair, [(a, shorter), (b, longer)] if a < b && shorter < longer);
    if !quantiles.windows(2).all(rises) {
        value.error("a distribution that does not increase", "write a longer delay for each higher percentile");
        return None;
    }
    Some(Distribution { quantiles: quantiles.into() })
}

fn read_abort(value: &Value<'_>) -> Option<(Fraction, Abort)> {
    let mut fields = value.object()?;
    let percentage = read_percentage(&mut fields);
    let http = fields.optional("httpStatus");
    let grpc = fields.optional("grpcStatus");
    fields.refuse("http2Error", "Istio does not implement it either; write httpStatus or grpcStatus");
    fields.end();
    let abort = match (http, grpc) {
        (Some(http), None) => http.integer(200..=599).map(|status| Abort::Http(status as u16)),
        (None, Some(grpc)) => read_grpc_status(&grpc),
        _ => {
            value.error("an abort needs one status", "write httpStatus or grpcStatus");
            None
        }
    };
    Some((percentage?, abort?))
}

/// A gRPC status by its name, or by its number as text, as Envoy takes it.
fn read_grpc_status(value: &Value<'_>) -> Option<Abort> {
    let text = value.string()?;
    let by_name = GRPC_CODES.iter().position(|name| *name == text);
    let code = by_name.or_else(|| text.parse().ok().filter(|code| *code < GRPC_CODES.len()));
    if code.is_none() {
        value.unfit("expected a gRPC status such as UNAVAILABLE");
    }
    code.map(|code| Abort::Grpc(code as u8))
}

fn read_guard(value: &Value<'_>) -> Option<Guard> {
    let mut fields = value.object()?;
    let mut guard = Guard::default();
    let least = Duration::from_secs(1);
    if let Some(value) = fields.optional("errorRate") {
        guard.error_rate = Fraction::read(&value)?;
    }
    if let Some(value) = fields.optional("minRequests") {
        guard.min_requests = value.integer(1..=1_000_000)?;
    }
    if let Some(value) = fields.optional("window") {
        guard.window = nanoseconds(read_duration(&value, least)?);
    }
    if let Some(value) = fields.optional("holdDown") {
        guard.hold_down = nanoseconds(read_duration(&value, least)?);
    }
    for field in ["ejectedPercent", "latencyP95", "budget", "onUnknown", "admin"] {
        fields.not_yet(field);
    }
    fields.end();
    Some(guard)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;

    fn read(text: &str) -> (Option<Fault>, Vec<String>) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let fault = Fault::read(&Value::root(&node, &report), "r");
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
        assert_eq!(fault.abort, Some((Fraction::from_ppm(500_000), Abort::Http(400))));
        let (fault, _) = read(r#"{"abort": {"percentage": {"value": 1}, "grpcStatus": "UNAVAILABLE"}}"#);
        assert_eq!(fault.unwrap().abort, Some((Fraction::from_ppm(10_000), Abort::Grpc(14))));
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
            (r#"{"delay": {"percentage": {"value": 1}, "fixedDelay": "1s"}, "maxActive": 5}"#, "not yet supported"),
        ] {
            let (_, told) = read(text);
            assert!(told.iter().any(|told| told.starts_with("error") && told.contains(expected)), "{text}: {told:?}");
        }
    }
}
