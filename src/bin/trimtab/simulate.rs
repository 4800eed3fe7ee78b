//! `trimtab simulate`: what a policy does to traffic over time.
//!
//! The filter runs as in one worker of a proxy, on a simulated host whose clock jumps from event to event. Upstreams
//! answer as the arguments say. What is told comes from the filter: its log lines when they are written, and its metrics.

mod journal;
mod proxy;
mod upstreams;

use crate::check::read_one;
use crate::request::RequestArgs;
use crate::setting::{draw_seed, instant, now};
use crate::table::Table;
use crate::{Format, Outcome};
use clap::Args;
use journal::Line;
use proxy::{Proxy, Seen, Sent};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use trimtab::decimal::Decimal;
use trimtab::policy::{Policy, Route};
use trimtab::random::split_mix;
use trimtab::units::{UnixNanos, nanoseconds, parse_duration};
use upstreams::{Failures, Latency, Rule, Upstreams};

/// The most requests of one simulation.
const MAX_REQUESTS: u64 = 10_000_000;

const SECOND: u64 = 1_000_000_000;

#[derive(Args)]
pub(crate) struct Simulate {
    /// A file, or a folder, with one policy, as `check` reads it; - is the standard input
    file: PathBuf,

    #[command(flatten)]
    request: RequestArgs,

    /// From how many users requests come, in no order
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    users: u32,

    /// How many requests come in a second, evenly
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,

    /// For how long, such as 30m
    #[arg(long = "for", value_name = "DURATION", default_value = "10m", value_parser = duration)]
    duration: Duration,

    /// The share of answers that fail, such as 1%, of one subset: v2=20%, for some of the time: v2=20%@5m..10m; may be
    /// repeated, the last that fits holds
    #[arg(long, value_name = "[SUBSET=]SHARE[@FROM..TO]", value_parser = Rule::<Failures>::parse)]
    failures: Vec<Rule<Failures>>,

    /// How long answers take, 20ms unless written, half of it to half more; with subset and time as above
    #[arg(long, value_name = "[SUBSET=]DURATION[@FROM..TO]", value_parser = Rule::<Latency>::parse)]
    latency: Vec<Rule<Latency>>,

    /// When it begins, such as 2026-11-21T09:00:00Z; without this, at the first startTime of a canary, or now
    #[arg(long, value_name = "INSTANT", value_parser = instant)]
    at: Option<UnixNanos>,

    /// Draws what is random; the same seed draws the same
    #[arg(long)]
    seed: Option<u64>,

    /// Show every metric that is not 0, too
    #[arg(long)]
    stats: bool,

    /// `json`: one object
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

fn duration(text: &str) -> Result<Duration, &'static str> {
    parse_duration(text).filter(|time| !time.is_zero()).ok_or("write a duration, such as 30s or 1h30m")
}

/// What came of a simulation.
struct Story<'s> {
    asked: &'s Simulate,
    seed: u64,
    requests: u64,
    lines: Vec<Line>,
    left_out: Vec<String>,
    proxy: Proxy<'s>,
}

impl Simulate {
    pub(crate) fn run(&self) -> Outcome {
        read_one(&self.file, |policy| self.simulate(policy))
    }

    fn simulate(&self, mut policy: Policy) -> Result<String, String> {
        let span = nanoseconds(self.duration);
        let requests = u128::from(span) * u128::from(self.rate) / u128::from(SECOND);
        let requests = u64::try_from(requests).unwrap_or(u64::MAX);
        if requests > MAX_REQUESTS {
            return Err(format!("{requests} requests; the most are {MAX_REQUESTS}: lower --rate or --for"));
        }
        let upstreams = Upstreams { failures: &self.failures, latency: &self.latency };
        let known: BTreeSet<&str> = policy.routes.iter().flat_map(labels).collect();
        if let Some(unknown) = upstreams.subsets().find(|subset| !known.contains(subset)) {
            let known: Vec<&str> = known.into_iter().collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(format!("no destination is called {unknown:?}; the policy names {known}"));
        }
        let left_out = leave_out(&mut policy);
        let seed = self.seed.unwrap_or_else(draw_seed);
        let begin = self.at.or_else(|| first_start(&policy)).unwrap_or_else(now);

        // Users and upstreams draw by themselves, so that they do the same under another policy.
        let mut seeds = seed;
        let [mut draw, upstreams_seed] = [split_mix(&mut seeds), split_mix(&mut seeds)];

        journal::open();
        let mut proxy = Proxy::new(policy, begin, seed, upstreams, upstreams_seed);
        self.request.show_properties(proxy.host());
        for number in 0..requests {
            let at = u128::from(number) * u128::from(SECOND) / u128::from(self.rate);
            proxy.run_until(at as u64);
            let user = 1 + u128::from(split_mix(&mut draw)) * u128::from(self.users) / (1 << 64);
            let name = |text| match str::contains(text, "{user}") {
                true => Cow::Owned(text.replace("{user}", &user.to_string())),
                false => Cow::Borrowed(text),
            };
            proxy.request(&self.request.block(name));
        }
        proxy.run_until(span);
        let lines = journal::close();
        let story = Story { asked: self, seed, requests, lines, left_out, proxy };
        Ok(match self.format {
            Format::Text => story.text(),
            Format::Json => format!("{:#}\n", story.json()),
        })
    }
}

