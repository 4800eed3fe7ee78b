//! Reads the `guard` block, the name of the experiment and its term.

use super::budget::spacing;
use super::guard::GuardPolicy;
use crate::document::{Fields, Value};
use crate::outlier::AdminEndpoint;
use crate::slo::Slo;
use crate::units::{Fraction, UnixNanos, duration_or, nanoseconds, read_duration, read_instant};
use std::time::Duration;

const MIN_DURATION: Duration = Duration::from_secs(1);

impl GuardPolicy {
    /// Reads these fields of a `fault` block. `slo` is the objective of its route.
    pub(super) fn read(fault: &mut Fields<'_>, slo: &Slo) -> GuardPolicy {
        let mut guard = GuardPolicy { latency_p95: slo.latency_p99, ..GuardPolicy::default() };
        if let Some(value) = fault.optional("guard") {
            guard.read_block(&value, slo);
        }
        guard.experiment = fault.optional("experiment").and_then(|value| value.name()).map(Into::into);
        let until = fault.optional("until").and_then(|value| read_instant(&value));
        let lease = fault.optional("lease").and_then(|value| read_lease(&value));
        if until.is_some() || lease.is_some() {
            let (begin, end) = lease.unwrap_or((UnixNanos::ZERO, UnixNanos::MAX));
            guard.term = Some((begin, end.min(until.unwrap_or(UnixNanos::MAX))));
        }
        guard
    }

    fn read_block(&mut self, value: &Value<'_>, slo: &Slo) {
        let Some(mut fields) = value.object() else { return };
        self.window = duration_or(&mut fields, "window", MIN_DURATION, self.window);
        self.hold_down = duration_or(&mut fields, "holdDown", MIN_DURATION, self.hold_down);
        let latency = duration_or(&mut fields, "latencyP95", Duration::from_millis(1), self.latency_p95.unwrap_or(0));
        self.latency_p95 = Some(latency).filter(|latency| *latency > 0);
        for (name, field) in [("errorRate", &mut self.error_rate), ("ejectedPercent", &mut self.ejected)] {
            *field = fields.optional(name).and_then(|value| Fraction::read(&value)).unwrap_or(*field);
        }
        self.min_requests = fields.integer_or("minRequests", 1..=1_000_000, self.min_requests);
        self.latch_after = fields.integer_or("latchAfter", 1..=100, self.latch_after.into()) as u8;
        if let Some(value) = fields.optional("budget") {
            let share = Fraction::read(&value);
            self.spacing = slo.availability.zip(share).and_then(|(availability, share)| spacing(availability, share));
            if slo.availability.is_none() {
                value.error("a budget without an objective", "write slo: {availability: \"99.9%\"} on the route");
            } else if share.is_some() && self.spacing.is_none() {
                value.error("a budget that lets nothing fail", "write more than 0%, of an availability below 100%");
            }
        }
        self.admin = fields.optional("admin").and_then(|value| read_admin(&value));
        let on_unknown = fields.optional("onUnknown");
        if let (Some(value), None) = (&on_unknown, &self.admin) {
            value.warning("onUnknown without admin", "nothing can be unknown: write admin, or remove it");
        }
        let continues = on_unknown.and_then(|value| value.one_of(&[("suspend", false), ("continue", true)]));
        self.continues_unknown = continues.unwrap_or(false);
        fields.end();
    }
}

fn read_admin(value: &Value<'_>) -> Option<AdminEndpoint> {
    const DEFAULT_INTERVAL: u64 = 5_000_000_000;
    let mut fields = value.object()?;
    let cluster = fields.required("cluster").and_then(|value| value.text());
    let interval = duration_or(&mut fields, "interval", MIN_DURATION, DEFAULT_INTERVAL);
    fields.end();
    Some(AdminEndpoint { cluster: cluster?.into(), interval })
}

/// Reads `{renewed, duration}`: the beginning and the end of the lease. The lease begins at the instant in the document, not
/// when a proxy reads it first, so that the restart of a proxy does not prolong it.
fn read_lease(value: &Value<'_>) -> Option<(UnixNanos, UnixNanos)> {
    let mut fields = value.object()?;
    let renewed = fields.required("renewed").and_then(|value| read_instant(&value));
    let duration = fields.required("duration").and_then(|value| read_duration(&value, MIN_DURATION));
    fields.end();
    let renewed = renewed?;
    Some((renewed, renewed.saturating_add(nanoseconds(duration?))))
}
