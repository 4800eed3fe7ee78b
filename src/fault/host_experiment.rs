//! An experiment on single hosts or attempts, as an upstream filter observes it attempt by attempt.
//!
//! Envoy does not inform a filter that a host is ejected. A filter observes that no attempt reaches the host any more while
//! other attempts continue; the host is regarded as ejected after ten such attempts for each host of the cluster. So the
//! number of errors until the ejection is exact. The time that the ejection lasted is the time between the last attempt
//! that reached the host and the first attempt that reaches it again. What clients observed is known as far as attempts
//! show it: a request with a successful attempt has succeeded, and if that attempt was a retry, it masked a failure.
//!
//! The counts are one record that all workers share; each attempt and each successful response changes it by one
//! compare-and-swap. The metrics are written from it.

use super::metrics::{HostExperimentMetrics, HostMetrics};
use super::policy::FaultPolicy;
use super::target::attempt_number;
use crate::host::{Host, Metrics};
use crate::shared_data::{Change, Record, SharedCell};
use crate::telemetry::Scope;
use std::cell::Cell;
use std::sync::Arc;
use xxhash_rust::xxh64::xxh64;

const MILLISECOND: u64 = 1_000_000;

/// For each host of the cluster, the number of attempts that miss a host until it is regarded as ejected.
const MISSES_PER_HOST: u64 = 10;

/// The most hosts of a record.
const MAX_HOSTS: usize = 64;

/// An attempt until its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The index of the route among the policy's routes.
    pub(crate) route: u32,
    is_retry: bool,
}

/// The experiment of one route in one worker.
#[derive(Debug)]
pub(super) struct HostExperiment {
    policy: Arc<FaultPolicy>,
    /// The index and the name of the route.
    route: (u32, Box<str>),
    metrics: HostExperimentMetrics,
    cell: SharedCell<ExperimentCounts>,
    /// Identifies the targeted hosts and the experiment: counts of other ones are not continued.
    fingerprint: u64,
    /// Whether this worker has checked that the warning about a misplaced filter was logged.
    has_warned: bool,
}

/// The counts of an experiment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ExperimentCounts {
    fingerprint: u64,
    /// First attempts, later attempts, attempts whose response was no failure, and retries among those.
    requests: u64,
    retries: u64,
    succeeded: u64,
    masked: u64,
    is_misplaced: bool,
    hosts: Vec<HostCounts>,
}

/// The counts of one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct HostCounts {
    attempts: u64,
    faults: u64,
    is_ejected: bool,
    /// When an attempt last reached the host, in milliseconds, and how many attempts had missed it by then.
    seen_ms: u64,
    missed_before: u64,
    /// The number of faults at its last return.
    faults_before: u64,
}

/// A change of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostEvent {
    Ejected { errors: u64 },
    Returned { away_ms: u64 },
}

/// Changes of hosts, each with the index of its host.
type HostEvents = Vec<(usize, HostEvent)>;

impl Record for ExperimentCounts {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        let mut put = |number: u64| bytes.extend_from_slice(&number.to_le_bytes());
        let ExperimentCounts { fingerprint, requests, retries, succeeded, masked, is_misplaced, hosts } = self;
        [*fingerprint, *requests, *retries, *succeeded, *masked, u64::from(*is_misplaced)]
            .into_iter()
            .for_each(&mut put);
        for host in hosts {
            let HostCounts { attempts, faults, is_ejected, seen_ms, missed_before, faults_before } = *host;
            [attempts, faults, u64::from(is_ejected), seen_ms, missed_before, faults_before]
                .into_iter()
                .for_each(&mut put);
        }
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<ExperimentCounts> {
        let (numbers, rest) = bytes.as_chunks::<8>();
        let (rows, odd) = numbers.as_chunks::<6>();
        let mut rows = rows.iter().map(|row| row.map(u64::from_le_bytes));
        let [fingerprint, requests, retries, succeeded, masked, misplaced] = rows.next()?;
        if schema != Self::SCHEMA || !rest.is_empty() || !odd.is_empty() || rows.len() > MAX_HOSTS {
            return None;
        }
        let host = |[attempts, faults, ejected, seen_ms, missed_before, faults_before]: [u64; 6]| HostCounts {
            attempts,
            faults,
            is_ejected: ejected == 1,
            seen_ms,
            missed_before,
            faults_before,
        };
        let is_misplaced = misplaced == 1;
        let hosts = rows.map(host).collect();
        Some(ExperimentCounts { fingerprint, requests, retries, succeeded, masked, is_misplaced, hosts })
    }
}

