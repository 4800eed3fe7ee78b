//! Reads the `trace` block.

use super::policy::{Edge, Trace};
use crate::document::{Fields, Value};
use crate::units::Fraction;

/// Istio's default: one new trace in a hundred is sampled.
const DEFAULT_SAMPLING: Fraction = Fraction::from_ppm(10_000);

impl Trace {
    /// Reads the block.
    pub fn read(value: &Value<'_>) -> Option<Trace> {
        let mut fields = value.object()?;
        for field in ["extract", "inject"] {
            read_formats(&mut fields, field);
        }
        let edge = fields.optional("edge").and_then(|value| match value.as_string() {
            Some("restartExternal") => {
                value.error("restartExternal is not yet supported", "expected one of continue, restart, ignore");
                None
            }
            _ => value.one_of(&[("continue", Edge::Continue), ("restart", Edge::Restart), ("ignore", Edge::Ignore)]),
        });
        let sampling = fields.optional("sampling").and_then(|value| {
            let mut fields = value.object()?;
            let percentage = fields.required("percentage").and_then(|value| Fraction::read(&value));
            fields.end();
            percentage
        });
        for (field, only) in [("direction", "auto"), ("response", "none")] {
            if let Some(value) = fields.optional(field)
                && value.string().is_some_and(|word| word != only)
            {
                value.unfit(format!("only {only} is supported yet"));
            }
        }
        fields.not_yet("bridge");
        fields.end();
        Some(Trace { edge: edge.unwrap_or(Edge::Continue), sampling: sampling.unwrap_or(DEFAULT_SAMPLING) })
    }
}

fn read_formats(fields: &mut Fields<'_>, field: &'static str) {
    const LATER: [&str; 8] = ["b3", "b3multi", "jaeger", "xray", "gcp", "datadog", "ottrace", "grpc"];
    for format in fields.optional(field).and_then(|value| value.array()).unwrap_or_default() {
        match format.string() {
            Some("tracecontext") | None => {}
            Some(name) if LATER.contains(&name) => {
                format.error(format!("{name} is not yet supported"), "write tracecontext");
            }
            Some(_) => format.unfit("expected tracecontext"),
        }
    }
}
