//! The decision whether the global limits admit a request.
//!
//! A [`GlobalLimiter`] asks the limits of a route in turn, each only after the earlier ones have admitted the request. If a
//! later limit refuses, the hits that were used for the request become prepaid hits again, which other requests of this
//! proxy can use.

use super::calls::{CallSubject, ServiceFailure};
use super::codec::encode;
use super::policy::{GlobalLimit, OnFailure};
use super::prepaid::{Lookup, WindowStatus};
use crate::host::{CallId, Host};
use crate::http::LocalReply;
use crate::key::{KeyContext, KeySource};
use crate::ratelimit::decision::{LimitEvent, LocalCharges, LocalLimiter};
use crate::ratelimit::limiter::WorkerLimits;
use crate::ratelimit::metrics::RateLimitMetrics;
use crate::ratelimit::{QuotaStatus, Refusal, RefusalReason, Secret};
use crate::units::MonotonicInstant;
use std::borrow::Cow;
use std::hash::Hasher;
use xxhash_rust::xxh64::xxh64;

/// The longest value that is sent, in bytes. A longer value is sent as its hash.
const MAX_VALUE: usize = 512;

/// What the global limits have decided about a request so far. Limits are indices into
/// [`crate::ratelimit::RateLimits::global`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GlobalCheck {
    /// The limit that is asked next.
    next: usize,
    /// The key under that limit, if the request waits for a call.
    fingerprint: u64,
    /// The limit that refused the request, if one did.
    pub refusal: Option<GlobalRefusal>,
    /// The limits in shadow mode that would have refused.
    pub would_refuse: Vec<usize>,
    /// The limits whose call failed, so that `onFailure` decided.
    pub failure_mode_applied: Vec<usize>,
}

/// The global limit that refused a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalRefusal {
    /// An index into the route's global limits.
    pub limit: usize,
    /// Nanoseconds until the limit would admit the request; `None` if the call failed.
    pub wait: Option<u64>,
}

/// What the service decided about a request that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceOutcome {
    /// The request is admitted. Its hit is valid until this instant, if that is known.
    Admitted(Option<MonotonicInstant>),
    /// The request is refused. The reset is in this number of nanoseconds.
    Refused(u64),
    /// The call failed.
    Failed,
}

/// An event that is counted for the service of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ratelimit) enum ServiceEvent {
    /// A call was sent.
    CallSent,
    /// A call failed or could not be sent.
    Failed(ServiceFailure),
    /// The client of a request left while the request waited.
    ClientLeft,
}

/// A hit that was used for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrepaidHit {
    /// An index into the route's global limits.
    pub(in crate::ratelimit) limit: usize,
    pub(in crate::ratelimit) fingerprint: u64,
    /// The instant until which the hit is valid.
    pub(in crate::ratelimit) until: MonotonicInstant,
}

impl PrepaidHit {
    /// Makes the hit available to other requests, while its window lasts.
    pub(in crate::ratelimit) fn refund(&self, limit: &GlobalLimit, now: MonotonicInstant, host: &impl Host) {
        limit.amend(self.fingerprint, host, &|bucket| bucket.refund(self.fingerprint, self.until, now));
    }
}

/// The global limits of a route, and what is needed to apply them.
pub(in crate::ratelimit) struct GlobalLimiter<'w, H> {
    pub(in crate::ratelimit) limits: &'w [GlobalLimit],
    /// An index into the policy's routes.
    pub(in crate::ratelimit) route: usize,
    /// Whether another feature can refuse a request that the limits have admitted.
    pub(in crate::ratelimit) is_followed: bool,
    pub(in crate::ratelimit) worker: &'w mut WorkerLimits,
    pub(in crate::ratelimit) metrics: &'w RateLimitMetrics,
    pub(in crate::ratelimit) now: MonotonicInstant,
    pub(in crate::ratelimit) host: &'w H,
}

