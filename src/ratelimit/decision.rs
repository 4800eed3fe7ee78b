//! The decision whether the proxy's own limits admit a request.
//!
//! A [`LocalLimiter`] charges a request to each limit of its route in turn. If one limit refuses, the charges of the
//! earlier ones are refunded. A charge is made in a worker's lease ([`super::lease`]), or in the bucket of the key
//! ([`super::table`]). If a limit counts only some responses, its charge stays pending until the response is known.

use super::gcra::Conformance;
use super::lease::Leases;
use super::policy::{Keyspace, Limit, OnMissing, Rate, Secret};
use super::table::{Bucket, EntryKind, RemainingQuota, Reservation};
use crate::host::SharedData;
use crate::key::KeyContext;
use crate::shared_data::{Change, SharedCell};
use crate::units::MonotonicInstant;
use std::hash::Hasher;

/// What the proxy's own limits decided about a request. Limits are indices into [`super::RateLimits::local`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalCheck {
    /// The limit that refused the request, if one did.
    pub refusal: Option<Refusal>,
    /// What else is counted.
    pub events: Vec<LimitEvent>,
    /// How many keys found their bucket full and were charged to the entry that its other keys share.
    pub overflows: u64,
}

/// An event of a limit that does not decide about the request. Limits are indices as in [`LocalCheck`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitEvent {
    /// This limit is in shadow mode and would have refused.
    WouldRefuse(usize),
    /// This candidate of a limit, an index into its candidates, would have refused.
    CandidateWouldRefuse(usize, usize),
    /// The request lacks a part of this limit's key.
    IncompleteKey(usize),
}

/// The limit that refused a request, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why the limit refused.
    pub reason: RefusalReason,
    /// The limit and its remaining quota.
    pub quota: QuotaStatus,
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalReason {
    /// The rate is exceeded. The request would be admitted in this number of nanoseconds.
    RateExceeded(u64),
    /// The request costs more than the burst.
    CostExceedsBurst,
    /// The request lacks a part of the key.
    IncompleteKey,
}

/// The remaining quota of a key under one limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaStatus {
    /// An index into the route's limits.
    pub limit: usize,
    /// The override that matches the key, an index into the limit's overrides.
    pub override_index: Option<usize>,
    /// The number of requests that could follow at once.
    pub remaining: u64,
    /// Nanoseconds until the whole burst could follow. If nothing remains, nanoseconds until one request could follow.
    pub reset: u64,
}

/// A charge for a request, until it is committed, settled or refunded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LocalCharge {
    limit: usize,
    /// An index into the limit's candidates if the charge is a candidate's.
    candidate: Option<usize>,
    override_index: Option<usize>,
    fingerprint: u64,
    cost: u32,
    location: ChargeLocation,
}

/// Where a charge was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChargeLocation {
    /// In the requests that the worker had reserved.
    Lease,
    /// In an entry of the key's bucket.
    Bucket(EntryKind),
    /// Reserved in the key's bucket: only the response determines whether the request counts.
    Pending(Reservation),
}

impl LocalCharge {
    /// Whether the response determines if the request counts.
    pub(super) fn is_pending(&self) -> bool {
        matches!(self.location, ChargeLocation::Pending(_))
    }
}

/// How the request of a pending charge ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChargeOutcome {
    /// With a response of this HTTP status, which may count.
    Answered(u16),
    /// Without a response from the upstream that it was sent to. It counts, because it may have failed.
    Unanswered,
    /// The upstream has not processed it, so it does not count.
    NotAttempted,
}

/// A request's key under one limit.
struct LimitKey {
    fingerprint: u64,
    /// The first override that matches.
    override_index: Option<usize>,
    is_incomplete: bool,
}

/// A charge that is to be made.
#[derive(Clone, Copy)]
struct ChargeRequest<'p> {
    keyspace: &'p Keyspace,
    rate: &'p Rate,
    fingerprint: u64,
    cost: u32,
    /// Whether the charge stays pending until the response is known.
    is_pending: bool,
    /// Whether the response announces the remaining quota.
    is_announced: bool,
}

/// The proxy's own limits of a route, and what is needed to apply them.
pub(super) struct LocalLimiter<'w, S> {
    pub(super) limits: &'w [Limit],
    pub(super) secret: &'w Secret,
    pub(super) leases: &'w mut Leases,
    pub(super) now: MonotonicInstant,
    pub(super) store: &'w S,
}

/// What a request has acquired from the limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LocalCharges {
    /// The charges that may still be refunded or settled.
    pub(super) charges: Vec<LocalCharge>,
    /// The remaining quota of the limit that leaves the least, of those that announce it.
    pub(super) quota: Option<QuotaStatus>,
}

