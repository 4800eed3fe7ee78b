//! Reads a route's `fault` block.

use super::guard::Guard;
use super::policy::{Abort, DrawnFrom, Fault};
use crate::document::{Fields, Value};
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

const LEAST_DELAY: Duration = Duration::from_millis(1);

impl Fault {
    /// Reads the block of the route called `route`, whose objective is `slo`.
    pub fn read(value: &Value<'_>, route: &str, slo: &Slo) -> Option<Fault> {
        let mut fields = value.object()?;
        let delay = fields.optional("delay").and_then(|value| read_delay(&value));
        let abort = fields.optional("abort").and_then(|value| read_abort(&value));
        let shadow = fields.optional("mode").and_then(|value| value.one_of(&[("enforce", false), ("shadow", true)]));
        let drawn_from = fields
            .optional("key")
            .and_then(|value| value.one_of(&[("traceId", DrawnFrom::TraceId), ("random", DrawnFrom::Random)]));
        let guard = Guard::read(&mut fields, slo);
        for field in ["headerControl", "maxActive", "response", "target"] {
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
            guard,
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

fn read_delay(value: &Value<'_>) -> Option<(Fraction, u64)> {
    let mut fields = value.object()?;
    let percentage = read_percentage(&mut fields);
    let delay = fields.required("fixedDelay").and_then(|value| read_duration(&value, LEAST_DELAY));
    fields.refuse("exponentialDelay", "Istio does not implement it either; write fixedDelay");
    fields.not_yet("distribution");
    fields.end();
    Some((percentage?, nanoseconds(delay?)))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;

    fn read(text: &str) -> (Option<Fault>, Vec<String>) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let fault = Fault::read(&Value::root(&node, &report), "r", &Slo::default());
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
        assert_eq!(fault.delay, Some((Fraction::from_ppm(1_000), 5_000_000_000)));
        assert_eq!(fault.abort, Some((Fraction::from_ppm(500_000), Abort::Http(400))));
        let (fault, _) = read(r#"{"abort": {"percentage": {"value": 1}, "grpcStatus": "UNAVAILABLE"}}"#);
        assert_eq!(fault.unwrap().abort, Some((Fraction::from_ppm(10_000), Abort::Grpc(14))));
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
            (r#"{"delay": {"percentage": {"value": 1}}}"#, "fixedDelay is missing"),
            (r#"{"delay": {"percentage": {"value": 1}, "fixedDelay": "1s"}, "maxActive": 5}"#, "not yet supported"),
        ] {
            let (_, told) = read(text);
            assert!(told.iter().any(|told| told.starts_with("error") && told.contains(expected)), "{text}: {told:?}");
        }
    }
}
