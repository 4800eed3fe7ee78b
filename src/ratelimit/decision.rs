//! Whether one request is admitted.

use super::gcra::Test;
use super::lease::Leases;
use super::policy::{Keyspace, Limit, OnMissing, Rate, Secret};
use super::table::{Bucket, Place, Reservation, Standing};
use crate::host::{Change, Conflict, SharedData, update};
use crate::key::KeyContext;
use crate::units::MonotonicInstant;
use std::hash::Hasher;

/// What the limits of a route say of a request. Limits are indices into the route's limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    pub refused: Option<Refusal>,
    pub remarks: Vec<Remark>,
    /// The limit that leaves the least, of those that tell.
    pub told: Option<Told>,
    /// What is held until the answer is known.
    pub held: Vec<Held>,
    /// Keys that found their bucket full and shared its overflow time.
    pub overflows: u64,
    /// Words that were not ours and were replaced.
    pub garbage: u64,
    /// Whether a compare-and-swap was given up; the request was refused then.
    pub contended: bool,
    /// What was charged, as far as somebody may yet refuse; nothing where a limit has.
    charges: Vec<Charged>,
}

/// What else is to be counted. Limits are as in [`Admission`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remark {
    /// This limit is in shadow and would have refused.
    WouldRefuse(usize),
    /// This candidate of a limit, an index into its candidates, would have refused.
    CandidateWouldRefuse(usize, usize),
    /// The request lacks a part of this limit's key.
    Incomplete(usize),
}

/// Which limit refused, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    pub told: Told,
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It would be admitted in so many nanoseconds.
    TooEarly(u64),
    /// It costs more than the burst.
    TooDear,
    /// It lacks a part of the key.
    Incomplete,
}

/// What is left under one limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    pub limit: usize,
    /// The override that matches the key.
    pub exception: Option<usize>,
    /// How many requests could follow at once.
    pub remaining: u64,
    /// Nanoseconds until the whole burst could follow; where nothing remains, until one request could.
    pub reset: u64,
}

/// Room that is kept for a request until it is known whether it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    limit: usize,
    /// An index into the limit's candidates, where the room is one's.
    candidate: Option<usize>,
    exception: Option<usize>,
    fingerprint: u64,
    reservation: Reservation,
}

/// A request's key.
struct Key {
    fingerprint: u64,
    /// The first override that matches.
    exception: Option<usize>,
    is_incomplete: bool,
}

/// A charge that was made, to be taken back should somebody refuse later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Charged {
    limit: usize,
    /// As in [`Held`].
    candidate: Option<usize>,
    exception: Option<usize>,
    fingerprint: u64,
    cost: u32,
    booked: Booked,
}

/// A charge to be made.
#[derive(Clone, Copy)]
struct Charge<'p> {
    keyspace: &'p Keyspace,
    rate: &'p Rate,
    fingerprint: u64,
    cost: u32,
    /// Whether it is to be held until the answer is known.
    is_held: bool,
    /// Whether somebody wants to know what is left.
    is_told: bool,
}

/// Where a charge was booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Booked {
    /// In what the worker had reserved.
    Lease,
    In(Place),
    Held(Reservation),
}

