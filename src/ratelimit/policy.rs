//! A limit, ready to be tested.

use super::gcra::Gcra;
use super::lease::{self, most};
use super::table::{Terms, WAYS};
use crate::http::{HeaderId, Request};
use crate::key::KeySource;
use siphasher::sip::SipHasher24;
use std::hash::Hasher;

/// One limit of a route.
#[derive(Debug)]
pub struct Limit {
    pub name: Box<str>,
    /// The parts of the key, all of them together; none is one allowance for the whole route.
    pub key: Vec<KeySource>,
    pub on_missing: OnMissing,
    pub cost: Cost,
    /// For keys without an override.
    pub rate: Rate,
    /// The first that matches the key replaces the rate; at most 64 (`MAX_OVERRIDES`).
    pub overrides: Vec<Override>,
    /// Rates that are tried in shadow beside the one in force, on keys without an override.
    pub candidates: Vec<Candidate>,
    /// Where only some requests count: what their answer has to be.
    pub counted: Option<Statuses>,
    /// Requests over the limit are counted and let through.
    pub shadow: bool,
    pub answer: Answer,
    pub keyspace: Keyspace,
}

/// What is done with a request that lacks a part of the key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMissing {
    /// The absence is a value of its own: all requests without the part share one allowance.
    #[default]
    Share,
    /// The limit is not asked.
    Skip,
    /// The request is refused.
    Deny,
}

/// As how many requests one request counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    Fixed(u32),
    /// The number in a header; `otherwise` where there is none.
    Header {
        id: HeaderId,
        otherwise: u32,
    },
    /// One for each `unit` bytes of the body begun, at least one; `otherwise` for a body whose length is not known
    /// beforehand.
    ContentLength {
        id: HeaderId,
        unit: u32,
        otherwise: u32,
    },
}

impl Cost {
    /// What a request costs. Two values of a header, or one that is no number, count as none; a number that does not fit
    /// counts as the largest that does.
    pub fn of(&self, request: &Request<'_>) -> u32 {
        let number = |id: HeaderId| request.first(id).filter(|_| request.count(id) == 1).and_then(parse_number);
        match *self {
            Cost::Fixed(cost) => cost,
            Cost::Header { id, otherwise } => number(id).unwrap_or(otherwise),
            Cost::ContentLength { id, unit, otherwise } => {
                let unknown = if request.has_body() { otherwise } else { 1 };
                number(id).map_or(unknown, |length| length.div_ceil(unit).max(1))
            }
        }
    }
}

fn parse_number(text: &[u8]) -> Option<u32> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u32, |number, digit| {
        let digit = digit.is_ascii_digit().then(|| u32::from(digit.wrapping_sub(b'0')))?;
        Some(number.saturating_mul(10).saturating_add(digit))
    })
}

/// A rate, and what goes with it.
#[derive(Debug)]
pub struct Rate {
    /// Which rate of the policy it is; leases are kept by it.
    pub id: usize,
    pub(super) terms: Terms,
    /// The most requests of one key that a worker reserves ahead; 0: none.
    pub lease: u32,
    /// For the answer: what was promised, such as "100 requests a minute".
    pub promise: Box<str>,
}

impl Rate {
    pub(super) fn new(gcra: Gcra, promise: Box<str>) -> Rate {
        Rate { id: 0, terms: Terms { gcra, epoch: lease::EPOCH }, lease: most(gcra.burst()), promise }
    }

    pub fn gcra(&self) -> Gcra {
        self.terms.gcra
    }
}

/// Another rate for some keys.
#[derive(Debug)]
pub struct Override {
    /// What each part of the key has to be; `None`: anything.
    pub parts: Vec<Option<Box<str>>>,
    pub rate: Rate,
}

/// The most overrides of a limit: which of them still match is kept in the bits of one number.
pub const MAX_OVERRIDES: usize = 64;

/// A rate that is tried in shadow.
#[derive(Debug)]
pub struct Candidate {
    pub name: Box<str>,
    pub rate: Rate,
    pub keyspace: Keyspace,
}

/// Where the state of a limit's keys is kept.
#[derive(Debug)]
pub struct Keyspace {
    /// What the keys of the shared words start with.
    pub prefix: Box<str>,
    /// How many words the keys are spread over.
    pub buckets: u64,
    /// Of all rates, the one that takes the longest to regain.
    pub(super) longest: Terms,
}

/// HTTP statuses; the status of a gRPC call counts as the HTTP status that it maps to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statuses(pub Vec<(u16, u16)>);

impl Statuses {
    pub fn contains(&self, status: u16) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&status))
    }
}

/// A limit's `response` block.
#[derive(Debug)]
pub struct Answer {
    /// The status of a refusal.
    pub status: u16,
    pub body: Body,
    pub content_type: Option<Box<str>>,
    /// Headers of refusals, names in lower case.
    pub headers: Vec<(Box<str>, Box<str>)>,
    /// `x-ratelimit-limit`, `-remaining` and `-reset`, as Envoy writes them (draft-polli-ratelimit-headers-03).
    pub x_ratelimit: bool,
    /// `ratelimit` and `ratelimit-policy` (draft-ietf-httpapi-ratelimit-headers-10).
    pub fields: bool,
    pub retry_after: bool,
    /// `x-envoy-ratelimited`, which keeps Envoys in front from trying again.
    pub x_envoy_ratelimited: bool,
}

/// The body of a refusal.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum Body {
    /// One sentence.
    #[default]
    Sentence,
    /// The sentence as `application/problem+json` (RFC 9457), with the type that the draft defines.
    Problem,
    Own(Box<str>),
}

impl Default for Answer {
    fn default() -> Self {
        Answer {
            status: 429,
            body: Body::default(),
            content_type: None,
            headers: Vec::new(),
            x_ratelimit: false,
            fields: false,
            retry_after: true,
            x_envoy_ratelimited: true,
        }
    }
}

impl Answer {
    /// Whether a client is told what is left to it.
    pub fn tells(&self) -> bool {
        self.x_ratelimit || self.fields
    }
}

impl Limit {
    /// All rates of the limit itself.
    pub fn rates(&self) -> impl Iterator<Item = &Rate> {
        std::iter::once(&self.rate).chain(self.overrides.iter().map(|exception| &exception.rate))
    }

    /// The rate of keys that `exception` matches, an index into the overrides.
    pub fn rate_of(&self, exception: Option<usize>) -> &Rate {
        exception.and_then(|index| self.overrides.get(index)).map_or(&self.rate, |exception| &exception.rate)
    }

    /// Whether the key has to know the destination.
    pub fn reads_subset(&self) -> bool {
        self.key.iter().any(|source| matches!(source, KeySource::Subset))
    }
}

/// The most keys that a limit remembers unless it says otherwise.
pub(super) const DEFAULT_MAX_KEYS: u64 = 65_536;

/// How long the answer to a request is awaited at least before it counts, in nanoseconds; at most twice as long.
pub(super) const ANSWER_EPOCH: u64 = 60_000_000_000;

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
