//! Faults at work in one worker: what is injected of what was drawn, what is held, and whose answer is replaced.

use super::watch::{Experiment, Post, Watch};
use super::{Decision, Exchange, Filter, Header, Verdict, number};
use crate::fault::{Abort, Draw, MARK, MESSAGE, Slot, Status, Withheld};
use crate::host::Host;
use crate::http::{HeaderMutation, Request};
use crate::trace;
use std::borrow::Cow;

/// A delay.
#[derive(Debug, PartialEq, Eq)]
pub struct Hold {
    /// Nanoseconds.
    pub delay: u64,
    /// What follows; never another delay.
    pub then: Verdict,
    /// Who holds it: where that may inject nothing any more, nothing follows and the delay is over at once.
    pub experiment: Experiment,
    /// To be given to [`Filter::free`] when that is done, or the client has gone.
    pub slot: Option<Slot>,
}

/// A response fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replacement {
    pub status: Status,
    /// Whether a header says so.
    pub marks: bool,
    pub experiment: Experiment,
}

impl Post<'_> {
    /// Draws for `request`, and injects what was drawn unless there is a reason not to.
    pub fn inject(
        &self,
        experiment: Experiment,
        mut watch: Option<&mut Watch>,
        request: &Request<'_>,
        may_hold: bool,
        host: &impl Host,
        decision: &mut Decision<'_>,
    ) {
        let Post { fault, meters, .. } = *self;
        let Some(faults) = &meters.faults else { return };
        let Decision { verdict, exchange, reasons, .. } = decision;
        let inbound = || trace::extract_traceparent(request).ok().flatten();
        let context = reasons.trace.as_ref().map(|propagated| propagated.context).or_else(inbound);
        let trace_id = context.map(|context| context.trace_id);
        reasons.drawn = fault.draw(fault.asked(request), trace_id, || host.random());
        let drawn = &reasons.drawn;
        let mut is_unwell = || {
            let probe = || fault.number(Draw::Probe, trace_id).unwrap_or_else(|| host.random());
            watch.as_mut().map_or(Some(Withheld::Suspended), |watch| watch.withholds(self, probe, host))
        };
        reasons.withheld = if drawn.is_none() {
            Some(Withheld::NotDrawn)
        } else if let Some(unwell) = is_unwell() {
            Some(unwell)
        } else if fault.shadow {
            Some(Withheld::Shadow)
        } else if drawn.delay.is_some() && !may_hold {
            Some(Withheld::Overflow)
        } else if fault.slots.as_ref().is_some_and(|slots| !slots.take(host)) {
            Some(Withheld::MaxActive)
        } else if drawn.fails() && watch.is_some_and(|watch| !watch.spend(self, host)) {
            // Last, because it is spent.
            fault.slots.iter().for_each(|slots| slots.give_back(host));
            Some(Withheld::Budget)
        } else {
            None
        };
        faults.count(&reasons.drawn, reasons.withheld, host);
        if reasons.withheld.is_none() {
            *verdict = match reasons.drawn.abort {
                Some(Abort::Answer(status)) => Verdict::Answer(status.reply(exchange.is_grpc, fault.marks)),
                Some(Abort::Reset) => Verdict::Reset,
                Some(Abort::Asked) | None => Verdict::Continue,
            };
            let replacement = |status| Replacement { status, marks: fault.marks, experiment };
            exchange.replacement = reasons.drawn.response.map(replacement);
            exchange.slot = fault.slots.as_ref().map(|_| Slot(experiment.route as usize));
            if let Some(delay) = reasons.drawn.delay {
                let then = std::mem::take(verdict);
                // Nothing more is to come of the fault then, unless an answer is still to be replaced.
                let slot = if exchange.replacement.is_none() { exchange.slot.take() } else { None };
                *verdict = Verdict::Delay(Box::new(Hold { delay, then, experiment, slot }));
            }
        }
    }
}

impl Filter {
    /// Replaces the status of an answer that the upstream gave, of a gRPC call where its status stands. What Envoy
    /// itself says in the upstream's place, and what switches protocols, is left alone. Returns what the answer says
    /// now, where it was replaced.
    pub(super) fn replace(
        &self,
        host: &impl Host,
        exchange: &mut Exchange,
        header: Header<'_>,
        change: &mut dyn FnMut(HeaderMutation<'static>),
    ) -> Option<Status> {
        let Replacement { status, experiment, .. } = exchange.replacement?;
        let found = number(header(":status")).unwrap_or(0);
        let is_of_others = || {
            let details = host.property(&["response", "code_details"]);
            found < 200 || details.is_some_and(|details| details != b"via_upstream")
        };
        if self.ends_faults(experiment) || is_of_others() {
            exchange.replacement = None;
            return None;
        }
        let has_grpc_status = exchange.is_grpc && header("grpc-status").is_some();
        if has_grpc_status || !exchange.is_grpc || found != 200 {
            self.put(host, exchange.replacement.take()?, has_grpc_status, change);
        }
        Some(status)
    }

    /// Puts a fault where the status of an answer stands.
    pub(super) fn put(
        &self,
        host: &impl Host,
        Replacement { status, marks, experiment }: Replacement,
        as_grpc: bool,
        change: &mut dyn FnMut(HeaderMutation<'static>),
    ) {
        if let Some(faults) =
            self.meters.routes.get(experiment.route as usize).and_then(|meters| meters.faults.as_ref())
        {
            faults.count_response(host);
        }
        let (name, code) = if as_grpc { ("grpc-status", status.grpc().into()) } else { (":status", status.http()) };
        change(HeaderMutation::Set(name, Cow::Owned(code.to_string().into_bytes())));
        if as_grpc {
            change(HeaderMutation::Set("grpc-message", Cow::Borrowed(MESSAGE.as_bytes())));
        }
        if marks {
            change(HeaderMutation::Set(MARK, Cow::Borrowed(b"response")));
        }
    }

    /// Gives back the slot of a fault that is over.
    pub fn free(&self, slot: Slot, host: &impl Host) {
        let fault = self.policy.routes.get(slot.0).and_then(|route| route.fault.as_ref());
        if let Some(slots) = fault.and_then(|fault| fault.slots.as_ref()) {
            slots.give_back(host);
        }
    }

    /// Whether `experiment` may inject nothing any more: it was suspended, or is over. So it stood at the last tick.
    pub(crate) fn ends_faults(&self, experiment: Experiment) -> bool {
        let watches = self.worker.watches.get(experiment.route as usize);
        let watch = watches.and_then(|watches| watches.get(experiment.destination as usize));
        watch.is_none_or(Watch::ends_faults)
    }

    /// Whether what follows a delay of `experiment` may still be injected now.
    pub(crate) fn may_fault(&mut self, host: &impl Host, experiment: Experiment) -> bool {
        let Experiment { route, destination } = experiment;
        let (route, destination) = (route as usize, destination as usize);
        let post = Post::new(&self.policy, &self.meters, route, destination);
        let watch = self.worker.watches.get_mut(route).and_then(|watches| watches.get_mut(destination));
        let (Some(post), Some(watch)) = (post, watch) else { return false };
        watch.look(&post, host);
        !watch.ends_faults()
    }
}