impl<H: Host> GlobalLimiter<'_, H> {
    /// Continues the check of a request with the outcome of the call that it waited for.
    #[inline(never)]
    pub(in crate::ratelimit) fn on_outcome(
        &mut self,
        check: &mut GlobalCheck,
        prepaid: &mut Vec<PrepaidHit>,
        outcome: ServiceOutcome,
        context: &KeyContext<'_, '_>,
    ) {
        let Some(limit) = self.limits.get(check.next) else { return };
        match outcome {
            ServiceOutcome::Admitted(Some(until)) => {
                if self.is_followed || check.next + 1 < self.limits.len() {
                    prepaid.push(PrepaidHit { limit: check.next, fingerprint: check.fingerprint, until });
                }
            }
            // Without a known end of its window the hit cannot be refunded.
            ServiceOutcome::Admitted(None) => {}
            ServiceOutcome::Refused(wait) => check.refuse(limit, Some(wait)),
            ServiceOutcome::Failed => {
                check.failure_mode_applied.push(check.next);
                match limit.service.on_failure {
                    OnFailure::Allow => {}
                    OnFailure::Deny => check.refuse(limit, None),
                    OnFailure::Local => self.apply_locally(check, limit, context),
                }
            }
        }
        check.next += 1;
    }

    /// Applies a limit whose service has failed in this proxy alone. Its charges are not refunded.
    #[inline(never)]
    fn apply_locally(&mut self, check: &mut GlobalCheck, limit: &GlobalLimit, context: &KeyContext<'_, '_>) {
        let WorkerLimits { secret, leases, .. } = &mut *self.worker;
        let limits = std::slice::from_ref(&limit.limit);
        let mut limiter = LocalLimiter { limits, secret, leases, now: self.now, store: self.host };
        let local = limiter.check(context, true, &mut LocalCharges::default());
        self.metrics.count_overflows(&local, self.host);
        if let Some(refusal) = local.refusal {
            let wait = if let RefusalReason::RateExceeded(wait) = refusal.reason { Some(wait) } else { None };
            check.refuse(limit, wait);
        } else if local.events.contains(&LimitEvent::WouldRefuse(0)) {
            check.refuse(limit, None);
        }
    }

    /// Asks the limits until all have admitted the request, one has refused it, or the request has to wait for the call
    /// that is returned.
    #[inline(never)]
    pub(in crate::ratelimit) fn check(
        &mut self,
        check: &mut GlobalCheck,
        prepaid: &mut Vec<PrepaidHit>,
        context: &KeyContext<'_, '_>,
    ) -> Option<CallId> {
        while check.refusal.is_none() {
            let index = check.next;
            let limit = self.limits.get(index)?;
            let (request, fingerprint) = limit.subject(&self.worker.secret, context);
            check.fingerprint = fingerprint;
            let outcome = match limit.use_prepaid(fingerprint, self.now, self.host) {
                Err(_) => ServiceOutcome::Refused(0),
                Ok(Lookup::Hit(until)) => ServiceOutcome::Admitted(Some(until)),
                Ok(Lookup::OverLimit(wait)) => ServiceOutcome::Refused(wait),
                Ok(Lookup::NotPrepaid(window)) => {
                    let subject = CallSubject { route: self.route, limit: index, fingerprint, request };
                    match self.join(limit, subject, window) {
                        Ok(call) => return Some(call),
                        Err(failure) => {
                            self.metrics.count_event(index, ServiceEvent::Failed(failure), self.host);
                            ServiceOutcome::Failed
                        }
                    }
                }
            };
            self.on_outcome(check, prepaid, outcome, context);
        }
        None
    }

    /// Returns the call under way for the key, or sends one.
    fn join(
        &mut self,
        limit: &GlobalLimit,
        subject: CallSubject,
        window: WindowStatus,
    ) -> Result<CallId, ServiceFailure> {
        let calls = &mut self.worker.calls;
        if !calls.has_room() {
            return Err(ServiceFailure::Overloaded);
        }
        let call = match calls.find(&subject) {
            Some(call) => call,
            None => {
                let index = subject.limit;
                let call = calls.send(&limit.service, subject, 1, window, self.now, self.host)?;
                self.metrics.count_event(index, ServiceEvent::CallSent, self.host);
                call
            }
        };
        calls.enter();
        Ok(call)
    }
}

impl GlobalCheck {
    /// The limit that the request waits at, an index into the route's global limits.
    pub(in crate::ratelimit) fn next(&self) -> usize {
        self.next
    }

    /// The key of the request under the limit that it waits at.
    pub(in crate::ratelimit) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Whether a limit refused the request, or would have refused it in shadow mode.
    pub fn is_over_limit(&self) -> bool {
        self.refusal.is_some() || !self.would_refuse.is_empty()
    }

    fn refuse(&mut self, limit: &GlobalLimit, wait: Option<u64>) {
        if limit.limit.shadow {
            self.would_refuse.push(self.next);
        } else {
            self.refusal = Some(GlobalRefusal { limit: self.next, wait });
        }
    }
}

