//! What becomes of the streams that a virtual machine held when it trapped.

use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use trimtab_testbed::{
    Bootstrap, Burst, Client, Envoy, Listener, Outcome, PATIENCE, Request, Upstream, cluster, eventually, needs_envoy,
    repository, wasm_filter,
};

/// The module of `tests/trap_filter`, which is built for the first test that asks for it.
fn trap_filter() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let arguments = ["build", "--quiet", "--release", "--package", "trap_filter", "--target", "wasm32-wasip1"];
        let target = repository().join("target");
        let built =
            Command::new(cargo).args(arguments).arg("--target-dir").arg(&target).current_dir(repository()).status();
        assert!(built.is_ok_and(|status| status.success()), "tests/trap_filter is not built");
        target.join("wasm32-wasip1/release/trap_filter.wasm")
    };
    BUILT.get_or_init(build).clone()
}

fn asked(what: &str) -> Request {
    Request::get("/").header("x-trap", what)
}

/// The streams that are held when the virtual machine traps.
const HELD: usize = 20;

/// An Envoy of one worker with that module, whose connection manager has this field besides.
async fn envoy(failure_policy: &str, upstream: &Upstream, (field, value): (&str, Value)) -> Envoy {
    let mut filter = wasm_filter("inbound", &trap_filter(), "");
    filter["typed_config"]["config"]["failure_policy"] = json!(failure_policy);
    let listener = Listener::new("inbound").filter(filter).manager(field, value);
    let bootstrap = Bootstrap::new().listener(listener).cluster(cluster("v1", upstream.address()));
    Envoy::options().concurrency(1).start(&bootstrap).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_timeout_ends_the_streams_that_a_trapped_module_held() {
    needs_envoy!();
    let upstream = Upstream::start("v1").await;
    // After the trap, what the next request gets.
    for (failure_policy, next_status) in [("FAIL_RELOAD", 200), ("FAIL_CLOSED", 503), ("FAIL_OPEN", 200)] {
        let envoy = envoy(failure_policy, &upstream, ("stream_idle_timeout", json!("5s"))).await;
        let address = envoy.address("inbound");
        let on_http2 = Burst::http2(address, 1, HELD, &asked("hold")).await;
        let on_http1 = Burst::http1(address, HELD, &asked("hold")).await;
        let active = "http.inbound.downstream_rq_active";
        envoy.wait_for_stat(active, |active| active == 2 * HELD as u64).await;

        let client = Client::http2(address);
        let trapped = client.send(asked("trap")).await;
        assert_eq!(trapped.status, 503, "{failure_policy}: {trapped:?}");
        // A virtual machine is loaded anew at most once a second.
        eventually(&format!("{failure_policy}: a {next_status}"), async || {
            (client.send(asked("nothing")).await.status == next_status).then_some(())
        })
        .await;
        for held in [on_http2, on_http1] {
            let outcomes = held.outcomes(PATIENCE).await;
            assert_eq!(outcomes.count(Outcome::Answered(503)), HELD, "{failure_policy}: {outcomes}");
        }
        let ended = envoy.stat("http.inbound.downstream_rq_idle_timeout").await;
        assert_eq!(ended, Some(2 * HELD as u64), "{failure_policy}: streams that the timeout ended");
        envoy.wait_for_stat(active, |active| active == 0).await;
    }
}