impl<S: SharedData> LocalLimiter<'_, S> {
    /// Charges a request to all limits. If one refuses, nothing is charged. The charge of the last limit is not recorded
    /// in `acquired` if `is_final` is true: then nothing can refuse the request afterwards.
    pub(super) fn check(
        &mut self,
        context: &KeyContext<'_, '_>,
        is_final: bool,
        acquired: &mut LocalCharges,
    ) -> LocalCheck {
        let mut check = LocalCheck::default();
        let mut kept_from = usize::MAX;
        let limits = self.limits;
        for (index, limit) in limits.iter().enumerate() {
            let key = limit.key_of(self.secret, context);
            let LimitKey { fingerprint, override_index, .. } = key;
            let mut quota = QuotaStatus { limit: index, override_index, ..QuotaStatus::default() };
            if key.is_incomplete {
                check.events.push(LimitEvent::IncompleteKey(index));
                match limit.on_missing {
                    OnMissing::Share => {}
                    OnMissing::Skip => continue,
                    OnMissing::Deny if limit.shadow => {
                        check.events.push(LimitEvent::WouldRefuse(index));
                        continue;
                    }
                    OnMissing::Deny => {
                        check.refusal = Some(Refusal { reason: RefusalReason::IncompleteKey, quota });
                        break;
                    }
                }
            }
            let cost = limit.cost.of(context.request);
            if cost == 0 {
                continue;
            }
            let request = ChargeRequest {
                keyspace: &limit.keyspace,
                rate: limit.rate_of(override_index),
                fingerprint,
                cost,
                is_pending: limit.counted.is_some(),
                is_announced: limit.response.announces_quota() && !limit.shadow,
            };
            let location = ChargeLocation::Lease;
            let charge = LocalCharge { limit: index, candidate: None, override_index, fingerprint, cost, location };
            // Candidates are charged before the rate in force, because they also count requests that it would refuse.
            let first_candidate = acquired.charges.len();
            for (number, candidate) in limit.candidates.iter().enumerate().filter(|_| override_index.is_none()) {
                let (keyspace, rate) = (&candidate.keyspace, &candidate.rate);
                let request = ChargeRequest { keyspace, rate, is_announced: false, ..request };
                match self.charge(&request, &mut check) {
                    Ok((location, _)) => {
                        acquired.charges.push(LocalCharge { candidate: Some(number), location, ..charge });
                    }
                    Err(_) => check.events.push(LimitEvent::CandidateWouldRefuse(index, number)),
                }
            }
            match self.charge(&request, &mut check) {
                Ok((location, remaining)) => {
                    if let Some(RemainingQuota { remaining, reset }) = remaining
                        && acquired.quota.is_none_or(|other| (remaining, other.reset) < (other.remaining, reset))
                    {
                        acquired.quota = Some(QuotaStatus { remaining, reset, ..quota });
                    }
                    let charge = LocalCharge { location, ..charge };
                    if charge.is_pending() || !is_final || index + 1 < limits.len() {
                        acquired.charges.push(charge);
                    }
                }
                Err(_) if limit.shadow => check.events.push(LimitEvent::WouldRefuse(index)),
                Err((reason, remaining)) => {
                    if let Some(RemainingQuota { remaining, reset }) = remaining {
                        (quota.remaining, quota.reset) = (remaining, reset);
                    }
                    check.refusal = Some(Refusal { reason, quota });
                    // Its own candidates keep their charges: each counts as if it were the limit in force. Pending
                    // charges are refunded, because a refused request has no response that could count.
                    kept_from = first_candidate;
                    break;
                }
            }
        }
        if check.refusal.is_some() {
            for (number, charge) in std::mem::take(&mut acquired.charges).iter().enumerate() {
                if number < kept_from || charge.is_pending() {
                    self.refund(charge);
                }
            }
            acquired.quota = None;
        }
        check
    }

    /// Charges a request in the worker's lease or in shared data. In shared data it also settles the worker's lease of the
    /// key and reserves a new one.
    fn charge(
        &mut self,
        request: &ChargeRequest<'_>,
        check: &mut LocalCheck,
    ) -> Result<(ChargeLocation, Option<RemainingQuota>), (RefusalReason, Option<RemainingQuota>)> {
        let ChargeRequest { keyspace, rate, fingerprint, cost, is_pending, is_announced } = *request;
        let (params, now) = (&rate.params, self.now);
        if rate.lease > 0 && self.leases.spend(rate.id, fingerprint, cost, now) {
            return Ok((ChargeLocation::Lease, None));
        }
        let (lease, wanted) = match rate.lease {
            0 => (Reservation::default(), 0),
            most => self.leases.renew(rate.id, fingerprint, most, now),
        };
        let (mut reserved, mut remaining) = (0, None);
        let charged = keyspace.cell(fingerprint).update(self.store, |stored| {
            let mut bucket = stored.record().unwrap_or_default();
            bucket.limit_arrival_times(&keyspace.longest, now);
            if lease.size > 0 {
                bucket.settle(fingerprint, lease, params, now);
            }
            let (conformance, kind) = bucket.charge(fingerprint, cost, params, &keyspace.longest, now);
            let conforms = matches!(conformance, Conformance::Conforms { .. });
            if conforms && is_pending {
                bucket.make_pending(fingerprint, cost, params, now);
            }
            if conforms && wanted > 0 {
                reserved = bucket.reserve(fingerprint, wanted, params, now);
            }
            remaining = is_announced.then(|| bucket.remaining_quota(fingerprint, params, now));
            match conformance {
                Conformance::Conforms { .. } => Change::Write(bucket, Ok(kind)),
                Conformance::TooEarly { wait } if lease.size > 0 => Change::Write(bucket, Err(wait)),
                Conformance::TooEarly { wait } => Change::Keep(Err(wait)),
            }
        });
        if rate.lease > 0 && charged.is_ok() {
            self.leases.hold(rate.id, fingerprint, reserved, now);
        }
        match charged {
            Ok(Ok(EntryKind::Own)) if is_pending => {
                let reservation = Reservation { epoch: params.epoch_of(now), size: cost, used: 0 };
                Ok((ChargeLocation::Pending(reservation), remaining))
            }
            Ok(Ok(kind)) => {
                check.overflows += u64::from(kind == EntryKind::Overflow);
                Ok((ChargeLocation::Bucket(kind), remaining))
            }
            Ok(Err(_)) if u64::from(cost) > params.gcra.burst() => Err((RefusalReason::CostExceedsBurst, remaining)),
            Ok(Err(wait)) => Err((RefusalReason::RateExceeded(wait), remaining)),
            Err(_) => Err((RefusalReason::RateExceeded(0), None)),
        }
    }

    /// Refunds a charge. A refund that cannot be written is dropped: the limit then refuses too much, never too little.
    #[inline(never)]
    pub(super) fn refund(&mut self, charge: &LocalCharge) {
        let LocalCharge { fingerprint, cost, .. } = *charge;
        let Some((keyspace, rate)) = charge.find_rate(self.limits) else { return };
        let (params, now) = (&rate.params, self.now);
        match charge.location {
            ChargeLocation::Lease => self.leases.refund(rate.id, fingerprint, cost),
            ChargeLocation::Bucket(kind) => keyspace.amend(fingerprint, now, self.store, &|bucket| {
                bucket.refund(fingerprint, cost, kind, params, now);
            }),
            ChargeLocation::Pending(_) => charge.settle(self.limits, ChargeOutcome::NotAttempted, now, self.store),
        }
    }
}

