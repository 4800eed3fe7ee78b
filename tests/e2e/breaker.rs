//! Circuit breakers, in all workers at once.

use crate::world::{Setup, World, policy};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use trimtab_testbed::{Behaviour, Client, Request, eventually, needs_envoy};

const STATE: &str = "route.users.breaker.state";
const PROBES: usize = 3;

/// Four workers, and a breaker that opens after twenty failures.
async fn with_breaker(reset_timeout: &str) -> World {
    let breaker =
        format!(r#"{{"volumeThreshold": 20, "resetTimeout": "{reset_timeout}", "halfOpenRequests": {PROBES}}}"#);
    let route = r#"[{"destination": {"host": "user-service", "subset": "v1"}}]"#;
    let broken = policy(&format!(r#"{{"name": "users", "route": {route}, "circuitBreaker": {breaker}}}"#), "");
    World::with(&broken, Setup { workers: 4, ..Setup::default() }).await
}

async fn open(world: &World, client: &Client) {
    world.v1.set_behaviour(Behaviour::echo().status(500));
    for n in 0..20 {
        assert_eq!(client.send(Request::get("/")).await.status, 500, "request {n} reaches the upstream");
    }
    assert_eq!(world.gauge(STATE).await, 1);
}

#[tokio::test]
async fn open_lets_none_through_in_any_worker() {
    needs_envoy!();
    let world = with_breaker("1h").await;
    let client = world.spreading_client();
    let begin = Instant::now();
    open(&world, &client).await;
    for n in 0..40 {
        let refused = client.send(Request::get("/")).await;
        assert_eq!(refused.status, 503, "request {n}: {refused:?}");
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        let least = 3_600 - begin.elapsed().as_secs_f64().ceil() as u64;
        assert!((least..=3_600).contains(&wait), "{refused:?}");
        assert!(refused.text().contains("circuit breaker of route users is open"), "{refused:?}");
    }
    assert_eq!(world.v1.count(), 20, "no worker lets one through");
    world.assert_no_trap().await;
}

#[tokio::test]
async fn half_open_is_exact_with_four_workers() {
    needs_envoy!();
    const RESET: Duration = Duration::from_secs(2);
    let world = with_breaker("2s").await;
    let client = world.spreading_client();
    open(&world, &client).await;

    // The probes are not answered: none else passes, however many ask at once.
    world.v1.clear();
    world.v1.set_behaviour(Behaviour::silent());
    let mut crowd = JoinSet::new();
    let mut ask = || {
        let client = world.spreading_client();
        crowd.spawn(async move { client.try_send(Request::get("/")).await });
    };
    let begin = Instant::now();
    eventually("the first probe", async || {
        ask();
        (world.v1.count() > 0).then_some(())
    })
    .await;
    (0..100).for_each(|_| ask());
    eventually("an answer to each that is no probe", async || {
        while crowd.try_join_next().is_some() {}
        (crowd.len() == world.v1.count()).then_some(())
    })
    .await;
    // Where all that took longer than probes are waited for, others have followed them.
    let phases = 1 + (begin.elapsed().as_millis() / RESET.as_millis()) as usize;
    let probes = world.v1.count();
    assert!((PROBES..=PROBES * phases).contains(&probes), "{probes} probes over four workers, in {phases} phases");
    crowd.shutdown().await;

    world.v1.set_behaviour(Behaviour::echo());
    eventually("the breaker to close", async || {
        client.send(Request::get("/")).await;
        (world.gauge(STATE).await == 0).then_some(())
    })
    .await;
    for n in 0..20 {
        assert_eq!(client.send(Request::get("/")).await.status, 200, "request {n} after it closed");
    }
    let log = world.envoy.log();
    for change in ["state=open was=closed", "state=closed was=half-open"] {
        assert_eq!(log.matches(change).count(), 1, "{change}\n{}", world.envoy.log_tail());
    }
    world.assert_no_trap().await;
}
