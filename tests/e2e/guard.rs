//! Experiments that stop and come back by themselves, in all workers at once.

use crate::world::{Setup, World, listener, policy};
use std::time::{Duration, Instant, SystemTime};
use tokio::task::JoinSet;
use trimtab_testbed::{
    Behaviour, Bootstrap, Client, Envoy, Relay, Request, Upstream, cluster, cluster_of, eventually, needs_envoy,
};

const STATE: &str = "route.experiment.subset.v1.fault.state";

/// Faults requests with `x-experiment`; all others are the control sample.
fn guarded(fault: &str, more: &str) -> String {
    policy(
        &format!(
            r#"{{"name": "experiment", "match": [{{"headers": {{"x-experiment": {{}}}}}}],
                 "fault": {{{fault}}}{more},
                 "route": [{{"destination": {{"host": "user-service", "subset": "v1"}}}}]}},
               {{"name": "default", "route": [{{"destination": {{"host": "user-service", "subset": "v1"}}}}]}}"#
        ),
        "",
    )
}

const ABORT: &str = r#""abort": {"percentage": {"value": 100}, "httpStatus": 418}"#;

fn experiment() -> Request {
    Request::get("/").header("x-experiment", "")
}

/// How many of `count` requests of the experiment were faulted, over all workers.
async fn faulted(client: &Client, count: usize) -> usize {
    let mut faulted = 0;
    for _ in 0..count {
        faulted += usize::from(client.send(experiment()).await.status == 418);
    }
    faulted
}

/// Waits until every worker has merged what it has counted: the responses without a failure are merged at ticks, a tenth of
/// a second apart.
async fn merged() {
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
}

#[tokio::test]
async fn injection_stops_within_25_control_responses() {
    needs_envoy!();
    for workers in [2, 4] {
        let guard = r#""guard": {"errorRate": "10%", "minRequests": 20, "window": "60s", "holdDown": "1h"}"#;
        let setup = Setup { workers, ..Setup::default() };
        let world = World::with(&guarded(&format!("{ABORT}, {guard}"), ""), setup).await;
        let client = world.spreading_client();
        assert_eq!(faulted(&client, 30).await, 30, "every request is faulted while the upstream is well");
        assert_eq!(world.v1.count(), 0, "our own 418s never reached the upstream and cannot count against it");

        world.v1.set_behaviour(Behaviour::echo().failing(0.2, 500));
        for _ in 0..25 {
            client.send(Request::get("/")).await;
        }
        merged().await;
        assert_eq!(faulted(&client, 40).await, 0, "each is left alone in each of {workers} workers");
        assert_eq!(world.metric("route.experiment.fault.suspended").await, 40);
        assert_eq!(world.gauge(STATE).await, 1);
        assert!(world.gauge("route.experiment.subset.v1.fault.suspended_until_ms").await > 0);
        let line = world.envoy.wait_for_log("fault guard: ").await;
        let told = "state=suspended was=armed cause=errors requests=";
        let is_prompt = line.contains("failures=4 ") || line.contains("failures=5 ");
        assert!(line.contains(told) && is_prompt, "{line}");
        assert_eq!(world.envoy.log().matches("fault guard: ").count(), 1, "{}", world.envoy.log_tail());
        world.assert_no_trap().await;
    }
}

#[tokio::test]
async fn injection_comes_back_through_probing() {
    needs_envoy!();
    let guard = r#""guard": {"errorRate": "10%", "minRequests": 20, "window": "1s", "holdDown": "1s"}"#;
    let world = World::with(&guarded(&format!("{ABORT}, {guard}"), ""), Setup { workers: 4, ..Setup::default() }).await;
    let client = world.spreading_client();
    world.v1.set_behaviour(Behaviour::echo().failing(0.2, 500));
    while world.gauge(STATE).await == 0 {
        client.send(Request::get("/")).await;
    }
    let until = Duration::from_millis(world.gauge("route.experiment.subset.v1.fault.suspended_until_ms").await);
    for n in 0..100 {
        let status = client.send(experiment()).await.status;
        // On a slow machine the probing may have begun.
        if SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() >= until {
            break;
        }
        assert_ne!(status, 418, "request {n}: no fault while suspended");
    }

    world.v1.set_behaviour(Behaviour::echo());
    let before = world.metric("route.experiment.fault.aborts").await;
    eventually("the experiment to be armed again", async || {
        for _ in 0..20 {
            client.send(Request::get("/")).await;
        }
        (world.gauge(STATE).await == 0).then_some(())
    })
    .await;
    assert_eq!(world.metric("route.experiment.fault.aborts").await, before, "nothing was asked for meanwhile");
    assert_eq!(faulted(&client, 20).await, 20);
    let log = world.envoy.log();
    let changes = log.lines().filter_map(|line| Some(line.split_once("fault guard: ")?.1.split_once("state=")?.1));
    let changes: Vec<&str> = changes.filter_map(|change| Some(change.split_once(" cause=")?.0)).collect();
    assert_eq!(changes, ["suspended was=armed", "probing was=suspended", "armed was=probing"], "{log}");
    world.assert_no_trap().await;
}

