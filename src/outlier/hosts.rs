//! The table of a target's hosts: what all workers have observed of each host, and which hosts would be ejected.
//!
//! Envoy ejects hosts; this filter does not. Envoy's own outlier detection sees each attempt and each worker's share of
//! it. This table applies the same arithmetic to the responses that this filter observed and did not fault, so that a
//! guard can react to the number of unhealthy hosts.
//!
//! A worker tallies the responses of each host ([`HostTally`]) and merges the tallies into the table, which is one record
//! in shared data. A tally of consecutive errors keeps the runs at its beginning and at its end, so that a merge continues
//! the run of the earlier merges.
//!
//! Invariants: the table has at most [`MAX_HOSTS`] hosts. If there are more, the one that has not responded for the
//! longest time is replaced; an ejected host is not replaced.

use super::policy::{IntervalCheck, OutlierDetection};
use crate::host::SharedData;
use crate::shared_data::{Change, Contended, Record, SharedCell};
use crate::units::{Fraction, MonotonicInstant};

/// The most hosts of a target that are remembered.
pub(crate) const MAX_HOSTS: usize = 64;

/// The longest time, in nanoseconds, that an ejection lasts if `baseEjectionTime` is not longer: Envoy's default of
/// `max_ejection_time`.
const MAX_EJECTION_TIME: u64 = 300_000_000_000;

/// The class of one response, as outlier detection counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseClass {
    Success,
    /// A 5xx of the host; `gateway` is true for 502, 503 and 504.
    Error {
        gateway: bool,
    },
    /// The connection failed, and Envoy responded for the host.
    LocalFailure,
}

/// Consecutive events within a sequence of responses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Run {
    /// The length of the run at the beginning of the sequence.
    leading: u16,
    /// The length of the run at its end.
    trailing: u16,
    longest: u16,
    /// Whether a response without the event is part of the sequence.
    is_broken: bool,
}

impl Run {
    fn add(&mut self, is_event: bool) {
        if is_event {
            self.trailing = self.trailing.saturating_add(1);
            self.longest = self.longest.max(self.trailing);
            self.leading = if self.is_broken { self.leading } else { self.trailing };
        } else {
            self.trailing = 0;
            self.is_broken = true;
        }
    }

    /// The longest run that the sequence has extended, and the run at its end, if it follows a run of the length `before`.
    fn after(self, before: u16) -> (u16, u16) {
        let first = before.saturating_add(self.leading);
        let longest = if self.leading > 0 { first.max(self.longest) } else { self.longest };
        (longest, if self.is_broken { self.trailing } else { first })
    }
}

/// The responses of one host that a worker has observed since its last merge.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HostTally {
    /// The hash of the host's address.
    pub(super) id: u64,
    errors: Run,
    gateway_errors: Run,
    local_failures: Run,
    answers: u32,
    answered_errors: u32,
}

impl HostTally {
    pub(super) fn new(id: u64) -> HostTally {
        HostTally { id, ..HostTally::default() }
    }

    pub(super) fn add(&mut self, detection: &OutlierDetection, class: ResponseClass) {
        let is_local = class == ResponseClass::LocalFailure;
        if detection.splits_local {
            self.local_failures.add(is_local);
        }
        if !(detection.splits_local && is_local) {
            let is_error = class != ResponseClass::Success;
            self.errors.add(is_error);
            self.gateway_errors.add(is_local || class == ResponseClass::Error { gateway: true });
            self.answers = self.answers.saturating_add(1);
            self.answered_errors = self.answered_errors.saturating_add(u32::from(is_error));
        }
    }
}

/// One host of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct HostEntry {
    /// The hash of its address.
    id: u64,
    last_seen: MonotonicInstant,
    /// The end of its last ejection; zero if it was never ejected.
    ejected_until: MonotonicInstant,
    /// Consecutive events up to the last merge.
    errors: u16,
    gateway_errors: u16,
    local_failures: u16,
    /// The factor of `baseEjectionTime` that its last ejection lasted.
    ejections: u16,
    /// Its responses in the current interval, and the errors among them. They are counted if an interval check is on.
    answers: u32,
    answered_errors: u32,
}