/// Charges every limit, or none. `is_last`: nobody refuses after these limits, so that the last one's charge is never
/// taken back.
pub fn admit(
    limits: &[Limit],
    is_last: bool,
    secret: &Secret,
    leases: &mut Leases,
    context: &KeyContext<'_, '_>,
    now: MonotonicInstant,
    store: &impl SharedData,
) -> Admission {
    let mut admission = Admission::default();
    let mut candidates_from = usize::MAX;
    for (index, limit) in limits.iter().enumerate() {
        let key = limit.key_of(secret, context);
        let Key { fingerprint, exception, .. } = key;
        let mut told = Told { limit: index, exception, ..Told::default() };
        if key.is_incomplete {
            admission.remarks.push(Remark::Incomplete(index));
            match limit.on_missing {
                OnMissing::Share => {}
                OnMissing::Skip => continue,
                OnMissing::Deny if limit.shadow => {
                    admission.remarks.push(Remark::WouldRefuse(index));
                    continue;
                }
                OnMissing::Deny => {
                    admission.refused = Some(Refusal { reason: Reason::Incomplete, told });
                    break;
                }
            }
        }
        let cost = limit.cost.of(context.request);
        if cost == 0 {
            continue;
        }
        let charge = Charge {
            keyspace: &limit.keyspace,
            rate: limit.rate_of(exception),
            fingerprint,
            cost,
            is_held: limit.counted.is_some(),
            is_told: limit.answer.tells() && !limit.shadow,
        };
        // A candidate sees what the rate in force would refuse: it may be the more generous one.
        let charged = Charged { limit: index, candidate: None, exception, fingerprint, cost, booked: Booked::Lease };
        let first_candidate = admission.charges.len();
        for (number, candidate) in limit.candidates.iter().enumerate().filter(|_| exception.is_none()) {
            let charge = Charge { keyspace: &candidate.keyspace, rate: &candidate.rate, is_told: false, ..charge };
            match charge.make(leases, now, store, &mut admission) {
                Ok((booked, _)) => {
                    if let Booked::Held(reservation) = booked {
                        let candidate = Some(number);
                        admission.held.push(Held { limit: index, candidate, exception, fingerprint, reservation });
                    }
                    admission.charges.push(Charged { candidate: Some(number), booked, ..charged });
                }
                Err(_) => admission.remarks.push(Remark::CandidateWouldRefuse(index, number)),
            }
        }
        match charge.make(leases, now, store, &mut admission) {
            Ok((booked, standing)) => {
                if let Booked::Held(reservation) = booked {
                    admission.held.push(Held { limit: index, candidate: None, exception, fingerprint, reservation });
                }
                if let Some(Standing { remaining, reset }) = standing
                    && admission.told.is_none_or(|other| (remaining, other.reset) < (other.remaining, reset))
                {
                    admission.told = Some(Told { remaining, reset, ..told });
                }
                // Nobody refuses after the last.
                if !is_last || index + 1 < limits.len() {
                    admission.charges.push(Charged { booked, ..charged });
                }
            }
            Err(_) if limit.shadow => admission.remarks.push(Remark::WouldRefuse(index)),
            Err((reason, standing)) => {
                if let Some(Standing { remaining, reset }) = standing {
                    (told.remaining, told.reset) = (remaining, reset);
                }
                admission.refused = Some(Refusal { reason, told });
                // What its own candidates would have admitted, they have; unless the answer is needed to tell.
                candidates_from = first_candidate;
                break;
            }
        }
    }
    if admission.refused.is_some() {
        for (number, charged) in std::mem::take(&mut admission.charges).into_iter().enumerate() {
            if number < candidates_from || matches!(charged.booked, Booked::Held(_)) {
                charged.take_back(limits, leases, now, store);
            }
        }
        admission.told = None;
        admission.held.clear();
    }
    admission
}

/// Takes back what `limits` charged, or hold, for a request that is not admitted after all.
#[inline(never)]
pub fn take_back(
    admission: &mut Admission,
    limits: &[Limit],
    leases: &mut Leases,
    now: MonotonicInstant,
    store: &impl SharedData,
) {
    for charged in admission.charges.drain(..) {
        charged.take_back(limits, leases, now, store);
    }
}

/// The rate that a charge was made at, and where its key is kept.
fn find_rate(
    limits: &[Limit],
    limit: usize,
    candidate: Option<usize>,
    exception: Option<usize>,
) -> Option<(&Keyspace, &Rate)> {
    let limit = limits.get(limit)?;
    Some(match candidate.and_then(|candidate| limit.candidates.get(candidate)) {
        Some(candidate) => (&candidate.keyspace, &candidate.rate),
        None => (&limit.keyspace, limit.rate_of(exception)),
    })
}

