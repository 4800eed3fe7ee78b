//! A child process that cannot outlive the test that started it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use crate::PATIENCE;

/// The program and everything it starts form one process group. A small shell
/// in the group waits for the end of its standard input, whose other end only
/// the test process holds, and then kills the group. So the group ends when
/// this value is dropped, when the test panics, and also when the test process
/// is killed and runs no destructor at all. (The kernel's parent-death signal
/// would be tied to the thread that started the program, and a test's thread
/// ends long before its process.)
const GUARDED: &str = r#"
exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
exec "$@" 3<&-
"#;

/// A program and everything it started. They end when this is dropped.
#[derive(Debug)]
pub struct ProcessGroup(Child);

impl ProcessGroup {
    /// Starts `command` (a program and its arguments) with both its outputs
    /// going to `output`.
    ///
    /// # Errors
    /// When the shell that guards it cannot be started.
    pub fn start<S: AsRef<OsStr>>(
        command: impl IntoIterator<Item = S>,
        environment: &[(&str, &OsStr)],
        output: &File,
    ) -> io::Result<Self> {
        Command::new("sh")
            .args(["-c", GUARDED, "sh"])
            .args(command)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            .process_group(0)
            .spawn()
            .map(Self)
    }

    /// The exit status, if the program has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }

    /// Sends a signal, by its name, to the program alone.
    pub(crate) fn signal(&self, signal: &str) {
        let sent =
            Command::new("sh").args(["-c", "kill -\"$1\" \"$2\"", "sh", signal, &self.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "cannot send {signal}");
    }

    /// Stops the program from running, and waits until each of its threads has
    /// stopped: the signal is taken by one, and on a busy machine another may
    /// still answer meanwhile. Where there is no `/proc`, nobody can tell.
    pub(crate) fn pause(&self) {
        self.signal("STOP");
        let tasks = format!("/proc/{}/task", self.id());
        let begin = Instant::now();
        loop {
            let Ok(threads) = std::fs::read_dir(&tasks) else { return };
            let is_stopped = |stat: String| stat.rsplit_once(')').is_none_or(|(_, rest)| rest.starts_with(" T"));
            let mut stats =
                threads.flatten().filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
            if stats.all(is_stopped) {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "{} does not stop", self.id());
            std::thread::yield_now();
        }
    }

    /// The process group's number, which is the program's process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}
