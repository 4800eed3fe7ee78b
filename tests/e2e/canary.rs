//! Canary routing: the upstream that is reached is the one that the policy chose.

use crate::world::{Setup, World, listener, policy};
use std::collections::BTreeSet;
use trimtab_testbed::{Client, Request, Update, needs_envoy};

fn weighted(canary: u32) -> String {
    let stable = 100 - canary;
    policy(
        &format!(
            r#"{{"name": "by-header", "match": [{{"headers": {{"x-canary": {{"exact": "true"}}}}}}],
                 "route": [{{"destination": {{"host": "user-service", "subset": "v2"}}}}]}},
               {{"name": "default",
                 "route": [{{"destination": {{"host": "user-service", "subset": "v1"}}, "weight": {stable}}},
                           {{"destination": {{"host": "user-service", "subset": "v2"}}, "weight": {canary}}}],
                 "canary": {{"destination": "v2", "rollout": "2026-11-new-ranking",
                             "key": [{{"cookie": "session"}}, {{"header": "x-user-id"}}]}}}}"#
        ),
        "",
    )
}

/// The users among 0..count that reach v2.
async fn canaries(client: &Client, count: u32) -> BTreeSet<u32> {
    let mut canaries = BTreeSet::new();
    for user in 0..count {
        let response = client.send(Request::get("/").header("x-user-id", format!("user-{user}"))).await;
        if response.version() == "v2" {
            canaries.insert(user);
        }
    }
    canaries
}

#[tokio::test]
async fn a_header_chooses_and_the_router_obeys() {
    needs_envoy!();
    let world = World::start(&weighted(0)).await;
    for client in [world.client(), world.http2_client()] {
        let asked = client.send(Request::get("/users/42").header("x-canary", "true")).await;
        assert_eq!(asked.version(), "v2", "x-canary: true asks for v2: {asked:?}");
        let other = client.send(Request::get("/users/42").header("x-canary", "false")).await;
        assert_eq!(other.version(), "v1", "everyone else gets v1 at weight 0: {other:?}");
        let forged = client.send(Request::get("/users/42").header("x-trimtab-subset", "v2")).await;
        assert_eq!(forged.version(), "v1", "a client cannot steer itself: {forged:?}");
    }
    assert_eq!(world.metric("route.by-header.subset.v2.requests").await, 2);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_cohort_sticks_across_workers_processes_and_weights() {
    needs_envoy!();
    const USERS: u32 = 400;
    let setup = Setup { workers: 4, dynamic: true, ..Setup::default() };
    let mut world = World::with(&weighted(5), setup).await;
    let five = canaries(&world.spreading_client(), USERS).await;
    let expected: BTreeSet<u32> = (0..USERS)
        .filter(|user| trimtab::canary::cohort(b"2026-11-new-ranking", format!("user-{user}").as_bytes()) < 50_000)
        .collect();
    assert_eq!(five, expected, "each worker puts each user where the definition says");

    let other = World::start(&weighted(5)).await;
    assert_eq!(canaries(&other.spreading_client(), USERS).await, five, "another process agrees");

    assert_eq!(world.envoy.update(&[listener(&weighted(25))]).await, Update::Accepted);
    let quarter = canaries(&world.spreading_client(), USERS).await;
    assert!(five.is_subset(&quarter), "raising the weight moves nobody out: {five:?} {quarter:?}");
    assert!(quarter.len() > five.len());
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_cookie_wins_over_a_header() {
    needs_envoy!();
    let world = World::start(&weighted(50)).await;
    let client = world.spreading_client();
    for session in 0..40 {
        let cookie = format!("theme=dark; session=s{session}");
        let place = trimtab::canary::cohort(b"2026-11-new-ranking", format!("s{session}").as_bytes());
        let expected = if place < 500_000 { "v2" } else { "v1" };
        for user in 0..3 {
            let request = Request::get("/").header("cookie", &cookie).header("x-user-id", format!("user-{user}"));
            let response = client.send(request).await;
            assert_eq!(response.version(), expected, "session s{session} stands at {place}: {response:?}");
        }
    }
}
