//! Counters of one worker between two publications.
//!
//! A request adds to numbers in memory, and a tick adds these to the host's counters, so a request makes no call to the
//! host for its metrics. A [`MetricId`] of a counter is a place in the buffer.

use super::MetricId;
use std::cell::{Cell, RefCell};

/// The counters of one worker, and what was added to each since the last publication.
#[derive(Debug, Default)]
pub struct MetricBuffer {
    counters: RefCell<Vec<Counter>>,
    /// The counters that were added to.
    dirty: RefCell<Vec<u32>>,
}

#[derive(Debug)]
struct Counter {
    /// The host's number.
    id: u32,
    added: Cell<u64>,
}

impl MetricBuffer {
    /// A place for the host's counter `id`.
    pub fn define(&self, id: u32) -> MetricId {
        let mut counters = self.counters.borrow_mut();
        counters.push(Counter { id, added: Cell::new(0) });
        MetricId(counters.len() as u32 - 1)
    }

    /// Adds to a counter.
    pub fn add(&self, metric: MetricId, amount: u64) {
        let counters = self.counters.borrow();
        let Some(counter) = counters.get(metric.0 as usize) else { return };
        if counter.added.get() == 0 {
            self.dirty.borrow_mut().push(metric.0);
        }
        counter.added.set(counter.added.get().saturating_add(amount));
    }

    /// Whether nothing was added since the last publication.
    pub fn is_empty(&self) -> bool {
        self.dirty.borrow().is_empty()
    }

    /// Publishes: calls `add` with the host's number of each counter and what was added to it.
    pub fn publish(&self, mut add: impl FnMut(u32, u64)) {
        let counters = self.counters.borrow();
        for place in self.dirty.take() {
            if let Some(counter) = counters.get(place as usize) {
                add(counter.id, counter.added.take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_published_once() {
        let buffer = MetricBuffer::default();
        let (one, two) = (buffer.define(70), buffer.define(80));
        let published = || {
            let mut published = Vec::new();
            buffer.publish(|id, amount| published.push((id, amount)));
            published
        };
        assert!(buffer.is_empty());
        buffer.add(two, 1);
        buffer.add(one, 2);
        buffer.add(two, 3);
        assert!(!buffer.is_empty());
        assert_eq!(published(), [(80, 4), (70, 2)]);
        assert!(buffer.is_empty());
        assert_eq!(published(), []);
        buffer.add(MetricId(9), 1);
        assert_eq!(published(), [], "a counter that was not defined");
    }
}
