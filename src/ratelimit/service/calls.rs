//! The calls that one worker has under way, how much each asks for, and what its answer means.
//!
//! A service that counts in fixed windows charges a call's hits *before* it compares them with the limit (envoyproxy's
//! `INCRBY`), and refuses them all if they are too many together. So a batch that is refused has spent what was left, for
//! everybody, and must be rare: a call asks for at most an eighth of what the service last said remained. A key's first
//! call in a window asks for the request that waits, each later one for up to twice as much as the last; so a key that is
//! asked for seldom holds little ahead, and a few hundred requests make a few dozen calls.
//!
//! A hit is spent in the window that it was charged to, never later. A service tells whole seconds, so a window that ends
//! in `s` seconds lasts at least `s - 1` more from when the call was *sent*; that is how long hits are kept ahead. Where a
//! window may have begun while the call was under way even that is not sure, because a service may charge the old window
//! and tell the new one's end: such hits are only kept if the call was sent while that window was known to be on.

use super::codec::{Answer, Flaw, decode, with_hits};
use super::policy::{GlobalLimit, Service};
use super::quota::{Found, Known, Quota, SAME_WINDOW};
use crate::host::{CallId, Change, Conflict, GrpcAnswer, GrpcCall, GrpcClient, SharedData, update};
use crate::units::MonotonicInstant;

const SECOND: u64 = 1_000_000_000;

/// gRPC's status for what took too long.
const DEADLINE_EXCEEDED: u32 = 4;

/// How long a key over its limit is left alone at least; its window may have one second to go, or none.
const LEAST_SILENCE: u64 = 50_000_000;

/// The most calls that a worker has under way, and the most requests that wait for them.
const MOST: usize = 1024;

/// Where a limit stands in the policy: its route, and its place among the route's global limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub route: usize,
    pub limit: usize,
}

/// A key as a service is asked about it.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) place: Place,
    pub(super) fingerprint: u64,
    /// The call's message without its hits.
    pub(super) request: Vec<u8>,
}

/// Why a service could not be asked, or did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The proxy knows no such cluster, or could not send.
    Unreachable,
    /// No answer in time.
    Timeout,
    /// A gRPC status other than OK.
    Status,
    /// An answer that is none.
    Garbage,
    /// An answer that does not say whether the request is over the limit.
    UnknownCode,
    /// Too many requests wait already.
    Crowded,
}

/// A call under way.
#[derive(Debug)]
struct Call {
    id: CallId,
    subject: Subject,
    hits: u32,
    sent: MonotonicInstant,
    /// Until when the window was known to be on when the call was sent; 0 where nothing was known.
    known_until: MonotonicInstant,
}

/// The calls of one worker.
#[derive(Debug, Default)]
pub struct Calls {
    under_way: Vec<Call>,
    /// How many requests wait.
    waiting: usize,
}

/// What an answer means for the requests that waited for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    pub place: Place,
    /// So many of them, the first to come, are admitted.
    pub admitted: usize,
    /// Until when their hits could be spent by others, where that is known.
    pub until: Option<MonotonicInstant>,
    pub rest: Rest,
    /// Why there was no answer, to be counted; or why there was none to ask further.
    pub failure: Option<Failure>,
}

/// What becomes of the requests that an answer does not admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// They are over the limit; nanoseconds until its reset.
    Refused(u64),
    /// They wait for another call.
    Waits(CallId),
    /// The limit's `onFailure` says.
    Failed,
}

impl Calls {
    /// Whether another request can wait.
    pub(super) fn has_room(&self) -> bool {
        self.waiting < MOST
    }

    /// Notes that a request begins to wait.
    pub(super) fn enter(&mut self) {
        self.waiting += 1;
    }

    /// Notes that a request waits no longer.
    pub fn leave(&mut self) {
        self.waiting = self.waiting.saturating_sub(1);
    }

    /// The call under way for a key.
    pub(super) fn find(&self, place: Place, fingerprint: u64) -> Option<CallId> {
        let is_it = |call: &&Call| call.subject.fingerprint == fingerprint && call.subject.place == place;
        self.under_way.iter().find(is_it).map(|call| call.id)
    }

    /// Sends a call for `waiting` requests of a key, of which `known` is known.
    #[inline(never)]
    pub(super) fn send(
        &mut self,
        service: &Service,
        subject: Subject,
        waiting: u32,
        known: Known,
        now: MonotonicInstant,
        client: &impl GrpcClient,
    ) -> Result<CallId, Failure> {
        if self.under_way.len() >= MOST {
            return Err(Failure::Crowded);
        }
        let hits = hits(service.batch, waiting, known);
        let id = client
            .call(&GrpcCall {
                cluster: &service.cluster,
                service: "envoy.service.ratelimit.v3.RateLimitService",
                method: "ShouldRateLimit",
                message: &with_hits(&subject.request, hits),
                timeout: service.timeout,
            })
            .ok_or(Failure::Unreachable)?;
        self.under_way.push(Call { id, subject, hits, sent: now, known_until: known.until });
        Ok(id)
    }

