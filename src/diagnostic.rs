//! What a user is told about a bad document.
//!
//! A document is judged whole: every reader notes what is wrong and reads on, so one run of `trimtab check`, or one
//! refused update in Envoy's log, lists everything that has to change. A diagnostic names its place as a JSON Pointer
//! (RFC 6901), because that is a place in YAML and in JSON alike, and in the text that a `WasmPlugin` carries.

use std::cell::{Cell, RefCell};
use std::fmt;

/// Whether a document with this diagnostic can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The document is refused.
    Error,
    /// The document is used; something in it is out of date.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        })
    }
}

/// One thing to say about one place of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    pub severity: Severity,
    /// A JSON Pointer; empty for the whole document.
    pub pointer: String,
    /// What was found there.
    pub found: String,
    /// What would do.
    pub help: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.pointer.is_empty() { "document" } else { &self.pointer };
        write!(f, "{}: {place}: {}", self.severity, self.found)?;
        if !self.help.is_empty() {
            write!(f, "; {}", self.help)?;
        }
        Ok(())
    }
}

/// How many diagnostics are kept: a document of a million mistakes must not become a million lines of log.
pub const MAX_DIAGNOSTICS: usize = 100;

/// The diagnostics of one document, shared by all its readers.
#[derive(Debug, Default)]
pub struct Report {
    diagnostics: RefCell<Vec<Diagnostic>>,
    errors: Cell<usize>,
}

impl Report {
    /// Notes a diagnostic; past [`MAX_DIAGNOSTICS`] it is only counted, and not made.
    pub fn note(&self, severity: Severity, make: impl FnOnce() -> Diagnostic) {
        if severity == Severity::Error {
            self.errors.set(self.errors.get() + 1);
        }
        let mut diagnostics = self.diagnostics.borrow_mut();
        if diagnostics.len() < MAX_DIAGNOSTICS {
            diagnostics.push(make());
        }
    }

    /// How many errors were noted, the ones that were not kept included.
    pub fn errors(&self) -> usize {
        self.errors.get()
    }

    /// What was noted, in the order of the document's readers.
    pub fn into_diagnostics(self) -> Vec<Diagnostic> {
        let mut diagnostics = self.diagnostics.into_inner();
        let kept = diagnostics.iter().filter(|d| d.severity == Severity::Error).count();
        let dropped = self.errors.get().saturating_sub(kept);
        if dropped > 0 {
            diagnostics.push(Diagnostic {
                severity: Severity::Error,
                pointer: String::new(),
                found: format!("{dropped} more errors are not shown"),
                help: String::new(),
            });
        }
        diagnostics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_errors_is_cut_and_counted() {
        let report = Report::default();
        for n in 0..MAX_DIAGNOSTICS + 7 {
            report.note(Severity::Error, || Diagnostic {
                severity: Severity::Error,
                pointer: format!("/{n}"),
                found: "wrong".into(),
                help: String::new(),
            });
        }
        assert_eq!(report.errors(), MAX_DIAGNOSTICS + 7);
        let diagnostics = report.into_diagnostics();
        assert_eq!(diagnostics.len(), MAX_DIAGNOSTICS + 1);
        assert_eq!(diagnostics.last().map(|d| d.found.as_str()), Some("7 more errors are not shown"));
    }
}