#[tokio::test]
async fn held_requests_are_let_go_in_every_worker() {
    needs_envoy!();
    let delay = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "24h"}"#;
    let guard = r#""guard": {"minRequests": 20, "window": "60s"}"#;
    let world =
        World::with(&guarded(&format!("{delay}, {ABORT}, {guard}"), ""), Setup { workers: 4, ..Setup::default() })
            .await;
    let mut held = JoinSet::new();
    for _ in 0..40 {
        let client = world.spreading_client();
        held.spawn(async move { client.send(experiment()).await.status });
    }
    world.envoy.wait_for_stat("http.inbound.downstream_rq_active", |active| active == 40).await;
    world.v1.set_behaviour(Behaviour::echo().status(500));
    for _ in 0..20 {
        world.spreading_client().send(Request::get("/")).await;
    }
    // They would be held for a day, and end well within the patience of a client.
    for status in held.join_all().await {
        assert_eq!(status, 500, "the upstream's own answer, and no abort after the delay");
    }
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_budget_is_exact_with_four_workers() {
    needs_envoy!();
    // A quarter of one in ten: one failure in forty requests.
    let budget = r#""guard": {"budget": "25%"}"#;
    let slo = r#", "slo": {"availability": "90%"}"#;
    let world =
        World::with(&guarded(&format!("{ABORT}, {budget}"), slo), Setup { workers: 4, ..Setup::default() }).await;
    let client = world.spreading_client();
    let mut tasks = JoinSet::new();
    for _ in 0..16 {
        let client = client.clone();
        tasks.spawn(async move { faulted(&client, 50).await });
    }
    let injected: usize = tasks.join_all().await.into_iter().sum();
    assert!(
        (17..=20).contains(&injected),
        "{injected} of 800 were injected, expected at most one in forty, and hardly less"
    );
    assert_eq!(world.metric("route.experiment.fault.aborts").await, injected as u64);
    world.assert_no_trap().await;
}

/// An Envoy whose cluster v1 has three hosts, and a way to its own admin endpoint.
struct Hosts {
    envoy: Envoy,
    hosts: Vec<Upstream>,
    admin: Relay,
}

impl Hosts {
    async fn start(policy: &str, outlier_detection: serde_json::Value) -> Hosts {
        let mut hosts = Vec::new();
        for n in 0..3 {
            hosts.push(Upstream::start(&format!("host-{n}")).await);
        }
        let addresses: Vec<_> = hosts.iter().map(Upstream::address).collect();
        let mut v1 = cluster_of("v1", &addresses);
        v1["outlier_detection"] = outlier_detection;
        let admin = Relay::start().await;
        let bootstrap = Bootstrap::new()
            .listener(listener(policy))
            .cluster(v1)
            .cluster(cluster("prometheus_stats", admin.address()));
        let envoy = Envoy::options().concurrency(4).start(&bootstrap).await;
        Hosts { envoy, hosts, admin }
    }

    fn client(&self) -> Client {
        Client::http1(self.envoy.address("inbound")).without_reuse()
    }

    async fn gauge(&self, name: &str) -> u64 {
        let name = format!("wasmcustom.trimtab.policy.user-service.{name}");
        self.envoy.stat(&name).await.unwrap_or_else(|| panic!("no metric {name}"))
    }
}

/// No rate of failures trips this guard: hosts do.
const HOSTS_ONLY: &str = r#""errorRate": "100%", "minRequests": 1000000, "window": "1s", "ejectedPercent": "10%""#;

