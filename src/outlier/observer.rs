//! Passive observation of one target in one worker.
//!
//! A [`TargetObserver`] receives each response of its target to a request that was not faulted. It counts requests,
//! failures, outages and slow responses locally, and merges the counts into one record that all workers share
//! ([`SharedCounts`]): after a failure at once, as long as the merge pace permits it, otherwise at the next tick. The guards
//! of all routes that send requests to this target read its totals. If the policy has an `outlierDetection` block, an
//! [`OutlierObserver`] also tallies the responses by host.
//!
//! Invariant: a response without a failure makes no call to shared data, unless a guard has seen a failure and only waits
//! for enough requests to evaluate it.

use super::admin::AdminSnapshot;
use super::hosts::{self, EjectionStats, HostTable, HostTally, MAX_HOSTS, MergeResult, ResponseClass};
use super::metrics::TargetMetrics;
use super::policy::OutlierDetection;
use super::poller::{ClusterName, SharedKeys};
use super::window::Totals;
use super::{is_failure, is_outage};
use crate::evidence::{MERGE_PERIOD, MergePace, SharedCounts};
use crate::host::Host;
use crate::policy::{Policy, Target, label};
use crate::shared_data::{SharedCell, Stored};
use crate::telemetry::Scope;
use crate::units::{Fraction, MonotonicInstant};
use xxhash_rust::xxh64::xxh64;

// The keys of the rows of a target's counts. The key of a row of slow responses is the latency threshold in nanoseconds,
// which is a millisecond at least.
const REQUESTS: usize = 0;
const FAILURES: usize = 1;
const OUTAGES: usize = 2;
const FIRST_SLOW: usize = 3;

/// A response of a target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ObservedResponse {
    pub status: u16,
    /// The gRPC status code; `None` if the response has none.
    pub grpc_status: Option<u16>,
    /// Nanoseconds from the request to the head of the response; 0 if they were not measured.
    pub latency: u64,
}

/// One target in one worker: its counts, its hosts and its metrics.
#[derive(Debug)]
pub(crate) struct TargetObserver {
    metrics: TargetMetrics,
    counts: SharedCounts,
    /// In nanoseconds.
    latency_thresholds: Box<[u64]>,
    hosts: Option<OutlierObserver>,
    admin: Option<AdminState>,
    /// The routes, and their destinations, whose guards read these counts.
    watchers: Vec<(usize, usize)>,
    /// The share of ejected hosts that the metric shows.
    shown: Fraction,
    /// Whether a guard has seen a failure and waits for enough requests.
    is_request_awaited: bool,
    next_merge: MonotonicInstant,
}

/// What the admin endpoint is asked about the target, and what it has reported.
#[derive(Debug)]
struct AdminState {
    interval: u64,
    cluster: SharedCell<ClusterName>,
    /// When this worker looks up Envoy's name of the cluster again.
    next_lookup: MonotonicInstant,
    cell: SharedCell<AdminSnapshot>,
    snapshot: Option<AdminSnapshot>,
}

impl TargetObserver {
    /// The observer of `target`. `None` if no guard watches the target.
    pub(crate) fn new(policy: &Policy, target: &Target, host: &impl Host) -> Option<Box<TargetObserver>> {
        if !target.watched {
            return None;
        }
        let scope = Scope::policy(&policy.name, host).within("target").within(&label(&target.name));
        let thresholds = &*target.latency_thresholds;
        let keys = [REQUESTS as u64, FAILURES as u64, OUTAGES as u64].into_iter().chain(thresholds.iter().copied());
        let mut counts = SharedCounts::new(policy.shared_key("observed/", &target.name), keys.collect(), 1);
        // What other workers have counted before is not part of this worker's windows.
        let _ = counts.merge(host);
        let admin = target.admin.as_ref().map(|admin| {
            let keys = SharedKeys::new(policy, target);
            AdminState {
                interval: admin.interval,
                cluster: keys.cluster,
                next_lookup: MonotonicInstant::ZERO,
                cell: keys.snapshot,
                snapshot: None,
            }
        });
        let mut observer = TargetObserver {
            metrics: TargetMetrics::define(thresholds, target.observes_hosts(), &scope),
            counts,
            latency_thresholds: thresholds.into(),
            hosts: target.detection.map(|detection| OutlierObserver::new(policy, target, detection)),
            admin,
            watchers: Vec::new(),
            shown: Fraction::NONE,
            is_request_awaited: false,
            next_merge: MonotonicInstant::ZERO,
        };
        observer.refresh_hosts(host.now(), host);
        Some(Box::new(observer))
    }

    /// Adds a route and one of its destinations to [`TargetObserver::watchers`].
    pub(crate) fn add_watcher(&mut self, route: usize, destination: usize) {
        self.watchers.push((route, destination));
    }

    /// The routes, and their destinations, whose guards read these counts.
    pub(crate) fn watchers(&self) -> &[(usize, usize)] {
        &self.watchers
    }

    /// Keeps in mind that a guard has seen a failure, and that further requests can suspend its experiment.
    pub(crate) fn await_requests(&mut self) {
        self.is_request_awaited = true;
    }

