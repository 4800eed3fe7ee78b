//! The filter: one request from top to bottom.
//!
//! [`Filter::on_request`] decides on a request, [`Filter::on_response`] observes the response. Both take time, randomness,
//! shared data and properties from a [`Host`] and return what the host has to do. The features decide from plain values;
//! this file has their order, and its comments justify the order.
//!
//! Invariant: what a request acquires (a permit of the circuit breaker, a pending charge, a judge's sample, a place under
//! `maxActive`) is in its [`StreamState`], and is completed by the response or given back by [`Filter::on_end`],
//! [`Filter::on_cancel`] or the decision itself.

mod line;

use crate::breaker::{CircuitBreaker, Permit};
use crate::canary::{
    CohortAssignment, CohortMetrics, Destination, EffectiveWeight, InboundAssignments, Rollout, RolloutDecision,
    Sample, Selection, SelectionReason, TICK_PERIOD, WeightSource,
};
use crate::evidence::MERGE_PERIOD;
use crate::fault::{
    Abort, ActiveFaultPermit, Attempt, DrawnFaults, ExperimentId, FAULT_HEADER, FaultDecision, FaultInjector,
    FaultRequest, ResponseReplacement, SkipReason,
};
use crate::host::{CallId, GrpcAnswer, Host};
use crate::http::{HeaderMutation, LocalReply, Request, http_from_grpc};
use crate::key::KeyContext;
use crate::outlier::{AdminPoller, ObservedResponse, TargetObserver, is_failure};
use crate::policy::{Policy, Route, TargetId, label};
use crate::ratelimit::service::{CallOutcome, GlobalCheck, ServiceOutcome};
use crate::ratelimit::{
    LimitCheck, LimitDecision, LimitEvent, LocalCheck, RateLimiter, RateLimits, RouteLimitState, WorkerLimits,
};
use crate::shared_data::SharedDataProblem;
use crate::telemetry::{Meters, Scope};
use crate::trace;
use crate::trace::w3c::TraceContext;
use crate::trace::{ForcedSampling, PropagatedContext, TracePropagator};
use crate::units::{Fraction, MonotonicInstant};

/// A policy at work in one worker.
#[derive(Debug)]
pub struct Filter {
    policy: Policy,
    meters: Meters,
    trace: Option<TracePropagator>,
    cohort: Option<CohortMetrics>,
    worker: WorkerState,
    /// How often to tick, in nanoseconds.
    period: Option<u64>,
}

/// What a worker keeps from one request to the next.
#[derive(Debug)]
struct WorkerState {
    limits: WorkerLimits,
    /// In the order of the policy's routes, as all four that follow.
    limiters: Vec<Option<RateLimiter>>,
    breakers: Vec<Option<CircuitBreaker>>,
    rollouts: Vec<Option<Box<Rollout>>>,
    injectors: Vec<Option<Box<FaultInjector>>>,
    /// In the order of the policy's targets.
    targets: Vec<Option<Box<TargetObserver>>>,
    pollers: Vec<AdminPoller>,
}

/// A request as it arrived.
#[derive(Clone, Copy)]
struct RequestContext<'a> {
    request: &'a Request<'a>,
    /// What earlier hops have decided on it.
    inbound: &'a InboundAssignments,
    /// Whether another stream can be delayed.
    may_hold: bool,
}

/// What is to be done with a request, and why.
#[derive(Debug, Default)]
pub struct Decision<'p> {
    pub verdict: RequestAction,
    /// To be applied before the request goes on. They have no effect on a request that is answered at once.
    pub mutations: Vec<HeaderMutation<'p>>,
    /// To be kept with the stream, for [`Filter::on_response`] and [`Filter::on_end`].
    pub exchange: StreamState,
    pub reasons: Explanation,
}

/// What is to be done with a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum RequestAction {
    #[default]
    Continue,
    Delay(Box<DelayedRequest>),
    Answer(LocalReply),
    /// Reset the stream. No response is sent.
    Reset,
    /// Hold the request until a call is answered, then decide with [`Filter::on_resume`].
    Wait(Box<PendingRequest>),
}

impl RequestAction {
    /// Whether the request may reach an upstream. A delayed request may, also if an abort follows: the abort is not
    /// injected if its experiment is suspended meanwhile.
    fn may_go_on(&self) -> bool {
        matches!(self, RequestAction::Continue | RequestAction::Delay(_))
    }

    /// The action after a delay, or this one.
    pub fn final_action(&self) -> &RequestAction {
        match self {
            RequestAction::Delay(delayed) => &delayed.action_after,
            other => other,
        }
    }
}

