//! Thousands of streams that are let go at once: held by an experiment or waiting for a rate limit service, with every
//! kind of answer that Envoy gives before the filter has returned. Each stream ends, and the module goes on.

use crate::world::{World, listener, policy};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use trimtab_testbed::{
    Bootstrap, Burst, Envoy, Launcher, Listener, Outcome, Outcomes, RateLimit, Redis, Request, Update, Upstream,
    cluster_of, eventually, http2_cluster, needs_envoy, needs_ratelimit, pipe_cluster, raise_descriptor_limit,
    wasm_filter,
};

/// How long a burst may take. A machine that also compiles needs a part of it.
const LONG: Duration = Duration::from_secs(120);

/// Requests on one connection: fewer than the streams that Envoy allows by default, 1,024.
const CHUNK: usize = 1000;

/// The most streams that one worker holds.
const MOST_HELD: usize = 10_000;

const ACTIVE: &str = "http.inbound.downstream_rq_active";

/// Where the streams go that are let go, by their path, and the status that comes back.
const WAYS: [(&str, u16); 4] = [("/", 200), ("/direct", 200), ("/no-host", 503), ("/overflow", 503)];

/// One route for each of [`WAYS`].
fn routes() -> Value {
    let to = |path: &str, cluster: &str| json!({"name": cluster, "match": {"prefix": path}, "route": {"cluster": cluster, "timeout": "60s"}});
    json!([
        {"name": "direct", "match": {"prefix": "/direct"},
         "direct_response": {"status": 200, "body": {"inline_string": "direct"}}},
        to("/no-host", "no-host"),
        to("/overflow", "overflow"),
        to("/narrow", "narrow"),
        to("/", "v1"),
    ])
}

/// `cluster` with room for so many requests at once.
fn with_room(mut cluster: Value, requests: u32) -> Value {
    cluster["circuit_breakers"] = json!({"thresholds": [
        {"max_connections": requests.max(1), "max_pending_requests": requests, "max_requests": requests},
    ]});
    cluster
}

/// An upstream that takes all that come, on as many connections as that needs: its server allows fewer streams on one
/// than Envoy would open before it knows that.
fn roomy(name: &str, upstream: &Upstream) -> Value {
    let mut cluster = with_room(http2_cluster(name, upstream.address()), 1_000_000);
    let options =
        &mut cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
    options["explicit_http_config"]["http2_protocol_options"]["max_concurrent_streams"] = json!(100);
    cluster
}

/// An Envoy of one worker, which holds all streams.
async fn world(listener: Listener, more: impl FnOnce(Bootstrap) -> Bootstrap) -> World {
    raise_descriptor_limit();
    let (v1, v2) = (Upstream::start("v1").await, Upstream::start("v2").await);
    let bootstrap = Bootstrap::new()
        .listener(listener.routes(routes()))
        .cluster(roomy("v1", &v1))
        .cluster(with_room(http2_cluster("narrow", v2.address()), 20))
        .cluster(with_room(http2_cluster("overflow", v2.address()), 0))
        .cluster(cluster_of("no-host", &[]));
    let envoy = Envoy::options().launcher(Launcher::Direct).concurrency(1).quiet().start(&more(bootstrap)).await;
    World { envoy, v1, v2 }
}

/// Sends `count` requests over HTTP/2.
async fn send(world: &World, count: usize, request: &Request) -> Burst {
    assert_eq!(count % CHUNK.min(count), 0, "every connection has as many");
    Burst::http2(world.envoy.address("inbound"), count.div_ceil(CHUNK), count.min(CHUNK), request).await
}

/// The delay of experiments.
const DELAY: Duration = Duration::from_secs(2);

/// How requests end that are held for [`DELAY`]: Envoy stands still until it is over, so that they are due at once.
/// Where they come so slowly that the first are let go before, only the last are.
async fn due_at_once(world: &World, held: Burst) -> Outcomes {
    world.envoy.pause();
    tokio::time::sleep(DELAY).await;
    world.envoy.resume();
    held.outcomes(LONG).await
}

/// Waits until so many requests have come in all.
async fn arrived(world: &World, count: usize) {
    world.envoy.wait_for_stat("http.inbound.downstream_rq_total", |total| total >= count as u64).await;
}

async fn arrivals(world: &World) -> usize {
    world.envoy.stat("http.inbound.downstream_rq_total").await.unwrap_or(0) as usize
}

