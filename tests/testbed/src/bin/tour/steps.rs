//! The tour, step by step.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trimtab_testbed::{Behaviour, Client, Response, Update, eventually};

use crate::ask::Ask;
use crate::outcome::{Failure, Outcome, expect};
use crate::stage::{Stage, milliseconds, summary};

/// The whole of it.
pub(crate) async fn all(stage: &mut Stage) -> Outcome {
    canary_by_header(stage).await?;
    cohort(stage).await?;
    forged_steering(stage).await?;
    delay(stage).await?;
    abort(stage).await?;
    guarded_experiment(stage).await?;
    trace(stage).await?;
    rate_limit(stage).await?;
    bad_policy(stage).await
}

async fn canary_by_header(stage: &Stage) -> Outcome {
    const MANY: usize = 30;
    let terminal = &stage.terminal;
    terminal.title("1  Testers ask for the new version")?;
    let canary = stage.ask(&Ask::get().header("x-canary", "true"), &[]).await?;
    expect(canary.status == 200 && canary.version() == "v2", "200 from v2", &canary)?;
    let plain = Ask::get();
    terminal.command(&plain.curl(stage.address()))?;
    let mut on_v2 = 0;
    for _ in 0..MANY {
        let answer = stage.send(&plain).await?;
        expect(answer.status == 200, "200", &answer)?;
        on_v2 += usize::from(answer.version() == "v2");
    }
    terminal.saw(&format!("{MANY} times: {} from v1, {on_v2} from v2", MANY - on_v2))?;
    expect(on_v2 < MANY / 2, "about 3 of 30 from v2, by the weight of 10 %", on_v2)?;
    terminal.why(
        "Because the route canary-by-header matches the first; the others are drawn, one by one, by the weights \
         of the route default.",
    )?;
    Ok(())
}

/// The version that answered each of the users.
async fn versions(stage: &Stage, users: &[String]) -> Outcome<Vec<String>> {
    let mut versions = Vec::with_capacity(users.len());
    for user in users {
        let answer = stage.send(&Ask::get().user(user)).await?;
        expect(answer.status == 200, format!("200 for {user}"), &answer)?;
        versions.push(answer.version().to_owned());
    }
    Ok(versions)
}

fn canaries(users: &[String], versions: &[String]) -> BTreeSet<String> {
    let on_v2 = users.iter().zip(versions).filter(|(_, version)| *version == "v2");
    on_v2.map(|(user, _)| user.clone()).collect()
}

/// How many of `count` may be expected at `percent`: three standard deviations
/// to either side.
fn range(count: usize, percent: u32) -> std::ops::RangeInclusive<usize> {
    let share = f64::from(percent) / 100.0;
    let mean = count as f64 * share;
    let spread = 3.0 * (mean * (1.0 - share)).sqrt();
    (mean - spread).ceil() as usize..=(mean + spread).floor() as usize
}

async fn cohort(stage: &mut Stage) -> Outcome {
    const USERS: usize = 200;
    const TIMES: usize = 5;
    let users: Vec<String> = (1..=USERS).map(|n| format!("user-{n}")).collect();
    stage.terminal.title("2  A tenth of the users are on the new version, and stay there")?;

    let first = versions(stage, &users).await?;
    for _ in 1..TIMES {
        let again = versions(stage, &users).await?;
        let changed: Vec<_> = users.iter().zip(first.iter().zip(&again)).filter(|(_, (a, b))| a != b).collect();
        expect(changed.is_empty(), "the same version for the same user", changed)?;
    }
    let at_10 = canaries(&users, &first);
    let expected = range(USERS, 10);
    let shown = at_10.first().ok_or_else(|| Failure::Broken("no user is on v2".to_owned()))?;
    stage.terminal.command(&Ask::get().user(shown).curl(stage.address()))?;
    let spread = format!("{} to {}", expected.start(), expected.end());
    stage.terminal.saw(&format!(
        "{USERS} users, {TIMES} times each: {} users on v2 (expected {spread}), none on both",
        at_10.len()
    ))?;
    expect(expected.contains(&at_10.len()), format!("{spread} users on v2"), at_10.len())?;

    let raised = with_weight(&stage.policy, 25)?;
    stage.terminal.saw("Now the weight of v2 is raised from 10 to 25, under load:")?;
    let load = push_under_load(stage, &raised).await?;
    let at_25 = canaries(&users, &versions(stage, &users).await?);
    let stayed = at_10.intersection(&at_25).count();
    let expected = range(USERS, 25);
    let spread = format!("{} to {}", expected.start(), expected.end());
    stage.terminal.saw(&load)?;
    stage.terminal.saw(&format!(
        "{} users on v2 (expected {spread}), among them {stayed} of the {} from before",
        at_25.len(),
        at_10.len()
    ))?;
    expect(stayed == at_10.len(), "nobody moved out", at_10.difference(&at_25).collect::<Vec<_>>())?;
    expect(expected.contains(&at_25.len()), format!("{spread} users on v2"), at_25.len())?;

    let written = stage.policy.clone();
    stage.push(&written).await?;
    let back = canaries(&users, &versions(stage, &users).await?);
    stage.terminal.saw(&format!("and back at 10: {} users on v2, the same as at first", back.len()))?;
    expect(back == at_10, format!("{at_10:?}"), &back)?;
    stage.terminal.why(
        "Because a user's place in the rollout is a hash of its name and the user's id, from 0 to 99.9999 %: no \
         cookie, no shared state. The weight says up to which place users are on v2.",
    )?;
    Ok(())
}

