//! The examples, applied as their READMEs say: what one is told to expect is what happens.

use crate::manifests::render;
use crate::mesh::{Mesh, call, settled};
use crate::tools::{answer, needs_istio};
use serde_json::Value;
use std::process::Command;
use std::time::Instant;
use trimtab_testbed::{Behaviour, Client, Envoy, Request, repository};

const METRICS: &str = "wasmcustom.trimtab.policy";

/// A call of user-service by a user.
fn by(user: &str) -> Request {
    call("/").header("x-user-id", user)
}

/// How many of a request are admitted before the first is refused, where `burst` are admitted at once and `rate` more a
/// second: no fewer, and no more than the time that passed allows.
pub async fn assert_limit(client: &Client, request: Request, burst: u32, rate: f64) {
    let begin = Instant::now();
    let mut admitted = 0;
    loop {
        let response = client.send(request.clone()).await;
        if response.status == 429 {
            assert!(response.header("retry-after").is_some(), "{response:?}");
            break;
        }
        assert_eq!(response.status, 200, "request {admitted}: {response:?}");
        admitted += 1;
        assert!(admitted < 10 * burst, "{admitted} were admitted, {burst} at once were to be");
    }
    let most = burst + (rate * begin.elapsed().as_secs_f64()) as u32 + 1;
    assert!((burst..=most).contains(&admitted), "{admitted} were admitted, {burst} to {most} were to be");
}

/// That the filters whose names contain these follow one another in each connection manager that has them all.
async fn assert_order(envoy: &Envoy, names: &[&str]) {
    let mut managers = Vec::new();
    collect_filters(&envoy.config_dump().await, &mut managers);
    let place = |manager: &[String], name: &str| manager.iter().position(|filter| filter.contains(name));
    let places = managers.iter().map(|manager| names.iter().map(|name| place(manager, name)).collect());
    let complete: Vec<Vec<usize>> = places.flat_map(|places: Option<Vec<usize>>| places).collect();
    assert!(!complete.is_empty(), "no connection manager has {names:?}: {managers:?}");
    assert!(complete.iter().all(|places| places.is_sorted()), "{names:?} stand in another order: {managers:?}");
}

/// The names of the HTTP filters of each connection manager.
fn collect_filters(value: &Value, managers: &mut Vec<Vec<String>>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| collect_filters(item, managers)),
        Value::Object(fields) => {
            if let Some(filters) = fields.get("http_filters").and_then(Value::as_array) {
                managers
                    .push(filters.iter().map(|filter| filter["name"].as_str().unwrap_or_default().into()).collect());
            }
            fields.values().for_each(|field| collect_filters(field, managers));
        }
        _ => {}
    }
}

#[tokio::test]
async fn header_canary() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/examples/header-canary"));
    let _envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    settled("testers to be on v2", &client, call("/").header("x-canary", "true"), |r| r.version() == "v2").await;
    // Where users stand is known beforehand.
    let users: Vec<String> = (0..60).map(|user| format!("user-{user}")).collect();
    let mut cohort = Command::new(env!("CARGO_BIN_EXE_trimtab"));
    cohort.args(["cohort", "--rollout", "2026-11-new-ranking"]).args(&users);
    let places = answer(&mut cohort, "").unwrap();
    let mut on_v2 = 0;
    for line in places.lines() {
        let (place, user) = line.split_once('\t').unwrap();
        let expected = if place.trim().parse::<u32>().unwrap() < 100_000 { "v2" } else { "v1" };
        assert_eq!(client.send(by(user)).await.version(), expected, "{line}");
        on_v2 += usize::from(expected == "v2");
    }
    assert!(on_v2 > 0, "of these users none is on v2:\n{places}");
    let chosen = client.send(by("ann").header("x-trimtab-subset", "v2")).await;
    assert_eq!(chosen.version(), "v1", "ann stands at 114621: {chosen:?}");
}

#[tokio::test]
async fn experiment() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/examples/experiment"));
    let envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    let request = by("ann").header("experiment", "new-algorithm");
    settled("the experiment to be on v2", &client, request, |response| response.version() == "v2").await;
    envoy.wait_for_stat(&format!("{METRICS}.user-service.route.new-algorithm.subset.v2.requests"), |n| n > 0).await;
    let mut on_v2 = 0;
    for user in 0..200 {
        let request = by(&format!("user-{user}")).header("experiment", "another");
        on_v2 += usize::from(client.send(request).await.version() == "v2");
    }
    assert!((1..=30).contains(&on_v2), "of 200 users {on_v2} are on v2, with a weight of 5 %");
}