impl HostEntry {
    const SIZE: usize = 40;

    fn is_ejected(&self, now: MonotonicInstant) -> bool {
        self.ejected_until > now
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        for value in [self.id, self.last_seen.as_nanos(), self.ejected_until.as_nanos()] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        for value in [self.errors, self.gateway_errors, self.local_failures, self.ejections] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        for value in [self.answers, self.answered_errors] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    }

    fn decode(bytes: &[u8; Self::SIZE]) -> HostEntry {
        let words = bytes.as_chunks::<8>().0;
        let wide = |at: usize| words.get(at).map_or(0, |word| u64::from_le_bytes(*word));
        let counts = wide(3);
        let count = |at: u32| (counts >> (16 * at)) as u16;
        HostEntry {
            id: wide(0),
            last_seen: MonotonicInstant::from_nanos(wide(1)),
            ejected_until: MonotonicInstant::from_nanos(wide(2)),
            errors: count(0),
            gateway_errors: count(1),
            local_failures: count(2),
            ejections: count(3),
            answers: wide(4) as u32,
            answered_errors: (wide(4) >> 32) as u32,
        }
    }
}

/// How many hosts a target has, and how many of them are ejected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EjectionStats {
    pub hosts: u64,
    pub ejected: u64,
}

impl EjectionStats {
    /// The share of hosts that are ejected.
    pub fn ejected_share(self) -> Fraction {
        let ppm = (self.ejected.min(self.hosts) * 1_000_000).checked_div(self.hosts).unwrap_or(0);
        Fraction::from_ppm(ppm as u32)
    }
}

/// What a merge has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MergeResult {
    pub(super) stats: EjectionStats,
    /// The ids of the hosts that were ejected for consecutive errors.
    pub(super) ejected: Vec<u64>,
    /// How many hosts an interval check has ejected.
    pub(super) ejected_by_interval: u64,
    /// The end of the current interval; `None` if no interval check is on.
    pub(super) interval_end: Option<MonotonicInstant>,
}

/// The record of a target's hosts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct HostTable {
    /// How many hosts the target has, as Envoy reported last; 0 if it did not.
    endpoints: u64,
    /// The beginning of the current interval; zero if no interval check is on.
    interval_began: MonotonicInstant,
    hosts: Vec<HostEntry>,
}

/// Merges the tallies of a worker into the table. `endpoints` is the number of hosts that Envoy reported last, if known.
///
/// # Errors
/// [`Contended`] if the record could not be written; nothing was merged.
#[inline(never)]
pub(super) fn merge(
    store: &impl SharedData,
    cell: &SharedCell<HostTable>,
    detection: &OutlierDetection,
    (tallies, endpoints): (&[HostTally], Option<u64>),
    now: MonotonicInstant,
) -> Result<MergeResult, Contended> {
    cell.update(store, |stored| {
        let mut table = stored.record().unwrap_or_default();
        let (is_changed, result) = table.merge(detection, tallies, endpoints, now);
        if is_changed { Change::Write(table, result) } else { Change::Keep(result) }
    })
}

impl HostTable {
    /// Whether the table has changed, and what the merge has ejected.
    fn merge(
        &mut self,
        detection: &OutlierDetection,
        tallies: &[HostTally],
        endpoints: Option<u64>,
        now: MonotonicInstant,
    ) -> (bool, MergeResult) {
        let mut result = MergeResult::default();
        let lasted = now.saturating_since(self.interval_began);
        let has_begun = self.interval_began > MonotonicInstant::ZERO;
        let is_over = detection.checks_intervals() && (!has_begun || lasted >= detection.interval);
        // An interval that ended longer ago than it lasted does not show how the hosts are now.
        let is_outdated = is_over && (!has_begun || lasted >= detection.interval.saturating_mul(2));
        if is_outdated {
            self.begin_interval(now);
        }
        let mut is_changed = is_over;
        for tally in tallies {
            let (has_changed, is_ejected) = self.add(detection, tally, endpoints, now);
            is_changed |= has_changed;
            if is_ejected {
                result.ejected.push(tally.id);
            }
        }
        // The tallies belong to the interval that ends: a worker merges them a tenth of a second late at most.
        if is_over && !is_outdated {
            result.ejected_by_interval = self.end_interval(detection, endpoints, now);
        }
        result.stats = self.stats(now);
        let end = self.interval_began.saturating_add(detection.interval);
        result.interval_end = detection.checks_intervals().then_some(end);
        (is_changed, result)
    }