/// The policy with another share for the canary.
fn with_weight(policy: &Value, percent: u32) -> Outcome<Value> {
    let mut changed = policy.clone();
    let destinations = route(&mut changed, "default")?["route"].as_array_mut();
    for destination in destinations.into_iter().flatten() {
        let is_canary = destination["destination"]["subset"] == "v2";
        destination["weight"] = json!(if is_canary { percent } else { 100 - percent });
    }
    Ok(changed)
}

fn route<'p>(policy: &'p mut Value, name: &str) -> Outcome<&'p mut Value> {
    let mut routes = policy["routes"].as_array_mut().into_iter().flatten();
    let found = routes.find(|route| route["name"] == name);
    found.ok_or_else(|| Failure::Broken(format!("the policy has no route {name}")))
}

/// Pushes `policy` while requests come and go, and says what became of them.
async fn push_under_load(stage: &mut Stage, policy: &Value) -> Outcome<String> {
    /// How many each of the four still asks when the policy is in force.
    const AFTERWARDS: usize = 25;
    let (client, address) = (stage.client(), stage.address());
    let (asked, is_pushed) = (Cell::new(0), Cell::new(false));
    let load = async || {
        let mut left = AFTERWARDS;
        while left > 0 {
            left -= usize::from(is_pushed.get());
            let user = asked.replace(asked.get() + 1);
            let answer = client.try_send(Ask::get().user(format!("visitor-{user}")).request(address)).await?;
            expect(answer.status == 200, "200 while the policy changes", &answer)?;
        }
        Ok::<_, Failure>(())
    };
    let held = async {
        let answer = client.try_send(Ask::get().header("x-experiment", "slow").request(address)).await?;
        expect(answer.status == 200, "200 for a request that was held meanwhile", &answer)
    };
    let push = async {
        let pushed = stage.push(policy).await;
        is_pushed.set(true);
        pushed
    };
    tokio::try_join!(load(), load(), load(), load(), held, push)?;
    Ok(format!(
        "{} requests from four clients while it went live and after, and one that experiment-slow held \
         meanwhile: all 200",
        asked.get()
    ))
}

async fn forged_steering(stage: &Stage) -> Outcome {
    stage.terminal.title("3  A client cannot steer")?;
    // Somebody who is on v1 by right.
    let mut users = (1..).map(|n| format!("user-{n}"));
    let user = loop {
        let user = users.next().expect("there is always another number");
        if stage.send(&Ask::get().user(&user)).await?.version() == "v1" {
            break user;
        }
    };
    let forged = stage.ask(&Ask::get().user(&user).header("x-trimtab-subset", "v2"), &[]).await?;
    let arrived = forged.echoed("x-trimtab-subset");
    expect(forged.status == 200 && forged.version() == "v1", "200 from v1", &forged)?;
    expect(arrived.as_deref() == Some("v1"), "x-trimtab-subset: v1 at the upstream", &arrived)?;
    stage.terminal.saw(&format!("what reached it: x-trimtab-subset: {}", arrived.unwrap_or_default()))?;
    stage.terminal.why(&format!(
        "Because that header, which Envoy's routes read, is Trimtab's own: it is overwritten with what the policy \
         chose for {user}."
    ))?;
    Ok(())
}

/// The answer, if it took less than `limit`; otherwise another to the same that does, of ten. A machine that is busy with something
/// else is late by itself, but hardly each time.
async fn within(limit: Duration, mut answer: Response, ask: &Ask, stage: &Stage) -> Outcome<Response> {
    for _ in 0..10 {
        if answer.elapsed < limit {
            break;
        }
        answer = stage.send(ask).await?;
    }
    expect(answer.elapsed < limit, format!("an answer in less than {limit:?}"), answer.elapsed)?;
    Ok(answer)
}

