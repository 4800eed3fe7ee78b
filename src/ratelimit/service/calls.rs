//! The calls that one worker has under way, how many hits each charges, and what its response means.
//!
//! A service that counts in fixed windows charges the hits of a call *before* it compares them with the limit (`INCRBY` in
//! envoyproxy/ratelimit), and refuses all of them if they are too many together. So a refused batch spends what was left for
//! the whole fleet, and has to be rare: a call charges at most an eighth of the hits that remained in the last response.
//! The first call of a key in a window charges one hit for the request that waits, each later one up to twice as many as
//! the one before. So a key with few requests has few prepaid hits, and a few hundred requests need a few dozen calls.
//!
//! A hit is used only in the window that it was charged in. A service reports whole seconds. So a window that ends in `s`
//! seconds lasts at least `s - 1` seconds from the time at which the call was *sent*; prepaid hits are valid for that long.
//! If a window may have begun while the call was under way, the service may have charged the old window and reported the
//! end of the new one. Then hits are kept only if the call was sent while that window was known to last.

use super::codec::{ResponseError, ServiceResponse, decode, with_hits};
use super::policy::{GlobalLimit, RateLimitService};
use super::prepaid::{Lookup, PrepaidBucket, SAME_WINDOW, WindowStatus};
use crate::host::{CallId, GrpcAnswer, GrpcCall, GrpcClient, Host, SharedData};
use crate::ratelimit::decision::bucket_key;
use crate::ratelimit::policy::Keyspace;
use crate::shared_data::{Change, Contended, SharedCell};
use crate::units::MonotonicInstant;

const SECOND: u64 = 1_000_000_000;

/// The gRPC status of a call that took too long.
const DEADLINE_EXCEEDED: u32 = 4;

/// The shortest time, in nanoseconds, for which the service is not asked about a key over its limit. The others of its window
/// may be one second or less.
const LEAST_SILENCE: u64 = 50_000_000;

/// The most calls that a worker has under way, and the most requests that wait for them.
const MAX_CALLS: usize = 1024;

/// A key of a global limit, and the message about it.
#[derive(Debug)]
pub(super) struct CallSubject {
    /// An index into the policy's routes.
    pub(super) route: usize,
    /// An index into the route's global limits.
    pub(super) limit: usize,
    pub(super) fingerprint: u64,
    /// The message of the call without its hits.
    pub(super) request: Vec<u8>,
}

/// Why a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceFailure {
    /// The proxy does not know the cluster, or cannot send to it.
    Unreachable,
    /// The service did not respond in time.
    Timeout,
    /// The gRPC status is not OK.
    Status,
    /// The response is malformed.
    Garbage,
    /// The code of the response is unknown.
    UnknownCode,
    /// Too many requests wait for calls.
    Overloaded,
}

/// A call under way.
#[derive(Debug)]
struct Call {
    id: CallId,
    subject: CallSubject,
    hits: u32,
    sent: MonotonicInstant,
    /// The known end of the window when the call was sent; 0 if it was unknown.
    known_until: MonotonicInstant,
}

/// The calls of one worker.
#[derive(Debug, Default)]
pub(in crate::ratelimit) struct ServiceCalls {
    under_way: Vec<Call>,
    /// The number of requests that wait.
    waiting: usize,
}

/// What the end of a call means for the requests that waited for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallOutcome {
    /// The route of the limit, an index into the policy's routes.
    pub route: usize,
    /// An index into the route's global limits.
    pub limit: usize,
    /// The number of requests that are admitted, in the order in which they came.
    pub admitted: usize,
    /// The instant until which other requests could use their hits, if it is known.
    pub until: Option<MonotonicInstant>,
    /// What the other requests do.
    pub others: NextStep,
    /// Why the call failed, or why no further call could be sent.
    pub failure: Option<ServiceFailure>,
}

/// What requests do that a response does not admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextStep {
    /// They are refused. The reset is in this number of nanoseconds.
    Refused(u64),
    /// They wait for another call.
    Wait(CallId),
    /// They are decided by `onFailure`.
    Failed,
}

impl ServiceCalls {
    /// Whether another request may wait.
    pub(super) fn has_room(&self) -> bool {
        self.waiting < MAX_CALLS
    }

    /// Counts a request that begins to wait.
    pub(super) fn enter(&mut self) {
        self.waiting += 1;
    }

    /// Counts a request that does not wait any more.
    pub(in crate::ratelimit) fn leave(&mut self) {
        self.waiting = self.waiting.saturating_sub(1);
    }

    /// The call under way for a key.
    pub(super) fn find(&self, subject: &CallSubject) -> Option<CallId> {
        let is_it = |call: &&Call| {
            let CallSubject { route, limit, fingerprint, .. } = call.subject;
            (route, limit, fingerprint) == (subject.route, subject.limit, subject.fingerprint)
        };
        self.under_way.iter().find(is_it).map(|call| call.id)
    }

