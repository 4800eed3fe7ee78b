//! A real Envoy, from its start to its certain end.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bootstrap::{Bootstrap, Listener, deliver};
use crate::client::Client;
use crate::installation::{Installation, Launcher};
use crate::message::Request;
use crate::process::ProcessGroup;
use crate::{PATIENCE, eventually};

/// How to start an Envoy.
#[derive(Debug, Clone)]
pub struct Options {
    launcher: Option<Launcher>,
    concurrency: u32,
    arguments: Vec<OsString>,
    node: Value,
    under: Vec<OsString>,
    patience: Duration,
    module_log_level: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            launcher: None,
            concurrency: 2,
            arguments: Vec::new(),
            node: json!({"id": "testbed", "cluster": "testbed"}),
            under: Vec::new(),
            patience: PATIENCE,
            module_log_level: "debug",
        }
    }
}

impl Options {
    /// Sets what starts Envoy, in place of the installation's choice.
    #[must_use]
    pub fn launcher(mut self, launcher: Launcher) -> Self {
        self.launcher = Some(launcher);
        self
    }

    /// Sets the number of workers, in place of two.
    #[must_use]
    pub fn concurrency(mut self, workers: u32) -> Self {
        self.concurrency = workers;
        self
    }

    /// Adds an argument to Envoy's command line.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Sets who this Envoy is to a control plane.
    #[must_use]
    pub fn node(mut self, node: Value) -> Self {
        self.node = node;
        self
    }

    /// Sets a program, with its first arguments, that runs Envoy: a profiler, say.
    #[must_use]
    pub fn under<S: Into<OsString>>(mut self, program: impl IntoIterator<Item = S>) -> Self {
        self.under = program.into_iter().map(Into::into).collect();
        self
    }

    /// Sets how long Envoy may take until it serves, in place of [`PATIENCE`].
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Logs the messages of modules from `info` on; otherwise from `debug` on, which is a line for each request.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.module_log_level = "info";
        self
    }

    /// Starts an Envoy and waits until it serves.
    ///
    /// # Panics
    /// When it does not, with the end of its log.
    pub async fn start(self, bootstrap: &Bootstrap) -> Envoy {
        self.try_start(bootstrap).await.unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// As [`start`](Self::start), for configurations that Envoy may refuse.
    ///
    /// # Errors
    /// What happened, with the end of Envoy's log.
    pub async fn try_start(self, bootstrap: &Bootstrap) -> Result<Envoy, String> {
        let directory = private_directory()?;
        let document = bootstrap
            .write(&directory.path().join(WATCHED))
            .map_err(|error| format!("cannot write the listeners: {error}"))?;
        let mut envoy = self.launch(directory, &document.to_string()).await?;
        // Envoy is ready with listeners or without: the verdict may come later.
        if bootstrap.is_dynamic() && !envoy.verdict(&BTreeMap::new()).await {
            envoy.wait_for_log("config update rejected").await;
            return Err(envoy.describe("Envoy rejected the listeners"));
        }
        envoy.refresh_listeners().await;
        Ok(envoy)
    }

    /// As [`start`](Self::start), from a configuration as text, in YAML or
    /// JSON. Its admin address, if any, gives way to one of the testbed's.
    ///
    /// # Errors
    /// What happened, with the end of Envoy's log.
    pub async fn try_start_text(self, configuration: &str) -> Result<Envoy, String> {
        self.launch(private_directory()?, configuration).await
    }

    async fn launch(self, directory: TempDir, configuration: &str) -> Result<Envoy, String> {
        let installation = Installation::find()?;
        let launcher = self.launcher.unwrap_or_else(|| installation.launcher());
        let at = |name: &str| directory.path().join(name);
        let io = |error: std::io::Error| format!("cannot start Envoy: {error}");

        let mut command = self.under;
        match (launcher, &installation.func_e) {
            (Launcher::Direct, _) => command.push(installation.envoy.clone().into()),
            (Launcher::FuncE, Some(func_e)) => command.extend([func_e.into(), "run".into()]),
            (Launcher::FuncE, None) => return Err("no func-e: run envoy/setup.sh".to_owned()),
        }
        // What the testbed needs of any configuration, merged over it.
        let overlay = json!({
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
            "node": self.node,
        });
        let (config, admin_address) = (at("envoy.yaml"), at("admin-address"));
        std::fs::write(&config, configuration).map_err(io)?;
        for argument in [
            OsStr::new("--config-path"),
            config.as_os_str(),
            OsStr::new("--config-yaml"),
            OsStr::new(&overlay.to_string()),
            OsStr::new("--admin-address-path"),
            admin_address.as_os_str(),
            OsStr::new("--concurrency"),
            OsStr::new(&self.concurrency.to_string()),
            // Several Envoys at once: nothing shared between them.
            OsStr::new("--disable-hot-restart"),
            // Tests read the access log and replace listeners: no long waits.
            OsStr::new("--file-flush-interval-msec"),
            OsStr::new("50"),
            OsStr::new("--drain-time-s"),
            OsStr::new("1"),
            OsStr::new("--component-log-level"),
            OsStr::new(&format!("main:warning,wasm:{}", self.module_log_level)),
        ] {
            command.push(argument.to_owned());
        }
        command.extend(self.arguments);

        let (home, runtime, log) = (at("func-e"), at("func-e-runtime"), at("log"));
        let environment = [
            ("ENVOY_PATH", installation.envoy.as_os_str()),
            ("FUNC_E_HOME", home.as_os_str()),
            ("FUNC_E_RUNTIME_DIR", runtime.as_os_str()),
        ];
        let output = File::create(&log).map_err(io)?;
        let process = ProcessGroup::start(command, &environment, &output).map_err(io)?;
        let mut envoy = Envoy {
            process,
            launcher,
            concurrency: self.concurrency,
            log,
            directory,
            admin: Client::http1(SocketAddr::from(([127, 0, 0, 1], 0))),
            listeners: BTreeMap::new(),
            version: 1,
        };
        envoy.await_ready(&admin_address, self.patience).await?;
        envoy.refresh_listeners().await;
        Ok(envoy)
    }
}

