//! Whether one request is admitted.

use super::gcra::Test;
use super::lease::Leases;
use super::policy::{Limit, Secret};
use super::table::{Bucket, Place, Reservation};
use crate::host::{Change, Conflict, Properties, StateStore, update};
use crate::http::{LocalReply, Request};
use crate::units::{Monotonic, seconds_rounded_up};
use std::hash::Hasher;

/// What the limits of a route say of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// What was charged; nothing where a limit refused.
    charges: Vec<Charge>,
}

/// A charge that was made, to be taken back should a later limit refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Charge {
    /// An index into the route's limits.
    limit: usize,
    fingerprint: u64,
    /// Where in shared data; `None` for a request that the worker had reserved.
    place: Option<Place>,
}

/// Charges every limit, or none. `route` and `properties` are for the keys that ask for them.
#[inline(never)]
pub fn admit(
    limits: &[Limit],
    secret: &Secret,
    leases: &mut Leases,
    request: &Request<'_>,
    route: &str,
    now: Monotonic,
    store: &(impl StateStore + Properties),
) -> Admission {
    let mut admission = Admission { charges: Vec::with_capacity(limits.len()), ..Admission::default() };
    for (index, limit) in limits.iter().enumerate() {
        let fingerprint = limit.fingerprint(secret, request, route, store);
        if limit.lease > 0 && leases.spend(limit.id, fingerprint, now) {
            admission.charges.push(Charge { limit: index, fingerprint, place: None });
            continue;
        }
        match limit.charge(fingerprint, leases, now, store, &mut admission) {
            Ok(Ok(place)) => {
                admission.overflows += u64::from(place == Place::Overflow);
                admission.charges.push(Charge { limit: index, fingerprint, place: Some(place) });
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
        take_back(&mut admission, limits, leases, now, store);
    }
    admission
}

/// Takes back what `limits` charged for a request that is not admitted after all.
#[inline(never)]
pub fn take_back(
    admission: &mut Admission,
    limits: &[Limit],
    leases: &mut Leases,
    now: Monotonic,
    store: &impl StateStore,
) {
    for charge in admission.charges.drain(..) {
        if let Some(limit) = limits.get(charge.limit) {
            charge.take_back(limit, leases, now, store);
        }
    }
}

impl Charge {
    /// A charge that cannot be taken back stays: that refuses too much, never too little.
    fn take_back(&self, limit: &Limit, leases: &mut Leases, now: Monotonic, store: &impl StateStore) {
        let Charge { fingerprint, .. } = *self;
        match self.place {
            None => leases.take_back(limit.id, fingerprint),
            Some(place) => {
                limit.amend(fingerprint, now, store, |bucket| bucket.take_back(fingerprint, place, &limit.gcra));
            }
        }
    }
}

/// Gives back what a worker has reserved and not used for a while. `limit` finds a limit by its id.
pub fn return_leases<'p>(
    leases: &mut Leases,
    limit: impl Fn(usize) -> Option<&'p Limit>,
    now: Monotonic,
    store: &impl StateStore,
) {
    for (id, fingerprint, reservation) in leases.ending(now) {
        if let Some(limit) = limit(id) {
            limit.amend(fingerprint, now, store, |bucket| bucket.settle(fingerprint, reservation, &limit.gcra, now));
        }
    }
}

impl Limit {
    /// Charges one request in shared data, settles what the worker had reserved, and reserves anew. Refused: the
    /// nanoseconds to wait.
    fn charge(
        &self,
        fingerprint: u64,
        leases: &mut Leases,
        now: Monotonic,
        store: &impl StateStore,
        admission: &mut Admission,
    ) -> Result<Result<Place, u64>, Conflict> {
        let gcra = &self.gcra;
        let (held, wanted) = match self.lease {
            0 => (Reservation::default(), 0),
            most => leases.renew(self.id, fingerprint, most, now),
        };
        let mut garbage = false;
        let mut reserved = 0;
        let charged = update(store, &self.word(fingerprint), |found| {
            let decoded = found.map(|word| Bucket::decode(word, gcra, now));
            garbage = decoded == Some(None);
            let mut bucket = decoded.flatten().unwrap_or_default();
            bucket.settle(fingerprint, held, gcra, now);
            match bucket.charge(fingerprint, gcra, now) {
                (Test::Conforms { .. }, place) => {
                    reserved = bucket.reserve(fingerprint, wanted, gcra, now);
                    Change::Write(bucket.encode(), Ok(place))
                }
                (Test::TooEarly { wait }, _) if held.size > 0 => Change::Write(bucket.encode(), Err(wait)),
                (Test::TooEarly { wait }, _) => Change::Keep(Err(wait)),
            }
        });
        admission.garbage += u64::from(garbage);
        if self.lease > 0 && charged.is_ok() {
            leases.hold(self.id, fingerprint, reserved, now);
        }
        charged
    }

    /// Changes the bucket of a key, if it is there.
    fn amend(&self, fingerprint: u64, now: Monotonic, store: &impl StateStore, change: impl Fn(&mut Bucket)) {
        let _ = update(store, &self.word(fingerprint), |found| {
            match found.and_then(|word| Bucket::decode(word, &self.gcra, now)) {
                Some(mut bucket) => {
                    change(&mut bucket);
                    Change::Write(bucket.encode(), ())
                }
                None => Change::Keep(()),
            }
        });
    }

    /// What stands for the request's key. Parts are told apart by their lengths, and a missing one from an empty one.
    fn fingerprint(&self, secret: &Secret, request: &Request<'_>, route: &str, properties: &dyn Properties) -> u64 {
        if self.key.is_empty() {
            return 0;
        }
        let mut hasher = secret.hasher();
        for source in &self.key {
            match source.find(request, route, properties) {
                Some(part) => {
                    hasher.write_u64(part.len() as u64);
                    hasher.write(&part);
                }
                None => hasher.write_u64(u64::MAX),
            }
        }
        hasher.finish()
    }

    /// The shared word that holds a key.
    fn word(&self, fingerprint: u64) -> String {
        let mut word = String::with_capacity(self.prefix.len() + 8);
        word.push_str(&self.prefix);
        if !self.key.is_empty() {
            let bucket = (u128::from(fingerprint) * u128::from(self.buckets)) >> 64;
            let digit = |digit: u32| char::from_digit(digit, 16).unwrap_or('0');
            word.extend((0..8).map(|place| digit((bucket >> (28 - place * 4)) as u32 & 0xf)));
        }
        word
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::{Node, Value};
    use crate::host::sim::Sim;
    use crate::host::{Host, Version};
    use crate::http::{HeaderNames, encode_headers};
    use std::time::Duration;

    const SECRET: Secret = Secret([7; 16]);

    fn limits(text: &str) -> (Vec<Limit>, HeaderNames) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let mut names = HeaderNames::default();
        let (limits, _) = super::super::config::read(&Value::root(&node, &report), 0, "t/", "r", &mut names);
        assert_eq!(report.into_diagnostics(), []);
        (limits, names)
    }

    fn ask(limits: &[Limit], names: &HeaderNames, user: &str, host: &Sim) -> Admission {
        ask_in(&mut Leases::default(), limits, names, user, host)
    }

    fn ask_in(leases: &mut Leases, limits: &[Limit], names: &HeaderNames, user: &str, host: &Sim) -> Admission {
        let block = encode_headers(&[("x-user", user)]);
        admit(limits, &SECRET, leases, &Request::parse(&block, names), "r", host.now(), host)
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

    /// 2,000 requests a second for ten seconds over four workers: how many were admitted, with how many writes.
    fn under_load(limit: &str) -> (u64, u64) {
        let (limits, names) =
            limits(&format!(r#"[{{"name": "a", "limit": {limit}, "key": [{{"header": "x-user"}}]}}]"#));
        let host = Sim::new(1);
        let mut workers: Vec<Leases> = (0..4).map(|_| Leases::default()).collect();
        let mut admitted = 0;
        for n in 0..20_000 {
            let leases = &mut workers[n % 4];
            admitted += u64::from(ask_in(leases, &limits, &names, "ann", &host).refused.is_none());
            host.advance(Duration::from_micros(500));
        }
        (admitted, host.writes())
    }

    #[test]
    fn a_hot_key_is_leased() {
        let (admitted, writes) = under_load(r#"{"requestsPerUnit": 40000, "unit": "second"}"#);
        assert_eq!(admitted, 20_000);
        assert!(writes < 600, "{writes} writes for {admitted} requests");
    }

    #[test]
    fn leases_admit_no_more_and_hardly_less() {
        let (admitted, _) = under_load(r#"{"requestsPerUnit": 1000, "unit": "second"}"#);
        assert!((10_890..=11_000).contains(&admitted), "{admitted} of 1000 at once and 10 times 1000");
    }

    mod leases {
        use super::*;
        use proptest::prelude::*;

        proptest! {
            /// Any number of workers, at any pace, some of which vanish with what they hold: never one more.
            #[test]
            fn never_over_admit(
                steps in proptest::collection::vec((0..5_usize, 0..40_000_000_u64, 0..200_u8), 1..800),
            ) {
                let (mut limits, names) = limits(
                    r#"[{"name": "a", "limit": {"requestsPerUnit": 50, "unit": "second", "burst": 64}, "key": [{"header": "x-user"}]}]"#,
                );
                limits[0].lease = 8;
                let host = Sim::new(1);
                let mut workers: Vec<Leases> = (0..5).map(|_| Leases::default()).collect();
                let mut admitted: Vec<u64> = Vec::new();
                for (worker, step, event) in steps {
                    host.advance(Duration::from_nanos(step));
                    match event {
                        0 => workers[worker] = Leases::default(),
                        1..=4 => return_leases(&mut workers[worker], |id| limits.get(id), host.now(), &host),
                        _ => {}
                    }
                    if ask_in(&mut workers[worker], &limits, &names, "ann", &host).refused.is_none() {
                        admitted.push(host.now());
                    }
                }
                let interval = 20_000_000;
                for (first, since) in admitted.iter().enumerate() {
                    for (last, until) in admitted.iter().enumerate().skip(first) {
                        let count = (last - first + 1) as u64;
                        prop_assert!(count <= 64 + (until - since) / interval, "{count} in {} ns", until - since);
                    }
                }
            }
        }
    }
}
