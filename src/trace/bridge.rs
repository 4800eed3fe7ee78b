//! What arrived is stored for what leaves.
//!
//! An application that copies no trace headers breaks its traces, but nearly all copy one header: a request id. So
//! what a request arrives with is stored in shared data under that id, and given to the requests that leave with
//! the id. Where the application copies the `traceparent` (or another format) as it got it, the parent id in it is one
//! that was given here, to this one request: a key that cannot be mistaken, which wins over any other.
//!
//! Shared data cannot be deleted, so a context goes to one of a fixed number of places: by a hash of its key, with the
//! full key, compared when it is read, and the time when it lapses. Two live keys at one place: the later one stays,
//! the earlier one is not bridged. A context is never given to a request of another id.
//!
//! One request id may arrive several times, because an id belongs to a trace and not to a hop. Where the contexts
//! are of one trace, the trace id is given out and what differs is not; where they are of several, nothing is.

use super::events::{TraceEvent, TraceEvents};
use super::w3c::{TraceContext, TraceFlags, bytes_to_hex};
use crate::document::Value;
use crate::host::SharedData;
use crate::http::{HeaderId, HeaderMutation, HeaderNames, Request};
use crate::matcher::read_header_name;
use crate::shared_data::update_bytes;
use crate::units::{LATENESS, MonotonicInstant, nanoseconds, read_duration};
use std::borrow::Cow;
use std::time::Duration;
use xxhash_rust::xxh64::xxh64;

const DEFAULT_CAPACITY: u64 = 4096;
const DEFAULT_TTL: Duration = Duration::from_secs(60);
const MAX_CARRIED: usize = 8;

/// The longest id that is a key, and the longest record: what does not fit is not stored.
const MAX_ID: usize = 256;
const MAX_RECORD: usize = 12 << 10;

/// The first byte of every record, to be changed with the layout.
const SCHEMA: u8 = 1;

/// The length that stands for no value.
const ABSENT: u16 = u16::MAX;

/// The `bridge` block.
#[derive(Debug)]
pub(super) struct Bridge {
    /// The header that the application copies.
    key: HeaderId,
    capacity: u64,
    ttl: u64,
    /// Besides `tracestate`.
    pub(super) carry: Vec<(Box<str>, HeaderId)>,
    prefix: Box<str>,
    /// Tells words with other headers in them from ours.
    layout: u64,
}

/// A context that was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredContext {
    pub(super) context: TraceContext,
    pub(super) tracestate: Option<Vec<u8>>,
    /// In the order of the headers that the bridge carries.
    pub(super) carried: Vec<Option<Vec<u8>>>,
}

/// How much of a word may be given out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ambiguity {
    None = 0,
    /// Requests of one trace that differed in the rest.
    SameTrace = 1,
    /// Requests of several traces.
    SeveralTraces = 2,
}

/// A record, taken apart.
struct Record<'w> {
    ambiguity: Ambiguity,
    context: TraceContext,
    id: &'w [u8],
    /// The values of `tracestate` and of the carried headers.
    values: &'w [u8],
}

/// Which key a context is stored under; a part of the word's name.
#[derive(Clone, Copy)]
enum KeyKind {
    RequestId,
    ParentId,
}

impl Bridge {
    /// Reads the block.
    pub(super) fn read(value: &Value<'_>, prefix: &str, names: &mut HeaderNames) -> Option<Bridge> {
        let mut fields = value.object()?;
        let key = match fields.optional("key") {
            Some(value) => {
                let mut fields = value.object()?;
                let header = fields.required("header");
                fields.end();
                header.and_then(|value| read_header_name(&value, value.text()?, names))
            }
            None => names.intern("x-request-id"),
        };
        let capacity = fields.optional("capacity").map(|value| value.integer(1..=65_536));
        let ttl = fields.optional("ttl").map(|value| read_duration(&value, Duration::from_secs(1)));
        let mut carry: Vec<(Box<str>, HeaderId)> = Vec::new();
        match fields.optional("carry") {
            None => carry.push(("baggage".into(), names.intern("baggage")?)),
            Some(value) => {
                let items = value.array().unwrap_or_default();
                if items.len() > MAX_CARRIED {
                    value.error(format!("{} headers", items.len()), format!("write at most {MAX_CARRIED}"));
                }
                for item in items.iter().take(MAX_CARRIED) {
                    if let Some(name) = item.text()
                        && let Some(id) = read_header_name(item, name, names)
                    {
                        carry.push((names.name(id).into(), id));
                    }
                }
            }
        }
        fields.end();
        let layout = carry.iter().fold(0, |layout, (name, _)| xxh64(name.as_bytes(), layout));
        Some(Bridge {
            key: key?,
            capacity: capacity.unwrap_or(Some(DEFAULT_CAPACITY))?,
            ttl: nanoseconds(ttl.unwrap_or(Some(DEFAULT_TTL))?),
            carry,
            prefix: prefix.into(),
            layout,
        })
    }

