//! Rollouts in Envoy: caps and rollbacks hold in all workers at once.

use crate::world::{Setup, World, listener, policy};
use std::time::{Duration, SystemTime};
use tokio::task::JoinSet;
use trimtab_testbed::{Behaviour, Client, Request, Update, needs_envoy};

const ROLLOUT: &str = "route.default.rollout";

fn with_rollout(rollout: &str, canary: &str) -> String {
    policy(
        &format!(
            r#"{{"name": "default",
                 "route": [{{"destination": {{"host": "user-service", "subset": "v1"}}, "weight": 50}},
                           {{"destination": {{"host": "user-service", "subset": "v2"}}, "weight": 50}}],
                 "canary": {{"destination": "v2", "rollout": "{rollout}", {canary}}}}}"#
        ),
        "",
    )
}

/// Sends `count` requests, several at a time and over all workers.
async fn flood(client: &Client, count: usize) {
    const AT_ONCE: usize = 16;
    let mut tasks = JoinSet::new();
    for _ in 0..AT_ONCE {
        let client = client.clone();
        tasks.spawn(async move {
            for _ in 0..count.div_ceil(AT_ONCE) {
                client.send(Request::get("/")).await;
            }
        });
    }
    tasks.join_all().await;
}

#[tokio::test]
async fn a_cap_is_exact_with_four_workers() {
    needs_envoy!();
    let world =
        World::with(&with_rollout("r", r#""maxRequests": 100"#), Setup { workers: 4, ..Setup::default() }).await;
    flood(&world.spreading_client(), 800).await;
    assert_eq!(world.v2.count(), 100);
    assert_eq!(world.v1.count(), 700);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_failed_canary_gets_not_one_request_more() {
    needs_envoy!();
    for workers in [2, 4] {
        let setup = Setup { workers, dynamic: true, ..Setup::default() };
        let judged = with_rollout("r", r#""judge": {"errorRateMax": "5%", "p99Increase": "100ms"}"#);
        let mut world = World::with(&judged, setup).await;
        world.v2.set_behaviour(Behaviour::echo().status(503));
        let client = world.spreading_client();
        let mut sent = 0;
        while world.gauge(&format!("{ROLLOUT}.r.judge.failed")).await == 0 {
            client.send(Request::get("/")).await;
            sent += 1;
            assert!(sent < 200, "no verdict after {sent} requests\n{}", world.envoy.log_tail());
        }
        let exposed = world.v2.count();
        assert!((3..=25).contains(&exposed), "{exposed} requests were exposed");
        flood(&client, 320).await;
        assert_eq!(world.v2.count(), exposed, "with {workers} workers");
        world.envoy.wait_for_log("verdict=fail action=rollback").await;
        assert_eq!(world.envoy.log().matches("canary verdict: ").count(), 1, "{}", world.envoy.log_tail());

        assert_eq!(world.envoy.update(&[listener(&judged)]).await, Update::Accepted);
        flood(&client, 64).await;
        assert_eq!(world.v2.count(), exposed, "an update changes nothing");
        assert_eq!(world.envoy.update(&[listener(&with_rollout("r.2", r#""judge": {}"#))]).await, Update::Accepted);
        world.v2.set_behaviour(Behaviour::echo());
        flood(&client, 64).await;
        assert!(world.v2.count() > exposed, "a new rollout has a new chance");
        world.assert_no_trap().await;
    }
}

#[tokio::test]
async fn a_canary_that_breaks_after_good_service_is_rolled_back() {
    needs_envoy!();
    for workers in [2, 4] {
        let setup = Setup { workers, ..Setup::default() };
        let world = World::with(&with_rollout("r", r#""judge": {"errorRateMax": "5%"}"#), setup).await;
        let client = world.spreading_client();
        flood(&client, 3_200).await;
        let before = world.v2.count();
        assert!((1_400..=1_800).contains(&before), "half of the requests are the canary's: {before}");
        // Both versions fail, so only the limit on errors is evidence against the canary.
        world.v1.set_behaviour(Behaviour::echo().status(503));
        world.v2.set_behaviour(Behaviour::echo().status(503));
        let failed = format!("{ROLLOUT}.r.judge.failed");
        while world.gauge(&failed).await == 0 {
            client.send(Request::get("/")).await;
            let exposed = world.v2.count() - before;
            assert!(exposed <= 25, "{exposed} requests failed, with {workers} workers\n{}", world.envoy.log_tail());
        }
        world.assert_no_trap().await;
    }
}

#[tokio::test]
async fn concurrent_requests_expose_no_more_than_were_in_flight() {
    needs_envoy!();
    let world = World::with(&with_rollout("r", r#""judge": {}"#), Setup { workers: 4, ..Setup::default() }).await;
    world.v2.set_behaviour(Behaviour::reset());
    let client = world.spreading_client();
    flood(&client, 400).await;
    let exposed = world.v2.count();
    assert!(exposed <= 25 + 16, "{exposed} requests were exposed, 16 at a time");
    flood(&client, 400).await;
    assert_eq!(world.v2.count(), exposed);
}

#[tokio::test]
async fn stages_follow_the_wall_clock() {
    needs_envoy!();
    // Two proxies without a connection to each other are in the same stage.
    let since = |ago: Duration| {
        let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() - ago;
        let (days, second) = (seconds.as_secs() / 86_400, seconds.as_secs() % 86_400);
        // Civil from days, after 2000-03-01 and before 2100-03-01: a leap year is every fourth.
        let days = days - 11_017;
        let year = (4 * days + 3) / 1461;
        let day = days - year * 1461 / 4;
        let month = (5 * day + 2) / 153;
        let (y, m) = if month < 10 { (2000 + year, month + 3) } else { (2001 + year, month - 9) };
        let d = day - (153 * month + 2) / 5 + 1;
        format!("{y}-{m:02}-{d:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
    };
    let stages = r#""stages": [{"weight": 0, "duration": "10m"}, {"weight": 100, "duration": "10m"}, {"weight": 100}]"#;
    for (ago, canaries) in [(60, 0), (660, 20)] {
        let start = since(Duration::from_secs(ago));
        let policy = with_rollout("r", &format!(r#""startTime": "{start}", {stages}"#));
        for _ in 0..2 {
            let world = World::start(&policy).await;
            for _ in 0..20 {
                world.client().send(Request::get("/")).await;
            }
            assert_eq!(world.v2.count(), canaries, "{ago} s after {start}");
        }
    }
}
