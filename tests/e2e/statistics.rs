//! Decisions do not depend on the statistics of Envoy: here all metrics of the module are excluded.

use crate::world::{World, listener, policy};
use serde_json::json;
use trimtab_testbed::{Behaviour, Bootstrap, Client, Envoy, Request, Response, Upstream, cluster, needs_envoy};

/// Two workers, both versions, and no statistic of the module.
async fn world(policy: &str) -> World {
    let (v1, v2) = (Upstream::start("v1").await, Upstream::start("v2").await);
    let excluded = json!({"stats_matcher": {"exclusion_list": {"patterns": [{"prefix": "wasmcustom"}]}}});
    let bootstrap = Bootstrap::new()
        .listener(listener(policy))
        .cluster(cluster("v1", v1.address()))
        .cluster(cluster("v2", v2.address()))
        .field("stats_config", excluded);
    let envoy = Envoy::options().concurrency(2).start(&bootstrap).await;
    assert!(envoy.stats("wasmcustom").await.is_empty(), "the statistics are excluded");
    World { envoy, v1, v2 }
}

async fn send(client: &Client, path: &str, count: usize) -> Vec<Response> {
    let mut responses = Vec::new();
    for _ in 0..count {
        responses.push(client.send(Request::get(path)).await);
    }
    responses
}

#[tokio::test]
async fn judge_breaker_and_guard_decide_without_statistics() {
    needs_envoy!();
    let to = |subset: &str| format!(r#"{{"destination": {{"host": "user-service", "subset": "{subset}"}}"#);
    let policy = policy(
        &format!(
            r#"{{"name": "canary", "match": [{{"uri": {{"prefix": "/canary"}}}}],
                 "route": [{}, "weight": 50}}, {}, "weight": 50}}],
                 "canary": {{"destination": "v2", "rollout": "r", "judge": {{"errorRateMax": "5%"}}}}}},
               {{"name": "breaker", "match": [{{"uri": {{"prefix": "/breaker"}}}}], "route": [{}}}],
                 "circuitBreaker": {{"volumeThreshold": 20, "resetTimeout": "1h"}}}},
               {{"name": "experiment", "match": [{{"uri": {{"prefix": "/experiment"}}}}], "route": [{}}}],
                 "fault": {{"abort": {{"percentage": {{"value": 50}}, "httpStatus": 418}}, "key": "random",
                            "guard": {{"minRequests": 20, "window": "60s", "holdDown": "1h"}}}}}}"#,
            to("v1"),
            to("v2"),
            to("v2"),
            to("v1")
        ),
        "",
    );
    let world = world(&policy).await;
    let client = world.spreading_client();
    world.v2.set_behaviour(Behaviour::echo().status(500));

    send(&client, "/canary", 400).await;
    let exposed = world.v2.count();
    assert!((3..=25).contains(&exposed), "{exposed} requests reached a canary that always fails");

    let refused = send(&client, "/breaker", 100).await.iter().filter(|response| response.status == 503).count();
    assert_eq!(refused, 80, "the circuit opens at the 20th failure");

    world.v1.set_behaviour(Behaviour::echo().status(500));
    let responses = send(&client, "/experiment", 400).await;
    let last_fault =
        responses.iter().rposition(|response| response.status == 418).expect("faults are injected at first");
    assert!(last_fault < 300, "request {last_fault} was faulted although all others have failed");
    world.assert_no_trap().await;
}
