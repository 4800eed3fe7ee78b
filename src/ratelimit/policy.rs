//! A limit, ready to be tested.

use super::gcra::Gcra;
use super::table::WAYS;
use crate::key::KeySource;
use siphasher::sip::SipHasher24;
use std::hash::Hasher;

/// One limit of a route.
#[derive(Debug)]
pub struct Limit {
    /// Which limit of the policy it is.
    pub id: usize,
    pub name: Box<str>,
    pub gcra: Gcra,
    /// For the answer: what was promised, such as "100 requests a minute".
    pub promise: Box<str>,
    /// The parts of the key, all of them together; none is one allowance for the whole route. A part that a request
    /// lacks counts as a value of its own: all requests without it share one allowance.
    pub key: Vec<KeySource>,
    /// Requests over the limit are counted and let through.
    pub shadow: bool,
    /// The most requests of one key that a worker reserves ahead; 0: none.
    pub lease: u32,
    /// How many words the limit's keys are spread over.
    pub buckets: u64,
    /// What the keys of this limit's shared words start with.
    pub prefix: Box<str>,
}

/// The most keys that a limit remembers unless it says otherwise.
pub(super) const DEFAULT_MAX_KEYS: u64 = 65_536;

/// Buckets for `keys` keys, half of the ways left free, so that a full bucket is rare: about one key in fifty at
/// `keys` live keys.
pub(super) fn buckets(keys: u64) -> u64 {
    keys.div_ceil(WAYS as u64 / 2).max(1)
}

/// Keys the hash of limit keys, so that nobody outside can crowd a victim's bucket on purpose. All workers share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Secret(pub [u8; 16]);

impl Secret {
    /// A hasher keyed with the secret (SipHash-2-4; Aumasson and Bernstein, 2012).
    pub(super) fn hasher(&self) -> impl Hasher + use<> {
        SipHasher24::new_with_key(&self.0)
    }
}