    /// What is stored for a request that leaves with `context`, or with none.
    pub(super) fn lookup(
        &self,
        request: &Request<'_>,
        context: Option<&TraceContext>,
        now: MonotonicInstant,
        shared_data: &dyn SharedData,
    ) -> Option<StoredContext> {
        let fits = |found: &StoredContext| context.is_none_or(|context| is_same_trace(context, &found.context));
        let exact =
            context.and_then(|context| self.read_record(KeyKind::ParentId, &context.parent_id, now, shared_data));
        exact
            .filter(fits)
            .or_else(|| self.read_record(KeyKind::RequestId, &self.id(request)?, now, shared_data).filter(fits))
    }

    fn read_record(
        &self,
        kind: KeyKind,
        id: &[u8],
        now: MonotonicInstant,
        shared_data: &dyn SharedData,
    ) -> Option<StoredContext> {
        let mut key = String::new();
        self.write_slot_key(&mut key, kind, id);
        let (record, _) = shared_data.get(&key)?;
        let record = self
            .decode(&record, now)
            .filter(|record| record.id == id && record.ambiguity != Ambiguity::SeveralTraces)?;
        let mut stored = StoredContext { context: record.context, tracestate: None, carried: Vec::new() };
        if record.ambiguity == Ambiguity::None {
            let mut rest = record.values;
            let mut values = std::iter::from_fn(|| {
                let (value, after) = take_value(rest)?;
                rest = after;
                Some(value.map(<[u8]>::to_vec))
            });
            stored.tracestate = values.next().flatten();
            stored.carried = values.collect();
        }
        Some(stored)
    }

