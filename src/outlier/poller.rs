//! Polls Envoy's admin endpoint for the hosts that are ejected: one worker at a time, for all workers.
//!
//! A lease in shared data holds the time of the next poll. The worker that moves this time on sends the request. A worker
//! that goes away before its answer arrives costs one interval.

use super::admin::{AdminSnapshot, ClusterStatuses, path};
use crate::host::{Host, MetricId};
use crate::policy::{Policy, Target, label};
use crate::shared_data::{Change, Record, SharedCell};
use crate::telemetry::Scope;
use crate::units::MonotonicInstant;

/// The polls of one admin endpoint in one worker.
#[derive(Debug)]
pub(crate) struct AdminPoller {
    /// The cluster that leads to the endpoint.
    cluster: Box<str>,
    /// Nanoseconds from one poll to the next.
    interval: u64,
    poll_lease: SharedCell<PollLease>,
    /// The targets that it is polled for.
    targets: Vec<SharedKeys>,
    /// 1 if the last poll failed.
    unknown: MetricId,
    pending: Option<PendingPoll>,
    next_poll: MonotonicInstant,
}

/// A call that is not answered yet.
#[derive(Debug)]
struct PendingPoll {
    call: u32,
    /// The indices of the polled targets, and the names of their clusters.
    clusters: Vec<(usize, Vec<u8>)>,
}

/// The records of one target.
#[derive(Clone, Debug)]
pub(super) struct SharedKeys {
    pub(super) cluster: SharedCell<ClusterName>,
    pub(super) snapshot: SharedCell<AdminSnapshot>,
}

impl SharedKeys {
    pub(super) fn new(policy: &Policy, target: &Target) -> SharedKeys {
        SharedKeys {
            cluster: SharedCell::new(policy.shared_key("cluster/", &target.name)),
            snapshot: SharedCell::new(policy.shared_key("admin/", &target.name)),
        }
    }
}

/// Envoy's name of a target's cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ClusterName(pub(super) Vec<u8>);

impl Record for ClusterName {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.0);
    }

    /// The first layout was the name without a schema; no name begins with a control character.
    fn decode(schema: u8, bytes: &[u8]) -> Option<ClusterName> {
        match schema {
            Self::SCHEMA => Some(ClusterName(bytes.to_vec())),
            0..b' ' => None,
            first => Some(ClusterName([&[first], bytes].concat())),
        }
    }
}

/// When the next poll is due, and whether the last one failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PollLease {
    due: MonotonicInstant,
    is_unknown: bool,
}

impl Record for PollLease {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.push(u8::from(self.is_unknown));
        bytes.extend_from_slice(&self.due.to_le_bytes());
    }

    /// The first layout was the instant without a schema.
    fn decode(schema: u8, bytes: &[u8]) -> Option<PollLease> {
        if let Ok(rest) = <[u8; 7]>::try_from(bytes) {
            let [a, b, c, d, e, f, g] = rest;
            let due = MonotonicInstant::from_le_bytes([schema, a, b, c, d, e, f, g]);
            return Some(PollLease { due, is_unknown: false });
        }
        let (is_unknown @ 0..=1, due) = bytes.split_first()? else { return None };
        let due = MonotonicInstant::from_le_bytes(due.try_into().ok()?);
        (schema == Self::SCHEMA).then_some(PollLease { due, is_unknown: *is_unknown == 1 })
    }
}

impl AdminPoller {
    /// The pollers that the guards of `policy` need: one for each admin endpoint.
    pub(crate) fn all(policy: &Policy, host: &impl Host) -> Vec<AdminPoller> {
        let mut pollers: Vec<AdminPoller> = Vec::new();
        for (target, admin) in policy.targets.iter().filter_map(|target| Some((target, target.admin.as_ref()?))) {
            let keys = SharedKeys::new(policy, target);
            if let Some(poller) = pollers.iter_mut().find(|poller| poller.cluster == admin.cluster) {
                poller.interval = poller.interval.min(admin.interval);
                poller.targets.push(keys);
                continue;
            }
            let scope = Scope::policy(&policy.name, host).within("admin").within(&label(&admin.cluster));
            pollers.push(AdminPoller {
                cluster: admin.cluster.clone(),
                interval: admin.interval,
                poll_lease: SharedCell::new(policy.shared_key("turn/", &admin.cluster)),
                targets: vec![keys],
                unknown: scope.gauge("unknown"),
                pending: None,
                next_poll: MonotonicInstant::ZERO,
            });
        }
        pollers
    }

    /// How often [`AdminPoller::on_tick`] has to be called, in nanoseconds.
    pub(crate) fn period(&self) -> u64 {
        self.interval
    }