    /// Sends a call for `waiting` requests of a key. `known` is the last known state of its window.
    #[inline(never)]
    pub(super) fn send(
        &mut self,
        service: &RateLimitService,
        subject: CallSubject,
        waiting: u32,
        known: WindowStatus,
        now: MonotonicInstant,
        client: &impl GrpcClient,
    ) -> Result<CallId, ServiceFailure> {
        if self.under_way.len() >= MAX_CALLS {
            return Err(ServiceFailure::Overloaded);
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
            .ok_or(ServiceFailure::Unreachable)?;
        self.under_way.push(Call { id, subject, hits, sent: now, known_until: known.until });
        Ok(id)
    }

    /// Takes the answer to a call for which `waiting` requests wait. `limit` returns the limit with an index, of the route
    /// with an index. Returns `None` if there is no such call.
    #[inline(never)]
    pub(in crate::ratelimit) fn on_answer<'p>(
        &mut self,
        answer: GrpcAnswer<'_>,
        waiting: usize,
        limit: impl Fn(usize, usize) -> Option<&'p GlobalLimit>,
        host: &impl Host,
    ) -> Option<CallOutcome> {
        let GrpcAnswer { call: id, status, message } = answer;
        let now = host.now();
        let at = self.under_way.iter().position(|call| call.id == id)?;
        let call = self.under_way.swap_remove(at);
        let CallSubject { route, limit: index, .. } = call.subject;
        let limit = limit(route, index)?;
        let outcome =
            CallOutcome { route, limit: index, admitted: 0, until: None, others: NextStep::Failed, failure: None };
        let failed = |failure| Some(CallOutcome { failure: Some(failure), ..outcome });
        if status != 0 {
            // Envoy reports its own timeout as UNAVAILABLE with a message of its router, by a clock that may be slightly
            // behind. The service also receives the timeout, and may end the call itself.
            let timeout = u64::from(limit.service.timeout).saturating_mul(1_000_000);
            let is_late = status == DEADLINE_EXCEEDED
                || message.starts_with(b"upstream request timeout")
                || now.saturating_since(call.sent) >= timeout;
            return failed(if is_late { ServiceFailure::Timeout } else { ServiceFailure::Status });
        }
        let answer = match decode(message) {
            Ok(answer) => answer,
            Err(ResponseError::Garbage) => return failed(ServiceFailure::Garbage),
            Err(ResponseError::UnknownCode) => return failed(ServiceFailure::UnknownCode),
        };
        Some(self.on_response(limit, call, outcome, answer, waiting, host))
    }

    fn on_response(
        &mut self,
        limit: &GlobalLimit,
        call: Call,
        mut outcome: CallOutcome,
        answer: ServiceResponse,
        waiting: usize,
        host: &impl Host,
    ) -> CallOutcome {
        let now = host.now();
        let Call { subject, hits, sent, known_until, .. } = call;
        let until = sent.saturating_add(answer.reset.saturating_sub(1).saturating_mul(SECOND));
        let mut known = WindowStatus::default();
        if !answer.is_over {
            outcome.admitted = waiting.min(hits as usize);
            let is_known = known_until > sent && until <= known_until.saturating_add(SAME_WINDOW);
            let took = now.saturating_since(sent) / SECOND;
            let is_old = answer.reset > 0 && answer.reset.saturating_add(took) < answer.window;
            let is_sure = is_old || is_known && answer.window > 0;
            let prepaid = if is_sure { (hits as usize).saturating_sub(outcome.admitted) } else { 0 };
            outcome.until = is_sure.then_some(until);
            known =
                WindowStatus { until, batch: if is_sure { hits } else { 0 }, remaining: answer.remaining.unwrap_or(0) };
            if until > now {
                let prepaid = u32::try_from(prepaid).unwrap_or(u32::MAX);
                limit.amend(subject.fingerprint, host, &|bucket| {
                    bucket.add(subject.fingerprint, prepaid, known, now);
                });
            }
        } else if hits == 1 {
            let reset = answer.reset.max(1).saturating_mul(SECOND);
            let until = until.max(now.saturating_add(LEAST_SILENCE));
            let then = now.saturating_add(reset).saturating_since(until);
            limit.amend(subject.fingerprint, host, &|bucket| {
                bucket.refuse(subject.fingerprint, until, then, now);
            });
            outcome.others = NextStep::Refused(reset);
            return outcome;
        }
        // Some requests are left: more than the known room, or those of a batch that was too large. A single hit decides.
        let left = u32::try_from(waiting.saturating_sub(outcome.admitted)).unwrap_or(u32::MAX);
        if left > 0 {
            match self.send(&limit.service, subject, left, known, now, host) {
                Ok(id) => outcome.others = NextStep::Wait(id),
                Err(failure) => outcome.failure = Some(failure),
            }
        }
        outcome
    }
}

/// The number of hits that a call charges: one for each request that waits or a batch, but at most what is likely to remain.
fn hits(batch: u32, waiting: u32, known: WindowStatus) -> u32 {
    let room = (known.remaining / 8).max(1);
    let prepaid = if batch > 1 { known.batch.saturating_mul(2).min(batch) } else { 1 };
    waiting.max(prepaid).clamp(1, room)
}

impl GlobalLimit {
    /// Uses a prepaid hit of a key, if there is one.
    ///
    /// # Errors
    /// [`Contended`] if the record could not be written.
    pub(super) fn use_prepaid(
        &self,
        fingerprint: u64,
        now: MonotonicInstant,
        store: &impl SharedData,
    ) -> Result<Lookup, Contended> {
        self.cell(fingerprint).update(store, |stored| {
            let mut bucket = stored.record().unwrap_or_default();
            match bucket.take(fingerprint, now) {
                hit @ Lookup::Hit(_) => Change::Write(bucket, hit),
                found => Change::Keep(found),
            }
        })
    }

    /// Changes what all workers know about a key. A change that cannot be written is dropped: it costs a call or a hit.
    #[inline(never)]
    pub(super) fn amend(&self, fingerprint: u64, store: &impl SharedData, change: &dyn Fn(&mut PrepaidBucket)) {
        let _ = self.cell(fingerprint).update(store, |stored| {
            let mut bucket = stored.record().unwrap_or_default();
            change(&mut bucket);
            Change::Write(bucket, ())
        });
    }

    /// The record that contains a key.
    fn cell(&self, fingerprint: u64) -> SharedCell<PrepaidBucket> {
        let Keyspace { prefix, buckets, .. } = &self.limit.keyspace;
        SharedCell::new(bucket_key(prefix, "quota/", *buckets, fingerprint))
    }
}
