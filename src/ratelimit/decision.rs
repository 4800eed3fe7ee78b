//! Whether one request is admitted.

use super::gcra::Test;
use super::policy::{Limit, Secret};
use super::table::{Bucket, Place};
use crate::host::{Change, Properties, StateStore, update};
use crate::http::{LocalReply, Request};
use crate::units::{Monotonic, seconds_rounded_up};
use std::fmt::Write;
use std::hash::Hasher;

/// What the limits of a route say of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The limit that refused, an index into the route's limits, and nanoseconds until one would be admitted.
    pub refused: Option<(usize, u64)>,
    /// The limits in shadow that would have refused.
    pub would_refuse: Vec<usize>,
    /// Keys that found their bucket full and shared its overflow time.
    pub overflows: u64,
    /// Words that were not ours and were replaced.
    pub garbage: u64,
    /// Whether a compare-and-swap was given up; the request was refused then.
    pub contended: bool,
}

/// A charge that was made, to be taken back should a later limit refuse.
struct Charge<'p> {
    limit: &'p Limit,
    word: String,
    fingerprint: u64,
    place: Place,
}

/// Charges every limit, or none. `route` and `properties` are for the keys that ask for them.
pub fn admit(
    limits: &[Limit],
    secret: &Secret,
    request: &Request<'_>,
    route: &str,
    now: Monotonic,
    store: &(impl StateStore + Properties),
) -> Admission {
    let mut admission =
        Admission { refused: None, would_refuse: Vec::new(), overflows: 0, garbage: 0, contended: false };
    let mut charges: Vec<Charge<'_>> = Vec::with_capacity(limits.len());
    for (index, limit) in limits.iter().enumerate() {
        let (word, fingerprint) = locate(limit, secret, request, route, store);
        let mut garbage = false;
        let charged = update(store, &word, |found| {
            let decoded = found.map(|word| Bucket::decode(word, &limit.gcra, now));
            garbage = decoded == Some(None);
            let mut bucket = decoded.flatten().unwrap_or_default();
            match bucket.charge(fingerprint, &limit.gcra, now) {
                (Test::Conforms { .. }, place) => Change::Write(bucket.encode(), Ok(place)),
                (Test::TooEarly { wait }, _) => Change::Keep(Err(wait)),
            }
        });
        admission.garbage += u64::from(garbage);
        match charged {
            Ok(Ok(place)) => {
                admission.overflows += u64::from(place == Place::Overflow);
                charges.push(Charge { limit, word, fingerprint, place });
            }
            Ok(Err(_)) | Err(_) if limit.shadow => admission.would_refuse.push(index),
            Ok(Err(wait)) => {
                admission.refused = Some((index, wait));
                break;
            }
            Err(_) => {
                admission.contended = true;
                admission.refused = Some((index, 0));
                break;
            }
        }
    }
    if admission.refused.is_some() {
        for charge in &charges {
            charge.take_back(now, store);
        }
    }
    admission
}

impl Charge<'_> {
    /// A charge that cannot be taken back stays: that refuses too much, never too little.
    fn take_back(&self, now: Monotonic, store: &impl StateStore) {
        let _ = update(store, &self.word, |found| {
            let gcra = &self.limit.gcra;
            match found.and_then(|word| Bucket::decode(word, gcra, now)) {
                Some(mut bucket) => {
                    bucket.take_back(self.fingerprint, self.place, gcra);
                    Change::Write(bucket.encode(), ())
                }
                None => Change::Keep(()),
            }
        });
    }
}

impl Limit {
    /// The answer to a request that this limit refused, `wait` nanoseconds before it admits one.
    pub fn refusal(&self, wait: u64, is_grpc: bool) -> LocalReply {
        let seconds = seconds_rounded_up(wait).max(1);
        LocalReply {
            status: 429,
            details: "trimtab_rate_limited",
            headers: vec![("retry-after", seconds.to_string()), ("x-envoy-ratelimited", "true".to_owned())],
            body: format!("rate limit {} exceeded: {}; retry in {seconds} s", self.name, self.promise),
            // RESOURCE_EXHAUSTED
            grpc_status: is_grpc.then_some(8),
        }
    }
}