async fn delay(stage: &Stage) -> Outcome {
    const DELAY: Duration = Duration::from_millis(300);
    stage.terminal.title("4  A fault: the service is slow")?;
    let ask = Ask::get().header("x-experiment", "slow");
    let slow = stage.ask(&ask, &[]).await?;
    let slow = within(DELAY + Duration::from_secs(1), slow, &ask, stage).await?;
    expect(slow.status == 200, "200", &slow)?;
    expect(slow.elapsed >= DELAY, "300 ms at least", slow.elapsed)?;
    let ask = Ask::get();
    let quick = within(DELAY, stage.send(&ask).await?, &ask, stage).await?;
    stage.terminal.saw(&format!("the same without the header: {}", summary(&quick, &[])))?;
    stage.terminal.why("Because the route experiment-slow delays all of its requests by 300 ms.")?;
    Ok(())
}

async fn abort(stage: &Stage) -> Outcome {
    stage.terminal.title("5  A fault: the service is down")?;
    let before = stage.arrived();
    let ask = Ask::get().header("x-experiment", "down");
    let down = stage.ask(&ask, &["x-trimtab-fault"]).await?;
    let is_marked = down.header("x-trimtab-fault") == Some("abort");
    expect(down.status == 503 && is_marked, "503 with x-trimtab-fault: abort", &down)?;
    let ask = Ask::grpc().header("x-experiment", "down");
    let call = stage.ask(&ask, &["grpc-status", "grpc-message", "x-trimtab-fault"]).await?;
    expect(call.status == 200, "200, as gRPC has it", &call)?;
    expect(call.header("grpc-status") == Some("14"), "grpc-status 14 in the headers", &call)?;
    expect(call.trailers.is_none() && call.body.is_empty(), "neither body nor trailers", &call)?;
    let arrived = stage.arrived() - before;
    expect(arrived == 0, "no request at an upstream", arrived)?;
    stage.terminal.why(&format!(
        "Because the route experiment-down aborts all of its requests; a gRPC client is told in its own words: \
         UNAVAILABLE, in headers alone. Requests that reached an upstream: {arrived}."
    ))?;
    Ok(())
}

/// What became of requests to the experiment that aborts half of them.
#[derive(Debug, Default)]
struct Tally {
    injected: usize,
    failed: usize,
    good: usize,
}

impl Tally {
    fn add(&mut self, answer: &Response) -> Outcome {
        let is_injected = answer.header("x-trimtab-fault").is_some();
        match (answer.status.as_u16(), is_injected) {
            (418, true) => self.injected += 1,
            (500, false) => self.failed += 1,
            (200, false) => self.good += 1,
            _ => expect(false, "418 by experiment, or 200 or 500 from v2", answer)?,
        }
        Ok(())
    }

    fn total(&self) -> usize {
        self.injected + self.failed + self.good
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { injected, failed, good } = self;
        write!(f, "{} requests: {injected} aborted (418), {failed} failed (500), {good} well (200)", self.total())
    }
}

