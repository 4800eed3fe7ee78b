//! What a guest logs, and how it fails.

use std::fmt;

use crate::abi::Status;

/// A level of the log, as in the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
    Critical,
}

impl Level {
    pub(crate) fn from_abi(level: u32) -> Result<Self, Status> {
        use Level::{Critical, Debug, Error, Info, Trace, Warn};
        let levels = [Trace, Debug, Info, Warn, Error, Critical];
        levels.get(level as usize).copied().ok_or(Status::BadArgument)
    }
}

/// What a guest logged, or wrote to standard output (`Info`) or standard
/// error (`Error`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    pub level: Level,
    pub message: String,
}

impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?}] {}", self.level, self.message)
    }
}

/// The guest was stopped: it panicked, or did what it must not do. Its VM
/// does nothing more.
#[derive(Clone)]
pub struct Trap {
    /// The callback in which it happened.
    pub callback: &'static str,
    /// What happened.
    pub reason: String,
    /// What the guest logged in that callback, the message of its panic included.
    pub log: Vec<LogLine>,
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} trapped: {}", self.callback, self.reason)?;
        self.log.iter().try_for_each(|line| write!(f, "\n{line}"))
    }
}

// As text also where a test unwraps it.
impl fmt::Debug for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Trap {}

/// Why a plugin was not started.
#[derive(Clone)]
pub enum Refused {
    /// The callback answered `false`, having logged this.
    Answered { callback: &'static str, log: Vec<LogLine> },
    /// The guest was stopped.
    Trapped(Trap),
}

impl Refused {
    /// What the guest logged meanwhile.
    pub fn log(&self) -> &[LogLine] {
        match self {
            Self::Answered { log, .. } | Self::Trapped(Trap { log, .. }) => log,
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered { callback, log } => {
                write!(f, "{callback} answered false")?;
                log.iter().try_for_each(|line| write!(f, "\n{line}"))
            }
            Self::Trapped(trap) => fmt::Display::fmt(trap, f),
        }
    }
}

impl fmt::Debug for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Refused {}

/// An error of the engine as text: the cause first, then where it happened.
pub(crate) fn describe(error: &wasmtime::Error) -> String {
    let mut causes: Vec<_> = error.chain().map(ToString::to_string).collect();
    causes.reverse();
    causes.join("\n")
}
