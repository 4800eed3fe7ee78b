//! Live configuration updates: a bad policy is refused and the old one serves on; a good one takes over and forgets
//! nothing that was spent.

use crate::world::{Setup, World, listener, policy};
use trimtab_testbed::{Bootstrap, Envoy, Request, Update, cluster, needs_envoy};

const DYNAMIC: Setup = Setup { workers: 2, http2: false, dynamic: true };

fn canary_for(header: &str) -> String {
    policy(
        &format!(
            r#"{{"name": "canary", "match": [{{"headers": {{"{header}": {{}}}}}}],
                 "route": [{{"destination": {{"host": "user-service", "subset": "v2"}}}}]}},
               {{"name": "default", "route": [{{"destination": {{"host": "user-service", "subset": "v1"}}}}],
                 "rateLimits": [{{"name": "all", "limit": {{"requestsPerUnit": 3, "unit": "hour"}}}}]}}"#
        ),
        "",
    )
}

#[tokio::test]
async fn a_bad_policy_is_refused_with_every_reason() {
    needs_envoy!();
    let mut world = World::with(&canary_for("x-old"), DYNAMIC).await;
    let everything_wrong = r#"{"apiVersion": "v1", "name": "A b", "routes": [
        {"name": "r", "mirror": {}, "route": [{"destination": {"host": "h", "subset": "a"}, "weight": 1},
                                              {"destination": {"host": "h", "subset": "b"}, "weight": 2}]}]}"#;
    let large = " ".repeat(10 << 20);
    let deep = "[".repeat(100_000);
    let expected: [(&str, &[&str]); 6] = [
        ("", &["document: no document"]),
        ("{", &["document: not valid JSON"]),
        ("[]", &["document: found a list; expected an object"]),
        (&deep, &["document: not valid JSON: recursion limit exceeded"]),
        (&large, &["document: 10485760 bytes"]),
        (
            everything_wrong,
            &[
                "/apiVersion: found \"v1\"",
                "/name: found \"A b\"",
                "/routes/0/mirror: mirror cannot be honoured here",
                "/routes/0/route: the weights sum to 3",
            ],
        ),
    ];
    for (bad, reasons) in expected {
        let Update::Rejected(log) = world.envoy.update(&[listener(bad)]).await else {
            panic!("a policy of {} bytes was accepted", bad.len());
        };
        for reason in reasons {
            assert!(log.contains(&format!("policy refused: error: {reason}")), "{reason} is not in:\n{log}");
        }
        let response = world.spreading_client().send(Request::get("/").header("x-old", "1")).await;
        assert_eq!(response.version(), "v2", "the old policy serves on: {response:?}");
    }
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_new_policy_takes_over_and_keeps_what_was_spent() {
    needs_envoy!();
    let mut world = World::with(&canary_for("x-old"), DYNAMIC).await;
    let client = world.spreading_client();
    for _ in 0..3 {
        assert_eq!(client.send(Request::get("/")).await.status, 200);
    }
    assert_eq!(world.envoy.update(&[listener(&canary_for("x-new"))]).await, Update::Accepted);
    let new = client.send(Request::get("/").header("x-new", "1")).await;
    assert_eq!(new.version(), "v2", "{new:?}");
    let spent = client.send(Request::get("/").header("x-old", "1")).await;
    assert_eq!(spent.status, 429, "three an hour were spent before the update: {spent:?}");
    world.assert_no_trap().await;
}

#[tokio::test]
async fn envoy_does_not_start_with_a_bad_policy() {
    needs_envoy!();
    let v1 = trimtab_testbed::Upstream::start("v1").await;
    let bootstrap = Bootstrap::new()
        .listener(listener(r#"{"apiVersion": "trimtab/v1alpha1", "name": "user-service", "retries": {}}"#))
        .cluster(cluster("v1", v1.address()))
        .cluster(cluster("v2", v1.address()));
    let failure = Envoy::options().try_start(&bootstrap).await.unwrap_err();
    assert!(failure.contains("policy refused: error: /retries: unknown field"), "{failure}");
}