async fn guarded_experiment(stage: &Stage) -> Outcome {
    const UNTIL: &str = "route.experiment-guarded.subset.v2.fault.suspended_until_ms";
    const SUSPENDED: &str = "route.experiment-guarded.fault.suspended";
    const HOLD_DOWN: Duration = Duration::from_secs(5);
    let terminal = &stage.terminal;
    terminal.title("6  An experiment that stops when the service is unwell")?;
    let ask = Ask::get().header("x-experiment", "guarded");
    terminal.command(&ask.curl(stage.address()))?;

    let mut well = Tally::default();
    for _ in 0..40 {
        well.add(&stage.send(&ask).await?)?;
    }
    terminal.saw(&format!("v2 is well:                {well}"))?;
    expect((4..=36).contains(&well.injected) && well.failed == 0, "about 20 aborts, no failure", &well)?;
    expect(stage.metric(UNTIL).await == 0, "no suspension", stage.metric(UNTIL).await)?;

    stage.v2.set_behaviour(Behaviour::echo().failing(0.5, 500));
    let mut before = Tally::default();
    // A moment before it was.
    let mut suspended_at = Instant::now();
    while stage.metric(UNTIL).await == 0 {
        suspended_at = Instant::now();
        before.add(&stage.send(&ask).await?)?;
        expect(before.total() < 200, "a suspension within 200 requests", &before)?;
    }
    terminal.saw(&format!("v2 fails every other time: {before}"))?;
    let line = stage.envoy.wait_for_log("fault guard: ").await;
    let told = line.find("fault guard: ").map_or(&*line, |start| &line[start..]);
    terminal.saw(&format!("Envoy's log: {told}"))?;

    let mut after = Tally::default();
    while after.total() < 40 && suspended_at.elapsed() < HOLD_DOWN / 2 {
        after.add(&stage.send(&ask).await?)?;
    }
    terminal.saw(&format!("from then on:              {after}"))?;
    expect(after.injected == 0, "no abort while v2 is unwell", &after)?;
    let (until, withheld) = (stage.metric(UNTIL).await, stage.metric(SUSPENDED).await);
    terminal.saw(&format!("the metrics: fault.suspended {withheld}, fault.suspended_until_ms {until}"))?;
    expect(withheld > 0, "aborts that were withheld are counted", withheld)?;

    stage.v2.set_behaviour(Behaviour::echo());
    terminal.saw("v2 is well again; now for the 5 s that the guard holds injection down, and a first probe ...")?;
    let resumed = eventually("injection to resume", async || match stage.send(&ask).await {
        Ok(answer) if answer.status == 418 => Some(Ok(suspended_at.elapsed())),
        Ok(answer) if answer.status == 200 => {
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
        Ok(answer) => Some(Err(Failure::Broken(format!("unexpected: {answer:?}")))),
        Err(failure) => Some(Err(failure)),
    })
    .await?;
    terminal.saw(&format!("the next abort came {:.1} s after the suspension", resumed.as_secs_f64()))?;
    expect(resumed >= HOLD_DOWN, "at least the 5 s of holdDown", resumed)?;
    terminal.why(
        "Because the guard looks at all that v2 answered of late without a fault of ours, on whatever route: once a \
         tenth of it were failures, more of them would have hurt a service in need. No scrape and no controller \
         took part.",
    )?;
    Ok(())
}

/// The parts of a traceparent that has the right shape.
fn traceparent(answer: &Response) -> Outcome<(String, String)> {
    let header = answer.echoed("traceparent").unwrap_or_default();
    let parts: Vec<&str> = header.split('-').collect();
    let is_hex = |part: &str, length| part.len() == length && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    match parts[..] {
        ["00", trace, parent, flags] if is_hex(trace, 32) && is_hex(parent, 16) && is_hex(flags, 2) => {
            Ok((trace.to_owned(), parent.to_owned()))
        }
        _ => Err(Failure::Unexpected { expected: "a valid traceparent".to_owned(), observed: header }),
    }
}

async fn trace(stage: &Stage) -> Outcome {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const PARENT: &str = "00f067aa0ba902b7";
    let terminal = &stage.terminal;
    let told = |answer: &Response| {
        let header = |name: &str| format!("{name}: {}", answer.echoed(name).unwrap_or_else(|| "(none)".to_owned()));
        terminal.saw(&format!(
            "it reached {} with {}, {}",
            answer.version(),
            header("traceparent"),
            header("tracestate")
        ))
    };
    terminal.title("7  A trace goes on, or begins anew")?;

    let valid = Ask::get().header("traceparent", format!("00-{TRACE}-{PARENT}-01")).header("tracestate", "shop=42");
    terminal.command(&valid.curl(stage.address()))?;
    let answer = stage.send(&valid).await?;
    told(&answer)?;
    let (trace, parent) = traceparent(&answer)?;
    expect(trace == TRACE && parent != PARENT, "the same trace with a new parent", (&trace, &parent))?;
    let state = answer.echoed("tracestate");
    expect(state.as_deref() == Some("shop=42"), "the tracestate kept", state)?;

    let broken = Ask::get().header("traceparent", "00-4bf92f35-zz-01").header("tracestate", "shop=42");
    terminal.command(&broken.curl(stage.address()))?;
    let answer = stage.send(&broken).await?;
    told(&answer)?;
    let (trace, _) = traceparent(&answer)?;
    let state = answer.echoed("tracestate");
    expect(trace != TRACE && state.is_none(), "a new trace without tracestate", (&trace, &state))?;

    let none = Ask::get();
    terminal.command(&none.curl(stage.address()))?;
    let answer = stage.send(&none).await?;
    told(&answer)?;
    let (another, _) = traceparent(&answer)?;
    expect(another != TRACE && another != trace, "a new trace", &another)?;
    terminal.why(
        "Because the next hop always gets a valid W3C trace context: a good one goes on with this hop as the parent, \
         a broken one is no longer passed on and takes its tracestate with it.",
    )?;
    Ok(())
}

async fn rate_limit(stage: &Stage) -> Outcome {
    const CONNECTIONS: usize = 7;
    const EACH: usize = 20;
    const LIMIT: usize = 100;
    /// A minute's hundredth: how soon one more is admitted.
    const REGAIN: Duration = Duration::from_millis(600);
    let terminal = &stage.terminal;
    terminal.title("8  A hundred requests a minute for each user, and not one more")?;
    let address = stage.address();
    let ask = Ask::get().user("greedy");
    terminal.command(&ask.curl(address))?;

    let started = Instant::now();
    let mut connections = tokio::task::JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (client, ask) = (Client::http1(address), ask.clone());
        connections.spawn(async move {
            let mut answers = Vec::new();
            for _ in 0..EACH {
                answers.push(client.try_send(ask.request(address)).await);
            }
            answers
        });
    }
    let answers = connections.join_all().await.into_iter().flatten().collect::<Result<Vec<_>, _>>()?;
    let elapsed = started.elapsed();
    let (admitted, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 200);
    terminal.saw(&format!(
        "{} times, from {CONNECTIONS} connections at once, in {}: {} admitted, {} refused",
        CONNECTIONS * EACH,
        milliseconds(elapsed),
        admitted.len(),
        refused.len()
    ))?;
    // On a machine that takes its time, some of the allowance is regained.
    let regained = (elapsed.as_micros() / REGAIN.as_micros()) as usize;
    let expected = match regained {
        0 => format!("exactly {LIMIT} admitted"),
        _ => format!("{LIMIT} admitted, and at most {regained} more that were regained meanwhile"),
    };
    expect((LIMIT..=LIMIT + regained).contains(&admitted.len()), expected, admitted.len())?;

    let Some(refusal) = refused.first() else {
        return Err(Failure::Broken("no request was refused".to_owned()));
    };
    terminal.saw(&format!("refused with {}", summary(refusal, &["retry-after", "x-envoy-ratelimited"])))?;
    terminal.saw(&format!("  \"{}\"", refusal.text()))?;
    let retry: Option<u64> = refusal.header("retry-after").and_then(|value| value.parse().ok());
    expect(refused.iter().all(|answer| answer.status == 429), "429 for all that were refused", &refused)?;
    expect(retry == Some(1), "retry-after: 1", refusal)?;
    expect(refusal.header("x-envoy-ratelimited").is_some(), "x-envoy-ratelimited", refusal)?;
    let other = stage.ask(&Ask::get().user("modest"), &[]).await?;
    expect(other.status == 200, "200 for another user", &other)?;
    terminal.why(
        "Because all of Envoy's workers count together, by compare-and-swap in shared data, each user apart. The \
         allowance comes back one request every 600 ms.",
    )?;
    Ok(())
}