    /// Adds one tally. Returns whether the table has changed, and whether the host was ejected.
    fn add(
        &mut self,
        detection: &OutlierDetection,
        tally: &HostTally,
        endpoints: Option<u64>,
        now: MonotonicInstant,
    ) -> (bool, bool) {
        let Some(place) = self.place(tally.id, now) else { return (false, false) };
        let Some(host) = self.hosts.get_mut(place) else { return (false, false) };
        let before = *host;
        host.id = tally.id;
        // Coarse, so that a healthy host is not written with each merge.
        if host.last_seen == MonotonicInstant::ZERO || now.saturating_since(host.last_seen) >= detection.interval {
            host.last_seen = now.max(MonotonicInstant::from_nanos(1));
        }
        let mut is_outlier = false;
        for (run, count, threshold) in [
            (tally.errors, &mut host.errors, detection.errors),
            (tally.gateway_errors, &mut host.gateway_errors, detection.gateway_errors),
            (tally.local_failures, &mut host.local_failures, detection.local_failures),
        ] {
            let (longest, last) = run.after(*count);
            *count = last;
            is_outlier |= threshold > 0 && longest >= threshold;
        }
        if detection.checks_intervals() {
            host.answers = host.answers.saturating_add(tally.answers);
            host.answered_errors = host.answered_errors.saturating_add(tally.answered_errors);
        }
        let is_new = is_outlier && !host.is_ejected(now);
        if is_new {
            self.endpoints = endpoints.unwrap_or(self.endpoints);
            self.eject(place, detection, now);
        }
        let after = self.hosts.get(place).copied().unwrap_or_default();
        (after != before, is_new && after.is_ejected(now))
    }

    fn begin_interval(&mut self, now: MonotonicInstant) {
        self.interval_began = now.max(MonotonicInstant::from_nanos(1));
        for host in &mut self.hosts {
            (host.answers, host.answered_errors) = (0, 0);
        }
    }

    /// Ends an interval: ejects the hosts that the interval checks find, and begins the next one. Returns how many hosts
    /// were ejected.
    fn end_interval(&mut self, detection: &OutlierDetection, endpoints: Option<u64>, now: MonotonicInstant) -> u64 {
        let outliers = self.outliers(detection, now);
        self.begin_interval(now);
        if !outliers.is_empty() {
            self.endpoints = endpoints.unwrap_or(self.endpoints);
        }
        let before = self.stats(now).ejected;
        outliers.into_iter().for_each(|place| self.eject(place, detection, now));
        self.stats(now).ejected.saturating_sub(before)
    }

    /// The hosts with too many errors in the interval, by Envoy's two measures.
    fn outliers(&self, detection: &OutlierDetection, now: MonotonicInstant) -> Vec<usize> {
        let failing = self.failure_rates(detection.failure_percentage, now);
        let threshold = f64::from(detection.failure_percentage.threshold) / 100.0;
        let rates = self.failure_rates(detection.success_rate, now);
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / rates.len().max(1) as f64;
        let average = mean(&mut rates.iter().map(|(_, rate)| *rate));
        let deviation = mean(&mut rates.iter().map(|(_, rate)| (rate - average) * (rate - average))).sqrt();
        let bound = average + deviation * f64::from(detection.success_rate.threshold) / 1000.0;
        let mut outliers: Vec<usize> = Vec::new();
        for (place, _) in
            failing.iter().filter(|(_, rate)| *rate >= threshold).chain(rates.iter().filter(|(_, rate)| *rate > bound))
        {
            if !outliers.contains(place) {
                outliers.push(*place);
            }
        }
        outliers
    }

