//! Envoy's configuration, as far as tests need it: small functions that make
//! JSON, which Envoy reads as it reads YAML.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Map, Value, json};

/// How long a route may take. Long, so that it is never Envoy that ends a
/// request which a test delays.
const ROUTE_TIMEOUT: &str = "60s";

/// A whole configuration, less what [`crate::Envoy`] adds: admin and node.
#[derive(Debug, Clone, Default)]
pub struct Bootstrap {
    listeners: Vec<Listener>,
    clusters: Vec<Value>,
    fields: Map<String, Value>,
    dynamic: bool,
}

impl Bootstrap {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a listener.
    #[must_use]
    pub fn listener(mut self, listener: Listener) -> Self {
        self.listeners.push(listener);
        self
    }

    /// Adds a cluster.
    #[must_use]
    pub fn cluster(mut self, cluster: Value) -> Self {
        self.clusters.push(cluster);
        self
    }

    /// Sets any other field of the bootstrap document.
    #[must_use]
    pub fn field(mut self, field: &str, value: Value) -> Self {
        self.fields.insert(field.to_owned(), value);
        self
    }

    /// Delivers the listeners through a watched file in place of the static
    /// configuration, so that [`crate::Envoy::update`] can replace them.
    #[must_use]
    pub fn dynamic(mut self) -> Self {
        self.dynamic = true;
        self
    }

    /// The bootstrap document. Dynamic listeners come from `directory`, to
    /// which they are written, in their first version, here.
    pub(crate) fn write(&self, directory: &Path) -> std::io::Result<Value> {
        let mut document = json!({"static_resources": {"clusters": self.clusters}});
        for (field, value) in &self.fields {
            document[field] = value.clone();
        }
        if self.dynamic {
            deliver(directory, 1, &self.listeners)?;
            document["dynamic_resources"] = json!({"lds_config": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": directory.join(LISTENERS),
                    "watched_directory": {"path": directory},
                },
            }});
        } else {
            let listeners = self.listeners.iter().map(Listener::to_json);
            document["static_resources"]["listeners"] = listeners.collect();
        }
        Ok(document)
    }

    pub(crate) fn is_dynamic(&self) -> bool {
        self.dynamic
    }
}

const LISTENERS: &str = "listeners.json";

/// Puts listeners where Envoy watches for them. Envoy acts on the renaming, so
/// it never reads half a file.
pub(crate) fn deliver(directory: &Path, version: u64, listeners: &[Listener]) -> std::io::Result<()> {
    let resources = listeners.iter().map(|listener| {
        let mut resource = listener.to_json();
        resource["@type"] = json!("type.googleapis.com/envoy.config.listener.v3.Listener");
        resource
    });
    let document = json!({
        "version_info": version.to_string(),
        "resources": resources.collect::<Value>(),
    });
    let next = directory.join("next");
    std::fs::write(&next, document.to_string())?;
    std::fs::rename(next, directory.join(LISTENERS))
}

/// What Istio calls a listener's place: before the service or after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Requests to the service.
    Inbound,
    /// Requests of the service.
    Outbound,
}

/// A listener on a loopback port that the kernel chooses, with an HTTP
/// connection manager. It routes [`by_subset`] `v2`, by default to `v1`.
#[derive(Debug, Clone)]
pub struct Listener {
    name: String,
    direction: Option<Direction>,
    filters: Vec<Value>,
    routes: Value,
    manager: Map<String, Value>,
}