impl Charge<'_> {
    /// Charges in the worker's lease or in shared data, where it also settles what the worker had reserved and reserves
    /// anew.
    fn make(
        &self,
        leases: &mut Leases,
        now: MonotonicInstant,
        store: &impl SharedData,
        admission: &mut Admission,
    ) -> Result<(Booked, Option<Standing>), (Reason, Option<Standing>)> {
        let Charge { keyspace, rate, fingerprint, cost, is_held, is_told } = *self;
        let terms = &rate.terms;
        if rate.lease > 0 && leases.spend(rate.id, fingerprint, cost, now) {
            return Ok((Booked::Lease, None));
        }
        let (lease, wanted) = match rate.lease {
            0 => (Reservation::default(), 0),
            most => leases.renew(rate.id, fingerprint, most, now),
        };
        let (mut garbage, mut reserved, mut standing) = (false, 0, None);
        let charged = update(store, &keyspace.word(fingerprint), |found| {
            let decoded = found.map(|word| Bucket::decode(word, &keyspace.longest, now));
            garbage = decoded == Some(None);
            let mut bucket = decoded.flatten().unwrap_or_default();
            if lease.size > 0 {
                bucket.settle(fingerprint, lease, terms, now);
            }
            let (test, place) = bucket.charge(fingerprint, cost, terms, &keyspace.longest, now);
            let conforms = matches!(test, Test::Conforms { .. });
            if conforms && is_held {
                bucket.hold(fingerprint, cost, terms, now);
            }
            if conforms && wanted > 0 {
                reserved = bucket.reserve(fingerprint, wanted, terms, now);
            }
            standing = is_told.then(|| bucket.standing(fingerprint, terms, now));
            match test {
                Test::Conforms { .. } => Change::Write(bucket.encode(), Ok(place)),
                Test::TooEarly { wait } if lease.size > 0 => Change::Write(bucket.encode(), Err(wait)),
                Test::TooEarly { wait } => Change::Keep(Err(wait)),
            }
        });
        admission.garbage += u64::from(garbage);
        if rate.lease > 0 && charged.is_ok() {
            leases.hold(rate.id, fingerprint, reserved, now);
        }
        match charged {
            Ok(Ok(Place::Own)) if is_held => {
                let reservation = Reservation { epoch: terms.epoch_of(now), size: cost, used: 0 };
                Ok((Booked::Held(reservation), standing))
            }
            Ok(Ok(place)) => {
                admission.overflows += u64::from(place == Place::Overflow);
                Ok((Booked::In(place), standing))
            }
            Ok(Err(_)) if u64::from(cost) > terms.gcra.burst() => Err((Reason::TooDear, standing)),
            Ok(Err(wait)) => Err((Reason::TooEarly(wait), standing)),
            Err(Conflict) => {
                admission.contended = true;
                Err((Reason::TooEarly(0), None))
            }
        }
    }
}

impl Charged {
    /// A charge that cannot be taken back stays: that refuses too much, never too little.
    fn take_back(&self, limits: &[Limit], leases: &mut Leases, now: MonotonicInstant, store: &impl SharedData) {
        let Charged { limit, candidate, exception, fingerprint, cost, booked } = *self;
        let Some((keyspace, rate)) = find_rate(limits, limit, candidate, exception) else { return };
        let terms = &rate.terms;
        match booked {
            Booked::Lease => leases.take_back(rate.id, fingerprint, cost),
            Booked::In(place) => keyspace
                .amend(fingerprint, now, store, &|bucket| bucket.take_back(fingerprint, cost, place, terms, now)),
            Booked::Held(reservation) => {
                keyspace.amend(fingerprint, now, store, &|bucket| bucket.settle(fingerprint, reservation, terms, now))
            }
        }
    }
}

/// Settles what was held for a request, now that its answer is known: `status`, or `None` where it is to be forgotten
/// because the answer tells nothing of the request.
pub fn settle(limits: &[Limit], held: &[Held], status: Option<u16>, now: MonotonicInstant, store: &impl SharedData) {
    for held in held {
        let Some(limit) = limits.get(held.limit) else { continue };
        let Some((keyspace, rate)) = find_rate(limits, held.limit, held.candidate, held.exception) else { continue };
        let counts = |status| limit.counted.as_ref().is_some_and(|statuses| statuses.contains(status));
        let mut reservation = held.reservation;
        reservation.used = if status.is_some_and(counts) { reservation.size } else { 0 };
        keyspace.amend(held.fingerprint, now, store, &|bucket| {
            bucket.settle(held.fingerprint, reservation, &rate.terms, now);
        });
    }
}

/// Gives back what a worker has reserved and not used for a while. `find` finds a rate by its id, and where its keys are
/// kept.
pub fn return_leases<'p>(
    leases: &mut Leases,
    find: impl Fn(usize) -> Option<(&'p Keyspace, &'p Rate)>,
    now: MonotonicInstant,
    store: &impl SharedData,
) {
    for (id, fingerprint, reservation) in leases.ending(now) {
        if let Some((keyspace, rate)) = find(id) {
            keyspace.amend(fingerprint, now, store, &|bucket| {
                bucket.settle(fingerprint, reservation, &rate.terms, now);
            });
        }
    }
}

impl Keyspace {
    /// Changes the bucket of a key, if it is there.
    fn amend(&self, fingerprint: u64, now: MonotonicInstant, store: &impl SharedData, change: &dyn Fn(&mut Bucket)) {
        let _ = update(store, &self.word(fingerprint), |found| {
            match found.and_then(|word| Bucket::decode(word, &self.longest, now)) {
                Some(mut bucket) => {
                    change(&mut bucket);
                    Change::Write(bucket.encode(), ())
                }
                None => Change::Keep(()),
            }
        });
    }