/// The shared word that holds the request's key, and the key's fingerprint in it.
fn locate(
    limit: &Limit,
    secret: &Secret,
    request: &Request<'_>,
    route: &str,
    properties: &dyn Properties,
) -> (String, u64) {
    let mut word = String::with_capacity(limit.prefix.len() + 8);
    word.push_str(&limit.prefix);
    if limit.key.is_empty() {
        return (word, 0);
    }
    let mut hasher = secret.hasher();
    for source in &limit.key {
        match source.find(request, route, properties) {
            Some(part) => {
                hasher.write_u64(part.len() as u64);
                hasher.write(&part);
            }
            None => hasher.write_u64(u64::MAX),
        }
    }
    let fingerprint = hasher.finish();
    let bucket = (u128::from(fingerprint) * u128::from(limit.buckets)) >> 64;
    let _ = write!(word, "{bucket:x}");
    (word, fingerprint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::{Node, Value};
    use crate::host::Version;
    use crate::host::sim::Sim;
    use crate::http::{HeaderNames, encode_headers};
    use std::time::Duration;

    const SECRET: Secret = Secret([7; 16]);

    fn limits(text: &str) -> (Vec<Limit>, HeaderNames) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let mut names = HeaderNames::default();
        let limits = super::super::config::read(&Value::root(&node, &report), "t/", "r", &mut names);
        assert_eq!(report.into_diagnostics(), []);
        (limits, names)
    }

    fn ask(limits: &[Limit], names: &HeaderNames, user: &str, host: &Sim) -> Admission {
        use crate::host::Host;
        let block = encode_headers(&[("x-user", user)]);
        admit(limits, &SECRET, &Request::parse(&block, names), "r", host.now(), host)
    }

    #[test]
    fn a_refusal_gives_back_what_the_others_charged() {
        let (limits, names) = limits(
            r#"[{"name": "all", "limit": {"requestsPerUnit": 10, "unit": "minute"}},
                {"name": "each", "limit": {"requestsPerUnit": 2, "unit": "minute"}, "key": [{"header": "x-user"}]}]"#,
        );
        let host = Sim::new(1);
        let admitted = |user: &str| ask(&limits, &names, user, &host).refused.is_none();
        assert_eq!((0..50).filter(|_| admitted("ann")).count(), 2);
        assert_eq!(ask(&limits, &names, "ann", &host).refused, Some((1, 30_000_000_000)));
        let others = (0..50).filter(|n| admitted(&format!("user-{n}"))).count();
        assert_eq!(others, 8, "ann's 48 refused requests spent nothing of the limit for all");
    }

    #[test]
    fn shadow_counts_and_lets_through() {
        let (limits, names) =
            limits(r#"[{"name": "a", "mode": "shadow", "limit": {"requestsPerUnit": 1, "unit": "second"}}]"#);
        let host = Sim::new(1);
        assert_eq!(ask(&limits, &names, "", &host).would_refuse, [] as [usize; 0]);
        let second = ask(&limits, &names, "", &host);
        assert_eq!((second.refused, second.would_refuse), (None, vec![0]));
        host.advance(Duration::from_secs(1));
        assert_eq!(ask(&limits, &names, "", &host).would_refuse, [] as [usize; 0]);
    }

    #[test]
    fn a_neighbours_garbage_is_replaced_and_counted() {
        let (limits, names) = limits(r#"[{"name": "a", "limit": {"requestsPerUnit": 1, "unit": "second"}}]"#);
        let host = Sim::new(1);
        host.set("t/limit/r/a/", b"garbage", Version::ABSENT).unwrap();
        let first = ask(&limits, &names, "", &host);
        assert_eq!((first.refused, first.garbage), (None, 1));
        assert!(ask(&limits, &names, "", &host).refused.is_some());
    }

    #[test]
    fn many_keys_take_a_bounded_number_of_words() {
        let (limits, names) = limits(
            r#"[{"name": "a", "maxKeys": 64, "limit": {"requestsPerUnit": 1, "unit": "hour"}, "key": [{"header": "x-user"}]}]"#,
        );
        let host = Sim::new(1);
        for n in 0..10_000 {
            ask(&limits, &names, &format!("user-{n}"), &host);
        }
        assert_eq!(host.keys().len(), 16);
    }

    #[test]
    fn a_missing_part_is_a_value_of_its_own() {
        let (limits, names) = limits(
            r#"[{"name": "a", "limit": {"requestsPerUnit": 1, "unit": "hour"}, "key": [{"header": "x-user"}, {"header": "x-org"}]}]"#,
        );
        let host = Sim::new(1);
        assert!(ask(&limits, &names, "ann", &host).refused.is_none());
        assert!(ask(&limits, &names, "bob", &host).refused.is_none());
        assert!(ask(&limits, &names, "ann", &host).refused.is_some());
    }
}
