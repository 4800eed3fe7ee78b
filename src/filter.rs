//! The filter: a request's whole way, top to bottom.
//!
//! [`Filter::on_request`] decides, [`Filter::on_response`] learns. Both take what they need from a [`Host`] and return
//! what is to be done; they change nothing themselves but shared words and metrics. The features decide from plain
//! values: only this file knows in which order, and the comments say why.

mod circuit;
mod hosts;
mod poll;
mod trial;
mod watch;

use crate::canary::{Choice, Share};
use crate::fault::{Injection, Withheld};
use crate::host::{Change, Host, update};
use crate::http::{HeaderMutation, LocalReply, Request};
use crate::outlier::{answer, is_failure, is_outage};
use crate::policy::{Policy, Route, TargetId};
use crate::ratelimit::{Admission, Leases, Secret, admit, return_leases};
use crate::telemetry::{Meters, Stand};
use crate::trace::w3c::TraceContext;
use crate::trace::{self, Continuation, Direction, Notes, Response};
use crate::units::{Fraction, Monotonic};
use circuit::{Circuit, Fuse};
use hosts::Hosts;
use poll::Poll;
use trial::{JUDGE_PERIOD, Trial};
use watch::{Post, Watch};

pub use circuit::Passage;
pub use trial::Sample;
pub use watch::Experiment;

/// A policy at work in one worker.
#[derive(Debug)]
pub struct Filter {
    policy: Policy,
    meters: Meters,
    worker: WorkerState,
    /// How often to tick, and how often while a stream is held.
    period: Option<u64>,
    held_period: Option<u64>,
}

/// What a worker keeps from one request to the next.
#[derive(Debug)]
struct WorkerState {
    secret: Secret,
    leases: Leases,
    /// For each route, a watch on each of its destinations; none where the route injects no fault.
    watches: Vec<Vec<Watch>>,
    /// In the order of the policy's targets, what is learned of their hosts; none where nobody asks.
    hosts: Vec<Option<Hosts>>,
    polls: Vec<Poll>,
    /// For each route with a circuit breaker, what this worker remembers of it.
    circuits: Vec<Option<Circuit>>,
    /// For each route, what this worker remembers of its trial.
    trials: Vec<Trial>,
}

/// What is to be done with a request, and why.
#[derive(Debug, Default)]
pub struct Decision<'p> {
    pub verdict: Verdict,
    /// To be done before the request goes on; without effect where it is answered at once.
    pub mutations: Vec<HeaderMutation<'p>>,
    /// What [`Filter::on_response`] has to be told.
    pub exchange: Exchange,
    pub reasons: Reasons,
}

/// What is to be done with a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    #[default]
    Continue,
    /// Hold the request for so many nanoseconds, then let it go on, or answer.
    Delay(u64, Option<LocalReply>),
    Answer(LocalReply),
}

/// What was decided on the way to a verdict.
#[derive(Debug, Default)]
pub struct Reasons {
    pub trace: Option<Continuation>,
    /// An index into the policy's routes.
    pub route: Option<usize>,
    pub admission: Option<Admission>,
    pub choice: Option<Choice>,
    /// What the canary got, where a destination is on trial.
    pub share: Option<Share>,
    /// The faults that were drawn.
    pub drawn: Injection,
    /// Why they were not injected.
    pub withheld: Option<Withheld>,
    /// Whether the circuit breaker refused the request.
    pub broken: bool,
}

/// How long an answer takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wait {
    #[default]
    NotAsked,
    /// It has lasted since then.
    Since(Monotonic),
    /// The head of the answer came after so many nanoseconds.
    Took(u64),
}

/// What is remembered of a request until its response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchange {
    /// Whose answer is awaited; `None` where nobody wants to know.
    pub observed: Option<TargetId>,
    /// How long its answer takes, where a guard asks that.
    wait: Wait,
    /// Which experiment faults it, if one does.
    pub experiment: Option<Experiment>,
    /// How it passed a circuit breaker, which wants to know how it fares.
    passage: Option<Passage>,
    /// What the answer is to a judge.
    pub sample: Option<Sample>,
    pub is_grpc: bool,
    /// The trace that the client is told of; `None` where it is told nothing.
    pub trace: Option<TraceContext>,
}

