//! `trimtab explain`: what the filter does to one request, and why.
//!
//! The filter runs as it does in the proxy, on a simulated host; what it decided comes with its reasons, and the rest is
//! looked up in the policy with the functions that the filter itself has used. Nothing is decided here.

use crate::check::read_one;
use crate::request::{RequestArgs, RequestLine};
use crate::setting::{draw_seed, instant, now};
use crate::table::Table;
use crate::{Format, Outcome};
use clap::Args;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use trimtab::breaker::BreakerPolicy;
use trimtab::canary::{Destination, Selection, SelectionReason, Split, WeightSource};
use trimtab::decimal::Decimal;
use trimtab::document::quoted;
use trimtab::fault::{Abort, Delay, DrawPurpose, DrawnFrom, FaultPolicy, FaultStatus, GuardPolicy, SkipReason};
use trimtab::filter::{Decision, Explanation, Filter, RequestAction};
use trimtab::host::Properties;
use trimtab::host::sim::Sim;
use trimtab::http::{HeaderMutation, LocalReply, Request};
use trimtab::key::{KeyContext, KeySource};
use trimtab::matcher::Condition;
use trimtab::policy::{Policy, Route};
use trimtab::ratelimit::service::ServiceOutcome::Admitted;
use trimtab::ratelimit::{Limit, LimitEvent, LocalCheck, OnMissing, RateLimits, RefusalReason};
use trimtab::trace::w3c::{InvalidContext, TraceFlags, format_traceparent};
use trimtab::trace::{self, EdgeMode, Extraction, PropagatedContext};
use trimtab::units::{Fraction, UnixNanos, point};

#[derive(Args)]
pub(crate) struct Explain {
    /// A file, or a folder, with one policy, as `check` reads it; - is the standard input
    file: PathBuf,

    #[command(flatten)]
    request: RequestArgs,

    /// When the request comes, such as 2026-11-21T09:00:00Z; now where this is not written
    #[arg(long, value_name = "INSTANT", value_parser = instant)]
    at: Option<UnixNanos>,

    /// Draws what is random; the same seed draws the same
    #[arg(long)]
    seed: Option<u64>,

    /// `json`: one object
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Explain {
    pub(crate) fn run(&self) -> Outcome {
        read_one(&self.file, |policy| Ok(self.explain(policy)))
    }

    fn explain(&self, mut policy: Policy) -> String {
        // Envoy is not here to be asked about its hosts; they are taken for well, as the target is.
        for fault in policy.routes.iter_mut().filter_map(|route| Arc::get_mut(route.fault.as_mut()?)) {
            fault.guard.continues_unknown = true;
        }
        let seed = self.seed.unwrap_or_else(draw_seed);
        let host = Sim::new(seed);
        host.set_wall(self.at.unwrap_or_else(now));
        self.request.show_properties(&host);
        let block = self.request.block(Cow::Borrowed);
        for service in policy.routes.iter().filter_map(|route| route.limits.as_ref()).flat_map(|limits| &limits.global)
        {
            host.add_cluster(&service.service.cluster);
        }
        let mut filter = Filter::new(policy, &host);
        let owned = |Decision { verdict, mutations, reasons, .. }: Decision<'_>| {
            (verdict, mutations.iter().map(Change::from).collect(), reasons)
        };
        let (mut verdict, mut changes, mut reasons) = owned(filter.on_request(&host, &block, false, true));
        // No service is asked here: each is taken to admit the request.
        while let RequestAction::Wait(waiting) = verdict {
            let decision = filter.on_resume(&host, &block, true, waiting, Admitted(None));
            (verdict, changes, reasons) = owned(decision);
        }
        let policy = filter.policy();
        let mut request = Request::parse(&block, &policy.header_names);
        if policy.reads_route_name {
            request.set_route_name(host.property(&["xds", "route_name"]));
        }
        let story = Story { asked: self, seed, policy, host: &host, request, verdict, changes, reasons };
        match self.format {
            Format::Text => story.text(),
            Format::Json => format!("{:#}\n", story.json()),
        }
    }
}

/// What a destination is called where the route names none.
pub(crate) const OWN_ROUTE: &str = "the proxy's own route";