#[tokio::test]
async fn a_host_that_fails_stops_injection() {
    needs_envoy!();
    let detection = r#", "outlierDetection": {"consecutive5xxErrors": 3, "baseEjectionTime": "1h"}"#;
    let policy = guarded(&format!(r#"{ABORT}, "guard": {{{HOSTS_ONLY}}}"#), detection);
    let world = Hosts::start(&policy, serde_json::json!({"consecutive_5xx": 1_000_000})).await;
    let client = world.client();
    for _ in 0..30 {
        assert_eq!(client.send(Request::get("/")).await.status, 200);
    }
    assert_eq!(faulted(&client, 20).await, 20);
    merged().await;
    world.hosts[1].set_behaviour(Behaviour::echo().status(500));
    let mut failures = 0;
    while failures < 3 {
        failures += usize::from(client.send(Request::get("/")).await.status == 500);
    }
    assert_eq!(faulted(&client, 20).await, 0, "in every worker, after three failures of one host in a row");
    assert_eq!(world.gauge("target.user-service_v1.ejected_ppm").await, 333_333);
    let address = format!("host={:?} ejected=1 hosts=3", world.hosts[1].address().to_string());
    world.envoy.wait_for_log(&address).await;
}

#[tokio::test]
async fn a_host_that_fails_by_an_interval_stops_injection_too() {
    needs_envoy!();
    let detection = r#", "outlierDetection": {"consecutive5xxErrors": 0, "interval": "1s", "baseEjectionTime": "1h",
        "failurePercentageThreshold": 50, "failurePercentageMinimumHosts": 3, "failurePercentageRequestVolume": 5}"#;
    let policy = guarded(&format!(r#"{ABORT}, "guard": {{{HOSTS_ONLY}}}"#), detection);
    let world = Hosts::start(&policy, serde_json::json!({"consecutive_5xx": 1_000_000})).await;
    let client = world.client();
    assert_eq!(faulted(&client, 20).await, 20);
    world.hosts[1].set_behaviour(Behaviour::echo().status(500));
    eventually("the ejection of one host of three", async || {
        for _ in 0..30 {
            client.send(Request::get("/")).await;
        }
        (world.gauge("target.user-service_v1.ejected_ppm").await == 333_333).then_some(())
    })
    .await;
    assert_eq!(faulted(&client, 20).await, 0, "in every worker, after an interval");
    world.envoy.wait_for_log("by_interval=1 ejected=1 hosts=3").await;
}

#[tokio::test]
async fn an_ejection_of_envoys_stops_injection_within_one_poll() {
    needs_envoy!();
    let admin = r#""admin": {"cluster": "prometheus_stats", "interval": "1s"}"#;
    let policy = guarded(&format!(r#"{ABORT}, "guard": {{{HOSTS_ONLY}, {admin}}}"#), "");
    let detection = serde_json::json!({
        "consecutive_5xx": 3, "base_ejection_time": "3600s", "interval": "0.1s", "max_ejection_percent": 100,
    });
    let begin = Instant::now();
    let world = Hosts::start(&policy, detection).await;
    let client = world.client();
    // Nothing answers at first: unknown, and nothing is injected.
    client.send(Request::get("/")).await;
    world.envoy.wait_for_log("hosts=unknown").await;
    assert_eq!(faulted(&client, 20).await, 0, "what is not known permits nothing");
    world.admin.lead_to(world.envoy.admin_address());
    eventually("the first answer of the admin endpoint", async || (faulted(&client, 1).await == 1).then_some(())).await;
    assert_eq!(faulted(&client, 20).await, 20);

    world.hosts[2].set_behaviour(Behaviour::echo().status(500));
    let ejections = "cluster.v1.outlier_detection.ejections_active";
    while world.envoy.stat(ejections).await != Some(1) {
        client.send(Request::get("/")).await;
    }
    let polls = async || world.envoy.stat("cluster.prometheus_stats.upstream_rq_200").await.unwrap_or(0);
    let before = polls().await;
    eventually("the suspension", async || {
        // One that was under way when the host was ejected may have missed it, and the next one not.
        let since = polls().await - before;
        let is_suspended = world.gauge(STATE).await == 1;
        assert!(is_suspended || since <= 2, "injection goes on {since} polls after the ejection");
        is_suspended.then_some(())
    })
    .await;
    assert_eq!(faulted(&client, 40).await, 0, "in every worker");
    world.envoy.wait_for_log("cause=ejected").await;
    let (polls, seconds) = (polls().await, begin.elapsed().as_secs());
    assert!(polls <= seconds + 2, "{polls} polls in {seconds} s: one worker asks for all four");
}

#[tokio::test]
async fn an_admin_endpoint_that_talks_nonsense_permits_nothing() {
    needs_envoy!();
    let admin = r#""admin": {"cluster": "prometheus_stats", "interval": "1s"}"#;
    let policy = guarded(&format!(r#"{ABORT}, "guard": {{{HOSTS_ONLY}, {admin}}}"#), "");
    let world = Hosts::start(&policy, serde_json::json!({})).await;
    let liar = Upstream::start("admin").await;
    world.admin.lead_to(liar.address());
    let client = world.client();
    client.send(Request::get("/")).await;
    let truncated = r#"{"cluster_statuses": [{"name": "v1", "host_statuses": [{"health_status": {}}]}"#;
    for behaviour in [
        Behaviour::echo(),
        Behaviour::echo().body(truncated),
        Behaviour::echo().body_size(8 << 20),
        Behaviour::echo().status(500),
        Behaviour::reset(),
        Behaviour::silent(),
    ] {
        liar.set_behaviour(behaviour.clone());
        liar.clear();
        // Once it is asked a second time, it was heard once.
        eventually("the second poll", async || (liar.count() >= 2).then_some(())).await;
        assert_eq!(faulted(&client, 10).await, 0, "{behaviour:?}");
    }
    assert_eq!(world.envoy.log().matches("hosts=unknown").count(), 1, "{}", world.envoy.log_tail());
    liar.set_behaviour(Behaviour::echo().body(format!("{truncated}]}}")));
    eventually("an answer that can be read", async || (faulted(&client, 1).await == 1).then_some(())).await;
    for needle in ["wasm_fail_stream", "panicked", "Function: proxy_on"] {
        assert!(!world.envoy.log().contains(needle), "{needle}\n{}", world.envoy.log_tail());
    }
}

#[tokio::test]
async fn an_unknown_admin_cluster_is_logged_once() {
    needs_envoy!();
    let admin = r#""admin": {"cluster": "nowhere", "interval": "1s"}"#;
    let world = World::start(&guarded(&format!(r#"{ABORT}, "guard": {{{HOSTS_ONLY}, {admin}}}"#), "")).await;
    let client = world.spreading_client();
    client.send(Request::get("/")).await;
    world.envoy.wait_for_log("cluster=\"nowhere\" hosts=unknown: the cluster cannot be called").await;
    let uptime = world.envoy.stat("server.uptime").await.unwrap_or(0);
    world.envoy.wait_for_stat("server.uptime", |now| now >= uptime + 3).await;
    assert_eq!(world.envoy.log().matches("hosts=unknown").count(), 1, "{}", world.envoy.log_tail());
    assert_eq!(faulted(&client, 10).await, 0);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn failed_connections_are_told_apart_from_answers() {
    needs_envoy!();
    let detection = r#", "outlierDetection": {"consecutive5xxErrors": 0, "splitExternalLocalOriginErrors": true,
        "consecutiveLocalOriginFailures": 3, "baseEjectionTime": "1h"}"#;
    let policy = guarded(&format!(r#"{ABORT}, "guard": {{{HOSTS_ONLY}}}"#), detection);
    let world = Hosts::start(&policy, serde_json::json!({"consecutive_5xx": 1_000_000})).await;
    let client = world.client();
    world.hosts[0].set_behaviour(Behaviour::echo().status(503));
    for _ in 0..30 {
        client.send(Request::get("/")).await;
    }
    assert_eq!(faulted(&client, 10).await, 10, "a 503 of the host itself is no failed connection");
    merged().await;
    world.hosts[1].set_behaviour(Behaviour::reset());
    world.hosts[1].clear();
    while world.hosts[1].count() < 3 {
        client.send(Request::get("/")).await;
    }
    assert_eq!(faulted(&client, 10).await, 0);
    let address = format!("host={:?} ejected=1 hosts=3", world.hosts[1].address().to_string());
    world.envoy.wait_for_log(&address).await;
}

#[tokio::test]
async fn one_request_without_a_host_is_enough() {
    needs_envoy!();
    let bootstrap = Bootstrap::new()
        .listener(listener(&guarded(&format!(r#"{ABORT}, "guard": {{{HOSTS_ONLY}}}"#), "")))
        .cluster(cluster_of("v1", &[]));
    let envoy = Envoy::start(&bootstrap).await;
    let client = Client::http1(envoy.address("inbound")).without_reuse();
    assert_eq!(faulted(&client, 5).await, 5);
    assert_eq!(client.send(Request::get("/")).await.status, 503);
    assert_eq!(faulted(&client, 5).await, 0);
    envoy.wait_for_log("cause=outage").await;
}