/// Sends requests that are held for [`DELAY`], and lets them be due at once.
async fn held(world: &World, count: usize, request: &Request) -> Outcomes {
    let before = arrivals(world).await;
    let held = send(world, count, request).await;
    arrived(world, before + count).await;
    due_at_once(world, held).await
}

#[track_caller]
fn assert_all(outcomes: &Outcomes, count: usize, expected: Outcome, case: &str) {
    assert_eq!(outcomes.count(expected), count, "{case}: expected {count} {expected:?}, found {outcomes}");
    assert_eq!(outcomes.total(), count, "{case}: {outcomes}");
}

/// That the module serves on as it did before.
async fn assert_sound(world: &World, case: &str) {
    let response = world.client().send(Request::get("/")).await;
    assert_eq!(response.status, 200, "{case}: the next request: {response:?}");
    assert_eq!(world.envoy.stat("server.live").await, Some(1), "{case}");
    world.assert_no_trap().await;
}

const LIMITS: &str = "
domain: shop
descriptors:
- key: x-open
  rate_limit: {unit: hour, requests_per_unit: 1000000}
- key: x-few
  rate_limit: {unit: hour, requests_per_unit: 10}
- key: x-closed
  rate_limit: {unit: hour, requests_per_unit: 0}
";

/// The requests that wait for one call. A worker lets 1,024 wait.
const WAITING: usize = 1000;

/// A global limit for requests that have the header `key`.
fn limited(key: &str, limit: u32, service: &str) -> String {
    format!(
        r#"{{"name": "{key}", "match": [{{"headers": {{"{key}": {{}}}}}}],
             "rateLimits": [{{"name": "fleet", "scope": "global",
                "limit": {{"requestsPerUnit": {limit}, "unit": "hour"}}, "key": [{{"header": "{key}"}}],
                "service": {{"cluster": "rate_limit_cluster", "domain": "shop", {service}}}}}]}}"#
    )
}

