//! Istio's agent between istiod and Envoy, as in a pod: it fetches the module, from a registry, by its digest.

use crate::control_plane::{free_port, start};
use crate::manifests::{render, render_with};
use crate::mesh::{Mesh, call, settled};
use crate::tools::{answer, needs_istio, path};
use serde_json::json;
use std::ffi::OsString;
use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;
use trimtab_testbed::{Behaviour, Client, Installation, ProcessGroup, Request, Response, eventually, repository};

/// A registry on loopback.
struct Registry {
    address: String,
    _process: ProcessGroup,
    _folder: TempDir,
}

/// An image in a registry.
struct Image {
    name: String,
    digest: String,
}

impl Registry {
    async fn start() -> Registry {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("127.0.0.1:{}", free_port());
        let arguments = ["registry", "serve", "--address", &address].map(str::to_owned);
        let process = start("crane", &folder.path().join("log"), &arguments, &[]);
        let client = Client::http1(address.parse().unwrap());
        eventually("the registry", async || client.try_send(Request::get("/v2/")).await.ok()).await;
        Registry { address, _process: process, _folder: folder }
    }

    /// Pushes what `make image` made.
    fn push(&self) -> Image {
        self.push_layout("image")
    }

    fn push_layout(&self, layout: &str) -> Image {
        let name = format!("{}/team/trimtab:test", self.address);
        let layout = repository().join("target").join(layout);
        assert!(layout.join("index.json").exists(), "no image: run `make image`");
        let pushed = answer(Command::new(path("crane")).arg("push").arg(&layout).arg(&name), "").unwrap();
        let digest = pushed.trim().rsplit_once("sha256:").unwrap().1.to_owned();
        Image { name, digest }
    }
}

impl Image {
    /// The base with this image.
    fn manifests(&self, digest: &str) -> String {
        self.put_into(&render("istio/base"), digest)
    }

    fn put_into(&self, manifests: &str, digest: &str) -> String {
        let lines = manifests.lines().map(|line| match line.trim_start() {
            key if key.starts_with("url: oci://") => format!("  url: oci://{}", self.name),
            key if key.starts_with("sha256:") => format!("  sha256: \"{digest}\""),
            _ => line.to_owned(),
        });
        lines.collect::<Vec<_>>().join("\n") + "\n"
    }
}

/// A pod's istio-proxy container: the agent, and the Envoy that it starts.
struct Pod {
    folder: TempDir,
    admin_port: u16,
    _process: ProcessGroup,
}

impl Pod {
    fn start(mesh: &Mesh, app: &str) -> Pod {
        Pod::start_with(mesh, app, None)
    }