    /// Counts a response. Returns whether it can change what a guard decides, so that the guards have to check.
    pub(crate) fn record(&mut self, response: ObservedResponse, host: &impl Host) -> bool {
        let ObservedResponse { status, grpc_status, latency } = response;
        let failed = is_failure(status, grpc_status);
        // Envoy explains 5xx responses only.
        let details = if status >= 500 { host.property(&["response", "code_details"]) } else { None };
        let is_outage = details.as_deref().is_some_and(is_outage);
        let mut is_bad = false;
        let TargetMetrics { requests, failures, outages, .. } = self.metrics;
        for (row, metric, is_counted) in
            [(REQUESTS, requests, true), (FAILURES, failures, failed), (OUTAGES, outages, is_outage)]
        {
            if is_counted {
                self.counts.add(row, 0, 1);
                host.add(metric, 1);
                is_bad |= row != REQUESTS;
            }
        }
        let slow = self.latency_thresholds.iter().zip(&self.metrics.slow).enumerate();
        for (index, (_, metric)) in slow.filter(|(_, (threshold, _))| latency > **threshold) {
            self.counts.add(FIRST_SLOW + index, 0, 1);
            host.add(*metric, 1);
            is_bad = true;
        }
        if let Some(admin) = &mut self.admin {
            admin.look_up_cluster(host);
        }
        if let Some(hosts) = &mut self.hosts {
            let is_local = details.is_some_and(|details| details != b"via_upstream");
            let class = response_class(status, grpc_status, is_local);
            if hosts.record(class, host) {
                is_bad = true;
                self.show_ejected(host.now(), host);
            }
        }
        let has_changed = is_bad || self.is_request_awaited;
        if has_changed {
            self.is_request_awaited = false;
            self.counts.merge_soon(host.now(), host);
        }
        has_changed
    }

    /// Merges at a tick, if the last merge at a tick is [`MERGE_PERIOD`] ago.
    pub(crate) fn on_tick(&mut self, host: &impl Host) {
        let now = host.now();
        if now >= self.next_merge {
            self.next_merge = now.saturating_add(MERGE_PERIOD);
            self.merge(now, host);
        }
    }

    /// Merges what was counted. To be called when the configuration goes away.
    pub(crate) fn on_shutdown(&mut self, host: &impl Host) {
        self.merge(host.now(), host);
    }

    fn merge(&mut self, now: MonotonicInstant, host: &impl Host) {
        // What could not be merged is merged at the next tick.
        let _ = self.counts.merge(host);
        self.refresh_hosts(now, host);
    }

    /// Reads from shared data which hosts are ejected.
    #[inline(never)]
    pub(crate) fn refresh_hosts(&mut self, now: MonotonicInstant, host: &impl Host) {
        if let Some(hosts) = &mut self.hosts {
            hosts.merge(now, host);
        }
        if let Some(admin) = &mut self.admin {
            admin.snapshot = admin.cell.read(host).record();
        }
        self.show_ejected(now, host);
    }

    /// Updates the metric of ejected hosts if its value has changed.
    fn show_ejected(&mut self, now: MonotonicInstant, host: &impl Host) {
        let Some(gauge) = self.metrics.ejected else { return };
        let reported = self.admin.as_ref().and_then(|admin| self.snapshot(now, admin.interval));
        let reported = reported.map_or(Fraction::NONE, EjectionStats::ejected_share);
        let ejected = self.ejected_share().max(reported);
        if ejected != self.shown {
            self.shown = ejected;
            host.set_gauge(gauge, u64::from(ejected.ppm()));
        }
    }

    /// The share of hosts that are ejected by the `outlierDetection` block.
    pub(crate) fn ejected_share(&self) -> Fraction {
        self.hosts.as_ref().map_or(Fraction::NONE, |hosts| hosts.stats.ejected_share())
    }

    /// The hosts as the admin endpoint has reported them, polled every `interval` nanoseconds. `None` if the report is too
    /// old, or if there is none.
    pub(crate) fn snapshot(&self, now: MonotonicInstant, interval: u64) -> Option<EjectionStats> {
        let snapshot = self.admin.as_ref()?.snapshot?;
        // The snapshot of another worker can be newer than `now`: it is not old then.
        let is_fresh = now.saturating_since(snapshot.at) <= interval.saturating_mul(3);
        is_fresh.then_some(snapshot.stats)
    }

    /// The totals of all workers as of the last merge, and what this worker has counted since. Slow responses are those
    /// that took longer than `threshold` nanoseconds.
    pub(crate) fn totals(&self, threshold: Option<u64>) -> Totals {
        let total = |row: usize| {
            let count = |counts: &[u64]| counts.first().copied().unwrap_or(0);
            count(self.counts.totals(row)).saturating_add(count(self.counts.own(row)))
        };
        let slow = self.latency_thresholds.iter().position(|known| threshold == Some(*known));
        Totals {
            requests: total(REQUESTS),
            failures: total(FAILURES),
            outages: total(OUTAGES),
            slow: slow.map_or(0, |index| total(FIRST_SLOW + index)),
        }
    }
}

