//! The filter's log lines, kept with the time at which they were written.
//!
//! The `log` crate knows one logger for the whole process, so what is kept stands where it finds it.

use crate::finding::printable;
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::sync::{Mutex, PoisonError};

/// A log line.
pub(super) struct Line {
    /// Nanoseconds since the beginning.
    pub at: u64,
    pub level: Level,
    pub text: String,
}

struct Journal {
    now: u64,
    lines: Vec<Line>,
}

static JOURNAL: Mutex<Journal> = Mutex::new(Journal { now: 0, lines: Vec::new() });

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        with(|journal| {
            let line = Line { at: journal.now, level: record.level(), text: printable(&record.args().to_string()) };
            journal.lines.push(line);
        });
    }

    fn flush(&self) {}
}

fn with<T>(act: impl FnOnce(&mut Journal) -> T) -> T {
    act(&mut JOURNAL.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Keeps what is logged from now on, down to the level that Envoy prints unless it is told.
pub(super) fn open() {
    // A second time it is the same logger.
    let _ = log::set_logger(&Logger);
    log::set_max_level(LevelFilter::Info);
}

/// Says what time it is, in nanoseconds since the beginning.
pub(super) fn set_now(now: u64) {
    with(|journal| journal.now = now);
}

/// What was kept.
pub(super) fn close() -> Vec<Line> {
    with(|journal| std::mem::take(&mut journal.lines))
}
