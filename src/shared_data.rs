//! Records in the shared data of the proxy: the one way to them.
//!
//! A [`SharedCell`] is a key and the type of the record under it. It reads, writes and updates by compare-and-swap, and
//! counts what is wrong: a value that is no record of this type (another module may write under the same key), and an
//! update that was given up because other workers were faster too often.
//!
//! The first byte of a record is the number of its schema. A [`Record`] reads its own schema and may read earlier ones,
//! so that an upgrade of the module keeps what was written before it.

use crate::host::{SharedData, Version};
use std::fmt;
use std::marker::PhantomData;

/// What is kept under a key.
pub trait Record: Sized {
    /// The number of the layout that [`Record::encode`] writes. Change it with the layout.
    const SCHEMA: u8;

    /// The bytes that are allocated for a record, with its schema, before it is encoded.
    const CAPACITY: usize = 32;

    /// Appends the record to `bytes`, without the schema.
    fn encode(&self, bytes: &mut Vec<u8>);

    /// Reads a record of the schema `schema`, which may be an earlier one. `None` where the bytes are no such record.
    fn decode(schema: u8, bytes: &[u8]) -> Option<Self>;
}

/// What was found under a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored<R> {
    Absent,
    /// Bytes that are no record of this type.
    Garbage,
    Record(R),
}

impl<R> Stored<R> {
    /// The record; garbage counts as absent.
    pub fn record(self) -> Option<R> {
        match self {
            Stored::Record(record) => Some(record),
            Stored::Absent | Stored::Garbage => None,
        }
    }
}

/// What an update does to a record, and the result of the update.
pub enum Change<R, T> {
    Write(R, T),
    Keep(T),
}

/// An update that was given up, because other workers changed the record too often meanwhile. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contended;

/// What can be wrong with shared data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedDataProblem {
    Garbage,
    Contended,
}

/// How often an update tries: with eight threads on one key the worst case measured was 181.
const MAX_ATTEMPTS: usize = 1000;

/// A record in shared data, by its key.
pub struct SharedCell<R> {
    key: Box<str>,
    record: PhantomData<fn() -> R>,
}

impl<R> fmt::Debug for SharedCell<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedCell").field(&self.key).finish()
    }
}

impl<R> Clone for SharedCell<R> {
    fn clone(&self) -> Self {
        SharedCell { key: self.key.clone(), record: PhantomData }
    }
}

impl<R> SharedCell<R> {
    /// The record under `key`, which begins with the policy's prefix. The number of keys has to be bounded: shared data
    /// cannot be deleted.
    pub fn new(key: impl Into<Box<str>>) -> SharedCell<R> {
        SharedCell { key: key.into(), record: PhantomData }
    }

    /// The key.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl<R: Record> SharedCell<R> {
    /// Reads the record.
    pub fn read(&self, store: &impl SharedData) -> Stored<R> {
        read_record(store.get(&self.key).as_ref().map(|(value, _)| value.as_slice()))
    }

    /// Reads the record, lets `change` decide, and writes; again from the start where another worker was faster.
    ///
    /// # Errors
    /// [`Contended`] if that happened a thousand times in a row.
    pub fn update<T>(
        &self,
        store: &impl SharedData,
        mut change: impl FnMut(Stored<R>) -> Change<R, T>,
    ) -> Result<T, Contended> {
        let (mut result, mut replaces_garbage) = (None, false);
        update_bytes(store, &self.key, &mut |found| {
            let stored = read_record(found);
            let is_garbage = matches!(stored, Stored::Garbage);
            match change(stored) {
                Change::Keep(kept) => {
                    (result, replaces_garbage) = (Some(kept), false);
                    None
                }
                Change::Write(record, written) => {
                    (result, replaces_garbage) = (Some(written), is_garbage);
                    Some(bytes(&record))
                }
            }
        })?;
        if replaces_garbage {
            store.report(SharedDataProblem::Garbage);
        }
        result.ok_or(Contended)
    }

    /// Writes the record, whatever was there.
    pub fn overwrite(&self, store: &impl SharedData, record: &R) {
        store.overwrite(&self.key, &bytes(record));
    }
}

