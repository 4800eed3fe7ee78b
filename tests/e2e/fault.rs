//! Fault injection: late, broken, or left alone while the upstream is unwell.

use crate::world::{Setup, World, policy};
use std::time::Duration;
use tokio::task::JoinSet;
use trimtab_testbed::{Request, eventually, needs_envoy};

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
