//! Rate limiting: never one more than GCRA admits, whatever the number of workers.

use crate::world::{Setup, World, policy};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use trimtab_testbed::{Behaviour, Request, needs_envoy};

fn limited(limits: &str) -> String {
    policy(&format!(r#"{{"name": "api", "rateLimits": [{limits}]}}"#), "")
}

/// Requests from several connections at once, for as long as `time`; how many were admitted, and refused.
async fn load(world: &World, connections: usize, time: Duration) -> (u64, u64) {
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let client = world.client();
        tasks.spawn(async move {
            let (mut admitted, mut refused) = (0, 0);
            let begin = Instant::now();
            // A client per task, and each task its own connections, so that all workers get some.
            let client = client.without_reuse();
            while begin.elapsed() < time {
                match client.send(Request::get("/")).await.status.as_u16() {
                    200 => admitted += 1,
                    429 => refused += 1,
                    other => panic!("GET / was answered {other}, expected 200 or 429"),
                }
            }
            (admitted, refused)
        });
    }
    tasks.join_all().await.into_iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_is_exact_under_load_with_four_workers() {
    needs_envoy!();
    let limit = r#"{"name": "all", "limit": {"requestsPerUnit": 20, "unit": "second", "burst": 32}}"#;
    let world = World::with(&limited(limit), Setup { workers: 4, ..Setup::default() }).await;
    let begin = Instant::now();
    let (admitted, refused) = load(&world, 8, Duration::from_secs(3)).await;
    // The clock of the test runs around Envoy's: it may have admitted for a little less, never for longer.
    let longest = begin.elapsed().as_secs_f64();
    let most = 32 + (20.0 * longest) as u64;
    assert!(admitted <= most, "{admitted} admitted in {longest} s, at most {most} allowed");
    assert!(admitted >= 32 + 3 * 20 - 5, "{admitted} admitted in 3 s under a load of {}", admitted + refused);
    assert!(refused > 0, "the load was too small to tell");
    assert_eq!(world.v1.count() as u64, admitted, "what was refused reached no upstream");
    assert_eq!(world.metric("route.api.limit.all.refused").await, refused);
    assert_eq!(world.metric("state.contended").await, 0);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn exactly_the_burst_of_each_key() {
    needs_envoy!();
    let limit =
        r#"{"name": "per-user", "limit": {"requestsPerUnit": 20, "unit": "hour"}, "key": [{"header": "x-user-id"}]}"#;
    let world = World::with(&limited(limit), Setup { workers: 4, ..Setup::default() }).await;
    let mut tasks = JoinSet::new();
    for n in 0..200 {
        let client = world.spreading_client();
        tasks.spawn(async move {
            let user = format!("user-{}", n % 4);
            let response = client.send(Request::get("/").header("x-user-id", &user)).await;
            (user, response.status.as_u16())
        });
    }
    let answers = tasks.join_all().await;
    for user in ["user-0", "user-1", "user-2", "user-3"] {
        let admitted = answers.iter().filter(|(of, status)| of == user && *status == 200).count();
        assert_eq!(admitted, 20, "{user} sent 50 at once against 20 an hour");
    }
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_refusal_tells_what_and_how_long() {
    needs_envoy!();
    let limit = r#"{"name": "all", "limit": {"requestsPerUnit": 1, "unit": "hour"}}"#;
    let world = World::with(&limited(limit), Setup { http2: true, ..Setup::default() }).await;
    world.v1.set_behaviour(Behaviour::grpc(0));
    let client = world.http2_client();
    assert_eq!(client.send(Request::grpc("/users.Users/Get")).await.grpc_status(), Some("0"));

    let refused = client.send(Request::get("/")).await;
    assert_eq!(refused.status, 429, "{refused:?}");
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((3_590..=3_600).contains(&wait), "{refused:?}");
    assert_eq!(refused.header("x-envoy-ratelimited"), Some("true"));
    assert_eq!(refused.text(), format!("rate limit all exceeded: 1 request an hour; retry in {wait} s"));

    let call = client.send(Request::grpc("/users.Users/Get")).await;
    assert_eq!((call.status.as_u16(), call.grpc_status()), (200, Some("8")), "RESOURCE_EXHAUSTED: {call:?}");
    assert!(call.body.is_empty(), "trailers only: {call:?}");
    assert!(call.header("retry-after").is_some(), "{call:?}");
}
