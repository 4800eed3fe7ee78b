//! Fault injection on one route, at work in one worker: the compiled policy, its metrics, the guard of each destination,
//! the error budget and the experiment on hosts.
//!
//! [`FaultInjector::decide`] draws the faults of a request and checks every reason not to inject them. The caller carries
//! the decision out. A response that has to be replaced passes [`FaultInjector::replace_response`].
//!
//! Invariant: an [`ActiveFaultPermit`] of a decision is released by [`FaultInjector::release`] on every path.

use super::active::ActiveFaultPermit;
use super::budget::ErrorBudget;
use super::decision::{DrawPurpose, DrawnFaults, FAULT_HEADER, FAULT_MESSAGE, SkipReason};
use super::experiment_guard::{ExperimentGuard, ExperimentId, GuardKeys};
use super::host_experiment::{Attempt, HostExperiment};
use super::metrics::{FaultMetrics, GuardMetrics};
use super::policy::{FaultPolicy, FaultStatus};
use crate::host::Host;
use crate::http::{HeaderMutation, Request};
use crate::outlier::TargetObserver;
use crate::policy::{Policy, Route, label};
use crate::telemetry::Scope;
use std::borrow::Cow;
use std::sync::Arc;

/// The observers of a policy's targets; `None` if no guard watches the target.
pub(crate) type TargetObservers = [Option<Box<TargetObserver>>];

/// The faults of one route in one worker.
#[derive(Debug)]
pub(crate) struct FaultInjector {
    policy: Arc<FaultPolicy>,
    route: u32,
    metrics: FaultMetrics,
    /// In the order of the route's destinations; one if the route has no destinations.
    guards: Vec<ExperimentGuard>,
    budget: Option<ErrorBudget>,
    hosts: Option<HostExperiment>,
}

/// A request that may be faulted.
#[derive(Clone, Copy)]
pub(crate) struct FaultRequest<'r> {
    pub(crate) request: &'r Request<'r>,
    /// The index of the chosen destination; 0 if the route has no destinations.
    pub(crate) destination: usize,
    /// The trace id to draw from, if the request has one.
    pub(crate) trace_id: Option<[u8; 16]>,
    /// Whether the worker can hold another stream for a delay.
    pub(crate) may_hold: bool,
    /// Whether the request is a probe of the circuit breaker, which has to show the state of the target.
    pub(crate) is_probe: bool,
}

/// The faults of a request, or the reason for not injecting them.
#[derive(Debug)]
pub(crate) struct FaultDecision {
    pub(crate) drawn: DrawnFaults,
    pub(crate) skipped: Option<SkipReason>,
    pub(crate) experiment: ExperimentId,
    /// The place under `maxActive` of an injected fault; `None` if the policy has no cap.
    pub(crate) permit: Option<ActiveFaultPermit>,
    pub(crate) replacement: Option<ResponseReplacement>,
}

/// The replacement of the upstream's response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseReplacement {
    pub status: FaultStatus,
    pub(crate) experiment: ExperimentId,
}

impl FaultInjector {
    /// The injector of the route with the index `index`. `None` if the route injects no faults. Its guards watch their
    /// targets in `targets`.
    pub(crate) fn new(
        policy: &Policy,
        (index, route): (usize, &Route),
        targets: &mut TargetObservers,
        host: &impl Host,
    ) -> Option<Box<FaultInjector>> {
        let fault = route.fault.as_ref()?;
        let scope = Scope::policy(&policy.name, host).within("route").within(&label(&route.name));
        let fault_scope = scope.within("fault");
        let mut guards = Vec::new();
        for (place, target) in route.targets.iter().enumerate() {
            let destination = route.split.as_ref().and_then(|split| split.destinations.get(place));
            let destination = destination.map_or("", |(destination, _)| destination.label());
            let (Some(observer), Some(known)) =
                (targets.get_mut(target.0).and_then(Option::as_deref_mut), policy.targets.get(target.0))
            else {
                continue;
            };
            observer.add_watcher(index, place);
            let metrics = match route.split {
                Some(_) => &scope.within("subset").within(&label(destination)).within("fault"),
                None => &fault_scope,
            };
            let keys = guard_keys(policy, route, destination, &known.name);
            let target = (target.0, observer);
            guards.push(ExperimentGuard::new(&fault.guard, keys, GuardMetrics::define(metrics), target, host));
        }
        let key = [&*policy.shared_key("budget/", &route.name), "/"].concat();
        let budget = |spacing| ErrorBudget::new(host, &key, fault.guard.experiment.as_deref(), spacing);
        let host_experiment = || {
            let key = [&*policy.shared_key("fault/", &route.name), "/experiment"].concat();
            HostExperiment::new(fault, (index as u32, &route.name), key, &fault_scope)
        };
        Some(Box::new(FaultInjector {
            policy: fault.clone(),
            route: index as u32,
            metrics: FaultMetrics::define(&fault_scope),
            guards,
            budget: fault.guard.spacing.map(budget),
            hosts: fault.target.is_upstream().then(host_experiment),
        }))
    }

