//! Envoy's own word on which hosts it has ejected: its admin endpoint, `GET /clusters?format=json`.
//!
//! An answer is read with bounds, and what cannot be read says nothing: *unknown* is not *well*. What was learned is one
//! shared word for each target, with the time of the answer, so that everybody knows how old it is.

use super::hosts::Health;
use crate::document::Node;
use crate::units::MonotonicInstant;

/// The longest answer that is read, in bytes: some hundred hosts of the clusters that were asked for.
pub const MAX_ANSWER_BYTES: usize = crate::document::MAX_DOCUMENT_BYTES;

/// The first byte of the words, to be changed with their layout.
const SCHEMA: u8 = 1;

/// The path that asks for `clusters` only. `filter` is a regular expression: what could be special in it, or in a path,
/// is replaced by "any character", because the answer names its clusters anyway.
pub fn path<'n>(clusters: impl Iterator<Item = &'n str>) -> String {
    let mut path = String::from("/clusters?format=json&filter=%5E(");
    for (index, name) in clusters.enumerate() {
        if index > 0 {
            path.push_str("%7C");
        }
        path.extend(name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '.' }));
    }
    path.push_str(")%24");
    path
}

/// An answer that could be read.
#[derive(Debug)]
pub struct Clusters(Node);

impl Clusters {
    /// Reads an answer; `None` where it is no such thing, whole and within the bounds.
    pub fn read(body: &[u8]) -> Option<Clusters> {
        let node = Node::from_json(body).ok()?;
        field(&node, "cluster_statuses")?;
        Some(Clusters(node))
    }

    /// The hosts of `cluster`; `None` where the answer does not speak of it, or has no host for it.
    pub fn health(&self, cluster: &str) -> Option<Health> {
        let is_wanted = |status: &&Node| matches!(field(status, "name"), Some(Node::String(name)) if name == cluster);
        let status = items(field(&self.0, "cluster_statuses")?).iter().find(is_wanted)?;
        let hosts = items(field(status, "host_statuses")?);
        let is_ejected = |host: &&Node| {
            let health = field(host, "health_status");
            let check = health.and_then(|health| field(health, "failed_outlier_check"));
            matches!(check, Some(Node::Bool(true)))
        };
        let ejected = hosts.iter().filter(is_ejected).count() as u64;
        (!hosts.is_empty()).then_some(Health { hosts: hosts.len() as u64, ejected })
    }
}

fn field<'n>(node: &'n Node, name: &str) -> Option<&'n Node> {
    let Node::Object(entries) = node else { return None };
    entries.iter().find(|(key, _)| key == name).map(|(_, value)| value)
}

fn items(node: &Node) -> &[Node] {
    match node {
        Node::Array(items) => items,
        _ => &[],
    }
}

/// What Envoy said of a target's hosts, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    pub at: MonotonicInstant,
    pub health: Health,
}

impl Sighting {
    pub fn encode(&self) -> Vec<u8> {
        let mut word = vec![SCHEMA];
        for value in [self.at.as_nanos(), self.health.hosts, self.health.ejected] {
            word.extend_from_slice(&value.to_le_bytes());
        }
        word
    }

    pub fn decode(word: &[u8]) -> Option<Sighting> {
        let (&SCHEMA, rest) = word.split_first()? else { return None };
        let ([at, hosts, ejected], []) = rest.as_chunks::<8>() else { return None };
        let [at, hosts, ejected] = [at, hosts, ejected].map(|bytes| u64::from_le_bytes(*bytes));
        let fits = hosts > 0 && hosts <= u64::from(u32::MAX);
        fits.then_some(Sighting { at: MonotonicInstant::from_nanos(at), health: Health { hosts, ejected } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::at;
    use proptest::prelude::*;

    const ANSWER: &str = r#"{"cluster_statuses": [
        {"name": "v1", "added_via_api": false, "host_statuses": [
            {"address": {}, "health_status": {"eds_health_status": "HEALTHY", "failed_outlier_check": true}},
            {"address": {}, "health_status": {"eds_health_status": "HEALTHY", "failed_outlier_check": false}},
            {"address": {}, "health_status": {"eds_health_status": "HEALTHY"}}, 7, {}]},
        {"name": "empty", "host_statuses": []},
        {"name": "bare"}, 5]}"#;

    #[test]
    fn ejected_hosts_are_counted() {
        let clusters = Clusters::read(ANSWER.as_bytes()).unwrap();
        assert_eq!(clusters.health("v1"), Some(Health { hosts: 5, ejected: 1 }));
        for unknown in ["v", "v11", "empty", "bare", ""] {
            assert_eq!(clusters.health(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn what_is_not_whole_says_nothing() {
        for length in 0..ANSWER.len() {
            assert!(Clusters::read(&ANSWER.as_bytes()[..length]).is_none(), "cut after {length} bytes");
        }
        let huge = format!("{ANSWER}{}", " ".repeat(MAX_ANSWER_BYTES));
        for bad in ["", "no healthy upstream", "[]", "{}", "null", "\u{fffd}", &"[".repeat(100_000), &huge] {
            assert!(Clusters::read(bad.as_bytes()).is_none(), "{:.40}", bad);
        }
        let odd = Clusters::read(br#"{"cluster_statuses": {"name": "v1"}}"#).unwrap();
        assert_eq!(odd.health("v1"), None);
    }

    #[test]
    fn a_path_asks_for_its_clusters_only() {
        assert_eq!(path(["v1"].into_iter()), "/clusters?format=json&filter=%5E(v1)%24");
        let istio = path(["outbound|80|v1|a.b", "x y\n"].into_iter());
        assert_eq!(istio, "/clusters?format=json&filter=%5E(outbound.80.v1.a.b%7Cx.y.)%24");
    }

    proptest! {
        #[test]
        fn a_sighting_is_read_as_it_was_written(nanoseconds: u64, hosts in 1..1_000_u64, ejected in 0..1_000_u64) {
            let sighting = Sighting { at: at(nanoseconds), health: Health { hosts, ejected } };
            prop_assert_eq!(Sighting::decode(&sighting.encode()), Some(sighting));
        }

        #[test]
        fn no_word_is_too_odd(word in proptest::collection::vec(any::<u8>(), 0..30)) {
            if let Some(sighting) = Sighting::decode(&word) {
                sighting.health.ejected_share();
            }
        }
    }
}
