//! The answers of Envoy's admin endpoint to `GET /clusters?format=json`: which hosts Envoy itself has ejected.
//!
//! Reading an answer is bounded in size and depth. An answer that cannot be read leaves the state of the hosts unknown,
//! which is not the same as healthy. The result is one [`AdminSnapshot`] in shared data for each target, with its time, so
//! that every worker can determine its age.

use super::hosts::EjectionStats;
use crate::document::Node;
use crate::shared_data::Record;
use crate::units::MonotonicInstant;

/// The longest answer that is read, in bytes. That is enough for several hundred hosts.
pub const MAX_ANSWER_BYTES: usize = crate::document::MAX_DOCUMENT_BYTES;

/// The path that requests the status of `clusters` only. Its parameter `filter` is a regular expression. A character that
/// is special in a regular expression or in a path is replaced by `.`, which matches any character; the answer contains the
/// names of its clusters anyway.
pub(super) fn path<'n>(clusters: impl Iterator<Item = &'n str>) -> String {
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

/// A complete answer.
#[derive(Debug)]
pub(super) struct ClusterStatuses(Node);

impl ClusterStatuses {
    /// Reads an answer. `None` if it is incomplete, too large or not a list of clusters.
    pub(super) fn read(body: &[u8]) -> Option<ClusterStatuses> {
        let node = Node::from_json(body).ok()?;
        field(&node, "cluster_statuses")?;
        Some(ClusterStatuses(node))
    }

    /// The hosts of `cluster`. `None` if the answer does not contain the cluster, or contains no host of it.
    pub(super) fn stats(&self, cluster: &str) -> Option<EjectionStats> {
        let is_wanted = |status: &&Node| matches!(field(status, "name"), Some(Node::String(name)) if name == cluster);
        let status = items(field(&self.0, "cluster_statuses")?).iter().find(is_wanted)?;
        let hosts = items(field(status, "host_statuses")?);
        let is_ejected = |host: &&Node| {
            let health = field(host, "health_status");
            let check = health.and_then(|health| field(health, "failed_outlier_check"));
            matches!(check, Some(Node::Bool(true)))
        };
        let ejected = hosts.iter().filter(is_ejected).count() as u64;
        (!hosts.is_empty()).then_some(EjectionStats { hosts: hosts.len() as u64, ejected })
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

/// The state of a target's hosts as Envoy reported it, and when it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminSnapshot {
    pub at: MonotonicInstant,
    pub stats: EjectionStats,
}

impl Record for AdminSnapshot {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        for value in [self.at.as_nanos(), self.stats.hosts, self.stats.ejected] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<AdminSnapshot> {
        let ([at, hosts, ejected], []) = bytes.as_chunks::<8>() else { return None };
        let [at, hosts, ejected] = [at, hosts, ejected].map(|bytes| u64::from_le_bytes(*bytes));
        let fits = schema == Self::SCHEMA && hosts > 0 && hosts <= u64::from(u32::MAX);
        fits.then_some(AdminSnapshot { at: MonotonicInstant::from_nanos(at), stats: EjectionStats { hosts, ejected } })
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
        let clusters = ClusterStatuses::read(ANSWER.as_bytes()).unwrap();
        assert_eq!(clusters.stats("v1"), Some(EjectionStats { hosts: 5, ejected: 1 }));
        for unknown in ["v", "v11", "empty", "bare", ""] {
            assert_eq!(clusters.stats(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn an_incomplete_answer_is_not_read() {
        for length in 0..ANSWER.len() {
            assert!(ClusterStatuses::read(&ANSWER.as_bytes()[..length]).is_none(), "cut after {length} bytes");
        }
        let huge = format!("{ANSWER}{}", " ".repeat(MAX_ANSWER_BYTES));
        for bad in ["", "no healthy upstream", "[]", "{}", "null", "\u{fffd}", &"[".repeat(100_000), &huge] {
            assert!(ClusterStatuses::read(bad.as_bytes()).is_none(), "{:.40}", bad);
        }
        let odd = ClusterStatuses::read(br#"{"cluster_statuses": {"name": "v1"}}"#).unwrap();
        assert_eq!(odd.stats("v1"), None);
    }

    #[test]
    fn the_path_requests_the_clusters_only() {
        assert_eq!(path(["v1"].into_iter()), "/clusters?format=json&filter=%5E(v1)%24");
        let istio = path(["outbound|80|v1|a.b", "x y\n"].into_iter());
        assert_eq!(istio, "/clusters?format=json&filter=%5E(outbound.80.v1.a.b%7Cx.y.)%24");
    }

    proptest! {
        #[test]
        fn a_snapshot_is_read_as_it_was_written(nanoseconds: u64, hosts in 1..1_000_u64, ejected in 0..1_000_u64) {
            let snapshot = AdminSnapshot { at: at(nanoseconds), stats: EjectionStats { hosts, ejected } };
            let mut bytes = Vec::new();
            snapshot.encode(&mut bytes);
            prop_assert_eq!(AdminSnapshot::decode(1, &bytes), Some(snapshot));
        }

        #[test]
        fn any_bytes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..30)) {
            if let Some(snapshot) = AdminSnapshot::decode(1, &bytes) {
                snapshot.stats.ejected_share();
            }
        }
    }
}
