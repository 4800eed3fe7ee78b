//! Circuit breakers, in all workers at once.

use crate::world::{Setup, World, policy};
use tokio::task::JoinSet;
use trimtab_testbed::{Behaviour, Request, eventually, needs_envoy};

const STATE: &str = "route.users.breaker.state";

#[tokio::test]
async fn half_open_is_exact_with_four_workers() {
    needs_envoy!();
    let broken = policy(
        r#"{"name": "users", "route": [{"destination": {"host": "user-service", "subset": "v1"}}],
            "circuitBreaker": {"volumeThreshold": 20, "resetTimeout": "2s", "halfOpenRequests": 3}}"#,
        "",
    );
    let world = World::with(&broken, Setup { workers: 4, ..Setup::default() }).await;
    let client = world.spreading_client();
    world.v1.set_behaviour(Behaviour::echo().status(500));
    for n in 0..20 {
        assert_eq!(client.send(Request::get("/")).await.status, 500, "request {n} reaches the upstream");
    }
    assert_eq!(world.metric(STATE).await, 1);
    for n in 0..40 {
        let refused = client.send(Request::get("/")).await;
        assert_eq!(refused.status, 503, "request {n}: {refused:?}");
        assert!(matches!(refused.header("retry-after"), Some("1" | "2")), "{refused:?}");
        assert!(refused.text().contains("circuit breaker of route users is open"), "{refused:?}");
    }
    assert_eq!(world.v1.count(), 20, "no worker lets one through");

    // The probes are not answered: none else passes, however many ask at once.
    world.v1.clear();
    world.v1.set_behaviour(Behaviour::silent());
    let mut probes = JoinSet::new();
    eventually("the first probe", async || {
        let client = world.spreading_client();
        probes.spawn(async move { client.try_send(Request::get("/")).await.map(|response| response.status) });
        (world.v1.count() > 0).then_some(())
    })
    .await;
    let mut crowd = JoinSet::new();
    for _ in 0..100 {
        let client = world.spreading_client();
        let request = client.clone();
        crowd.spawn(async move {
            let asked = request.try_send(Request::get("/"));
            tokio::time::timeout(std::time::Duration::from_millis(500), asked).await.is_ok()
        });
    }
    let refused = crowd.join_all().await.into_iter().filter(|was_answered| *was_answered).count();
    assert!(refused >= 97, "{refused} of 100 were refused");
    assert_eq!(world.v1.count(), 3, "three probes over four workers");
    probes.abort_all();

    world.v1.set_behaviour(Behaviour::echo());
    eventually("the breaker to close", async || {
        client.send(Request::get("/")).await;
        (world.metric(STATE).await == 0).then_some(())
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
