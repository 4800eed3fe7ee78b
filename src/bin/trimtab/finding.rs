//! What is said about a place of a file: the core's [`Diagnostic`] with a line and a column.

use crate::tree::Position;
use serde_json::json;
use std::fmt::Write;
use trimtab::diagnostic::{Diagnostic, Severity};

/// A diagnostic and where it belongs. Its pointer starts at the root of the YAML or JSON document.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) at: Position,
    pub(crate) diagnostic: Diagnostic,
}

impl Finding {
    pub(crate) fn error(at: Position, pointer: &str, found: impl Into<String>, help: impl Into<String>) -> Finding {
        Finding::new(Severity::Error, at, pointer, found.into(), help.into())
    }

    pub(crate) fn warning(at: Position, pointer: &str, found: impl Into<String>, help: impl Into<String>) -> Finding {
        Finding::new(Severity::Warning, at, pointer, found.into(), help.into())
    }

    fn new(severity: Severity, at: Position, pointer: &str, found: String, help: String) -> Finding {
        Finding { at, diagnostic: Diagnostic { severity, pointer: pointer.into(), found, help } }
    }

    pub(crate) fn is_error(&self) -> bool {
        self.diagnostic.severity == Severity::Error
    }

    /// One line, as compilers write it.
    pub(crate) fn line(&self, file: &str) -> String {
        printable(&format!("{file}:{}:{}: {}", self.at.line, self.at.column, self.diagnostic))
    }

    pub(crate) fn json(&self, file: &str) -> serde_json::Value {
        let Diagnostic { severity, pointer, found, help } = &self.diagnostic;
        json!({
            "file": file,
            "line": self.at.line,
            "column": self.at.column,
            "severity": severity.to_string(),
            "pointer": pointer,
            "found": found,
            "help": help,
        })
    }
}

/// `text` without anything that would move a terminal's cursor or break the line: names in a file are its author's.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            let _ = write!(shown, "{}", c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// `2 errors, 1 warning`; empty where there are none.
pub(crate) fn counted(findings: &[Finding]) -> String {
    let errors = findings.iter().filter(|finding| finding.is_error()).count();
    let warnings = findings.len() - errors;
    let some = [(errors, "error"), (warnings, "warning")].into_iter().filter(|(count, _)| *count > 0);
    some.map(|(count, noun)| plural(count, noun)).collect::<Vec<_>>().join(", ")
}

/// `1 route`, `2 routes`.
pub(crate) fn plural(count: usize, noun: &str) -> String {
    let ending = match (count, noun.strip_suffix('y')) {
        (1, _) => return format!("1 {noun}"),
        (_, Some(stem)) => return format!("{count} {stem}ies"),
        _ => "s",
    };
    format!("{count} {noun}{ending}")
}
