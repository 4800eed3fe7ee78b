//! Faults: what was injected, why nothing was, and what an experiment on hosts or attempts has shown.

use super::Scope;
use crate::fault::{Abort, Injection, Target, Withheld};
use crate::host::{MetricId, Metrics};
use crate::policy::label;

/// The faults of one route, and why there were none.
#[derive(Clone, Copy, Debug)]
pub struct FaultMeters {
    delays: MetricId,
    aborts: MetricId,
    resets: MetricId,
    responses: MetricId,
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

/// What an experiment on hosts or attempts has shown so far.
#[derive(Debug)]
pub struct ReportMeters {
    /// First attempts.
    pub requests: MetricId,
    /// Later ones.
    pub retries: MetricId,
    /// Attempts whose answer was no failure.
    pub succeeded: MetricId,
    /// Those of them that were retries.
    pub masked: MetricId,
    /// Requests that came by where hosts and attempts are not known.
    pub misplaced: MetricId,
    /// In the order of the fault's hosts.
    pub hosts: Vec<HostMeters>,
}

/// What became of one host. All workers share it.
#[derive(Clone, Copy, Debug)]
pub struct HostMeters {
    /// Attempts that reached it, and those of them that were faulted.
    pub attempts: MetricId,
    pub faults: MetricId,
    /// How often it has been ejected, whether it is now, after how many faults it was, and for how long the last time.
    pub ejections: MetricId,
    pub ejected: MetricId,
    pub errors_until_ejection: MetricId,
    pub ejected_ms: MetricId,
    /// When an attempt last reached it, and how many had gone elsewhere by then.
    pub seen_ms: MetricId,
    pub elsewhere_before: MetricId,
    /// How many faults there were when it last came back.
    pub faults_before: MetricId,
}

impl FaultMeters {
    pub(super) fn define(fault: &Scope<'_, impl Metrics>) -> FaultMeters {
        FaultMeters {
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

    /// Counts what was injected, or why nothing was. An answer is counted when it has been replaced.
    pub fn count(&self, drawn: &Injection, withheld: Option<Withheld>, metrics: &impl Metrics) {
        let reason = match withheld {
            Some(Withheld::NotAimed) => return,
            Some(Withheld::NotDrawn) => self.not_drawn,
            Some(Withheld::Suspended) => self.suspended,
            Some(Withheld::Unknown) => self.unknown,
            Some(Withheld::Probing) => self.probing,
            Some(Withheld::Expired) => self.expired,
            Some(Withheld::Budget) => self.budget,
            Some(Withheld::Shadow) => self.shadow,
            Some(Withheld::Overflow) => self.overflow,
            Some(Withheld::MaxActive) => self.max_active,
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
        metrics.add(reason, 1);
    }

    /// Counts an answer that was replaced.
    pub fn count_response(&self, metrics: &impl Metrics) {
        metrics.add(self.responses, 1);
    }
}

impl ReportMeters {
    pub(super) fn define(target: &Target, fault: &Scope<'_, impl Metrics>) -> ReportMeters {
        let experiment = fault.within("experiment");
        let host = |address: &str| HostMeters::define(&fault.within("host").within(&label(address)));
        ReportMeters {
            requests: experiment.counter("requests"),
            retries: experiment.counter("retries"),
            succeeded: experiment.counter("succeeded"),
            masked: experiment.counter("masked"),
            misplaced: experiment.counter("misplaced"),
            hosts: target.hosts.iter().map(|aim| host(&aim.address)).collect(),
        }
    }
}

impl HostMeters {
    fn define(host: &Scope<'_, impl Metrics>) -> HostMeters {
        HostMeters {
            attempts: host.counter("attempts"),
            faults: host.counter("faults"),
            ejections: host.counter("ejections"),
            ejected: host.gauge("ejected"),
            errors_until_ejection: host.gauge("errors_until_ejection"),
            ejected_ms: host.gauge("ejected_ms"),
            seen_ms: host.gauge("seen_ms"),
            elsewhere_before: host.gauge("elsewhere_before"),
            faults_before: host.gauge("faults_before"),
        }
    }
}
