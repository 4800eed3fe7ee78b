//! The limits of a route at work in one worker.
//!
//! [`RateLimiter::check`] decides about a request. The proxy's own limits come before the global ones: they need no call,
//! and can be refunded. What a request has acquired is its [`RouteLimitState`]. On every path the filter
//!
//! - refunds it with [`RateLimiter::refund`], if another feature refuses the request, or if the request never reaches an
//!   upstream,
//! - or commits it with [`RateLimiter::commit`], once it is decided that nothing refuses the request. Charges that count only
//!   some responses stay pending until [`RateLimiter::on_response`], or until [`RateLimiter::on_end`] if no response comes.

use super::decision::{ChargeOutcome, LocalCharges, LocalCheck, LocalLimiter};
use super::lease::Leases;
use super::metrics::RateLimitMetrics;
use super::policy::{RateLimits, Secret};
use super::service::{
    CallOutcome, GlobalCheck, GlobalLimiter, NextStep, PrepaidHit, ServiceCalls, ServiceEvent, ServiceOutcome,
};
use crate::host::{CallId, GrpcAnswer, Host, Metrics};
use crate::http::{HeaderMutation, LocalReply};
use crate::key::KeyContext;
use crate::shared_data::{Change, SharedCell};
use crate::telemetry::Scope;
use crate::units::MonotonicInstant;
use std::borrow::Cow;
use std::sync::Arc;

/// The limits of one route: the compiled policy and the metrics.
#[derive(Debug)]
pub struct RateLimiter {
    /// An index into the policy's routes.
    route: usize,
    limits: Arc<RateLimits>,
    metrics: RateLimitMetrics,
    /// Whether another feature can refuse a request that the limits have admitted.
    is_followed: bool,
}

/// What a worker keeps for the limits of all routes.
#[derive(Debug)]
pub struct WorkerLimits {
    pub(super) secret: Secret,
    pub(super) leases: Leases,
    pub(super) calls: ServiceCalls,
}

/// What the limits of a route have acquired for a request and not completed yet, and the quota that the response announces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteLimitState {
    /// An index into the policy's routes.
    route: usize,
    local: LocalCharges,
    /// Hits of the global limits.
    prepaid: Vec<PrepaidHit>,
}

/// The result of a check, and what it has acquired. A check that waits for a call is kept until
/// [`RateLimiter::check`] resumes it or [`RateLimiter::on_cancel`] ends it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitCheck {
    /// Whether the request is admitted.
    pub decision: LimitDecision,
    /// What the proxy's own limits decided; `None` if they admitted the request without an event.
    pub local: Option<Box<LocalCheck>>,
    /// What the global limits decided; `None` if they were not asked.
    pub global: Option<Box<GlobalCheck>>,
    /// What the request has acquired; `None` if that is nothing.
    pub state: Option<Box<RouteLimitState>>,
}

/// Whether a request is admitted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LimitDecision {
    /// The request is admitted.
    #[default]
    Admitted,
    /// The request is refused with this reply. Nothing is charged.
    Refused(LocalReply),
    /// The request waits for the answer to this call.
    Pending(CallId),
}

impl RouteLimitState {
    /// The index of the route whose limits these are.
    pub fn route(&self) -> usize {
        self.route
    }

    /// Whether a charge depends on the response.
    pub fn is_pending(&self) -> bool {
        !self.local.charges.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.local.charges.is_empty() && self.prepaid.is_empty() && self.local.quota.is_none()
    }
}

impl RateLimiter {
    /// Defines the metrics of the limits of the route with the index `route`. `is_followed`: whether another feature
    /// can refuse a request after the limits.
    pub(crate) fn new<M: Metrics>(
        route: usize,
        limits: &Arc<RateLimits>,
        is_followed: bool,
        scope: &Scope<'_, M>,
        policy: &Scope<'_, M>,
    ) -> RateLimiter {
        let metrics = RateLimitMetrics::define(limits, scope, policy);
        RateLimiter { route, limits: limits.clone(), metrics, is_followed }
    }

    /// Decides whether the limits admit a request. `resumed` is the earlier check of a request that waited, with the
    /// outcome of its call.
    pub fn check(
        &self,
        worker: &mut WorkerLimits,
        context: &KeyContext<'_, '_>,
        resumed: Option<(LimitCheck, ServiceOutcome)>,
        host: &impl Host,
    ) -> LimitCheck {
        let RateLimits { local, global } = &*self.limits;
        if let Some((check, outcome)) = resumed {
            return self.check_global(worker, context, check, Some(outcome), host);
        }
        let mut check = LimitCheck::default();
        if !local.is_empty() {
            let mut acquired = LocalCharges::default();
            let is_final = !self.is_followed && global.is_empty();
            let found = self.local_limiter(worker, host.now(), host).check(context, is_final, &mut acquired);
            self.metrics.count_local(&found, host);
            let state = RouteLimitState { route: self.route, local: acquired, prepaid: Vec::new() };
            if !state.is_empty() {
                check.state = Some(Box::new(state));
            }
            if let Some(refusal) = found.refusal
                && let Some(limit) = local.get(refusal.quota.limit)
            {
                check.decision = LimitDecision::Refused(limit.refusal(&refusal, context.request.is_grpc()));
            }
            if found.refusal.is_some() || !found.events.is_empty() {
                check.local = Some(Box::new(found));
            }
        }
        if global.is_empty() || check.decision != LimitDecision::Admitted {
            return check;
        }
        self.check_global(worker, context, check, None, host)
    }

