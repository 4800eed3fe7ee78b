//! The requests of a route that an experiment targets.

use crate::host::Properties;
use crate::http::{HeaderId, Request};
use crate::matcher::StringMatch;

/// The requests that may be faulted. Every condition has to hold; without conditions, all requests are targeted.
#[derive(Debug, Default)]
pub struct FaultTarget {
    /// Conditions on request headers.
    pub headers: Vec<(HeaderId, StringMatch)>,
    /// Conditions on Envoy's attributes, such as the identity in the client's certificate. Paths have dots.
    pub properties: Vec<(Box<str>, StringMatch)>,
    /// The indices of the targeted destinations of the route; empty for all.
    pub destinations: Vec<usize>,
    /// The targeted attempts of a request, from 1; empty for all. Only an upstream filter can test it.
    pub attempts: Vec<u64>,
    /// The addresses and ports of the targeted hosts, as Envoy writes them; empty for all. Only an upstream filter can
    /// test it.
    pub hosts: Vec<Box<str>>,
}

impl FaultTarget {
    /// Whether only an upstream filter can test the conditions.
    pub(super) fn is_upstream(&self) -> bool {
        !self.attempts.is_empty() || !self.hosts.is_empty()
    }

    /// Whether `request`, which goes to the route's destination with this index, is targeted. Properties are read only for
    /// conditions that exist.
    pub(super) fn includes(&self, request: &Request<'_>, destination: usize, properties: &dyn Properties) -> bool {
        (self.destinations.is_empty() || self.destinations.contains(&destination))
            && self
                .headers
                .iter()
                .all(|(id, test)| request.joined(*id).is_some_and(|value| test.matches(&value, false)))
            && self.properties.iter().all(|(path, test)| {
                let path: Vec<&str> = path.split('.').collect();
                properties.property(&path).is_some_and(|value| test.matches(&value, false))
            })
            && (self.attempts.is_empty()
                || attempt_number(properties).is_some_and(|attempt| self.attempts.contains(&attempt)))
            && (self.hosts.is_empty() || self.host(properties).is_some())
    }

    /// The index of the targeted host that the request goes to. `None` for another host, or outside of an upstream filter.
    pub(super) fn host(&self, properties: &dyn Properties) -> Option<usize> {
        let address = properties.property(&["upstream", "address"])?;
        self.hosts.iter().position(|host| host.as_bytes() == address)
    }
}

/// The number of this attempt of its request, from 1. `None` outside of an upstream filter.
pub(super) fn attempt_number(properties: &dyn Properties) -> Option<u64> {
    let count = properties.property(&["upstream", "request_attempt_count"])?;
    count.try_into().ok().map(u64::from_le_bytes).filter(|attempt| *attempt > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;
    use crate::http::{HeaderNames, encode_headers};

    fn includes(target: &FaultTarget, host: &Sim, destination: usize) -> bool {
        let names = HeaderNames::default();
        target.includes(&Request::parse(&encode_headers(&[("cookie", "a=1")]), &names), destination, host)
    }

    #[test]
    fn every_condition_has_to_hold() {
        let host = Sim::new(1);
        assert!(includes(&FaultTarget::default(), &host, 7), "no condition");
        let mut target = FaultTarget { destinations: vec![1, 2], ..FaultTarget::default() };
        assert!(includes(&target, &host, 2) && !includes(&target, &host, 0));
        target.properties = vec![(
            "connection.uri_san_peer_certificate".into(),
            StringMatch::Prefix(b"spiffe://shop/".as_slice().into()),
        )];
        assert!(!includes(&target, &host, 1), "a caller without a certificate");
        host.set_property("connection.uri_san_peer_certificate", b"spiffe://shop/cart");
        assert!(includes(&target, &host, 1));
        target.headers = vec![(HeaderNames::COOKIE, StringMatch::Exact(b"a=2".as_slice().into()))];
        assert!(!includes(&target, &host, 1));
    }

    #[test]
    fn hosts_and_attempts_are_known_to_an_upstream_filter_only() {
        let host = Sim::new(1);
        let hosts = FaultTarget { hosts: vec!["127.0.0.1:80".into()], ..FaultTarget::default() };
        let attempts = FaultTarget { attempts: vec![1], ..FaultTarget::default() };
        assert!(hosts.is_upstream() && attempts.is_upstream());
        assert!(!includes(&hosts, &host, 0) && !includes(&attempts, &host, 0));
        host.set_property("upstream.request_attempt_count", &0_u64.to_le_bytes());
        assert!(!includes(&attempts, &host, 0), "0 means that there was no attempt yet");
        host.set_property("upstream.request_attempt_count", &1_u64.to_le_bytes());
        host.set_property("upstream.address", b"127.0.0.1:8");
        assert!(includes(&attempts, &host, 0) && !includes(&hosts, &host, 0));
        host.set_property("upstream.address", b"127.0.0.1:80");
        assert!(includes(&hosts, &host, 0));
        host.set_property("upstream.request_attempt_count", b"garbage");
        assert!(!includes(&attempts, &host, 0));
    }
}