/// A world whose requests with the headers of [`LIMITS`] wait for `service`, which has so long to answer.
async fn waiting_world(service: &RateLimit, terms: &str) -> World {
    let [open, few, closed] =
        [("x-open", 1_000_000), ("x-few", 10), ("x-closed", 10)].map(|(key, limit)| limited(key, limit, terms));
    let policy = policy(&format!(r#"{open}, {few}, {closed}, {{"name": "default"}}"#), "");
    let socket = service.socket();
    world(listener(&policy), |bootstrap| bootstrap.cluster(pipe_cluster("rate_limit_cluster", &socket))).await
}

/// That no request was turned away because too many waited, and that none waits any more.
async fn assert_none_waits(world: &World) {
    for key in ["x-open", "x-few", "x-closed"] {
        let crowded = world.metric(&format!("route.{key}.limit.fleet.service.crowded")).await;
        assert_eq!(crowded, 0, "{key}: requests that were not allowed to wait");
    }
    world.envoy.wait_for_stat(ACTIVE, |active| active == 0).await;
}

/// Sends requests of one user while the service does not run, and lets it run once all of them wait.
async fn released(world: &World, service: &RateLimit, request: &Request) -> Outcomes {
    service.pause();
    let burst = send(world, WAITING, request).await;
    world.envoy.wait_for_stat(ACTIVE, |active| active == WAITING as u64).await;
    service.resume();
    burst.outcomes(LONG).await
}

/// Longer than a thousand requests take to arrive.
const PATIENT: &str = r#""timeout": "10s", "onFailure": "deny""#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_wait_for_a_service_that_admits_them() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let world = waiting_world(&service, &format!(r#"{PATIENT}, "batch": 1000"#)).await;
    for (path, status) in WAYS {
        let request = Request::get(path).header("x-open", format!("user of {path}"));
        let outcomes = released(&world, &service, &request).await;
        assert_all(&outcomes, WAITING, Outcome::Answered(status), path);
        assert_sound(&world, path).await;
    }
    assert_none_waits(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_wait_for_a_service_that_refuses_them() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let world = waiting_world(&service, PATIENT).await;
    let request = Request::get("/").header("x-closed", "ann");
    let outcomes = released(&world, &service, &request).await;
    assert_all(&outcomes, WAITING, Outcome::Answered(429), "a closed limit");
    assert_sound(&world, "a closed limit").await;

    let outcomes = released(&world, &service, &Request::get("/").header("x-few", "ann")).await;
    let admitted = outcomes.count(Outcome::Answered(200));
    // Twice as many where a new hour has begun meanwhile.
    assert!((1..=20).contains(&admitted), "10 of {WAITING} are admitted: {outcomes}");
    assert_eq!(outcomes.count(Outcome::Answered(429)), WAITING - admitted, "all others are refused: {outcomes}");
    assert_sound(&world, "a small limit").await;
    assert_none_waits(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_wait_for_a_service_that_hangs_and_are_denied() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let world = waiting_world(&service, r#""timeout": "1s", "onFailure": "deny""#).await;
    service.pause();
    for round in ["ann", "bob"] {
        let burst = send(&world, WAITING, &Request::get("/").header("x-few", round)).await;
        assert_all(&burst.outcomes(LONG).await, WAITING, Outcome::Answered(503), round);
        assert_sound(&world, round).await;
    }
    assert_none_waits(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_wait_for_a_service_that_hangs_and_are_allowed() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let world = waiting_world(&service, r#""timeout": "1s", "onFailure": "allow""#).await;
    service.pause();
    for (path, status) in WAYS {
        let request = Request::get(path).header("x-few", format!("user of {path}"));
        let burst = send(&world, WAITING, &request).await;
        assert_all(&burst.outcomes(LONG).await, WAITING, Outcome::Answered(status), path);
        assert_sound(&world, path).await;
    }
    assert_none_waits(&world).await;
}

/// Experiments of which exactly as many requests may be faulted at once as the tests send, so that one whose place is
/// not given back leaves a later one without a fault.
fn experiments() -> String {
    let fault = |name: &str, fault: &str| {
        format!(
            r#"{{"name": "{name}", "match": [{{"headers": {{"x-experiment": {{"exact": "{name}"}}}}}}],
                 "fault": {{{fault}, "maxActive": {MOST_HELD}}}}}"#
        )
    };
    let delay = |time: &str| format!(r#""delay": {{"percentage": {{"value": 100}}, "fixedDelay": "{time}"}}"#);
    let whole = r#""percentage": {"value": 100}"#;
    let routes = [
        fault("asked", &format!(r#""headerControl": true, {}, "abort": {{{whole}}}"#, delay("24h"))),
        fault("reset", &format!(r#"{}, "abort": {{{whole}, "reset": true}}"#, delay("2s"))),
        fault("early", &format!(r#"{}, "abort": {{{whole}, "reset": true}}"#, delay("1s"))),
        fault("replaced", &format!(r#"{}, "response": {{{whole}, "httpStatus": 418}}"#, delay("2s"))),
        r#"{"name": "default"}"#.to_owned(),
    ];
    policy(&routes.join(", "), "")
}

async fn held_world() -> World {
    world(listener(&experiments()), |bootstrap| bootstrap).await
}

fn experiment(name: &str, path: &str) -> Request {
    Request::get(path).header("x-experiment", name)
}

/// A request that asks to be held for so long.
fn asked(path: &str, milliseconds: u32) -> Request {
    experiment("asked", path).header("x-envoy-fault-delay-request", milliseconds.to_string())
}

/// That `delays` requests of an experiment were delayed in all, and that none was left without a fault.
async fn assert_faulted(world: &World, experiment: &str, delays: usize, case: &str) {
    let metric = async |name: &str| world.metric(&format!("route.{experiment}.fault.{name}")).await;
    assert_eq!(metric("overflow").await, 0, "{case}: requests for which the worker had no room");
    assert_eq!(metric("max_active").await, 0, "{case}: requests that found no free place");
    assert_eq!(metric("delays").await, delays as u64, "{case}: delays");
}

/// That ten thousand requests of an experiment all end as expected, and that as many can be faulted afterwards: what the
/// first have taken was given back.
async fn hold(world: &World, name: &str, request: &Request, expected: Outcome) {
    let outcomes = held(world, MOST_HELD, request).await;
    assert_all(&outcomes, MOST_HELD, expected, name);
    assert_faulted(world, name, MOST_HELD, name).await;
    assert_sound(world, name).await;
    let again = send(world, MOST_HELD, request).await;
    arrived(world, 2 * MOST_HELD + 1).await;
    assert_faulted(world, name, 2 * MOST_HELD, name).await;
    again.leave().await;
    world.envoy.wait_for_stat(ACTIVE, |active| active == 0).await;
    assert_sound(world, name).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_are_held_and_go_on() {
    needs_envoy!();
    let world = held_world().await;
    for (at, (path, status)) in WAYS.into_iter().enumerate() {
        let outcomes = held(&world, MOST_HELD, &asked(path, 2000)).await;
        assert_all(&outcomes, MOST_HELD, Outcome::Answered(status), path);
        assert_faulted(&world, "asked", (at + 1) * MOST_HELD, path).await;
        assert_sound(&world, path).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_are_held_and_aborted() {
    needs_envoy!();
    let world = held_world().await;
    let aborted = asked("/", 2000).header("x-envoy-fault-abort-request", "503");
    hold(&world, "asked", &aborted, Outcome::Answered(503)).await;
    assert_eq!(world.metric("route.asked.fault.aborts").await, 2 * MOST_HELD as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_are_held_and_reset() {
    needs_envoy!();
    let world = held_world().await;
    hold(&world, "reset", &experiment("reset", "/"), Outcome::Reset(INTERNAL_ERROR)).await;
    assert_eq!(world.metric("route.reset.fault.resets").await, 2 * MOST_HELD as u64);
}

/// HTTP/2's error code of a stream that a filter of Envoy's has closed.
const INTERNAL_ERROR: u32 = 2;

/// Envoy closes a connection, and all of its streams, in the midst of the 250th reset of a stream that is younger than
/// two seconds (`overload.premature_reset_total_stream_count`). What else is let go in the same call to the module then
/// acts on streams that are gone: Envoy 1.40 accesses memory that it has freed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_survives_that_it_closes_a_connection_for_its_resets() {
    needs_envoy!();
    let world = held_world().await;
    for round in 1..=3 {
        let case = format!("round {round}");
        let outcomes = send(&world, CHUNK, &experiment("early", "/")).await.outcomes(LONG).await;
        let ended = outcomes.count(Outcome::Reset(INTERNAL_ERROR)) + outcomes.count(Outcome::Closed);
        assert_eq!(
            ended, CHUNK,
            "{case}: expected {CHUNK} that are reset, or closed with their connection: {outcomes}"
        );
        assert_sound(&world, &case).await;
        world.envoy.wait_for_stat(ACTIVE, |active| active == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_are_held_and_their_answers_replaced() {
    needs_envoy!();
    let world = held_world().await;
    hold(&world, "replaced", &experiment("replaced", "/"), Outcome::Answered(418)).await;
    assert!(world.metric("route.replaced.fault.responses").await >= MOST_HELD as u64);
    assert!(world.v1.count() >= MOST_HELD, "the upstream did the work");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_suspends_while_ten_thousand_are_held() {
    needs_envoy!();
    let policy = policy(
        &format!(
            r#"{{"name": "experiment", "match": [{{"headers": {{"x-experiment": {{}}}}}}],
                 "fault": {{"delay": {{"percentage": {{"value": 100}}, "fixedDelay": "24h"}}, "maxActive": {MOST_HELD},
                            "guard": {{"errorRate": "100%", "minRequests": 5, "window": "5s", "holdDown": "1s"}}}},
                 "route": [{{"destination": {{"host": "user-service", "subset": "v1"}}}}]}},
               {{"name": "default", "route": [{{"destination": {{"host": "user-service", "subset": "v1"}}}}]}}"#
        ),
        "",
    );
    let world = world(listener(&policy), |bootstrap| bootstrap).await;
    let held = send(&world, MOST_HELD, &Request::get("/narrow").header("x-experiment", "")).await;
    world.envoy.wait_for_stat(ACTIVE, |active| active == MOST_HELD as u64).await;
    // One request for which the cluster has no room is enough.
    let refused = world.client().send(Request::get("/overflow")).await;
    assert_eq!(refused.status, 503, "{refused:?}");
    let outcomes = held.outcomes(LONG).await;
    let (served, refused) = (outcomes.count(Outcome::Answered(200)), outcomes.count(Outcome::Answered(503)));
    assert_eq!(served + refused, MOST_HELD, "all go on, and get 200 or Envoy's 503: {outcomes}");
    assert!(served > 0, "the cluster has room for 20: {outcomes}");
    let state = "route.experiment.subset.v1.fault.state";
    assert_eq!(world.metric("route.experiment.fault.overflow").await, 0, "requests for which the worker had no room");
    eventually("the experiment to be armed again", async || {
        world.client().send(Request::get("/")).await;
        (world.gauge(state).await == 0).then_some(())
    })
    .await;
    // Each of the places is free again.
    let before = world.metric("route.experiment.fault.delays").await;
    let held = send(&world, MOST_HELD, &Request::get("/").header("x-experiment", "")).await;
    world.envoy.wait_for_stat(ACTIVE, |active| active == MOST_HELD as u64).await;
    assert_eq!(world.metric("route.experiment.fault.delays").await - before, MOST_HELD as u64);
    assert_eq!(world.metric("route.experiment.fault.max_active").await, 0);
    held.leave().await;
    world.envoy.wait_for_stat(ACTIVE, |active| active == 0).await;
    assert_sound(&world, "a guard that suspends").await;
}

async fn held_on_http1(world: &World, count: usize, request: &Request) -> Outcomes {
    let before = arrivals(world).await;
    let held = Burst::http1(world.envoy.address("inbound"), count, request).await;
    arrived(world, before + count).await;
    due_at_once(world, held).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_are_held_on_http1() {
    needs_envoy!();
    // The client has one descriptor for each request and Envoy another; some are left for all else.
    let descriptors = usize::try_from(raise_descriptor_limit()).unwrap_or(usize::MAX);
    let count = descriptors.saturating_sub(3000).min(5000);
    println!("{count} connections with {descriptors} descriptors");
    assert!(count >= 4000, "{descriptors} descriptors are too few: raise the hard limit of open files");
    let world = held_world().await;
    let aborted = asked("/", 2000).header("x-envoy-fault-abort-request", "503");
    let cases = [
        (asked("/", 2000), Outcome::Answered(200)),
        (asked("/direct", 2000), Outcome::Answered(200)),
        (aborted, Outcome::Answered(503)),
    ];
    for (round, (request, expected)) in cases.into_iter().enumerate() {
        let case = format!("round {round}");
        let outcomes = held_on_http1(&world, count, &request).await;
        assert_all(&outcomes, count, expected, &case);
        assert_faulted(&world, "asked", (round + 1) * count, &case).await;
        assert_sound(&world, &case).await;
    }
    let outcomes = held_on_http1(&world, count, &experiment("reset", "/")).await;
    assert_all(&outcomes, count, Outcome::Closed, "reset");
    assert_faulted(&world, "reset", count, "reset").await;
    assert_sound(&world, "reset").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delays_of_clients_that_left_leave_room() {
    needs_envoy!();
    const HOUR: u32 = 3_600_000;
    let world = held_world().await;
    for round in 1..=2 {
        let held = send(&world, MOST_HELD, &asked("/", HOUR)).await;
        arrived(&world, round * MOST_HELD).await;
        assert_faulted(&world, "asked", round * MOST_HELD, &format!("round {round}")).await;
        held.leave().await;
        world.envoy.wait_for_stat(ACTIVE, |active| active == 0).await;
    }
    let honest = world.client().send(asked("/", 100)).await;
    assert_eq!(honest.status, 200, "{honest:?}");
    assert!(honest.elapsed >= Duration::from_millis(100), "it is delayed: {honest:?}");
    assert_faulted(&world, "asked", 2 * MOST_HELD + 1, "an honest request").await;
    assert_sound(&world, "an honest request").await;
}

/// How many are held, and how many wait, while the configuration changes.
const UPDATED: (usize, usize) = (1000, 500);

/// An experiment, a global limit, and one more route for each policy to be another one.
fn updated(name: &str) -> String {
    let held = UPDATED.0;
    policy(
        &format!(
            r#"{{"name": "asked", "match": [{{"headers": {{"x-experiment": {{}}}}}}],
                 "fault": {{"headerControl": true, "maxActive": {held},
                            "delay": {{"percentage": {{"value": 100}}, "fixedDelay": "24h"}}}}}},
               {}, {{"name": "{name}"}}"#,
            limited("x-open", 1_000_000, PATIENT)
        ),
        "",
    )
}

/// Requests that are held for so long, and requests that wait for `service`.
async fn hold_and_wait(world: &World, service: &RateLimit, milliseconds: u32) -> (Burst, Burst) {
    service.pause();
    let (held, waiting) = UPDATED;
    let held_burst = send(world, held, &asked("/", milliseconds)).await;
    let waiting_burst = send(world, waiting, &Request::get("/").header("x-open", "ann")).await;
    // The first may be let go before the last have come, where requests come slowly.
    let arrived = (held + waiting) as u64;
    world.envoy.wait_for_stat("http.inbound.downstream_rq_total", |total| total >= arrived).await;
    (held_burst, waiting_burst)
}

/// That the module has been called when the first configuration had ended, which is when it gives back what it has.
async fn assert_unloaded(world: &World) {
    eventually("the end of the first configuration", async || {
        world.envoy.log().contains("policy user-service is unloaded").then_some(())
    })
    .await;
}

/// That the places of all that were held are free, by which they are taken again.
async fn assert_places_are_free(world: &World) {
    world.envoy.wait_for_stat(ACTIVE, |active| active == 0).await;
    let before = world.metric("route.asked.fault.delays").await;
    let outcomes = send(world, UPDATED.0, &asked("/", 1000)).await.outcomes(LONG).await;
    assert_all(&outcomes, UPDATED.0, Outcome::Answered(200), "the new configuration");
    assert_eq!(world.metric("route.asked.fault.delays").await - before, UPDATED.0 as u64);
    assert_eq!(world.metric("route.asked.fault.max_active").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_whose_filter_configuration_is_replaced() {
    needs_ratelimit!();
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let directory = tempfile::tempdir().expect("a temporary directory");
    deliver(directory.path(), 1, &updated("first"));
    let discovered = json!({
        "name": "trimtab",
        "config_discovery": {
            "config_source": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": directory.path().join("filter.json"),
                    "watched_directory": {"path": directory.path()},
                },
            },
            "type_urls": ["type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm"],
        },
    });
    let socket = service.socket();
    let world = world(Listener::new("inbound").filter(discovered), |bootstrap| {
        bootstrap.cluster(pipe_cluster("rate_limit_cluster", &socket))
    })
    .await;
    let reloads = "extension_config_discovery.http_filter.trimtab.config_reload";
    world.envoy.wait_for_stat(reloads, |reloads| reloads == 1).await;
    let (held, waiting) = hold_and_wait(&world, &service, 3000).await;
    deliver(directory.path(), 2, &updated("second"));
    world.envoy.wait_for_stat(reloads, |reloads| reloads == 2).await;
    // A connection of the new configuration.
    assert_eq!(world.client().send(Request::get("/")).await.status, 200);
    service.resume();
    assert_all(&waiting.outcomes(LONG).await, UPDATED.1, Outcome::Answered(200), "those that wait");
    assert_all(&held.outcomes(LONG).await, UPDATED.0, Outcome::Answered(200), "those that are held");
    assert_unloaded(&world).await;
    assert_places_are_free(&world).await;
    assert_sound(&world, "a new filter configuration").await;
}

/// Puts a policy where Envoy watches for the filter's configuration.
fn deliver(directory: &Path, version: u32, policy: &str) {
    let mut resource = wasm_filter("inbound", &trimtab_testbed::wasm(), policy);
    resource["@type"] = json!("type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig");
    let document = json!({"version_info": version.to_string(), "resources": [resource]});
    let next = directory.join("next");
    std::fs::write(&next, document.to_string()).expect("the directory can be written to");
    std::fs::rename(next, directory.join("filter.json")).expect("the directory can be written to");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_whose_listener_is_replaced() {
    needs_ratelimit!();
    const HOUR: u32 = 3_600_000;
    let redis = Redis::start().await;
    let service = RateLimit::start(&redis, LIMITS).await;
    let socket = service.socket();
    let mut world = world(listener(&updated("first")), |bootstrap| {
        bootstrap.dynamic().cluster(pipe_cluster("rate_limit_cluster", &socket))
    })
    .await;
    let (held, waiting) = hold_and_wait(&world, &service, HOUR).await;
    let second = listener(&updated("second")).routes(routes());
    assert_eq!(world.envoy.update(&[second]).await, Update::Accepted);
    // Envoy closes the connections of the old listener when it is drained.
    assert_all(&held.outcomes(LONG).await, UPDATED.0, Outcome::Closed, "those that are held");
    let outcomes = waiting.outcomes(LONG).await;
    // Where the machine is so slow that the service's time is over first, they are denied.
    let ended = outcomes.count(Outcome::Closed) + outcomes.count(Outcome::Answered(503));
    assert_eq!(ended, UPDATED.1, "those that wait are closed: {outcomes}");
    assert_unloaded(&world).await;
    service.resume();
    assert_places_are_free(&world).await;
    assert_sound(&world, "a new listener").await;
}