/// A request that is delayed.
#[derive(Debug, PartialEq, Eq)]
pub struct DelayedRequest {
    /// Nanoseconds.
    pub delay: u64,
    /// What follows the delay; never another delay.
    pub action_after: RequestAction,
    /// The experiment that delays it. If the experiment has to stop, the delay ends at once and nothing is injected after
    /// it.
    pub experiment: ExperimentId,
    /// The place of the fault under `maxActive`, to be given to [`Filter::release`] at the end of the delay or of the stream.
    pub fault_permit: Option<ActiveFaultPermit>,
}

/// Why a request is treated as it is.
#[derive(Debug, Default)]
pub struct Explanation {
    pub trace: Option<PropagatedContext>,
    /// An index into the policy's routes.
    pub route: Option<usize>,
    /// What the proxy's own limits decided; `None` if they admitted the request without an event.
    pub local_limits: Option<Box<LocalCheck>>,
    /// What the global limits decided; `None` if they were not asked.
    pub global_limits: Option<Box<GlobalCheck>>,
    pub choice: Option<Selection>,
    /// The canary's weight for the request, if the route has a canary.
    pub share: Option<EffectiveWeight>,
    /// The assignment that later hops get.
    pub decided: Option<CohortAssignment>,
    /// The faults that were drawn.
    pub drawn: DrawnFaults,
    /// Why they were not injected.
    pub withheld: Option<SkipReason>,
    /// Whether the circuit breaker refused the request.
    pub broken: bool,
}

impl Explanation {
    /// The destination that was chosen; `None` if the route has no destinations.
    pub fn destination<'p>(&self, policy: &'p Policy) -> Option<&'p Destination> {
        let split = policy.routes.get(self.route?)?.split.as_ref()?;
        split.destinations.get(self.choice?.destination).map(|(destination, _)| destination)
    }
}

/// Measures how long a response takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ResponseTimer {
    #[default]
    Off,
    /// The request was sent at this instant.
    Since(MonotonicInstant),
    /// The response headers came after this number of nanoseconds.
    Took(u64),
}

/// What a request has acquired, and what its response is needed for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct StreamState {
    /// The target whose response is observed; `None` if no guard watches it.
    pub observed: Option<TargetId>,
    /// Runs if a guard has a latency threshold.
    timer: ResponseTimer,
    /// The permission of the circuit breaker, and the index of its route.
    permit: Option<(usize, Permit)>,
    /// The request, if its response is evidence for a judge.
    pub sample: Option<Sample>,
    /// The fault that replaces the response of the upstream.
    pub replacement: Option<ResponseReplacement>,
    /// The attempt, if an experiment on hosts or attempts counts its response.
    pub attempt: Option<Attempt>,
    /// The place of a fault under `maxActive`, to be given to [`Filter::release`] at the end of the stream.
    pub fault_permit: Option<ActiveFaultPermit>,
    pub is_grpc: bool,
    /// The trace context for the response headers; `None` if the response has none.
    pub trace: Option<TraceContext>,
    /// What the route's limits have acquired for the request, and the quota that the response announces; `None` if that is
    /// nothing.
    pub limits: Option<Box<RouteLimitState>>,
}

impl StreamState {
    fn is_awaited(&self) -> bool {
        self.observed.is_some() || self.sample.is_some() || self.permit.is_some() || self.has_pending_charge()
    }

    /// Whether a limit charges the request by its response.
    fn has_pending_charge(&self) -> bool {
        self.limits.as_ref().is_some_and(|limits| limits.is_pending())
    }
}

/// A request that waits for a call.
#[derive(Debug, PartialEq, Eq)]
pub struct PendingRequest {
    pub call: CallId,
    /// An index into the policy's routes.
    route: usize,
    has_body: bool,
    /// The check of the limits so far, and what it has acquired.
    limits: LimitCheck,
    exchange: StreamState,
    /// The choice of the destination, if the limits come after it.
    chosen: Option<(Selection, Option<EffectiveWeight>, Option<CohortAssignment>)>,
}

/// A message's header by its name.
pub type Header<'h> = &'h dyn Fn(&str) -> Option<Vec<u8>>;

