//! Rate limiting: never one more than GCRA admits, whatever the number of workers.

use crate::world::{Setup, World, listener, policy};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tokio::task::JoinSet;
use trimtab_testbed::{Behaviour, Listener, Request, needs_envoy};

fn limited(limits: &str) -> String {
    policy(&format!(r#"{{"name": "api", "rateLimits": [{limits}]}}"#), "")
}

/// One request under load, in seconds since the load began.
struct Sample {
    sent: f64,
    answered: f64,
    is_admitted: bool,
}

/// As many requests as fit, from several connections at once, for `seconds`, or until a hundred of them were refused
/// where that takes longer; in the order of their answers.
async fn load(world: &World, connections: usize, seconds: f64) -> Vec<Sample> {
    const REFUSALS: usize = 100;
    let mut tasks = JoinSet::new();
    let begin = Instant::now();
    let refused = Arc::new(AtomicUsize::new(0));
    for n in 0..connections {
        // Half of the connections are kept, and half are new for each request, so that all workers get some.
        let client = if n % 2 == 0 { world.client() } else { world.spreading_client() };
        let refused = Arc::clone(&refused);
        tasks.spawn(async move {
            let mut samples = Vec::new();
            loop {
                let sent = begin.elapsed().as_secs_f64();
                if sent > seconds && refused.load(Ordering::Relaxed) >= REFUSALS {
                    return samples;
                }
                let status = client.send(Request::get("/")).await.status.as_u16();
                assert!(matches!(status, 200 | 429), "GET / was answered {status}, expected 200 or 429");
                let answered = begin.elapsed().as_secs_f64();
                refused.fetch_add(usize::from(status == 429), Ordering::Relaxed);
                samples.push(Sample { sent, answered, is_admitted: status == 200 });
            }
        });
    }
    let mut samples: Vec<Sample> = tasks.join_all().await.into_iter().flatten().collect();
    samples.sort_by(|a, b| a.answered.total_cmp(&b.answered));
    samples
}

/// Loads a limit of `rate` a second and `burst`, and holds it to both its bounds by the clock of the test, however fast
/// or slow that runs. `stranded` is how many requests other workers may hold while one refuses.
async fn assert_exact(workers: u32, rate: f64, burst: f64, stranded: f64) {
    let limit =
        format!(r#"{{"name": "all", "limit": {{"requestsPerUnit": {rate}, "unit": "second", "burst": {burst}}}}}"#);
    let world = World::with(&limited(&limit), Setup { workers, ..Setup::default() }).await;
    let samples = load(&world, 8, 4.0).await;
    let admitted = samples.iter().filter(|sample| sample.is_admitted).count();
    let what = format!("{admitted} of {} requests over {workers} workers", samples.len());

    // Envoy's clock ran for no longer than the time around all of it.
    let longest = samples.last().expect("there was a load").answered;
    assert!(admitted as f64 <= burst + rate * longest, "{what} admitted in {longest} s");

    // Whenever one is refused the allowance is spent. So between two refusals all that was gained has been admitted,
    // unless it was more than a burst, which the load then did not ask for in time.
    let refusals: Vec<&Sample> = samples.iter().filter(|sample| !sample.is_admitted).collect();
    let (first, last) = (refusals.first().expect("the load exceeds the limit"), refusals.last().unwrap());
    let unasked: f64 =
        refusals.windows(2).map(|pair| (rate * (pair[1].answered - pair[0].sent) - burst).max(0.0)).sum();
    let gained = rate * (last.sent - first.answered) - unasked;
    let between = samples.iter().filter(|sample| sample.is_admitted);
    let between = between.filter(|sample| sample.answered >= first.sent && sample.sent <= last.answered).count();
    assert!(between as f64 >= 0.99 * gained - 1.0 - stranded, "{what}, {between} of {gained} between two refusals");

    assert_eq!(world.v1.count(), admitted, "what was refused reached no upstream");
    assert_eq!(world.metric("route.api.limit.all.refused").await, refusals.len() as u64);
    assert_eq!(world.metric("state.contended").await, 0);
    world.assert_no_trap().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_is_exact_under_load_with_two_workers() {
    needs_envoy!();
    assert_exact(2, 100.0, 100.0, 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_is_exact_under_load_with_four_workers() {
    needs_envoy!();
    assert_exact(4, 100.0, 100.0, 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leased_limit_is_exact_under_load_with_four_workers() {
    needs_envoy!();
    // A worker holds 2 of the burst at most.
    assert_exact(4, 100.0, 1024.0, 4.0 * 2.0).await;
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

#[tokio::test]
async fn a_client_is_told_what_is_left() {
    needs_envoy!();
    let limit = r#"{"name": "all", "limit": {"requestsPerUnit": 3, "unit": "hour"},
        "response": {"problemDetails": true, "headers": {"x-docs": "https://example.com/"},
                     "enableXRatelimitHeaders": "DRAFT_VERSION_03", "enableRateLimitFields": true}}"#;
    let world = World::start(&limited(limit)).await;
    world.v1.set_behaviour(Behaviour::echo().header("ratelimit", "\"db\";r=9;t=1"));
    let client = world.spreading_client();
    for remaining in [2, 1, 0] {
        let admitted = client.send(Request::get("/")).await;
        assert_eq!(admitted.status, 200, "{admitted:?}");
        assert_eq!(admitted.header("x-ratelimit-limit"), Some("3, 3;w=3600;name=\"all\""));
        assert_eq!(admitted.header("x-ratelimit-remaining"), Some(&*remaining.to_string()), "{admitted:?}");
        assert_eq!(admitted.header("ratelimit-policy"), Some("\"all\";q=3;w=3600"));
        let fields: Vec<_> =
            admitted.headers.get_all("ratelimit").iter().map(|field| field.to_str().unwrap()).collect();
        assert_eq!(fields.len(), 2, "the upstream's own stays: {fields:?}");
        assert!(fields[1].starts_with(&format!("\"all\";r={remaining};t=")), "{fields:?}");
    }
    let refused = client.send(Request::get("/")).await;
    assert_eq!(refused.status, 429, "{refused:?}");
    assert_eq!(refused.header("content-type"), Some("application/problem+json"));
    assert_eq!(refused.header("x-docs"), Some("https://example.com/"));
    assert_eq!(refused.header("x-ratelimit-remaining"), Some("0"));
    assert_eq!(refused.header("x-ratelimit-reset"), refused.header("retry-after"));
    assert_eq!(refused.headers.get_all("ratelimit").iter().count(), 1, "told once: {refused:?}");
    assert_eq!(refused.json()["violated-policies"], json!(["all"]));
    assert_eq!(refused.header("content-length"), Some(&*refused.body.len().to_string()));
    world.assert_no_trap().await;
}

#[tokio::test]
async fn only_failed_attempts_are_charged() {
    needs_envoy!();
    let limit = r#"{"name": "attempts", "limit": {"requestsPerUnit": 3, "unit": "hour"},
        "key": [{"header": "x-user-id"}], "charge": {"onResponse": {"statuses": [401, "5xx"]}}}"#;
    let world = World::start(&limited(limit)).await;
    let client = world.spreading_client();
    let ask = async |user: &str| client.send(Request::get("/").header("x-user-id", user)).await.status.as_u16();
    for n in 0..10 {
        assert_eq!(ask("ann").await, 200, "request {n} succeeds and costs nothing");
    }
    world.v1.set_behaviour(Behaviour::echo().status(401));
    let mut answers = Vec::new();
    for _ in 0..6 {
        answers.push(ask("ann").await);
    }
    assert_eq!(answers, [401, 401, 401, 429, 429, 429]);
    world.v1.set_behaviour(Behaviour::echo());
    assert_eq!((ask("ann").await, ask("bob").await), (429, 200));

    // What Envoy answers because the upstream broke off is a failure too.
    world.v1.set_behaviour(Behaviour::reset());
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(ask("cid").await);
    }
    assert_eq!(answers, [503, 503, 503, 429]);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn trusted_hops_are_those_of_envoy() {
    needs_envoy!();
    // Envoy's own view of the client beside ours: they count the same requests, whatever is forged.
    let limit = |name: &str, address: &str| {
        format!(
            r#"{{"name": "{name}", "mode": "shadow", "limit": {{"requestsPerUnit": 2, "unit": "hour"}},
                 "key": [{{"sourceAddress": {address}}}]}}"#
        )
    };
    for use_remote_address in [true, false] {
        for hops in [0, 1, 2] {
            let ours = limit("ours", &format!(r#"{{"xffNumTrustedHops": {hops}}}"#));
            let listener = listener(&limited(&format!("{}, {ours}", limit("envoys", "{}"))))
                .manager("use_remote_address", json!(use_remote_address))
                .manager("xff_num_trusted_hops", json!(hops));
            let world = World::behind(listener, Setup::default()).await;
            let client = world.spreading_client();
            for n in 0..4 {
                for forwarded in [
                    format!("6.6.6.{n}"),
                    format!("6.6.{n}.6, 192.0.2.1"),
                    format!("6.6.{n}.6, 192.0.2.1,198.51.100.7"),
                ] {
                    let response = client.send(Request::get("/").header("x-forwarded-for", &forwarded)).await;
                    assert_eq!(response.status, 200, "{forwarded}");
                }
            }
            let envoys = world.metric("route.api.limit.envoys.refused").await;
            let ours = world.metric("route.api.limit.ours.refused").await;
            assert_eq!(ours, envoys, "{hops} trusted hops, use_remote_address {use_remote_address}");
            assert!(envoys > 0, "{hops} trusted hops, use_remote_address {use_remote_address}: nothing was counted");
        }
    }
}

#[tokio::test]
async fn keys_come_from_claims_and_are_hashed() {
    needs_envoy!();
    let limits = r#"{"name": "per-tier", "limit": {"requestsPerUnit": 2, "unit": "hour"}, "onMissing": "skip",
            "key": [{"property": ["metadata", "filter_metadata", "envoy.filters.http.jwt_authn", "claims", "tier"]}],
            "overrides": [{"match": "premium", "limit": {"requestsPerUnit": 4, "unit": "hour"}}]},
        {"name": "per-user", "limit": {"requestsPerUnit": 3, "unit": "hour"}, "onMissing": "skip",
         "key": [{"header": "x-user-id"}]}"#;
    let keys = r#"{"keys": [{"kty": "oct", "alg": "HS256", "kid": "k",
        "k": "YSBzZWNyZXQgb2YgdGhlIHRlc3RzLCAzMiBieXRlcy4"}]}"#;
    let claims = json!({
        "name": "claims",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
            "providers": {"tests": {
                "issuer": "tests",
                "local_jwks": {"inline_string": keys},
                "payload_in_metadata": "claims",
            }},
            "rules": [{
                "match": {"prefix": "/"},
                "requires": {"requires_any": {"requirements": [{"provider_name": "tests"}, {"allow_missing": {}}]}},
            }],
        },
    });
    let world = World::behind(Listener::new("inbound").filter(claims).policy(&limited(limits)), Setup::default()).await;
    let client = world.spreading_client();
    let admitted = async |name: &str, value: &str| {
        let mut count = 0;
        for _ in 0..6 {
            let response = client.send(Request::get("/").header(name, value)).await;
            count += usize::from(response.status == 200);
        }
        count
    };
    // {"iss": "tests", "tier": "free"} and "premium", signed with the key above.
    let free = "Bearer eyJhbGciOiJIUzI1NiIsImtpZCI6ImsifQ.eyJpc3MiOiJ0ZXN0cyIsInRpZXIiOiJmcmVlIn0.\
                HPeyk7zF2qMv9tTVXv3lthb8Wbpjd0ndii07x9Jm0d0";
    let premium = "Bearer eyJhbGciOiJIUzI1NiIsImtpZCI6ImsifQ.eyJpc3MiOiJ0ZXN0cyIsInRpZXIiOiJwcmVtaXVtIn0.\
                   2UIYdMZAxgcsW-LgIMKOEZ4e9zNcx93di548TXgxpY8";
    assert_eq!(admitted("authorization", free).await, 2);
    assert_eq!(admitted("authorization", premium).await, 4, "of tier premium");
    assert_eq!(admitted("x-none", "").await, 6, "a request without a token is not asked");
    assert_eq!(world.metric("route.api.limit.per-tier.incomplete").await, 6);
    let long = "u".repeat(58 * 1024);
    assert_eq!(admitted("x-user-id", &long).await, 3, "a key of 58 KB");
    assert_eq!(admitted("x-user-id", &long[1..]).await, 3, "another");
    world.assert_no_trap().await;
}
