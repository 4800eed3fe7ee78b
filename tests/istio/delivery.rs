//! What is applied arrives: istiod turns it into Envoy's configuration, and Envoy does what the policy says.

use crate::examples::assert_limit;
use crate::manifests::{render, render_with};
use crate::mesh::{Mesh, call, settled};
use crate::tools::{needs_istio, needs_new_istio};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use trimtab_testbed::{Request, eventually};

/// A request of a tester, who is to be on v2.
fn tester() -> Request {
    call("/").header("x-canary", "true")
}

#[tokio::test]
async fn a_wasm_plugin_steers_what_leaves_the_caller() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/base"));
    let envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    settled("testers to be on v2", &client, tester(), |response| response.version() == "v2").await;
    let seen = mesh.v2.next_request().await;
    assert_eq!(seen.header("x-trimtab-subset"), Some("v2"));
    assert!(seen.header("traceparent").is_some(), "{seen:?}");
    // Istio hands the policy over as the JSON text that the module reads.
    let configuration = envoy.config_dump().await.to_string();
    let handed = r#""configuration":{"@type":"type.googleapis.com/google.protobuf.StringValue","value":"{"#;
    assert!(configuration.contains(handed), "{configuration}");
    // A client's own choice is not taken, and one user stays where they are.
    for user in ["ann", "bob", "cyd"] {
        let ask = || client.send(call("/").header("x-user-id", user).header("x-trimtab-subset", "v2"));
        let version = ask().await.version().to_owned();
        assert_eq!(ask().await.version(), version, "{user}");
    }
    // What goes elsewhere is not touched.
    let elsewhere = client.send(tester().authority("other-service")).await;
    assert_ne!(elsewhere.version(), "v2", "{elsewhere:?}");
    assert!(envoy.module_metric("wasmcustom.trimtab.policy.user-service.unmatched").await > Some(0));
}

#[tokio::test]
async fn a_traffic_extension_does_the_same() {
    needs_istio!();
    needs_new_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/overlays/trafficextension"));
    let _envoy = mesh.sidecar("storefront").await;
    settled("testers to be on v2", &mesh.outbound(), tester(), |response| response.version() == "v2").await;
}

#[tokio::test]
async fn the_gateway_steers_what_enters_the_mesh() {
    needs_istio!();
    let mesh = Mesh::start().await;
    let client = mesh.listen_at_gateway(&render("istio/overlays/gateway"));
    let _envoy = mesh.gateway().await;
    let ask = |request: Request| request.authority("shop.example.com");
    settled("testers to be on v2", &client, ask(tester()), |response| response.version() == "v2").await;
    let stranger = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    mesh.v2.clear();
    client.send(ask(tester()).header("traceparent", stranger)).await;
    let seen = mesh.v2.next_request().await;
    let traceparent = seen.header("traceparent").unwrap();
    assert!(!traceparent.contains("0af7651916cd43dd8448eb211c80319c"), "the stranger's trace goes on: {traceparent}");
}

#[tokio::test]
async fn the_services_own_sidecar_limits_its_callers() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/overlays/server"));
    let client = mesh.listen_inbound("user-service", mesh.v1.address());
    let envoy = mesh.sidecar("user-service").await;
    settled("the service to answer", &client, Request::get("/"), |response| response.version() == "v1").await;
    let per_user = |user: &str| Request::get("/").header("x-user-id", user);
    envoy.wait_for_stat("wasmcustom.trimtab.policy.user-service-inbound.unmatched", |_| true).await;
    assert_limit(&client, per_user("ann"), 100, 100.0 / 60.0).await;
    assert_eq!(client.send(per_user("bob")).await.status, 200);
}

#[tokio::test]
async fn the_policy_can_name_the_cluster_itself() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render_with("cluster-header"));
    let envoy = mesh.sidecar("storefront").await;
    settled("testers to be on v2", &mesh.outbound(), tester(), |response| response.version() == "v2").await;
    let seen = mesh.v2.next_request().await;
    assert_eq!(seen.header("x-trimtab-cluster"), Some("outbound|80|v2|user-service.default.svc.cluster.local"));
    let configuration = envoy.config_dump().await.to_string();
    assert!(configuration.contains(r#""cluster_header":"x-trimtab-cluster""#), "{configuration}");
}

#[tokio::test]
async fn the_upstream_filter_writes_the_trace_last() {
    needs_istio!();
    let mesh = Mesh::start().await;
    let manifests = render_with("upstream-filter").replace("/var/lib/trimtab/plugin.wasm", &wasm());
    mesh.apply(&manifests);
    let envoy = mesh.sidecar("storefront").await;
    settled("testers to be on v2", &mesh.outbound(), tester(), |response| response.version() == "v2").await;
    let counter = "wasmcustom.trimtab.policy.user-service-upstream.trace.valid";
    let seen = envoy.wait_for_stat(counter, |count| count > 0).await;
    assert!(seen > 0, "the trace that the first filter wrote arrives valid at the second");
}

#[tokio::test]
async fn held_streams_have_a_timeout() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render_with("idle-timeout"));
    let envoy = mesh.sidecar("storefront").await;
    eventually("the timeout in Envoy's configuration", async || {
        envoy.config_dump().await.to_string().contains(r#""stream_idle_timeout":"300s""#).then_some(())
    })
    .await;
}