impl Filter {
    /// Puts `policy` to work: defines its metrics and agrees with the other workers on a secret.
    pub fn new(policy: Policy, host: &impl Host) -> Filter {
        let meters = Meters::define(&policy, host);
        let trace = policy.trace.as_ref().map(|trace| TracePropagator::new(trace, &Scope::policy(&policy.name, host)));
        let cohort = policy.cohort.as_ref().map(|_| CohortMetrics::define(&Scope::policy(&policy.name, host)));
        let mut targets: Vec<_> =
            policy.targets.iter().map(|target| TargetObserver::new(&policy, target, host)).collect();
        let injector = |route| FaultInjector::new(&policy, route, &mut targets, host);
        let injectors = policy.routes.iter().enumerate().map(injector).collect();
        let breaker = |route: &Route| {
            let scope = Scope::policy(&policy.name, host).within("route").within(&label(&route.name));
            Some(CircuitBreaker::new(route.breaker.as_ref()?, &route.name, &scope, host))
        };
        let worker = WorkerState {
            limits: WorkerLimits::new(&policy.state_prefix, host),
            limiters: rate_limiters(&policy, host),
            breakers: policy.routes.iter().map(breaker).collect(),
            rollouts: rollouts(&policy, host),
            injectors,
            targets,
            pollers: AdminPoller::all(&policy, host),
        };
        let mut filter = Filter { policy, meters, trace, cohort, worker, period: None };
        filter.period = filter.shortest_period();
        filter
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Decides on a request from its serialised headers. `has_body` says whether a body follows, `may_hold` whether
    /// another stream can be delayed.
    pub fn on_request<'p>(
        &'p mut self,
        host: &impl Host,
        headers: &'p [u8],
        has_body: bool,
        may_hold: bool,
    ) -> Decision<'p> {
        self.decide(host, headers, has_body, may_hold, None)
    }

    /// Decides on a request that waited for a call, from the same headers and the outcome of the call.
    pub fn on_resume<'p>(
        &'p mut self,
        host: &impl Host,
        headers: &'p [u8],
        may_hold: bool,
        waiting: Box<PendingRequest>,
        outcome: ServiceOutcome,
    ) -> Decision<'p> {
        self.worker.limits.on_resume();
        self.decide(host, headers, waiting.has_body, may_hold, Some((waiting, outcome)))
    }

    #[inline(never)]
    fn decide<'p>(
        &'p mut self,
        host: &impl Host,
        headers: &'p [u8],
        has_body: bool,
        may_hold: bool,
        waited: Option<(Box<PendingRequest>, ServiceOutcome)>,
    ) -> Decision<'p> {
        let Filter { policy, meters, trace, cohort, worker, .. } = self;
        let (policy, trace): (&'p Policy, Option<&'p TracePropagator>) = (policy, trace.as_ref());
        let mut request = Request::parse(headers, &policy.header_names);
        request.set_has_body(has_body);
        if policy.reads_route_name {
            request.set_route_name(host.property(&["xds", "route_name"]));
        }

        // The trace comes first: whatever happens to the request, it belongs to a trace, and faults are drawn from the
        // trace id.
        let context = trace.and_then(|trace| trace.begin(&request, host));
        let inbound = policy.cohort.as_ref().map_or_else(InboundAssignments::default, |header| {
            let stored = context.as_ref().and_then(|context| trace?.stored_header(context, header.id));
            header.read_inbound(request.joined(header.id).as_deref(), stored, || host.wall_now())
        });
        let arrival = RequestContext { request: &request, inbound: &inbound, may_hold };
        let mut decision = Decision::default();
        decision.reasons.trace = context;
        worker.decide(policy, meters, host, arrival, waited, &mut decision);
        if !matches!(decision.verdict, RequestAction::Continue | RequestAction::Wait(_)) {
            worker.cancel_permit(&mut decision.exchange, host);
        }
        worker.finish_limits(&mut decision, host);
        if let RequestAction::Wait(_) = decision.verdict {
            return decision; // The rest follows when it is resumed.
        }

        // Write the outgoing headers last: only now is it known whether the request reaches an upstream, and what was done
        // to it.
        let Decision { verdict, mutations, exchange, reasons } = &mut decision;
        if let Some(header) = &policy.cohort {
            if verdict.may_go_on() {
                let rollout = reasons.route.and_then(|route| policy.routes.get(route)?.canary());
                let decided = rollout.zip(reasons.decided).map(|(canary, decided)| (&*canary.rollout, decided));
                mutations.extend(header.write(&inbound, decided, || host.wall_now()));
            }
            if let Some(metrics) = cohort {
                metrics.count(&inbound, reasons.share, |rollout| policy.knows(rollout), host);
            }
        }
        let is_forced = trace.is_some_and(|trace| is_forced(trace.policy().force, policy, reasons, host));
        if let (Some(trace), Some(context)) = (trace, &mut reasons.trace) {
            if is_forced {
                context.force_sampling();
            }
            if verdict.may_go_on() {
                trace.inject(context, &request, mutations, host);
            }
            exchange.trace = trace.finish(context, &request, mutations, host);
        }
        if log::log_enabled!(log::Level::Debug) {
            decision.log(policy);
        }
        decision
    }
}