    /// The share of errors among the responses of each host that `check` applies to.
    fn failure_rates(&self, check: IntervalCheck, now: MonotonicInstant) -> Vec<(usize, f64)> {
        let is_checked = |host: &HostEntry| !host.is_ejected(now) && host.answers >= check.requests.max(1);
        let checked = self.hosts.iter().enumerate().filter(|(_, host)| is_checked(host));
        let rate = |host: &HostEntry| f64::from(host.answered_errors) / f64::from(host.answers);
        let rates: Vec<(usize, f64)> = checked.map(|(place, host)| (place, rate(host))).collect();
        if check.threshold == 0 || rates.len() < usize::from(check.hosts) { Vec::new() } else { rates }
    }

    /// Ejects a host, unless too many are ejected already.
    fn eject(&mut self, place: usize, detection: &OutlierDetection, now: MonotonicInstant) {
        let EjectionStats { hosts, ejected } = self.stats(now);
        let within = |part: u64, percent: u8| part * 100 <= hosts * u64::from(percent);
        let may_be = ejected == 0 || within(ejected + 1, detection.max_ejection_percent);
        let is_healthy = within(ejected, 100 - detection.min_health_percent.min(100));
        let Some(host) = self.hosts.get_mut(place).filter(|_| may_be && is_healthy) else { return };
        // Each interval without an ejection reduces the factor by one.
        let back_for = now.saturating_since(host.ejected_until);
        let forgiven = back_for.checked_div(detection.interval).unwrap_or(0).min(u64::from(u16::MAX));
        host.ejections = host.ejections.saturating_sub(forgiven as u16).saturating_add(1);
        let longest = detection.base_ejection_time.max(MAX_EJECTION_TIME);
        let time = detection.base_ejection_time.saturating_mul(u64::from(host.ejections)).min(longest);
        host.ejected_until = now.saturating_add(time);
        (host.errors, host.gateway_errors, host.local_failures) = (0, 0, 0);
    }

    /// The index of the host's entry; a new or replaced entry if the host has none. `None` if all entries are ejected
    /// hosts.
    fn place(&mut self, id: u64, now: MonotonicInstant) -> Option<usize> {
        if let Some(place) = self.hosts.iter().position(|host| host.id == id) {
            return Some(place);
        }
        if self.hosts.len() < MAX_HOSTS {
            self.hosts.push(HostEntry::default());
            return Some(self.hosts.len() - 1);
        }
        let idle = self.hosts.iter_mut().enumerate().filter(|(_, host)| !host.is_ejected(now));
        let (place, host) = idle.min_by_key(|(_, host)| host.last_seen)?;
        *host = HostEntry::default();
        Some(place)
    }

    fn stats(&self, now: MonotonicInstant) -> EjectionStats {
        let ejected = self.hosts.iter().filter(|host| host.is_ejected(now)).count() as u64;
        EjectionStats { hosts: self.endpoints.max(self.hosts.len() as u64), ejected }
    }
}

