//! A trial at work in one worker: what the canary gets now, and what the answers say of it.
//!
//! What workers have to agree on is kept where all see it. Answers are counted in metrics, which add up by themselves.
//! A verdict is written to a shared word, where it outlasts the policy that it was found under; and that the canary has
//! failed is a gauge as well, which every request of the route reads before anything else of it. The gauge is set before
//! the word: once the word is there, no worker sends another request to the canary.

use crate::canary::{
    Choice, Decided, Finding, Judge, Latencies, Progress, Recent, Share, Term, Verdict, Why, agree_on_edge, expose,
    settle,
};
use crate::host::{Change, Host, update};
use crate::http::Request;
use crate::telemetry::{JudgeMeters, Stand};
use crate::units::{Fraction, MonotonicInstant, UnixNanos};

/// How often a verdict is looked for that only time, not a failure, brings about; in nanoseconds.
pub(super) const JUDGE_PERIOD: u64 = 1_000_000_000;

/// What one worker remembers of one route's trial.
#[derive(Clone, Debug, Default)]
pub(super) struct Trial {
    /// The share that was last given to the canary.
    share: Option<Share>,
    /// Whether the cap on exposure is reached, for good.
    is_exhausted: bool,
    /// Where stages wait for evidence, how far they have come.
    progress: Option<Progress>,
    /// When to ask again how far they have come.
    ask_again: UnixNanos,
    /// Whether the canary has failed, for good.
    has_failed: bool,
    /// When to look again whether the verdict has changed.
    look_again: MonotonicInstant,
    verdict: Verdict,
    latencies: Latencies,
    /// In microseconds; 0 where it is not known yet.
    edge: u64,
}

/// What is remembered of a judged request until its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    route: usize,
    /// An index into the weights that the trial knows.
    weight: usize,
    on_trial: bool,
    /// When it was sent, where anybody asks how long it takes.
    since: Option<MonotonicInstant>,
    /// How long its answer took.
    took: Option<u64>,
}

impl Sample {
    pub(super) fn route(&self) -> usize {
        self.route
    }

    /// Notes that the request goes on only now.
    pub(super) fn restart(&mut self, now: impl FnOnce() -> MonotonicInstant) {
        if self.since.is_some() {
            self.since = Some(now());
        }
    }

    /// Notes that the head of the answer is there.
    pub(super) fn answered(&mut self, now: impl FnOnce() -> MonotonicInstant) {
        if let (Some(since), None) = (self.since, self.took) {
            self.took = Some(now().saturating_since(since));
        }
    }
}

/// The judge of a trial, and where the evidence is.
fn court<'p>(stand: &Stand<'p>) -> Option<(&'p Judge, &'p JudgeMeters)> {
    stand.canary.judge.as_ref().zip(stand.meters.judge.as_ref())
}

/// What the judge says of everything that is known, all workers together.
fn finding(stand: &Stand<'_>, judge: &Judge, meters: &JudgeMeters, host: &impl Host) -> Finding {
    let counts = meters.counts(host);
    let recent = update(host, &stand.canary.word("recent"), |found| {
        let known = found.and_then(Recent::decode).unwrap_or_default();
        match known.next(judge, &counts) {
            Some(next) => Change::Write(next.encode(), next),
            None => Change::Keep(known),
        }
    });
    judge.judge(&counts, meters.timed(&counts, host), recent.unwrap_or_default().levels(judge, &counts))
}

impl Trial {
    /// Takes up a trial where it stands: a verdict that was found is found again.
    pub fn take_up(stand: &Stand<'_>, host: &impl Host) -> Trial {
        let mut trial = Trial::default();
        if let Some((_, meters)) = court(stand) {
            let found = settle(host, &stand.canary.word("verdict"), Verdict::Insufficient, Fraction::NONE);
            match found {
                Ok(settled) if settled.verdict == Verdict::Fail => {
                    trial.has_failed = true;
                    trial.verdict = Verdict::Fail;
                    if meters.fail(settled.weight, host) {
                        meters.log_kept(stand);
                    }
                }
                Ok(settled) if settled.is_new => meters.log_begin(stand, host),
                _ => {}
            }
        }
        trial
    }