/// A header that is set, or removed where there is no value.
struct Change {
    name: String,
    value: Option<String>,
}

impl From<&HeaderMutation<'_>> for Change {
    fn from(mutation: &HeaderMutation<'_>) -> Change {
        match mutation {
            HeaderMutation::Set(name, value) | HeaderMutation::Add(name, value) => {
                Change { name: (*name).to_owned(), value: Some(String::from_utf8_lossy(value).into_owned()) }
            }
            HeaderMutation::Remove(name) => Change { name: (*name).to_owned(), value: None },
        }
    }
}

/// Everything that is known of one request.
struct Story<'s> {
    asked: &'s Explain,
    seed: u64,
    policy: &'s Policy,
    host: &'s Sim,
    request: Request<'s>,
    verdict: RequestAction,
    changes: Vec<Change>,
    reasons: Explanation,
}

/// One kind of fault of a route, and what was drawn.
struct Dice {
    fault: String,
    /// Whether the request asks for it, where it has to.
    is_asked: bool,
    share: Fraction,
    drawn: bool,
    /// Where the trace id stands, if it decides.
    place: Option<Fraction>,
}

impl Story<'_> {
    fn route(&self) -> Option<&Route> {
        self.policy.routes.get(self.reasons.route?)
    }

    /// The routes that were tried: those before the one that matched, and that one.
    fn tried(&self) -> &[Route] {
        let last = self.reasons.route.map_or(self.policy.routes.len(), |index| index + 1);
        self.policy.routes.get(..last).unwrap_or_default()
    }

    fn condition(&self, condition: &Condition) -> String {
        condition.describe(&self.policy.header_names)
    }

    /// Why a route matched: the conditions of the first entry that holds.
    fn why_matched(&self, route: &Route) -> String {
        let entry = route.matches.iter().find(|entry| entry.first_mismatch(&self.request).is_none());
        let conditions: Vec<String> =
            entry.map_or(&[][..], |entry| entry.conditions()).iter().map(|one| self.condition(one)).collect();
        if conditions.is_empty() { "every request".into() } else { conditions.join(" and ") }
    }

    fn found(&self, condition: &Condition) -> Option<String> {
        condition.value(&self.request).map(|value| String::from_utf8_lossy(&value).into_owned())
    }

    /// What the keys are taken from.
    fn key_context(&self) -> KeyContext<'_, '_> {
        let destination = self.reasons.destination(self.policy);
        KeyContext {
            request: &self.request,
            route: self.route().map_or("", |route| &route.name),
            subset: destination.map(|destination| &*destination.subset).filter(|subset| !subset.is_empty()),
            properties: self.host,
        }
    }

    /// A key's source in words, and its value.
    fn key_part(&self, source: &KeySource) -> (String, Option<String>) {
        let value = source.extract(&self.key_context());
        (source.describe(&self.policy.header_names), value.map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    /// What the request's cohort was taken from.
    fn cohort_key(&self, split: &Split) -> Option<(String, String)> {
        split.canary.as_ref()?.key.iter().find_map(|source| {
            let (source, value) = self.key_part(source);
            Some((source, value?))
        })
    }

    fn dice(&self, fault: &FaultPolicy) -> Vec<Dice> {
        let context = self.reasons.trace.as_ref().map(|propagated| propagated.context);
        let context = context.or_else(|| trace::extract_traceparent(&self.request).ok().flatten());
        let trace_id = context.map(|context| context.trace_id).filter(|_| fault.drawn_from == DrawnFrom::TraceId);
        let place = |what| fault.number(what, trace_id).map(|draw| Fraction::from_ppm(point(draw)));
        let asked = fault.requested(&self.request);
        let most = |asked: Option<Fraction>| asked.unwrap_or(Fraction::WHOLE);
        let delay = fault.delay.as_ref().map(|(share, delay)| Dice {
            fault: match (delay, self.reasons.drawn.delay) {
                (_, Some(drawn)) => format!("delay {}", duration(drawn)),
                (Delay::Fixed(time), None) => format!("delay {}", duration(*time)),
                (Delay::Distribution(_), None) => format!("delay up to {}", duration(delay.longest())),
            },
            share: most(asked.map(|asked| asked.delay_share)).min(*share),
            is_asked: asked.is_none_or(|asked| asked.delay.is_some()),
            drawn: self.reasons.drawn.delay.is_some(),
            place: place(DrawPurpose::Delay),
        });
        let abort = fault.abort.map(|(share, abort)| Dice {
            fault: match self.reasons.drawn.abort.unwrap_or(abort) {
                Abort::Answer(status) => format!("abort {}", status_in_words(status)),
                Abort::Reset => "abort by reset".to_owned(),
                Abort::Requested => "abort".to_owned(),
            },
            share: most(asked.map(|asked| asked.abort_share)).min(share),
            is_asked: asked.is_none_or(|asked| asked.abort.is_some()),
            drawn: self.reasons.drawn.abort.is_some(),
            place: place(DrawPurpose::Abort),
        });
        // Who is aborted has no answer to replace.
        let response = fault.response.filter(|_| self.reasons.drawn.abort.is_none()).map(|(share, status)| Dice {
            fault: format!("response {}", status_in_words(status)),
            share,
            is_asked: true,
            drawn: self.reasons.drawn.response.is_some(),
            place: place(DrawPurpose::Response),
        });
        delay.into_iter().chain(abort).chain(response).collect()
    }

    /// Whether another seed could tell another story.
    fn is_random(&self) -> bool {
        let by_trace_id = |fault: &FaultPolicy| self.dice(fault).iter().all(|dice| dice.place.is_some());
        let is_drawn = self.reasons.withheld != Some(SkipReason::NotTargeted);
        self.reasons.trace.is_some()
            || matches!(self.reasons.choice, Some(Selection { reason: SelectionReason::Drawn { .. }, .. }))
            || self.route().and_then(|route| route.fault.as_ref()).is_some_and(|fault| is_drawn && !by_trace_id(fault))
    }

    /// The destination, as people call it; the route's own where it names none.
    fn destination(&self) -> String {
        self.reasons.destination(self.policy).map_or(OWN_ROUTE, Destination::label).to_owned()
    }

    /// The answer that is given in the upstream's place.
    fn reply(&self) -> Option<&LocalReply> {
        match self.verdict.final_action() {
            RequestAction::Answer(reply) => Some(reply),
            _ => None,
        }
    }
}

/// The story as a table.
impl Story<'_> {
    fn text(&self) -> String {
        let mut table = Table::default();
        self.tell_request(&mut table);
        self.tell_trace(&mut table);
        self.tell_routes(&mut table);
        self.tell_limits(&mut table);
        self.tell_breaker(&mut table);
        self.tell_destination(&mut table);
        self.tell_fault(&mut table);
        self.tell_headers(&mut table);
        self.tell_verdict(&mut table);
        if self.is_random() {
            table.section("drawn");
            table.row(format!("--seed {}", self.seed), "draws the same again");
        }
        table.text()
    }

    fn tell_request(&self, table: &mut Table) {
        table.section("request");
        let RequestLine { method, target } = &self.asked.request.line;
        table.row(format!("{method} {target}"), "");
    }

    fn tell_trace(&self, table: &mut Table) {
        table.section("trace");
        let Some(propagated @ PropagatedContext { extraction, format, is_root, is_sampled_here, context, .. }) =
            &self.reasons.trace
        else {
            let why = match self.policy.trace.as_ref().map(|trace| trace.edge) {
                None => "the policy has no trace block",
                Some(EdgeMode::Restore) => "edge: restore, and no earlier filter has left a context",
                Some(_) => "edge: ignore",
            };
            table.row("left alone", why);
            return;
        };
        let arrival = match extraction {
            Extraction::Valid => format!("a valid {} arrived", format.map_or("context", |format| format.describe())),
            Extraction::Missing => "no traceparent arrived".to_owned(),
            Extraction::Restored => "an earlier filter has decided".to_owned(),
            Extraction::Invalid(invalid) => format!("the traceparent is invalid: {}", describe_invalid(*invalid)),
        };
        let sampled = if context.flags.contains(TraceFlags::SAMPLED) { "sampled" } else { "not sampled" };
        let decided = |by: String| match propagated.is_forced() {
            true => "sampled, for what was done to the request (force)".to_owned(),
            false => format!("{sampled}{by}"),
        };
        let share = self.policy.trace.as_ref().map_or(Fraction::NONE, |trace| trace.sampling);
        if *extraction == Extraction::Restored {
            table.row("goes on", format!("{arrival}; {sampled}"));
        } else if *is_root {
            let restarted = if *extraction == Extraction::Valid { ", but edge is restart" } else { "" };
            let decided = decided(format!(" ({share} are)"));
            table.row("begins here", format!("{arrival}{restarted}; its id is drawn; {decided}"));
        } else if *is_sampled_here {
            let decided = decided(format!(" ({share} are): the caller left the decision open"));
            table.row("goes on", format!("{arrival}; its new parent id is drawn; {decided}"));
        } else {
            let decided = decided(", as the caller decided".to_owned());
            table.row("goes on", format!("{arrival}; its new parent id is drawn; {decided}"));
        }
        let left = self.policy.trace.as_ref().map(|trace| trace.filter_state).unwrap_or_default();
        for (is_left, what) in [(left.trace_id, "wasm.trimtab.trace_id"), (left.context, "wasm.trimtab.context")] {
            if is_left {
                table.row("is left", format!("in filter state, as {what}"));
            }
        }
    }

    fn tell_routes(&self, table: &mut Table) {
        table.section("route");
        for (index, route) in self.tried().iter().enumerate() {
            if self.reasons.route == Some(index) {
                table.row(&*route.name, format!("yes: {}", self.why_matched(route)));
                continue;
            }
            for (entry, condition) in route.mismatches(&self.request).into_iter().enumerate() {
                let found =
                    self.found(condition).map_or("absent".to_owned(), |found| format!("found {}", quoted(&found)));
                let name = if entry == 0 { &*route.name } else { "" };
                table.row(name, format!("no: {}; {found}", self.condition(condition)));
            }
        }
        if self.reasons.route.is_none() {
            table.row("none", "the request is left to the proxy's own routes");
        }
    }

    fn tell_limits(&self, table: &mut Table) {
        let Some(limits) = self.limits() else { return };
        let admission = self.admission();
        table.section("limit");
        for (index, limit) in limits.local.iter().enumerate() {
            let refusal = admission.refusal.filter(|refusal| refusal.quota.limit == index);
            let verdict = match (refusal.map(|refusal| refusal.reason), admission.refusal) {
                (Some(RefusalReason::RateExceeded(wait)), _) => format!("refused, for {}", duration(wait)),
                (Some(RefusalReason::CostExceedsBurst), _) => "refused, as it costs more than the burst".to_owned(),
                (Some(RefusalReason::IncompleteKey), _) => "refused, as a part of the key is absent".to_owned(),
                (None, Some(refusal)) if refusal.quota.limit < index => "not asked".to_owned(),
                _ if admission.events.contains(&LimitEvent::WouldRefuse(index)) => {
                    "would be refused, but mode is shadow".to_owned()
                }
                _ if admission.events.contains(&LimitEvent::IncompleteKey(index))
                    && limit.on_missing == OnMissing::Skip =>
                {
                    "skipped, as a part of the key is absent".to_owned()
                }
                _ if limit.counted.is_some() => "admitted, and counted if the answer is".to_owned(),
                _ => "admitted".to_owned(),
            };
            let promise = &limit.rate_of(self.exception(limit)).promise;
            let cost = match limit.cost.of(&self.request) {
                1 => String::new(),
                cost => format!(", of which this one costs {cost}"),
            };
            table.row(&*limit.name, format!("{verdict}: {promise}{cost}; {}", self.keyed_by(limit)));
            let is_skipped =
                admission.events.contains(&LimitEvent::IncompleteKey(index)) && limit.on_missing != OnMissing::Share;
            let is_asked = !is_skipped && admission.refusal.is_none_or(|refusal| refusal.quota.limit >= index);
            let is_tried = is_asked && self.exception(limit).is_none();
            for (number, candidate) in limit.candidates.iter().enumerate().filter(|_| is_tried) {
                let is_refused = admission.events.contains(&LimitEvent::CandidateWouldRefuse(index, number));
                let verdict = if is_refused { "would be refused" } else { "would be admitted" };
                table.row(format!("  {}", candidate.name), format!("{verdict}: {}", candidate.rate.promise));
            }
        }
        for global in &limits.global {
            let service = &global.service;
            let verdict = if admission.refusal.is_some() { "not asked" } else { "asked, and taken to admit it" };
            let entries = global.descriptor(&self.key_context());
            let entries: Vec<String> = entries.iter().map(|(key, value)| format!("{key}={}", quoted(value))).collect();
            table.row(
                &*global.limit.name,
                format!("{} is {verdict}: domain {}; {}", service.cluster, service.domain, entries.join(", ")),
            );
        }
    }

    /// Whose allowance it is.
    fn keyed_by(&self, limit: &Limit) -> String {
        let part = |source| match self.key_part(source) {
            (source, Some(value)) => format!("{source} {}", quoted(&value)),
            (source, None) => format!("{source} absent"),
        };
        let parts: Vec<String> = limit.key.iter().map(part).collect();
        if parts.is_empty() { "one allowance for all".to_owned() } else { parts.join(", ") }
    }

    /// The limits of the request's route.
    fn limits(&self) -> Option<&RateLimits> {
        self.route()?.limits.as_deref()
    }

    fn admission(&self) -> LocalCheck {
        self.reasons.local_limits.as_deref().cloned().unwrap_or_default()
    }

    /// Which override of `limit` is for the request.
    fn exception(&self, limit: &Limit) -> Option<usize> {
        let key: Vec<Option<String>> = limit.key.iter().map(|source| self.key_part(source).1).collect();
        limit.overrides.iter().position(|exception| {
            exception
                .parts
                .iter()
                .zip(&key)
                .all(|(wanted, part)| wanted.is_none() || wanted.as_deref() == part.as_deref())
        })
    }

    fn tell_destination(&self, table: &mut Table) {
        let Some(split) = self.route().and_then(|route| route.split.as_ref()) else { return };
        let Some(choice) = self.reasons.choice else { return };
        table.section("destination");
        let trial = split.canary.as_ref().zip(self.reasons.share).and_then(|(canary, share)| {
            let (destination, _) = split.destinations.get(canary.destination)?;
            let weight = if canary.shadow { split.weight(canary.destination) } else { share.weight };
            let when = match share.source {
                WeightSource::NotStarted => " until its start time",
                WeightSource::Stage(_) => " in this stage",
                WeightSource::Inherited => " there",
                WeightSource::Route | WeightSource::CapReached | WeightSource::Held | WeightSource::RolledBack => "",
            };
            Some(format!("{} has those below {weight}{when}", destination.label()))
        });
        let shares = || {
            let share = |(destination, weight): &(trimtab::canary::Destination, Fraction)| {
                format!("{} {weight}", destination.label())
            };
            split.destinations.iter().map(share).collect::<Vec<_>>().join(", ")
        };
        let why = match choice.reason {
            SelectionReason::OnlyDestination => "the only one".to_owned(),
            SelectionReason::Cohort { bucket_ppm: place } => {
                let (source, value) = self.cohort_key(split).unwrap_or_default();
                let rollout = split.canary.as_ref().map_or("", |canary| &canary.rollout);
                let place = Fraction::from_ppm(place);
                format!("{source} {} stands at {place} of {rollout}; {}", quoted(&value), trial.unwrap_or_default())
            }
            SelectionReason::Drawn { bucket_ppm: place } => {
                let absent = if split.canary.is_some() { "no key, so it was " } else { "" };
                let place = Fraction::from_ppm(place);
                format!("{absent}drawn at {place}; {}", trial.unwrap_or_else(shares))
            }
            SelectionReason::Inherited { bucket_ppm: place } => {
                let rollout = split.canary.as_ref().map_or("", |canary| &canary.rollout);
                let place = Fraction::from_ppm(place);
                format!("an earlier hop found it at {place} of {rollout}; {}", trial.unwrap_or_default())
            }
        };
        table.row(self.destination(), why);
    }

    fn tell_breaker(&self, table: &mut Table) {
        let Some(breaker) = self.route().and_then(|route| route.breaker.as_ref()) else { return };
        table.section("breaker");
        if self.reasons.local_limits.as_ref().is_some_and(|admission| admission.refusal.is_some()) {
            table.row("none", "a limit refused the request before");
            return;
        }
        let state = if self.reasons.broken { "open" } else { "closed" };
        let BreakerPolicy { threshold, volume, window, reset, probes, .. } = &**breaker;
        let (window, reset) = (duration(*window), duration(*reset));
        table.row(
            state,
            format!(
                "opens at {threshold}% failures among {volume} or more in {window}, for {reset}; then probes {probes}"
            ),
        );
    }

    fn tell_fault(&self, table: &mut Table) {
        let Some(fault) = self.route().and_then(|route| route.fault.as_ref()) else { return };
        table.section("fault");
        if self.reasons.local_limits.as_ref().is_some_and(|admission| admission.refusal.is_some()) {
            table.row("none", "a limit refused the request before");
            return;
        }
        if self.reasons.broken {
            table.row("none", "the circuit breaker refused the request before");
            return;
        }
        if self.reasons.withheld == Some(SkipReason::NotTargeted) {
            table.row("none", "it is aimed at other sources, destinations, hosts or attempts");
            return;
        }
        for Dice { fault, is_asked, share, drawn, place } in self.dice(fault) {
            let outcome = match (drawn, self.reasons.withheld) {
                (false, _) | (true, Some(SkipReason::NotTargeted | SkipReason::NotDrawn)) => "no",
                (true, None) => "yes",
                (true, Some(SkipReason::Shadow)) => "only counted, mode is shadow",
                (true, Some(SkipReason::Suspended)) => "withheld, the guard has suspended it",
                (true, Some(SkipReason::Unknown)) => "withheld, Envoy has not told yet which hosts are ejected",
                (true, Some(SkipReason::Probing)) => "withheld, only a tenth is injected while probing",
                (true, Some(SkipReason::Expired)) => "withheld, the experiment is over or its lease not renewed",
                (true, Some(SkipReason::Budget)) => "withheld until the error budget has earned a failure",
                (true, Some(SkipReason::Overflow)) => "withheld, too many requests are held",
                (true, Some(SkipReason::MaxActive)) => "withheld, maxActive requests are faulted already",
            };
            let why = match place {
                _ if !is_asked => "the request does not ask for it".to_owned(),
                Some(place) => format!("the trace id stands at {place}; below {share} it happens"),
                None => format!("drawn at random, {share} of requests"),
            };
            table.row(fault, format!("{outcome}: {why}"));
        }
        table.row("guard", self.guard(&fault.guard));
    }

    /// What the guard does, and what else ends or limits the experiment.
    fn guard(&self, guard: &GuardPolicy) -> String {
        let window = duration(guard.window);
        let mut told =
            format!("armed: trips at {} failures among {} or more in {window}", guard.error_rate, guard.min_requests);
        if let Some(limit) = guard.latency_p95 {
            told.push_str(&format!(", or a 95th percentile over {}", duration(limit)));
        }
        if let Some(admin) = &guard.admin {
            told.push_str(&format!("; asks {} which hosts are ejected", admin.cluster));
        }
        if let Some(spacing) = guard.spacing {
            told.push_str(&format!("; aborts at most one in {spacing} requests"));
        }
        if let Some(experiment) = &guard.experiment {
            told.push_str(&format!("; its state is kept as {experiment}"));
        }
        told
    }

    fn tell_headers(&self, table: &mut Table) {
        table.section("headers");
        if self.reply().is_some() {
            table.row("none", "the request is answered here");
            return;
        }
        for Change { name, value } in &self.changes {
            match value {
                Some(value) => table.row(name.as_str(), format!("set to {value}")),
                None => table.row(name.as_str(), "removed"),
            }
        }
        if self.changes.is_empty() {
            table.row("none", "nothing is changed");
        }
    }

    fn tell_verdict(&self, table: &mut Table) {
        table.section("verdict");
        let answered = |reply: &LocalReply| {
            let grpc = reply.grpc_status.map(|code| format!(", grpc-status {code}")).unwrap_or_default();
            format!("{}{grpc} ({})", reply.status, reply.details)
        };
        let later = match &self.verdict {
            RequestAction::Delay(hold) => format!(", {} later", duration(hold.delay)),
            _ => String::new(),
        };
        match self.verdict.final_action() {
            RequestAction::Answer(reply) => table.row("answered", format!("{}{later}", answered(reply))),
            RequestAction::Reset => table.row("reset", format!("without an answer{later}")),
            // The explanation is made when no request waits any more.
            RequestAction::Continue | RequestAction::Delay(_) | RequestAction::Wait(_) => {
                table.row("continues", format!("to {}{later}", self.destination()));
            }
        }
    }
}

