//! The hosts of one target, as all workers have seen them answer, and which of them would be ejected.
//!
//! Nothing is ejected here: that is Envoy's, whose own detection sees each attempt and each worker's share of it. This is
//! the same arithmetic over the answers that this filter saw and did not fault, for a guard that wants to know how many
//! hosts are unwell. The table is one shared word that only compare-and-swap changes. It has a bounded number of hosts;
//! where there are more, the one that has not answered for longest gives way, but none that is ejected.

use super::policy::{Detection, Sweep};
use crate::host::{Change, Conflict, SharedData, update};
use crate::units::{Fraction, MonotonicInstant};

/// The most hosts of a target that are remembered.
pub const MOST_HOSTS: usize = 64;

/// The first byte of the word, to be changed with its layout.
const SCHEMA: u8 = 2;

/// How long an ejection may last, in nanoseconds, unless the base is longer; Envoy's default.
const LONGEST_EJECTION: u64 = 300_000_000_000;

/// What an answer says of the host that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Success,
    /// A 5xx; whether it is one of the gateway's, 502, 503 or 504.
    Error {
        gateway: bool,
    },
    /// There was no answer: the connection failed.
    LocalFailure,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct HostEntry {
    /// The hash of its address.
    id: u64,
    last_seen: MonotonicInstant,
    /// Until when it is ejected; 0 where it never was.
    ejected_until: MonotonicInstant,
    errors: u16,
    gateway_errors: u16,
    local_failures: u16,
    /// How many times the base its last ejection lasted.
    ejections: u16,
    /// Its answers in the current interval, where anything is asked of intervals, and how many of them were errors.
    answers: u32,
    answered_errors: u32,
}

impl HostEntry {
    const SIZE: usize = 40;

    fn is_ejected(&self, now: MonotonicInstant) -> bool {
        self.ejected_until > now
    }

    fn encode(&self, word: &mut Vec<u8>) {
        for value in [self.id, self.last_seen.as_nanos(), self.ejected_until.as_nanos()] {
            word.extend_from_slice(&value.to_le_bytes());
        }
        for value in [self.errors, self.gateway_errors, self.local_failures, self.ejections] {
            word.extend_from_slice(&value.to_le_bytes());
        }
        for value in [self.answers, self.answered_errors] {
            word.extend_from_slice(&value.to_le_bytes());
        }
    }

    fn decode(bytes: &[u8; Self::SIZE]) -> HostEntry {
        let words = bytes.as_chunks::<8>().0;
        let wide = |at: usize| words.get(at).map_or(0, |word| u64::from_le_bytes(*word));
        let counts = wide(3);
        let count = |at: u32| (counts >> (16 * at)) as u16;
        HostEntry {
            id: wide(0),
            last_seen: MonotonicInstant::from_nanos(wide(1)),
            ejected_until: MonotonicInstant::from_nanos(wide(2)),
            errors: count(0),
            gateway_errors: count(1),
            local_failures: count(2),
            ejections: count(3),
            answers: wide(4) as u32,
            answered_errors: (wide(4) >> 32) as u32,
        }
    }
}

/// What a table says at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    pub hosts: u64,
    pub ejected: u64,
}

/// What became of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Noted {
    pub health: Health,
    /// Whether the host that gave it was ejected for it.
    pub is_new: bool,
    /// How many hosts were ejected for what they did in the interval that has ended.
    pub swept: u64,
}

