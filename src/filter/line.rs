//! The log line of one request. It is formatted only at the level `debug`.

use super::{Decision, RequestAction};
use crate::canary::Destination;
use crate::policy::Policy;

impl Decision<'_> {
    #[cold]
    #[inline(never)]
    pub(super) fn log(&self, policy: &Policy) {
        let Decision { verdict, reasons, .. } = self;
        let route = reasons.route.and_then(|route| policy.routes.get(route));
        let trace_id = reasons.trace.as_ref().map(|trace| trace.context.trace_id_hex()).unwrap_or_default();
        let details = if let RequestAction::Answer(reply) = verdict.final_action() { reply.details } else { "" };
        let verdict = match verdict {
            RequestAction::Continue => "continue",
            RequestAction::Delay(_) => "delay",
            RequestAction::Answer(_) => "answer",
            RequestAction::Reset => "reset",
            RequestAction::Wait(_) => "wait",
        };
        log::debug!(
            "request: route={:?} destination={:?} verdict={verdict} details={details:?} trace_id={}",
            route.map_or("", |route| &route.name),
            reasons.destination(policy).map_or("", Destination::label),
            String::from_utf8_lossy(&trace_id),
        );
    }
}