#[tokio::test]
async fn envoys_own_tracer_leaves_the_headers_alone() {
    needs_istio!();
    needs_new_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render_with("no-context-propagation"));
    let envoy = mesh.sidecar("storefront").await;
    eventually("the field in Envoy's configuration", async || {
        envoy.config_dump().await.to_string().contains(r#""no_context_propagation":true"#).then_some(())
    })
    .await;
}

/// The base with a limit of three an hour for everybody, and testers known by `header`.
fn limited(header: &str) -> String {
    let base = render("istio/base");
    let limit = "rateLimits: [{name: all, limit: {requestsPerUnit: 3, unit: hour}}]";
    let limited = base
        .replace("x-canary:", &format!("{header}:"))
        .replace("      name: default\n      route:", &format!("      name: default\n      {limit}\n      route:"));
    assert!(limited.contains(limit), "{base}");
    limited
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_policy_takes_over_without_losing_a_request_or_what_was_spent() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&limited("x-old"));
    let envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    let old = || call("/").header("x-old", "true");
    let new = || call("/").header("x-new", "true");
    settled("the old policy", &client, old(), |response| response.version() == "v2").await;
    let answers = async |count: usize| {
        let mut statuses = Vec::new();
        for _ in 0..count {
            statuses.push(client.send(call("/")).await.status.as_u16());
        }
        statuses
    };
    // Three are admitted since the policy is there; those before it came were not counted.
    assert_eq!(answers(4).await, [200, 200, 200, 429]);

    let (done, lost) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let load = tokio::spawn({
        let (client, done, lost) = (client.clone(), Arc::clone(&done), Arc::clone(&lost));
        async move {
            let mut sent = 0;
            while !done.load(Ordering::Relaxed) {
                // Both headers: the route of testers, before the change and after it.
                let request = call("/").header("x-old", "true").header("x-new", "true");
                let response = client.try_send(request).await;
                if !response.as_ref().is_ok_and(|response| response.version() == "v2") {
                    lost.lock().unwrap().push(format!("{response:?}"));
                }
                sent += 1;
            }
            sent
        }
    });
    mesh.apply(&limited("x-new"));
    settled("the new policy", &client, new(), |response| response.version() == "v2").await;
    done.store(true, Ordering::Relaxed);
    let sent: usize = load.await.unwrap();
    assert!(lost.lock().unwrap().is_empty(), "of {sent} requests: {:?}", lost.lock().unwrap());
    assert!(sent > 0);
    let spent = client.send(old()).await;
    assert_eq!(spent.status, 429, "three an hour were spent before the update: {spent:?}\n{}", envoy.log_tail());
}

#[tokio::test]
async fn a_broken_policy_is_refused_and_the_old_one_serves_on() {
    needs_istio!();
    let mesh = Mesh::start().await;
    let base = render("istio/base");
    mesh.apply(&base);
    let envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    settled("testers to be on v2", &client, tester(), |response| response.version() == "v2").await;

    let told = mesh.control_plane.log().len();
    let broken = base.replace("weight: 90", "weight: 91");
    assert_ne!(broken, base);
    // Istio does not read a plugin's configuration: the resource itself is fine.
    mesh.apply(&broken);
    envoy.wait_for_log("policy refused: error: /routes/1/route: the weights sum to 101").await;
    let line = mesh.control_plane.wait_for_log(told, "ACK ERROR").await;
    assert!(line.contains("user-service-trimtab"), "istiod names the resource: {line}");
    for _ in 0..10 {
        let response = client.send(tester()).await;
        assert_eq!(response.version(), "v2", "the old policy serves on: {response:?}");
    }
    let fixed = base.replace("x-canary", "x-fixed");
    mesh.apply(&fixed);
    settled("the next good policy", &client, call("/").header("x-fixed", "true"), |response| {
        response.version() == "v2"
    })
    .await;
}

#[tokio::test]
async fn what_the_api_server_refuses_is_not_stored() {
    needs_istio!();
    let mesh = Mesh::start().await;
    let answer = mesh.control_plane.apply(&render("istio/base").replace("url: oci://", "url: ftp://"));
    assert!(!answer.ok && answer.stderr.contains("url must have schema one of"), "{answer:?}");
    let manifest = json!({"apiVersion": "extensions.istio.io/v1alpha1", "kind": "WasmPlugin",
        "metadata": {"name": "no-url"}, "spec": {}});
    let answer = mesh.control_plane.apply(&manifest.to_string());
    assert!(!answer.ok && answer.stderr.contains("spec.url: Required value"), "{answer:?}");
}

fn wasm() -> String {
    trimtab_testbed::wasm().display().to_string()
}