impl WorkerState {
    /// Decides everything between the inbound trace context and the outgoing headers.
    fn decide<'p>(
        &mut self,
        policy: &'p Policy,
        meters: &Meters,
        host: &impl Host,
        RequestContext { request, inbound, may_hold }: RequestContext<'_>,
        waited: Option<(Box<PendingRequest>, ServiceOutcome)>,
        decision: &mut Decision<'p>,
    ) {
        let WorkerState { limits, limiters, breakers, rollouts, injectors, targets, .. } = self;
        decision.exchange.is_grpc = request.is_grpc();

        let Some((index, route)) = policy.route(request) else {
            host.add(meters.unmatched, 1);
            policy.steer(request, None, &mut decision.mutations);
            return;
        };
        decision.reasons.route = Some(index);
        let Some(meters) = meters.routes.get(index) else { return };

        // What was decided about a request before it waited for a service stays decided.
        let mut resumed = waited.map(|(waiting, outcome)| {
            let PendingRequest { limits, exchange, chosen, .. } = *waiting;
            let reasons = &mut decision.reasons;
            decision.exchange = exchange;
            if let Some((choice, share, decided)) = chosen {
                (reasons.choice, reasons.share, reasons.decided) = (Some(choice), share, decided);
            }
            if let Some(sample) = &mut decision.exchange.sample {
                sample.restart(|| host.now());
            }
            (limits, outcome)
        });

        // Limits come before the choice and the fault, so that a refused request costs neither its upstream nor an
        // experiment anything. Limits that count by subset come after the choice.
        let mut context = KeyContext { request, route: &route.name, subset: None, properties: host };
        let limiter = limiters.get(index).and_then(Option::as_ref);
        let reads_subset = route.limits.as_deref().is_some_and(RateLimits::reads_subset);
        if let Some(limiter) = limiter.filter(|_| !reads_subset) {
            let check = limiter.check(limits, &context, resumed.take(), host);
            if !decision.apply(check, index, request.has_body()) {
                return;
            }
        }

        // The circuit breaker runs after the limits, so that a request that a limit refuses does not use up a probe. A
        // request that waited for a limit by subset has its permit already.
        if decision.exchange.permit.is_none()
            && let Some(Some(breaker)) = breakers.get_mut(index)
        {
            match breaker.admit(host) {
                Ok(permit) => decision.exchange.permit = Some((index, permit)),
                Err(wait) => {
                    decision.verdict = RequestAction::Answer(breaker.refusal(wait, decision.exchange.is_grpc));
                    decision.reasons.broken = true;
                    return;
                }
            }
        }

        // The destination is chosen before the fault, because the guard of the fault watches that destination.
        let rollout = rollouts.get_mut(index).and_then(Option::as_mut);
        let destination = route.split.as_ref().and_then(|split| {
            let choice = match (decision.reasons.choice, rollout) {
                (Some(choice), _) => choice,
                (None, Some(rollout)) => {
                    let inherited = inbound.assignment(rollout.name());
                    let RolloutDecision { selection, weight, assignment, sample } =
                        rollout.select(request, inherited, host);
                    (decision.reasons.share, decision.reasons.decided) = (Some(weight), assignment);
                    decision.exchange.sample = sample;
                    selection
                }
                (None, None) => split.choose(Fraction::NONE, None, || host.random()),
            };
            decision.reasons.choice = Some(choice);
            split.destinations.get(choice.destination)
        });
        if let Some(limiter) = limiter.filter(|_| reads_subset) {
            context.subset = destination.map(|(destination, _)| &*destination.subset);
            let check = limiter.check(limits, &context, resumed, host);
            if !decision.apply(check, index, request.has_body()) {
                return;
            }
        }
        let Decision { mutations, exchange, reasons, .. } = &mut *decision;
        policy.steer(request, destination.map(|(destination, _)| destination), mutations);
        let chosen = reasons.choice.map_or(0, |choice| choice.destination);
        if let Some(destination) = meters.destinations.get(chosen) {
            host.add(destination.requests, 1);
        }

        // The fault comes last, because it replaces what would happen otherwise. A probe of the breaker is not faulted: it
        // has to show the state of the target.
        if let Some(injector) = injectors.get_mut(index).and_then(Option::as_deref_mut) {
            let is_probe = exchange.permit.as_ref().is_some_and(|(_, permit)| permit.is_probe());
            let inbound = || trace::extract_traceparent(request).ok().flatten();
            let context = reasons.trace.as_ref().map(|propagated| propagated.context).or_else(inbound);
            let trace_id = context.map(|context| context.trace_id);
            let faulted = FaultRequest { request, destination: chosen, trace_id, may_hold, is_probe };
            let injected = injector.decide(faulted, targets, host);
            exchange.attempt = injector.begin_attempt(!injected.drawn.is_none() && injected.skipped.is_none(), host);
            decision.inject(injected, route.fault.as_ref().is_some_and(|fault| fault.marks));
        }
        let Decision { verdict, exchange, .. } = &mut *decision;

        // Only the response to a request without a fault is evidence. A response that is to be replaced is observed before
        // it is replaced.
        if *verdict == RequestAction::Continue {
            exchange.observed = route.targets.get(chosen).copied();
            let watched = exchange.observed.and_then(|target| policy.watched(target));
            exchange.observed = exchange.observed.filter(|_| watched.is_some());
            if watched.is_some_and(|target| !target.latency_thresholds.is_empty()) {
                exchange.timer = ResponseTimer::Since(host.now());
            }
        } else {
            exchange.sample = None;
        }
    }

    /// Completes what the limits have charged, once everything else is decided. Nothing has been charged for a request
    /// that the limits refused, and a request that waits keeps its charges until it goes on.
    fn finish_limits(&mut self, decision: &mut Decision<'_>, host: &impl Host) {
        let Decision { verdict, exchange, reasons, .. } = decision;
        let Some(acquired) = &exchange.limits else { return };
        let Some(Some(limiter)) = self.limiters.get(acquired.route()) else { return };
        if reasons.broken {
            limiter.refund(&mut self.limits, &mut exchange.limits, host);
        } else {
            limiter.commit(&mut exchange.limits, *verdict.final_action() == RequestAction::Continue, host);
        }
    }

    /// Gives back the permit of a request that its destination does not answer.
    fn cancel_permit(&mut self, exchange: &mut StreamState, host: &impl Host) {
        if let Some((route, permit)) = exchange.permit.take()
            && let Some(Some(breaker)) = self.breakers.get_mut(route)
        {
            breaker.cancel(permit, host);
        }
    }

    /// Counts a response of a target, and checks the guards that watch the target.
    fn observe_target(&mut self, target: TargetId, response: ObservedResponse, host: &impl Host) {
        let WorkerState { injectors, targets, .. } = self;
        let Some(observer) = targets.get_mut(target.0).and_then(Option::as_deref_mut) else { return };
        if !observer.record(response, host) {
            return;
        }
        for (route, destination) in observer.watchers().to_vec() {
            if let Some(injector) = injectors.get_mut(route).and_then(Option::as_deref_mut) {
                injector.on_target_response(destination, targets, host);
            }
        }
    }
}

