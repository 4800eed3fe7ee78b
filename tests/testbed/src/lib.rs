//! What the end-to-end tests stand on: a real Envoy, real HTTP upstreams and
//! a real HTTP client, all on loopback ports that the kernel chooses.
//!
//! ```no_run
//! use trimtab_testbed::{Bootstrap, Client, Envoy, Listener, Request, Upstream, cluster};
//!
//! # async fn example() {
//! let v1 = Upstream::start("v1").await;
//! let v2 = Upstream::start("v2").await;
//! let envoy = Envoy::start(
//!     &Bootstrap::new()
//!         .listener(Listener::new("inbound").policy(r#"{"apiVersion": "trimtab/v1alpha1"}"#))
//!         .cluster(cluster("v1", v1.address()))
//!         .cluster(cluster("v2", v2.address())),
//! )
//! .await;
//!
//! let client = Client::http1(envoy.address("inbound"));
//! let response = client.send(Request::get("/users/7").header("x-canary", "true")).await;
//! assert_eq!(response.version(), "v2", "{response:?}\n{}", envoy.log_tail());
//! # }
//! ```
//!
//! Two rules hold throughout. Nothing listens on a fixed port, so tests run in
//! parallel. Nothing sleeps and hopes: whatever takes time is polled, with a
//! deadline, and a deadline that passes says what was awaited.

mod bootstrap;
pub mod browser;
mod burst;
mod client;
mod envoy;
mod installation;
mod message;
mod process;
mod ratelimit;
mod raw;
mod relay;
mod upstream;
mod yaml;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use bootstrap::{
    Bootstrap, Direction, Listener, by_cluster_header, by_subset, cluster, cluster_of, direct_response, http2_cluster,
    pipe_cluster, wasm_filter,
};
pub use burst::{Burst, Outcome, Outcomes, raise_descriptor_limit};
pub use client::Client;
pub use envoy::{Envoy, Options, Update};
pub use installation::{ENVOY_VERSION, Installation, Launcher};
pub use message::{Request, Response};
pub use process::ProcessGroup;
pub use ratelimit::{RateLimit, Redis};
pub use raw::{RawConnection, raw};
pub use relay::Relay;
pub use upstream::{Behaviour, Received, Upstream};
pub use yaml::json_from_yaml;

/// The longest that a test waits for any one thing. Generous, because a
/// machine that also compiles is slow, and because nobody waits for it in a
/// test that passes.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Polls `probe` until it gives a value, at most for [`PATIENCE`].
///
/// # Panics
/// When the time is over, with `awaited` in the message.
pub async fn eventually<T>(awaited: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "waited {PATIENCE:?} in vain for {awaited}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The root of the repository.
pub fn repository() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.ancestors().nth(2).expect("the package is in tests/testbed")
}

/// The module as it ships: `$TRIMTAB_WASM`, or `target/wasm/trimtab.wasm`.
///
/// # Panics
/// When it has not been built.
pub fn wasm() -> PathBuf {
    find_wasm().unwrap_or_else(|reason| panic!("{reason}"))
}

/// As [`wasm`], for a test that can go without.
///
/// # Errors
/// Where the module was looked for, and what to do.
pub fn find_wasm() -> Result<PathBuf, String> {
    let path =
        std::env::var_os("TRIMTAB_WASM").map_or_else(|| repository().join("target/wasm/trimtab.wasm"), PathBuf::from);
    match path.canonicalize() {
        Ok(path) => Ok(path),
        Err(_) => Err(format!("no module at {}: run `make build`", path.display())),
    }
}

/// Leaves the test, saying so, where there is no Envoy.
///
/// Tests that need Envoy start with `needs_envoy!();`. Where the environment
/// variable `CI` is set a missing Envoy is a failure: there, a test that did
/// not run must not look like one that passed.
#[macro_export]
macro_rules! needs_envoy {
    () => {
        if let Err(reason) = $crate::Installation::find() {
            assert!(std::env::var_os("CI").is_none(), "{reason}");
            println!("skipped: {reason}");
            return;
        }
    };
}