impl Listener {
    /// A listener without filters but the router.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            direction: None,
            filters: Vec::new(),
            routes: by_subset(&["v2"], "v1"),
            manager: Map::new(),
        }
    }

    /// Adds Trimtab with this policy. The plugin has the listener's name:
    /// plugins that differ in nothing would share one root context.
    #[must_use]
    pub fn policy(self, policy: &str) -> Self {
        let filter = wasm_filter(&self.name, &crate::wasm(), policy);
        self.filter(filter)
    }

    /// Adds an HTTP filter, after those there are.
    #[must_use]
    pub fn filter(mut self, filter: Value) -> Self {
        self.filters.push(filter);
        self
    }

    /// Replaces the routes.
    #[must_use]
    pub fn routes(mut self, routes: Value) -> Self {
        self.routes = routes;
        self
    }

    /// Sets `traffic_direction`.
    #[must_use]
    pub fn direction(mut self, direction: Direction) -> Self {
        self.direction = Some(direction);
        self
    }

    /// Whether Envoy makes an `x-request-id` (which it does by default).
    #[must_use]
    pub fn generate_request_id(self, generate: bool) -> Self {
        self.manager("generate_request_id", json!(generate))
    }

    /// Writes one line for each request to `path`, in Envoy's `format`
    /// (`%RESPONSE_CODE% %RESPONSE_FLAGS%\n`).
    #[must_use]
    pub fn access_log(self, path: &Path, format: &str) -> Self {
        let log = json!([{
            "name": "envoy.access_loggers.file",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": path,
                "log_format": {"text_format_source": {"inline_string": format}},
            },
        }]);
        self.manager("access_log", log)
    }

    /// Sets any field of the HTTP connection manager.
    #[must_use]
    pub fn manager(mut self, field: &str, value: Value) -> Self {
        self.manager.insert(field.to_owned(), value);
        self
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn to_json(&self) -> Value {
        let mut filters = self.filters.clone();
        filters.push(json!({
            "name": "envoy.filters.http.router",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
            },
        }));
        let mut manager = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": self.name,
            "http_protocol_options": {
                "accept_http_10": true,
                "default_host_for_http_10": "user-service",
            },
            "http_filters": filters,
            "route_config": {
                "name": self.name,
                // A test without v2 is no reason to refuse the default routes.
                "validate_clusters": false,
                "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": self.routes}],
            },
        });
        for (field, value) in &self.manager {
            manager[field] = value.clone();
        }
        let mut listener = json!({
            "name": self.name,
            "address": socket_address(SocketAddr::from(([127, 0, 0, 1], 0))),
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": manager,
            }]}],
        });
        if let Some(direction) = self.direction {
            listener["traffic_direction"] = match direction {
                Direction::Inbound => json!("INBOUND"),
                Direction::Outbound => json!("OUTBOUND"),
            };
        }
        listener
    }
}

/// A Wasm filter: `module` with `configuration`, handed over byte for byte.
/// A module that trapped is loaded anew.
pub fn wasm_filter(name: &str, module: &Path, configuration: &str) -> Value {
    json!({
        "name": "trimtab",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
            "config": {
                "name": name,
                "root_id": "trimtab",
                "failure_policy": "FAIL_RELOAD",
                "vm_config": {
                    "vm_id": "",
                    "runtime": "envoy.wasm.runtime.v8",
                    "code": {"local": {"filename": module}},
                },
                "configuration": {
                    "@type": "type.googleapis.com/google.protobuf.StringValue",
                    "value": configuration,
                },
            },
        },
    })
}

/// Routes steered by `x-trimtab-subset`: each subset has a route and a cluster
/// of its name; everything else goes to `default`.
pub fn by_subset(subsets: &[&str], default: &str) -> Value {
    let steered = subsets.iter().map(|subset| {
        let steering = json!([{"name": "x-trimtab-subset", "string_match": {"exact": subset}}]);
        json!({
            "name": subset,
            "match": {"prefix": "/", "headers": steering},
            "route": {"cluster": subset, "timeout": ROUTE_TIMEOUT},
        })
    });
    let fallback = json!({
        "name": default,
        "match": {"prefix": "/"},
        "route": {"cluster": default, "timeout": ROUTE_TIMEOUT},
    });
    steered.chain([fallback]).collect()
}

/// One route to the cluster that the header names.
pub fn by_cluster_header(header: &str) -> Value {
    json!([{
        "match": {"prefix": "/"},
        "route": {"cluster_header": header, "timeout": ROUTE_TIMEOUT},
    }])
}

/// One route that Envoy answers itself.
pub fn direct_response(status: u16, body: &str) -> Value {
    json!([{
        "match": {"prefix": "/"},
        "direct_response": {"status": status, "body": {"inline_string": body}},
    }])
}

/// A cluster of one endpoint that speaks HTTP/1.1.
pub fn cluster(name: &str, endpoint: SocketAddr) -> Value {
    cluster_of(name, &[endpoint])
}

/// A cluster of several endpoints that speak HTTP/1.1.
pub fn cluster_of(name: &str, endpoints: &[SocketAddr]) -> Value {
    cluster_at(name, endpoints.iter().map(|endpoint| socket_address(*endpoint)))
}

fn cluster_at(name: &str, addresses: impl Iterator<Item = Value>) -> Value {
    let endpoints = addresses.map(|address| json!({"endpoint": {"address": address}}));
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": endpoints.collect::<Value>()}],
        },
    })
}

/// A cluster of one endpoint that speaks HTTP/2, as gRPC needs.
pub fn http2_cluster(name: &str, endpoint: SocketAddr) -> Value {
    with_http2(cluster(name, endpoint))
}

/// A cluster of one endpoint that listens on a socket at a path and speaks
/// HTTP/2.
pub fn pipe_cluster(name: &str, path: &Path) -> Value {
    with_http2(cluster_at(name, std::iter::once(json!({"pipe": {"path": path}}))))
}

fn with_http2(mut cluster: Value) -> Value {
    cluster["typed_extension_protocol_options"] = json!({
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        },
    });
    cluster
}

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip(), "port_value": address.port()}})
}
