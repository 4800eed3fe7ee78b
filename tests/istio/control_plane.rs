//! A Kubernetes API server and istiod: what `kubectl apply` speaks to, and what a sidecar listens to.
//!
//! One of each serves all tests, one test at a time. They end with the test process, however it ends.

use crate::tools::{Answer, path, run};
use std::ffi::OsString;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Mutex, MutexGuard, OnceCell};
use trimtab_testbed::{Client, PATIENCE, ProcessGroup, Request, eventually};

pub struct ControlPlane {
    /// What istiod's clients speak to, in the clear.
    discovery: SocketAddr,
    folder: PathBuf,
    _processes: [ProcessGroup; 3],
    _cleaner: Child,
}

/// The control plane, empty, for one test.
pub async fn control_plane() -> MutexGuard<'static, ControlPlane> {
    static SHARED: OnceCell<Mutex<ControlPlane>> = OnceCell::const_new();
    let shared = SHARED.get_or_init(async || Mutex::new(ControlPlane::start().await)).await;
    let control_plane = shared.lock().await;
    // Whatever of Istio's a test has left behind.
    let kinds = ["api-resources", "--categories=istio-io", "--namespaced", "--output=name"];
    let kinds = control_plane.kubectl(&kinds, "").unwrap().lines().collect::<Vec<_>>().join(",");
    control_plane.kubectl(&["delete", &kinds, "--all", "--all-namespaces"], "").unwrap();
    control_plane
}

impl ControlPlane {
    async fn start() -> ControlPlane {
        let folder = tempfile::Builder::new().prefix("trimtab-istio-").tempdir().unwrap().keep();
        let cleaner = remove_in_the_end(&folder);
        let at = |name: &str| folder.join(name);

        let (etcd_port, peer_port) = (free_port(), free_port());
        let etcd = start(
            "etcd",
            &at("etcd.log"),
            &[
                format!("--data-dir={}", at("etcd").display()),
                format!("--listen-client-urls=http://127.0.0.1:{etcd_port}"),
                format!("--advertise-client-urls=http://127.0.0.1:{etcd_port}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer_port}"),
                "--unsafe-no-fsync".to_owned(),
            ],
            &[],
        );

        // Whoever shows this token may do everything.
        std::fs::write(at("tokens"), "trimtab,admin,admin,system:masters\n").unwrap();
        let api_port = free_port();
        let mut api_server = start(
            "kube-apiserver",
            &at("kube-apiserver.log"),
            &[
                format!("--etcd-servers=http://127.0.0.1:{etcd_port}"),
                "--bind-address=127.0.0.1".to_owned(),
                format!("--secure-port={api_port}"),
                format!("--cert-dir={}", at("certificates").display()),
                format!("--token-auth-file={}", at("tokens").display()),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                format!("--service-account-signing-key-file={}", path("key.pem").display()),
                format!("--service-account-key-file={}", path("cert.pem").display()),
                "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
                // Nobody answers at the address of the service `kubernetes`.
                "--endpoint-reconciler-type=none".to_owned(),
                "--disable-admission-plugins=ServiceAccount".to_owned(),
            ],
            &[],
        );
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster":
                {"server": format!("https://127.0.0.1:{api_port}"), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "test", "user": {"token": "trimtab"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        std::fs::write(at("kubeconfig"), kubeconfig.to_string()).unwrap();
        let kubectl = |arguments: &[&str]| kubectl(&at("kubeconfig"), arguments, "");
        eventually("the API server to be ready", async || {
            if let Some(status) = api_server.ended() {
                panic!("kube-apiserver ended with {status}:\n{}", last_lines(&at("kube-apiserver.log")));
            }
            kubectl(&["get", "--raw", "/readyz"]).ok.then_some(())
        })
        .await;
        let definitions = path("crds.yaml");
        kubectl(&["create", "--filename", definitions.to_str().unwrap()]).unwrap();
        kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"]).unwrap();
        kubectl(&["create", "namespace", "istio-system"]).unwrap();

        // No metrics and no tracing, whose filters the Envoy of the tests does not have; no TLS between the two.
        let mesh = "enableAutoMtls: false\nenableTracing: false\ndefaultProviders: {}\n";
        std::fs::write(at("mesh.yaml"), mesh).unwrap();
        let mut istiod = start(
            "pilot-discovery",
            &at("istiod.log"),
            &[
                "discovery".to_owned(),
                format!("--kubeconfig={}", at("kubeconfig").display()),
                format!("--meshConfig={}", at("mesh.yaml").display()),
                "--namespace=istio-system".to_owned(),
                "--grpcAddr=127.0.0.1:0".to_owned(),
                "--httpAddr=127.0.0.1:0".to_owned(),
                "--monitoringAddr=127.0.0.1:0".to_owned(),
                "--secureGRPCAddr=".to_owned(),
                "--httpsAddr=".to_owned(),
                "--ctrlz_port=0".to_owned(),
            ],
            &[
                ("ENABLE_CA_SERVER", "false"),
                ("INJECT_ENABLED", "false"),
                ("PILOT_ENABLE_METADATA_EXCHANGE", "false"),
                ("PILOT_ENABLE_ALPN_FILTER", "false"),
                ("POD_NAME", "istiod"),
                ("POD_NAMESPACE", "istio-system"),
                // A push follows a change at once.
                ("PILOT_DEBOUNCE_AFTER", "10ms"),
            ],
        );
        let log = at("istiod.log");
        let mut announced = async |what: &str| {
            eventually(&format!("istiod's {what}"), async || {
                if let Some(status) = istiod.ended() {
                    panic!("istiod ended with {status}:\n{}", last_lines(&log));
                }
                let log = std::fs::read_to_string(&log).unwrap_or_default();
                let address = log.split_once(what)?.1.split_whitespace().next()?;
                address.parse::<SocketAddr>().ok()
            })
            .await
        };
        let http = Client::http1(announced("starting HTTP service at ").await);
        let discovery = announced("starting gRPC discovery service at ").await;
        eventually("istiod to be ready", async || {
            let answer = http.try_send(Request::get("/ready")).await;
            answer.is_ok_and(|response| response.status == 200).then_some(())
        })
        .await;
        ControlPlane { discovery, folder, _processes: [etcd, api_server, istiod], _cleaner: cleaner }
    }

    pub fn discovery(&self) -> SocketAddr {
        self.discovery
    }

    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Answer {
        kubectl(&self.folder.join("kubeconfig"), arguments, input)
    }

    /// Applies manifests, as a user does. What the API server refuses is in the answer.
    pub fn apply(&self, manifests: &str) -> Answer {
        self.kubectl(&["apply", "--filename", "-"], manifests)
    }

    /// All that istiod has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("istiod.log")).unwrap_or_default()
    }

    /// Waits until istiod has logged `needle` after the first `before` bytes, and returns the line.
    pub async fn wait_for_log(&self, before: usize, needle: &str) -> String {
        eventually(&format!("{needle:?} in istiod's log"), async || {
            let log = self.log();
            log.get(before..)?.lines().find(|line| line.contains(needle)).map(ToOwned::to_owned)
        })
        .await
    }
}

/// Removes `folder` when the test process has ended. What all tests share is dropped by nobody, so a shell waits for the
/// end of its standard input, whose other end only the test process holds.
fn remove_in_the_end(folder: &Path) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", r#"read -r _; until rm -rf "$0"; do sleep 1; done"#]).arg(folder);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn().unwrap()
}

