//! As an upstream filter: one host or one attempt is faulted, and Envoy's own retries, timeouts and outlier detection act
//! on it.

use crate::world::policy;
use serde_json::{Value, json};
use trimtab_testbed::{
    Bootstrap, Client, Envoy, Listener, Request, Upstream, cluster, eventually, needs_envoy, repository, wasm,
    wasm_filter,
};

/// One cluster of two hosts, x and y, with the policy before its codec.
struct World {
    envoy: Envoy,
    x: Upstream,
    y: Upstream,
}

const CODEC: &str = "type.googleapis.com/envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec";
const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

impl World {
    /// `fault` may name the host x as `{x}`; `retry` is the route's retry policy, `outlier` the outlier detection.
    async fn start(fault: &str, retry: Value, outlier: Value) -> World {
        let (x, y) = (Upstream::start("x").await, Upstream::start("y").await);
        let fault = fault.replace("{x}", &x.address().to_string());
        let policy = policy(&format!(r#"{{"name": "experiment", "fault": {{{fault}}}}}"#), "");
        let mut service = cluster("service", x.address());
        let second = cluster("service", y.address())["load_assignment"]["endpoints"][0]["lb_endpoints"][0].clone();
        service["load_assignment"]["endpoints"][0]["lb_endpoints"].as_array_mut().unwrap().push(second);
        service["outlier_detection"] = outlier;
        service["typed_extension_protocol_options"] = json!({OPTIONS: {
            "@type": format!("type.googleapis.com/{OPTIONS}"),
            "explicit_http_config": {"http_protocol_options": {}},
            "http_filters": [
                wasm_filter("service", &wasm(), &policy),
                {"name": "envoy.filters.http.upstream_codec", "typed_config": {"@type": CODEC}},
            ],
        }});
        let route = json!([{
            "match": {"prefix": "/"},
            "route": {"cluster": "service", "timeout": "20s", "retry_policy": retry},
        }]);
        let bootstrap = Bootstrap::new().listener(Listener::new("inbound").routes(route)).cluster(service);
        let envoy = Envoy::start(&bootstrap).await;
        World { envoy, x, y }
    }

    fn client(&self) -> Client {
        Client::http1(self.envoy.address("inbound")).without_reuse()
    }

    async fn metric(&self, name: &str) -> u64 {
        let name = format!("wasmcustom.trimtab.policy.user-service.route.experiment.fault.{name}");
        self.envoy.module_metric(&name).await.unwrap_or_else(|| panic!("no metric {name}"))
    }

    /// Whether Envoy has ejected x.
    async fn is_ejected(&self) -> bool {
        let flags = format!("service::{}::health_flags::", self.x.address());
        let clusters = self.envoy.admin("/clusters").await;
        let line = clusters.lines().find(|line| line.starts_with(&flags)).expect("x is in the cluster");
        line.contains("failed_outlier_check")
    }

    /// What the metrics of x begin with.
    fn host(&self) -> String {
        format!("host.{}", self.x.address().to_string().replace(['.', ':'], "_"))
    }

    fn assert_no_trap(&self) {
        for needle in ["wasm_fail_stream", "panicked", "Function: proxy_on"] {
            assert!(!self.envoy.log().contains(needle), "{needle}\n{}", self.envoy.log_tail());
        }
    }

    /// As [`all_get_200`](Self::all_get_200), until x has failed so many times that Envoy ejects it, and has. It does
    /// so in another thread than the one that answers, so a client could be quicker. How many clients there were.
    async fn all_get_200_until_ejected(&self, faults: &str, errors: u64) -> u32 {
        for clients in 1.. {
            self.all_get_200(1).await;
            if self.metric(faults).await >= errors {
                self.envoy.wait_for_stat(&ejections("service"), |active| active == 1).await;
                return clients;
            }
        }
        unreachable!("a client that fails ends the test")
    }

    /// That all of `count` clients get 200, one after the other.
    async fn all_get_200(&self, count: u32) {
        for n in 1..=count {
            let response = self.client().send(Request::get("/")).await;
            assert_eq!(response.status, 200, "client {n} of {count}: {response:?}\n{}", self.envoy.log_tail());
        }
    }
}

fn retries(on: &str, more: Value) -> Value {
    let mut policy = json!({
        "retry_on": on,
        "num_retries": 2,
        "retry_host_predicate": [{
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
            },
        }],
        "host_selection_retry_max_attempts": 5,
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        policy[field] = value.clone();
    }
    policy
}

/// The statistic of how many hosts of a cluster are ejected now.
fn ejections(cluster: &str) -> String {
    format!("cluster.{cluster}.outlier_detection.ejections_active")
}

fn ejecting(after: u32, time: &str) -> Value {
    json!({
        "consecutive_5xx": after,
        "enforcing_consecutive_5xx": 100,
        "enforcing_consecutive_gateway_failure": 0,
        "interval": "0.1s",
        "base_ejection_time": time,
        "max_ejection_percent": 100,
    })
}

#[tokio::test]
async fn a_faulted_host_is_retried_elsewhere_and_ejected() {
    needs_envoy!();
    let fault = r#""hosts": ["{x}"], "response": {"percentage": {"value": 100}, "httpStatus": 503}"#;
    let world = World::start(fault, retries("5xx", json!({})), ejecting(3, "300s")).await;
    let clients = world.all_get_200_until_ejected("responses", 3).await;
    world.all_get_200(12 - clients).await;
    assert_eq!(world.metric("responses").await, 3, "ejected after the configured count, and not faulted again");
    assert_eq!((world.x.count(), world.y.count()), (3, 12));
    assert!(world.is_ejected().await);

    // What the experiment says of it: x is missed once twenty attempts have passed it by.
    world.all_get_200(12).await;
    let report = world.envoy.wait_for_log("fault experiment:").await;
    assert!(report.contains("event=ejected errors=3 "), "{report}");
    assert!(report.contains(" masked=3 "), "{report}");
    let host = world.host();
    assert_eq!(world.metric(&format!("{host}.errors_until_ejection")).await, 3);
    assert_eq!(world.metric(&format!("{host}.ejected")).await, 1);
    let reported = ["requests", "retries", "masked", "succeeded", "misplaced"];
    let mut counts = Vec::new();
    for name in reported {
        counts.push(world.metric(&format!("experiment.{name}")).await);
    }
    assert_eq!(counts, [24, 3, 3, 24, 0], "{reported:?}: all clients succeeded, three of them by a retry");
    world.assert_no_trap();
}

#[tokio::test]
async fn an_ejected_host_comes_back_and_is_faulted_again() {
    needs_envoy!();
    let fault = r#""hosts": ["{x}"], "response": {"percentage": {"value": 100}, "httpStatus": 500}"#;
    let world = World::start(fault, retries("5xx", json!({})), ejecting(2, "3s")).await;
    world.all_get_200_until_ejected("responses", 2).await;
    world.all_get_200(25).await;
    let host = world.host();
    assert_eq!(world.metric(&format!("{host}.errors_until_ejection")).await, 2);
    eventually("x to come back", async || {
        world.all_get_200(1).await;
        (world.metric(&format!("{host}.ejected_ms")).await > 0).then_some(())
    })
    .await;
    let away = world.metric(&format!("{host}.ejected_ms")).await;
    assert!(away >= 3000, "x was ejected for three seconds at least, not {away} ms");
    let report = world.envoy.wait_for_log("event=returned").await;
    assert!(report.contains(&format!("ejected_ms={away} ")), "{report}");
    world.all_get_200(30).await;
    world.envoy.wait_for_stat("cluster.service.outlier_detection.ejections_enforced_total", |total| total >= 2).await;
    assert_eq!(world.metric("experiment.requests").await, world.metric("experiment.succeeded").await);
    world.assert_no_trap();
}

#[tokio::test]
async fn a_slow_host_runs_into_the_timeout_of_each_try() {
    needs_envoy!();
    let fault = r#""hosts": ["{x}"], "delay": {"percentage": {"value": 100}, "fixedDelay": "1h"}, "maxActive": 1"#;
    let retry = retries("5xx,reset", json!({"per_try_timeout": "1s"}));
    let world = World::start(fault, retry, ejecting(3, "300s")).await;
    let clients = world.all_get_200_until_ejected("delays", 3).await;
    world.all_get_200(12 - clients).await;
    assert_eq!(world.metric("delays").await, 3, "a try that timed out frees its place for the next");
    assert_eq!((world.x.count(), world.y.count()), (0, 12), "what timed out never reached x");
    assert!(world.is_ejected().await);
    world.assert_no_trap();
}

#[tokio::test]
async fn an_attempt_is_faulted_and_not_the_next() {
    needs_envoy!();
    let fault = r#""attempts": [1], "response": {"percentage": {"value": 100}, "httpStatus": 503}, "maxActive": 5"#;
    let world = World::start(fault, retries("5xx", json!({})), ejecting(100, "300s")).await;
    world.all_get_200(12).await;
    assert_eq!(world.metric("responses").await, 12, "each attempt that has ended frees its place for the next");
    assert_eq!(world.x.count() + world.y.count(), 24);
    assert_eq!(world.metric("experiment.masked").await, 12, "each was masked by its retry");

    // Without retries nothing masks it.
    let world = World::start(fault, json!({}), ejecting(100, "300s")).await;
    for _ in 0..5 {
        assert_eq!(world.client().send(Request::get("/")).await.status, 503);
    }
    assert_eq!(world.metric("experiment.requests").await, 5);
    assert_eq!(world.metric("experiment.succeeded").await, 0);
    world.assert_no_trap();
}

#[tokio::test]
async fn before_the_router_nothing_is_known_of_hosts() {
    needs_envoy!();
    let fault = r#""hosts": ["127.0.0.1:1"], "response": {"percentage": {"value": 100}, "httpStatus": 503}"#;
    let upstream = Upstream::start("v1").await;
    let policy = policy(&format!(r#"{{"name": "experiment", "fault": {{{fault}}}}}"#), "");
    let bootstrap =
        Bootstrap::new().listener(Listener::new("inbound").policy(&policy)).cluster(cluster("v1", upstream.address()));
    let envoy = Envoy::start(&bootstrap).await;
    let client = Client::http1(envoy.address("inbound"));
    assert_eq!(client.send(Request::get("/")).await.status, 200);
    envoy.wait_for_log("hosts and attempts are known to an upstream filter only").await;
}

/// `envoy/upstream-fault.yaml` as it is written, but for addresses and the module's place.
#[tokio::test]
async fn the_example_does_what_it_says() {
    needs_envoy!();
    let (x, y) = (Upstream::start("x").await, Upstream::start("y").await);
    let example =
        std::fs::read_to_string(repository().join("envoy/upstream-fault.yaml")).expect("the example is there");
    let example = example
        .replace("/etc/trimtab/trimtab.wasm", wasm().to_str().expect("the path is text"))
        .replace("0.0.0.0, port_value: 10000", "127.0.0.1, port_value: 0")
        .replace("port_value: 10001", &format!("port_value: {}", x.address().port()))
        .replace("port_value: 10002", &format!("port_value: {}", y.address().port()))
        .replace("127.0.0.1:10001", &x.address().to_string());
    let envoy = Envoy::options().try_start_text(&example).await.unwrap_or_else(|failure| panic!("{failure}"));
    let client = Client::http1(envoy.address("inbound")).without_reuse();
    for n in 0..12 {
        let response = client.send(Request::get("/")).await;
        assert_eq!((response.status.as_u16(), response.version()), (200, "y"), "client {n}: {response:?}");
        if x.count() == 5 {
            // Envoy ejects in another thread than the one that answers: the next client could be quicker.
            envoy.wait_for_stat(&ejections("user-service"), |active| active == 1).await;
        }
    }
    assert_eq!(x.count(), 5, "ejected after five failures");
    let report = "wasmcustom.trimtab.policy.user-service-upstream.route.experiment.fault.experiment.masked";
    assert_eq!(envoy.module_metric(report).await, Some(5));
}
