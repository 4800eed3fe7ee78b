//! Envoy itself, without the module: it starts, serves, takes and refuses
//! updates, and goes.

use std::process::Command;

use serde_json::Value;
use trimtab_testbed::{
    Behaviour, Bootstrap, Client, Envoy, Installation, Launcher, Listener, Request, Update, Upstream, cluster,
    direct_response, eventually, http2_cluster, json_from_yaml, needs_envoy, raw, repository, wasm,
};

async fn echoes_through(launcher: Launcher) {
    let v1 = Upstream::start("v1").await;
    let v2 = Upstream::start("v2").await;
    let envoy = Envoy::options()
        .launcher(launcher)
        .start(
            &Bootstrap::new()
                .listener(Listener::new("inbound"))
                .cluster(cluster("v1", v1.address()))
                .cluster(http2_cluster("v2", v2.address())),
        )
        .await;
    assert_eq!(envoy.launcher(), launcher);
    let address = envoy.address("inbound");
    for client in [Client::http1(address), Client::http2(address)] {
        let stable = client.send(Request::get("/users/7")).await;
        assert_eq!(stable.version(), "v1", "{stable:?}");
        let canary = Request::get("/").header("x-trimtab-subset", "v2");
        let canary = client.send(canary).await;
        assert_eq!(canary.version(), "v2", "{canary:?}");
    }
    let seen = v1.next_request().await;
    assert_eq!((&*seen.path, &*seen.authority), ("/users/7", "user-service"));
    assert!(seen.header("x-request-id").is_some(), "{seen:?}");

    v2.set_behaviour(Behaviour::grpc(5));
    let call = Request::grpc("/users.Users/Get").header("x-trimtab-subset", "v2");
    let answer = Client::http2(address).send(call).await;
    assert_eq!(answer.grpc_status(), Some("5"), "{answer:?}");

    assert_eq!(envoy.stat("cluster.v1.upstream_rq_200").await, Some(2));
    assert_eq!(envoy.stat("cluster.no_such").await, None);
    assert!(envoy.config_dump().await["configs"].is_array());
    envoy.wait_for_log("starting workers").await;
}

#[tokio::test]
async fn echo_through_envoy_started_directly() {
    needs_envoy!();
    echoes_through(Launcher::Direct).await;
}

#[tokio::test]
async fn echo_through_envoy_started_by_func_e() {
    needs_envoy!();
    if Installation::find().is_ok_and(|found| found.func_e.is_none()) {
        println!("skipped: no func-e (it needs a Go toolchain)");
        return;
    }
    echoes_through(Launcher::FuncE).await;
}

