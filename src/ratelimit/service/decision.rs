//! Whether one request is admitted by the limits that a service keeps.
//!
//! They are asked one after the other, each only once those before it have admitted the request. A hit that was spent for
//! a request which a later limit refuses goes back to the hits ahead, where the request's siblings find it.

use super::calls::{Calls, Failure, Place, Subject};
use super::codec::encode;
use super::policy::{GlobalLimit, OnFailure, Service};
use super::quota::{Found, Known};
use crate::host::{CallId, GrpcClient, Properties, StateStore};
use crate::http::{LocalReply, Request};
use crate::key::KeySource;
use crate::ratelimit::{Admission, Leases, Secret, admit};
use crate::units::Monotonic;
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
    /// The hits that were spent: limit and key.
    spent: Vec<(usize, u64)>,
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
    Admitted,
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
    pub route_name: &'w str,
    pub secret: &'w Secret,
    pub calls: &'w mut Calls,
    pub leases: &'w mut Leases,
    /// Called with an index into the limits.
    pub count: &'w dyn Fn(usize, Event),
}

impl Asker<'_> {
    /// Takes what was found at the limit that the request waited at.
    #[inline(never)]
    pub fn hear<H: StateStore + Properties>(
        &mut self,
        inquiry: &mut Inquiry,
        outcome: Outcome,
        request: &Request<'_>,
        now: Monotonic,
        host: &H,
    ) {
        let Some(limit) = self.limits.get(inquiry.next) else { return };
        match outcome {
            Outcome::Admitted => {
                let (_, fingerprint) = limit.subject(self.secret, request, self.route_name, host);
                inquiry.spent.push((inquiry.next, fingerprint));
            }
            Outcome::Refused(wait) => self.refuse(inquiry, limit, Some(wait)),
            Outcome::Failed => {
                inquiry.undecided.push(inquiry.next);
                match limit.service.on_failure {
                    OnFailure::Allow => {}
                    OnFailure::Deny => self.refuse(inquiry, limit, None),
                    OnFailure::Local => {
                        let limits = std::slice::from_ref(&limit.limit);
                        let local = admit(limits, self.secret, self.leases, request, self.route_name, now, host);
                        self.count_local(inquiry.next, &local);
                        if let Some((_, wait)) = local.refused {
                            self.refuse(inquiry, limit, Some(wait));
                        } else if !local.would_refuse.is_empty() {
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
    pub fn ask<H: StateStore + Properties + GrpcClient>(
        &mut self,
        inquiry: &mut Inquiry,
        request: &Request<'_>,
        now: Monotonic,
        host: &H,
    ) -> Option<CallId> {
        while inquiry.refused.is_none() {
            let index = inquiry.next;
            let limit = self.limits.get(index)?;
            let (message, fingerprint) = limit.subject(self.secret, request, self.route_name, host);
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
                        Found::Hit => Outcome::Admitted,
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
            self.hear(inquiry, outcome, request, now, host);
        }
        None
    }

    /// Joins those who wait for the key's call, or sends one.
    fn join(
        &mut self,
        service: &Service,
        subject: Subject,
        known: Known,
        now: Monotonic,
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
pub fn give_back(inquiry: &mut Inquiry, limits: &[GlobalLimit], now: Monotonic, store: &impl StateStore) {
    for (index, fingerprint) in inquiry.spent.drain(..) {
        if let Some(limit) = limits.get(index) {
            let _ = limit.amend(fingerprint, store, &|quota| quota.give_back(fingerprint, now));
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
    pub fn descriptor<'a>(
        &'a self,
        request: &Request<'a>,
        route: &'a str,
        properties: &impl Properties,
    ) -> Vec<(&'a str, Cow<'a, str>)> {
        let GlobalLimit { limit, service } = self;
        let keys = service.descriptor_keys.iter().map(|key| &**key);
        if limit.key.is_empty() {
            return keys.map(|key| (key, Cow::Borrowed(&*limit.name))).collect();
        }
        let value = |source: &'a KeySource| {
            let part = text(source.find(request, route, properties));
            // An IPv6 address without the brackets that its port needs, as Envoy's own remote_address.
            match (source, part.strip_prefix('[').and_then(|part| part.strip_suffix(']'))) {
                (KeySource::SourceAddress { .. }, Some(address)) => Cow::Owned(address.to_owned()),
                _ => part,
            }
        };
        keys.zip(limit.key.iter().map(value)).collect()
    }

    /// What the service is asked about the request, without hits, and what stands for it here.
    #[inline(never)]
    fn subject(
        &self,
        secret: &Secret,
        request: &Request<'_>,
        route: &str,
        properties: &impl Properties,
    ) -> (Vec<u8>, u64) {
        let message = encode(&self.service.domain, &self.descriptor(request, route, properties));
        let mut hasher = secret.hasher();
        hasher.write(&message);
        (message, hasher.finish())
    }

    /// The answer to a request that this limit refused.
    #[inline(never)]
    pub fn refusal(&self, wait: Option<u64>, is_grpc: bool) -> LocalReply {
        if let Some(wait) = wait {
            return self.limit.refusal(wait, is_grpc);
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