    /// Remembers what a request goes on to the application with, once all its `mutations` are known.
    pub(super) fn store(
        &self,
        request: &Request<'_>,
        context: &TraceContext,
        mutations: &[HeaderMutation<'_>],
        now: MonotonicInstant,
        shared_data: &dyn SharedData,
    ) -> TraceEvents {
        let mut events = TraceEvents::default();
        let mut values = Vec::new();
        let tracestate = ("tracestate", HeaderNames::TRACESTATE);
        for (name, id) in [tracestate].into_iter().chain(self.carry.iter().map(|(name, id)| (&**name, *id))) {
            let value = request.value_after(name, id, mutations);
            let fitting = value.as_deref().filter(|value| values.len() + value.len() < MAX_RECORD - MAX_ID);
            events.add_if(fitting.is_none() && value.is_some(), TraceEvent::Truncated);
            push_value(&mut values, fitting);
        }
        // Both words are written in the same memory.
        let (mut key, mut record) = (String::new(), Vec::new());
        self.write_slot_key(&mut key, KeyKind::ParentId, &context.parent_id);
        self.encode(&mut record, Ambiguity::None, context, &context.parent_id, &values, now);
        shared_data.overwrite(&key, &record);
        let Some(id) = self.id(request) else { return events };
        self.write_slot_key(&mut key, KeyKind::RequestId, &id);
        let _ = update_bytes(shared_data, &key, &mut |found| {
            let known = found.and_then(|record| self.decode(record, now));
            let displaces = known.as_ref().is_some_and(|known| known.id != &*id);
            let mut context = *context;
            let ambiguity = match known.filter(|_| !displaces) {
                None => Ambiguity::None,
                Some(known)
                    if known.ambiguity == Ambiguity::SeveralTraces || known.context.trace_id != context.trace_id =>
                {
                    Ambiguity::SeveralTraces
                }
                Some(known) => {
                    context.flags = context.flags.with(known.context.flags);
                    if known.ambiguity == Ambiguity::None && known.values == values {
                        Ambiguity::None
                    } else {
                        Ambiguity::SameTrace
                    }
                }
            };
            events.add_if(displaces, TraceEvent::Displaced);
            events.add_if(ambiguity != Ambiguity::None, TraceEvent::Ambiguous);
            let mut record = std::mem::take(&mut record);
            self.encode(&mut record, ambiguity, &context, &id, &values, now);
            Some(record)
        });
        events
    }

    /// The request's id, as it is compared: Envoy writes the reason why it traces a request into the fifteenth
    /// character of a UUID, on each listener anew.
    fn id<'a>(&self, request: &Request<'a>) -> Option<Cow<'a, [u8]>> {
        let mut id = request.joined(self.key).filter(|id| (1..=MAX_ID).contains(&id.len()))?;
        if id.len() == 36
            && let Some(reason) = id.to_mut().get_mut(14)
            && matches!(*reason, b'9' | b'a' | b'b')
        {
            *reason = b'4';
        }
        Some(id)
    }

    /// Writes the name of the word for `id` over `key`.
    fn write_slot_key(&self, key: &mut String, kind: KeyKind, id: &[u8]) {
        let slot = (u128::from(xxh64(id, 0)) * u128::from(self.capacity)) >> 64;
        key.clear();
        key.reserve(self.prefix.len() + 22);
        key.push_str(&self.prefix);
        key.push_str(match kind {
            KeyKind::RequestId => "bridge/id/",
            KeyKind::ParentId => "bridge/parent/",
        });
        key.push_str(str::from_utf8(&bytes_to_hex((slot as u32).to_be_bytes())).unwrap_or_default());
    }

    /// Writes a word over `word`.
    fn encode(
        &self,
        record: &mut Vec<u8>,
        ambiguity: Ambiguity,
        context: &TraceContext,
        id: &[u8],
        values: &[u8],
        now: MonotonicInstant,
    ) {
        let values = if ambiguity == Ambiguity::None { values } else { &[] };
        record.clear();
        record.reserve(37 + id.len() + values.len());
        record.extend([SCHEMA, ambiguity as u8]);
        record.extend(self.layout.to_le_bytes());
        record.extend(now.saturating_add(self.ttl).to_le_bytes());
        record.extend(context.trace_id);
        record.push(context.flags.bits());
        push_value(record, Some(id));
        record.extend(values);
    }

    /// Takes a word apart; `None` where it has lapsed or is not one of ours.
    fn decode<'w>(&self, record: &'w [u8], now: MonotonicInstant) -> Option<Record<'w>> {
        let ([SCHEMA, ambiguity], rest) = record.split_first_chunk()? else { return None };
        let (layout, rest) = rest.split_first_chunk()?;
        let (until, rest) = rest.split_first_chunk()?;
        let (trace_id, rest) = rest.split_first_chunk()?;
        let (flags, rest) = rest.split_first()?;
        let (id, values) = take_value(rest)?;
        let until = MonotonicInstant::from_le_bytes(*until);
        // A word that is to outlive our own is not ours: the clock does not go back.
        let is_live = until > now && until <= now.saturating_add(self.ttl).saturating_add(LATENESS);
        if !is_live || u64::from_le_bytes(*layout) != self.layout || *trace_id == [0; 16] {
            return None;
        }
        let ambiguity = match ambiguity {
            0 => Ambiguity::None,
            1 => Ambiguity::SameTrace,
            _ => Ambiguity::SeveralTraces,
        };
        let context = TraceContext { trace_id: *trace_id, parent_id: [0; 8], flags: TraceFlags::from_bits(*flags) };
        Some(Record { ambiguity, context, id: id?, values })
    }
}

impl StoredContext {
    /// `context` with what the application left out of it.
    pub(super) fn complete(&self, mut context: TraceContext, events: &mut TraceEvents) -> TraceContext {
        let known = &self.context;
        let mut flags = context.flags;
        if flags.contains(TraceFlags::DEFERRED) {
            flags = known.flags;
        } else if known.flags.contains(TraceFlags::RANDOM) {
            flags = flags.with(TraceFlags::RANDOM);
        }
        events.add_if(flags != context.flags || known.trace_id != context.trace_id, TraceEvent::Repaired);
        context.trace_id = known.trace_id;
        context.flags = flags;
        context
    }
}

/// Whether `context` is of the trace that `known` is of, be it with half of the trace id.
fn is_same_trace(context: &TraceContext, known: &TraceContext) -> bool {
    let ((high, low), (known_high, known_low)) = (context.trace_id.split_at(8), known.trace_id.split_at(8));
    low == known_low && (high == known_high || high == [0; 8])
}

fn push_value(record: &mut Vec<u8>, value: Option<&[u8]>) {
    let length = value.map_or(ABSENT, |value| value.len() as u16);
    record.extend(length.to_le_bytes());
    record.extend(value.unwrap_or_default());
}