impl Exchange {
    fn is_awaited(&self) -> bool {
        self.observed.is_some() || self.sample.is_some() || self.passage.is_some()
    }
}

/// A message's header by its name.
pub type Header<'h> = &'h dyn Fn(&str) -> Option<Vec<u8>>;

impl Filter {
    /// Puts `policy` to work: defines its metrics and agrees with the other workers on a secret.
    pub fn new(policy: Policy, host: &impl Host) -> Filter {
        let meters = Meters::define(&policy, host);
        let secret = agree_on_secret(&policy, host);
        let routes = policy.routes.iter().zip(&meters.routes);
        let watches = routes.map(|(route, meters)| watch::watches(&policy, route, meters, host)).collect();
        let stands = policy.routes.iter().zip(&meters.routes).map(|(route, meters)| Stand::new(route, meters));
        let trials =
            stands.map(|stand| stand.map_or_else(Trial::default, |stand| Trial::take_up(&stand, host))).collect();
        let hosts = policy.targets.iter().map(|target| Hosts::new(&policy, target)).collect();
        let polls = poll::polls(&policy, host);
        let fuses = policy.routes.iter().zip(&meters.routes).map(|(route, meters)| Fuse::new(route, meters));
        let circuits = fuses.map(|fuse| fuse.map(|fuse| Circuit::new(&fuse, host))).collect();
        let worker = WorkerState { secret, leases: Leases::default(), watches, hosts, polls, circuits, trials };
        let mut filter = Filter { policy, meters, worker, period: None, held_period: None };
        filter.period = filter.period(false);
        filter.held_period = filter.period(true);
        filter
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Decides on a request from its serialised headers. `may_hold` says whether another stream can be delayed.
    pub fn on_request<'p>(&'p mut self, host: &impl Host, headers: &[u8], may_hold: bool) -> Decision<'p> {
        let Filter { policy, meters, worker, .. } = self;
        let policy: &'p Policy = policy;
        let mut request = Request::parse(headers, &policy.header_names);
        if policy.reads_route_name {
            request = request.with_route_name(host.property(&["xds", "route_name"]));
        }

        // The trace first: whatever happens to the request, it belongs to one, and faults are drawn from its id.
        let continuation = policy.trace.as_ref().and_then(|trace| {
            // Asked for every request: listeners with equal configurations share one filter in Envoy, so what one
            // request tells does not hold for the next.
            let ask = || Direction::from_property(host.property(&["xds", "listener_direction"]).as_deref());
            let direction = trace.known_direction().unwrap_or_else(ask);
            trace.carry_on(&request, direction, &mut || host.random(), &mut |context| {
                trace.bridge.as_ref()?.recall(&request, context, host.now(), host)
            })
        });
        let mut decision = worker.decide(policy, meters, host, &request, continuation, may_hold);

        // Told to the next hop last, when it is known whether there is one and what was done to the request.
        let Decision { verdict, mutations, exchange, reasons } = &mut decision;
        if let (Some(trace), Some(continuation)) = (&policy.trace, &mut reasons.trace) {
            let mut remembered = Notes::default();
            if let Verdict::Continue | Verdict::Delay(_, None) = verdict {
                continuation.inject(trace, &request, mutations);
                if let (Some(bridge), Direction::Inbound) = (&trace.bridge, continuation.direction) {
                    remembered = bridge.remember(&request, &continuation.context, mutations, host.now(), host);
                }
            }
            let tells = trace.response != Response::None && continuation.direction != Direction::Outbound;
            exchange.trace = tells.then_some(continuation.context);
            meters.count_trace(continuation, remembered, host);
        }
        decision
    }
}