impl ExperimentCounts {
    /// How many attempts went to other hosts than the one with these counts.
    fn missed(&self, host: &HostCounts) -> u64 {
        self.requests.saturating_add(self.retries).saturating_sub(host.attempts)
    }

    /// Counts an attempt that reaches the host with this index.
    fn record_hit(&mut self, index: usize, is_faulted: bool, now_ms: u64) -> Option<HostEvent> {
        let mut host = *self.hosts.get(index)?;
        let mut event = None;
        if host.is_ejected {
            host.is_ejected = false;
            host.faults_before = host.faults;
            event = Some(HostEvent::Returned { away_ms: now_ms.saturating_sub(host.seen_ms) });
        }
        host.attempts = host.attempts.saturating_add(1);
        host.faults = host.faults.saturating_add(u64::from(is_faulted));
        host.seen_ms = now_ms;
        host.missed_before = self.missed(&host);
        *self.hosts.get_mut(index)? = host;
        event
    }

    /// Counts an attempt that goes to another host. `endpoints` returns the number of hosts of the cluster.
    fn record_miss(&mut self, index: usize, endpoints: &dyn Fn() -> u64) -> Option<HostEvent> {
        let host = *self.hosts.get(index)?;
        let errors = host.faults.saturating_sub(host.faults_before);
        let missed = self.missed(&host).saturating_sub(host.missed_before);
        // A cluster with a choice has two hosts at least.
        if errors == 0 || host.is_ejected || missed < 2 * MISSES_PER_HOST {
            return None;
        }
        if missed < endpoints().saturating_mul(MISSES_PER_HOST) {
            return None;
        }
        self.hosts.get_mut(index)?.is_ejected = true;
        Some(HostEvent::Ejected { errors })
    }
}

impl HostExperiment {
    /// The experiment of the route with this index and name. `key` is the key of its counts.
    pub(super) fn new(
        policy: &Arc<FaultPolicy>,
        route: (u32, &str),
        key: String,
        fault: &Scope<'_, impl Metrics>,
    ) -> HostExperiment {
        let hosts = &policy.target.hosts;
        let fingerprint = |seed, name: &str| xxh64(name.as_bytes(), seed);
        let experiment = fingerprint(0, policy.guard.experiment.as_deref().unwrap_or_default());
        HostExperiment {
            policy: policy.clone(),
            route: (route.0, route.1.into()),
            metrics: HostExperimentMetrics::define(hosts, fault),
            cell: SharedCell::new(key),
            fingerprint: hosts.iter().fold(experiment, |seed, address| fingerprint(seed, address)),
            has_warned: false,
        }
    }

    /// Changes the counts. `None` if the record cannot be written; nothing was changed.
    #[inline(never)]
    fn update(
        &self,
        host: &impl Host,
        change: &dyn Fn(&mut ExperimentCounts) -> HostEvents,
    ) -> Option<(ExperimentCounts, HostEvents)> {
        let updated = self.cell.update(host, |stored| {
            let known = stored.record().filter(|counts| counts.fingerprint == self.fingerprint);
            let mut counts = known.unwrap_or_else(|| ExperimentCounts {
                fingerprint: self.fingerprint,
                hosts: vec![HostCounts::default(); self.metrics.hosts.len()],
                ..ExperimentCounts::default()
            });
            let result = change(&mut counts);
            Change::Write(counts.clone(), (counts, result))
        });
        updated.ok()
    }