    /// The shared word that holds a key.
    fn word(&self, fingerprint: u64) -> String {
        let mut word = String::with_capacity(self.prefix.len() + 8);
        word.push_str(&self.prefix);
        if self.buckets > 1 {
            let bucket = (u128::from(fingerprint) * u128::from(self.buckets)) >> 64;
            let digit = |digit: u32| char::from_digit(digit, 16).unwrap_or('0');
            word.extend((0..8).map(|place| digit((bucket >> (28 - place * 4)) as u32 & 0xf)));
        }
        word
    }
}

impl Limit {
    /// What stands for the request's key, and which override is for it. Parts are told apart by their lengths, and a
    /// missing one from an empty one.
    fn key_of(&self, secret: &Secret, context: &KeyContext<'_, '_>) -> Key {
        let mut key = Key { fingerprint: 0, exception: None, is_incomplete: false };
        if self.key.is_empty() {
            return key;
        }
        let mut hasher = secret.hasher();
        let mut matching = u64::MAX;
        for (place, source) in self.key.iter().enumerate() {
            let part = source.extract(context);
            match &part {
                Some(part) => {
                    hasher.write_u64(part.len() as u64);
                    hasher.write(part);
                }
                None => {
                    hasher.write_u64(u64::MAX);
                    key.is_incomplete = true;
                }
            }
            for (index, exception) in self.overrides.iter().enumerate() {
                if let Some(Some(wanted)) = exception.parts.get(place)
                    && part.as_deref() != Some(wanted.as_bytes())
                {
                    matching &= !(1 << index);
                }
            }
        }
        key.fingerprint = hasher.finish();
        key.exception = Some(matching.trailing_zeros() as usize).filter(|index| *index < self.overrides.len());
        key
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::{Node, Value};
    use crate::host::sim::Sim;
    use crate::host::{Host, Version};
    use crate::http::{HeaderNames, Request, encode_headers};
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
        ask_with(leases, limits, names, &[("x-user", user)], host)
    }

    fn ask_with(
        leases: &mut Leases,
        limits: &[Limit],
        names: &HeaderNames,
        headers: &[(&str, &str)],
        host: &Sim,
    ) -> Admission {
        let block = encode_headers(headers);
        let request = &Request::parse(&block, names);
        let context = KeyContext { request, route: "r", subset: None, properties: host };
        admit(limits, true, &SECRET, leases, &context, host.now(), host)
    }

    /// Which limit refused, and for how many nanoseconds.
    fn wait(admission: &Admission) -> Option<(usize, u64)> {
        let refusal = admission.refused?;
        let Reason::TooEarly(wait) = refusal.reason else { return None };
        Some((refusal.told.limit, wait))
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
        assert_eq!(wait(&ask(&limits, &names, "ann", &host)), Some((1, 30_000_000_000)));
        let others = (0..50).filter(|n| admitted(&format!("user-{n}"))).count();
        assert_eq!(others, 8, "ann's 48 refused requests spent nothing of the limit for all");
    }