impl LocalCharge {
    /// The rate that the charge was made at, and the keyspace of its key.
    fn find_rate<'p>(&self, limits: &'p [Limit]) -> Option<(&'p Keyspace, &'p Rate)> {
        let limit = limits.get(self.limit)?;
        Some(match self.candidate.and_then(|candidate| limit.candidates.get(candidate)) {
            Some(candidate) => (&candidate.keyspace, &candidate.rate),
            None => (&limit.keyspace, limit.rate_of(self.override_index)),
        })
    }

    /// Completes a pending charge, or releases it if the request does not count. Other charges stay as they are.
    #[inline(never)]
    pub(super) fn settle(
        &self,
        limits: &[Limit],
        outcome: ChargeOutcome,
        now: MonotonicInstant,
        store: &impl SharedData,
    ) {
        let ChargeLocation::Pending(mut reservation) = self.location else { return };
        let Some((keyspace, rate)) = self.find_rate(limits) else { return };
        let counted = limits.get(self.limit).and_then(|limit| limit.counted.as_ref());
        let counts = match outcome {
            ChargeOutcome::Answered(status) => counted.is_some_and(|statuses| statuses.contains(status)),
            ChargeOutcome::Unanswered => true,
            ChargeOutcome::NotAttempted => false,
        };
        reservation.used = if counts { reservation.size } else { 0 };
        keyspace.settle(self.fingerprint, reservation, rate, now, store);
    }
}

