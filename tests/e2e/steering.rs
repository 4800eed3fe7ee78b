//! The ways in which a chosen destination reaches the router, each in the configuration that is shipped for it.

use crate::world::World;
use trimtab_testbed::{Client, Envoy, Request, Upstream, needs_envoy, repository, wasm};

/// Starts a shipped configuration between two upstreams.
async fn start(name: &str) -> World {
    let (v1, v2) = (Upstream::start("v1").await, Upstream::start("v2").await);
    let at = |upstream: &Upstream| format!("address: 127.0.0.1, port_value: {}", upstream.address().port());
    let configuration = std::fs::read_to_string(repository().join(name))
        .unwrap_or_else(|error| panic!("{name}: {error}"))
        .replace("/etc/trimtab/trimtab.wasm", &wasm().display().to_string())
        .replace("address: 0.0.0.0, port_value: 10000", "address: 127.0.0.1, port_value: 0")
        .replace("address: v1, port_value: 10001", &at(&v1))
        .replace("address: v2, port_value: 10002", &at(&v2));
    let envoy = Envoy::options().try_start_text(&configuration).await;
    World { envoy: envoy.unwrap_or_else(|failure| panic!("{name}: {failure}")), v1, v2 }
}

async fn assert_steers(name: &str) {
    let world = start(name).await;
    let version = async |client: &Client, request: Request| client.send(request).await.version().to_owned();
    let client = world.spreading_client();
    let asked = version(&client, Request::get("/users/7").header("x-canary", "true")).await;
    assert_eq!(asked, "v2", "{name}: x-canary: true asks for v2");
    for user in 0..60 {
        let user = format!("user-{user}");
        let place = trimtab::canary::cohort(b"2026-11-new-ranking", user.as_bytes());
        let expected = if place < 100_000 { "v2" } else { "v1" };
        let found = version(&client, Request::get("/users/7").header("x-user-id", &user)).await;
        assert_eq!(found, expected, "{name}: {user} stands at {place} of a canary of 10 %");
    }
    let unmatched = version(&client, Request::get("/orders")).await;
    assert_eq!(unmatched, "v1", "{name}: what no route matches gets what is stable");
    for header in ["x-trimtab-subset", "x-trimtab-cluster"] {
        for forged in ["v2", "outbound|80|v2|user-service", "nowhere"] {
            let found = version(&client, Request::get("/orders").header(header, forged)).await;
            assert_eq!(found, "v1", "{name}: a client cannot steer itself by {header}: {forged}");
        }
    }
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_cluster_header_names_the_cluster() {
    needs_envoy!();
    assert_steers("envoy/steering/cluster-header.yaml").await;
}

#[tokio::test]
async fn a_header_picks_the_endpoints_of_a_subset() {
    needs_envoy!();
    assert_steers("envoy/steering/subset-load-balancing.yaml").await;
}
