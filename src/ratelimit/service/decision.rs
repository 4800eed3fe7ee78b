//! Whether one request is admitted by the limits that a service keeps.
//!
//! They are asked one after the other, each only once those before it have admitted the request. A hit that was spent for
//! a request which a later limit refuses goes back to the hits ahead, where the request's siblings find it.

use super::calls::{Calls, Failure, Place, Subject};
use super::codec::encode;
use super::policy::{GlobalLimit, OnFailure, Service};
use super::quota::{Found, Known};
use crate::host::{CallId, GrpcClient, SharedData};
use crate::http::LocalReply;
use crate::key::{KeyContext, KeySource};
use crate::ratelimit::{self, Admission, Leases, Reason, Remark, Secret, Told, admit};
use crate::units::MonotonicInstant;
use std::borrow::Cow;
use std::hash::Hasher;
use xxhash_rust::xxh64::xxh64;

/// The longest value that is sent; a longer one goes as its hash.
const LONGEST_VALUE: usize = 512;

/// What the services said of a request so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inquiry {
    /// The limit that is asked next, an index into the route's global limits.
    next: usize,
    /// The hits that were spent: limit, key, and until when they could be.
    spent: Vec<(usize, u64, MonotonicInstant)>,
    pub refused: Option<Refusal>,
    /// The limits in shadow that would have refused.
    pub would_refuse: Vec<usize>,
    /// The limits whose service could not be asked.
    pub undecided: Vec<usize>,
}

/// Which limit refused, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// An index into the route's global limits.
    pub limit: usize,
    /// Nanoseconds until one would be admitted; `None` where the service could not be asked.
    pub wait: Option<u64>,
}

/// What is found of a request at the limit that it waits at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With a hit that could be spent until then, where that is known.
    Admitted(Option<MonotonicInstant>),
    /// Nanoseconds until the reset.
    Refused(u64),
    Failed,
}

/// Something to count besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A call was sent for this limit.
    Sent,
    Failed(Failure),
    /// A shared word was not ours.
    Garbage,
    /// A key of the proxy's own limit shared its full bucket's overflow time.
    Overflow,
    /// A compare-and-swap was given up; the request was refused.
    Contended,
    /// A request's client went away while it waited.
    Gone,
}

/// The limits of a route, and what the worker needs to ask them.
pub struct Asker<'w> {
    pub limits: &'w [GlobalLimit],
    /// The route's place in the policy.
    pub route: usize,
    pub secret: &'w Secret,
    pub calls: &'w mut Calls,
    pub leases: &'w mut Leases,
    /// Called with an index into the limits.
    pub count: &'w dyn Fn(usize, Event),
}

