//! A canary's decision carried across proxies: an edge with one Envoy, and a service behind it with another.

use crate::world::{listener, policy};
use trimtab_testbed::{Bootstrap, Client, Envoy, Listener, Request, Upstream, cluster, needs_envoy, wasm, wasm_filter};

const KEY: &str = "a signing key of thirty-two bytes";
const NEXT_KEY: &str = "the signing key that comes after it";

fn split(weight: u32, key: &str, cohort: &str) -> String {
    let stable = 100 - weight;
    policy(
        &format!(
            r#"{{"name": "default",
                "route": [{{"destination": {{"host": "user-service", "subset": "v1"}}, "weight": {stable}}},
                          {{"destination": {{"host": "user-service", "subset": "v2"}}, "weight": {weight}}}],
                "canary": {{"destination": "v2", "rollout": "r", "key": [{{"header": "{key}"}}]}}}}"#
        ),
        &format!(r#", "cohort": {cohort}"#),
    )
}

/// A listener whose module has signing keys in its environment.
fn with_keys(policy: &str, keys: &[(&str, &str)]) -> Listener {
    let mut filter = wasm_filter("inbound", &wasm(), policy);
    for (name, value) in keys {
        filter["typed_config"]["config"]["vm_config"]["environment_variables"]["key_values"][name] = (*value).into();
    }
    Listener::new("inbound").filter(filter)
}

async fn envoy(listener: Listener, v1: &Upstream, v2: &Upstream) -> Envoy {
    let bootstrap =
        Bootstrap::new().listener(listener).cluster(cluster("v1", v1.address())).cluster(cluster("v2", v2.address()));
    Envoy::options().concurrency(2).start(&bootstrap).await
}

async fn metric(envoy: &Envoy, name: &str) -> u64 {
    let name = format!("wasmcustom.trimtab.policy.user-service.cohort.{name}");
    envoy.module_metric(&name).await.unwrap_or_else(|| panic!("no metric {name}"))
}

#[tokio::test]
async fn a_service_follows_what_the_edge_decided() {
    needs_envoy!();
    let (v1, v2) = (Upstream::start("v1").await, Upstream::start("v2").await);
    // The service sees no user and has moved on to another weight, and follows all the same. The edge signs with the key
    // that the service will sign with next: the middle of a rotation.
    let inner = split(1, "x-nobody-sends-this", r#"{"signingKeys": [{"env": "KEY"}, {"env": "NEXT"}]}"#);
    let inner = envoy(with_keys(&inner, &[("KEY", KEY), ("NEXT", NEXT_KEY)]), &v1, &v2).await;
    let outer = split(50, "x-user-id", r#"{"signingKeys": [{"env": "NEXT"}]}"#);
    let to_inner = cluster("v1", inner.address("inbound"));
    let both = cluster("v2", inner.address("inbound"));
    let bootstrap = Bootstrap::new().listener(with_keys(&outer, &[("NEXT", NEXT_KEY)])).cluster(to_inner).cluster(both);
    let outer = Envoy::options().concurrency(2).start(&bootstrap).await;

    let client = Client::http1(outer.address("inbound")).without_reuse();
    for user in 0..60 {
        let user = format!("user-{user}");
        let place = trimtab::canary::cohort(b"r", user.as_bytes());
        let expected = if place < 500_000 { "v2" } else { "v1" };
        let response = client.send(Request::get("/").header("x-user-id", &user)).await;
        assert_eq!(response.version(), expected, "{user} stands at {place} and the edge gives 50 %: {response:?}");
        let carried = response.echoed("x-trimtab-cohort").expect("the decision reaches the application");
        assert!(carried.starts_with(&format!("\"r\";place={place};weight=500000;issued=")), "{carried}");
    }
    assert_eq!(metric(&inner, "followed").await, 60);
    assert_eq!(metric(&inner, "forged").await, 0);
    assert_eq!(metric(&outer, "followed").await, 0);
}

#[tokio::test]
async fn a_client_cannot_choose_its_cohort() {
    needs_envoy!();
    let (v1, v2) = (Upstream::start("v1").await, Upstream::start("v2").await);
    let document = split(0, "x-user-id", &format!(r#"{{"signingKeys": [{{"value": "{KEY}"}}]}}"#));
    let envoy = envoy(listener(&document), &v1, &v2).await;
    let client = Client::http1(envoy.address("inbound"));
    let signed_by_a_stranger = r#""r";place=1;weight=1000000;issued=1795251600;sig="00000000000000000000000000000000""#;
    for forged in ["\"r\";place=1;weight=1000000;issued=1795251600", signed_by_a_stranger] {
        let response = client.send(Request::get("/").header("x-trimtab-cohort", forged)).await;
        assert_eq!(response.version(), "v1", "a canary of 0 %: {response:?}");
        let carried = response.echoed("x-trimtab-cohort").expect("what was decided here is carried on");
        assert!(carried.contains(";weight=0;") && !carried.contains("place=1;"), "the forged one is gone: {carried}");
    }
    assert_eq!(metric(&envoy, "forged").await, 2);
    let garbage = client.send(Request::get("/").header("x-trimtab-cohort", b"\xff\xfe,,,")).await;
    assert_eq!(garbage.version(), "v1");
    assert_eq!(metric(&envoy, "malformed").await, 1);
}

#[tokio::test]
async fn a_key_that_is_missing_is_told() {
    needs_envoy!();
    let document = split(5, "x-user-id", r#"{"signingKeys": [{"env": "TRIMTAB_COHORT_KEY"}]}"#);
    let bootstrap = Bootstrap::new().listener(listener(&document));
    let refused = Envoy::options().try_start(&bootstrap).await.expect_err("there is no such variable");
    let told = r#"/cohort/signingKeys/0/env: the environment has no "TRIMTAB_COHORT_KEY""#;
    assert!(refused.contains(told), "expected {told}\n{refused}");
}
