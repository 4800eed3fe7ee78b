//! What the VMs of one proxy process share.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::abi::Status;

type CasHook = Arc<dyn Fn(&World, &[u8]) + Send + Sync>;

/// One proxy process, as its VMs see it: shared data, metrics, clocks and
/// clusters. Clones are the same world, and may go to other threads.
///
/// Nothing moves by itself. The clocks stand still until the test moves them.
#[derive(Clone)]
pub struct World(Arc<Mutex<State>>);

struct State {
    seed: u64,
    wall: Duration,
    monotonic: Duration,
    /// The map of the vm_id `""`; there is no other.
    shared: BTreeMap<Vec<u8>, (Vec<u8>, u32)>,
    next_cas: u32,
    before_cas: Option<CasHook>,
    metrics: Vec<(MetricKind, String, Metric)>,
    clusters: BTreeSet<String>,
    properties: BTreeMap<String, Vec<u8>>,
}

/// The type of a metric, numbered as in the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

/// A metric's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Metric {
    Counter(u64),
    Gauge(u64),
    /// Every value that was recorded, in order.
    Histogram(Vec<u64>),
}

impl World {
    /// A world of which everything that looks like chance follows from `seed`.
    ///
    /// The wall clock shows 2025-01-01 00:00:00 UTC, the monotonic clock an
    /// hour.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            seed,
            wall: Duration::from_secs(1_735_689_600),
            monotonic: Duration::from_secs(3600),
            shared: BTreeMap::new(),
            next_cas: 1,
            before_cas: None,
            metrics: Vec::new(),
            clusters: BTreeSet::new(),
            properties: BTreeMap::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that failed on another thread is reported there.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The seed for one more VM: the second VM's chance is not the first's,
    /// and threads do not take turns at one source.
    pub(crate) fn next_seed(&self) -> u64 {
        let mut state = self.state();
        state.seed = state.seed.wrapping_add(1);
        state.seed
    }

    /// The wall clock, since the Unix epoch.
    pub fn wall_clock(&self) -> Duration {
        self.state().wall
    }

    /// Steps the wall clock, as an operator or NTP does. The monotonic clock
    /// does not notice.
    pub fn set_wall_clock(&self, since_epoch: Duration) {
        self.state().wall = since_epoch;
    }

    /// The monotonic clock.
    pub fn monotonic_clock(&self) -> Duration {
        self.state().monotonic
    }

    /// Moves both clocks, and nothing else: for ticks see
    /// [`Vm::advance`](crate::Vm::advance).
    pub fn advance(&self, time: Duration) {
        let mut state = self.state();
        state.wall += time;
        state.monotonic += time;
    }

    /// A value of the shared data, with its CAS.
    pub fn shared_data(&self, key: impl AsRef<[u8]>) -> Option<(Vec<u8>, u32)> {
        self.state().shared.get(key.as_ref()).cloned()
    }

    /// The keys of the shared data, in order.
    pub fn shared_keys(&self) -> Vec<Vec<u8>> {
        self.state().shared.keys().cloned().collect()
    }

    /// Writes shared data by the rules that bind the guest: a CAS of 0 writes
    /// whatever is there, any CAS writes where nothing is there.
    ///
    /// # Errors
    /// [`Status::CasMismatch`]; nothing was written.
    pub fn set_shared_data(&self, key: impl AsRef<[u8]>, value: &[u8], cas: u32) -> Result<(), Status> {
        let mut state = self.state();
        if let Some((_, current)) = state.shared.get(key.as_ref())
            && cas != 0
            && cas != *current
        {
            return Err(Status::CasMismatch);
        }
        let next = state.next_cas;
        state.next_cas = next.checked_add(1).unwrap_or(1);
        state.shared.insert(key.as_ref().to_vec(), (value.to_vec(), next));
        Ok(())
    }

    /// Has `hook` run each time that a guest is about to write with a CAS,
    /// with the key, on the guest's thread: what the hook writes comes between
    /// the guest's read and its write. Replaces an earlier hook.
    pub fn before_cas(&self, hook: impl Fn(&World, &[u8]) + Send + Sync + 'static) {
        self.state().before_cas = Some(Arc::new(hook));
    }

    /// A guest's write: [`set_shared_data`](Self::set_shared_data) with the
    /// hook before it.
    pub(crate) fn guest_set(&self, key: &[u8], value: &[u8], cas: u32) -> Result<(), Status> {
        if cas != 0 {
            let hook = self.state().before_cas.clone();
            if let Some(hook) = hook {
                hook(self, key);
            }
        }
        self.set_shared_data(key, value, cas)
    }

    /// The value of a counter or gauge; 0 before it is defined.
    pub fn metric(&self, name: &str) -> u64 {
        let state = self.state();
        let values = state.metrics.iter().filter(|(_, found, _)| found == name);
        values
            .filter_map(|(_, _, metric)| match metric {
                Metric::Counter(value) | Metric::Gauge(value) => Some(*value),
                Metric::Histogram(_) => None,
            })
            .sum()
    }

    /// What a histogram has recorded.
    pub fn histogram(&self, name: &str) -> Vec<u64> {
        match self.metrics().remove(name) {
            Some(Metric::Histogram(values)) => values,
            _ => Vec::new(),
        }
    }