impl WorkerState {
    /// Everything between the trace that arrives and the trace that goes on.
    fn decide<'p>(
        &mut self,
        policy: &'p Policy,
        meters: &Meters,
        host: &impl Host,
        request: &Request<'_>,
        continuation: Option<Continuation>,
        may_hold: bool,
    ) -> Decision<'p> {
        let WorkerState { secret, leases, watches, trials, .. } = self;
        let mut decision = Decision::default();
        let Decision { verdict, mutations, exchange, reasons } = &mut decision;
        exchange.is_grpc = request.is_grpc();
        reasons.trace = continuation;

        let Some((index, route)) = policy.route(request) else {
            host.add(meters.unmatched, 1);
            policy.steer(request, None, mutations);
            return decision;
        };
        reasons.route = Some(index);
        let Some(meters) = meters.routes.get(index) else { return decision };

        // Limits before anything is chosen or injected: a refused request costs its upstream and the experiment
        // nothing.
        if !route.limits.is_empty() {
            let admission = admit(&route.limits, secret, leases, request, &route.name, host.now(), host);
            meters.count_admission(&admission, host);
            if let Some((limit, wait)) = admission.refused
                && let Some(limit) = route.limits.get(limit)
            {
                *verdict = Verdict::Answer(limit.refusal(wait, exchange.is_grpc));
                mutations.clear();
            }
            let refused = admission.refused.is_some();
            reasons.admission = Some(admission);
            if refused {
                return decision;
            }
        }

        // The breaker after the limits, because a probe that a limit refuses shows nothing.
        if let Some(fuse) = Fuse::new(route, meters) {
            match fuse.admit(index, host) {
                Ok(passage) => exchange.passage = Some(passage),
                Err(wait) => {
                    *verdict = Verdict::Answer(fuse.breaker.refusal(&route.name, wait, exchange.is_grpc));
                    mutations.clear();
                    reasons.broken = true;
                    return decision;
                }
            }
        }

        // The destination before the fault, because the fault's guard looks at the one that was chosen.
        let trial = Stand::new(route, meters).zip(trials.get_mut(index));
        let destination = route.split.as_ref().and_then(|split| {
            let choice = match trial {
                Some((stand, trial)) => {
                    let (choice, share) = trial.choose(&stand, request, host);
                    reasons.share = Some(share);
                    exchange.sample = trial.sample(&stand, index, choice, host);
                    choice
                }
                None => split.choose(Fraction::NONE, None, || host.random()),
            };
            reasons.choice = Some(choice);
            split.destinations.get(choice.destination)
        });
        policy.steer(request, destination.map(|(destination, _)| destination), mutations);
        let chosen = reasons.choice.map_or(0, |choice| choice.destination);
        let Some(sent_to) = meters.destinations.get(chosen) else { return decision };
        host.add(sent_to.requests, 1);

        // The fault last: what is injected replaces what would have happened otherwise. A probe of the breaker is spared,
        // because it has to show how the target is.
        let is_probe = exchange.passage.is_some_and(|passage| passage.is_probe());
        if let (Some(fault), Some(faults), false) = (&route.fault, &meters.faults, is_probe) {
            let inbound = || trace::extract(request).ok().flatten();
            let context = reasons.trace.as_ref().map(|continuation| continuation.context).or_else(inbound);
            let draws = fault.draws(context.map(|context| context.trace_id), || host.random());
            reasons.drawn = fault.draw(draws);
            if !reasons.drawn.is_none() {
                let post = Post { fault, meters, sent_to };
                let watch = watches.get_mut(index).and_then(|watches| watches.get_mut(chosen));
                let overflows = reasons.drawn.delay.is_some() && !may_hold;
                reasons.withheld = match watch {
                    None => Some(Withheld::Suspended),
                    Some(watch) => match watch.withholds(&post, draws, host) {
                        Some(withheld) => Some(withheld),
                        None if fault.shadow => Some(Withheld::Shadow),
                        None if overflows => Some(Withheld::Overflow),
                        // Last, because it is spent.
                        None if reasons.drawn.abort.is_some() && !watch.spend(&post, host) => Some(Withheld::Budget),
                        None => None,
                    },
                };
                faults.count(&reasons.drawn, reasons.withheld, host);
                if reasons.withheld.is_none() {
                    exchange.experiment = Some(Experiment { route: index as u32, destination: chosen as u32 });
                    let reply = reasons.drawn.abort.map(|abort| abort.reply(exchange.is_grpc));
                    *verdict = match (reasons.drawn.delay, reply) {
                        (Some(delay), reply) => Verdict::Delay(delay, reply),
                        (None, Some(reply)) => Verdict::Answer(reply),
                        (None, None) => Verdict::Continue,
                    };
                    if let (Some(trace), Some(continuation)) = (&policy.trace, &mut reasons.trace)
                        && trace.forced_by_faults
                    {
                        continuation.force_sampling();
                    }
                }
            }
        }

        // Only a request that nothing was done to tells how its target is.
        if *verdict == Verdict::Continue {
            exchange.observed = route.targets.get(chosen).copied();
            let watched = exchange.observed.and_then(|target| policy.watched(target));
            exchange.observed = exchange.observed.filter(|_| watched.is_some());
            if watched.is_some_and(|target| !target.edges.is_empty()) {
                exchange.wait = Wait::Since(host.now());
            }
        } else {
            exchange.sample = None;
            exchange.passage = None;
        }
        decision
    }
}

