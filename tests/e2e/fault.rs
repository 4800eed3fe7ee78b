//! Fault injection: late, broken, or left alone while the upstream is unwell.

use crate::world::{Setup, World, policy};
use serde_json::json;
use std::time::Duration;
use tokio::task::JoinSet;
use trimtab_testbed::{Behaviour, Bootstrap, Client, Envoy, Listener, Request, Upstream, cluster, needs_envoy};

fn faults(delay: &str) -> String {
    policy(
        &format!(
            r#"{{"name": "slow", "match": [{{"headers": {{"x-experiment": {{"exact": "slow"}}}}}}],
                 "fault": {{"delay": {{"percentage": {{"value": 100}}, "fixedDelay": "{delay}"}}}}}},
               {{"name": "down", "match": [{{"headers": {{"x-experiment": {{"exact": "down"}}}}}}],
                 "fault": {{"abort": {{"percentage": {{"value": 100}}, "httpStatus": 503}}}}}},
               {{"name": "both", "match": [{{"headers": {{"x-experiment": {{"exact": "both"}}}}}}],
                 "fault": {{"delay": {{"percentage": {{"value": 100}}, "fixedDelay": "{delay}"}},
                            "abort": {{"percentage": {{"value": 100}}, "httpStatus": 500}}}}}}"#
        ),
        "",
    )
}

fn experiment(name: &str) -> Request {
    Request::get("/").header("x-experiment", name)
}