/// The story as JSON.
impl Story<'_> {
    fn json(&self) -> Value {
        let routes: Vec<Value> = self
            .tried()
            .iter()
            .enumerate()
            .map(|(index, route)| {
                let mismatch = |condition: &Condition| {
                    json!({"condition": self.condition(condition), "found": self.found(condition)})
                };
                json!({
                    "name": &*route.name,
                    "matched": self.reasons.route == Some(index),
                    "mismatches": route.mismatches(&self.request).into_iter().map(mismatch).collect::<Vec<_>>(),
                })
            })
            .collect();
        let changes = |change: &Change| json!({"name": change.name, "value": change.value});
        json!({
            "policy": &*self.policy.name,
            "request": {"method": self.asked.request.line.method, "target": self.asked.request.line.target},
            "seed": if self.is_random() { Some(self.seed) } else { None },
            "trace": self.reasons.trace.as_ref().map(json_trace),
            "route": self.route().map(|route| &*route.name),
            "tried": routes,
            "limits": self.json_limits(),
            "destination": self.json_destination(),
            "fault": self.json_fault(),
            "headers": if self.reply().is_some() { Vec::new() } else { self.changes.iter().map(changes).collect() },
            "verdict": self.json_verdict(),
        })
    }

    fn json_limits(&self) -> Vec<Value> {
        let Some(limits) = self.limits() else { return Vec::new() };
        let admission = self.admission();
        let key = |source: &KeySource| {
            let (source, value) = self.key_part(source);
            json!({"source": source, "value": value})
        };
        let local = limits.local.iter().enumerate().map(|(index, limit)| {
            json!({
                "name": &*limit.name,
                "promise": &*limit.rate_of(self.exception(limit)).promise,
                "cost": limit.cost.of(&self.request),
                "key": limit.key.iter().map(key).collect::<Vec<_>>(),
                "admitted": admission.refusal.is_none_or(|refusal| refusal.quota.limit != index),
                "shadow": limit.shadow,
                "wouldRefuse": admission.events.contains(&LimitEvent::WouldRefuse(index)),
                "incomplete": admission.events.contains(&LimitEvent::IncompleteKey(index)),
                "candidates": limit.candidates.iter().enumerate().map(|(number, candidate)| json!({
                    "name": &*candidate.name,
                    "promise": &*candidate.rate.promise,
                    "wouldRefuse": admission.events.contains(&LimitEvent::CandidateWouldRefuse(index, number)),
                })).collect::<Vec<_>>(),
            })
        });
        let global = limits.global.iter().map(|global| {
            let entries = global.descriptor(&self.key_context());
            let entries = entries.iter().map(|(key, value)| json!({"key": key, "value": value}));
            json!({
                "name": &*global.limit.name,
                "promise": &*global.limit.rate.promise,
                "key": global.limit.key.iter().map(key).collect::<Vec<_>>(),
                "shadow": global.limit.shadow,
                "service": {
                    "cluster": &*global.service.cluster,
                    "domain": &*global.service.domain,
                    "descriptor": entries.collect::<Vec<_>>(),
                },
            })
        });
        local.chain(global).collect()
    }

    fn json_destination(&self) -> Option<Value> {
        let split = self.route()?.split.as_ref()?;
        let choice = self.reasons.choice?;
        let (destination, weight) = split.destinations.get(choice.destination)?;
        let (why, place) = match choice.reason {
            SelectionReason::OnlyDestination => ("only", None),
            SelectionReason::Cohort { bucket_ppm: place } => ("cohort", Some(place)),
            SelectionReason::Drawn { bucket_ppm: place } => ("drawn", Some(place)),
            SelectionReason::Inherited { bucket_ppm: place } => ("carried", Some(place)),
        };
        let key = self.cohort_key(split).map(|(source, value)| json!({"source": source, "value": value}));
        Some(json!({
            "host": &*destination.host,
            "subset": &*destination.subset,
            "weightPpm": weight.ppm(),
            "why": why,
            "placePpm": place,
            "rollout": split.canary.as_ref().map(|canary| &*canary.rollout),
            "key": key,
        }))
    }

    fn json_fault(&self) -> Option<Value> {
        let fault = self.route()?.fault.as_ref()?;
        let dice = |dice: Dice| {
            json!({
                "fault": dice.fault,
                "sharePpm": dice.share.ppm(),
                "drawn": dice.drawn,
                "placePpm": dice.place.map(Fraction::ppm),
            })
        };
        let withheld = self.reasons.withheld.map(|withheld| match withheld {
            SkipReason::Suspended => "suspended",
            SkipReason::Unknown => "unknown",
            SkipReason::Probing => "probing",
            SkipReason::Expired => "expired",
            SkipReason::Budget => "budget",
            SkipReason::Shadow => "shadow",
            SkipReason::Overflow => "overflow",
            SkipReason::NotTargeted => "not_aimed",
            SkipReason::NotDrawn => "not_drawn",
            SkipReason::MaxActive => "max_active",
        });
        let dice: Vec<Value> = self.dice(fault).into_iter().map(dice).collect();
        Some(json!({"draws": dice, "withheld": withheld, "guard": "armed"}))
    }

    fn json_verdict(&self) -> Value {
        let delay = match &self.verdict {
            RequestAction::Delay(hold) => Some(hold.delay),
            _ => None,
        };
        let action = match self.verdict.final_action() {
            RequestAction::Continue | RequestAction::Delay(_) | RequestAction::Wait(_) => "continue",
            RequestAction::Answer(_) => "answer",
            RequestAction::Reset => "reset",
        };
        let reply = self.reply().map(|reply| {
            json!({
                "status": reply.status,
                "grpcStatus": reply.grpc_status,
                "details": reply.details,
                "headers": reply.headers.iter().map(|(name, value)| json!({"name": name, "value": value})).collect::<Vec<_>>(),
                "body": reply.body,
            })
        });
        json!({"action": action, "delayNanoseconds": delay, "reply": reply})
    }
}