/// A running Envoy. It ends, with all that belongs to it, when dropped; if
/// that is because a test panics, the end of its log is printed.
#[derive(Debug)]
pub struct Envoy {
    // First, so that the process is gone before its files are.
    process: ProcessGroup,
    launcher: Launcher,
    concurrency: u32,
    admin: Client,
    listeners: BTreeMap<String, SocketAddr>,
    version: u64,
    log: PathBuf,
    directory: TempDir,
}

/// What Envoy made of new listeners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// They serve.
    Accepted,
    /// The old ones go on serving. What Envoy logged since the update came.
    Rejected(String),
}

const WATCHED: &str = "watched";
const LISTENERS: &str = "listener_manager.";
const ACCEPTED: &str = "listener_manager.lds.update_success";
const REJECTED: &str = "listener_manager.lds.update_rejected";

/// The longest time that a worker keeps what it has counted to itself.
const PUBLICATION: Duration = Duration::from_millis(100);

impl Envoy {
    /// Starts an Envoy of two workers. See [`Options::start`].
    pub async fn start(bootstrap: &Bootstrap) -> Self {
        Self::options().start(bootstrap).await
    }

    /// For an Envoy that is started otherwise.
    pub fn options() -> Options {
        Options::default()
    }

    /// What started it.
    pub fn launcher(&self) -> Launcher {
        self.launcher
    }

    /// The number of its process group: its own process id, or func-e's.
    pub fn process_group(&self) -> u32 {
        self.process.id()
    }

    /// Stops it from running without ending it, so that all that comes due meanwhile is due at once.
    ///
    /// # Panics
    /// When another program started it, which would be stopped in its place.
    pub fn pause(&self) {
        assert_eq!(self.launcher, Launcher::Direct, "Envoy itself is to be stopped");
        self.process.pause();
    }