    /// All metrics by name.
    pub fn metrics(&self) -> BTreeMap<String, Metric> {
        self.state().metrics.iter().map(|(_, name, metric)| (name.clone(), metric.clone())).collect()
    }

    /// Gives the metric's number: as in Envoy, its low two bits are its type.
    pub(crate) fn define_metric(&self, kind: MetricKind, name: String) -> u32 {
        let metrics = &mut self.state().metrics;
        let found = metrics.iter().position(|(a, b, _)| (*a, b) == (kind, &name));
        let index = found.unwrap_or_else(|| {
            let zero = match kind {
                MetricKind::Counter => Metric::Counter(0),
                MetricKind::Gauge => Metric::Gauge(0),
                MetricKind::Histogram => Metric::Histogram(Vec::new()),
            };
            metrics.push((kind, name, zero));
            metrics.len() - 1
        });
        u32::try_from(index + 1).expect("fewer metrics than numbers") << 2 | kind as u32
    }

    pub(crate) fn record_metric(&self, id: u32, value: u64) -> Result<(), Status> {
        self.with_metric(id, |metric| match metric {
            Metric::Counter(total) => *total = total.wrapping_add(value),
            Metric::Gauge(current) => *current = value,
            Metric::Histogram(values) => values.push(value),
        })
    }

    pub(crate) fn increment_metric(&self, id: u32, offset: i64) -> Result<(), Status> {
        self.with_metric(id, |metric| match metric {
            Metric::Counter(total) if offset > 0 => {
                *total = total.wrapping_add_signed(offset);
                Ok(())
            }
            Metric::Gauge(current) => {
                *current = current.wrapping_add_signed(offset);
                Ok(())
            }
            _ => Err(Status::BadArgument),
        })?
    }

    pub(crate) fn get_metric(&self, id: u32) -> Result<u64, Status> {
        self.with_metric(id, |metric| match metric {
            Metric::Counter(value) | Metric::Gauge(value) => Ok(*value),
            Metric::Histogram(_) => Err(Status::BadArgument),
        })?
    }

    fn with_metric<T>(&self, id: u32, act: impl FnOnce(&mut Metric) -> T) -> Result<T, Status> {
        let mut state = self.state();
        let index = (id >> 2).checked_sub(1).ok_or(Status::NotFound)?;
        let (kind, _, metric) = state.metrics.get_mut(index as usize).ok_or(Status::NotFound)?;
        if *kind as u32 == id & 3 { Ok(act(metric)) } else { Err(Status::NotFound) }
    }

    /// Adds a cluster to which guests may send calls. There is none at first.
    pub fn add_cluster(&self, name: &str) {
        self.state().clusters.insert(name.to_owned());
    }

    pub(crate) fn has_cluster(&self, name: &str) -> bool {
        self.state().clusters.contains(name)
    }

    /// Sets a property of every context that has no such property of its own.
    /// The parts of its path are joined by dots.
    pub fn set_property(&self, path: &str, value: impl AsRef<[u8]>) {
        self.state().properties.insert(path.to_owned(), value.as_ref().to_vec());
    }

    pub(crate) fn property(&self, path: &str) -> Option<Vec<u8>> {
        self.state().properties.get(path).cloned()
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("World")
            .field("wall", &state.wall)
            .field("monotonic", &state.monotonic)
            .field("shared", &state.shared)
            .field("metrics", &state.metrics)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cas_counter_is_global_and_skips_zero() {
        let world = World::new(0);
        world.state().next_cas = u32::MAX;
        for key in ["a", "b"] {
            world.set_shared_data(key, b"", 0).expect("a write without a CAS");
        }
        assert_eq!(world.shared_data("a"), Some((Vec::new(), u32::MAX)));
        assert_eq!(world.shared_data("b"), Some((Vec::new(), 1)));
    }

    #[test]
    fn metrics_obey_their_types() {
        let world = World::new(0);
        let counter = world.define_metric(MetricKind::Counter, "a".to_owned());
        let gauge = world.define_metric(MetricKind::Gauge, "b".to_owned());
        let histogram = world.define_metric(MetricKind::Histogram, "c".to_owned());
        assert_eq!(world.define_metric(MetricKind::Counter, "a".to_owned()), counter);
        assert_eq!(world.increment_metric(counter, 2), Ok(()));
        assert_eq!(world.increment_metric(counter, 0), Err(Status::BadArgument));
        assert_eq!(world.increment_metric(counter, -1), Err(Status::BadArgument));
        assert_eq!(world.record_metric(gauge, 7), Ok(()));
        assert_eq!(world.increment_metric(gauge, -3), Ok(()));
        assert_eq!(world.record_metric(histogram, 5), Ok(()));
        assert_eq!(world.increment_metric(histogram, 1), Err(Status::BadArgument));
        assert_eq!(world.get_metric(histogram), Err(Status::BadArgument));
        assert_eq!(world.get_metric(counter | 3), Err(Status::NotFound));
        assert_eq!((world.metric("a"), world.metric("b"), world.histogram("c")), (2, 4, vec![5]));
    }
}