impl Asker<'_> {
    /// Takes what was found at the limit that the request waited at.
    #[inline(never)]
    pub fn hear(
        &mut self,
        inquiry: &mut Inquiry,
        outcome: Outcome,
        context: &KeyContext<'_, '_>,
        now: MonotonicInstant,
        store: &impl SharedData,
    ) {
        let Some(limit) = self.limits.get(inquiry.next) else { return };
        match outcome {
            Outcome::Admitted(Some(until)) => {
                let (_, fingerprint) = limit.subject(self.secret, context);
                inquiry.spent.push((inquiry.next, fingerprint, until));
            }
            // It cannot be given back: nobody knows until when another could spend it.
            Outcome::Admitted(None) => {}
            Outcome::Refused(wait) => self.refuse(inquiry, limit, Some(wait)),
            Outcome::Failed => {
                inquiry.undecided.push(inquiry.next);
                match limit.service.on_failure {
                    OnFailure::Allow => {}
                    OnFailure::Deny => self.refuse(inquiry, limit, None),
                    OnFailure::Local => {
                        let limits = std::slice::from_ref(&limit.limit);
                        let local = admit(limits, true, self.secret, self.leases, context, now, store);
                        self.count_local(inquiry.next, &local);
                        if let Some(refusal) = local.refused {
                            let wait = if let Reason::TooEarly(wait) = refusal.reason { Some(wait) } else { None };
                            self.refuse(inquiry, limit, wait);
                        } else if local.remarks.contains(&Remark::WouldRefuse(0)) {
                            self.refuse(inquiry, limit, None);
                        }
                    }
                }
            }
        }
        inquiry.next += 1;
    }

    fn count_local(&self, limit: usize, admission: &Admission) {
        for (event, happened) in [
            (Event::Garbage, admission.garbage > 0),
            (Event::Overflow, admission.overflows > 0),
            (Event::Contended, admission.contended),
        ] {
            if happened {
                (self.count)(limit, event);
            }
        }
    }

    fn refuse(&self, inquiry: &mut Inquiry, limit: &GlobalLimit, wait: Option<u64>) {
        if limit.limit.shadow {
            inquiry.would_refuse.push(inquiry.next);
        } else {
            inquiry.refused = Some(Refusal { limit: inquiry.next, wait });
        }
    }

    /// Asks on, until all have admitted, one has refused, or the request has to wait for the call that is returned.
    #[inline(never)]
    pub fn ask(
        &mut self,
        inquiry: &mut Inquiry,
        context: &KeyContext<'_, '_>,
        now: MonotonicInstant,
        host: &(impl SharedData + GrpcClient),
    ) -> Option<CallId> {
        while inquiry.refused.is_none() {
            let index = inquiry.next;
            let limit = self.limits.get(index)?;
            let (message, fingerprint) = limit.subject(self.secret, context);
            let outcome = match limit.spend(fingerprint, now, host) {
                Err(_) => {
                    (self.count)(index, Event::Contended);
                    Outcome::Refused(0)
                }
                Ok((found, is_garbage)) => {
                    if is_garbage {
                        (self.count)(index, Event::Garbage);
                    }
                    match found {
                        Found::Hit(until) => Outcome::Admitted(Some(until)),
                        Found::Over(wait) => Outcome::Refused(wait),
                        Found::Nothing(known) => {
                            let place = Place { route: self.route, limit: index };
                            let subject = Subject { place, fingerprint, request: message };
                            match self.join(&limit.service, subject, known, now, host) {
                                Ok(call) => return Some(call),
                                Err(failure) => {
                                    (self.count)(index, Event::Failed(failure));
                                    Outcome::Failed
                                }
                            }
                        }
                    }
                }
            };
            self.hear(inquiry, outcome, context, now, host);
        }
        None
    }

    /// Joins those who wait for the key's call, or sends one.
    fn join(
        &mut self,
        service: &Service,
        subject: Subject,
        known: Known,
        now: MonotonicInstant,
        client: &impl GrpcClient,
    ) -> Result<CallId, Failure> {
        if !self.calls.has_room() {
            return Err(Failure::Crowded);
        }
        let call = match self.calls.find(subject.place, subject.fingerprint) {
            Some(call) => call,
            None => {
                let index = subject.place.limit;
                let call = self.calls.send(service, subject, 1, known, now, client)?;
                (self.count)(index, Event::Sent);
                call
            }
        };
        self.calls.enter();
        Ok(call)
    }
}

/// Gives back what was spent of `limits` for a request that is not admitted after all.
#[inline(never)]
pub fn give_back(inquiry: &mut Inquiry, limits: &[GlobalLimit], now: MonotonicInstant, store: &impl SharedData) {
    for (index, fingerprint, until) in inquiry.spent.drain(..) {
        if let Some(limit) = limits.get(index) {
            let _ = limit.amend(fingerprint, store, &|quota| quota.give_back(fingerprint, until, now));
        }
    }
}

impl Inquiry {
    /// The limit that the request waits at, an index into the route's global limits.
    pub fn next(&self) -> usize {
        self.next
    }
}

