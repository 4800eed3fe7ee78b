//! The command-line program: the core's own reading and deciding, on a laptop and in CI.
//!
//! It judges a policy (`check`), says why a request would go where it goes (`explain`), shows what a policy does to
//! traffic over time (`simulate`), makes a first policy from what Istio has (`import`), and tells where a key stands in a
//! rollout (`cohort`). Whatever is fed to it, it answers in words and with an exit code.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::unreachable,
        clippy::todo
    )
)]

mod check;
mod cohort;
mod explain;
mod finding;
mod import;
mod json;
mod request;
mod setting;
mod simulate;
mod source;
mod table;
mod tree;
mod yaml;

use clap::{Parser, Subcommand, ValueEnum};
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

/// The exit code for a document with an error.
const WRONG: u8 = 1;

/// The exit code for arguments or files that cannot be used; also clap's.
const UNUSABLE: u8 = 2;

/// Trimtab's policies, checked and explained: canary routing, fault injection, trace propagation and rate limiting in
/// Envoy and Istio sidecars.
#[derive(Parser)]
#[command(
    name = "trimtab",
    version,
    after_help = "Exit codes: 0 fine, 1 a document has errors, 2 wrong usage or an unreadable file."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check policies: every error at once, with its line and what would do
    ///
    /// Reads YAML and JSON: a policy, or an Istio WasmPlugin or TrafficExtension that carries one as pluginConfig; one
    /// document or several in a file. A file that is named has to hold a policy; below a folder, other documents are
    /// passed over.
    #[command(after_help = "\
Examples:
  trimtab check policy.yaml
  trimtab check --strict deploy/
  kubectl get wasmplugin user-service -o yaml | trimtab check -
  trimtab check --format json policy.yaml | jq -r '.[].found'

Exit codes: 0 no error, 1 an error (with --strict, or a warning), 2 wrong usage or an unreadable file.")]
    Check(check::Check),

    /// Explain what happens to a request, and why
    ///
    /// Runs the filter itself on one request, as the first that a fresh proxy sees: no limit is used up and no guard
    /// has tripped. What is random is drawn and marked with the seed that draws it again.
    #[command(after_help = "\
Examples:
  trimtab explain policy.yaml --request 'GET /users/42' -H 'x-user-id: ann'
  trimtab explain policy.yaml --request '/search?q=boats' --authority search.example --seed 7
  trimtab explain policy.yaml --request 'POST /v1/pay' --property source.address=10.0.0.7:4711

Exit codes: 0 explained, 1 the policy has errors, 2 wrong usage or an unreadable file.")]
    Explain(explain::Explain),

    /// Simulate what a policy does to traffic over time
    ///
    /// Runs the filter itself, as in one worker of a proxy, on a clock that jumps from event to event: an hour takes a
    /// second. In the request's target and in the values of its headers, {user} stands for the number of the user that it
    /// comes from. Upstreams answer as they are told to. Shows what the filter logs, what destinations got, and what
    /// clients saw. Services of global limits and Envoy's own word on its hosts are left out.
    #[command(after_help = "\
Examples:
  trimtab simulate policy.yaml --request /users -H 'x-user-id: {user}' --for 30m
  trimtab simulate policy.yaml --request / --failures 0.1% --failures v2=5% --latency v2=40ms
  trimtab simulate policy.yaml --request / --failures v1=20%@5m..8m --stats --seed 7

Exit codes: 0 simulated, 1 the policy has errors, 2 wrong usage or an unreadable file.")]
    Simulate(simulate::Simulate),

    /// Make a first policy from a VirtualService and its DestinationRules
    ///
    /// What a filter can do moves over, to the standard output. What stays with Istio is named, field by field, on the
    /// standard error. A match that would mean something else in a policy is an error.
    #[command(after_help = "\
Examples:
  trimtab import virtualservice.yaml destinationrule.yaml > policy.yaml
  kubectl get virtualservice user-service -o yaml | trimtab import -

Exit codes: 0 imported, 1 it cannot be imported, 2 wrong usage or an unreadable file.")]
    Import(import::Import),

    /// Tell where keys stand in a rollout
    ///
    /// One line for each key: its place in parts per million, a tab, the key. A canary of 5 % has everyone whose place is
    /// below 50000. Without keys, or with -, the keys are the lines of the standard input.
    #[command(after_help = "\
Examples:
  trimtab cohort --rollout 2026-11-new-ranking ann bob
  cut -f1 users.tsv | trimtab cohort --rollout 2026-11-new-ranking | awk -F '\\t' '$1 < 50000 { print $2 }'")]
    Cohort(cohort::Cohort),
}

/// How the answer is written.
#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

/// What a command has to say.
#[derive(Default)]
struct Outcome {
    stdout: String,
    stderr: String,
    code: u8,
}

impl Outcome {
    /// Notes something that stands in the way of the command itself.
    fn complain(&mut self, message: &str) {
        self.stderr += &finding::printable(&format!("trimtab: {message}"));
        self.stderr.push('\n');
        self.code = UNUSABLE;
    }
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Check(check) => check.run(),
        Command::Explain(explain) => explain.run(),
        Command::Simulate(simulate) => simulate.run(),
        Command::Import(import) => import.run(),
        Command::Cohort(cohort) => return written(cohort.run(&mut io::stdout().lock()), 0),
    };
    // A reader of the complaints that has gone is no reason to fail.
    let _ = io::stderr().write_all(outcome.stderr.as_bytes());
    written(io::stdout().write_all(outcome.stdout.as_bytes()).and_then(|()| io::stdout().flush()), outcome.code)
}

/// The exit code after writing. A reader that has read enough, such as `head`, is no error.
fn written(result: io::Result<()>, code: u8) -> ExitCode {
    match result {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            let _ = writeln!(io::stderr(), "trimtab: {error}");
            ExitCode::from(UNUSABLE)
        }
        _ => ExitCode::from(code),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
