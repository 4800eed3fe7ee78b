//! What one worker learns of the hosts of a target from the answers that come back: which one answered, and by which
//! cluster of Envoy's it was reached.

use super::poll::cluster_word;
use super::watch::outliers_word;
use crate::host::Host;
use crate::outlier::{Answer, Detection, Health, Noted, note};
use crate::policy::{Policy, Target};
use crate::units::MonotonicInstant;
use xxhash_rust::xxh64::xxh64;

#[derive(Debug)]
pub(super) struct Hosts {
    /// How log lines name the target.
    name: Box<str>,
    /// What makes a host an outlier, and the key of the shared table.
    observed: Option<(Detection, String)>,
    /// The key of the shared word with Envoy's name for the cluster, and how often it is to be looked up.
    cluster: Option<(String, u64)>,
    look_up: MonotonicInstant,
}

impl Hosts {
    pub fn new(policy: &Policy, target: &Target) -> Option<Hosts> {
        target.knows_hosts().then(|| Hosts {
            name: target.name.clone(),
            observed: target.detection.map(|detection| (detection, outliers_word(policy, target))),
            cluster: target.admin.as_ref().map(|admin| (cluster_word(policy, target), admin.interval)),
            look_up: MonotonicInstant::ZERO,
        })
    }

    /// Notes an answer.
    pub fn note(&mut self, answer: Answer, host: &impl Host) {
        let now = host.now();
        if let Some((word, interval)) = self.cluster.as_ref().filter(|_| now >= self.look_up)
            && let Some(name) = host.property(&["xds", "cluster_name"])
        {
            self.look_up = now.saturating_add(*interval);
            if host.get(word).is_none_or(|(known, _)| known != name) {
                host.overwrite(word, &name);
            }
        }
        let Some((detection, word)) = &self.observed else { return };
        // Where no host was chosen, none is to blame.
        let Some(address) = host.property(&["upstream", "address"]) else { return };
        let endpoints = || {
            let number = host.property(&["upstream", "num_endpoints"])?;
            Some(u64::from_le_bytes(number.try_into().ok()?))
        };
        let Ok(noted) = note(host, word, detection, (xxh64(&address, 0), answer), now, endpoints) else { return };
        let Noted { health: Health { hosts, ejected }, is_new, swept } = noted;
        if is_new {
            let address = std::str::from_utf8(&address).unwrap_or_default();
            log::warn!("outlier: target={:?} host={address:?} ejected={ejected} hosts={hosts}", self.name);
        }
        if swept > 0 {
            log::warn!("outlier: target={:?} by_interval={swept} ejected={ejected} hosts={hosts}", self.name);
        }
    }
}