async fn bad_policy(stage: &mut Stage) -> Outcome {
    let mut bad = stage.policy.clone();
    let default = route(&mut bad, "default")?;
    default["route"][0]["weight"] = json!(80);
    default["canary"]["destination"] = json!("v3");
    default["rateLimit"] = default["rateLimits"].take();
    default["timeout"] = json!("5s");
    route(&mut bad, "experiment-down")?["fault"]["abort"]["httpStatus"] = json!(42);
    const PLACES: [&str; 5] = [
        "/routes/2/fault/abort/httpStatus",
        "/routes/4/route",
        "/routes/4/canary/destination",
        "/routes/4/rateLimit",
        "/routes/4/timeout",
    ];
    stage.terminal.title("9  A bad policy changes nothing")?;
    stage.terminal.saw("The same policy is pushed with five mistakes. Envoy refuses it, and its log says:")?;
    let Update::Rejected(log) = stage.offer(&bad).await else {
        return Err(Failure::Unexpected { expected: "a refusal".to_owned(), observed: "the policy serves".to_owned() });
    };
    // Every worker's virtual machine would say the same.
    let mut told: Vec<&str> = Vec::new();
    for line in log.lines() {
        if let Some((_, diagnostic)) = line.split_once("policy refused: ")
            && !told.contains(&diagnostic)
        {
            told.push(diagnostic);
        }
    }
    for diagnostic in &told {
        stage.terminal.saw(diagnostic)?;
    }
    for place in PLACES {
        let is_told = told.iter().any(|diagnostic| diagnostic.contains(&format!(" {place}: ")));
        expect(is_told, format!("a diagnostic of {place}"), &told)?;
    }
    expect(told.len() == PLACES.len(), "one diagnostic for each mistake", &told)?;
    let canary = stage.ask(&Ask::get().header("x-canary", "true"), &[]).await?;
    expect(canary.status == 200 && canary.version() == "v2", "200 from v2, as before", &canary)?;
    stage.terminal.why("Because a policy that is not right in all its parts is not used at all; the last one is.")?;
    Ok(())
}
