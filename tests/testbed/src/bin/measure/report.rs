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
    let after = with_section(&before, part, &format!("## {title}\n\n{}\n\n{text}", machine()));
    std::fs::write(&path, after).map_err(io)?;
    println!("\n{title}\n\n{text}");
    Ok(())
}

/// The document with a part's section in place of the one that it had, or at its end.
fn with_section(document: &str, part: &str, text: &str) -> String {
    let (begin, end) = (format!("<!-- {part} -->\n"), format!("<!-- end of {part} -->\n"));
    let section = format!("{begin}\n{text}\n{end}");
    match (document.find(&begin), document.find(&end)) {
        (Some(first), Some(last)) if first < last => {
            format!("{}{section}{}", &document[..first], &document[last + end.len()..])
        }
        _ => format!("{document}\n{section}"),
    }
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
        (0, _) => number.to_string(),
        (thousands, rest) => format!("{thousands},{rest:03}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_replaces_its_own_and_no_other() {
        let first = with_section("opening\n", "a", "1\n");
        let both = with_section(&first, "b", "2\n");
        let again = with_section(&both, "a", "3\n");
        assert_eq!(again, both.replace('1', "3"));
        assert_eq!(again.matches("<!-- ").count(), 4, "{again}");
    }

    #[test]
    fn the_middle_is_that_of_the_sorted_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(quantile(&(0..=100).rev().map(f64::from).collect::<Vec<_>>(), 0.99), 99.0);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn numbers_are_rounded_to_hundreds() {
        assert_eq!(thousands(49.0), "0");
        assert_eq!(thousands(-949.0), "-900");
        assert_eq!(thousands(216_760.0), "216,800");
        assert_eq!(thousands(-6_710.0), "-6,700");
    }
}