impl Decision<'_> {
    /// Applies the check of the limits of the route with the index `route`. Whether they admit the request.
    fn apply(&mut self, check: LimitCheck, route: usize, has_body: bool) -> bool {
        let Decision { exchange, reasons, .. } = &mut *self;
        if let LimitDecision::Pending(call) = check.decision {
            let chosen = reasons.choice.map(|choice| (choice, reasons.share, reasons.decided));
            let exchange = std::mem::take(exchange);
            let waiting = PendingRequest { call, route, has_body, limits: check, exchange, chosen };
            self.verdict = RequestAction::Wait(Box::new(waiting));
            return false;
        }
        let LimitCheck { decision, local, global, state } = check;
        (reasons.local_limits, reasons.global_limits, exchange.limits) = (local, global, state);
        if let LimitDecision::Refused(reply) = decision {
            self.refuse(reply);
            return false;
        }
        true
    }

    /// Carries out the faults of a request. `marks` is whether an injected response has the header of a fault.
    fn inject(&mut self, injected: FaultDecision, marks: bool) {
        let FaultDecision { drawn, skipped, experiment, mut permit, replacement } = injected;
        (self.reasons.drawn, self.reasons.withheld) = (drawn, skipped);
        if skipped.is_some() {
            return;
        }
        self.verdict = match drawn.abort {
            Some(Abort::Answer(status)) => RequestAction::Answer(status.reply(self.exchange.is_grpc, marks)),
            Some(Abort::Reset) => RequestAction::Reset,
            Some(Abort::Requested) | None => RequestAction::Continue,
        };
        self.exchange.replacement = replacement;
        if let Some(delay) = drawn.delay {
            let action_after = std::mem::take(&mut self.verdict);
            // The fault ends with the delay, unless the response is still to be replaced.
            let permit = if replacement.is_none() { permit.take() } else { None };
            self.verdict = RequestAction::Delay(Box::new(DelayedRequest {
                delay,
                action_after,
                experiment,
                fault_permit: permit,
            }));
        }
        self.exchange.fault_permit = permit;
    }

    /// Answers in the upstream's place. The response is no evidence then.
    fn refuse(&mut self, reply: LocalReply) {
        self.verdict = RequestAction::Answer(reply);
        self.mutations.clear();
        self.exchange.sample = None;
    }
}