    /// Counts an attempt, and whether it is faulted. `None` if this filter is not an upstream filter.
    pub(super) fn begin(&mut self, is_faulted: bool, host: &impl Host) -> Option<Attempt> {
        let Some(number) = attempt_number(host) else {
            host.add(self.metrics.misplaced, 1);
            self.warn_once(host);
            return None;
        };
        let is_retry = number > 1;
        host.add(if is_retry { self.metrics.retries } else { self.metrics.requests }, 1);
        let reached = self.policy.target.host(host);
        let now_ms = host.now().as_nanos() / MILLISECOND;
        let endpoints = || {
            let count = host.property(&["upstream", "num_endpoints"]).and_then(|count| count.try_into().ok());
            count.map_or(2, u64::from_le_bytes)
        };
        let updated = self.update(host, &|counts| {
            let count = if is_retry { &mut counts.retries } else { &mut counts.requests };
            *count = count.saturating_add(1);
            let mut events = HostEvents::new();
            for index in 0..counts.hosts.len() {
                let event = if reached == Some(index) {
                    counts.record_hit(index, is_faulted, now_ms)
                } else {
                    counts.record_miss(index, &endpoints)
                };
                events.extend(event.map(|event| (index, event)));
            }
            events
        });
        if let Some(metrics) = reached.and_then(|index| self.metrics.hosts.get(index)) {
            host.add(metrics.attempts, 1);
            if is_faulted {
                host.add(metrics.faults, 1);
            }
        }
        if let Some((counts, events)) = updated {
            for (index, event) in events {
                self.show(index, event, &counts, host);
            }
        }
        Some(Attempt { route: self.route.0, is_retry })
    }

    /// Counts the response of an attempt as the router sees it.
    pub(super) fn on_response(&self, attempt: Attempt, failed: bool, host: &impl Host) {
        if failed {
            return;
        }
        host.add(self.metrics.succeeded, 1);
        if attempt.is_retry {
            host.add(self.metrics.masked, 1);
        }
        self.update(host, &|counts| {
            counts.succeeded = counts.succeeded.saturating_add(1);
            counts.masked = counts.masked.saturating_add(u64::from(attempt.is_retry));
            HostEvents::new()
        });
    }

    /// Writes the metrics and a log line about a change of a host.
    #[cold]
    #[inline(never)]
    fn show(&self, index: usize, event: HostEvent, counts: &ExperimentCounts, host: &impl Host) {
        let Some(HostMetrics { ejections, ejected, errors_until_ejection, ejected_ms, .. }) =
            self.metrics.hosts.get(index).copied()
        else {
            return;
        };
        let (event, name, value) = match event {
            HostEvent::Ejected { errors } => {
                host.add(ejections, 1);
                host.set_gauge(ejected, 1);
                host.set_gauge(errors_until_ejection, errors);
                ("ejected", "errors", errors)
            }
            HostEvent::Returned { away_ms } => {
                host.set_gauge(ejected, 0);
                host.set_gauge(ejected_ms, away_ms);
                ("returned", "ejected_ms", away_ms)
            }
        };
        let address = self.policy.target.hosts.get(index).map_or("", |address| address);
        let ExperimentCounts { requests, retries, succeeded, masked, .. } = counts;
        log::warn!(
            "fault experiment: route={:?} host={address} event={event} {name}={value} requests={requests} \
             retries={retries} masked={masked} not_succeeded={}",
            self.route.1,
            requests.saturating_sub(*succeeded),
        );
    }

    /// Logs once for all workers that this filter is not an upstream filter.
    #[cold]
    #[inline(never)]
    fn warn_once(&mut self, host: &impl Host) {
        if std::mem::replace(&mut self.has_warned, true) {
            return;
        }
        let was_misplaced = Cell::new(true);
        self.update(host, &|counts| {
            was_misplaced.set(std::mem::replace(&mut counts.is_misplaced, true));
            HostEvents::new()
        });
        if !was_misplaced.get() {
            log::warn!(
                "route {}: hosts and attempts are known to an upstream filter only; nothing is injected here",
                self.route.1
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counts_are_read_as_they_were_written() {
        let host = HostCounts { attempts: 1, is_ejected: true, faults_before: 9, ..HostCounts::default() };
        let counts = ExperimentCounts {
            fingerprint: 7,
            masked: 3,
            is_misplaced: true,
            hosts: vec![host, HostCounts::default()],
            ..ExperimentCounts::default()
        };
        let mut bytes = Vec::new();
        counts.encode(&mut bytes);
        assert_eq!(ExperimentCounts::decode(1, &bytes), Some(counts));
        assert_eq!(ExperimentCounts::decode(2, &bytes), None);
        assert_eq!(ExperimentCounts::decode(1, &bytes[1..]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(mut counts) = ExperimentCounts::decode(1, &bytes) {
                counts.record_hit(0, true, 1);
                counts.record_miss(0, &|| 2);
            }
        }
    }
}