impl Keyspace {
    /// Settles a reservation of a key.
    pub(super) fn settle(
        &self,
        fingerprint: u64,
        reservation: Reservation,
        rate: &Rate,
        now: MonotonicInstant,
        store: &impl SharedData,
    ) {
        self.amend(fingerprint, now, store, &|bucket| bucket.settle(fingerprint, reservation, &rate.params, now));
    }

    /// Changes the bucket of a key, if there is one.
    #[inline(never)]
    fn amend(&self, fingerprint: u64, now: MonotonicInstant, store: &impl SharedData, change: &dyn Fn(&mut Bucket)) {
        let _ = self.cell(fingerprint).update(store, |stored| match stored.record() {
            Some(mut bucket) => {
                bucket.limit_arrival_times(&self.longest, now);
                change(&mut bucket);
                Change::Write(bucket, ())
            }
            None => Change::Keep(()),
        });
    }

    /// The record that contains a key.
    fn cell(&self, fingerprint: u64) -> SharedCell<Bucket> {
        if self.buckets <= 1 {
            return SharedCell::new(&*self.prefix);
        }
        SharedCell::new(bucket_key(&self.prefix, "", self.buckets, fingerprint))
    }
}

/// The shared-data key of the bucket of `fingerprint`, one of `buckets`: `prefix`, `name` and the number of the bucket.
pub(super) fn bucket_key(prefix: &str, name: &str, buckets: u64, fingerprint: u64) -> String {
    let mut key = String::with_capacity(prefix.len() + name.len() + 8);
    key.push_str(prefix);
    key.push_str(name);
    let bucket = (u128::from(fingerprint) * u128::from(buckets)) >> 64;
    let digit = |digit: u32| char::from_digit(digit, 16).unwrap_or('0');
    key.extend((0..8).map(|place| digit((bucket >> (28 - place * 4)) as u32 & 0xf)));
    key
}

impl Limit {
    /// The hash of the request's key, and the override that applies to it. The hash covers the length of each part, and
    /// distinguishes a missing part from an empty one.
    fn key_of(&self, secret: &Secret, context: &KeyContext<'_, '_>) -> LimitKey {
        let mut key = LimitKey { fingerprint: 0, override_index: None, is_incomplete: false };
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
            for (index, other) in self.overrides.iter().enumerate() {
                if let Some(Some(wanted)) = other.parts.get(place)
                    && part.as_deref() != Some(wanted.as_bytes())
                {
                    matching &= !(1 << index);
                }
            }
        }
        key.fingerprint = hasher.finish();
        key.override_index = Some(matching.trailing_zeros() as usize).filter(|index| *index < self.overrides.len());
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
    use crate::shared_data::SharedDataProblem;
    use std::time::Duration;

    const SECRET: Secret = Secret([7; 16]);

