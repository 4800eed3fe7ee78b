//! The counters of trace propagation: what requests arrived with, and what was done about it.

use super::decision::{Arrived, Continuation};
use super::formats::Format;
use super::notes::{Note, Notes};
use super::w3c::Invalid;
use crate::host::{MetricId, Metrics};
use crate::telemetry::Scope;

/// The counters of one kind of request.
#[derive(Debug)]
pub(super) struct TraceMetrics {
    /// In the order of [`ARRIVED`].
    arrived: Vec<MetricId>,
    /// In the order of [`NOTES`].
    notes: Vec<MetricId>,
    /// In the order of [`Format::ALL`].
    from: Vec<MetricId>,
}

/// What a request arrives with; after the first three the reasons of the third.
const ARRIVED: [&str; 9] = [
    "valid",
    "missing",
    "invalid",
    "invalid.duplicate",
    "invalid.shape",
    "invalid.version",
    "invalid.character",
    "invalid.zero_trace_id",
    "invalid.zero_parent_id",
];

/// What is done about it.
const NOTES: [(Note, &str); 8] = [
    (Note::Restarted, "restarted"),
    (Note::Bridged, "bridged"),
    (Note::Repaired, "repaired"),
    (Note::Ambiguous, "ambiguous"),
    (Note::Truncated, "truncated"),
    (Note::Converted, "converted"),
    (Note::BadTracestate, "tracestate_invalid"),
    (Note::Displaced, "displaced"),
];

impl TraceMetrics {
    pub(super) fn define(trace: &Scope<'_, impl Metrics>) -> TraceMetrics {
        let from = trace.within("from");
        TraceMetrics {
            arrived: ARRIVED.iter().map(|name| trace.counter(name)).collect(),
            notes: NOTES.iter().map(|(_, name)| trace.counter(name)).collect(),
            from: Format::ALL.iter().map(|(name, _)| from.counter(name)).collect(),
        }
    }

    /// Counts what a request arrived with and what was done about it.
    pub(super) fn count(&self, continuation: &Continuation, metrics: &impl Metrics) {
        let add = |metric: Option<&MetricId>| {
            if let Some(metric) = metric {
                metrics.add(*metric, 1);
            }
        };
        let (arrived, reason) = match continuation.arrived {
            Arrived::Decided => return,
            Arrived::Valid => (0, None),
            Arrived::Missing => (1, None),
            Arrived::Invalid(Invalid::Duplicate) => (2, Some(3)),
            Arrived::Invalid(Invalid::Shape) => (2, Some(4)),
            Arrived::Invalid(Invalid::Version) => (2, Some(5)),
            Arrived::Invalid(Invalid::Character) => (2, Some(6)),
            Arrived::Invalid(Invalid::ZeroTraceId) => (2, Some(7)),
            Arrived::Invalid(Invalid::ZeroParentId) => (2, Some(8)),
        };
        add(self.arrived.get(arrived));
        add(reason.and_then(|reason| self.arrived.get(reason)));
        // Where it came from tells nothing new of W3C's own format.
        if let Some(from) = continuation.from.filter(|from| *from != Format::TraceContext) {
            add(self.from.get(from as usize));
        }
        let notes = continuation.notes;
        if notes != Notes::default() {
            for ((note, _), metric) in NOTES.iter().zip(&self.notes) {
                add(notes.contains(*note).then_some(metric));
            }
        }
    }
}