    /// As [`start`](Self::start), with what the annotation `sidecar.istio.io/bootstrapOverride` mounts.
    fn start_with(mesh: &Mesh, app: &str, bootstrap: Option<&str>) -> Pod {
        let folder = tempfile::Builder::new().prefix("trimtab-pod-").tempdir().unwrap();
        let admin_port = free_port();
        let configuration = json!({
            "discoveryAddress": mesh.control_plane.discovery().to_string(),
            "controlPlaneAuthPolicy": "NONE",
            "binaryPath": Installation::find().unwrap().envoy,
            "configPath": folder.path().join("proxy"),
            "proxyAdminPort": admin_port,
            "statusPort": free_port(),
            "concurrency": 2,
        });
        let template = path("envoy_bootstrap.json");
        let arguments = [
            "proxy",
            "sidecar",
            "--domain=default.svc.cluster.local",
            "--serviceCluster=storefront.default",
            &format!("--templateFile={}", template.display()),
            "--proxyLogLevel=info",
        ]
        .map(str::to_owned);
        let (configuration, labels) = (configuration.to_string(), json!({"app": app}).to_string());
        let ports = [(); 3].map(|()| free_port().to_string());
        let mounted = folder.path().join("custom_bootstrap.json");
        let mut environment = vec![
            ("PROXY_CONFIG", configuration.as_str()),
            ("ISTIO_METAJSON_LABELS", &labels),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIO_META_INTERCEPTION_MODE", "NONE"),
            ("INSTANCE_IP", "10.0.0.1"),
            ("POD_NAME", "storefront"),
            ("POD_NAMESPACE", "default"),
            // No certificates here, and so no authority to ask for them.
            ("FILE_MOUNTED_CERTS", "true"),
            ("ENVOY_PROMETHEUS_PORT", &ports[0]),
            ("ENVOY_STATUS_PORT", &ports[1]),
            ("DNS_PROXY_ADDR", ""),
        ];
        if let Some(bootstrap) = bootstrap {
            std::fs::write(&mounted, bootstrap).unwrap();
            environment.push(("ISTIO_BOOTSTRAP_OVERRIDE", mounted.to_str().unwrap()));
        }
        // The agent keeps its socket and what it fetched below the working directory.
        let process = in_folder(folder.path(), &arguments, &environment);
        Pod { folder, admin_port, _process: process }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// What `pilot-agent request GET` answers in a pod: it asks Envoy's admin interface, but on no other port than 15000.
    async fn request(&self, what: &str) -> String {
        let admin = Client::http1(SocketAddr::from(([127, 0, 0, 1], self.admin_port)));
        admin.send(Request::get(&format!("/{what}"))).await.text()
    }

    async fn wait_for_log(&self, needle: &str) -> String {
        eventually(&format!("{needle:?} in the agent's log"), async || {
            self.log().lines().find(|line| line.contains(needle)).map(ToOwned::to_owned)
        })
        .await
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("the end of the agent's log:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
    }
}

/// Gives the agent a `/var/lib` of its own, where it keeps what it fetched: its place there is not to be chosen.
const OWN_DATA: &str = "mount -t tmpfs none /var/lib && mkdir -p /var/lib/istio/data";

/// Leaves the test, saying so, where a process cannot have file systems of its own.
macro_rules! needs_namespaces {
    () => {
        let answer = answer(Command::new("unshare").args(["-rm", "sh", "-c", OWN_DATA]), "");
        if !answer.ok {
            println!("skipped: no mount namespaces here: {}", answer.stderr);
            return;
        }
    };
}

fn in_folder(folder: &Path, arguments: &[String], environment: &[(&str, &str)]) -> ProcessGroup {
    let script = format!(r#"{OWN_DATA} && cd "$1" && shift && exec "$@""#);
    let shell = ["unshare", "-rm", "sh", "-c", &script, "sh"].map(OsString::from);
    let program = [folder.as_os_str().to_owned(), path("pilot-agent").into_os_string()];
    let command = shell.into_iter().chain(program).chain(arguments.iter().map(OsString::from));
    let environment: Vec<_> = environment.iter().map(|(key, value)| (*key, value.as_ref())).collect();
    let log = File::create(folder.join("log")).unwrap();
    ProcessGroup::start(command, &environment, &log).unwrap()
}

/// A request of a tester, who is to be on v2.
fn tester() -> Request {
    call("/").header("x-canary", "true")
}

#[tokio::test]
async fn the_agent_fetches_the_image_and_checks_its_digest() {
    needs_istio!();
    needs_namespaces!();
    let (mesh, registry) = (Mesh::start().await, Registry::start().await);
    let image = registry.push();
    mesh.control_plane.apply(&image.manifests(&image.digest)).unwrap();
    let pod = Pod::start(&mesh, "storefront");
    settled("testers to be on v2", &mesh.outbound(), tester(), |response| response.version() == "v2").await;
    pod.wait_for_log("fetching image team/trimtab from registry").await;
    pod.wait_for_log("policy user-service is loaded: 2 routes").await;
}

#[tokio::test]
async fn the_artifact_layout_is_fetched_too() {
    needs_istio!();
    needs_namespaces!();
    let (mesh, registry) = (Mesh::start().await, Registry::start().await);
    let image = registry.push_layout("image-artifact");
    mesh.control_plane.apply(&image.manifests(&image.digest)).unwrap();
    let _pod = Pod::start(&mesh, "storefront");
    settled("testers to be on v2", &mesh.outbound(), tester(), |response| response.version() == "v2").await;
}

#[tokio::test]
async fn a_wrong_digest_is_not_run_and_the_strategy_decides() {
    needs_istio!();
    needs_namespaces!();
    let (mesh, registry) = (Mesh::start().await, Registry::start().await);
    let image = registry.push();
    let wrong = image.manifests(&"0".repeat(64));
    mesh.control_plane.apply(&wrong).unwrap();
    let pod = Pod::start(&mesh, "storefront");
    let client = mesh.outbound();
    // FAIL_OPEN, as the base has it: traffic is what it would be without the module, and that is stable.
    settled("the stable version", &client, tester(), |response| response.version() == "v1").await;
    let line = pod.wait_for_log("error in converting the wasm config to local").await;
    assert!(line.contains(&image.digest) && line.ends_with("applying allow RBAC filter"), "{line}");
    // FAIL_CLOSE and FAIL_RELOAD: what cannot be guarded is not let through.
    for strategy in ["FAIL_CLOSE", "FAIL_RELOAD"] {
        mesh.control_plane.apply(&wrong.replace("FAIL_OPEN", strategy)).unwrap();
        let denied = |response: &Response| response.status == 403;
        settled(&format!("a denial, with {strategy}"), &client, tester(), denied).await;
        mesh.control_plane.apply(&wrong).unwrap();
        settled("the stable version again", &client, tester(), |response| response.version() == "v1").await;
    }
    // The right digest mends it, without a restart.
    mesh.control_plane.apply(&image.manifests(&image.digest)).unwrap();
    settled("testers to be on v2", &client, tester(), |response| response.version() == "v2").await;
}

#[tokio::test]
async fn five_commands_from_nothing_to_a_judged_canary() {
    needs_istio!();
    needs_namespaces!();
    let (mesh, registry) = (Mesh::start().await, Registry::start().await);
    let readme = std::fs::read_to_string(repository().join("istio/README.md")).unwrap();
    let commands: Vec<&str> = readme.lines().filter_map(|line| line.strip_prefix("$ ")).take(5).collect();
    let [push, check, begin, apply, look] = commands.as_slice() else { panic!("{commands:?}") };

    // A checkout of one's own: two of the commands write into it.
    let checkout = tempfile::tempdir().unwrap();
    let within = checkout.path();
    answer(Command::new("cp").args(["-R", "istio", "Cargo.toml"]).arg(within), "").unwrap();
    for shared in ["target", ".cache"] {
        std::os::unix::fs::symlink(repository().join(shared), within.join(shared)).unwrap();
    }
    let shell = |script: &str| {
        let program = Path::new(env!("CARGO_BIN_EXE_trimtab")).parent().unwrap().to_owned();
        let path = std::env::join_paths(
            [program].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
        );
        let script = format!("cd {} && {script}", within.display());
        answer(Command::new("sh").args(["-c", &script]).env("PATH", path.unwrap()), "").unwrap()
    };

    assert_eq!(*push, "make push REGISTRY=registry.example/team");
    // `make image` was there before the tests; this is what else the target does.
    let pushed = shell(&format!("istio/push.sh {}/team", registry.address));
    assert!(pushed.contains("sha256: "), "{pushed}");
    assert!(shell(check).contains("ok (1 route)"));
    shell(begin);
    let folder = apply.strip_prefix("kubectl apply -k ").unwrap();
    mesh.control_plane.kubectl(&["apply", "-k", within.join(folder).to_str().unwrap()], "").unwrap();

    mesh.v2.set_behaviour(Behaviour::echo().status(500));
    let pod = Pod::start(&mesh, "storefront");
    let client = mesh.outbound();
    let by = |user: usize| call("/").header("x-user-id", format!("user-{user}"));
    settled("the stable version", &client, by(0), |response| response.version() == "v1").await;
    let what = look.split_once("GET ").unwrap().1.trim_matches('\'');
    let mut asked = 0;
    while !pod.request(what).await.contains("judge.failed: 1") {
        for _ in 0..100 {
            client.send(by(asked)).await;
            asked += 1;
        }
        assert!(asked < 5_000, "v2 fails always, and after {asked} requests: {}", pod.request(what).await);
    }
    let before = mesh.v2.count();
    for user in 0..200 {
        assert_eq!(client.send(by(user)).await.version(), "v1", "after the verdict: user-{user}");
    }
    assert_eq!(mesh.v2.count(), before);
}

#[tokio::test]
async fn prometheus_gets_labels() {
    needs_istio!();
    needs_namespaces!();
    let (mesh, registry) = (Mesh::start().await, Registry::start().await);
    let image = registry.push();
    mesh.control_plane.apply(&image.put_into(&render_with("metrics"), &image.digest)).unwrap();
    let jsonpath = r"jsonpath={.data.custom_bootstrap\.json}";
    let bootstrap = ["get", "configmap", "trimtab-bootstrap", "--output", jsonpath];
    let bootstrap = mesh.control_plane.kubectl(&bootstrap, "").unwrap();
    let pod = Pod::start_with(&mesh, "storefront", Some(&bootstrap));
    settled("testers to be on v2", &mesh.outbound(), tester(), |response| response.version() == "v2").await;
    let line = r#"trimtab_policy_route_subset_requests{policy="user-service",route="by-header",subset="v2"} "#;
    eventually(line, async || pod.request("stats/prometheus").await.contains(line).then_some(())).await;
}