impl Record for HostTable {
    const SCHEMA: u8 = 2;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.reserve(16 + self.hosts.len() * HostEntry::SIZE);
        bytes.extend_from_slice(&self.endpoints.to_le_bytes());
        bytes.extend_from_slice(&self.interval_began.to_le_bytes());
        self.hosts.iter().for_each(|host| host.encode(bytes));
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<HostTable> {
        let (endpoints, rest) = bytes.split_first_chunk::<8>()?;
        let (interval_began, rest) = rest.split_first_chunk::<8>()?;
        let (hosts, rest) = rest.as_chunks::<{ HostEntry::SIZE }>();
        let fits = schema == Self::SCHEMA && rest.is_empty() && hosts.len() <= MAX_HOSTS;
        // Bytes that another module has written could be any number; no target has so many hosts.
        let endpoints = u64::from_le_bytes(*endpoints).min(u64::from(u32::MAX));
        let interval_began = MonotonicInstant::from_le_bytes(*interval_began);
        fits.then(|| HostTable { endpoints, interval_began, hosts: hosts.iter().map(HostEntry::decode).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;
    use crate::units::at;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;
    const ERROR: ResponseClass = ResponseClass::Error { gateway: false };
    const GATEWAY: ResponseClass = ResponseClass::Error { gateway: true };

    const KEY: &str = "w";

    /// What one response has changed.
    #[derive(Debug)]
    struct Recorded {
        stats: EjectionStats,
        is_ejected: bool,
        ejected_by_interval: u64,
    }

    /// Merges one response of the host `id`.
    fn record(
        host: &Sim,
        detection: &OutlierDetection,
        (id, class): (u64, ResponseClass),
        now: MonotonicInstant,
        endpoints: Option<u64>,
    ) -> Recorded {
        let mut tally = HostTally::new(id);
        tally.add(detection, class);
        let merged = merge(host, &SharedCell::new(KEY), detection, (&[tally], endpoints), now).unwrap();
        let MergeResult { stats, ejected, ejected_by_interval, .. } = merged;
        Recorded { stats, is_ejected: !ejected.is_empty(), ejected_by_interval }
    }

    /// The statistics of the table.
    fn stats(host: &Sim, now: MonotonicInstant) -> EjectionStats {
        SharedCell::<HostTable>::new(KEY).read(host).record().unwrap_or_default().stats(now)
    }

    fn decode(bytes: &[u8]) -> Option<HostTable> {
        bytes.split_first().and_then(|(schema, bytes)| HostTable::decode(*schema, bytes))
    }

    /// The responses of one host: whether it is ejected after each.
    fn ejections(detection: &OutlierDetection, answers: &[ResponseClass]) -> Vec<bool> {
        let host = Sim::new(1);
        let record_one = |answer: &ResponseClass| record(&host, detection, (7, *answer), at(SECOND), Some(3));
        answers.iter().map(|answer| record_one(answer).stats.ejected > 0).collect()
    }

    #[test]
    fn consecutive_errors_eject_at_the_threshold() {
        let detection = OutlierDetection { errors: 3, gateway_errors: 2, ..OutlierDetection::default() };
        let last = |answers: &[ResponseClass]| *ejections(&detection, answers).last().unwrap();
        assert_eq!(ejections(&detection, &[ERROR; 4]), [false, false, true, true]);
        assert!(!last(&[ERROR, ERROR, ResponseClass::Success, ERROR, ERROR]), "a success breaks the row");
        assert!(last(&[GATEWAY; 2]));
        assert!(last(&[GATEWAY, ERROR, GATEWAY]), "three 5xx in a row");
        let gateway = OutlierDetection { errors: 0, ..detection };
        assert_eq!(ejections(&gateway, &[GATEWAY, ERROR, GATEWAY, GATEWAY]), [false, false, false, true]);
        assert!(last(&[ResponseClass::LocalFailure; 2]), "a failed connection is a 503 of the gateway");
        let off = OutlierDetection { errors: 0, gateway_errors: 0, ..detection };
        assert_eq!(ejections(&off, &[GATEWAY; 100]), [false; 100]);
    }

    #[test]
    fn failed_connections_count_separately_if_split() {
        let split =
            OutlierDetection { errors: 3, local_failures: 2, splits_local: true, ..OutlierDetection::default() };
        assert_eq!(ejections(&split, &[ResponseClass::LocalFailure; 2]), [false, true]);
        assert_eq!(ejections(&split, &[ERROR, ERROR, ResponseClass::LocalFailure]), [false; 3]);
        assert_eq!(
            ejections(&split, &[ResponseClass::LocalFailure, ERROR, ResponseClass::LocalFailure, ERROR]),
            [false; 4],
            "an answer shows that the connection works"
        );
    }

    #[test]
    fn the_ejection_time_grows_and_shrinks_again() {
        let host = Sim::new(1);
        let detection = OutlierDetection { errors: 1, ..OutlierDetection::default() };
        let record_one = |answer, now| record(&host, &detection, (7, answer), at(now), None);
        assert!(record_one(ERROR, 1).is_ejected);
        assert!(!record_one(ERROR, 2).is_ejected, "it is ejected already");
        assert_eq!(stats(&host, at(30 * SECOND)), EjectionStats { hosts: 1, ejected: 1 });
        assert_eq!(stats(&host, at(30 * SECOND + 1)).ejected, 0);
        assert!(record_one(ERROR, 31 * SECOND).is_ejected);
        assert_eq!(stats(&host, at(90 * SECOND)).ejected, 1, "twice as long");
        assert_eq!(stats(&host, at(91 * SECOND)).ejected, 0);
        assert!(record_one(ERROR, 121 * SECOND).is_ejected);
        assert_eq!(stats(&host, at(150 * SECOND)).ejected, 1, "three intervals forgave two ejections");
        assert_eq!(stats(&host, at(151 * SECOND)).ejected, 0);
    }

    #[test]
    fn at_most_the_maximum_share_is_ejected_but_always_one() {
        let host = Sim::new(1);
        let detection = OutlierDetection { errors: 1, max_ejection_percent: 20, ..OutlierDetection::default() };
        let ejected = |id, endpoints| record(&host, &detection, (id, ERROR), at(SECOND), Some(endpoints)).stats.ejected;
        assert_eq!(ejected(1, 3), 1, "a third, but the first");
        assert_eq!(ejected(2, 3), 1);
        assert_eq!(ejected(2, 10), 2);
        assert_eq!(ejected(3, 10), 2);
        let host = Sim::new(1);
        let shy = OutlierDetection {
            errors: 1,
            max_ejection_percent: 100,
            min_health_percent: 50,
            ..OutlierDetection::default()
        };
        let ejected = |id| record(&host, &shy, (id, ERROR), at(SECOND), Some(4)).stats.ejected;
        assert_eq!((1..=4).map(ejected).collect::<Vec<_>>(), [1, 2, 3, 3], "half of them are not healthy any more");
    }

    /// Five hosts respond `each` times within an interval of ten seconds. `errors` in a hundred responses of the first
    /// host are errors, never two in a row. Returns how many hosts are ejected at the next response, at `next`.
    fn ejected_at_interval_end(detection: &OutlierDetection, each: u64, errors: u64, next: u64) -> u64 {
        let host = Sim::new(1);
        let record_one = |id, answer, now| record(&host, detection, (id, answer), at(now), Some(5));
        for n in 0..each {
            for id in 1..=5 {
                let is_error = id == 1 && (n + 1) * errors / 100 > n * errors / 100;
                let recorded = record_one(id, if is_error { ERROR } else { ResponseClass::Success }, SECOND + n);
                assert_eq!((recorded.ejected_by_interval, recorded.stats.ejected), (0, 0), "the interval goes on");
            }
        }
        let recorded = record_one(2, ResponseClass::Success, next);
        assert_eq!(recorded.ejected_by_interval, recorded.stats.ejected);
        assert_eq!(host.writes(), each * 5 + 1);
        recorded.ejected_by_interval
    }

    #[test]
    fn a_percentage_of_an_interval_ejects() {
        let checks = |threshold| OutlierDetection {
            failure_percentage: IntervalCheck { threshold, ..OutlierDetection::default().failure_percentage },
            ..OutlierDetection::default()
        };
        assert_eq!(ejected_at_interval_end(&checks(20), 50, 20, 11 * SECOND), 1);
        assert_eq!(ejected_at_interval_end(&checks(21), 50, 20, 11 * SECOND), 0);
        assert_eq!(ejected_at_interval_end(&checks(20), 49, 50, 11 * SECOND), 0, "too few answers");
        assert_eq!(ejected_at_interval_end(&checks(20), 50, 20, 22 * SECOND), 0, "too long ago");
        let more = OutlierDetection {
            failure_percentage: IntervalCheck { hosts: 6, ..checks(20).failure_percentage },
            ..checks(20)
        };
        assert_eq!(ejected_at_interval_end(&more, 50, 20, 11 * SECOND), 0, "too few hosts");
    }

    #[test]
    fn a_success_rate_far_from_the_others_ejects() {
        let checks = |threshold| OutlierDetection {
            success_rate: IntervalCheck { threshold, ..OutlierDetection::default().success_rate },
            ..OutlierDetection::default()
        };
        // One host of five fails 20 %: 4 % on average, with a standard deviation of 8 %.
        assert_eq!(ejected_at_interval_end(&checks(1900), 100, 20, 11 * SECOND), 1, "past 19.2 %");
        assert_eq!(ejected_at_interval_end(&checks(2100), 100, 20, 11 * SECOND), 0, "within 20.8 %");
        assert_eq!(ejected_at_interval_end(&checks(1900), 99, 20, 11 * SECOND), 0, "too few answers");
        assert_eq!(ejected_at_interval_end(&checks(1900), 100, 0, 11 * SECOND), 0, "all alike");
    }

    #[test]
    fn a_healthy_host_is_not_written_with_each_response() {
        let host = Sim::new(1);
        let detection = OutlierDetection::default();
        for n in 0..100 {
            record(&host, &detection, (7, ResponseClass::Success), at(SECOND + n * SECOND / 100), None);
        }
        assert_eq!(host.writes(), 1);
    }

    #[test]
    fn garbage_is_no_table() {
        for garbage in [&b""[..], b"\x02", b"\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", &[2; 40], &[2; 17 + 65 * 40]] {
            assert_eq!(decode(garbage), None, "{} bytes", garbage.len());
        }
    }

    proptest! {
        /// The runs do not depend on how many responses a worker merges at once.
        #[test]
        fn runs_continue_over_merges(
            before in 0..5_u16,
            responses in proptest::collection::vec(0..4_u8, 1..40),
            cut in 0..40_usize,
        ) {
            let mut whole = Run::default();
            responses.iter().for_each(|response| whole.add(*response > 0));
            let (mut parts, cut) = ([Run::default(); 2], cut.min(responses.len()));
            responses[..cut].iter().for_each(|response| parts[0].add(*response > 0));
            responses[cut..].iter().for_each(|response| parts[1].add(*response > 0));
            let (first, last) = parts[0].after(before);
            let (second, last) = parts[1].after(last);
            prop_assert_eq!(whole.after(before), (first.max(second), last));
            let mut run = before;
            for response in responses {
                run = if response > 0 { run + 1 } else { 0 };
            }
            prop_assert_eq!(last, run);
        }

        #[test]
        fn the_table_is_bounded_and_read_as_it_was_written(
            answers in proptest::collection::vec((0..100_u64, 0..3_u8, 0..5_000_u64), 1..600),
        ) {
            let check = IntervalCheck { threshold: 1, hosts: 1, requests: 1 };
            let detection =
                OutlierDetection { errors: 2, failure_percentage: check, success_rate: check, ..OutlierDetection::default() };
            let (mut table, mut now) = (HostTable::default(), at(1));
            for (id, answer, milliseconds) in answers {
                now = now.saturating_add(milliseconds * 1_000_000);
                let answer = [ResponseClass::Success, ERROR, ResponseClass::LocalFailure][usize::from(answer)];
                let mut tally = HostTally::new(id);
                tally.add(&detection, answer);
                table.merge(&detection, &[tally], Some(100), now);
                prop_assert!(table.hosts.len() <= MAX_HOSTS);
                prop_assert!(table.stats(now).ejected <= 10, "a tenth of a hundred");
                let mut bytes = Vec::new();
                table.encode(&mut bytes);
                let read = HostTable::decode(HostTable::SCHEMA, &bytes);
                prop_assert_eq!(read.as_ref(), Some(&table));
            }
        }

        #[test]
        fn any_bytes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(mut table) = HostTable::decode(HostTable::SCHEMA, &bytes) {
                let check = IntervalCheck { threshold: 1, hosts: 1, requests: 1 };
                let detection = OutlierDetection { failure_percentage: check, success_rate: check, ..OutlierDetection::default() };
                let mut tally = HostTally::new(1);
                tally.add(&detection, ERROR);
                table.merge(&detection, &[tally], Some(u64::MAX), at(5));
                table.stats(at(0)).ejected_share();
            }
        }
    }
}
