//! `trimtab check`: whether the module would take a policy, and if not, what to change and where.

use crate::finding::{Finding, counted, plural, printable};
use crate::source::{Contents, Source, find_all};
use crate::{Format, Outcome, UNUSABLE, WRONG};
use clap::Args;
use std::path::{Path, PathBuf};
use trimtab::policy::Policy;

#[derive(Args)]
pub(crate) struct Check {
    /// Files, or folders to look through; - is the standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Let warnings fail the check
    #[arg(long)]
    strict: bool,

    /// Name the documents of other kinds that are passed over
    #[arg(long, short)]
    verbose: bool,

    /// `json`: one list of objects with file, line, column, severity, pointer, found, help
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Check {
    pub(crate) fn run(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let mut listed = Vec::new();
        let mut held = false;
        read_each(&self.files, &mut outcome, |outcome, name, contents| {
            if self.verbose {
                for skipped in &contents.skipped {
                    outcome.stderr += &printable(&format!("{name}: passed over {skipped}"));
                    outcome.stderr.push('\n');
                }
            }
            if contents.policies.is_empty() && contents.findings.is_empty() {
                return;
            }
            held = true;
            let (policies, findings) = judge(contents);
            if findings.iter().any(|finding| finding.is_error() || self.strict) {
                outcome.code = outcome.code.max(WRONG);
            }
            match self.format {
                Format::Text => outcome.stdout += &report(name, &policies, &findings),
                Format::Json => listed.extend(findings.iter().map(|finding| finding.json(name))),
            }
        });
        if !held && outcome.code < UNUSABLE {
            outcome.complain("no policy in any of the files");
        }
        if self.format == Format::Json {
            outcome.stdout = format!("{:#}\n", serde_json::Value::Array(listed));
        }
        outcome
    }
}

/// Does what is to be done with the one policy in a file, or in the files of a folder, and tells what is wrong with it.
///
/// # Errors
/// `act` returns what stands in its way, in words.
pub(crate) fn read_one(path: &Path, act: impl FnOnce(Policy) -> Result<String, String>) -> Outcome {
    let mut outcome = Outcome::default();
    let mut policies = Vec::new();
    read_each(&[path], &mut outcome, |outcome, name, contents| {
        let (usable, findings) = judge(contents);
        if findings.iter().any(Finding::is_error) {
            outcome.stderr += &report(name, &usable, &findings);
            outcome.code = outcome.code.max(WRONG);
        } else {
            outcome.stderr.extend(findings.iter().map(|finding| finding.line(name) + "\n"));
        }
        policies.extend(usable);
    });
    if outcome.code > 0 {
        return outcome;
    }
    let name = Source::named(path.to_owned()).name();
    let done = match (policies.pop(), policies.len()) {
        (Some(policy), 0) => act(policy),
        (None, _) => Err(format!("{name}: no policy")),
        (Some(_), others) => Err(format!("{name}: {} policies; name a file with one", others + 1)),
    };
    match done {
        Ok(text) => outcome.stdout = text,
        Err(message) => outcome.complain(&message),
    }
    outcome
}

/// Reads what `paths` stand for, one file after the other, each with its name, and tells which cannot be read.
fn read_each(paths: &[impl AsRef<Path>], outcome: &mut Outcome, mut act: impl FnMut(&mut Outcome, &str, Contents)) {
    let (sources, failures) = find_all(paths);
    for failure in failures {
        outcome.complain(&failure);
    }
    for source in sources {
        let name = source.name();
        match source.read() {
            Ok(contents) => act(outcome, &name, contents),
            Err(error) => outcome.complain(&format!("{name}: {error}")),
        }
    }
}

/// All policies of a file that can be used, and everything there is to say of it.
fn judge(contents: Contents) -> (Vec<Policy>, Vec<Finding>) {
    let (mut usable, mut findings) = (Vec::new(), Vec::new());
    for candidate in contents.policies {
        let (policy, told) = candidate.judge();
        usable.extend(policy);
        findings.extend(told);
    }
    findings.extend(contents.findings);
    (usable, findings)
}

/// A line for each finding, and one that sums them up.
fn report(name: &str, policies: &[Policy], findings: &[Finding]) -> String {
    let mut lines: Vec<String> = findings.iter().map(|finding| finding.line(name)).collect();
    let counted = counted(findings);
    let summary = if findings.iter().any(Finding::is_error) {
        format!("{name}: {counted}")
    } else {
        let routes = plural(policies.iter().map(|policy| policy.routes.len()).sum(), "route");
        let held = match policies.len() {
            1 => routes,
            several => format!("{}, {routes}", plural(several, "policy")),
        };
        let comma = if counted.is_empty() { "" } else { ", " };
        format!("{name}: ok ({held}){comma}{counted}")
    };
    lines.push(printable(&summary));
    lines.join("\n") + "\n"
}