    /// Decides which faults a request gets. To be called once for each request of the route that reached its destination.
    #[inline(never)]
    pub(crate) fn decide(
        &mut self,
        faulted: FaultRequest<'_>,
        targets: &mut TargetObservers,
        host: &impl Host,
    ) -> FaultDecision {
        let FaultRequest { request, destination, trace_id, .. } = faulted;
        if let Some(budget) = &mut self.budget {
            budget.count_request();
        }
        let experiment = ExperimentId { route: self.route, destination: destination as u32 };
        let mut decision = FaultDecision {
            drawn: DrawnFaults::default(),
            skipped: Some(SkipReason::NotTargeted),
            experiment,
            permit: None,
            replacement: None,
        };
        let policy = &self.policy;
        if !faulted.is_probe && policy.target.includes(request, destination, host) {
            decision.drawn = policy.draw(policy.requested(request), trace_id, || host.random());
            decision.skipped = match self.permit(faulted, &decision.drawn, targets, host) {
                Ok(permit) => {
                    decision.permit = permit;
                    let replacement = |status| ResponseReplacement { status, experiment };
                    decision.replacement = decision.drawn.response.map(replacement);
                    None
                }
                Err(reason) => Some(reason),
            };
            self.metrics.count(&decision.drawn, decision.skipped, host);
        }
        decision
    }

    /// Whether the faults that were drawn may be injected; with the permit that they need, if the policy has a cap.
    fn permit(
        &mut self,
        FaultRequest { destination, trace_id, may_hold, .. }: FaultRequest<'_>,
        drawn: &DrawnFaults,
        targets: &mut TargetObservers,
        host: &impl Host,
    ) -> Result<Option<ActiveFaultPermit>, SkipReason> {
        let FaultInjector { policy, guards, budget, .. } = self;
        if drawn.is_none() {
            return Err(SkipReason::NotDrawn);
        }
        let Some((guard, observer)) = guard_of(guards, targets, destination) else {
            return Err(SkipReason::Suspended);
        };
        let draw = || policy.number(DrawPurpose::Probe, trace_id).unwrap_or_else(|| host.random());
        if let Some(reason) = guard.blocked_by(&policy.guard, observer, draw, host) {
            return Err(reason);
        }
        if policy.shadow {
            return Err(SkipReason::Shadow);
        }
        if drawn.delay.is_some() && !may_hold {
            return Err(SkipReason::Overflow);
        }
        let permit = match &policy.active {
            Some(active) => Some(active.acquire(self.route, host).ok_or(SkipReason::MaxActive)?),
            None => None,
        };
        // The budget comes last: what it spends cannot be given back.
        if drawn.fails()
            && let Some(budget) = budget
            && !budget.spend(host)
        {
            if let Some(permit) = permit {
                self.release(permit, host);
            }
            return Err(SkipReason::Budget);
        }
        Ok(permit)
    }

    /// Gives back the place of a fault that is over.
    pub(crate) fn release(&self, permit: ActiveFaultPermit, host: &impl Host) {
        if let Some(active) = &self.policy.active {
            active.release(permit, host);
        }
    }

    /// Whether faults in progress on `destination` have to end, as of the last tick.
    pub(crate) fn must_stop(&self, destination: usize) -> bool {
        self.guards.get(destination).is_none_or(ExperimentGuard::must_stop)
    }

    /// Whether the action after a delay on `destination` may still be injected now.
    pub(crate) fn may_continue(&mut self, destination: usize, targets: &mut TargetObservers, host: &impl Host) -> bool {
        let Some((guard, observer)) = guard_of(&mut self.guards, targets, destination) else { return false };
        guard.refresh(&self.policy.guard, observer, host);
        !guard.must_stop()
    }

    /// Checks the guard of `destination` after a response that can change what it decides.
    pub(crate) fn on_target_response(&mut self, destination: usize, targets: &mut TargetObservers, host: &impl Host) {
        if let Some((guard, observer)) = guard_of(&mut self.guards, targets, destination) {
            guard.on_response(&self.policy.guard, observer, host);
        }
    }