#[tokio::test]
async fn an_upstream_that_resets_is_a_503() {
    needs_envoy!();
    let v1 = Upstream::start("v1").await;
    v1.set_behaviour(Behaviour::reset());
    let bootstrap = Bootstrap::new().cluster(cluster("v1", v1.address()));
    let options = Envoy::options().concurrency(1);
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("access.log");
    let listener = Listener::new("inbound").access_log(&log, "%RESPONSE_CODE% %RESPONSE_FLAGS%\n");
    let envoy = options.start(&bootstrap.listener(listener)).await;

    let client = Client::http1(envoy.address("inbound"));
    let response = client.send(Request::get("/")).await;
    assert_eq!(response.status, 503, "{response:?}");
    let line = eventually("a line in the access log", async || {
        std::fs::read_to_string(&log).ok().filter(|log| !log.is_empty())
    })
    .await;
    assert_eq!(line, "503 UC\n");
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_request() {
    needs_envoy!();
    let v1 = Upstream::start("v1").await;
    v1.set_behaviour(Behaviour::silent());
    let bootstrap = Bootstrap::new().cluster(cluster("v1", v1.address()));
    let envoy = Envoy::start(&bootstrap.listener(Listener::new("inbound"))).await;
    let address = envoy.address("inbound");
    for (reset, client) in [(1, Client::http1(address)), (2, Client::http2(address))] {
        let request = tokio::spawn(async move { client.try_send(Request::get("/")).await });
        v1.next_request().await;
        request.abort();
        envoy.wait_for_stat("http.inbound.downstream_rq_rx_reset", |n| n >= reset).await;
    }
}

#[tokio::test]
async fn updates_are_accepted_or_rejected() {
    needs_envoy!();
    let answering = |body| Listener::new("inbound").routes(direct_response(200, body));
    let other = || Listener::new("other").routes(direct_response(200, "other"));
    let bootstrap = Bootstrap::new().dynamic();
    let bootstrap = bootstrap.listener(answering("one")).listener(other());
    let mut envoy = Envoy::start(&bootstrap).await;
    let client = Client::http1(envoy.address("inbound")).without_reuse();
    assert_eq!(client.send(Request::get("/")).await.text(), "one");

    let update = [answering("two"), other()];
    assert_eq!(envoy.update(&update).await, Update::Accepted);
    for _ in 0..20 {
        assert_eq!(client.send(Request::get("/")).await.text(), "two");
    }

    let broken = answering("three").manager("stat_prefix", "".into());
    let Update::Rejected(reason) = envoy.update(&[broken, other()]).await else {
        panic!("a broken listener was accepted");
    };
    assert!(reason.contains("StatPrefix"), "{reason}");
    assert_eq!(client.send(Request::get("/")).await.text(), "two");

    assert_eq!(envoy.update(&[answering("four")]).await, Update::Accepted);
    assert_eq!(client.send(Request::get("/")).await.text(), "four");
}

#[tokio::test]
async fn a_configuration_that_is_refused_tells_why() {
    needs_envoy!();
    for bootstrap in [Bootstrap::new(), Bootstrap::new().dynamic()] {
        let broken = Listener::new("inbound").manager("stat_prefix", "".into());
        let refusal = Envoy::options().try_start(&bootstrap.listener(broken)).await;
        let message = refusal.unwrap_err();
        assert!(message.contains("StatPrefix"), "{message}");
    }
}

#[tokio::test]
async fn requests_that_no_client_sends() {
    needs_envoy!();
    let listener = Listener::new("inbound").routes(direct_response(200, "hello"));
    let envoy = Envoy::start(&Bootstrap::new().listener(listener)).await;
    for (request, status) in [
        ("GET / HTTP/1.0\r\n\r\n", "200"),
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET http://a/b HTTP/1.1\r\nhost: a\r\n\r\n", "200"),
        ("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", "404"),
        ("CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n", "404"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let response = raw(envoy.address("inbound"), request).await;
        let response = String::from_utf8_lossy(&response);
        let found = response.split(' ').nth(1);
        assert_eq!(found, Some(status), "{request:?} -> {response:?}");
    }
}

#[tokio::test]
async fn nothing_is_left_behind() {
    needs_envoy!();
    let envoy = Envoy::start(&Bootstrap::new()).await;
    let (group, directory) = (envoy.process_group(), envoy.directory().to_owned());
    assert!(members_of(group) > 0);
    drop(envoy);
    assert!(!directory.exists());
    eventually("the end of the process group", async || (members_of(group) == 0).then_some(())).await;
}

/// How many live processes a process group has.
fn members_of(group: u32) -> usize {
    let output = Command::new("ps").args(["-e", "-o", "pgid=,stat="]).output().expect("ps runs");
    let listing = String::from_utf8_lossy(&output.stdout);
    listing
        .lines()
        .filter_map(|line| line.trim().split_once(char::is_whitespace))
        .filter(|(id, state)| *id == group.to_string() && !state.trim().starts_with('Z'))
        .count()
}

/// `envoy/envoy.yaml` as it is written, but for addresses and the module's
/// path.
#[tokio::test]
async fn the_example_configuration_works() {
    needs_envoy!();
    if let Err(reason) = trimtab_testbed::find_wasm() {
        println!("skipped: {reason}");
        return;
    }
    let v1 = Upstream::start("v1").await;
    let v2 = Upstream::start("v2").await;
    let port = |upstream: &Upstream| format!("address: 127.0.0.1, port_value: {}", upstream.address().port());
    let example = std::fs::read_to_string(repository().join("envoy/envoy.yaml"))
        .expect("the example is there")
        .replace("/etc/trimtab/trimtab.wasm", &wasm().display().to_string())
        .replace("address: 0.0.0.0, port_value: 10000", "address: 127.0.0.1, port_value: 0")
        .replace("address: v1, port_value: 10001", &port(&v1))
        .replace("address: v2, port_value: 10002", &port(&v2));
    let envoy = Envoy::options().try_start_text(&example).await;
    let envoy = envoy.unwrap_or_else(|failure| panic!("{failure}"));
    let client = Client::http1(envoy.address("inbound"));
    let canary = client.send(Request::get("/").header("x-canary", "true")).await;
    assert_eq!(canary.version(), "v2", "{canary:?}");
}

/// `envoy/envoy.yaml` says of itself that it carries `envoy/policy.yaml`.
#[test]
fn the_example_configuration_carries_the_example_policy() {
    let read = |name: &str| {
        let text = std::fs::read_to_string(repository().join(name)).expect("the example is there");
        json_from_yaml(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let example = read("envoy/envoy.yaml");
    let filters = example.pointer("/static_resources/listeners/0/filter_chains/0/filters/0/typed_config/http_filters");
    let carried = filters.and_then(|filters| filters.pointer("/0/typed_config/config/configuration/value"));
    let carried = carried.and_then(Value::as_str).expect("the first filter has a policy");
    let carried: Value = serde_json::from_str(carried).expect("Envoy carries JSON");
    assert_eq!(carried, read("envoy/policy.yaml"));
}
