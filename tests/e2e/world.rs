//! Where the end-to-end tests live: one Envoy with Trimtab before two versions of a service.

use trimtab_testbed::{Bootstrap, Client, Envoy, Listener, Upstream, cluster, http2_cluster};

/// An Envoy and the upstreams v1 and v2.
pub struct World {
    pub envoy: Envoy,
    pub v1: Upstream,
    pub v2: Upstream,
}

/// What differs between worlds.
#[derive(Clone, Copy)]
pub struct Setup {
    pub workers: u32,
    /// Upstreams speak HTTP/2, as gRPC needs.
    pub http2: bool,
    /// Listeners can be updated.
    pub dynamic: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Setup { workers: 2, http2: false, dynamic: false }
    }
}

impl World {
    pub async fn start(policy: &str) -> World {
        World::with(policy, Setup::default()).await
    }

    pub async fn with(policy: &str, setup: Setup) -> World {
        World::behind(listener(policy), setup).await
    }

    /// A world with a listener of its own, called `inbound` too.
    pub async fn behind(listener: Listener, setup: Setup) -> World {
        let (v1, v2) = (Upstream::start("v1").await, Upstream::start("v2").await);
        let cluster = if setup.http2 { http2_cluster } else { cluster };
        let mut bootstrap = Bootstrap::new()
            .listener(listener)
            .cluster(cluster("v1", v1.address()))
            .cluster(cluster("v2", v2.address()));
        if setup.dynamic {
            bootstrap = bootstrap.dynamic();
        }
        let envoy = Envoy::options().concurrency(setup.workers).start(&bootstrap).await;
        World { envoy, v1, v2 }
    }

    /// A client that keeps its connections.
    pub fn client(&self) -> Client {
        Client::http1(self.envoy.address("inbound"))
    }

    /// A client whose requests spread over all workers.
    pub fn spreading_client(&self) -> Client {
        self.client().without_reuse()
    }

    pub fn http2_client(&self) -> Client {
        Client::http2(self.envoy.address("inbound"))
    }

    /// The value of a metric of ours, once what was counted is published.
    pub async fn metric(&self, name: &str) -> u64 {
        let name = format!("wasmcustom.trimtab.policy.user-service.{name}");
        self.envoy.module_metric(&name).await.unwrap_or_else(|| panic!("no metric {name}"))
    }

    /// The value of a gauge of ours, which is written when it changes and not by the ticks that publish counters.
    pub async fn gauge(&self, name: &str) -> u64 {
        let name = format!("wasmcustom.trimtab.policy.user-service.{name}");
        self.envoy.stat(&name).await.unwrap_or_else(|| panic!("no metric {name}"))
    }

    /// That no request has trapped the module, to be asked at the end of a test.
    pub async fn assert_no_trap(&self) {
        for (name, value) in self.envoy.stats("wasm.").await {
            assert!(!name.contains("vm_reload") || value == 0, "{name} is {value}\n{}", self.envoy.log_tail());
        }
        for needle in ["wasm_fail_stream", "panicked", "Function: proxy_on"] {
            assert!(!self.envoy.log().contains(needle), "{needle}\n{}", self.envoy.log_tail());
        }
    }
}

/// The listener that all worlds have.
pub fn listener(policy: &str) -> Listener {
    Listener::new("inbound").policy(policy)
}

/// A policy of these routes, and what else is written after them.
pub fn policy(routes: &str, more: &str) -> String {
    format!(r#"{{"apiVersion": "trimtab/v1alpha1", "name": "user-service", "routes": [{routes}]{more}}}"#)
}