impl Health {
    /// The share of hosts that are ejected.
    pub fn ejected_share(self) -> Fraction {
        let ppm = (self.ejected.min(self.hosts) * 1_000_000).checked_div(self.hosts).unwrap_or(0);
        Fraction::from_ppm(ppm as u32)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Table {
    /// How many hosts the target has, by what the proxy said last; 0 where it said nothing.
    endpoints: u64,
    /// When the current interval began; 0 where nothing is asked of intervals.
    interval_began: MonotonicInstant,
    hosts: Vec<HostEntry>,
}

/// Notes an answer of the host whose address hashes to `id` in the table under `word`. `endpoints` asks the proxy how
/// many hosts there are; it is asked only when that decides something.
///
/// # Errors
/// [`Conflict`] if the word could not be written; nothing was noted.
pub fn note(
    store: &impl SharedData,
    word: &str,
    detection: &Detection,
    (id, answer): (u64, Answer),
    now: MonotonicInstant,
    endpoints: impl Fn() -> Option<u64>,
) -> Result<Noted, Conflict> {
    update(store, word, |found| {
        let mut table = found.and_then(Table::decode).unwrap_or_default();
        let swept = if detection.sweeps() { table.sweep(detection, now, &endpoints) } else { None };
        let (is_changed, is_new) = table.note(detection, id, answer, now, &endpoints);
        let noted = Noted { health: table.health(now), is_new, swept: swept.unwrap_or(0) };
        if is_changed || swept.is_some() { Change::Write(table.encode(), noted) } else { Change::Keep(noted) }
    })
}

/// What the table under `word` says now.
pub fn health(store: &impl SharedData, word: &str, now: MonotonicInstant) -> Health {
    let table = store.get(word).and_then(|(word, _)| Table::decode(&word)).unwrap_or_default();
    table.health(now)
}

impl Table {
    /// Whether the table has changed, and whether the host was ejected.
    fn note(
        &mut self,
        detection: &Detection,
        id: u64,
        answer: Answer,
        now: MonotonicInstant,
        endpoints: &impl Fn() -> Option<u64>,
    ) -> (bool, bool) {
        let Some(place) = self.place(id, now) else { return (false, false) };
        let Some(host) = self.hosts.get_mut(place) else { return (false, false) };
        let before = *host;
        host.id = id;
        // Kept coarsely: a host that is well is not written anew with each of its answers.
        if host.last_seen == MonotonicInstant::ZERO || now.saturating_since(host.last_seen) >= detection.interval {
            host.last_seen = now.max(MonotonicInstant::from_nanos(1));
        }
        let is_local = answer == Answer::LocalFailure;
        let count = |count: u16, is_one: bool| if is_one { count.saturating_add(1) } else { 0 };
        if detection.splits_local {
            host.local_failures = count(host.local_failures, is_local);
        }
        if !(detection.splits_local && is_local) {
            host.errors = count(host.errors, answer != Answer::Success);
            let is_gateway = matches!(answer, Answer::Error { gateway: true } | Answer::LocalFailure);
            host.gateway_errors = count(host.gateway_errors, is_gateway);
            if detection.sweeps() {
                host.answers = host.answers.saturating_add(1);
                host.answered_errors = host.answered_errors.saturating_add(u32::from(answer != Answer::Success));
            }
        }
        let meets = |count: u16, threshold: u16| threshold > 0 && count >= threshold;
        let is_outlier = meets(host.errors, detection.errors)
            || meets(host.gateway_errors, detection.gateway_errors)
            || meets(host.local_failures, detection.local_failures);
        let is_new = is_outlier && !host.is_ejected(now);
        if is_new {
            self.endpoints = endpoints().unwrap_or(0);
            self.eject(place, detection, now);
        }
        let after = self.hosts.get(place).copied().unwrap_or_default();
        (after != before, is_new && after.is_ejected(now))
    }

    /// Where an interval has ended, ejects those that did badly in it, and begins another: how many they are. One that
    /// ended longer ago than it lasted tells nothing of how its hosts are now.
    fn sweep(
        &mut self,
        detection: &Detection,
        now: MonotonicInstant,
        endpoints: &impl Fn() -> Option<u64>,
    ) -> Option<u64> {
        let lasted = now.saturating_since(self.interval_began);
        if self.interval_began > MonotonicInstant::ZERO && lasted < detection.interval {
            return None;
        }
        let is_old = self.interval_began == MonotonicInstant::ZERO || lasted >= detection.interval.saturating_mul(2);
        self.interval_began = now.max(MonotonicInstant::from_nanos(1));
        let outliers = if is_old { Vec::new() } else { self.outliers(detection, now) };
        for host in &mut self.hosts {
            (host.answers, host.answered_errors) = (0, 0);
        }
        if !outliers.is_empty() {
            self.endpoints = endpoints().unwrap_or(0);
        }
        let before = self.health(now).ejected;
        outliers.into_iter().for_each(|place| self.eject(place, detection, now));
        Some(self.health(now).ejected.saturating_sub(before))
    }

    /// The hosts that did badly in the interval, by Envoy's two measures.
    fn outliers(&self, detection: &Detection, now: MonotonicInstant) -> Vec<usize> {
        let failing = self.failure_rates(detection.failure_percentage, now);
        let threshold = f64::from(detection.failure_percentage.threshold) / 100.0;
        let rates = self.failure_rates(detection.success_rate, now);
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / rates.len().max(1) as f64;
        let average = mean(&mut rates.iter().map(|(_, rate)| *rate));
        let deviation = mean(&mut rates.iter().map(|(_, rate)| (rate - average) * (rate - average))).sqrt();
        let bound = average + deviation * f64::from(detection.success_rate.threshold) / 1000.0;
        let mut outliers: Vec<usize> = Vec::new();
        for (place, _) in
            failing.iter().filter(|(_, rate)| *rate >= threshold).chain(rates.iter().filter(|(_, rate)| *rate > bound))
        {
            if !outliers.contains(place) {
                outliers.push(*place);
            }
        }
        outliers
    }

    /// The share of errors among the answers of each host, where the question is asked of it.
    fn failure_rates(&self, sweep: Sweep, now: MonotonicInstant) -> Vec<(usize, f64)> {
        let is_asked = |host: &HostEntry| !host.is_ejected(now) && host.answers >= sweep.requests.max(1);
        let asked = self.hosts.iter().enumerate().filter(|(_, host)| is_asked(host));
        let rate = |host: &HostEntry| f64::from(host.answered_errors) / f64::from(host.answers);
        let rates: Vec<(usize, f64)> = asked.map(|(place, host)| (place, rate(host))).collect();
        if sweep.threshold == 0 || rates.len() < usize::from(sweep.hosts) { Vec::new() } else { rates }
    }

    /// Ejects a host, if so many may be.
    fn eject(&mut self, place: usize, detection: &Detection, now: MonotonicInstant) {
        let Health { hosts, ejected } = self.health(now);
        let within = |part: u64, percent: u8| part * 100 <= hosts * u64::from(percent);
        let may_be = ejected == 0 || within(ejected + 1, detection.max_ejection_percent);
        let is_healthy = within(ejected, 100 - detection.min_health_percent.min(100));
        let Some(host) = self.hosts.get_mut(place).filter(|_| may_be && is_healthy) else { return };
        // For each interval that it has been back without another, one ejection is forgiven.
        let back_for = now.saturating_since(host.ejected_until);
        let forgiven = back_for.checked_div(detection.interval).unwrap_or(0).min(u64::from(u16::MAX));
        host.ejections = host.ejections.saturating_sub(forgiven as u16).saturating_add(1);
        let longest = detection.base_ejection_time.max(LONGEST_EJECTION);
        let time = detection.base_ejection_time.saturating_mul(u64::from(host.ejections)).min(longest);
        host.ejected_until = now.saturating_add(time);
        (host.errors, host.gateway_errors, host.local_failures) = (0, 0, 0);
    }

    /// Where the host stands, or may stand.
    fn place(&mut self, id: u64, now: MonotonicInstant) -> Option<usize> {
        if let Some(place) = self.hosts.iter().position(|host| host.id == id) {
            return Some(place);
        }
        if self.hosts.len() < MOST_HOSTS {
            self.hosts.push(HostEntry::default());
            return Some(self.hosts.len() - 1);
        }
        let idle = self.hosts.iter_mut().enumerate().filter(|(_, host)| !host.is_ejected(now));
        let (place, host) = idle.min_by_key(|(_, host)| host.last_seen)?;
        *host = HostEntry::default();
        Some(place)
    }

    fn health(&self, now: MonotonicInstant) -> Health {
        let ejected = self.hosts.iter().filter(|host| host.is_ejected(now)).count() as u64;
        Health { hosts: self.endpoints.max(self.hosts.len() as u64), ejected }
    }

    fn encode(&self) -> Vec<u8> {
        let mut word = Vec::with_capacity(17 + self.hosts.len() * HostEntry::SIZE);
        word.push(SCHEMA);
        word.extend_from_slice(&self.endpoints.to_le_bytes());
        word.extend_from_slice(&self.interval_began.to_le_bytes());
        self.hosts.iter().for_each(|host| host.encode(&mut word));
        word
    }

    fn decode(word: &[u8]) -> Option<Table> {
        let (&SCHEMA, rest) = word.split_first()? else { return None };
        let (endpoints, rest) = rest.split_first_chunk::<8>()?;
        let (interval_began, rest) = rest.split_first_chunk::<8>()?;
        let (hosts, rest) = rest.as_chunks::<{ HostEntry::SIZE }>();
        let fits = rest.is_empty() && hosts.len() <= MOST_HOSTS;
        // A number of hosts that nobody can have is somebody else's.
        let endpoints = u64::from_le_bytes(*endpoints).min(u64::from(u32::MAX));
        let interval_began = MonotonicInstant::from_le_bytes(*interval_began);
        fits.then(|| Table { endpoints, interval_began, hosts: hosts.iter().map(HostEntry::decode).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;
    use crate::units::at;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;
    const ERROR: Answer = Answer::Error { gateway: false };
    const GATEWAY: Answer = Answer::Error { gateway: true };

    /// What the answers of one host come to: whether it is ejected after each.
    fn ejections(detection: &Detection, answers: &[Answer]) -> Vec<bool> {
        let host = Sim::new(1);
        let note = |answer: &Answer| note(&host, "w", detection, (7, *answer), at(SECOND), || Some(3)).unwrap();
        answers.iter().map(|answer| note(answer).health.ejected > 0).collect()
    }

    #[test]
    fn so_many_in_a_row_eject() {
        let detection = Detection { errors: 3, gateway_errors: 2, ..Detection::default() };
        let last = |answers: &[Answer]| *ejections(&detection, answers).last().unwrap();
        assert_eq!(ejections(&detection, &[ERROR; 4]), [false, false, true, true]);
        assert!(!last(&[ERROR, ERROR, Answer::Success, ERROR, ERROR]), "a success breaks the row");
        assert!(last(&[GATEWAY; 2]));
        assert!(!last(&[GATEWAY, ERROR, GATEWAY]) || last(&[ERROR; 3]), "three 5xx in a row");
        assert!(last(&[Answer::LocalFailure; 2]), "a failed connection is a 503 of the gateway");
        let off = Detection { errors: 0, gateway_errors: 0, ..detection };
        assert_eq!(ejections(&off, &[GATEWAY; 100]), [false; 100]);
    }

    #[test]
    fn failed_connections_are_told_apart_where_they_are_split() {
        let split = Detection { errors: 3, local_failures: 2, splits_local: true, ..Detection::default() };
        assert_eq!(ejections(&split, &[Answer::LocalFailure; 2]), [false, true]);
        assert_eq!(ejections(&split, &[ERROR, ERROR, Answer::LocalFailure]), [false; 3]);
        assert_eq!(
            ejections(&split, &[Answer::LocalFailure, ERROR, Answer::LocalFailure, ERROR]),
            [false; 4],
            "an answer shows that the connection works"
        );
    }

    #[test]
    fn ejection_lasts_longer_each_time_and_is_forgiven() {
        let host = Sim::new(1);
        let detection = Detection { errors: 1, ..Detection::default() };
        let note = |answer, now| note(&host, "w", &detection, (7, answer), at(now), || None).unwrap();
        assert!(note(ERROR, 1).is_new);
        assert!(!note(ERROR, 2).is_new, "it is ejected already");
        assert_eq!(health(&host, "w", at(30 * SECOND)), Health { hosts: 1, ejected: 1 });
        assert_eq!(health(&host, "w", at(30 * SECOND + 1)).ejected, 0);
        assert!(note(ERROR, 31 * SECOND).is_new);
        assert_eq!(health(&host, "w", at(90 * SECOND)).ejected, 1, "twice as long");
        assert_eq!(health(&host, "w", at(91 * SECOND)).ejected, 0);
        assert!(note(ERROR, 121 * SECOND).is_new);
        assert_eq!(health(&host, "w", at(150 * SECOND)).ejected, 1, "three intervals forgave two ejections");
        assert_eq!(health(&host, "w", at(151 * SECOND)).ejected, 0);
    }

    #[test]
    fn no_more_than_the_stated_share_but_always_one() {
        let host = Sim::new(1);
        let detection = Detection { errors: 1, max_ejection_percent: 20, ..Detection::default() };
        let ejected = |id, endpoints| {
            note(&host, "w", &detection, (id, ERROR), at(SECOND), || Some(endpoints)).unwrap().health.ejected
        };
        assert_eq!(ejected(1, 3), 1, "a third, but the first");
        assert_eq!(ejected(2, 3), 1);
        assert_eq!(ejected(2, 10), 2);
        assert_eq!(ejected(3, 10), 2);
        let shy = Detection { errors: 1, max_ejection_percent: 100, min_health_percent: 50, ..Detection::default() };
        let ejected = |id| note(&host, "x", &shy, (id, ERROR), at(SECOND), || Some(4)).unwrap().health.ejected;
        assert_eq!((1..=4).map(ejected).collect::<Vec<_>>(), [1, 2, 3, 3], "half of them are not healthy any more");
    }

    /// Five hosts answer `each` times within an interval of ten seconds; of those of the first, `errors` in a hundred are
    /// errors, never two in a row. How many are ejected when the next answer comes at `next`.
    fn swept(detection: &Detection, each: u64, errors: u64, next: u64) -> u64 {
        let host = Sim::new(1);
        let note = |id, answer, now| note(&host, "w", detection, (id, answer), at(now), || Some(5)).unwrap();
        for n in 0..each {
            for id in 1..=5 {
                let is_error = id == 1 && (n + 1) * errors / 100 > n * errors / 100;
                let noted = note(id, if is_error { ERROR } else { Answer::Success }, SECOND + n);
                assert_eq!((noted.swept, noted.health.ejected), (0, 0), "the interval goes on");
            }
        }
        let noted = note(2, Answer::Success, next);
        assert_eq!(noted.swept, noted.health.ejected);
        assert_eq!(host.writes(), each * 5 + 1);
        noted.swept
    }

    #[test]
    fn a_percentage_of_an_interval_ejects() {
        let asks = |threshold| Detection {
            failure_percentage: Sweep { threshold, ..Detection::default().failure_percentage },
            ..Detection::default()
        };
        assert_eq!(swept(&asks(20), 50, 20, 11 * SECOND), 1);
        assert_eq!(swept(&asks(21), 50, 20, 11 * SECOND), 0);
        assert_eq!(swept(&asks(20), 49, 50, 11 * SECOND), 0, "too few answers");
        assert_eq!(swept(&asks(20), 50, 20, 22 * SECOND), 0, "too long ago");
        let more = Detection { failure_percentage: Sweep { hosts: 6, ..asks(20).failure_percentage }, ..asks(20) };
        assert_eq!(swept(&more, 50, 20, 11 * SECOND), 0, "too few hosts");
    }

    #[test]
    fn a_success_rate_far_from_the_others_ejects() {
        let asks = |threshold| Detection {
            success_rate: Sweep { threshold, ..Detection::default().success_rate },
            ..Detection::default()
        };
        // One host of five fails 20 %: 4 % on average, with a standard deviation of 8 %.
        assert_eq!(swept(&asks(1900), 100, 20, 11 * SECOND), 1, "past 19.2 %");
        assert_eq!(swept(&asks(2100), 100, 20, 11 * SECOND), 0, "within 20.8 %");
        assert_eq!(swept(&asks(1900), 99, 20, 11 * SECOND), 0, "too few answers");
        assert_eq!(swept(&asks(1900), 100, 0, 11 * SECOND), 0, "all alike");
    }

    #[test]
    fn a_host_that_is_well_is_not_written() {
        let host = Sim::new(1);
        let detection = Detection::default();
        for n in 0..100 {
            note(&host, "w", &detection, (7, Answer::Success), at(SECOND + n * SECOND / 100), || None).unwrap();
        }
        assert_eq!(host.writes(), 1);
    }

    #[test]
    fn garbage_is_no_table() {
        for garbage in [&b""[..], b"\x02", b"\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", &[2; 40], &[2; 17 + 65 * 40]] {
            assert_eq!(Table::decode(garbage), None, "{} bytes", garbage.len());
        }
    }

    proptest! {
        #[test]
        fn the_table_is_bounded_and_read_as_it_was_written(
            answers in proptest::collection::vec((0..100_u64, 0..3_u8, 0..5_000_u64), 1..600),
        ) {
            let sweep = Sweep { threshold: 1, hosts: 1, requests: 1 };
            let detection =
                Detection { errors: 2, failure_percentage: sweep, success_rate: sweep, ..Detection::default() };
            let (mut table, mut now) = (Table::default(), at(1));
            for (id, answer, milliseconds) in answers {
                now = now.saturating_add(milliseconds * 1_000_000);
                let answer = [Answer::Success, ERROR, Answer::LocalFailure][usize::from(answer)];
                table.sweep(&detection, now, &|| Some(100));
                table.note(&detection, id, answer, now, &|| Some(100));
                prop_assert!(table.hosts.len() <= MOST_HOSTS);
                prop_assert!(table.health(now).ejected <= 10, "a tenth of a hundred");
                let read = Table::decode(&table.encode());
                prop_assert_eq!(read.as_ref(), Some(&table));
            }
        }

        #[test]
        fn no_word_is_too_odd(word in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(mut table) = Table::decode(&word) {
                let sweep = Sweep { threshold: 1, hosts: 1, requests: 1 };
                let detection = Detection { failure_percentage: sweep, success_rate: sweep, ..Detection::default() };
                table.sweep(&detection, at(5), &|| Some(u64::MAX));
                table.note(&detection, 1, ERROR, at(5), &|| Some(u64::MAX));
                table.health(at(0)).ejected_share();
            }
        }
    }
}