/// What the destinations of a route are called.
fn labels(route: &Route) -> impl Iterator<Item = &str> {
    route.split.iter().flat_map(|split| &split.destinations).map(|(destination, _)| destination.label())
}

/// Takes what needs others than upstreams out of the policy, and says so.
fn leave_out(policy: &mut Policy) -> Vec<String> {
    let mut left_out = Vec::new();
    for route in &mut policy.routes {
        if let Some(limits) = route.limits.as_mut().and_then(Arc::get_mut) {
            let global = limits.global.drain(..);
            left_out.extend(global.map(|global| format!("limit {} of route {}", global.limit.name, route.name)));
        }
        if let Some(fault) = route.fault.as_mut().and_then(Arc::get_mut)
            && fault.guard.admin.take().is_some()
        {
            left_out.push(format!("what Envoy says of its hosts, of route {}", route.name));
        }
    }
    left_out
}

/// When the first canary begins.
fn first_start(policy: &Policy) -> Option<UnixNanos> {
    let canaries = policy.routes.iter().filter_map(Route::canary);
    canaries.filter_map(|canary| canary.schedule.as_ref()).map(|schedule| schedule.start).min()
}

impl Story<'_> {
    fn text(&self) -> String {
        let mut text: String = self.lines.iter().map(|line| format!("{}  {}\n", clock(line.at), line.text)).collect();
        if !text.is_empty() {
            text.push('\n');
        }
        let mut table = Table::default();
        table.section("requests");
        let (rate, users) = (self.asked.rate, self.asked.users);
        table.row(self.requests.to_string(), format!("{rate} a second, of {users} users"));
        table.section("sent to");
        for Sent { route, destination, requests, failures } in self.proxy.sent() {
            let route = route.as_ref().map_or("no route".to_owned(), |name| format!("route {name}"));
            let share = percent(*requests, self.requests);
            let failed = percent(*failures, *requests);
            table.row(destination, format!("{requests} ({share}) by {route}; {failures} ({failed}) failed"));
        }
        table.section("clients saw");
        for (Seen { status, grpc_status, from }, count) in self.proxy.seen() {
            let status = match (status, grpc_status) {
                (Some(status), Some(code)) => format!("{status}, grpc {code}"),
                (Some(status), None) => status.to_string(),
                (None, _) => "reset".to_owned(),
            };
            table.row(status, format!("{count} ({}) from {from}", percent(*count, self.requests)));
        }
        if self.proxy.under_way() > 0 {
            table.row("nothing yet", format!("{} were under way in the end", self.proxy.under_way()));
        }
        table.section("latency");
        for (name, time) in self.proxy.percentiles() {
            table.row(name, format!("{}ms", Decimal(time / 100_000, 10)));
        }
        table.section("left out");
        self.left_out.iter().for_each(|what| table.row(what, ""));
        table.section("drawn");
        table.row(format!("--seed {}", self.seed), "draws the same again");
        text += &table.text();
        if self.asked.stats {
            text.push('\n');
            text.extend(self.proxy.host().metrics().iter().map(|(name, value)| format!("{name}: {value}\n")));
        }
        text
    }

    fn json(&self) -> Value {
        let lines = self.lines.iter();
        let lines =
            lines.map(|line| json!({"atNanoseconds": line.at, "level": line.level.as_str(), "line": line.text}));
        let sent = self.proxy.sent().map(|sent| {
            json!({
                "route": sent.route,
                "destination": sent.destination,
                "requests": sent.requests,
                "failures": sent.failures,
            })
        });
        let seen = self.proxy.seen().map(|(seen, count)| {
            json!({"status": seen.status, "grpcStatus": seen.grpc_status, "from": seen.from, "count": count})
        });
        let latency = self.proxy.percentiles().map(|(name, time)| (name.to_owned(), time.into()));
        let metrics = self.proxy.host().metrics().into_iter().map(|(name, value)| (name, value.into()));
        json!({
            "seed": self.seed,
            "requests": self.requests,
            "lines": lines.collect::<Vec<_>>(),
            "sent": sent.collect::<Vec<_>>(),
            "seen": seen.collect::<Vec<_>>(),
            "underWay": self.proxy.under_way(),
            "latencyNanoseconds": latency.collect::<serde_json::Map<_, _>>(),
            "leftOut": self.left_out,
            "metrics": metrics.collect::<serde_json::Map<_, _>>(),
        })
    }
}

/// `0:03:12.480`.
fn clock(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds / 1_000_000;
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    format!("{}:{:02}:{:02}.{rest:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// A share to a tenth of a percent.
fn percent(part: u64, whole: u64) -> String {
    format!("{:.1}%", if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 })
}
