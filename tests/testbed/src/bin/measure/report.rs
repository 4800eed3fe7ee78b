//! `benches/RESULTS.md`: one section for each part, replaced when that part is measured again.

use std::path::{Path, PathBuf};
use std::process::Command;

use trimtab_testbed::{ENVOY_VERSION, repository, wasm};

use crate::variants::empty_module;

const OPENING: &str = r##"# What a request costs in Envoy

Written by `make bench-envoy`, all of it or, with `PARTS="instructions memory times workers"`, single parts. Each section
says with what it was measured. The machine is shared with others, so times are ratios within a round, and medians over the rounds; instruction
counts are unmoved by what else runs.
"##;

/// Puts a part's section in place of the one before it, or at the end.
pub fn write(part: &str, title: &str, text: &str) -> Result<(), String> {
    let path = results();
    let io = |error: std::io::Error| format!("{}: {error}", path.display());
    let before = match std::fs::read_to_string(&path) {
        Ok(before) => before,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => OPENING.to_owned(),
        Err(error) => return Err(io(error)),
    };
    let (begin, end) = (format!("<!-- {part} -->\n"), format!("<!-- end of {part} -->\n"));
    let section = format!("{begin}\n## {title}\n\n{}\n\n{text}\n{end}", machine());
    let after = match (before.find(&begin), before.find(&end)) {
        (Some(first), Some(last)) if first < last => {
            format!("{}{section}{}", &before[..first], &before[last + end.len()..])
        }
        _ => format!("{before}\n{section}"),
    };
    std::fs::write(&path, after).map_err(io)?;
    println!("\n{title}\n\n{text}");
    Ok(())
}

fn results() -> PathBuf {
    repository().join("benches/RESULTS.md")
}

/// With what it was measured.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len().div_ceil(1000));
    // What the module is made of.
    let status = said("git", &["status", "--porcelain", "--", "src", "Cargo.toml", "Cargo.lock"]);
    let changes = status.map_or("", |_| " with changes");
    let unknown = || "unknown".to_owned();
    format!(
        "Commit {} of {}{changes}, Envoy {ENVOY_VERSION}, {}, {cores} cores; the module has {} KB, the empty filter {} KB.",
        said("git", &["rev-parse", "--short=10", "HEAD"]).unwrap_or_else(unknown),
        said("git", &["log", "-1", "--format=%cs"]).unwrap_or_else(unknown),
        said("rustc", &["--version"]).unwrap_or_else(unknown),
        size(&wasm()),
        size(&empty_module()),
    )
}

/// What a program printed, if anything.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).current_dir(repository()).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|text| !text.is_empty())
}

/// The value in the middle; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value that this share of them does not exceed, rounded to the nearest; 0 of none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let index = (values.len().saturating_sub(1) as f64 * share).round() as usize;
    values.get(index).copied().unwrap_or(0.0)
}

/// Rounded to hundreds, with separators: what is beyond that is noise.
pub fn thousands(number: f64) -> String {
    let number = (number / 100.0).round() as i64 * 100;
    match (number / 1000, (number % 1000).abs()) {
        (0, rest) => rest.to_string(),
        (thousands, rest) => format!("{thousands},{rest:03}"),
    }
}