    /// Asks the global limits about a request that the proxy's own limits have admitted.
    #[inline(never)]
    fn check_global(
        &self,
        worker: &mut WorkerLimits,
        context: &KeyContext<'_, '_>,
        mut check: LimitCheck,
        outcome: Option<ServiceOutcome>,
        host: &impl Host,
    ) -> LimitCheck {
        let RateLimiter { route, limits, metrics, is_followed } = self;
        let mut global = check.global.take().unwrap_or_default();
        let mut prepaid = check.state.as_mut().map(|state| std::mem::take(&mut state.prepaid)).unwrap_or_default();
        let mut limiter = GlobalLimiter {
            limits: &limits.global,
            route: *route,
            is_followed: *is_followed,
            worker,
            metrics,
            now: host.now(),
            host,
        };
        if let Some(outcome) = outcome {
            limiter.on_outcome(&mut global, &mut prepaid, outcome, context);
        }
        let call = limiter.check(&mut global, &mut prepaid, context);
        if !prepaid.is_empty() {
            let new = || Box::new(RouteLimitState { route: *route, ..RouteLimitState::default() });
            check.state.get_or_insert_with(new).prepaid = prepaid;
        }
        check.decision = match call {
            Some(call) => LimitDecision::Pending(call),
            None => {
                metrics.count_global(&global, host);
                LimitDecision::Admitted
            }
        };
        if let Some(refusal) = global.refusal
            && let Some(limit) = limits.global.get(refusal.limit)
        {
            self.refund(worker, &mut check.state, host);
            check.decision = LimitDecision::Refused(limit.refusal(refusal.wait, context.request.is_grpc()));
        }
        check.global = Some(global);
        check
    }

    /// Refunds everything that a request has acquired: another feature refuses it, or it does not reach an upstream.
    #[inline(never)]
    pub fn refund(&self, worker: &mut WorkerLimits, state: &mut Option<Box<RouteLimitState>>, host: &impl Host) {
        let Some(state) = state.take() else { return };
        let now = host.now();
        let mut limiter = self.local_limiter(worker, now, host);
        state.local.charges.iter().for_each(|charge| limiter.refund(charge));
        for hit in &state.prepaid {
            if let Some(limit) = self.limits.global.get(hit.limit) {
                hit.refund(limit, now, host);
            }
        }
    }

    /// Completes the charges of a request that nothing refuses any more, except those that depend on the response. These
    /// are released if the request does not reach an upstream, because a fault replaces it.
    pub fn commit(&self, state: &mut Option<Box<RouteLimitState>>, reaches_upstream: bool, host: &impl Host) {
        let Some(acquired) = state else { return };
        acquired.prepaid.clear();
        acquired.local.charges.retain(|charge| charge.is_pending());
        if !reaches_upstream {
            self.settle(acquired, ChargeOutcome::NotAttempted, host);
        }
        if acquired.is_empty() {
            *state = None;
        }
    }

    /// Settles the charges that depend on the response. `status` is the HTTP status, to which the status of a gRPC call is
    /// mapped; `None` if another hop has injected the response, so that it does not count.
    pub fn on_response(&self, state: &mut RouteLimitState, status: Option<u16>, host: &impl Host) {
        self.settle(state, status.map_or(ChargeOutcome::NotAttempted, ChargeOutcome::Answered), host);
    }

    /// Settles the charges of a stream that has ended without a response. They count if the request reached an upstream.
    pub fn on_end(&self, state: &mut RouteLimitState, reached_upstream: bool, host: &impl Host) {
        let outcome = if reached_upstream { ChargeOutcome::Unanswered } else { ChargeOutcome::NotAttempted };
        self.settle(state, outcome, host);
    }

    #[inline(never)]
    fn settle(&self, state: &mut RouteLimitState, outcome: ChargeOutcome, host: &impl Host) {
        for charge in std::mem::take(&mut state.local.charges) {
            charge.settle(&self.limits.local, outcome, host.now(), host);
        }
    }

