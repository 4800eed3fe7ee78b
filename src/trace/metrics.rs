//! The counters of trace propagation: what requests arrived with, and what was done about it.

use super::decision::{Extraction, PropagatedContext};
use super::events::{TraceEvent, TraceEvents};
use super::formats::TraceFormat;
use super::w3c::InvalidContext;
use crate::host::{MetricId, Metrics};
use crate::telemetry::Scope;

/// The counters of one kind of request.
#[derive(Debug)]
pub(super) struct TraceMetrics {
    /// In the order of [`EXTRACTIONS`].
    extractions: Vec<MetricId>,
    /// In the order of [`EVENTS`].
    events: Vec<MetricId>,
    /// In the order of [`TraceFormat::ALL`].
    formats: Vec<MetricId>,
}

/// What a request arrives with; after the first three the reasons of the third.
const EXTRACTIONS: [&str; 9] = [
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
const EVENTS: [(TraceEvent, &str); 8] = [
    (TraceEvent::Restarted, "restarted"),
    (TraceEvent::Bridged, "bridged"),
    (TraceEvent::Repaired, "repaired"),
    (TraceEvent::Ambiguous, "ambiguous"),
    (TraceEvent::Truncated, "truncated"),
    (TraceEvent::Converted, "converted"),
    (TraceEvent::InvalidTracestate, "tracestate_invalid"),
    (TraceEvent::Displaced, "displaced"),
];

impl TraceMetrics {
    pub(super) fn define(trace: &Scope<'_, impl Metrics>) -> TraceMetrics {
        let from = trace.within("from");
        TraceMetrics {
            extractions: EXTRACTIONS.iter().map(|name| trace.counter(name)).collect(),
            events: EVENTS.iter().map(|(_, name)| trace.counter(name)).collect(),
            formats: TraceFormat::ALL.iter().map(|(name, _)| from.counter(name)).collect(),
        }
    }

    /// Counts what a request arrived with and what was done about it.
    pub(super) fn count(&self, propagated: &PropagatedContext, metrics: &impl Metrics) {
        let add = |metric: Option<&MetricId>| {
            if let Some(metric) = metric {
                metrics.add(*metric, 1);
            }
        };
        let (extraction, reason) = match propagated.extraction {
            Extraction::Restored => return,
            Extraction::Valid => (0, None),
            Extraction::Missing => (1, None),
            Extraction::Invalid(InvalidContext::Duplicate) => (2, Some(3)),
            Extraction::Invalid(InvalidContext::Shape) => (2, Some(4)),
            Extraction::Invalid(InvalidContext::Version) => (2, Some(5)),
            Extraction::Invalid(InvalidContext::Character) => (2, Some(6)),
            Extraction::Invalid(InvalidContext::ZeroTraceId) => (2, Some(7)),
            Extraction::Invalid(InvalidContext::ZeroParentId) => (2, Some(8)),
        };
        add(self.extractions.get(extraction));
        add(reason.and_then(|reason| self.extractions.get(reason)));
        // W3C's own format is counted as valid already, so only the other formats are counted by name.
        if let Some(format) = propagated.format.filter(|format| *format != TraceFormat::TraceContext) {
            add(self.formats.get(format as usize));
        }
        let events = propagated.events;
        if events != TraceEvents::default() {
            for ((event, _), metric) in EVENTS.iter().zip(&self.events) {
                add(events.contains(*event).then_some(metric));
            }
        }
    }
}
