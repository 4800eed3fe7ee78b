//! Experiments that stop and come back by themselves, in all workers at once.

use crate::world::{Setup, World, policy};
use tokio::task::JoinSet;
use trimtab_testbed::{Behaviour, Client, Request, eventually, needs_envoy};

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
        assert_eq!(faulted(&client, 40).await, 0, "each is left alone in each of {workers} workers");
        assert_eq!(world.metric("route.experiment.fault.suspended").await, 40);
        assert_eq!(world.metric(STATE).await, 1);
        assert!(world.metric("route.experiment.subset.v1.fault.suspended_until_ms").await > 0);
        let line = world.envoy.wait_for_log("fault guard: ").await;
        let told = "state=suspended was=armed cause=errors requests=";
        assert!(line.contains(told) && line.contains("failures=5 "), "{line}");
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
    while world.metric(STATE).await == 0 {
        client.send(Request::get("/")).await;
    }
    let before = world.metric("route.experiment.fault.aborts").await;
    assert_eq!(faulted(&client, 100).await, 0, "no fault while suspended");

    world.v1.set_behaviour(Behaviour::echo());
    let mut seen = vec![1];
    eventually("the experiment to be armed again", async || {
        for _ in 0..20 {
            client.send(Request::get("/")).await;
        }
        let state = world.metric(STATE).await;
        if seen.last() != Some(&state) {
            seen.push(state);
        }
        (state == 0).then_some(())
    })
    .await;
    assert_eq!(seen, [1, 2, 0], "suspended, probing, armed");
    assert_eq!(world.metric("route.experiment.fault.aborts").await, before, "nothing was asked for meanwhile");
    assert_eq!(faulted(&client, 20).await, 20);
    let log = world.envoy.log();
    for change in ["state=suspended was=armed", "state=probing was=suspended", "state=armed was=probing"] {
        assert_eq!(log.matches(change).count(), 1, "{change}\n{}", world.envoy.log_tail());
    }
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