#[tokio::test]
async fn staged_canary() {
    needs_istio!();
    let mesh = Mesh::start().await;
    // The command of the README, on what is rendered.
    let rendered = render("istio/examples/staged-canary");
    let edit = r#"sed "s/startTime: .*/startTime: \"$(date -u +%FT%TZ)\"/""#;
    let begun = answer(Command::new("sh").args(["-c", edit]), &rendered).unwrap();
    assert_ne!(begun, rendered);
    mesh.apply(&begun);
    let envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    let rollout = format!("{METRICS}.user-service.route.default.rollout.2026-11-new-ranking");
    settled("the policy", &client, by("ann"), |response| response.status == 200).await;
    envoy.wait_for_stat(&format!("{rollout}.weight_ppm"), |weight| weight == 50_000).await;

    mesh.v2.set_behaviour(Behaviour::echo().status(500));
    let mut asked = 0;
    while envoy.stat(&format!("{rollout}.judge.failed")).await != Some(1) {
        for _ in 0..20 {
            client.send(by(&format!("user-{asked}"))).await;
            asked += 1;
        }
        assert!(asked < 2_000, "v2 fails always, and after {asked} requests it is not taken back");
    }
    envoy.wait_for_log("canary verdict: route=\"default\" rollout=\"2026-11-new-ranking\" verdict=fail").await;
    let before = mesh.v2.count();
    for user in 0..200 {
        assert_eq!(client.send(by(&format!("user-{user}"))).await.version(), "v1", "after the verdict: user-{user}");
    }
    assert_eq!(mesh.v2.count(), before);
}

#[tokio::test]
async fn outlier_detection() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/examples/outlier-detection"));
    let envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    let fault = format!("{METRICS}.user-service.route.default.fault");
    settled("the policy", &client, call("/"), |response| response.status == 200).await;
    // A response is slow by the delay at least; those that are not delayed are not counted. What was asked until the
    // policy arrived may have been delayed, too.
    let delays = async || envoy.stat(&format!("{fault}.delays")).await.unwrap_or(0);
    let before = envoy.module_metric(&format!("{fault}.delays")).await.unwrap_or(0);
    let mut slow = 0;
    while delays().await < before + 3 {
        slow += usize::from(client.send(call("/")).await.elapsed.as_millis() >= 300);
    }
    assert!(slow >= 3, "three requests were delayed, {slow} were slow");
    let clusters = envoy.config_dump().await["configs"][1].to_string();
    for field in [
        r#""consecutive_5xx":5"#,
        r#""interval":"30s""#,
        r#""base_ejection_time":"30s""#,
        r#""max_ejection_percent":50"#,
    ] {
        assert!(clusters.contains(field), "{field} is not in {clusters}");
    }
    mesh.v1.set_behaviour(Behaviour::echo().status(500));
    for _ in 0..400 {
        client.send(call("/")).await;
        if envoy.stat(&format!("{fault}.suspended")).await > Some(0) {
            return;
        }
    }
    panic!("the service fails always, and faults go on: {:?}", envoy.stats(&fault).await);
}

#[tokio::test]
async fn circuit_breaking() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/examples/circuit-breaking"));
    let envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    settled("the policy", &client, call("/"), |response| response.status == 200).await;
    envoy.wait_for_stat(&format!("{METRICS}.user-service.route.default.breaker.state"), |state| state == 0).await;
    mesh.v1.set_behaviour(Behaviour::echo().status(500));
    mesh.v2.set_behaviour(Behaviour::echo().status(500));
    for asked in 0..200 {
        let response = client.send(call("/")).await;
        if response.status == 503 {
            assert!(response.header("retry-after").is_some(), "{response:?}");
            assert!(response.text().contains("circuit breaker"), "{response:?}");
            envoy.wait_for_log("circuit breaker: route=\"default\" state=open").await;
            return;
        }
        assert_eq!(response.status, 500, "request {asked}: {response:?}");
    }
    panic!("the service fails always, and the circuit is closed: {:?}", envoy.stats(METRICS).await);
}