impl Filter {
    /// Learns from the head of a response, and says how to change it; `header` is asked only where somebody wants to
    /// know.
    pub fn on_response(
        &mut self,
        host: &impl Host,
        exchange: &mut Exchange,
        header: Header<'_>,
    ) -> Option<HeaderMutation<'static>> {
        self.learn(host, exchange, header);
        let response = self.policy.trace.as_ref()?.response;
        Continuation::response(&exchange.trace.take()?, response)
    }

    fn learn(&mut self, host: &impl Host, exchange: &mut Exchange, header: Header<'_>) {
        if !exchange.is_awaited() {
            return;
        }
        let Some(status) = number(header(":status")) else { return };
        if let Some(sample) = &mut exchange.sample {
            sample.answered(|| host.now());
        }
        if let Wait::Since(since) = exchange.wait {
            exchange.wait = Wait::Took(host.now().saturating_sub(since));
        }
        let grpc_status = if exchange.is_grpc { number(header("grpc-status")) } else { None };
        if exchange.is_grpc && status == 200 && grpc_status.is_none() {
            return; // the trailers will tell
        }
        self.observe(host, exchange, status, grpc_status);
    }

    /// Learns from the trailers of a response.
    pub fn on_response_trailers(&mut self, host: &impl Host, exchange: &mut Exchange, header: Header<'_>) {
        if exchange.is_awaited() {
            self.observe(host, exchange, 200, number(header("grpc-status")));
        }
    }

    fn observe(&mut self, host: &impl Host, exchange: &mut Exchange, status: u16, grpc_status: Option<u16>) {
        let failed = is_failure(status, grpc_status);
        if let Some(target) = exchange.observed.take()
            && let Some(meters) = self.meters.targets.get(target.0)
        {
            // Who answered is asked only where it was a failure.
            let details = if status >= 500 { host.property(&["response", "code_details"]) } else { None };
            let took = if let Wait::Took(took) = exchange.wait { took } else { 0 };
            meters.count(failed, details.as_deref().is_some_and(is_outage), took, host);
            if let Some(Some(hosts)) = self.worker.hosts.get_mut(target.0) {
                let is_local = details.is_some_and(|details| details != b"via_upstream");
                hosts.note(answer(status, grpc_status, is_local), host);
            }
        }
        if let Some(passage) = exchange.passage.take()
            && let Some(route) = self.policy.routes.get(passage.route())
            && let Some(fuse) = self.meters.routes.get(passage.route()).and_then(|meters| Fuse::new(route, meters))
            && let Some(Some(circuit)) = self.worker.circuits.get_mut(passage.route())
        {
            circuit.learn(&fuse, passage, failed, host);
        }
        // Somebody's limit says nothing of the version that answered.
        let is_limited = status == 429 || grpc_status == Some(8);
        if let Some(sample) = exchange.sample.take().filter(|_| !is_limited)
            && let Some(route) = self.policy.routes.get(sample.route())
            && let Some(stand) = self.meters.routes.get(sample.route()).and_then(|meters| Stand::new(route, meters))
            && let Some(trial) = self.worker.trials.get_mut(sample.route())
        {
            trial.learn(&stand, sample, failed, host);
        }
    }

    /// Lets the windows move on and the judges look, and gives back what was reserved in vain; to be called every
    /// [`Filter::tick_period`].
    pub fn on_tick(&mut self, host: &impl Host) {
        let now = host.now();
        return_leases(&mut self.worker.leases, |id| self.policy.limit(id), now, host);
        for (index, watches) in self.worker.watches.iter_mut().enumerate() {
            for (destination, watch) in watches.iter_mut().enumerate() {
                if let Some(post) = Post::new(&self.policy, &self.meters, index, destination) {
                    watch.tick(&post, host);
                }
            }
        }
        self.worker.polls.iter_mut().for_each(|poll| poll.tick(host));
        let routes = self.policy.routes.iter().zip(&self.meters.routes);
        for ((route, meters), circuit) in routes.zip(&mut self.worker.circuits) {
            if let (Some(fuse), Some(circuit)) = (Fuse::new(route, meters), circuit) {
                circuit.tick(&fuse, host);
            }
        }
        for ((route, meters), trial) in self.policy.routes.iter().zip(&self.meters.routes).zip(&mut self.worker.trials)
        {
            if let Some(stand) = Stand::new(route, meters) {
                trial.look(&stand, host);
            }
        }
    }

    /// Learns from the answer to a call that the filter has sent; `body` is `None` where it was too long to be read.
    pub fn on_call_answered(&mut self, host: &impl Host, call: u32, status: Option<Vec<u8>>, body: Option<&[u8]>) {
        let status = number(status).unwrap_or(0);
        self.worker.polls.iter_mut().for_each(|poll| poll.answered(call, status, body, host));
    }

    /// How often [`Filter::on_tick`] is to be called, in nanoseconds; `None` where nothing changes with time.
    /// `is_holding` says whether a stream is held.
    pub fn tick_period(&self, is_holding: bool) -> Option<u64> {
        if is_holding { self.held_period } else { self.period }
    }

    /// [`Filter::tick_period`], which stays as it is.
    fn period(&self, is_holding: bool) -> Option<u64> {
        let mut least = u64::MAX;
        let mut at_most = |period: u64| least = least.min(period);
        let worker = &self.worker;
        worker.watches.iter().flatten().for_each(|watch| at_most(watch.period(is_holding)));
        worker.polls.iter().for_each(|poll| at_most(poll.period()));
        worker.circuits.iter().flatten().for_each(|circuit| at_most(circuit.period()));
        if self.policy.has_leases() {
            at_most(Leases::TICK);
        }
        if self.policy.routes.iter().filter_map(Route::canary).any(|canary| canary.judge.is_some()) {
            at_most(JUDGE_PERIOD);
        }
        (least < u64::MAX).then_some(least)
    }

    /// Whether a stream that `experiment` holds has to be let go, unfaulted: it was suspended, or is over. So it stood at
    /// the last tick.
    pub fn ends_faults(&self, experiment: Experiment) -> bool {
        let watches = self.worker.watches.get(experiment.route as usize);
        let watch = watches.and_then(|watches| watches.get(experiment.destination as usize));
        watch.is_none_or(Watch::ends_faults)
    }

    /// Whether the abort that follows a delay of `experiment` may still be injected now.
    pub fn may_abort(&mut self, host: &impl Host, experiment: Experiment) -> bool {
        let Experiment { route, destination } = experiment;
        let (route, destination) = (route as usize, destination as usize);
        let post = Post::new(&self.policy, &self.meters, route, destination);
        let watch = self.worker.watches.get_mut(route).and_then(|watches| watches.get_mut(destination));
        let (Some(post), Some(watch)) = (post, watch) else { return false };
        watch.look(&post, host);
        !watch.ends_faults()
    }
}

/// The value of a header that is a number.
fn number(value: Option<Vec<u8>>) -> Option<u16> {
    std::str::from_utf8(&value?).ok()?.parse().ok()
}

/// The secret in shared data, or a new one that all workers will find there.
fn agree_on_secret(policy: &Policy, host: &impl Host) -> Secret {
    let mut new = [0; 16];
    for (bytes, word) in new.as_chunks_mut::<8>().0.iter_mut().zip([host.random(), host.random()]) {
        *bytes = word.to_le_bytes();
    }
    let agreed =
        update(host, &format!("{}secret", policy.state_prefix), |found| match found.and_then(<[u8]>::first_chunk) {
            Some(known) => Change::Keep(*known),
            None => Change::Write(new.to_vec(), new),
        });
    Secret(agreed.unwrap_or(new))
}
