//! Trace propagation at work in one worker: the compiled `trace` block together with its metrics.
//!
//! A request passes three steps. [`TracePropagator::begin`] extracts the request's context or starts a new trace. While
//! the request is decided on, its context is only read. [`TracePropagator::inject`] writes the context into the headers
//! of a request that reaches an upstream, and stores it for the requests that the application sends.
//! [`TracePropagator::finish`] sets filter state and counts. A request that is answered here skips the second step.

use super::decision::PropagatedContext;
use super::filter_state::restore;
use super::metrics::TraceMetrics;
use super::policy::{EdgeMode, ResponseHeader, TracePolicy, TrafficDirection};
use super::w3c::TraceContext;
use crate::host::{Host, Metrics};
use crate::http::{HeaderId, HeaderMutation, Request};
use crate::telemetry::Scope;
use std::sync::Arc;

/// The compiled `trace` block and its metrics.
#[derive(Debug)]
pub struct TracePropagator {
    policy: Arc<TracePolicy>,
    /// Of requests that leave the application; `None` where the policy has no bridge and they are not counted apart.
    outbound: Option<TraceMetrics>,
    /// Of all other requests.
    metrics: TraceMetrics,
}

impl TracePropagator {
    /// Defines the metrics of `policy` in the scope of the policy document.
    pub(crate) fn new(policy: &Arc<TracePolicy>, scope: &Scope<'_, impl Metrics>) -> TracePropagator {
        let outbound = policy.bridge.as_ref().map(|_| TraceMetrics::define(&scope.within("outbound.trace")));
        TracePropagator { policy: policy.clone(), outbound, metrics: TraceMetrics::define(&scope.within("trace")) }
    }

    pub fn policy(&self) -> &TracePolicy {
        &self.policy
    }

    /// Determines the context that the request goes on with. `None` if the policy leaves the trace headers alone, or if
    /// the context that it has to restore is missing.
    pub fn begin(&self, request: &Request<'_>, host: &impl Host) -> Option<PropagatedContext> {
        let policy = &*self.policy;
        if policy.edge == EdgeMode::Restore {
            return restore(host);
        }
        // The listener is asked for every request: Envoy shares one filter among listeners with equal configurations, so
        // the answer for one request does not hold for the next.
        let ask = || TrafficDirection::from_property(host.property(&["xds", "listener_direction"]).as_deref());
        let direction = policy.fixed_direction().unwrap_or_else(ask);
        policy.propagate(request, direction, &mut || host.random(), &mut |context| {
            policy.bridge.as_ref()?.lookup(request, context, host.now(), host)
        })
    }

    /// The header `id` as the bridge has stored it for this request, if the bridge carries that header.
    pub fn stored_header<'c>(&self, context: &'c PropagatedContext, id: HeaderId) -> Option<&'c [u8]> {
        context.stored_header(&self.policy, id)
    }

    /// Adds the header mutations that propagate `context`. To be called once all other `mutations` are known, and only
    /// for a request that may reach an upstream.
    pub fn inject<'p>(
        &'p self,
        context: &mut PropagatedContext,
        request: &Request<'p>,
        mutations: &mut Vec<HeaderMutation<'p>>,
        host: &impl Host,
    ) {
        context.inject(&self.policy, request, mutations);
        if let (Some(bridge), TrafficDirection::Inbound) = (&self.policy.bridge, context.direction) {
            let events = bridge.store(request, &context.context, mutations, host.now(), host);
            context.events.extend(events);
        }
    }

    /// Sets filter state and counts what was done. Returns the context that [`TracePropagator::response_header`]
    /// announces to the client; `None` if the response has no such header.
    pub fn finish(
        &self,
        context: &PropagatedContext,
        request: &Request<'_>,
        mutations: &[HeaderMutation<'_>],
        host: &impl Host,
    ) -> Option<TraceContext> {
        self.policy.set_filter_state(context, request, mutations, host);
        let outbound = self.outbound.as_ref().filter(|_| context.direction == TrafficDirection::Outbound);
        outbound.unwrap_or(&self.metrics).count(context, host);
        let is_announced =
            self.policy.response != ResponseHeader::None && context.direction != TrafficDirection::Outbound;
        is_announced.then_some(context.context)
    }

    /// The response header that announces `context` to the client.
    pub fn response_header(&self, context: &TraceContext) -> Option<HeaderMutation<'static>> {
        PropagatedContext::response_header(context, self.policy.response)
    }
}
