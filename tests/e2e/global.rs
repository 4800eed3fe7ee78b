//! Global limits: real Envoys that share a real rate limit service with a real Redis, when it works and when it does not.

use crate::world::{World, listener, policy};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::task::JoinSet;
use trimtab_testbed::{
    Behaviour, Bootstrap, Client, Envoy, RateLimit, RawConnection, Redis, Request, Response, Upstream, cluster,
    eventually, http2_cluster, needs_envoy, needs_ratelimit, pipe_cluster,
};

const LIMITS: &str = "
domain: shop
descriptors:
- key: x-user
  rate_limit: {unit: minute, requests_per_unit: 1000}
- key: hourly
  rate_limit: {unit: hour, requests_per_unit: 50}
";

/// A policy with one global limit for each user.
fn limited(service: &str) -> String {
    policy(
        &format!(
            r#"{{"name": "api", "rateLimits": [{{"name": "fleet", "scope": "global",
                "limit": {{"requestsPerUnit": 1000, "unit": "minute"}}, "key": [{{"header": "x-user"}}],
                "service": {{"cluster": "rate_limit_cluster", "domain": "shop"{service}}}}}]}}"#
        ),
        "",
    )
}

/// A timeout that a machine that also compiles does not exceed by itself.
const PATIENT: &str = r#", "timeout": "5s""#;

async fn envoy(policy: &str, service: Value) -> World {
    let (v1, v2) = (Upstream::start("v1").await, Upstream::start("v2").await);
    let bootstrap = Bootstrap::new()
        .listener(listener(policy))
        .cluster(cluster("v1", v1.address()))
        .cluster(cluster("v2", v2.address()))
        .cluster(service);
    World { envoy: Envoy::start(&bootstrap).await, v1, v2 }
}

async fn behind(policy: &str, service: &RateLimit) -> World {
    envoy(policy, pipe_cluster("rate_limit_cluster", &service.socket())).await
}

async fn ask(client: &Client, user: &str) -> Response {
    client.send(Request::get("/").header("x-user", user)).await
}

async fn service_metric(world: &World, name: &str) -> u64 {
    world.metric(&format!("route.api.limit.fleet.service.{name}")).await
}

/// Sends `requests` of one user through all of `worlds`, from several connections each; how many were admitted.
async fn load(worlds: &[&World], requests: u64, user: &str) -> u64 {
    const CONNECTIONS: usize = 8;
    let left = Arc::new(AtomicU64::new(requests));
    let mut tasks = JoinSet::new();
    for world in worlds {
        for _ in 0..CONNECTIONS {
            let (client, left, user) = (world.client(), Arc::clone(&left), user.to_owned());
            tasks.spawn(async move {
                let mut admitted = 0;
                while left.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    match ask(&client, &user).await.status.as_u16() {
                        200 => admitted += 1,
                        429 => {}
                        other => panic!("a request of {user} was answered {other}, expected 200 or 429"),
                    }
                }
                admitted
            });
        }
    }
    tasks.join_all().await.into_iter().sum()
}