impl AdminState {
    /// Stores the name that Envoy has for the target's cluster, at most once per interval. Envoy knows the name only while
    /// it handles a request.
    fn look_up_cluster(&mut self, host: &impl Host) {
        let now = host.now();
        if now < self.next_lookup {
            return;
        }
        let Some(name) = host.property(&["xds", "cluster_name"]) else { return };
        self.next_lookup = now.saturating_add(self.interval);
        let name = ClusterName(name);
        if !matches!(self.cluster.read(host), Stored::Record(known) if known == name) {
            self.cluster.overwrite(host, &name);
        }
    }
}

/// The class of a response. `is_local` is true if Envoy responded instead of the host.
fn response_class(status: u16, grpc_status: Option<u16>, is_local: bool) -> ResponseClass {
    if !is_failure(status, grpc_status) {
        ResponseClass::Success
    } else if is_local {
        ResponseClass::LocalFailure
    } else {
        // UNAVAILABLE and DEADLINE_EXCEEDED map to 503 and 504.
        ResponseClass::Error { gateway: matches!(status, 502..=504) || matches!(grpc_status, Some(4 | 14)) }
    }
}

/// The hosts of one target in one worker.
///
/// It tallies the responses of at most [`MAX_HOSTS`] hosts between two merges. Responses of further hosts are not tallied.
#[derive(Debug)]
struct OutlierObserver {
    /// The target's name, for log lines.
    target: Box<str>,
    detection: OutlierDetection,
    cell: SharedCell<HostTable>,
    /// The tallies since the last merge, each with the address of its host.
    tallies: Vec<HostTally>,
    addresses: Vec<Box<[u8]>>,
    /// How many hosts the target has, as Envoy reported with the last failure.
    endpoints: Option<u64>,
    pace: MergePace,
    /// The statistics of the table at the last merge.
    stats: EjectionStats,
    /// The end of the current interval at the last merge; `None` if no interval check is on.
    interval_end: Option<MonotonicInstant>,
}

impl OutlierObserver {
    fn new(policy: &Policy, target: &Target, detection: OutlierDetection) -> OutlierObserver {
        OutlierObserver {
            target: target.name.clone(),
            detection,
            cell: SharedCell::new(policy.shared_key("outlier/", &target.name)),
            tallies: Vec::new(),
            addresses: Vec::new(),
            endpoints: None,
            pace: MergePace::default(),
            stats: EjectionStats::default(),
            interval_end: None,
        }
    }

    /// Tallies a response of the host that has the current stream. Returns whether the tallies were merged.
    fn record(&mut self, class: ResponseClass, host: &impl Host) -> bool {
        // Without a chosen host, there is no host that has failed.
        let Some(address) = host.property(&["upstream", "address"]) else { return false };
        let id = xxh64(&address, 0);
        let known = self.tallies.iter().position(|tally| tally.id == id);
        let index = known.unwrap_or(self.tallies.len());
        if known.is_none() && index < MAX_HOSTS {
            self.tallies.push(HostTally::new(id));
            self.addresses.push(address.into());
        }
        let Some(tally) = self.tallies.get_mut(index) else { return false };
        tally.add(&self.detection, class);
        let is_success = class == ResponseClass::Success;
        if is_success && self.interval_end.is_none() {
            return false;
        }
        let now = host.now();
        if is_success && self.interval_end.is_none_or(|end| now < end) {
            return false;
        }
        let endpoints = host.property(&["upstream", "num_endpoints"]).and_then(|number| number.try_into().ok());
        self.endpoints = endpoints.map(u64::from_le_bytes);
        let is_permitted = self.pace.permits(now);
        if is_permitted {
            self.merge(now, host);
        }
        is_permitted
    }

    /// Merges the tallies, and reads the state of the table.
    fn merge(&mut self, now: MonotonicInstant, host: &impl Host) {
        let tallies = (&*self.tallies, self.endpoints);
        let Ok(merged) = hosts::merge(host, &self.cell, &self.detection, tallies, now) else { return };
        let MergeResult { stats, ejected, ejected_by_interval, interval_end } = merged;
        (self.stats, self.interval_end) = (stats, interval_end);
        for id in ejected {
            self.log_ejection(id);
        }
        if ejected_by_interval > 0 {
            let EjectionStats { hosts, ejected } = stats;
            let target = &self.target;
            log::warn!("outlier: target={target:?} by_interval={ejected_by_interval} ejected={ejected} hosts={hosts}");
        }
        self.tallies.clear();
        self.addresses.clear();
    }

    #[cold]
    #[inline(never)]
    fn log_ejection(&self, id: u64) {
        let index = self.tallies.iter().position(|tally| tally.id == id);
        let address = index.and_then(|index| self.addresses.get(index));
        let address = address.and_then(|address| std::str::from_utf8(address).ok()).unwrap_or_default();
        let EjectionStats { hosts, ejected } = self.stats;
        log::warn!("outlier: target={:?} host={address:?} ejected={ejected} hosts={hosts}", self.target);
    }
}