    /// Counts an attempt of an experiment on hosts or attempts. `None` if the route has no such experiment, or if this
    /// filter is not an upstream filter.
    pub(crate) fn begin_attempt(&mut self, is_faulted: bool, host: &impl Host) -> Option<Attempt> {
        self.hosts.as_mut()?.begin(is_faulted, host)
    }

    /// Counts the response of an attempt.
    pub(crate) fn on_attempt_response(&self, attempt: Attempt, failed: bool, host: &impl Host) {
        if let Some(hosts) = &self.hosts {
            hosts.on_response(attempt, failed, host);
        }
    }

    /// Evaluates the guards and merges the requests of the error budget. To be called after the observers have merged.
    pub(crate) fn on_tick(&mut self, targets: &mut TargetObservers, host: &impl Host) {
        for guard in &mut self.guards {
            if let Some(observer) = targets.get_mut(guard.target).and_then(Option::as_deref_mut) {
                guard.on_tick(&self.policy.guard, observer, host);
            }
        }
        if let Some(budget) = &mut self.budget {
            budget.merge(host);
        }
    }

    /// Merges what this worker has counted. To be called when the configuration goes away.
    pub(crate) fn on_shutdown(&mut self, host: &impl Host) {
        if let Some(budget) = &mut self.budget {
            budget.merge(host);
        }
    }

    /// Replaces the status of the upstream's response. `status` is its HTTP status, and `grpc_status` whether it has a
    /// gRPC status; the status of a gRPC call stands in the trailers otherwise. A response of Envoy itself and a protocol
    /// switch are left alone. `replacement` becomes `None` once the response is replaced, or if it is left alone.
    /// Returns the status that the client gets, if the response is replaced.
    #[inline(never)]
    pub(crate) fn replace_response(
        &self,
        replacement: &mut Option<ResponseReplacement>,
        (status, is_grpc, has_grpc_status): (u16, bool, bool),
        change: &mut dyn FnMut(HeaderMutation<'static>),
        host: &impl Host,
    ) -> Option<FaultStatus> {
        let ResponseReplacement { status: replaced, experiment } = (*replacement)?;
        let is_local = || {
            let details = host.property(&["response", "code_details"]);
            details.is_some_and(|details| details != b"via_upstream")
        };
        if self.must_stop(experiment.destination as usize) || status < 200 || is_local() {
            *replacement = None;
            return None;
        }
        if has_grpc_status || !is_grpc || status != 200 {
            *replacement = None;
            self.write_status(replaced, has_grpc_status, change, host);
        }
        Some(replaced)
    }

    /// Writes an injected status into the headers or trailers of a response, as a gRPC status if `as_grpc` is true.
    pub(crate) fn write_status(
        &self,
        status: FaultStatus,
        as_grpc: bool,
        change: &mut dyn FnMut(HeaderMutation<'static>),
        host: &impl Host,
    ) {
        host.add(self.metrics.responses, 1);
        let (name, code) = if as_grpc { ("grpc-status", status.grpc().into()) } else { (":status", status.http()) };
        change(HeaderMutation::Set(name, Cow::Owned(code.to_string().into_bytes())));
        if as_grpc {
            change(HeaderMutation::Set("grpc-message", Cow::Borrowed(FAULT_MESSAGE.as_bytes())));
        }
        if self.policy.marks {
            change(HeaderMutation::Set(FAULT_HEADER, Cow::Borrowed(b"response")));
        }
    }
}

/// The guard of a destination, and the observer of its target.
fn guard_of<'g>(
    guards: &'g mut [ExperimentGuard],
    targets: &'g mut TargetObservers,
    destination: usize,
) -> Option<(&'g mut ExperimentGuard, &'g mut TargetObserver)> {
    let guard = guards.get_mut(destination)?;
    let observer = targets.get_mut(guard.target)?.as_deref_mut()?;
    Some((guard, observer))
}

/// The keys of the experiment on a destination, whose target is called `target`.
fn guard_keys(policy: &Policy, route: &Route, destination: &str, target: &str) -> GuardKeys {
    let experiment = route.fault.as_ref().and_then(|fault| fault.guard.experiment.as_deref()).unwrap_or_default();
    let (word, target) = (policy.shared_key("guard/", &route.name), label(target));
    let mut name = format!("route={:?} destination={destination:?}", route.name);
    if !route.slo.owner.is_empty() {
        name = format!("{name} owner={:?}", route.slo.owner);
    }
    GuardKeys {
        key: [&*word, "//", &target].concat(),
        first_key: [&*word, "/", experiment, "/", &target].concat(),
        name,
    }
}