/// Which window of so many seconds it is, as the service counts them.
fn window(seconds: u64) -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs() / seconds
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_proxies_admit_the_limit_together_with_few_calls() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let policy = limited(&format!(r#"{PATIENT}, "batch": 50"#));
    let (one, two) = (behind(&policy, &service).await, behind(&policy, &service).await);
    // A run that a new minute interrupts tells nothing: the service counts from 0 again.
    for attempt in 0.. {
        assert!(attempt < 3, "10,000 requests take more than a minute here");
        let calls_of = async || service_metric(&one, "calls").await + service_metric(&two, "calls").await;
        let (minute, calls_before) = (window(60), calls_of().await);
        let user = format!("user-{attempt}");
        let admitted = load(&[&one, &two], 10_000, &user).await;
        let calls = calls_of().await - calls_before;
        if window(60) != minute {
            continue;
        }
        println!("{admitted} of 10,000 requests admitted, {calls} calls");
        assert!(admitted <= 1000, "{admitted} admitted of 1000 a minute");
        assert!(admitted >= 950, "{admitted} admitted of 1000 a minute: what is lost is less than a batch");
        assert!(calls <= 1000, "{calls} calls for 10,000 requests");
        break;
    }
    for world in [&one, &two] {
        assert!(service_metric(world, "calls").await > 0, "both took part");
        assert_eq!(service_metric(world, "undecided").await, 0);
        world.assert_no_trap().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_have_allowances_of_their_own_and_a_refusal_tells_when_to_come_back() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let policy = limited(&format!(r#"{PATIENT}, "descriptorKeys": ["hourly"]"#));
    let world = behind(&policy, &service).await;
    for attempt in 0.. {
        assert!(attempt < 3, "120 requests take more than an hour here");
        let hour = window(3600);
        let (ann, bob) = (format!("ann-{attempt}"), format!("bob-{attempt}"));
        let admitted = (load(&[&world], 60, &ann).await, load(&[&world], 60, &bob).await);
        if window(3600) != hour {
            continue;
        }
        assert_eq!(admitted, (50, 50));
        let refused = ask(&world.client(), &ann).await;
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=3600).contains(&wait), "{refused:?}");
        break;
    }
    world.assert_no_trap().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_killed_under_load_and_comes_back_is_asked_again() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let mut service = RateLimit::start(&redis, LIMITS).await;
    // Each request makes a call of its own, so each notices.
    let policy = limited(&format!(r#"{PATIENT}, "batch": 1, "onFailure": "deny""#));
    let world = behind(&policy, &service).await;
    let (stop, statuses) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let mut tasks = JoinSet::new();
    for connection in 0..4 {
        let (client, stop, statuses) = (world.client(), Arc::clone(&stop), Arc::clone(&statuses));
        tasks.spawn(async move {
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let status = ask(&client, &format!("user-{connection}-{}", n % 50)).await.status.as_u16();
                statuses.lock().unwrap().push(status);
            }
        });
    }
    let seen = async |status: u16, since: usize| {
        let what = format!("a {status} after {since} answers");
        eventually(&what, async || {
            let statuses = statuses.lock().unwrap();
            statuses.iter().skip(since).any(|found| *found == status).then_some(statuses.len())
        })
        .await
    };
    let since = seen(200, 0).await;
    service.kill();
    let since = seen(503, since).await;
    service.restart().await;
    seen(200, since).await;
    stop.store(true, Ordering::Relaxed);
    tasks.join_all().await;
    let statuses = statuses.lock().unwrap().clone();
    assert!(statuses.iter().all(|status| [200, 503, 429].contains(status)), "{statuses:?}");
    let failed = statuses.iter().filter(|status| **status == 503).count() as u64;
    assert_eq!(service_metric(&world, "undecided").await, failed, "every request was answered and counted");
    world.assert_no_trap().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_service_costs_a_request_the_timeout_and_no_more() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let world = behind(&limited(r#", "timeout": "200ms""#), &service).await;
    let client = world.client();
    assert_eq!(ask(&client, "ann").await.status, 200);
    let timeouts = service_metric(&world, "timeout").await;
    service.pause();
    let begin = Instant::now();
    assert_eq!(ask(&client, "ann").await.status, 200, "onFailure is allow");
    let took = begin.elapsed();
    // Envoy's timer may be early by its millisecond.
    assert!(took >= Duration::from_millis(195), "answered after {took:?}, before the timeout");
    assert_eq!(service_metric(&world, "timeout").await, timeouts + 1);
    service.resume();
    // What the service finds in its socket are calls that nobody waits for any more.
    eventually("an answer in time", async || {
        let before = service_metric(&world, "undecided").await;
        ask(&client, "ann").await;
        (service_metric(&world, "undecided").await == before).then_some(())
    })
    .await;
    world.assert_no_trap().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_redis_the_service_is_one_that_fails() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let policy = policy(
        r#"{"name": "api", "rateLimits": [{"name": "fleet", "scope": "global", "key": [{"header": "x-user"}],
            "limit": {"requestsPerUnit": 3, "unit": "hour"},
            "service": {"cluster": "rate_limit_cluster", "domain": "shop", "timeout": "5s", "onFailure": "local"}}]}"#,
        "",
    );
    let world = behind(&policy, &service).await;
    assert_eq!(ask(&world.client(), "ann").await.status, 200);
    drop(redis);
    let admitted = load(&[&world], 10, "bob").await;
    assert_eq!(admitted, 3, "this proxy's own limit: {}", service.log());
    assert_eq!(service_metric(&world, "status").await, service_metric(&world, "calls").await - 1);
    assert_eq!(service_metric(&world, "undecided").await, 10);
    world.assert_no_trap().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_says_nothing_is_a_slow_service() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let world = behind(&limited(r#", "timeout": "100ms", "onFailure": "deny""#), &service).await;
    redis.pause();
    let answer = ask(&world.client(), "ann").await;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert_eq!(answer.text(), "rate limit fleet: its service does not answer");
    assert_eq!(answer.header("x-envoy-ratelimited"), None, "it is not over a limit");
    assert_eq!(service_metric(&world, "timeout").await, 1);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn answers_that_are_none_are_counted_and_trap_nothing() {
    needs_envoy!();
    let service = Upstream::start("service").await;
    let world = envoy(&limited(PATIENT), http2_cluster("rate_limit_cluster", service.address())).await;
    let client = world.client();
    let framed = |message: &[u8]| {
        let frame = [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat();
        Behaviour::grpc(0).body(frame)
    };
    let answers = [
        ("garbage", framed(b"\xff\xff\xff")),
        ("garbage", framed(&[0x12; 100_000])),
        ("unknown_code", framed(b"")),
        ("unknown_code", framed(b"\x08\x00")),
        ("unknown_code", Behaviour::grpc(0)),
        ("status", Behaviour::grpc(13)),
        ("status", Behaviour::echo()),
        ("status", Behaviour::echo().status(500)),
        ("status", Behaviour::grpc(0).body(b"\x00\x00\x00\x00\x09short".to_vec())),
        ("status", Behaviour::reset()),
    ];
    for (expected, behaviour) in answers {
        let what = format!("{behaviour:?}");
        let before = service_metric(&world, expected).await;
        service.set_behaviour(behaviour);
        assert_eq!(ask(&client, "ann").await.status, 200, "onFailure is allow: {what}");
        assert_eq!(service_metric(&world, expected).await, before + 1, "{expected}: {what}");
    }
    let calls = service.requests();
    assert_eq!(calls[0].path, "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit");
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_cluster_that_envoy_does_not_have_is_counted() {
    needs_envoy!();
    let world = World::start(&limited(r#", "onFailure": "deny""#)).await;
    let client = world.client();
    for _ in 0..3 {
        assert_eq!(ask(&client, "ann").await.status, 503);
    }
    assert_eq!(service_metric(&world, "unreachable").await, 3);
    world.assert_no_trap().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_while_it_waits_is_counted() {
    needs_envoy!();
    let service = Upstream::start("service").await;
    service.set_behaviour(Behaviour::silent());
    let world = envoy(&limited(r#", "timeout": "10s""#), http2_cluster("rate_limit_cluster", service.address())).await;
    let mut connection = RawConnection::open(world.envoy.address("inbound")).await;
    connection.write(b"GET / HTTP/1.1\r\nhost: user-service\r\nx-user: ann\r\n\r\n").await;
    service.next_request().await;
    drop(connection);
    world.envoy.wait_for_stat("http.inbound.downstream_rq_active", |active| active == 0).await;
    // The stream is deleted a moment after its request is.
    let gone = "wasmcustom.trimtab.policy.user-service.route.api.limit.fleet.service.gone";
    world.envoy.wait_for_stat(gone, |gone| gone == 1).await;
    assert_eq!(world.v1.count(), 0, "who left did not go on");
    world.assert_no_trap().await;
}