    /// Takes the answer to a call for which `waiting` requests wait. `limit` finds the limit at a place. `None` where
    /// there is no such call.
    #[inline(never)]
    pub fn settle<'p>(
        &mut self,
        answer: GrpcAnswer<'_>,
        waiting: usize,
        limit: impl Fn(Place) -> Option<&'p GlobalLimit>,
        now: MonotonicInstant,
        host: &(impl SharedData + GrpcClient),
    ) -> Option<Settled> {
        let GrpcAnswer { call: id, status, message } = answer;
        let at = self.under_way.iter().position(|call| call.id == id)?;
        let call = self.under_way.swap_remove(at);
        let place = call.subject.place;
        let limit = limit(place)?;
        let failed =
            |failure| Some(Settled { place, admitted: 0, until: None, rest: Rest::Failed, failure: Some(failure) });
        if status != 0 {
            // Envoy tells its own timeout as UNAVAILABLE in its router's words, by a clock that may be a little behind; the
            // service is told the timeout too, and may end the call itself.
            let timeout = u64::from(limit.service.timeout).saturating_mul(1_000_000);
            let is_late = status == DEADLINE_EXCEEDED
                || message.starts_with(b"upstream request timeout")
                || now.saturating_since(call.sent) >= timeout;
            return failed(if is_late { Failure::Timeout } else { Failure::Status });
        }
        let answer = match decode(message) {
            Ok(answer) => answer,
            Err(Flaw::Garbage) => return failed(Failure::Garbage),
            Err(Flaw::UnknownCode) => return failed(Failure::UnknownCode),
        };
        Some(self.learn(limit, call, answer, waiting, now, host))
    }

    fn learn(
        &mut self,
        limit: &GlobalLimit,
        call: Call,
        answer: Answer,
        waiting: usize,
        now: MonotonicInstant,
        host: &(impl SharedData + GrpcClient),
    ) -> Settled {
        let Call { subject, hits, sent, known_until, .. } = call;
        let place = subject.place;
        let until = sent.saturating_add(answer.reset.saturating_sub(1).saturating_mul(SECOND));
        let mut known = Known::default();
        let mut settled = Settled { place, admitted: 0, until: None, rest: Rest::Failed, failure: None };
        if !answer.is_over {
            settled.admitted = waiting.min(hits as usize);
            let is_known = known_until > sent && until <= known_until.saturating_add(SAME_WINDOW);
            let took = now.saturating_since(sent) / SECOND;
            let is_old = answer.reset > 0 && answer.reset.saturating_add(took) < answer.window;
            let is_sure = is_old || is_known && answer.window > 0;
            let ahead = if is_sure { (hits as usize).saturating_sub(settled.admitted) } else { 0 };
            settled.until = is_sure.then_some(until);
            known = Known { until, batch: if is_sure { hits } else { 0 }, remaining: answer.remaining.unwrap_or(0) };
            if until > now {
                let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
                let _ = limit.amend(subject.fingerprint, host, &|quota| {
                    quota.add(subject.fingerprint, ahead, known, now);
                });
            }
        } else if hits == 1 {
            let reset = answer.reset.max(1).saturating_mul(SECOND);
            let until = until.max(now.saturating_add(LEAST_SILENCE));
            let then = now.saturating_add(reset).saturating_since(until);
            let _ = limit.amend(subject.fingerprint, host, &|quota| {
                quota.refuse(subject.fingerprint, until, then, now);
            });
            settled.rest = Rest::Refused(reset);
            return settled;
        }
        // Some are left: more than the room that was known, or a batch that was too large. A single hit will tell.
        let left = u32::try_from(waiting.saturating_sub(settled.admitted)).unwrap_or(u32::MAX);
        if left > 0 {
            match self.send(&limit.service, subject, left, known, now, host) {
                Ok(id) => settled.rest = Rest::Waits(id),
                Err(failure) => settled.failure = Some(failure),
            }
        }
        settled
    }
}

/// How many hits a call asks for: those that wait or a batch ahead, and not more than is likely to be left.
fn hits(batch: u32, waiting: u32, known: Known) -> u32 {
    let room = (known.remaining / 8).max(1);
    let ahead = if batch > 1 { known.batch.saturating_mul(2).min(batch) } else { 1 };
    waiting.max(ahead).clamp(1, room)
}

impl GlobalLimit {
    /// Spends a hit of a key that was charged ahead, if there is one. With it, whether the word was somebody else's.
    pub(super) fn spend(
        &self,
        fingerprint: u64,
        now: MonotonicInstant,
        store: &impl SharedData,
    ) -> Result<(Found, bool), Conflict> {
        update(store, &self.word(fingerprint), |found| {
            let decoded = found.map(Quota::decode);
            let is_garbage = decoded == Some(None);
            let mut quota = decoded.flatten().unwrap_or_default();
            match quota.take(fingerprint, now) {
                hit @ Found::Hit(_) => Change::Write(quota.encode(), (hit, is_garbage)),
                found => Change::Keep((found, is_garbage)),
            }
        })
    }

    /// Changes what all workers know of a key.
    #[inline(never)]
    pub(super) fn amend(
        &self,
        fingerprint: u64,
        store: &impl SharedData,
        change: &dyn Fn(&mut Quota),
    ) -> Result<(), Conflict> {
        update(store, &self.word(fingerprint), |found| {
            let mut quota = found.and_then(Quota::decode).unwrap_or_default();
            change(&mut quota);
            Change::Write(quota.encode(), ())
        })
    }

    /// The shared word that holds a key.
    fn word(&self, fingerprint: u64) -> String {
        const NAME: &str = "quota/";
        let mut word = String::with_capacity(self.limit.keyspace.prefix.len() + NAME.len() + 8);
        word.push_str(&self.limit.keyspace.prefix);
        word.push_str(NAME);
        let bucket = (u128::from(fingerprint) * u128::from(self.limit.keyspace.buckets)) >> 64;
        let digit = |digit: u32| char::from_digit(digit, 16).unwrap_or('0');
        word.extend((0..8).map(|place| digit((bucket >> (28 - place * 4)) as u32 & 0xf)));
        word
    }
}
