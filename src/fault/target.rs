//! Which requests of a route an experiment is aimed at.

use crate::host::Properties;
use crate::http::{HeaderId, Request};
use crate::matcher::StringMatch;

/// Whom a fault is for. Everything that is named has to fit; what names nothing fits all.
#[derive(Debug, Default)]
pub struct Target {
    /// The callers, by headers that they send ...
    pub headers: Vec<(HeaderId, StringMatch)>,
    /// ... and by what Envoy knows of them, such as the identity in their certificate: attributes, with dots.
    pub properties: Vec<(Box<str>, StringMatch)>,
    /// The route's destinations, by their indices.
    pub destinations: Vec<usize>,
    /// In an upstream filter: which of a request's attempts, counted from 1.
    pub attempts: Vec<u64>,
    /// In an upstream filter: which hosts.
    pub hosts: Vec<Host>,
}

/// A host of a cluster.
#[derive(Debug)]
pub struct Host {
    /// Its address and port, as Envoy writes them.
    pub address: Box<str>,
    /// The key of the shared word that says whether it is taken for ejected.
    pub word: Box<str>,
}

impl Target {
    /// Whether only an upstream filter can tell who is meant.
    pub fn is_upstream(&self) -> bool {
        !self.attempts.is_empty() || !self.hosts.is_empty()
    }

    /// Whether `request`, which goes to the route's destination with this index, is meant. Envoy is asked only for what
    /// is named.
    pub fn includes(&self, request: &Request<'_>, destination: usize, properties: &dyn Properties) -> bool {
        (self.destinations.is_empty() || self.destinations.contains(&destination))
            && self
                .headers
                .iter()
                .all(|(id, test)| request.joined(*id).is_some_and(|value| test.matches(&value, false)))
            && self.properties.iter().all(|(path, test)| {
                let path: Vec<&str> = path.split('.').collect();
                properties.property(&path).is_some_and(|value| test.matches(&value, false))
            })
            && (self.attempts.is_empty() || attempt(properties).is_some_and(|attempt| self.attempts.contains(&attempt)))
            && (self.hosts.is_empty() || self.host(properties).is_some())
    }

    /// Which of the named hosts the request goes to; in the place of an upstream filter only.
    pub fn host(&self, properties: &dyn Properties) -> Option<usize> {
        let address = properties.property(&["upstream", "address"])?;
        self.hosts.iter().position(|host| host.address.as_bytes() == address)
    }
}

/// Which attempt of its request this is, from 1; `None` anywhere but in an upstream filter.
pub fn attempt(properties: &dyn Properties) -> Option<u64> {
    let count = properties.property(&["upstream", "request_attempt_count"])?;
    count.try_into().ok().map(u64::from_le_bytes).filter(|attempt| *attempt > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;
    use crate::http::{HeaderNames, encode_headers};

    fn includes(target: &Target, host: &Sim, destination: usize) -> bool {
        let names = HeaderNames::default();
        target.includes(&Request::parse(&encode_headers(&[("cookie", "a=1")]), &names), destination, host)
    }

    #[test]
    fn everything_that_is_named_has_to_fit() {
        let host = Sim::new(1);
        assert!(includes(&Target::default(), &host, 7), "nothing is named");
        let mut target = Target { destinations: vec![1, 2], ..Target::default() };
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
        let hosts = Target {
            hosts: vec![super::Host { address: "127.0.0.1:80".into(), word: "w".into() }],
            ..Target::default()
        };
        let attempts = Target { attempts: vec![1], ..Target::default() };
        assert!(hosts.is_upstream() && attempts.is_upstream());
        assert!(!includes(&hosts, &host, 0) && !includes(&attempts, &host, 0));
        host.set_property("upstream.request_attempt_count", &0_u64.to_le_bytes());
        assert!(!includes(&attempts, &host, 0), "0 is said where there was no attempt yet");
        host.set_property("upstream.request_attempt_count", &1_u64.to_le_bytes());
        host.set_property("upstream.address", b"127.0.0.1:8");
        assert!(includes(&attempts, &host, 0) && !includes(&hosts, &host, 0));
        host.set_property("upstream.address", b"127.0.0.1:80");
        assert!(includes(&hosts, &host, 0));
        host.set_property("upstream.request_attempt_count", b"garbage");
        assert!(!includes(&attempts, &host, 0));
    }
}