    /// Chooses a destination, within what the canary may have; and says what that is. What an earlier hop decided,
    /// `carried`, is followed, unless the canary has failed here.
    pub fn choose(
        &mut self,
        stand: &Stand<'_>,
        request: &Request<'_>,
        carried: Option<Decided>,
        host: &impl Host,
    ) -> (Choice, Share) {
        let Stand { route, split, canary, meters } = *stand;
        let key = split.key(request, &route.name, host);
        let mut share = self.share(stand, host);
        if self.share.replace(share) != Some(share) {
            meters.tell(share, stand, host);
        }
        let carried = carried.filter(|_| share.term != Term::RolledBack && !canary.shadow);
        if let Some(carried) = carried {
            share = Share { weight: carried.weight, term: Term::Carried };
        }
        let mut drawn = None;
        let mut choose = |weight| match carried {
            Some(carried) => split.follow(carried, weight, key.as_deref()),
            None => split.choose(weight, key.as_deref(), || *drawn.get_or_insert_with(|| host.random())),
        };
        let mut choice = choose(share.weight);

        // The cap after the choice: only those who would be exposed are counted.
        if choice.destination == canary.destination
            && let Some(most) = canary.max_requests
        {
            let admitted = if self.is_exhausted { Ok(false) } else { expose(host, &canary.exposed_word, most) };
            self.is_exhausted = admitted == Ok(false);
            if admitted != Ok(true) {
                meters.count_capped(most, stand, host);
                share = Share { weight: Fraction::NONE, term: Term::Exhausted };
                choice = choose(share.weight);
            }
        }
        if canary.shadow {
            let actual = choose(split.weight(canary.destination));
            if actual.destination != choice.destination {
                host.add(meters.shadow, 1);
            }
            choice = actual;
        }
        (choice, share)
    }

    /// What the canary would get if nothing were in shadow.
    fn share(&mut self, stand: &Stand<'_>, host: &impl Host) -> Share {
        let Stand { split, canary, .. } = *stand;
        let in_time = || canary.share(split.weight(canary.destination), || host.wall_now());
        let Some((judge, meters)) = court(stand) else { return in_time() };
        self.has_failed = self.has_failed || meters.has_failed(host);
        if self.has_failed && judge.rolls_back {
            return Share { weight: Fraction::NONE, term: Term::RolledBack };
        }
        let share = if judge.holds { self.held_share(stand, host) } else { None }.unwrap_or_else(in_time);
        // Reported only: it keeps what it had when it failed.
        let failed_at = if self.has_failed { meters.failed_at(host) } else { Fraction::WHOLE };
        if share.weight > failed_at { Share { weight: failed_at, term: Term::Held } } else { share }
    }

    /// The share where a stage is entered only after the canary has passed. `None` before the start.
    fn held_share(&mut self, stand: &Stand<'_>, host: &impl Host) -> Option<Share> {
        let schedule = stand.canary.schedule.as_ref()?;
        let (judge, meters) = court(stand)?;
        let now = host.wall_now();
        schedule.stage(now)?;
        if self.progress.is_none() || now >= self.ask_again {
            let has_passed = || finding(stand, judge, meters, host).verdict == Verdict::Pass;
            let progress = schedule.advance(host, &stand.canary.word("stage"), now, has_passed);
            self.progress = progress.ok().or(self.progress);
            self.ask_again = now.saturating_add(JUDGE_PERIOD);
        }
        let progress = self.progress?;
        let is_due = schedule.due(progress).is_some_and(|due| now >= due);
        let term = if is_due { Term::Held } else { Term::Stage(progress.stage) };
        Some(Share { weight: schedule.weight(Some(progress.stage)), term })
    }