impl GlobalLimit {
    /// The entries of the descriptor that a call contains: keys and values.
    pub fn descriptor<'a>(&'a self, context: &KeyContext<'_, 'a>) -> Vec<(&'a str, Cow<'a, str>)> {
        let GlobalLimit { limit, service } = self;
        let keys = service.descriptor_keys.iter().map(|key| &**key);
        if limit.key.is_empty() {
            return keys.map(|key| (key, Cow::Borrowed(&*limit.name))).collect();
        }
        let value = |source: &'a KeySource| {
            let part = text(source.extract(context));
            // An IPv6 address without brackets, as in Envoy's own descriptor `remote_address`.
            match (source, part.strip_prefix('[').and_then(|part| part.strip_suffix(']'))) {
                (KeySource::SourceAddress, Some(address)) => Cow::Owned(address.to_owned()),
                _ => part,
            }
        };
        keys.zip(limit.key.iter().map(value)).collect()
    }

    /// The message of a call about the request, without its hits, and the fingerprint of the key.
    #[inline(never)]
    fn subject(&self, secret: &Secret, context: &KeyContext<'_, '_>) -> (Vec<u8>, u64) {
        let message = encode(&self.service.domain, &self.descriptor(context));
        let mut hasher = secret.hasher();
        hasher.write(&message);
        (message, hasher.finish())
    }

    /// The reply to a request that this limit refused. `wait` is the time until it would admit the request, in nanoseconds;
    /// `None` if the call failed.
    #[inline(never)]
    pub(in crate::ratelimit) fn refusal(&self, wait: Option<u64>, is_grpc: bool) -> LocalReply {
        if let Some(wait) = wait {
            let refusal = Refusal { reason: RefusalReason::RateExceeded(wait), quota: QuotaStatus::default() };
            return self.limit.refusal(&refusal, is_grpc);
        }
        LocalReply {
            status: 503,
            details: "trimtab_rate_limit_service",
            headers: Vec::new(),
            body: ["rate limit ", &self.limit.name, ": its service does not answer"].concat(),
            // UNAVAILABLE
            grpc_status: is_grpc.then_some(14),
        }
    }
}