    /// Sends a request if a poll is due and no other worker has the lease.
    pub(crate) fn on_tick(&mut self, host: &impl Host) {
        let now = host.now();
        if now < self.next_poll {
            return;
        }
        let next = now.saturating_add(self.interval);
        let leased = self.poll_lease.update(host, |stored| {
            let lease = stored.record().unwrap_or_default();
            if lease.due > now && lease.due <= next {
                Change::Keep((lease.due, false))
            } else {
                Change::Write(PollLease { due: next, ..lease }, (next, true))
            }
        });
        let Ok((next, is_ours)) = leased else { return };
        self.next_poll = next;
        if is_ours {
            self.poll(host);
        }
    }

    fn poll(&mut self, host: &impl Host) {
        let name = |keys: &SharedKeys| keys.cluster.read(host).record().map(|ClusterName(name)| name);
        let targets = self.targets.iter().enumerate();
        let clusters: Vec<(usize, Vec<u8>)> = targets.filter_map(|(index, keys)| Some((index, name(keys)?))).collect();
        if clusters.is_empty() {
            return; // the names of the clusters are known after the first request
        }
        let path = path(clusters.iter().filter_map(|(_, name)| std::str::from_utf8(name).ok()));
        // The timeout is shorter than the interval, so that at most one call is pending.
        match host.http_get(&self.cluster, &path, self.interval / 5 * 4) {
            Some(call) => self.pending = Some(PendingPoll { call, clusters }),
            None => self.show(Some("the cluster cannot be called"), host),
        }
    }

    /// Handles the answer to `call`, if it is a call of this poller. `status` is 0 if there was no answer,
    /// and `body` is `None` if it is longer than [`super::MAX_ANSWER_BYTES`].
    pub(crate) fn on_answer(&mut self, call: u32, status: u16, body: Option<&[u8]>, host: &impl Host) {
        let Some(pending) = self.pending.take_if(|pending| pending.call == call) else { return };
        let statuses = match (status, body) {
            (0, _) => Err("there was no answer in time"),
            (200, Some(body)) => ClusterStatuses::read(body).ok_or("the answer is not a list of clusters"),
            (200, None) => Err("the answer is too long"),
            _ => Err("the status of the answer is not 200"),
        };
        let result = statuses.and_then(|statuses| {
            let mut result = Ok(());
            for (index, name) in pending.clusters {
                let stats = std::str::from_utf8(&name).ok().and_then(|name| statuses.stats(name));
                match (stats, self.targets.get(index)) {
                    (Some(stats), Some(keys)) => {
                        keys.snapshot.overwrite(host, &AdminSnapshot { at: host.now(), stats });
                    }
                    _ => result = Err("the answer lacks a cluster of this policy, or the hosts of one"),
                }
            }
            result
        });
        self.show(result.err(), host);
    }

    /// Logs once that the state of the hosts is unknown, or known again.
    fn show(&self, reason: Option<&str>, host: &impl Host) {
        let is_unknown = reason.is_some();
        let changed = self.poll_lease.update(host, |stored| {
            let lease = stored.record().unwrap_or_default();
            if lease.is_unknown == is_unknown {
                Change::Keep(false)
            } else {
                Change::Write(PollLease { is_unknown, ..lease }, true)
            }
        });
        if changed != Ok(true) {
            return;
        }
        host.set_gauge(self.unknown, u64::from(is_unknown));
        match reason {
            Some(reason) => log::warn!("admin endpoint: cluster={:?} hosts=unknown: {reason}", self.cluster),
            None => log::info!("admin endpoint: cluster={:?} hosts=known", self.cluster),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    #[test]
    fn records_without_a_schema_are_read() {
        let name = |bytes: &[u8]| ClusterName::decode(bytes[0], &bytes[1..]).map(|ClusterName(name)| name);
        assert_eq!(name(b"outbound|80|v1|h").as_deref(), Some(&b"outbound|80|v1|h"[..]));
        assert_eq!(name(b"\x01v1").as_deref(), Some(&b"v1"[..]));
        assert_eq!(name(b"\x02v1"), None);
        let instant = at(0x0102_0304_0506_0708).to_le_bytes();
        let lease = PollLease { due: at(0x0102_0304_0506_0708), is_unknown: false };
        assert_eq!(PollLease::decode(instant[0], &instant[1..]), Some(lease));
    }

    proptest! {
        #[test]
        fn a_lease_is_read_as_it_was_written(due: u64, is_unknown: bool) {
            let lease = PollLease { due: at(due), is_unknown };
            let mut bytes = Vec::new();
            lease.encode(&mut bytes);
            prop_assert_eq!(PollLease::decode(1, &bytes), Some(lease));
        }
    }
}