/// Takes a value, if there is one, and returns the value to write, if it is to be written.
pub type ChangeBytes<'c> = dyn FnMut(Option<&[u8]>) -> Option<Vec<u8>> + 'c;

/// Reads the value under `key`, lets `change` decide, and writes what it returns, if that is something; again from the
/// start where another worker was faster. For values whose layout depends on the policy; all others are records in a
/// [`SharedCell`].
///
/// # Errors
/// [`Contended`] if another worker was faster a thousand times in a row. Nothing was written.
#[inline(never)]
pub fn update_bytes<S: SharedData + ?Sized>(
    store: &S,
    key: &str,
    change: &mut ChangeBytes<'_>,
) -> Result<(), Contended> {
    for _ in 0..MAX_ATTEMPTS {
        let found = store.get(key);
        let (value, version) = match &found {
            Some((value, version)) => (Some(value.as_slice()), *version),
            None => (None, Version::ABSENT),
        };
        let Some(changed) = change(value) else { return Ok(()) };
        if store.set(key, &changed, version).is_ok() {
            return Ok(());
        }
    }
    store.report(SharedDataProblem::Contended);
    Err(Contended)
}

/// The record in a value.
fn read_record<R: Record>(value: Option<&[u8]>) -> Stored<R> {
    let Some(value) = value else { return Stored::Absent };
    let record = value.split_first().and_then(|(schema, bytes)| R::decode(*schema, bytes));
    record.map_or(Stored::Garbage, Stored::Record)
}

/// The bytes of a record, with its schema.
fn bytes<R: Record>(record: &R) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(R::CAPACITY);
    bytes.push(R::SCHEMA);
    record.encode(&mut bytes);
    bytes
}

/// A number.
impl Record for u64 {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.to_le_bytes());
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<u64> {
        let number = bytes.try_into().ok().map(u64::from_le_bytes);
        number.filter(|_| schema == Self::SCHEMA)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Sim;

    /// A number that was one byte long in its first schema.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Number(u16);

    impl Record for Number {
        const SCHEMA: u8 = 2;

        fn encode(&self, bytes: &mut Vec<u8>) {
            bytes.extend_from_slice(&self.0.to_le_bytes());
        }

        fn decode(schema: u8, bytes: &[u8]) -> Option<Number> {
            match (schema, bytes) {
                (1, [number]) => Some(Number(u16::from(*number))),
                (2, [low, high]) => Some(Number(u16::from_le_bytes([*low, *high]))),
                _ => None,
            }
        }
    }

    fn add(cell: &SharedCell<Number>, host: &Sim, amount: u16) -> Result<u16, Contended> {
        cell.update(host, |stored| {
            let sum = stored.record().map_or(0, |Number(number)| number) + amount;
            Change::Write(Number(sum), sum)
        })
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let (host, cell) = (Sim::new(1), SharedCell::new("key"));
        assert_eq!(cell.read(&host), Stored::Absent);
        assert_eq!(add(&cell, &host, 300), Ok(300));
        assert_eq!(cell.read(&host), Stored::Record(Number(300)));
        cell.overwrite(&host, &Number(7));
        assert_eq!(cell.read(&host), Stored::Record(Number(7)));
    }

    #[test]
    fn a_record_of_the_previous_schema_is_read() {
        let (host, cell) = (Sim::new(1), SharedCell::new("key"));
        host.overwrite("key", &[1, 200]);
        assert_eq!(add(&cell, &host, 1), Ok(201));
        assert_eq!(host.get("key").map(|(value, _)| value), Some(vec![2, 201, 0]));
    }

    #[test]
    fn garbage_is_replaced_and_counted_once() {
        for garbage in [&b""[..], b"\x02", b"\x02\0", b"\x03\0\0", b"\x02\0\0\0"] {
            let (host, cell) = (Sim::new(1), SharedCell::<Number>::new("key"));
            host.overwrite("key", garbage);
            assert_eq!(cell.read(&host), Stored::Garbage, "{garbage:?}");
            assert_eq!(add(&cell, &host, 1), Ok(1), "{garbage:?}");
            assert_eq!(add(&cell, &host, 1), Ok(2), "{garbage:?}");
            assert_eq!(host.problems(), [SharedDataProblem::Garbage], "{garbage:?}");
        }
    }
}