/// The token of a user, from the README.
fn token(user: &str) -> String {
    let readme = std::fs::read_to_string(repository().join("istio/examples/user-limit/README.md")).unwrap();
    let (_, token) = readme.split_once(&format!("$ {user}=")).unwrap();
    format!("Bearer {}", token.lines().next().unwrap())
}

#[tokio::test]
async fn user_limit() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/examples/user-limit"));
    let client = mesh.listen_inbound("user-service", mesh.v1.address());
    let envoy = mesh.sidecar("user-service").await;
    let of = |user: &str| Request::get("/").header("authorization", token(user));
    settled("a user to be served", &client, of("BOB"), |response| response.status == 200).await;
    assert_eq!(mesh.v1.next_request().await.header("x-user-id"), Some("bob"), "Istio writes the header");
    assert_eq!(client.send(Request::get("/")).await.status, 403, "no token");
    assert_eq!(client.send(of("ANN").header("authorization", "Bearer a.b.c")).await.status, 401, "no good token");
    assert_limit(&client, of("ANN"), 100, 100.0 / 60.0).await;
    let spoofed = client.send(of("ANN").header("x-user-id", "bob")).await;
    assert_eq!(spoofed.status, 429, "ann in bob's name: {spoofed:?}");
    assert_eq!(client.send(of("BOB")).await.status, 200);
    assert_order(&envoy, &["jwt_authn", "rbac", "user-service-limit", "fault", "cors", "router"]).await;
    let refused = format!("{METRICS}.user-service.route.all.limit.per-user.refused");
    envoy.wait_for_stat(&refused, |count| count >= 2).await;
}

#[tokio::test]
async fn trace_bridge() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/examples/trace-bridge"));
    // v2 is the application here, and v1 whom it calls.
    let inbound = mesh.listen_inbound("storefront", mesh.v2.address());
    mesh.apply(&render("istio/routing"));
    let envoy = mesh.sidecar("storefront").await;
    let outbound = mesh.outbound();
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let request = |id: &str| {
        Request::get("/")
            .header("x-request-id", id)
            .header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"))
            .header("baggage", "tenant=acme")
    };
    settled("the application to answer", &inbound, request("first"), |response| response.version() == "v2").await;
    envoy.wait_for_stat(&format!("{METRICS}.storefront.trace.valid"), |count| count > 0).await;
    mesh.v2.clear();
    inbound.send(request("4711")).await;
    let served = mesh.v2.next_request().await;
    let copied = call("/").header("x-request-id", served.header("x-request-id").unwrap());
    assert_eq!(outbound.send(copied).await.version(), "v1");
    let made = mesh.v1.next_request().await;
    let traceparent = made.header("traceparent").unwrap_or_default();
    assert!(
        traceparent.contains(trace),
        "{traceparent:?}, of a request that copied {:?}",
        served.header("x-request-id")
    );
    assert_eq!(made.header("baggage"), Some("tenant=acme"));
    envoy.wait_for_stat(&format!("{METRICS}.storefront.outbound.trace.bridged"), |count| count > 0).await;
}

#[tokio::test]
async fn api_gateway() {
    needs_istio!();
    let mesh = Mesh::start().await;
    let client = mesh.listen_at_gateway(&render("istio/examples/api-gateway"));
    let envoy = mesh.gateway().await;
    let ask = |path: &str, key: &str| Request::get(path).authority("api.example.com").header("x-api-key", key);
    settled("the gateway", &client, ask("/api/user-service/users/7", "k0"), |response| response.status == 200).await;
    envoy.wait_for_stat(&format!("{METRICS}.api.unmatched"), |_| true).await;
    mesh.v1.clear();
    mesh.v2.clear();
    let response = client.send(ask("/api/user-service/users/7", "k1")).await;
    let upstream = if response.version() == "v2" { &mesh.v2 } else { &mesh.v1 };
    assert_eq!(upstream.next_request().await.path, "/users/7");
    for key in ["k1", "k2", "k3"] {
        let again = async || client.send(ask("/api/user-service/", key)).await.version().to_owned();
        assert_eq!(again().await, again().await, "{key}");
    }
    assert_limit(&client, ask("/api/user-service/", "k4"), 50, 10.0).await;
    // There is no order-service here: what matters is that its allowance is another.
    assert_ne!(client.send(ask("/api/order-service/", "k4")).await.status, 429);
    assert_eq!(client.send(ask("/elsewhere", "k4")).await.status, 404);
}
