//! The programs that `istio/setup.sh` builds.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use trimtab_testbed::repository;

/// Leaves the test, saying so, where `TRIMTAB_ISTIO` is not set, which `make test-istio` sets where there is Go. Where it
/// is set, whatever is missing is a failure.
macro_rules! needs_istio {
    () => {
        if std::env::var("TRIMTAB_ISTIO").unwrap_or_default().is_empty() {
            println!("skipped: the tests with Istio run in `make test-istio`, where there is Go");
            return;
        }
        $crate::tools::find().unwrap();
    };
}
pub(crate) use needs_istio;

/// Whether everything is there.
pub fn find() -> Result<(), String> {
    trimtab_testbed::Installation::find()?;
    trimtab_testbed::find_wasm()?;
    let built = repository().join(".cache/istio/built-from");
    built.exists().then_some(()).ok_or_else(|| "no Istio: run istio/setup.sh".to_owned())
}

/// Where the program or file `name` is. `ISTIO_BIN` names a folder with another Istio: its programs, and its custom
/// resource definitions in `crds.yaml`.
pub fn path(name: &str) -> PathBuf {
    let other = std::env::var_os("ISTIO_BIN").map(|folder| PathBuf::from(folder).join(name));
    other.filter(|path| path.exists()).unwrap_or_else(|| repository().join(".cache/istio/bin").join(name))
}

/// Whether this Istio is 1.30 or newer, which brought TrafficExtension, and with its Envoy API `no_context_propagation`.
pub fn is_new() -> bool {
    let definitions = std::fs::read_to_string(path("crds.yaml")).unwrap();
    definitions.contains("trafficextensions.extensions.istio.io")
}

/// Leaves the test, saying so, with an Istio before 1.30.
macro_rules! needs_new_istio {
    () => {
        if !$crate::tools::is_new() {
            println!("skipped: this Istio is older than 1.30");
            return;
        }
    };
}
pub(crate) use needs_new_istio;

/// What a program answered.
#[derive(Debug)]
pub struct Answer {
    pub ok: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    /// The standard output of a program that has to succeed.
    pub fn unwrap(self) -> String {
        assert!(self.ok, "{}{}", self.stdout, self.stderr);
        self.stdout
    }
}

/// Runs one of the programs in the repository, with `input` as its standard input.
pub fn run(name: &str, arguments: &[&str], input: &str) -> Answer {
    answer(Command::new(path(name)).args(arguments), input)
}

/// As [`run`], for any command.
pub fn answer(command: &mut Command, input: &str) -> Answer {
    let program = command.get_program().to_owned();
    command.current_dir(repository()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_owned());
    // The program may have seen enough before the end.
    let writer = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Answer {
        ok: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