    /// Refunds what a request has acquired whose client left while it waited. `outcome` is the outcome of its call, if the
    /// call is answered.
    #[inline(never)]
    pub fn on_cancel(
        &self,
        worker: &mut WorkerLimits,
        mut check: LimitCheck,
        outcome: Option<ServiceOutcome>,
        host: &impl Host,
    ) {
        worker.calls.leave();
        self.refund(worker, &mut check.state, host);
        let Some(global) = check.global else { return };
        if let (Some(ServiceOutcome::Admitted(Some(until))), Some(limit)) =
            (outcome, self.limits.global.get(global.next()))
        {
            let hit = PrepaidHit { limit: global.next(), fingerprint: global.fingerprint(), until };
            hit.refund(limit, host.now(), host);
        }
        self.metrics.count_event(global.next(), ServiceEvent::ClientLeft, host);
    }

    /// Passes the headers that announce the remaining quota to `change`, once.
    pub fn write_headers(&self, state: &mut RouteLimitState, change: &mut dyn FnMut(HeaderMutation<'static>)) {
        if let Some(quota) = state.local.quota.take()
            && let Some(limit) = self.limits.local.get(quota.limit)
        {
            limit.write_headers(&quota, &mut |(name, value, is_list)| {
                let value = Cow::Owned(value.into_bytes());
                change(if is_list { HeaderMutation::Add(name, value) } else { HeaderMutation::Set(name, value) });
            });
        }
    }

    fn local_limiter<'w, S>(
        &'w self,
        worker: &'w mut WorkerLimits,
        now: MonotonicInstant,
        store: &'w S,
    ) -> LocalLimiter<'w, S> {
        LocalLimiter { limits: &self.limits.local, secret: &worker.secret, leases: &mut worker.leases, now, store }
    }
}

impl WorkerLimits {
    /// Reads the secret of the limit keys from shared data, or writes a new one that the other workers will read.
    /// `state_prefix` is the prefix of the policy's shared-data keys.
    pub fn new(state_prefix: &str, host: &impl Host) -> WorkerLimits {
        let new = Secret(host.secret_bytes());
        let cell = SharedCell::<Secret>::new([state_prefix, "secret"].concat());
        let secret = cell.update(host, |stored| match stored.record() {
            Some(known) => Change::Keep(known),
            None => Change::Write(new, new),
        });
        WorkerLimits::with_secret(secret.unwrap_or(new))
    }

    /// The state of a worker that has no lease and no call yet.
    pub(super) fn with_secret(secret: Secret) -> WorkerLimits {
        WorkerLimits { secret, leases: Leases::default(), calls: ServiceCalls::default() }
    }

    /// Notes that a request does not wait any more.
    pub fn on_resume(&mut self) {
        self.calls.leave();
    }

    /// Takes the answer to a call for which `waiting` requests wait. Returns what it means for them, and `None` if this
    /// worker has not sent the call. `limiters` are those of all routes.
    pub fn on_answer(
        &mut self,
        limiters: &[Option<RateLimiter>],
        answer: GrpcAnswer<'_>,
        waiting: usize,
        host: &impl Host,
    ) -> Option<CallOutcome> {
        let limiter = |route: usize| limiters.get(route).and_then(Option::as_ref);
        let limit = |route, limit: usize| limiter(route)?.limits.global.get(limit);
        let outcome = self.calls.on_answer(answer, waiting, limit, host)?;
        if let Some(limiter) = limiter(outcome.route) {
            if let Some(failure) = outcome.failure {
                limiter.metrics.count_event(outcome.limit, ServiceEvent::Failed(failure), host);
            }
            if let NextStep::Wait(_) = outcome.others {
                limiter.metrics.count_event(outcome.limit, ServiceEvent::CallSent, host);
            }
        }
        Some(outcome)
    }

    /// Returns leases that end soon. To be called every [`WorkerLimits::TICK`].
    pub fn on_tick(&mut self, limiters: &[Option<RateLimiter>], host: &impl Host) {
        let now = host.now();
        self.leases.ending(now).for_each(|lease| return_lease(limiters, lease, now, host));
    }

    /// Returns all leases, because the configuration goes away.
    pub fn on_shutdown(&mut self, limiters: &[Option<RateLimiter>], host: &impl Host) {
        let now = host.now();
        self.leases.take_all().for_each(|lease| return_lease(limiters, lease, now, host));
    }

    /// The period of [`WorkerLimits::on_tick`] in nanoseconds.
    pub const TICK: u64 = Leases::TICK;
}

#[inline(never)]
fn return_lease(
    limiters: &[Option<RateLimiter>],
    (id, fingerprint, reservation): super::lease::EndedLease,
    now: MonotonicInstant,
    host: &impl Host,
) {
    if let Some((keyspace, rate)) = limiters.iter().flatten().find_map(|limiter| limiter.limits.rate(id)) {
        keyspace.settle(fingerprint, reservation, rate, now, host);
    }
}
