//! How a tour can go wrong.

use std::fmt;
use std::io;

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

#[derive(Debug)]
pub(crate) enum Failure {
    /// What was seen is not what the policy promises.
    Unexpected { expected: String, observed: String },
    /// There was nothing to see.
    Broken(String),
    /// Another failure, and the end of Envoy's log.
    Logged(Box<Failure>, String),
    /// Nobody listens any more.
    Output(io::Error),
}

impl Failure {
    pub(crate) fn with_log(self, log: &str) -> Self {
        match self {
            Self::Output(_) => self,
            failure => Self::Logged(Box::new(failure), log.to_owned()),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Broken(reason)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unexpected { expected, observed } => write!(f, "expected: {expected}\n      observed: {observed}"),
            Self::Broken(reason) => f.write_str(reason),
            // What went wrong comes last, where it is seen.
            Self::Logged(failure, log) => write!(f, "the end of Envoy's log:\n{log}\n\ntour: {failure}"),
            Self::Output(error) => write!(f, "cannot write: {error}"),
        }
    }
}

/// Goes on if what was expected holds.
pub(crate) fn expect(holds: bool, expected: impl fmt::Display, observed: impl fmt::Debug) -> Outcome {
    if holds {
        return Ok(());
    }
    Err(Failure::Unexpected { expected: expected.to_string(), observed: format!("{observed:?}") })
}
