//! Fault injection: late, broken, or left alone while the upstream is unwell.

use crate::world::{Setup, World, policy};
use std::time::Duration;
use tokio::task::JoinSet;
use trimtab_testbed::{Behaviour, Request, eventually, needs_envoy};

fn faults(delay: &str) -> String {
    policy(
        &format!(
            r#"{{"name": "slow", "match": [{{"headers": {{"x-experiment": {{"exact": "slow"}}}}}}],
                 "fault": {{"delay": {{"percentage": {{"value": 100}}, "fixedDelay": "{delay}"}}}}}},
               {{"name": "down", "match": [{{"headers": {{"x-experiment": {{"exact": "down"}}}}}}],
                 "fault": {{"abort": {{"percentage": {{"value": 100}}, "httpStatus": 503}}}}}},
               {{"name": "both", "match": [{{"headers": {{"x-experiment": {{"exact": "both"}}}}}}],
                 "fault": {{"delay": {{"percentage": {{"value": 100}}, "fixedDelay": "{delay}"}},
                            "abort": {{"percentage": {{"value": 100}}, "httpStatus": 500}}}}}}"#
        ),
        "",
    )
}

fn experiment(name: &str) -> Request {
    Request::get("/").header("x-experiment", name)
}

#[tokio::test]
async fn a_delay_is_never_early_and_bodies_survive_it() {
    needs_envoy!();
    let delay = Duration::from_millis(200);
    let world = World::start(&faults("200ms")).await;
    let mut tasks = JoinSet::new();
    for n in 0..100 {
        let client = world.spreading_client();
        let body = vec![b'a' + n % 26; 100_000];
        tasks.spawn(async move {
            let response = client.send(Request::post("/", body).header("x-experiment", "slow")).await;
            assert_eq!(response.status, 200, "{response:?}");
            response.elapsed
        });
    }
    for elapsed in tasks.join_all().await {
        assert!(elapsed >= delay, "a request came back after {elapsed:?}, expected {delay:?} at least");
    }
    let received = world.v1.requests();
    assert_eq!(received.len(), 100);
    assert!(received.iter().all(|request| request.body.len() == 100_000));
    assert_eq!(world.metric("route.slow.fault.delays").await, 100);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn an_abort_answers_in_the_upstreams_place() {
    needs_envoy!();
    let world = World::with(&faults("100ms"), Setup { http2: true, ..Setup::default() }).await;
    let client = world.http2_client();
    let aborted = client.send(experiment("down")).await;
    assert_eq!(aborted.status, 503, "{aborted:?}");
    assert_eq!(aborted.header("x-trimtab-fault"), Some("abort"), "{aborted:?}");
    let call = client.send(Request::grpc("/users.Users/Get").header("x-experiment", "down")).await;
    assert_eq!((call.status.as_u16(), call.grpc_status()), (200, Some("14")), "UNAVAILABLE: {call:?}");
    let both = client.send(experiment("both")).await;
    assert_eq!(both.status, 500, "{both:?}");
    assert!(both.elapsed >= Duration::from_millis(100), "the abort follows the delay: {both:?}");
    assert_eq!(world.v1.count(), 0, "no upstream was asked");
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    needs_envoy!();
    let world = World::start(&faults("24h")).await;
    let client = world.spreading_client();
    for _ in 0..50 {
        let held = tokio::time::timeout(Duration::from_millis(20), client.try_send(experiment("slow"))).await;
        assert!(held.is_err(), "the request is held for a day");
    }
    eventually("the streams of the clients that left to end", async || {
        (world.envoy.stat("http.inbound.downstream_rq_active").await == Some(0)).then_some(())
    })
    .await;
    assert_eq!(client.send(Request::get("/")).await.status, 200);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn injection_stops_while_the_upstream_fails() {
    needs_envoy!();
    let guarded = policy(
        r#"{"name": "experiment", "match": [{"headers": {"x-experiment": {}}}],
            "fault": {"abort": {"percentage": {"value": 100}, "httpStatus": 418},
                      "guard": {"errorRate": "10%", "minRequests": 20, "window": "60s", "holdDown": "1h"}},
            "route": [{"destination": {"host": "user-service", "subset": "v1"}}]},
           {"name": "default", "route": [{"destination": {"host": "user-service", "subset": "v1"}}]}"#,
        "",
    );
    let world = World::with(&guarded, Setup { workers: 4, ..Setup::default() }).await;
    let client = world.spreading_client();
    for n in 0..30 {
        let response = client.send(experiment("")).await;
        assert_eq!(response.status, 418, "request {n} is faulted while the upstream is well: {response:?}");
    }
    assert_eq!(world.v1.count(), 0, "our own 418s never reached the upstream and cannot count against it");

    world.v1.set_behaviour(Behaviour::echo().failing(0.2, 500));
    for _ in 0..25 {
        client.send(Request::get("/")).await;
    }
    for n in 0..40 {
        let response = client.send(experiment("")).await;
        assert_ne!(response.status, 418, "request {n} is left alone in every worker: {response:?}");
    }
    assert_eq!(world.metric("route.experiment.fault.suspended").await, 40);
    assert!(world.metric("route.experiment.subset.v1.fault.suspended_until_ms").await > 0);
    world.envoy.wait_for_log("route experiment: fault injection suspended: 5 of 25 requests to v1 failed").await;
    world.assert_no_trap().await;
}
