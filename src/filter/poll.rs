//! Asks Envoy's admin endpoint, through a cluster, which hosts are ejected: one worker at a time, for all of them.
//!
//! Whose turn it is says a shared word with the time of the next poll: the worker that moves it on asks. A worker that
//! dies with its question unanswered costs one interval.

use crate::host::{Change, Host, MetricId, update};
use crate::outlier::{Clusters, Sighting, path};
use crate::policy::{Policy, Target, label};
use crate::units::MonotonicInstant;

/// What one worker remembers of one cluster that leads to the admin endpoint.
#[derive(Debug)]
pub(super) struct Poll {
    /// The cluster.
    admin: Box<str>,
    /// Nanoseconds from one poll to the next.
    interval: u64,
    /// The key of the shared word that says when the next poll is due.
    turn: String,
    /// The shared words of the targets that it is asked about.
    targets: Vec<Words>,
    /// 1 while the last poll said nothing.
    unknown: MetricId,
    /// The call that is not answered yet, and the clusters that it is about.
    pending: Option<(u32, Vec<(usize, String)>)>,
    next: MonotonicInstant,
}

/// Where it is kept what is known of a target: Envoy's name for its cluster, and what was seen of its hosts.
#[derive(Clone, Debug)]
struct Words {
    cluster: String,
    sighting: String,
}

/// The key of the shared word with Envoy's name for the cluster of `target`.
pub(super) fn cluster_word(policy: &Policy, target: &Target) -> String {
    policy.word("cluster/", &target.name)
}

/// The key of the shared word with what was seen of the hosts of `target`.
pub(super) fn sighting_word(policy: &Policy, target: &Target) -> String {
    policy.word("admin/", &target.name)
}

/// The polls that the guards of `policy` ask for.
pub(super) fn polls(policy: &Policy, host: &impl Host) -> Vec<Poll> {
    let mut polls: Vec<Poll> = Vec::new();
    for (target, admin) in policy.targets.iter().filter_map(|target| Some((target, target.admin.as_ref()?))) {
        let words = Words { cluster: cluster_word(policy, target), sighting: sighting_word(policy, target) };
        if let Some(poll) = polls.iter_mut().find(|poll| poll.admin == admin.cluster) {
            poll.interval = poll.interval.min(admin.interval);
            poll.targets.push(words);
            continue;
        }
        polls.push(Poll {
            admin: admin.cluster.clone(),
            interval: admin.interval,
            turn: policy.word("turn/", &admin.cluster),
            targets: vec![words],
            unknown: host
                .gauge(&["trimtab.policy.", &policy.name, ".admin.", &label(&admin.cluster), ".unknown"].concat()),
            pending: None,
            next: MonotonicInstant::ZERO,
        });
    }
    polls
}

impl Poll {
    pub fn period(&self) -> u64 {
        self.interval
    }

    /// Asks, if it is time and this worker's turn.
    pub fn tick(&mut self, host: &impl Host) {
        let now = host.now();
        if now < self.next {
            return;
        }
        let soonest = now.saturating_add(self.interval);
        let turn = update(host, &self.turn, |found| {
            let due = found.and_then(|word| Some(MonotonicInstant::from_le_bytes(word.try_into().ok()?)));
            match due {
                Some(due) if due > now && due <= soonest => Change::Keep((due, false)),
                _ => Change::Write(soonest.to_le_bytes().to_vec(), (soonest, true)),
            }
        });
        let Ok((next, is_ours)) = turn else { return };
        self.next = next;
        if is_ours {
            self.ask(host);
        }
    }

    fn ask(&mut self, host: &impl Host) {
        let name = |words: &Words| String::from_utf8(host.get(&words.cluster)?.0).ok();
        let clusters: Vec<(usize, String)> =
            self.targets.iter().enumerate().filter_map(|(index, words)| Some((index, name(words)?))).collect();
        if clusters.is_empty() {
            return; // no request has shown yet which clusters they are
        }
        let path = path(clusters.iter().map(|(_, name)| name.as_str()));
        // Given up before the next one is due, so that nobody waits for two.
        match host.http_get(&self.admin, &path, self.interval / 5 * 4) {
            Some(call) => self.pending = Some((call, clusters)),
            None => self.tell(Some("it cannot be called"), host),
        }
    }

    /// Learns from the answer to `call`, if it is one of this poll's. `body` is `None` where it is too long.
    pub fn answered(&mut self, call: u32, status: u16, body: Option<&[u8]>, host: &impl Host) {
        let Some((_, asked)) = self.pending.take_if(|(pending, _)| *pending == call) else { return };
        let clusters = match (status, body) {
            (0, _) => Err("there was no answer in time"),
            (200, Some(body)) => Clusters::read(body).ok_or("its answer is no list of clusters"),
            (200, None) => Err("its answer is too long"),
            _ => Err("it did not answer 200"),
        };
        let told = clusters.and_then(|clusters| {
            let mut told = Ok(());
            for (index, name) in asked {
                match (clusters.health(&name), self.targets.get(index)) {
                    (Some(health), Some(words)) => {
                        host.overwrite(&words.sighting, &Sighting { at: host.now(), health }.encode());
                    }
                    _ => told = Err("its answer lacks a cluster that requests are sent to, or its hosts"),
                }
            }
            told
        });
        self.tell(told.err(), host);
    }

    /// Logs that nothing is known, or is again, once.
    fn tell(&self, why: Option<&str>, host: &impl Host) {
        let is_unknown = u64::from(why.is_some());
        if host.value(self.unknown) == is_unknown {
            return;
        }
        host.set_gauge(self.unknown, is_unknown);
        match why {
            Some(why) => log::warn!("admin endpoint: cluster={:?} hosts=unknown: {why}", self.admin),
            None => log::info!("admin endpoint: cluster={:?} hosts=known", self.admin),
        }
    }
}
