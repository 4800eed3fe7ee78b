//! Limits at work in one worker: the proxy's own, those of a fleet, and the requests that wait for a word from there.

use super::{Decision, Exchange, Filter, Verdict};
use crate::canary::{Choice, Decided, Share};
use crate::host::{CallId, GrpcAnswer, Host};
use crate::key::Scene;
use crate::policy::Route;
use crate::ratelimit::service::{Asker, Calls, Event, Inquiry, Outcome, Rest, Settled, give_back};
use crate::ratelimit::{Admission, Held, Leases, Secret, Told, admit, take_back};
use crate::telemetry::RouteMeters;

/// What a worker keeps for limits.
#[derive(Debug)]
pub(super) struct Limiter {
    pub secret: Secret,
    pub leases: Leases,
    pub calls: Calls,
}

/// What is remembered of a request that waits for a call.
#[derive(Debug, PartialEq, Eq)]
pub struct Waiting {
    pub call: CallId,
    /// An index into the policy's routes.
    pub(super) route: usize,
    pub(super) has_body: bool,
    /// What the proxy's own limits said, and charged.
    pub(super) admission: Option<Box<Admission>>,
    pub(super) inquiry: Box<Inquiry>,
    pub(super) exchange: Exchange,
    /// Where the limits come after the choice.
    pub(super) chosen: Option<(Choice, Option<Share>, Option<Decided>)>,
}

/// What is remembered of a route's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limited {
    /// An index into the policy's routes.
    pub(super) route: usize,
    /// The limit that the client is told of; `None` where it is told nothing.
    pub(super) told: Option<Told>,
    /// What is held until the answer tells whether the request counts.
    pub(super) held: Vec<Held>,
}

impl Limiter {
    /// Whether the limits of a route admit a request; where they do not, the decision is to tell it so, or to wait.
    /// `heard`: what was found of a request that waited.
    pub fn admits(
        &mut self,
        (index, route): (usize, &Route),
        meters: &RouteMeters,
        scene: &Scene<'_, '_>,
        heard: Option<(Box<Inquiry>, Outcome)>,
        host: &impl Host,
        decision: &mut Decision<'_>,
    ) -> bool {
        let has_services = !route.global_limits.is_empty();
        if heard.is_none() && !route.limits.is_empty() {
            let (secret, leases) = (&self.secret, &mut self.leases);
            let mut admission = admit(&route.limits, !has_services, secret, leases, scene, host.now(), host);
            meters.count_admission(&admission, host);
            let Decision { exchange, reasons, .. } = &mut *decision;
            if admission.told.is_some() || !admission.held.is_empty() {
                let held = std::mem::take(&mut admission.held);
                exchange.limited = Some(Box::new(Limited { route: index, told: admission.told, held }));
            }
            let refusal = admission.refused;
            if refusal.is_some() || !admission.remarks.is_empty() || has_services {
                reasons.admission = Some(Box::new(admission));
            }
            if let Some(refusal) = refusal {
                if let Some(limit) = route.limits.get(refusal.told.limit) {
                    decision.refuse(limit.refusal(&refusal, decision.exchange.is_grpc));
                }
                return false;
            }
        }
        // Those of a fleet after the proxy's own, which cost nothing to ask and can be given back.
        !has_services || self.ask_services((index, route), meters, scene, heard, host, decision)
    }

    /// Asks the global limits of a route about a request that its own limits have admitted. Where one refuses, what was
    /// charged is given back.
    #[inline(never)]
    fn ask_services(
        &mut self,
        (index, route): (usize, &Route),
        meters: &RouteMeters,
        scene: &Scene<'_, '_>,
        heard: Option<(Box<Inquiry>, Outcome)>,
        host: &impl Host,
        decision: &mut Decision<'_>,
    ) -> bool {
        let now = host.now();
        let mut asker = Asker {
            limits: &route.global_limits,
            route: index,
            secret: &self.secret,
            calls: &mut self.calls,
            leases: &mut self.leases,
            count: &|limit, event| meters.count_event(limit, event, host),
        };
        let mut inquiry = Box::<Inquiry>::default();
        if let Some((found, outcome)) = heard {
            inquiry = found;
            asker.hear(&mut inquiry, outcome, scene, now, host);
        }
        let Decision { verdict, exchange, reasons, .. } = &mut *decision;
        if let Some(call) = asker.ask(&mut inquiry, scene, now, host) {
            *verdict = Verdict::Wait(Box::new(Waiting {
                call,
                route: index,
                has_body: scene.request.has_body(),
                admission: reasons.admission.take(),
                inquiry,
                exchange: std::mem::take(exchange),
                chosen: reasons.choice.map(|choice| (choice, reasons.share, reasons.decided)),
            }));
            return false;
        }
        meters.count_inquiry(&inquiry, host);
        let refused = inquiry.refused;
        if let Some(refusal) = refused {
            give_back(&mut inquiry, &route.global_limits, now, host);
            if let Some(admission) = &mut reasons.admission {
                take_back(admission, &route.limits, &mut self.leases, now, host);
            }
            // What was held was charged, and is given back with it.
            exchange.limited = None;
            if let Some(limit) = route.global_limits.get(refusal.limit) {
                decision.refuse(limit.refusal(refusal.wait, decision.exchange.is_grpc));
            }
        }
        decision.reasons.inquiry = Some(inquiry);
        refused.is_none()
    }
}

impl Filter {
    /// Takes the answer to a call for which `waiting` requests wait. What is found is for these, each of which goes on
    /// with [`Filter::on_settled`]. `None` where this filter sent no such call.
    pub fn on_answer(&mut self, host: &impl Host, answer: GrpcAnswer<'_>, waiting: usize) -> Option<Settled> {
        let Filter { policy, meters, worker, .. } = self;
        let limit = |place| policy.global_limit(place);
        let settled = worker.limiter.calls.settle(answer, waiting, limit, host.now(), host)?;
        if let Some(meters) = meters.routes.get(settled.place.route) {
            if let Some(failure) = settled.failure {
                meters.count_event(settled.place.limit, Event::Failed(failure), host);
            }
            if let Rest::Waits(_) = settled.rest {
                meters.count_event(settled.place.limit, Event::Sent, host);
            }
        }
        Some(settled)
    }

    /// Gives back what was charged, or is held, for a request whose client has gone while it waited.
    pub fn on_gone(&mut self, host: &impl Host, mut waiting: Waiting) {
        let Filter { policy, meters, worker, .. } = self;
        worker.limiter.calls.leave();
        let Some(route) = policy.routes.get(waiting.route) else { return };
        let now = host.now();
        give_back(&mut waiting.inquiry, &route.global_limits, now, host);
        if let Some(admission) = &mut waiting.admission {
            take_back(admission, &route.limits, &mut worker.limiter.leases, now, host);
        }
        if let Some(meters) = meters.routes.get(waiting.route) {
            meters.count_event(waiting.inquiry.next(), Event::Gone, host);
        }
    }
}