    /// What a later hop is told of the choice; `None` where it is what an earlier hop has told it, or nothing.
    pub fn decided(stand: &Stand<'_>, choice: Choice, share: Share) -> Option<Decided> {
        let place = match choice.why {
            Why::Carried { .. } if share.term == Term::Carried => return None,
            Why::Cohort { place } | Why::Drawn { place } | Why::Carried { place } => place,
            Why::Only => return None,
        };
        let in_shadow = stand.canary.shadow.then(|| stand.split.weight(stand.canary.destination));
        Some(Decided { place, weight: in_shadow.unwrap_or(share.weight) })
    }

    /// What has to be known of the request when its answer comes; `None` where nobody judges it. Evidence is weighed by
    /// the weight in force here, so a request that was decided elsewhere by another is none.
    pub fn sample(
        &self,
        stand: &Stand<'_>,
        route: usize,
        (choice, share): (Choice, Share),
        host: &impl Host,
    ) -> Option<Sample> {
        let (judge, meters) = court(stand)?;
        if self.has_failed {
            return None;
        }
        let weight = match self.share {
            Some(share) if !stand.canary.shadow => share.weight,
            _ => stand.split.weight(stand.canary.destination),
        };
        if share.term == Term::Carried && share.weight != weight {
            return None;
        }
        Some(Sample {
            route,
            weight: meters.weights.iter().position(|known| known.weight == weight)?,
            on_trial: choice.destination == stand.canary.destination,
            since: judge.p99_increase.map(|_| host.now()),
            took: None,
        })
    }

    /// Learns from an answer.
    pub fn learn(&mut self, stand: &Stand<'_>, sample: Sample, failed: bool, host: &impl Host) {
        let Some((judge, meters)) = court(stand) else { return };
        let Some(counters) = meters.weights.get(sample.weight) else { return };
        let arm = if sample.on_trial { counters.canary } else { counters.others };
        host.add(arm.requests, 1);
        if failed {
            host.add(arm.failures, 1);
        } else if !sample.on_trial {
            let draw = host.random();
            for (share, counter) in [(judge.tolerance, counters.handicap), (judge.margin(), counters.margin)] {
                if share.includes(draw) {
                    host.add(counter, 1);
                }
            }
        }
        let mut is_slow = false;
        if let (Some(increase), Some(took)) = (judge.p99_increase, sample.took) {
            if self.edge == 0 {
                self.edge = meters.edge(host);
            }
            let edge = self.edge.saturating_mul(1_000);
            if edge > 0 {
                is_slow = took > if sample.on_trial { edge.saturating_add(increase) } else { edge };
            } else if !sample.on_trial
                && let Some(edge) = self.latencies.add(took)
                && let Ok(agreed) = agree_on_edge(host, &stand.canary.word("edge"), edge.div_ceil(1_000))
            {
                self.edge = agreed;
                self.latencies = Latencies::default();
                meters.set_edge(agreed, host);
            }
            if is_slow {
                host.add(arm.slow, 1);
            }
        }
        // Nothing else speaks against the canary.
        if sample.on_trial && (failed || is_slow) {
            self.judge(stand, host);
        }
    }

    /// Judges, if that is due; to be called now and then.
    pub fn look(&mut self, stand: &Stand<'_>, host: &impl Host) {
        if court(stand).is_some() && host.now() >= self.look_again {
            self.look_again = host.now().saturating_add(JUDGE_PERIOD);
            self.judge(stand, host);
        }
    }

    /// Looks for a verdict, and tells it where it is new.
    fn judge(&mut self, stand: &Stand<'_>, host: &impl Host) {
        let Some((judge, meters)) = court(stand) else { return };
        self.has_failed = self.has_failed || meters.has_failed(host);
        if self.has_failed {
            return;
        }
        let finding = finding(stand, judge, meters, host);
        meters.show(&finding, host);
        if finding.verdict == self.verdict {
            return;
        }
        self.verdict = finding.verdict;
        let weight = stand.meters.weight_in_force(stand, host);
        if finding.verdict == Verdict::Fail {
            self.has_failed = true;
            meters.fail(weight, host);
        }
        if settle(host, &stand.canary.word("verdict"), finding.verdict, weight).is_ok_and(|settled| settled.is_new) {
            meters.log_verdict(&finding, weight, stand);
        }
    }
}
