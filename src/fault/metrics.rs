//! The public metrics of fault injection. They are output only.

use super::decision::{DrawnFaults, SkipReason};
use super::guard::{GuardPhase, GuardState};
use super::policy::Abort;
use crate::host::{MetricId, Metrics};
use crate::policy::label;
use crate::telemetry::Scope;

/// The metrics of one route: the injected faults, and for each reason how often none was injected.
#[derive(Debug)]
pub(super) struct FaultMetrics {
    delays: MetricId,
    aborts: MetricId,
    resets: MetricId,
    pub(super) responses: MetricId,
    not_drawn: MetricId,
    max_active: MetricId,
    suspended: MetricId,
    unknown: MetricId,
    probing: MetricId,
    expired: MetricId,
    budget: MetricId,
    shadow: MetricId,
    overflow: MetricId,
}

impl FaultMetrics {
    pub(super) fn define(fault: &Scope<'_, impl Metrics>) -> FaultMetrics {
        FaultMetrics {
            delays: fault.counter("delays"),
            aborts: fault.counter("aborts"),
            resets: fault.counter("resets"),
            responses: fault.counter("responses"),
            not_drawn: fault.counter("not_drawn"),
            max_active: fault.counter("max_active"),
            suspended: fault.counter("suspended"),
            unknown: fault.counter("unknown"),
            probing: fault.counter("probing"),
            expired: fault.counter("expired"),
            budget: fault.counter("budget"),
            shadow: fault.counter("shadow"),
            overflow: fault.counter("overflow"),
        }
    }

    /// Counts the injected faults of a request, or the reason for not injecting any. A replaced response is counted when
    /// it is replaced.
    pub(super) fn count(&self, drawn: &DrawnFaults, skipped: Option<SkipReason>, metrics: &impl Metrics) {
        let counter = match skipped {
            Some(SkipReason::NotTargeted) => return,
            Some(SkipReason::NotDrawn) => self.not_drawn,
            Some(SkipReason::Suspended) => self.suspended,
            Some(SkipReason::Unknown) => self.unknown,
            Some(SkipReason::Probing) => self.probing,
            Some(SkipReason::Expired) => self.expired,
            Some(SkipReason::Budget) => self.budget,
            Some(SkipReason::Shadow) => self.shadow,
            Some(SkipReason::Overflow) => self.overflow,
            Some(SkipReason::MaxActive) => self.max_active,
            None => {
                if drawn.delay.is_some() {
                    metrics.add(self.delays, 1);
                }
                match drawn.abort {
                    Some(Abort::Reset) => metrics.add(self.resets, 1),
                    Some(_) => metrics.add(self.aborts, 1),
                    None => {}
                }
                return;
            }
        };
        metrics.add(counter, 1);
    }
}

/// The state of an experiment on one destination.
#[derive(Clone, Copy, Debug)]
pub(super) struct GuardMetrics {
    /// 0 armed, 1 suspended, 2 probing, 3 latched.
    state: MetricId,
    /// The number of suspensions.
    suspensions: MetricId,
    /// The earliest end of the suspension, in milliseconds of the monotonic clock; 0 if the experiment is not suspended.
    suspended_until: MetricId,
}

impl GuardMetrics {
    pub(super) fn define(fault: &Scope<'_, impl Metrics>) -> GuardMetrics {
        GuardMetrics {
            state: fault.gauge("state"),
            suspensions: fault.gauge("suspensions"),
            suspended_until: fault.gauge("suspended_until_ms"),
        }
    }

    pub(super) fn show(&self, state: GuardState, metrics: &impl Metrics) {
        const MILLISECOND: u64 = 1_000_000;
        let until = match state.phase {
            GuardPhase::Suspended(until) => until.as_nanos().div_ceil(MILLISECOND),
            _ => 0,
        };
        metrics.set_gauge(self.suspended_until, until);
        metrics.set_gauge(self.suspensions, u64::from(state.suspensions));
        metrics.set_gauge(self.state, u64::from(state.phase.number()));
    }
}

/// What an experiment on hosts or attempts has shown.
#[derive(Debug)]
pub(super) struct HostExperimentMetrics {
    /// First attempts.
    pub(super) requests: MetricId,
    /// Later attempts.
    pub(super) retries: MetricId,
    /// Attempts whose response was no failure.
    pub(super) succeeded: MetricId,
    /// Retries among them.
    pub(super) masked: MetricId,
    /// Requests at a place where hosts and attempts are unknown.
    pub(super) misplaced: MetricId,
    /// In the order of the targeted hosts.
    pub(super) hosts: Vec<HostMetrics>,
}

/// What has happened to one host.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostMetrics {
    /// Attempts that reached the host, and the faulted ones among them.
    pub(super) attempts: MetricId,
    pub(super) faults: MetricId,
    /// The number of its ejections, whether it is ejected now, the number of faults before the last ejection, and how
    /// long the last ejection lasted.
    pub(super) ejections: MetricId,
    pub(super) ejected: MetricId,
    pub(super) errors_until_ejection: MetricId,
    pub(super) ejected_ms: MetricId,
}

impl HostExperimentMetrics {
    pub(super) fn define(addresses: &[Box<str>], fault: &Scope<'_, impl Metrics>) -> HostExperimentMetrics {
        let experiment = fault.within("experiment");
        let host = |address: &str| HostMetrics::define(&fault.within("host").within(&label(address)));
        HostExperimentMetrics {
            requests: experiment.counter("requests"),
            retries: experiment.counter("retries"),
            succeeded: experiment.counter("succeeded"),
            masked: experiment.counter("masked"),
            misplaced: experiment.counter("misplaced"),
            hosts: addresses.iter().map(|address| host(address)).collect(),
        }
    }
}

impl HostMetrics {
    fn define(host: &Scope<'_, impl Metrics>) -> HostMetrics {
        HostMetrics {
            attempts: host.counter("attempts"),
            faults: host.counter("faults"),
            ejections: host.counter("ejections"),
            ejected: host.gauge("ejected"),
            errors_until_ejection: host.gauge("errors_until_ejection"),
            ejected_ms: host.gauge("ejected_ms"),
        }
    }
}