impl GlobalLimit {
    /// The entries of the descriptor that the service is asked about.
    pub fn descriptor<'a>(&'a self, context: &KeyContext<'_, 'a>) -> Vec<(&'a str, Cow<'a, str>)> {
        let GlobalLimit { limit, service } = self;
        let keys = service.descriptor_keys.iter().map(|key| &**key);
        if limit.key.is_empty() {
            return keys.map(|key| (key, Cow::Borrowed(&*limit.name))).collect();
        }
        let value = |source: &'a KeySource| {
            let part = text(source.extract(context));
            // An IPv6 address without the brackets that its port needs, as Envoy's own remote_address.
            match (source, part.strip_prefix('[').and_then(|part| part.strip_suffix(']'))) {
                (KeySource::SourceAddress, Some(address)) => Cow::Owned(address.to_owned()),
                _ => part,
            }
        };
        keys.zip(limit.key.iter().map(value)).collect()
    }

    /// What the service is asked about the request, without hits, and what stands for it here.
    #[inline(never)]
    fn subject(&self, secret: &Secret, context: &KeyContext<'_, '_>) -> (Vec<u8>, u64) {
        let message = encode(&self.service.domain, &self.descriptor(context));
        let mut hasher = secret.hasher();
        hasher.write(&message);
        (message, hasher.finish())
    }

    /// The answer to a request that this limit refused.
    #[inline(never)]
    pub fn refusal(&self, wait: Option<u64>, is_grpc: bool) -> LocalReply {
        if let Some(wait) = wait {
            let refusal = ratelimit::Refusal { reason: Reason::TooEarly(wait), told: Told::default() };
            return self.limit.refusal(&refusal, is_grpc);
        }
        let mut body = String::from("rate limit ");
        body.push_str(&self.limit.name);
        body.push_str(": its service does not answer");
        LocalReply {
            status: 503,
            details: "trimtab_rate_limit_service",
            headers: Vec::new(),
            body,
            // UNAVAILABLE
            grpc_status: is_grpc.then_some(14),
        }
    }
}

/// A part of the key as a protobuf string, which has to be UTF-8: a service refuses a call with anything else, so
/// whoever sent such bytes would get past the limit. They go as their hash, and so does what is too long to be stored.
fn text(part: Option<Cow<'_, [u8]>>) -> Cow<'_, str> {
    let part = part.unwrap_or_default();
    if part.len() <= LONGEST_VALUE {
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
    use crate::ratelimit::service::{PendingStreams, Rest};
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::time::Duration;

    const SECOND: u64 = 1_000_000_000;
    const LIMIT: u32 = 40;

    fn limits(text: &str) -> (Vec<GlobalLimit>, HeaderNames) {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let mut names = HeaderNames::default();
        let (_, limits) = crate::ratelimit::read(&Value::root(&node, &report), 0, "t/", "r", &mut names);
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
        let mut calls: [Calls; 4] = Default::default();
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
                let (calls, pending) = (&mut calls[flight.worker], &mut pending[flight.worker]);
                let waiting = pending.count(flight.call.id);
                let answer = service.answer(&flight.call, flight.charge, flight.told, waiting as u32);
                let limit = |_| limits.first();
                let answer = GrpcAnswer { call: flight.call.id, status: 0, message: &answer };
                let settled = calls.settle(answer, waiting, limit, host.now(), host).unwrap();
                for (_, (), outcome) in pending.settle(flight.call.id, Some(settled)) {
                    calls.leave();
                    match outcome {
                        Outcome::Admitted(_) => admitted.all += 1,
                        Outcome::Refused(wait) => {
                            assert!(wait <= Service::WINDOW * SECOND);
                            admitted.refused += 1;
                        }
                        Outcome::Failed => panic!("nothing fails here: {settled:?}"),
                    }
                }
                assert!(!matches!(settled.rest, Rest::Failed) || settled.admitted == waiting);
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
            let mut asker = Asker {
                limits: &limits,
                route: 0,
                secret: &Secret([7; 16]),
                calls: &mut calls[worker],
                leases: &mut Leases::default(),
                count: &|_, event| assert_eq!(event, Event::Sent),
            };
            let context = KeyContext { request: &request, route: "r", subset: None, properties: host };
            let mut inquiry = Inquiry::default();
            match asker.ask(&mut inquiry, &context, host.now(), host) {
                Some(call) => pending[worker].wait(call, 0, ()),
                None if inquiry.refused.is_some() => admitted.refused += 1,
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
            "nobody waits on"
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
            limits[0].descriptor(&KeyContext { request: &request, route: "r", subset: None, properties: &host });
        let found: Vec<(&str, &str)> = found.iter().map(|(key, value)| (*key, &**value)).collect();
        assert_eq!(
            found,
            [("remote_address", "2001:db8::1"), ("a.b", ""), ("path_segment_0", "users"), ("x-user", "[ann]")]
        );
    }
}