fn kubectl(kubeconfig: &Path, arguments: &[&str], input: &str) -> Answer {
    let timeout = format!("--request-timeout={}s", PATIENCE.as_secs());
    let common = ["--kubeconfig", kubeconfig.to_str().unwrap(), &timeout];
    run("kubectl", &[arguments, &common].concat(), input)
}

/// Starts a program of the control plane, its words going to `log`.
pub fn start(name: &str, log: &Path, arguments: &[String], environment: &[(&str, &str)]) -> ProcessGroup {
    let program: PathBuf = path(name);
    let command = [OsString::from(program)].into_iter().chain(arguments.iter().map(OsString::from));
    let environment: Vec<_> = environment.iter().map(|(key, value)| (*key, value.as_ref())).collect();
    ProcessGroup::start(command, &environment, &File::create(log).unwrap()).unwrap()
}

fn last_lines(log: &Path) -> String {
    let log = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// A free port for programs that cannot be given 0. It is one below those that the kernel gives out by itself, where
/// there are any: neither a listener that asks for any port nor a connection that leaves takes it in between.
pub fn free_port() -> u16 {
    static TRIED: AtomicUsize = AtomicUsize::new(0);
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let end: u16 = range.split_whitespace().next().unwrap().parse().unwrap();
    let below: Vec<u16> = (end.saturating_sub(10_000).max(1024)..end).collect();
    let bind = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()?.local_addr().ok();
    // Where to begin differs from process to process.
    let first = std::process::id() as usize;
    let mut tries = (0..below.len()).map(|_| first + TRIED.fetch_add(1, Ordering::Relaxed));
    let found = tries.find_map(|place| bind(*below.get(place % below.len())?));
    found.or_else(|| bind(0)).expect("a port is free").port()
}