fn status_in_words(status: FaultStatus) -> String {
    match status {
        FaultStatus::Http(status) => status.to_string(),
        FaultStatus::Grpc(code) => format!("grpc {code}"),
    }
}

fn json_trace(propagated: &PropagatedContext) -> Value {
    let (arrived, reason) = match propagated.extraction {
        Extraction::Valid => ("valid", None),
        Extraction::Missing => ("missing", None),
        Extraction::Restored => ("decided", None),
        Extraction::Invalid(invalid) => ("invalid", Some(describe_invalid(invalid))),
    };
    json!({
        "arrived": arrived,
        "reason": reason,
        "root": propagated.is_root,
        "sampled": propagated.context.flags.contains(TraceFlags::SAMPLED),
        "traceparent": String::from_utf8_lossy(&format_traceparent(&propagated.context)),
    })
}

fn describe_invalid(invalid: InvalidContext) -> &'static str {
    match invalid {
        InvalidContext::Duplicate => "it was sent more than once",
        InvalidContext::Shape => "it is too short, too long, or lacks a dash",
        InvalidContext::Version => "its version is ff",
        InvalidContext::Character => "it has a character that is no lower-case hexadecimal digit",
        InvalidContext::ZeroTraceId => "its trace id is zero",
        InvalidContext::ZeroParentId => "its parent id is zero",
    }
}

/// `500ms`, `1.5s`.
fn duration(nanoseconds: u64) -> String {
    const SECOND: u64 = 1_000_000_000;
    if nanoseconds < SECOND {
        format!("{}ms", Decimal(nanoseconds, 1_000_000))
    } else {
        format!("{}s", Decimal(nanoseconds, SECOND))
    }
}