impl Filter {
    /// Observes the head of a response, and changes it. `header` is called only for headers that are needed.
    pub fn on_response(
        &mut self,
        host: &impl Host,
        exchange: &mut StreamState,
        header: Header<'_>,
        change: &mut dyn FnMut(HeaderMutation<'static>),
    ) {
        self.observe_headers(host, exchange, header);
        if exchange.replacement.is_some() || exchange.attempt.is_some() {
            self.on_faulted_response(host, exchange, header, change);
        }
        if let Some(trace) = &self.trace
            && let Some(context) = exchange.trace.take()
            && let Some(mutation) = trace.response_header(&context)
        {
            change(mutation);
        }
        if let Some(limits) = &mut exchange.limits
            && let Some(Some(limiter)) = self.worker.limiters.get(limits.route())
        {
            limiter.write_headers(limits, change);
        }
    }

    /// Completes or gives back what an ended stream has acquired, except for the slot of its fault. Without a response the
    /// request is charged if it reached an upstream.
    pub fn on_end(&mut self, host: &impl Host, exchange: &mut StreamState, reached_upstream: bool) {
        if let Some(mut limits) = exchange.limits.take()
            && let Some(Some(limiter)) = self.worker.limiters.get(limits.route())
        {
            limiter.on_end(&mut limits, reached_upstream, host);
        }
        self.worker.cancel_permit(exchange, host);
    }

    /// Takes the answer to a call for which `waiting` requests wait. Each of them goes on with [`Filter::on_resume`].
    /// Returns `None` if this filter has not sent the call.
    pub fn on_answer(&mut self, host: &impl Host, answer: GrpcAnswer<'_>, waiting: usize) -> Option<CallOutcome> {
        self.worker.limits.on_answer(&self.worker.limiters, answer, waiting, host)
    }

    /// Refunds what was charged for a request whose client left while it waited. `outcome` is the outcome of its call, if
    /// the call is answered.
    pub fn on_cancel(&mut self, host: &impl Host, mut waiting: PendingRequest, outcome: Option<ServiceOutcome>) {
        self.worker.cancel_permit(&mut waiting.exchange, host);
        if let Some(Some(limiter)) = self.worker.limiters.get(waiting.route) {
            limiter.on_cancel(&mut self.worker.limits, waiting.limits, outcome, host);
        }
    }

    /// Replaces a response that is to be faulted, and counts the response of an attempt.
    #[inline(never)]
    fn on_faulted_response(
        &mut self,
        host: &impl Host,
        exchange: &mut StreamState,
        header: Header<'_>,
        change: &mut dyn FnMut(HeaderMutation<'static>),
    ) {
        let (status, grpc_status) = (number(header(":status")).unwrap_or(0), header("grpc-status"));
        let mut replaced = None;
        if let Some(injector) = exchange.replacement.and_then(|replacement| self.injector(replacement.experiment.route))
        {
            let head = (status, exchange.is_grpc, exchange.is_grpc && grpc_status.is_some());
            replaced = injector.replace_response(&mut exchange.replacement, head, change, host);
        }
        if let Some(attempt) = exchange.attempt.take()
            && let Some(injector) = self.injector(attempt.route)
        {
            let failed = match replaced {
                Some(status) => is_failure(status.http(), None),
                None => is_failure(status, number(grpc_status)),
            };
            injector.on_attempt_response(attempt, failed, host);
        }
    }

    fn observe_headers(&mut self, host: &impl Host, exchange: &mut StreamState, header: Header<'_>) {
        if !exchange.is_awaited() {
            return;
        }
        let Some(status) = number(header(":status")) else { return };
        if let Some(sample) = &mut exchange.sample {
            sample.answered(|| host.now());
        }
        if let ResponseTimer::Since(since) = exchange.timer {
            exchange.timer = ResponseTimer::Took(host.now().saturating_since(since));
        }
        let grpc_status = if exchange.is_grpc { number(header("grpc-status")) } else { None };
        if exchange.is_grpc && status == 200 && grpc_status.is_none() {
            return; // The trailers have the status.
        }
        self.observe(host, exchange, header, status, grpc_status);
    }

    /// Observes the trailers of a response, and changes them.
    pub fn on_response_trailers(
        &mut self,
        host: &impl Host,
        exchange: &mut StreamState,
        header: Header<'_>,
        change: &mut dyn FnMut(HeaderMutation<'static>),
    ) {
        if exchange.is_awaited() {
            self.observe(host, exchange, header, 200, number(header("grpc-status")));
        }
        if let Some(replacement) = exchange.replacement.take()
            && let Some(injector) = self.injector(replacement.experiment.route)
        {
            injector.write_status(replacement.status, true, change, host);
        }
    }

    fn observe(
        &mut self,
        host: &impl Host,
        exchange: &mut StreamState,
        header: Header<'_>,
        status: u16,
        grpc_status: Option<u16>,
    ) {
        // A response that another hop injected is neither a success nor a failure of the attempt.
        if exchange.has_pending_charge()
            && let Some(limits) = &mut exchange.limits
            && let Some(Some(limiter)) = self.worker.limiters.get(limits.route())
        {
            let status = grpc_status.map_or(status, |code| http_from_grpc(u8::try_from(code).unwrap_or(u8::MAX)));
            let status = if header(FAULT_HEADER).is_some() { None } else { Some(status) };
            limiter.on_response(limits, status, host);
        }
        let failed = is_failure(status, grpc_status);
        // A fault that another Trimtab injected, such as an upstream filter of this Envoy, is no failure of the target.
        if failed && header(FAULT_HEADER).is_some() {
            (exchange.observed, exchange.sample) = (None, None);
            self.worker.cancel_permit(exchange, host);
            return;
        }
        if let Some(target) = exchange.observed.take() {
            let latency = if let ResponseTimer::Took(took) = exchange.timer { took } else { 0 };
            self.worker.observe_target(target, ObservedResponse { status, grpc_status, latency }, host);
        }
        if let Some((route, permit)) = exchange.permit.take()
            && let Some(Some(breaker)) = self.worker.breakers.get_mut(route)
        {
            breaker.on_response(permit, failed, host);
        }
        // A refusal by a rate limit is no evidence about the version that responded.
        let is_limited = status == 429 || grpc_status == Some(8);
        if let Some(sample) = exchange.sample.take().filter(|_| !is_limited)
            && let Some(Some(rollout)) = self.worker.rollouts.get_mut(sample.route())
        {
            rollout.complete(sample, failed, host);
        }
    }

    /// Merges evidence, moves windows on, judges, polls, and returns unused leases. To be called at least every
    /// [`Filter::tick_period`].
    pub fn on_tick(&mut self, host: &impl Host) {
        // The observers run before the guards, which evaluate what was merged.
        let WorkerState { limits, limiters, breakers, rollouts, injectors, targets, pollers } = &mut self.worker;
        limits.on_tick(limiters, host);
        targets.iter_mut().flatten().for_each(|target| target.on_tick(host));
        injectors.iter_mut().flatten().for_each(|injector| injector.on_tick(targets, host));
        pollers.iter_mut().for_each(|poller| poller.on_tick(host));
        breakers.iter_mut().flatten().for_each(|breaker| breaker.tick(host));
        rollouts.iter_mut().flatten().for_each(|rollout| rollout.tick(host));
    }

    /// Returns what this worker has reserved. To be called when the configuration goes away.
    pub fn on_shutdown(&mut self, host: &impl Host) {
        let WorkerState { limits, limiters, breakers, rollouts, injectors, targets, .. } = &mut self.worker;
        limits.on_shutdown(limiters, host);
        breakers.iter_mut().flatten().for_each(|breaker| breaker.merge(host));
        rollouts.iter_mut().flatten().for_each(|rollout| rollout.on_shutdown(host));
        targets.iter_mut().flatten().for_each(|target| target.on_shutdown(host));
        injectors.iter_mut().flatten().for_each(|injector| injector.on_shutdown(host));
    }

    /// Gives back the place of a fault that is over, or whose stream has ended.
    pub fn release(&self, permit: ActiveFaultPermit, host: &impl Host) {
        if let Some(injector) = self.injector(permit.route() as u32) {
            injector.release(permit, host);
        }
    }

    /// Whether the faults of `experiment` that are in progress have to end, as of the last tick.
    pub(crate) fn must_stop(&self, experiment: ExperimentId) -> bool {
        self.injector(experiment.route).is_none_or(|injector| injector.must_stop(experiment.destination as usize))
    }

    /// Whether the action after a delay of `experiment` may still be injected now.
    pub(crate) fn may_continue(&mut self, host: &impl Host, experiment: ExperimentId) -> bool {
        let WorkerState { injectors, targets, .. } = &mut self.worker;
        let injector = injectors.get_mut(experiment.route as usize).and_then(Option::as_deref_mut);
        injector.is_some_and(|injector| injector.may_continue(experiment.destination as usize, targets, host))
    }

    /// The fault injector of the route with this index.
    fn injector(&self, route: u32) -> Option<&FaultInjector> {
        self.worker.injectors.get(route as usize)?.as_deref()
    }

    /// Counts problems with shared data.
    pub fn count_problem(&self, problem: SharedDataProblem, count: u64, host: &impl Host) {
        self.meters.count_problem(problem, count, host);
    }

    /// Takes the answer to an HTTP call that the filter has sent. `body` is `None` if it was too long to be read.
    pub fn on_call_answered(&mut self, host: &impl Host, call: u32, status: Option<Vec<u8>>, body: Option<&[u8]>) {
        let status = number(status).unwrap_or(0);
        for poller in &mut self.worker.pollers {
            poller.on_answer(call, status, body, host);
        }
    }

    /// How often [`Filter::on_tick`] is to be called, in nanoseconds; `None` where nothing changes with time.
    pub fn tick_period(&self) -> Option<u64> {
        self.period
    }

    /// [`Filter::tick_period`], which depends on the policy alone.
    fn shortest_period(&self) -> Option<u64> {
        let mut least = u64::MAX;
        let mut at_most = |period: u64| least = least.min(period);
        let worker = &self.worker;
        // A guard's window has ten steps and is a second at least, so this is also a tenth of the shortest window.
        if worker.injectors.iter().any(Option::is_some) {
            at_most(MERGE_PERIOD);
        }
        worker.pollers.iter().for_each(|poller| at_most(poller.period()));
        worker.breakers.iter().flatten().for_each(|breaker| at_most(breaker.period()));
        if self.policy.has_leases() {
            at_most(WorkerLimits::TICK);
        }
        if self.policy.routes.iter().filter_map(Route::canary).any(|canary| canary.judge.is_some()) {
            at_most(TICK_PERIOD);
        }
        (least < u64::MAX).then_some(least)
    }
}

/// Whether the trace of the request is sampled in any case, because of what was done to the request.
fn is_forced(force: ForcedSampling, policy: &Policy, reasons: &Explanation, host: &impl Host) -> bool {
    let is_faulted = || !reasons.drawn.is_none() && reasons.withheld.is_none();
    let is_limited = |check: &LocalCheck| {
        let would_refuse = |event: &LimitEvent| matches!(event, LimitEvent::WouldRefuse(_));
        check.refusal.is_some() || check.events.iter().any(would_refuse)
    };
    let is_moved = || {
        let split = policy.routes.get(reasons.route?)?.split.as_ref()?;
        let canary = split.canary.as_ref().filter(|canary| !canary.shadow)?;
        let (SelectionReason::Cohort { bucket_ppm } | SelectionReason::Drawn { bucket_ppm }) = reasons.choice?.reason
        else {
            return None;
        };
        if reasons.share?.source != WeightSource::RolledBack {
            return None;
        }
        let due = canary.scheduled_weight(split.weight(canary.destination), || host.wall_now());
        Some(bucket_ppm < due.weight.ppm())
    };
    (force.fault && is_faulted())
        || (force.rate_limit && reasons.local_limits.as_deref().is_some_and(is_limited))
        || (force.rate_limit && reasons.global_limits.as_deref().is_some_and(GlobalCheck::is_over_limit))
        || (force.rollback && is_moved() == Some(true))
}

/// The value of a header that is a number.
fn number(value: Option<Vec<u8>>) -> Option<u16> {
    std::str::from_utf8(&value?).ok()?.parse().ok()
}

/// The rollout of each route with a canary.
fn rollouts(policy: &Policy, host: &impl Host) -> Vec<Option<Box<Rollout>>> {
    let scope = Scope::policy(&policy.name, host).within("route");
    let rollout = |(index, route): (usize, &Route)| {
        let scope = scope.within(&label(&route.name));
        Rollout::new((index, &route.name), route.split.as_ref(), &policy.state_prefix, &scope, host)
    };
    policy.routes.iter().enumerate().map(rollout).collect()
}

/// For each route with limits, these limits.
fn rate_limiters(policy: &Policy, host: &impl Host) -> Vec<Option<RateLimiter>> {
    let scope = Scope::policy(&policy.name, host);
    let limiter = |(index, route): (usize, &Route)| {
        let limits = route.limits.as_ref()?;
        // The breaker is the only feature that refuses a request after the limits.
        let is_followed = route.breaker.is_some() && !limits.reads_subset();
        let route = scope.within("route").within(&label(&route.name));
        Some(RateLimiter::new(index, limits, is_followed, &route, &scope))
    };
    policy.routes.iter().enumerate().map(limiter).collect()
}
