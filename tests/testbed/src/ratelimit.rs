//! A real rate limit service, envoyproxy's, with a real Redis behind it. They
//! listen on sockets in temporary directories, so they need no port.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::eventually;
use crate::installation::{Installation, executable};
use crate::process::ProcessGroup;
use crate::repository;

impl Installation {
    /// The rate limit service that `envoy/setup.sh` built.
    ///
    /// # Errors
    /// A sentence that says what is missing and what to do.
    pub fn ratelimit() -> Result<PathBuf, String> {
        executable(&repository().join(".cache/bin/ratelimit")).ok_or_else(|| {
            let go = Command::new("go").arg("version").output();
            match go.is_ok_and(|output| output.status.success()) {
                true => "no rate limit service: run envoy/setup.sh ratelimit".to_owned(),
                false => "no Go toolchain, and so no rate limit service".to_owned(),
            }
        })
    }

    /// A Redis server: the one that `envoy/setup.sh` found or installed.
    ///
    /// # Errors
    /// A sentence that says what is missing and what to do.
    pub fn redis() -> Result<PathBuf, String> {
        // Not resolved: Debian's server is a link to a program that goes by its name.
        let path = repository().join(".cache/bin/redis-server");
        executable(&path).map(|_| path).ok_or_else(|| "no Redis: run envoy/setup.sh redis".to_owned())
    }
}

/// A Redis that keeps nothing. It ends when dropped.
#[derive(Debug)]
pub struct Redis {
    process: ProcessGroup,
    directory: TempDir,
}

impl Redis {
    /// Starts a server and waits until it accepts connections.
    ///
    /// # Panics
    /// When it does not.
    pub async fn start() -> Self {
        let program = Installation::redis().unwrap_or_else(|missing| panic!("{missing}"));
        let directory = tempfile::tempdir().expect("a temporary directory");
        let socket = directory.path().join("socket");
        let command: [&OsStr; 9] = [
            program.as_os_str(),
            OsStr::new("--port"),
            OsStr::new("0"),
            OsStr::new("--save"),
            OsStr::new(""),
            OsStr::new("--dir"),
            directory.path().as_os_str(),
            OsStr::new("--unixsocket"),
            socket.as_os_str(),
        ];
        let log = File::create(directory.path().join("log")).expect("the directory can be written to");
        let process = ProcessGroup::start(command, &[], &log).expect("Redis starts");
        eventually("Redis", async || UnixStream::connect(&socket).ok()).await;
        Self { process, directory }
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Stops it from running without ending it: it accepts connections and says nothing.
    pub fn pause(&self) {
        self.process.pause();
    }
}

/// A rate limit service that can be killed, started again and paused. It ends
/// when dropped.
#[derive(Debug)]
pub struct RateLimit {
    process: Option<ProcessGroup>,
    redis: PathBuf,
    directory: TempDir,
}

impl RateLimit {
    /// Starts a service with this configuration, in its own YAML, and waits
    /// until it accepts connections.
    ///
    /// # Panics
    /// When it does not.
    pub async fn start(redis: &Redis, configuration: &str) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let config = directory.path().join("ratelimit/config");
        std::fs::create_dir_all(&config)
            .and_then(|()| std::fs::write(config.join("limits.yaml"), configuration))
            .expect("the directory can be written to");
        let mut service = Self { process: None, redis: redis.socket(), directory };
        service.restart().await;
        service
    }

    /// Starts the service again after [`kill`](Self::kill).
    ///
    /// # Panics
    /// When it does not accept connections.
    pub async fn restart(&mut self) {
        let program = Installation::ratelimit().unwrap_or_else(|missing| panic!("{missing}"));
        let _ = std::fs::remove_file(self.socket());
        let [socket, root] = [self.socket(), self.directory.path().to_owned()];
        let environment = [
            ("GRPC_UDS", socket.as_os_str()),
            ("HOST", OsStr::new("127.0.0.1")),
            ("PORT", OsStr::new("0")),
            ("DEBUG_HOST", OsStr::new("127.0.0.1")),
            ("DEBUG_PORT", OsStr::new("0")),
            ("RUNTIME_ROOT", root.as_os_str()),
            ("RUNTIME_SUBDIRECTORY", OsStr::new("ratelimit")),
            ("RUNTIME_WATCH_ROOT", OsStr::new("false")),
            ("USE_STATSD", OsStr::new("false")),
            ("REDIS_SOCKET_TYPE", OsStr::new("unix")),
            ("REDIS_URL", self.redis.as_os_str()),
        ];
        let log = File::create(root.join("log")).expect("the directory can be written to");
        self.process = Some(ProcessGroup::start([&program], &environment, &log).expect("the service starts"));
        eventually("the rate limit service", async || UnixStream::connect(self.socket()).ok()).await;
    }

    /// The socket that it listens on, for [`pipe_cluster`](crate::pipe_cluster).
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Stops it from running without ending it: it accepts connections and says nothing.
    pub fn pause(&self) {
        self.process.as_ref().expect("the service runs").pause();
    }

    /// Lets it run on.
    pub fn resume(&self) {
        self.process.as_ref().expect("the service runs").signal("CONT");
    }

    /// All that it has logged since it was started last.
    pub fn log(&self) -> String {
        std::fs::read_to_string(Path::join(self.directory.path(), "log")).unwrap_or_default()
    }
}

/// Leaves the test, saying so, where there is no rate limit service or no
/// Redis; as [`needs_envoy`](crate::needs_envoy), which it includes.
#[macro_export]
macro_rules! needs_ratelimit {
    () => {
        $crate::needs_envoy!();
        if let Err(reason) = $crate::Installation::ratelimit().and_then(|_| $crate::Installation::redis()) {
            assert!(std::env::var_os("CI").is_none(), "{reason}");
            println!("skipped: {reason}");
            return;
        }
    };
}
