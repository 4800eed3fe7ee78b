//! An experiment on hosts or attempts, as an upstream filter sees it: attempt by attempt.
//!
//! Envoy does not tell a filter that a host is ejected. What a filter sees is that no attempt reaches the host any more
//! while others go on; that is taken for an ejection once ten attempts for each host of the cluster have passed it by.
//! So the number of errors until then is exact, and the time that it lasted is the time between the last attempt that
//! reached the host and the first that reaches it again. What clients saw is known as far as attempts tell: a request
//! with a successful attempt succeeded, and where that was a retry, the retry masked a failure.

use crate::fault::{Target, attempt, change};
use crate::host::Host;
use crate::policy::Route;
use crate::telemetry::{HostMeters, ReportMeters, RouteMeters};

const MILLISECOND: u64 = 1_000_000;

/// How many attempts pass a host by, for each host of its cluster, until it is taken for ejected.
const PASSED_BY: u64 = 10;

/// An attempt until its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// An index into the policy's routes.
    pub route: usize,
    is_retry: bool,
}

/// What is known of a route's experiment.
#[derive(Clone, Copy)]
pub(super) struct Report<'p> {
    route: &'p Route,
    target: &'p Target,
    meters: &'p ReportMeters,
}

impl<'p> Report<'p> {
    /// The report of `route`, where it has such an experiment.
    pub fn new(route: &'p Route, meters: &'p RouteMeters) -> Option<Report<'p>> {
        let (fault, meters) = route.fault.as_ref().zip(meters.report.as_ref())?;
        Some(Report { route, target: &fault.target, meters })
    }

    /// Notes an attempt, and whether it is faulted. `None` where this is no upstream filter.
    pub fn begin(&self, route: usize, is_faulted: bool, host: &impl Host) -> Option<Attempt> {
        let Report { target, meters, .. } = self;
        let Some(number) = attempt(host) else {
            if host.value(meters.misplaced) == 0 {
                log::warn!(
                    "route {}: hosts and attempts are known to an upstream filter only; nothing is injected here",
                    self.route.name
                );
            }
            host.add(meters.misplaced, 1);
            return None;
        };
        let is_retry = number > 1;
        host.add(if is_retry { meters.retries } else { meters.requests }, 1);
        let reached = target.host(host);
        for (index, known) in meters.hosts.iter().enumerate() {
            if reached == Some(index) {
                self.reach(index, known, is_faulted, host);
            } else {
                self.pass_by(index, known, host);
            }
        }
        Some(Attempt { route, is_retry })
    }

    /// Notes how an attempt was answered, for all that the router can tell.
    pub fn answer(&self, attempt: Attempt, failed: bool, host: &impl Host) {
        if !failed {
            host.add(self.meters.succeeded, 1);
            if attempt.is_retry {
                host.add(self.meters.masked, 1);
            }
        }
    }

    /// How many attempts went to other hosts than `known`.
    fn elsewhere(&self, known: &HostMeters, host: &impl Host) -> u64 {
        let all = host.value(self.meters.requests).saturating_add(host.value(self.meters.retries));
        all.saturating_sub(host.value(known.attempts))
    }

    fn reach(&self, index: usize, known: &HostMeters, is_faulted: bool, host: &impl Host) {
        let now = host.now().as_nanos() / MILLISECOND;
        if host.value(known.ejected) == 1 && self.turns(index, 0, host) {
            let away = now.saturating_sub(host.value(known.seen_ms));
            host.set_gauge(known.ejected, 0);
            host.set_gauge(known.ejected_ms, away);
            host.set_gauge(known.faults_before, host.value(known.faults));
            self.log(index, "returned", "ejected_ms", away, host);
        }
        host.add(known.attempts, 1);
        if is_faulted {
            host.add(known.faults, 1);
        }
        host.set_gauge(known.seen_ms, now);
        host.set_gauge(known.elsewhere_before, self.elsewhere(known, host));
    }

    fn pass_by(&self, index: usize, known: &HostMeters, host: &impl Host) {
        let errors = host.value(known.faults).saturating_sub(host.value(known.faults_before));
        let passed_by = self.elsewhere(known, host).saturating_sub(host.value(known.elsewhere_before));
        // The fewest that make a cluster with a choice are two.
        if errors == 0 || host.value(known.ejected) == 1 || passed_by < 2 * PASSED_BY {
            return;
        }
        let endpoints = host.property(&["upstream", "num_endpoints"]);
        let endpoints = endpoints.and_then(|count| count.try_into().ok()).map_or(2, u64::from_le_bytes);
        if passed_by >= endpoints.saturating_mul(PASSED_BY) && self.turns(index, 1, host) {
            host.set_gauge(known.ejected, 1);
            host.set_gauge(known.errors_until_ejection, errors);
            host.add(known.ejections, 1);
            self.log(index, "ejected", "errors", errors, host);
        }
    }

    /// Whether this worker is the one to tell that a host is ejected (1) or back (0).
    fn turns(&self, index: usize, to: u64, store: &impl Host) -> bool {
        let word = self.target.hosts.get(index).map_or("", |known| &known.word);
        change(store, word, &|known| (known != to).then_some(to)) == Ok(true)
    }

    #[cold]
    fn log(&self, index: usize, what: &str, name: &str, value: u64, host: &impl Host) {
        let ReportMeters { requests, retries, succeeded, masked, .. } = self.meters;
        let [requests, retries, succeeded, masked] =
            [requests, retries, succeeded, masked].map(|counter| host.value(*counter));
        let address = self.target.hosts.get(index).map_or("", |known| &known.address);
        log::warn!(
            "fault experiment: route={:?} host={address} event={what} {name}={value} requests={requests} \
             retries={retries} masked={masked} not_succeeded={}",
            self.route.name,
            requests.saturating_sub(succeeded),
        );
    }
}