    #[test]
    fn shadow_counts_and_lets_through() {
        let (limits, names) =
            limits(r#"[{"name": "a", "mode": "shadow", "limit": {"requestsPerUnit": 1, "unit": "second"}}]"#);
        let host = Sim::new(1);
        assert_eq!(ask(&limits, &names, "", &host).remarks, []);
        let second = ask(&limits, &names, "", &host);
        assert_eq!((second.refused, second.remarks), (None, vec![Remark::WouldRefuse(0)]));
        host.advance(Duration::from_secs(1));
        assert_eq!(ask(&limits, &names, "", &host).remarks, []);
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

    #[test]
    fn of_a_million_keys_none_is_admitted_too_often_and_the_memory_is_bounded() {
        let (limits, names) = limits(
            r#"[{"name": "a", "limit": {"requestsPerUnit": 1, "unit": "hour"}, "key": [{"header": "x-user"}]}]"#,
        );
        let host = Sim::new(1);
        let mut leases = Leases::default();
        // How many of a user's requests are admitted, and how many of these share a word's allowance.
        let mut admitted = |user: u32, requests: u32| {
            let user = user.to_string();
            let ask = |_| ask_in(&mut leases, &limits, &names, &user, &host);
            let all = (0..requests).map(ask).filter(|admission| admission.refused.is_none());
            all.fold((0, 0), |(count, shared), admission| (count + 1, shared + admission.overflows))
        };
        let (mut total, mut overflows) = (0, 0);
        for user in 0..1_000_000 {
            let (count, shared) = admitted(user, 1);
            (total, overflows) = (total + count, overflows + shared);
        }
        for user in (0..1_000_000).step_by(11) {
            assert_eq!(admitted(user, 1), (0, 0), "user {user}, when a million have come between");
        }
        // 65,536 keys by default: 16,384 words of at most 240 bytes, and their keys.
        let words = 65_536 / 4;
        assert_eq!(host.keys().len(), words);
        assert!(host.bytes() <= words * (240 + "t/limit/r/a/00000000".len()), "{} bytes", host.bytes());
        // 8 keys have a place in each word, and the others of it share one allowance.
        assert_eq!((total, overflows), (words * (8 + 1), words as u64));
        host.advance(Duration::from_secs(3600));
        assert_eq!(admitted(999_999, 3), (1, 0), "whoever was crowded out is as good as new, in time");
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

    mod properties {
        use super::*;
        use proptest::prelude::*;

        /// What a hold ends with.
        #[derive(Clone, Copy, Debug)]
        enum End {
            Fails,
            Succeeds,
            Lost,
        }

        fn ends() -> impl Strategy<Value = End> {
            prop_oneof![3 => Just(End::Fails), 3 => Just(End::Succeeds), 1 => Just(End::Lost)]
        }

        proptest! {
            /// However requests and answers interleave, never one failure more than the limit; and what was held comes
            /// back.
            #[test]
            fn holds_never_over_admit(
                steps in proptest::collection::vec((0..2_000_000_000_u64, 0..20_usize, ends()), 1..300),
            ) {
                let (limits, names) = limits(
                    r#"[{"name": "a", "limit": {"requestsPerUnit": 60, "unit": "minute", "burst": 4}, "key": [{"header": "x-user"}],
                         "charge": {"onResponse": {"statuses": [401]}}}]"#,
                );
                let host = Sim::new(1);
                let mut waiting: Vec<(MonotonicInstant, Vec<Held>)> = Vec::new();
                let mut failed: Vec<MonotonicInstant> = Vec::new();
                for (step, which, end) in steps {
                    host.advance(Duration::from_nanos(step));
                    let admission = ask(&limits, &names, "ann", &host);
                    if admission.refused.is_none() {
                        assert_eq!(admission.held.len(), 1);
                        waiting.push((host.now(), admission.held));
                    }
                    if which < waiting.len() {
                        let (since, held) = waiting.swap_remove(which);
                        match end {
                            // It has counted when its time was over.
                            _ if host.now().saturating_since(since) > 60_000_000_000 => {}
                            End::Fails => {
                                settle(&limits, &held, Some(401), host.now(), &host);
                                failed.push(host.now());
                            }
                            End::Succeeds => settle(&limits, &held, Some(200), host.now(), &host),
                            End::Lost => {}
                        }
                    }
                    for (first, since) in failed.iter().enumerate() {
                        let count = (failed.len() - first) as u64;
                        prop_assert!(count <= 4 + host.now().saturating_since(*since) / 1_000_000_000, "{count} failed");
                    }
                }
                host.advance(Duration::from_secs(130));
                for n in 0..4 {
                    prop_assert!(ask(&limits, &names, "ann", &host).refused.is_none(), "request {n} after a long while");
                }
            }
        }

        proptest! {
            /// Any number of workers, at any pace, some of which vanish with what they hold: never one more.
            #[test]
            fn never_over_admit(
                steps in proptest::collection::vec((0..5_usize, 0..40_000_000_u64, 0..200_u8, 1..4_u64), 1..800),
            ) {
                let (mut limits, names) = limits(
                    r#"[{"name": "a", "limit": {"requestsPerUnit": 50, "unit": "second", "burst": 64}, "key": [{"header": "x-user"}], "cost": {"header": "x-cost"}}]"#,
                );
                limits[0].rate.lease = 8;
                let host = Sim::new(1);
                let mut workers: Vec<Leases> = (0..5).map(|_| Leases::default()).collect();
                let mut admitted: Vec<(MonotonicInstant, u64)> = Vec::new();
                for (worker, step, event, cost) in steps {
                    host.advance(Duration::from_nanos(step));
                    match event {
                        0 => workers[worker] = Leases::default(),
                        1..=4 => return_leases(&mut workers[worker], |_| limits.first().map(|limit| (&limit.keyspace, &limit.rate)), host.now(), &host),
                        _ => {}
                    }
                    let headers = [("x-user", "ann"), ("x-cost", &cost.to_string())];
                    if ask_with(&mut workers[worker], &limits, &names, &headers, &host).refused.is_none() {
                        admitted.push((host.now(), cost));
                    }
                }
                let interval = 20_000_000;
                for (first, (since, _)) in admitted.iter().enumerate() {
                    let mut count = 0;
                    for (until, cost) in &admitted[first..] {
                        count += cost;
                        let span = until.saturating_since(*since);
                        prop_assert!(count <= 64 + span / interval, "{count} in {span} ns");
                    }
                }
            }
        }
    }
}