/// A part of the key as a protobuf string, which must be UTF-8. A service refuses a call with other bytes, so that a client
/// could evade the limit by sending them. Such values are sent as their hash, and so are values that are too long.
fn text(part: Option<Cow<'_, [u8]>>) -> Cow<'_, str> {
    let part = part.unwrap_or_default();
    if part.len() <= MAX_VALUE {
        match part {
            Cow::Borrowed(bytes) => {
                if let Ok(text) = std::str::from_utf8(bytes) {
                    return Cow::Borrowed(text);
                }
            }
            Cow::Owned(ref bytes) => {
                if let Ok(text) = std::str::from_utf8(bytes) {
                    return Cow::Owned(text.to_owned());
                }
            }
        }
    }
    let hash = xxh64(&part, 0);
    let mut text = String::from("xxh64:");
    text.extend((0..16).map(|place| char::from_digit((hash >> (60 - place * 4)) as u32 & 0xf, 16).unwrap_or('0')));
    Cow::Owned(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::{Node, Value};
    use crate::host::sim::{SentCall, Sim};
    use crate::host::{GrpcAnswer, Host};
    use crate::http::{HeaderNames, Request, encode_headers};
    use crate::ratelimit::RateLimits;
    use crate::ratelimit::service::{NextStep, PendingStreams};
    use crate::telemetry::Scope;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::time::Duration;

    const SECOND: u64 = 1_000_000_000;
    const LIMIT: u32 = 40;

    fn limits(text: &str) -> (RateLimits, HeaderNames) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let mut names = HeaderNames::default();
        let limits = crate::ratelimit::read(&Value::root(&node, &report), 0, "t/", "r", &mut names);
        assert_eq!(report.into_diagnostics(), []);
        (limits, names)
    }

    /// envoyproxy/ratelimit, as its sources are: it charges first and compares then, counts in windows of its own clock,
    /// and reads that clock twice.
    #[derive(Default)]
    struct Service {
        /// How far its clock is before everybody's.
        offset: u64,
        charged: HashMap<u64, u32>,
        /// Hits that it admitted beyond the requests that waited, by window.
        ahead_of_need: HashMap<u64, u32>,
    }

    impl Service {
        const WINDOW: u64 = 60;

        fn window(&self, now: MonotonicInstant) -> u64 {
            now.saturating_add(self.offset).as_nanos() / SECOND / Service::WINDOW
        }

        /// Answers a call that it charges at `charged_at` and tells the reset of at `told_at`.
        fn answer(
            &mut self,
            call: &SentCall,
            charged_at: MonotonicInstant,
            told_at: MonotonicInstant,
            waiting: u32,
        ) -> Vec<u8> {
            let at = call.message.iter().rposition(|byte| *byte == 0x18).unwrap();
            let hits = u32::from(call.message[at + 1]);
            assert!(hits < 128 && at + 2 == call.message.len(), "{:?}", call.message);
            let window = self.window(charged_at);
            let count = self.charged.entry(window).or_default();
            *count += hits;
            let remaining = LIMIT.checked_sub(*count);
            if remaining.is_some() {
                *self.ahead_of_need.entry(window).or_default() += hits.saturating_sub(waiting);
            }
            let reset = Service::WINDOW - told_at.saturating_add(self.offset).as_nanos() / SECOND % Service::WINDOW;
            let code = if remaining.is_some() { 1 } else { 2 };
            let remaining = remaining.unwrap_or(0) as u8;
            let status = [8, code, 0x12, 4, 8, LIMIT as u8, 0x10, 2, 0x18, remaining, 0x22, 2, 8, reset as u8];
            [&[8, code, 0x12, status.len() as u8][..], &status].concat()
        }
    }

    /// A call on its way: to which proxy and worker it belongs, and when it is charged, told, and answered.
    struct Flight {
        worker: usize,
        call: SentCall,
        charge: MonotonicInstant,
        told: MonotonicInstant,
        arrives: MonotonicInstant,
    }

    /// One step of a run: so much later, a request reaches a worker, and a call that it may make takes so long.
    type Step = (u64, usize, u64, u64, u64);

    fn step() -> impl Strategy<Value = Step> {
        let pause = prop_oneof![8 => 0..20_000_000_u64, 2 => 0..SECOND, 1 => 0..30 * SECOND];
        let reads = prop_oneof![4 => 0..3_000_000_u64, 1 => 0..5 * SECOND];
        (pause, 0..4_usize, 0..15_000_000_u64, reads, 0..15_000_000_u64)
    }

    /// What was admitted: from hits ahead, by the window in which they were spent; and in all.
    #[derive(Default)]
    struct Admitted {
        ahead: HashMap<u64, u32>,
        all: u32,
        refused: u32,
    }

    /// Two proxies of two workers each, one key, and a service.
    fn run(steps: &[Step], batch: u32, service: &mut Service) -> Admitted {
        let (limits, names) = limits(&format!(
            r#"[{{"name": "a", "scope": "global", "limit": {{"requestsPerUnit": {LIMIT}, "unit": "minute"}},
                 "service": {{"cluster": "c", "domain": "d", "batch": {batch}, "onFailure": "deny"}}}}]"#
        ));
        let block = encode_headers::<&str, &str>(&[]);
        let request = Request::parse(&block, &names);
        let proxies = [Sim::new(1), Sim::new(2)];
        proxies.iter().for_each(|proxy| proxy.add_cluster("c"));
        let mut workers: [WorkerLimits; 4] = std::array::from_fn(|_| WorkerLimits::with_secret(Secret([7; 16])));
        let metrics =
            RateLimitMetrics::define(&limits, &Scope::policy("r", &proxies[0]), &Scope::policy("p", &proxies[0]));
        let mut pending: [PendingStreams<()>; 4] = Default::default();
        let mut flights: Vec<Flight> = Vec::new();
        let mut admitted = Admitted::default();
        let advance = |to: MonotonicInstant| {
            proxies.iter().for_each(|proxy| proxy.advance(Duration::from_nanos(to.saturating_since(proxy.now()))));
        };
        let end = (u64::MAX, 0, 0, 0, 0);
        for (pause, worker, there, reads, back) in steps.iter().copied().chain([end]) {
            let next = proxies[0].now().saturating_add(pause);
            // Everything that happens before, in its order: what a service charges and tells, and answers.
            while let Some(at) = (0..flights.len()).min_by_key(|at| flights[*at].arrives)
                && flights[at].arrives <= next
            {
                let flight = flights.swap_remove(at);
                let host = &proxies[flight.worker / 2];
                advance(flight.arrives);
                let (calls, pending) = (&mut workers[flight.worker].calls, &mut pending[flight.worker]);
                let waiting = pending.count(flight.call.id);
                let answer = service.answer(&flight.call, flight.charge, flight.told, waiting as u32);
                let limit = |_, _| limits.global.first();
                let answer = GrpcAnswer { call: flight.call.id, status: 0, message: &answer };
                let settled = calls.on_answer(answer, waiting, limit, host).unwrap();
                for (_, (), outcome) in pending.settle(flight.call.id, Some(settled)) {
                    calls.leave();
                    match outcome {
                        ServiceOutcome::Admitted(_) => admitted.all += 1,
                        ServiceOutcome::Refused(wait) => {
                            assert!(wait <= Service::WINDOW * SECOND);
                            admitted.refused += 1;
                        }
                        ServiceOutcome::Failed => panic!("nothing fails here: {settled:?}"),
                    }
                }
                assert!(!matches!(settled.others, NextStep::Failed) || settled.admitted == waiting);
                flights.extend(host.take_grpc_calls().into_iter().map(|call| {
                    let charge = host.now().saturating_add(there);
                    let told = charge.saturating_add(reads);
                    Flight { worker: flight.worker, call, charge, told, arrives: told.saturating_add(back) }
                }));
            }
            if pause == u64::MAX {
                break;
            }
            advance(next);
            let host = &proxies[worker / 2];
            let mut limiter = GlobalLimiter {
                limits: &limits.global,
                route: 0,
                is_followed: true,
                worker: &mut workers[worker],
                metrics: &metrics,
                now: host.now(),
                host,
            };
            let context = KeyContext { request: &request, route: "r", subset: None, properties: host };
            let (mut check, mut prepaid) = (GlobalCheck::default(), Vec::new());
            match limiter.check(&mut check, &mut prepaid, &context) {
                Some(call) => pending[worker].wait(call, 0, ()),
                None if check.refusal.is_some() => admitted.refused += 1,
                None => {
                    admitted.all += 1;
                    *admitted.ahead.entry(service.window(host.now())).or_default() += 1;
                }
            }
            flights.extend(host.take_grpc_calls().into_iter().map(|call| {
                let charge = next.saturating_add(there);
                let told = charge.saturating_add(reads);
                Flight { worker, call, charge, told, arrives: told.saturating_add(back) }
            }));
        }
        assert!(
            pending.iter().all(|pending| (0..1000).all(|call| pending.count(CallId(call)) == 0)),
            "no request waits any more"
        );
        admitted
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Whenever calls are charged and answered, and wherever the windows end: no hit is spent that was not granted,
        /// and none that was kept ahead in another window than its own.
        #[test]
        fn no_hit_is_invented_or_outlives_its_window(
            steps in proptest::collection::vec(step(), 1..400),
            batch in 1..50_u32,
            offset in 0..60 * SECOND,
        ) {
            let mut service = Service { offset, ..Service::default() };
            let admitted = run(&steps, batch, &mut service);
            prop_assert!(admitted.all <= service.charged.values().sum());
            prop_assert_eq!((admitted.all + admitted.refused) as usize, steps.len());
            for (window, spent) in &admitted.ahead {
                let ahead = service.ahead_of_need.get(window).copied().unwrap_or(0);
                prop_assert!(*spent <= ahead, "{spent} spent of {ahead} ahead in window {window}");
            }
        }
    }

    #[test]
    fn a_window_of_demand_loses_less_than_an_eighth() {
        for batch in [1, 5, 100] {
            let mut service = Service { offset: 5 * SECOND, ..Service::default() };
            let steps: Vec<Step> = (0..2000).map(|n| (1_000_000, n * 7 % 4, 900_000, 100_000, 900_000)).collect();
            let admitted = run(&steps, batch, &mut service);
            assert!(admitted.all <= LIMIT && admitted.all > LIMIT - LIMIT / 8, "batch {batch}: {}", admitted.all);
        }
    }

    #[test]
    fn an_address_goes_as_envoy_writes_it() {
        let (limits, names) = limits(
            r#"[{"name": "a", "scope": "global", "limit": {"requestsPerUnit": 9, "unit": "day"},
                 "key": [{"sourceAddress": {}}, {"property": "a.b"}, {"pathSegment": 0}, {"header": "x-user"}],
                 "service": {"cluster": "c", "domain": "d"}}]"#,
        );
        let host = Sim::new(1);
        host.set_property("source.address", b"[2001:db8::1]:4711");
        let block = encode_headers(&[(":path", "/users"), ("x-user", "[ann]")]);
        let request = Request::parse(&block, &names);
        let found =
            limits.global[0].descriptor(&KeyContext { request: &request, route: "r", subset: None, properties: &host });
        let found: Vec<(&str, &str)> = found.iter().map(|(key, value)| (*key, &**value)).collect();
        assert_eq!(
            found,
            [("remote_address", "2001:db8::1"), ("a.b", ""), ("path_segment_0", "users"), ("x-user", "[ann]")]
        );
    }
}