    /// Lets it run on.
    pub fn resume(&self) {
        self.process.signal("CONT");
    }

    /// Its temporary directory, for access logs and the like.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where a listener listens.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn address(&self, listener: &str) -> SocketAddr {
        *self.listeners.get(listener).unwrap_or_else(|| {
            let names: Vec<_> = self.listeners.keys().collect();
            panic!("no listener {listener:?}, only {names:?}")
        })
    }

    /// Where its admin interface listens.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.address()
    }

    /// Replaces all listeners (of a [`Bootstrap::dynamic`] configuration) and
    /// waits for the verdict. Connections made from now on see listeners that
    /// were accepted; connections from before are closed after a second.
    ///
    /// # Panics
    /// When there is no verdict, or a listener is new: Envoy would give it the
    /// socket of one that it is draining, for all of them have port 0.
    pub async fn update(&mut self, listeners: &[Listener]) -> Update {
        for listener in listeners {
            self.address(listener.name());
        }
        let log_before = self.log().len();
        let before = self.stats(LISTENERS).await;
        self.version += 1;
        deliver(&self.directory.path().join(WATCHED), self.version, listeners)
            .expect("the temporary directory can be written to");

        if !self.verdict(&before).await {
            // The line with the reason follows the counter, and all that the
            // module had to say precedes it.
            let reason = eventually("the reason for the rejection", async || {
                let log = self.log().split_off(log_before);
                (log.contains("config update rejected") && log.ends_with('\n')).then_some(log)
            });
            return Update::Rejected(reason.await);
        }
        // Accepted is what the main thread says. Each worker reports each
        // listener that it took over.
        eventually("the workers to take over the listeners", async || {
            let now = self.stats(LISTENERS).await;
            let growth = |name: &str| now.get(name)?.checked_sub(*before.get(name)?);
            let modified = growth("listener_manager.listener_modified")?;
            let taken_over = growth("listener_manager.listener_create_success")?;
            (taken_over >= modified * u64::from(self.concurrency)).then_some(())
        })
        .await;
        Update::Accepted
    }

    /// Whether Envoy took the listeners that were delivered after `before`.
    async fn verdict(&self, before: &BTreeMap<String, u64>) -> bool {
        eventually("a verdict on the listeners", async || {
            let now = self.stats(LISTENERS).await;
            let count = |stats: &BTreeMap<_, _>, name| stats.get(name).copied().unwrap_or(0);
            let grown = |name| count(&now, name) > count(before, name);
            (grown(ACCEPTED) || grown(REJECTED)).then(|| grown(ACCEPTED))
        })
        .await
    }

    /// The answer of the admin interface to a GET.
    ///
    /// # Panics
    /// When there is none, or it is not 200.
    pub async fn admin(&self, path: &str) -> String {
        let response = self.admin.send(Request::get(path)).await;
        assert_eq!(response.status, 200, "{response:?}");
        response.text()
    }

    /// The admin interface, for all else.
    pub fn admin_client(&self) -> &Client {
        &self.admin
    }

    /// The counters and gauges whose names start with `prefix`.
    pub async fn stats(&self, prefix: &str) -> BTreeMap<String, u64> {
        // The parameter is a regular expression. What could be special in it
        // or in a URL is replaced by "any character": the prefix decides.
        let pattern: String = prefix.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '.' }).collect();
        self.admin(&format!("/stats?filter=%5E{pattern}"))
            .await
            .lines()
            .filter(|line| line.starts_with(prefix))
            .filter_map(|line| line.rsplit_once(": "))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
            .collect()
    }

    /// A counter or gauge; `None` if Envoy has no such statistic (yet).
    pub async fn stat(&self, name: &str) -> Option<u64> {
        self.stats(name).await.get(name).copied()
    }

    /// The value of a metric of the module, once its workers have published what they have counted. They do so within
    /// a tenth of a second; the metrics of the module are read until they have not changed for twice as long. Where the expected
    /// value is known, [`Envoy::wait_for_stat`] depends on no time.
    pub async fn module_metric(&self, name: &str) -> Option<u64> {
        let (mut known, mut unchanged_since) = (self.stats("wasmcustom.").await, tokio::time::Instant::now());
        while unchanged_since.elapsed() < 2 * PUBLICATION {
            tokio::time::sleep(PUBLICATION / 4).await;
            let now = self.stats("wasmcustom.").await;
            if now != known {
                (known, unchanged_since) = (now, tokio::time::Instant::now());
            }
        }
        known.get(name).copied()
    }

    /// Waits until a counter or gauge is as wished, and returns it.
    ///
    /// # Panics
    /// When that does not happen within [`PATIENCE`].
    pub async fn wait_for_stat(&self, name: &str, wished: impl Fn(u64) -> bool) -> u64 {
        eventually(&format!("the statistic {name}"), async || self.stat(name).await.filter(|value| wished(*value)))
            .await
    }

    /// The whole configuration, as Envoy runs it.
    pub async fn config_dump(&self) -> Value {
        serde_json::from_str(&self.admin("/config_dump").await).expect("Envoy speaks JSON")
    }

    /// The file that Envoy logs to.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// All that Envoy has logged, what the module logged included.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The last lines of the log, for messages.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Waits until the log contains `needle`, and returns the line.
    ///
    /// # Panics
    /// When that does not happen within [`PATIENCE`].
    pub async fn wait_for_log(&self, needle: &str) -> String {
        eventually(&format!("{needle:?} in Envoy's log"), async || {
            let log = self.log();
            log.lines().find(|line| line.contains(needle)).map(ToOwned::to_owned)
        })
        .await
    }

    async fn await_ready(&mut self, admin_address: &Path, patience: Duration) -> Result<(), String> {
        let deadline = tokio::time::Instant::now() + patience;
        while !self.is_ready(admin_address).await {
            if let Some(status) = self.process.ended() {
                return Err(self.describe(&format!("Envoy ended with {status}")));
            }
            if tokio::time::Instant::now() > deadline {
                return Err(self.describe(&format!("Envoy was not ready in {patience:?}")));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    async fn is_ready(&mut self, admin_address: &Path) -> bool {
        let address = std::fs::read_to_string(admin_address).ok();
        let Some(address) = address.and_then(|text| text.trim().parse().ok()) else {
            return false;
        };
        self.admin = Client::http1(address);
        let answer = self.admin.try_send(Request::get("/ready")).await;
        // LIVE is said a moment before the workers accept connections.
        answer.is_ok_and(|response| response.status == 200)
            && self.stat("listener_manager.workers_started").await == Some(1)
    }

    async fn refresh_listeners(&mut self) {
        let listing = self.admin("/listeners?format=json").await;
        let listing: Value = serde_json::from_str(&listing).expect("Envoy speaks JSON");
        let statuses = listing["listener_statuses"].as_array();
        self.listeners = statuses
            .into_iter()
            .flatten()
            .filter_map(|status| {
                let address = &status["local_address"]["socket_address"];
                let ip = address["address"].as_str()?.parse().ok()?;
                let port = address["port_value"].as_u64()?.try_into().ok()?;
                let name = status["name"].as_str()?.to_owned();
                Some((name, SocketAddr::new(ip, port)))
            })
            .collect();
    }

    fn describe(&self, what: &str) -> String {
        format!("{what}; the end of its log:\n{}", self.log_tail())
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.describe("a test with this Envoy failed"));
        }
    }
}

/// A directory with a place for dynamic listeners.
fn private_directory() -> Result<TempDir, String> {
    let directory = tempfile::Builder::new().prefix("trimtab-").tempdir();
    directory
        .and_then(|directory| {
            std::fs::create_dir(directory.path().join(WATCHED))?;
            Ok(directory)
        })
        .map_err(|error| format!("cannot make a temporary directory: {error}"))
}