    fn limits(text: &str) -> (Vec<Limit>, HeaderNames) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let mut names = HeaderNames::default();
        let limits = super::super::config::read(&Value::root(&node, &report), 0, "t/", "r", &mut names).local;
        assert_eq!(report.into_diagnostics(), []);
        (limits, names)
    }

    fn ask(limits: &[Limit], names: &HeaderNames, user: &str, host: &Sim) -> LocalCheck {
        ask_in(&mut Leases::default(), limits, names, user, host)
    }

    fn ask_in(leases: &mut Leases, limits: &[Limit], names: &HeaderNames, user: &str, host: &Sim) -> LocalCheck {
        ask_with(leases, limits, names, &[("x-user", user)], host)
    }

    fn ask_with(
        leases: &mut Leases,
        limits: &[Limit],
        names: &HeaderNames,
        headers: &[(&str, &str)],
        host: &Sim,
    ) -> LocalCheck {
        let block = encode_headers(headers);
        let request = &Request::parse(&block, names);
        let context = KeyContext { request, route: "r", subset: None, properties: host };
        let mut limiter = LocalLimiter { limits, secret: &SECRET, leases, now: host.now(), store: host };
        limiter.check(&context, true, &mut LocalCharges::default())
    }

    /// Which limit refused, and for how many nanoseconds.
    fn wait(admission: &LocalCheck) -> Option<(usize, u64)> {
        let refusal = admission.refusal?;
        let RefusalReason::RateExceeded(wait) = refusal.reason else { return None };
        Some((refusal.quota.limit, wait))
    }

    #[test]
    fn a_refusal_gives_back_what_the_others_charged() {
        let (limits, names) = limits(
            r#"[{"name": "all", "limit": {"requestsPerUnit": 10, "unit": "minute"}},
                {"name": "each", "limit": {"requestsPerUnit": 2, "unit": "minute"}, "key": [{"header": "x-user"}]}]"#,
        );
        let host = Sim::new(1);
        let admitted = |user: &str| ask(&limits, &names, user, &host).refusal.is_none();
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
        assert_eq!(ask(&limits, &names, "", &host).events, []);
        let second = ask(&limits, &names, "", &host);
        assert_eq!((second.refusal, second.events), (None, vec![LimitEvent::WouldRefuse(0)]));
        host.advance(Duration::from_secs(1));
        assert_eq!(ask(&limits, &names, "", &host).events, []);
    }

    #[test]
    fn garbage_is_replaced_and_reported() {
        let (limits, names) = limits(r#"[{"name": "a", "limit": {"requestsPerUnit": 1, "unit": "second"}}]"#);
        let host = Sim::new(1);
        host.set("t/limit/r/a/", b"garbage", Version::ABSENT).unwrap();
        assert_eq!(ask(&limits, &names, "", &host).refusal, None);
        assert_eq!(host.problems(), [SharedDataProblem::Garbage]);
        assert!(ask(&limits, &names, "", &host).refusal.is_some());
    }

    #[test]
    fn many_keys_need_a_bounded_number_of_records() {
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
        assert!(ask(&limits, &names, "ann", &host).refusal.is_none());
        assert!(ask(&limits, &names, "bob", &host).refusal.is_none());
        assert!(ask(&limits, &names, "ann", &host).refusal.is_some());
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
            let all = (0..requests).map(ask).filter(|admission| admission.refusal.is_none());
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
        assert_eq!(admitted(999_999, 3), (1, 0), "a key without an entry recovers in time");
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
            admitted += u64::from(ask_in(leases, &limits, &names, "ann", &host).refusal.is_none());
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

        /// How a pending charge ends.
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
            /// However requests and answers interleave, never one failure more than the limit; and pending
            /// charges are released.
            #[test]
            fn pending_charges_never_over_admit(
                steps in proptest::collection::vec((0..2_000_000_000_u64, 0..20_usize, ends()), 1..300),
            ) {
                let (limits, names) = limits(
                    r#"[{"name": "a", "limit": {"requestsPerUnit": 60, "unit": "minute", "burst": 4}, "key": [{"header": "x-user"}],
                         "charge": {"onResponse": {"statuses": [401]}}}]"#,
                );
                let host = Sim::new(1);
                let mut waiting: Vec<(MonotonicInstant, Vec<LocalCharge>)> = Vec::new();
                let mut failed: Vec<MonotonicInstant> = Vec::new();
                for (step, which, end) in steps {
                    host.advance(Duration::from_nanos(step));
                    let block = encode_headers(&[("x-user", "ann")]);
                    let request = &Request::parse(&block, &names);
                    let context = KeyContext { request, route: "r", subset: None, properties: &host };
                    let leases = &mut Leases::default();
                    let mut acquired = LocalCharges::default();
                    let mut limiter = LocalLimiter { limits: &limits, secret: &SECRET, leases, now: host.now(), store: &host };
                    if limiter.check(&context, true, &mut acquired).refusal.is_none() {
                        assert_eq!(acquired.charges.len(), 1);
                        waiting.push((host.now(), acquired.charges));
                    }
                    let settle = |charges: &[LocalCharge], status| {
                        let outcome = ChargeOutcome::Answered(status);
                        charges.iter().for_each(|charge| charge.settle(&limits, outcome, host.now(), &host));
                    };
                    if which < waiting.len() {
                        let (since, charges) = waiting.swap_remove(which);
                        match end {
                            // It has counted when its time was over.
                            _ if host.now().saturating_since(since) > 60_000_000_000 => {}
                            End::Fails => {
                                settle(&charges, 401);
                                failed.push(host.now());
                            }
                            End::Succeeds => settle(&charges, 200),
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
                    prop_assert!(ask(&limits, &names, "ann", &host).refusal.is_none(), "request {n} after a long while");
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
                        1..=4 => {
                            let (now, Limit { keyspace, rate, .. }) = (host.now(), &limits[0]);
                            let settle = |(_, fingerprint, held)| keyspace.settle(fingerprint, held, rate, now, &host);
                            if event == 4 {
                                workers[worker].take_all().for_each(settle);
                            } else {
                                workers[worker].ending(now).for_each(settle);
                            }
                        }
                        _ => {}
                    }
                    let headers = [("x-user", "ann"), ("x-cost", &cost.to_string())];
                    if ask_with(&mut workers[worker], &limits, &names, &headers, &host).refusal.is_none() {
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