fn take_value(record: &[u8]) -> Option<(Option<&[u8]>, &[u8])> {
    let (length, rest) = record.split_first_chunk()?;
    match u16::from_le_bytes(*length) {
        ABSENT => Some((None, rest)),
        length => rest.split_at_checked(usize::from(length)).map(|(value, rest)| (Some(value), rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;
    use crate::host::Host;
    use crate::host::sim::Sim;
    use crate::http::encode_headers;
    use proptest::prelude::*;

    struct Fixture {
        bridge: Bridge,
        names: HeaderNames,
        host: Sim,
    }

    const UUID: &str = "a6f8a1b2-0c1d-4234-8abc-0123456789ab";

    fn context(trace: u8, parent: u8) -> TraceContext {
        TraceContext {
            trace_id: [trace; 16],
            parent_id: [parent; 8],
            flags: TraceFlags::SAMPLED.with(TraceFlags::RANDOM),
        }
    }

    impl Fixture {
        fn new(bridge: &str) -> Fixture {
            let node = Node::from_json(bridge.as_bytes()).unwrap();
            let report = Report::default();
            let mut names = HeaderNames::default();
            let bridge = Bridge::read(&Value::root(&node, &report), "t/", &mut names).unwrap();
            assert_eq!(report.into_diagnostics(), []);
            Fixture { bridge, names, host: Sim::new(3) }
        }

        fn store(&self, context: &TraceContext, headers: &[(&str, &str)]) -> TraceEvents {
            self.store_at(self.host.now(), context, headers)
        }

        fn store_at(&self, now: MonotonicInstant, context: &TraceContext, headers: &[(&str, &str)]) -> TraceEvents {
            let block = encode_headers(headers);
            let request = Request::parse(&block, &self.names);
            self.bridge.store(&request, context, &[], now, &self.host)
        }

        fn lookup(&self, context: Option<&TraceContext>, id: &str) -> Option<StoredContext> {
            let block = encode_headers(&[("x-request-id", id)]);
            let request = Request::parse(&block, &self.names);
            self.bridge.lookup(&request, context, self.host.now(), &self.host)
        }
    }

    #[test]
    fn what_is_remembered_comes_back_until_it_lapses() {
        let fixture = Fixture::new(r#"{"ttl": "5s", "carry": ["baggage", "x-cohort"]}"#);
        let headers = [("x-request-id", UUID), ("tracestate", "a=1"), ("tracestate", "b=2"), ("x-cohort", "v2")];
        assert_eq!(fixture.store(&context(1, 2), &headers), TraceEvents::default());
        let found = fixture.lookup(None, UUID).unwrap();
        assert_eq!((found.context.trace_id, found.context.flags), ([1; 16], context(1, 2).flags));
        assert_eq!(found.tracestate.as_deref(), Some(&b"a=1,b=2"[..]));
        assert_eq!(found.carried, [None, Some(b"v2".to_vec())]);
        assert_eq!(fixture.lookup(None, &UUID.replacen("-4", "-9", 1)), Some(found), "Envoy's own note in the id");
        assert_eq!(fixture.lookup(None, "another"), None);
        assert_eq!(fixture.lookup(None, ""), None);
        fixture.host.advance(Duration::from_secs(5));
        assert_eq!(fixture.lookup(None, UUID), None);
    }

    #[test]
    fn a_parent_id_of_ours_wins() {
        let fixture = Fixture::new("{}");
        fixture.store(&context(1, 2), &[("x-request-id", UUID), ("baggage", "user=ann")]);
        fixture.store(&context(1, 3), &[("x-request-id", UUID), ("baggage", "user=bob")]);
        let baggage = |context: Option<&TraceContext>| fixture.lookup(context, UUID).unwrap().carried;
        assert_eq!(baggage(Some(&context(1, 2))), [Some(b"user=ann".to_vec())]);
        assert_eq!(baggage(Some(&context(1, 3))), [Some(b"user=bob".to_vec())]);
        assert_eq!(baggage(None), [] as [Option<Vec<u8>>; 0], "one of two: neither");
        assert_eq!(fixture.lookup(Some(&context(9, 2)), UUID), None, "another trace gets nothing");
        let mut half = context(1, 2);
        half.trace_id[..8].fill(0);
        let mut events = TraceEvents::default();
        let found = fixture.lookup(Some(&half), "").unwrap();
        assert_eq!(found.complete(half, &mut events).trace_id, [1; 16]);
        assert!(events.contains(TraceEvent::Repaired));
    }

    #[test]
    fn two_traces_under_one_id_are_not_mixed_up() {
        let fixture = Fixture::new("{}");
        let headers = [("x-request-id", UUID)];
        assert_eq!(fixture.store(&context(1, 2), &headers), TraceEvents::default());
        assert_eq!(fixture.store(&context(1, 3), &headers), TraceEvents::default(), "nothing differs but the hop");
        assert!(fixture.store(&context(2, 4), &headers).contains(TraceEvent::Ambiguous));
        assert_eq!(fixture.lookup(None, UUID), None);
        assert!(fixture.store(&context(2, 5), &headers).contains(TraceEvent::Ambiguous), "while either may be alive");
        fixture.host.advance(Duration::from_secs(60));
        assert_eq!(fixture.store(&context(2, 6), &headers), TraceEvents::default());
        assert!(fixture.lookup(None, UUID).is_some());
    }

    #[test]
    fn a_worker_that_read_the_clock_earlier_knows_what_another_wrote() {
        let fixture = Fixture::new(r#"{"capacity": 1}"#);
        let (headers, others) = ([("x-request-id", UUID)], [("x-request-id", "another")]);
        let later = fixture.host.now().saturating_add(20_000_000);
        assert_eq!(fixture.store_at(later, &context(1, 2), &headers), TraceEvents::default());
        assert!(fixture.lookup(None, UUID).is_some());
        assert!(fixture.store(&context(2, 3), &headers).contains(TraceEvent::Ambiguous));
        assert!(fixture.store_at(later, &context(3, 4), &others).contains(TraceEvent::Displaced));
        assert!(fixture.store(&context(1, 2), &headers).contains(TraceEvent::Displaced));
    }

    #[test]
    fn many_requests_take_a_bounded_number_of_words_and_none_is_given_anothers() {
        let fixture = Fixture::new(r#"{"capacity": 64}"#);
        let mut displaced = 0;
        for n in 0..10_000_u64 {
            let mut context = context(1, 1);
            context.trace_id[8..].copy_from_slice(&n.to_be_bytes());
            context.parent_id = (n + 1).to_be_bytes();
            let id = format!("request-{n}");
            displaced += u32::from(fixture.store(&context, &[("x-request-id", &id)]).contains(TraceEvent::Displaced));
            let earlier = format!("request-{}", n.saturating_sub(n % 97));
            if let Some(found) = fixture.lookup(None, &earlier) {
                assert_eq!(found.context.trace_id[8..], n.saturating_sub(n % 97).to_be_bytes());
            }
        }
        assert_eq!(fixture.host.keys().len(), 2 * 64);
        assert!(displaced > 9_000);
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let fixture = Fixture::new("{}");
        let long = "x".repeat(MAX_RECORD);
        let events =
            fixture.store(&context(1, 2), &[("x-request-id", UUID), ("baggage", &long), ("tracestate", "a=1")]);
        assert!(events.contains(TraceEvent::Truncated));
        let found = fixture.lookup(None, UUID).unwrap();
        assert_eq!((found.tracestate.as_deref(), &found.carried[..]), (Some(&b"a=1"[..]), &[None][..]));
        fixture.store(&context(1, 2), &[("x-request-id", &long)]);
        assert_eq!(fixture.lookup(None, &long), None);
    }

    proptest! {
        #[test]
        fn a_neighbours_bytes_are_nothing_or_something(mut record in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..80_usize) {
            let fixture = Fixture::new("{}");
            let mut key = String::new();
            fixture.bridge.write_slot_key(&mut key, KeyKind::RequestId, UUID.as_bytes());
            fixture.host.overwrite(&key, &record);
            fixture.lookup(None, UUID);
            // And what differs from a word of ours in a few bytes.
            fixture.store(&context(1, 2), &[("x-request-id", UUID), ("baggage", "a=1")]);
            let (mut ours, _) = crate::host::SharedData::get(&fixture.host, &key).unwrap();
            ours.truncate(ours.len() - cut.min(ours.len()));
            record.truncate(4);
            if let (Some(offset), Some(byte)) = (record.first(), record.get(1)) {
                let offset = usize::from(*offset) % ours.len().max(1);
                ours.iter_mut().skip(offset).take(1).for_each(|old| *old = *byte);
            }
            fixture.host.overwrite(&key, &ours);
            fixture.lookup(None, UUID);
        }
    }
}
