//! A small mesh: user-service in two versions, and Envoys that listen to istiod as its proxies do.

use crate::control_plane::{ControlPlane, control_plane, free_port};
use serde_json::{Value, json};
use std::net::SocketAddr;
use tokio::sync::MutexGuard;
use trimtab_testbed::{Client, Envoy, Request, Response, Upstream, eventually, wasm};

/// The host of the service that the manifests are about.
pub const SERVICE: &str = "user-service.default.svc.cluster.local";

pub struct Mesh {
    pub control_plane: MutexGuard<'static, ControlPlane>,
    pub v1: Upstream,
    pub v2: Upstream,
    outbound: SocketAddr,
}

impl Mesh {
    /// A control plane that knows the service, and nothing else.
    pub async fn start() -> Mesh {
        let control_plane = control_plane().await;
        let (v1, v2) = (Upstream::start("v1").await, Upstream::start("v2").await);
        let endpoint = |version: &str, upstream: &Upstream| {
            let address = upstream.address();
            json!({"address": address.ip(), "ports": {"http": address.port()}, "labels": {"version": version}})
        };
        let outbound = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mesh = Mesh { control_plane, v1, v2, outbound };
        mesh.apply_json(&json!({
            "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
            "metadata": {"name": "user-service", "namespace": "default"},
            "spec": {
                "hosts": [SERVICE], "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
                "location": "MESH_INTERNAL", "resolution": "STATIC",
                "endpoints": [endpoint("v1", &mesh.v1), endpoint("v2", &mesh.v2)],
            },
        }));
        // Traffic is not redirected here: applications call their sidecar as a proxy, and it listens nowhere else.
        mesh.apply_json(&json!({
            "apiVersion": "networking.istio.io/v1", "kind": "Sidecar",
            "metadata": {"name": "default", "namespace": "default"},
            "spec": {"egress": [{
                "port": {"number": outbound.port(), "name": "proxy", "protocol": "HTTP_PROXY"},
                "bind": "127.0.0.1", "captureMode": "NONE", "hosts": ["*/*"],
            }]},
        }));
        mesh
    }

    /// Applies manifests, with the module that was built in place of the image.
    pub fn apply(&self, manifests: &str) {
        self.control_plane.apply(&with_local_module(manifests)).unwrap();
    }

    pub fn apply_json(&self, manifest: &Value) {
        self.control_plane.apply(&manifest.to_string()).unwrap();
    }

    /// An Envoy that is the sidecar of `app`, and a client that is the application: what the one asks, the other sends
    /// on by the mesh's routes for calls that leave.
    pub async fn sidecar(&self, app: &str) -> Envoy {
        self.proxy("sidecar", json!({"app": app}), "default", json!({"INTERCEPTION_MODE": "NONE"})).await
    }

    /// An Envoy that is the ingress gateway.
    pub async fn gateway(&self) -> Envoy {
        self.proxy("router", json!({"istio": "ingressgateway"}), "istio-system", json!({})).await
    }

    async fn proxy(&self, kind: &str, labels: Value, namespace: &str, more: Value) -> Envoy {
        let mut metadata = json!({
            "NAMESPACE": namespace, "LABELS": labels, "CLUSTER_ID": "Kubernetes", "ISTIO_VERSION": "1.31.0",
        });
        for (key, value) in more.as_object().unwrap() {
            metadata[key] = value.clone();
        }
        let node = json!({
            // An address that is no endpoint's: istiod would take the endpoint's labels for the proxy's.
            "id": format!("{kind}~10.0.0.1~proxy.{namespace}~{namespace}.svc.cluster.local"),
            "cluster": "proxy", "metadata": metadata,
        });
        let configuration = bootstrap(self.control_plane.discovery());
        Envoy::options().node(node).try_start_text(&configuration).await.unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// Applies manifests whose Gateway is to listen on port 80, on a free port in its place; a client of that.
    pub fn listen_at_gateway(&self, manifests: &str) -> Client {
        let port = free_port();
        assert!(manifests.contains("number: 80\n"), "{manifests}");
        // On loopback only.
        let bound = manifests.replace("number: 80\n", &format!("number: {port}\n"));
        self.apply(&bound.replace("  servers:\n  - hosts:", "  servers:\n  - bind: 127.0.0.1\n    hosts:"));
        Client::http1(SocketAddr::from(([127, 0, 0, 1], port))).without_reuse()
    }

    /// Lets the sidecars of `app` take what comes for it, and send it on to `target`; a client of that.
    pub fn listen_inbound(&self, app: &str, target: SocketAddr) -> Client {
        let inbound = SocketAddr::from(([127, 0, 0, 1], free_port()));
        // There are no certificates here, which a listener that offers TLS would wait for.
        self.apply_json(&json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": "default"}, "spec": {"mtls": {"mode": "DISABLE"}},
        }));
        self.apply_json(&json!({
            "apiVersion": "networking.istio.io/v1", "kind": "Sidecar",
            "metadata": {"name": app, "namespace": "default"},
            "spec": {
                "workloadSelector": {"labels": {"app": app}},
                "ingress": [{
                    "port": {"number": inbound.port(), "name": "http", "protocol": "HTTP"},
                    "bind": "127.0.0.1", "captureMode": "NONE", "defaultEndpoint": target.to_string(),
                }],
                "egress": [{
                    "port": {"number": self.outbound.port(), "name": "proxy", "protocol": "HTTP_PROXY"},
                    "bind": "127.0.0.1", "captureMode": "NONE", "hosts": ["*/*"],
                }],
            },
        }));
        Client::http1(inbound).without_reuse()
    }

    /// A client of the listener that takes a sidecar's outbound requests.
    pub fn outbound(&self) -> Client {
        Client::http1(self.outbound).without_reuse()
    }
}

/// What Istio's agent writes for Envoy, as far as these tests go.
fn bootstrap(discovery: SocketAddr) -> String {
    let ads = json!({"ads": {}, "resource_api_version": "V3"});
    json!({
        "dynamic_resources": {
            "lds_config": ads, "cds_config": ads,
            "ads_config": {
                "api_type": "GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
            },
        },
        "static_resources": {"clusters": [trimtab_testbed::http2_cluster("xds-grpc", discovery)]},
    })
    .to_string()
}

/// Replaces the image that plugins name with the module on this disk, which has no digest of a manifest.
pub fn with_local_module(manifests: &str) -> String {
    let url = format!("url: file://{}", wasm().display());
    let lines = manifests.lines().filter(|line| !line.trim_start().starts_with("sha256:"));
    let lines = lines.map(|line| match line.trim_start().strip_prefix("url: oci://") {
        Some(_) => line.split("url:").next().unwrap_or_default().to_owned() + &url,
        None => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n") + "\n"
}

/// Repeats a request until its answer is as wished: istiod pushes what was applied in its own time.
pub async fn settled(what: &str, client: &Client, request: Request, wished: impl Fn(&Response) -> bool) -> Response {
    eventually(what, async || {
        let response = client.try_send(request.clone()).await.ok()?;
        wished(&response).then_some(response)
    })
    .await
}

/// A call of the service, as the application makes it.
pub fn call(path: &str) -> Request {
    Request::get(path).authority("user-service")
}