#[tokio::test]
async fn a_delay_is_never_early_and_bodies_survive_it() {
    needs_envoy!();
    let delay = Duration::from_millis(200);
    let world = World::start(&faults("200ms")).await;
    let mut tasks = JoinSet::new();
    for n in 0..100 {
        let client = world.spreading_client();
        let body = vec![b'a' + n % 26; 100_000];
        tasks.spawn(async move {
            let response = client.send(Request::post("/", body).header("x-experiment", "slow")).await;
            assert_eq!(response.status, 200, "{response:?}");
            response.elapsed
        });
    }
    for elapsed in tasks.join_all().await {
        assert!(elapsed >= delay, "a request came back after {elapsed:?}, expected {delay:?} at least");
    }
    let received = world.v1.requests();
    assert_eq!(received.len(), 100);
    assert!(received.iter().all(|request| request.body.len() == 100_000));
    assert_eq!(world.metric("route.slow.fault.delays").await, 100);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn an_abort_answers_in_the_upstreams_place() {
    needs_envoy!();
    let world = World::with(&faults("100ms"), Setup { http2: true, ..Setup::default() }).await;
    let client = world.http2_client();
    let aborted = client.send(experiment("down")).await;
    assert_eq!(aborted.status, 503, "{aborted:?}");
    assert_eq!(aborted.header("x-trimtab-fault"), Some("abort"), "{aborted:?}");
    let call = client.send(Request::grpc("/users.Users/Get").header("x-experiment", "down")).await;
    assert_eq!((call.status.as_u16(), call.grpc_status()), (200, Some("14")), "UNAVAILABLE: {call:?}");
    let both = client.send(experiment("both")).await;
    assert_eq!(both.status, 500, "{both:?}");
    assert!(both.elapsed >= Duration::from_millis(100), "the abort follows the delay: {both:?}");
    assert_eq!(world.v1.count(), 0, "no upstream was asked");
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    needs_envoy!();
    let world = World::start(&faults("24h")).await;
    let client = world.spreading_client();
    for _ in 0..50 {
        let held = tokio::time::timeout(Duration::from_millis(20), client.try_send(experiment("slow"))).await;
        assert!(held.is_err(), "the request is held for a day");
    }
    world.envoy.wait_for_stat("http.inbound.downstream_rq_active", |active| active == 0).await;
    assert_eq!(client.send(Request::get("/")).await.status, 200);
    world.assert_no_trap().await;
}

fn route(fault: &str) -> String {
    policy(&format!(r#"{{"name": "r", "fault": {{{fault}}}}}"#), "")
}

#[tokio::test]
async fn who_is_reset_gets_no_answer() {
    needs_envoy!();
    let reset = r#""abort": {"percentage": {"value": 100}, "reset": true}"#;
    let delay = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "100ms"}"#;
    for fault in [reset.to_owned(), format!("{delay}, {reset}")] {
        let fault = route(&format!(r#"{fault}, "maxActive": 2"#));
        let world = World::with(&fault, Setup { http2: true, ..Setup::default() }).await;
        for client in [world.client(), world.http2_client()] {
            for request in
                [Request::get("/"), Request::post("/", vec![b'a'; 200_000]), Request::grpc("/users.Users/Get")]
            {
                let answer = client.try_send(request).await;
                let failure = answer.expect_err("the stream is reset");
                assert!(!failure.contains("no answer within"), "it is reset, not left hanging: {failure}");
            }
        }
        assert_eq!(world.metric("route.r.fault.resets").await, 6, "each frees its place for the next");
        assert_eq!(world.v1.count(), 0);
        world.assert_no_trap().await;
    }
}

#[tokio::test]
async fn an_answer_of_the_upstream_is_replaced() {
    needs_envoy!();
    let fault = route(r#""response": {"percentage": {"value": 100}, "httpStatus": 503}"#);
    let world = World::with(&fault, Setup { http2: true, ..Setup::default() }).await;
    for client in [world.client(), world.http2_client()] {
        let response = client.send(Request::post("/", b"hello".to_vec())).await;
        assert_eq!(response.status, 503, "{response:?}");
        assert_eq!(response.header("x-trimtab-fault"), Some("response"), "{response:?}");
        assert_eq!(response.version(), "v1", "the upstream's own headers are kept");
        assert!(response.text().contains("user-service"), "and its body: {response:?}");
    }
    assert_eq!(world.v1.count(), 2, "the upstream did the work");

    world.v1.set_behaviour(Behaviour::grpc(0));
    let call = world.http2_client().send(Request::grpc("/users.Users/Get")).await;
    assert_eq!((call.status.as_u16(), call.grpc_status()), (200, Some("14")), "{call:?}");
    assert_eq!(world.metric("route.r.fault.responses").await, 3);
    assert_eq!(world.metric("target.route_r.requests").await, 3);
    assert_eq!(world.metric("target.route_r.failures").await, 0, "the upstream did well");

    world.v1.set_behaviour(Behaviour::reset());
    let response = world.client().send(Request::get("/")).await;
    assert_eq!(response.header("x-trimtab-fault"), None, "Envoy's own answer is not replaced: {response:?}");
    assert_eq!(world.metric("route.r.fault.responses").await, 3);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn a_request_may_ask_as_it_asks_envoy() {
    needs_envoy!();
    let ours = route(
        r#""headerControl": true, "abort": {"percentage": {"value": 100}},
           "delay": {"percentage": {"value": 100}, "fixedDelay": "300ms"}"#,
    );
    let upstream = Upstream::start("v1").await;
    let whole = json!({"numerator": 100});
    let envoys = json!({
        "name": "envoy.filters.http.fault",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault",
            "abort": {"header_abort": {}, "percentage": whole},
            "delay": {"header_delay": {}, "percentage": whole},
        },
    });
    let bootstrap = Bootstrap::new()
        .listener(Listener::new("ours").policy(&ours))
        .listener(Listener::new("envoys").filter(envoys))
        .cluster(cluster("v1", upstream.address()));
    let envoy = Envoy::start(&bootstrap).await;
    /// Headers after `x-envoy-fault-`.
    type Headers = &'static [(&'static str, &'static str)];
    let cases: [(Headers, u16, u64); 11] = [
        (&[], 200, 0),
        (&[("abort-request", "418")], 418, 0),
        (&[("abort-request", "418"), ("abort-grpc-request", "14")], 418, 0),
        (&[("abort-request", "600")], 200, 0),
        (&[("abort-request", "banana")], 200, 0),
        (&[("abort-request", "418"), ("abort-request-percentage", "0")], 200, 0),
        (&[("abort-request", "418"), ("abort-request-percentage", "banana")], 418, 0),
        (&[("abort-request", "418"), ("abort-request-percentage", "1000")], 418, 0),
        (&[("delay-request", "100")], 200, 100),
        (&[("delay-request", "100"), ("delay-request-percentage", "0"), ("abort-request", "500")], 500, 0),
        (&[("delay-request", "100"), ("abort-request", "500")], 500, 100),
    ];
    for listener in ["ours", "envoys"] {
        let client = Client::http1(envoy.address(listener));
        for (headers, status, milliseconds) in cases {
            let request = headers.iter().fold(Request::get("/"), |request, (name, value)| {
                request.header(&format!("x-envoy-fault-{name}"), value)
            });
            upstream.clear();
            let response = client.send(request).await;
            assert_eq!(response.status, status, "{listener}: {headers:?}: {response:?}");
            // Envoy's own filter may be early by its timer's millisecond.
            let least = Duration::from_millis(milliseconds.saturating_sub(if listener == "envoys" { 5 } else { 0 }));
            assert!(response.elapsed >= least, "{listener}: {headers:?}: {response:?}");
            for received in upstream.requests() {
                for (name, value) in headers {
                    let name = format!("x-envoy-fault-{name}");
                    assert_eq!(received.header(&name), Some(*value), "{listener}: {name} stays on the request");
                }
            }
        }
    }
}

#[tokio::test]
async fn no_more_faults_are_active_than_may_be() {
    needs_envoy!();
    const MOST: usize = 5;
    let fault =
        route(&format!(r#""delay": {{"percentage": {{"value": 100}}, "fixedDelay": "24h"}}, "maxActive": {MOST}"#));
    let world = World::with(&fault, Setup { workers: 4, ..Setup::default() }).await;
    for round in 1..=3 {
        let mut tasks = JoinSet::new();
        for _ in 0..40 {
            let client = world.spreading_client();
            tasks.spawn(async move { client.send(Request::get("/")).await.status });
        }
        for _ in 0..40 - MOST {
            assert_eq!(tasks.join_next().await.expect("40 were sent").expect("it is answered"), 200);
        }
        assert_eq!(world.metric("route.r.fault.delays").await, (round * MOST) as u64, "round {round}");
        // The clients that are held leave. Envoy forgets a connection after all that its streams had.
        tasks.shutdown().await;
        world.envoy.wait_for_stat("http.inbound.downstream_cx_active", |active| active == 0).await;
    }
    world.assert_no_trap().await;
}

#[tokio::test]
async fn five_hundred_are_held_at_once() {
    needs_envoy!();
    const HELD: usize = 500;
    let delay = Duration::from_millis(100);
    let world = World::start(&faults("100ms")).await;
    let client = world.http2_client();
    client.send(Request::get("/")).await;
    let mut tasks = JoinSet::new();
    for _ in 0..HELD {
        let client = client.clone();
        tasks.spawn(async move {
            let response = client.send(experiment("slow")).await;
            assert_eq!(response.status, 200, "{response:?}");
            response.elapsed
        });
    }
    let mut extra: Vec<Duration> = Vec::new();
    for elapsed in tasks.join_all().await {
        assert!(elapsed >= delay, "a request came back after {elapsed:?}, expected {delay:?} at least");
        extra.push(elapsed - delay);
    }
    extra.sort_unstable();
    println!("extra: median {:?}, p99 {:?}", extra[HELD / 2], extra[HELD * 99 / 100]);
    assert_eq!(world.metric("route.slow.fault.delays").await, HELD as u64);
    world.assert_no_trap().await;
}

#[tokio::test]
async fn only_the_callers_that_are_named_are_faulted() {
    needs_envoy!();
    let aborted = |properties: &str| {
        route(&format!(
            r#""abort": {{"percentage": {{"value": 100}}, "httpStatus": 503}},
               "source": {{"headers": {{"x-team": {{"prefix": "chaos"}}}}, "properties": {{{properties}}}}}"#
        ))
    };
    for (properties, status) in [
        (r#""source.address": {"prefix": "127.0.0.1:"}"#, 503),
        (r#""source.address": {"prefix": "127.0.0.1:"}, "xds.route_name": {"exact": "v1"}"#, 503),
        (r#""source.address": {"prefix": "10."}"#, 200),
        (r#""connection.uri_san_peer_certificate": {}"#, 200),
        (r#""no.such.attribute": {}"#, 200),
    ] {
        let world = World::start(&aborted(properties)).await;
        let client = world.client();
        assert_eq!(client.send(Request::get("/").header("x-team", "chaos-1")).await.status, status, "{properties}");
        assert_eq!(client.send(Request::get("/").header("x-team", "shop")).await.status, 200, "{properties}");
        world.assert_no_trap().await;
    }
}
