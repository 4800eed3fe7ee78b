//! The compiled `rateLimits` block of a route.

use super::gcra::Gcra;
use super::lease::{self, most};
use super::service::GlobalLimit;
use super::table::{RateParams, WAYS};
use crate::http::{HeaderId, Request};
use crate::key::KeySource;
use crate::shared_data::Record;
use siphasher::sip::SipHasher24;
use std::hash::Hasher;

/// The compiled `rateLimits` block of a route.
#[derive(Debug, Default)]
pub struct RateLimits {
    /// The limits that this proxy keeps.
    pub local: Vec<Limit>,
    /// The limits that a rate limit service keeps for a whole fleet.
    pub global: Vec<GlobalLimit>,
}

impl RateLimits {
    /// Whether there is no limit.
    pub fn is_empty(&self) -> bool {
        self.local.is_empty() && self.global.is_empty()
    }

    /// Whether a key contains the subset, so that the limits come after the choice of the destination.
    pub fn reads_subset(&self) -> bool {
        self.local.iter().chain(self.global.iter().map(|global| &global.limit)).any(Limit::reads_subset)
    }

    /// All rates of the proxy's own limits, without candidates.
    pub fn rates(&self) -> impl Iterator<Item = &Rate> {
        self.local.iter().flat_map(Limit::rates)
    }

    /// The rate with the id `id`, and the keyspace of its keys.
    pub fn rate(&self, id: usize) -> Option<(&Keyspace, &Rate)> {
        self.local.iter().find_map(|limit| Some((&limit.keyspace, limit.rates().find(|rate| rate.id == id)?)))
    }
}

/// One limit of a route.
#[derive(Debug)]
pub struct Limit {
    /// The name, unique within the route.
    pub name: Box<str>,
    /// The parts that form the key together. Without a part the whole route has one allowance.
    pub key: Vec<KeySource>,
    /// What happens to a request that lacks a part of the key.
    pub on_missing: OnMissing,
    /// The number of requests that one request counts as.
    pub cost: Cost,
    /// The rate of keys without an override.
    pub rate: Rate,
    /// The first override that matches the key replaces the rate. At most 64 (`MAX_OVERRIDES`).
    pub overrides: Vec<Override>,
    /// Rates that are applied in shadow mode beside the rate in force, to keys without an override.
    pub candidates: Vec<CandidateRate>,
    /// The statuses of the responses that count. `None` if every request counts.
    pub counted: Option<StatusRanges>,
    /// Requests over the limit are counted and let through.
    pub shadow: bool,
    /// What responses contain about the limit.
    pub response: ResponseOptions,
    /// Where the state of the keys is kept.
    pub keyspace: Keyspace,
}

/// What happens to a request that lacks a part of the key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMissing {
    /// All requests without the part share one allowance.
    #[default]
    Share,
    /// The limit is not applied.
    Skip,
    /// The request is refused.
    Deny,
}

/// The number of requests that one request counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// Always the same number.
    Fixed(u32),
    /// The number in the header `id`, or `otherwise` if there is no number.
    Header {
        /// The header.
        id: HeaderId,
        /// The cost without a number.
        otherwise: u32,
    },
    /// One for each started `unit` bytes of the body, at least one. `otherwise` if the length of the body is unknown.
    ContentLength {
        /// The header `content-length`.
        id: HeaderId,
        /// In bytes.
        unit: u32,
        /// The cost of a body of unknown length.
        otherwise: u32,
    },
}

impl Cost {
    /// The cost of a request. A header with several values, or whose value is not a number, counts as absent. A number above
    /// the largest `u32` counts as that one.
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

/// A rate with its lease size and its description.
#[derive(Debug)]
pub struct Rate {
    /// The number of the rate within the policy. It identifies leases.
    pub id: usize,
    pub(super) params: RateParams,
    /// The most requests of one key that a worker reserves ahead. 0 if the rate is never leased.
    pub lease: u32,
    /// The rate in words for the reply, such as "100 requests a minute".
    pub promise: Box<str>,
}

impl Rate {
    pub(super) fn new(gcra: Gcra, promise: Box<str>) -> Rate {
        Rate { id: 0, params: RateParams { gcra, epoch: lease::EPOCH }, lease: most(gcra.burst()), promise }
    }

    /// The rate and the burst.
    pub fn gcra(&self) -> Gcra {
        self.params.gcra
    }
}

/// A different rate for some keys.
#[derive(Debug)]
pub struct Override {
    /// The value that each part of the key must have. `None` matches any value.
    pub parts: Vec<Option<Box<str>>>,
    /// The rate of the keys that match.
    pub rate: Rate,
}

/// The most overrides of a limit. The set of overrides that match a key is kept in the bits of one number.
pub const MAX_OVERRIDES: usize = 64;

/// A rate that is applied in shadow mode.
#[derive(Debug)]
pub struct CandidateRate {
    /// The name, unique within the limit.
    pub name: Box<str>,
    /// The rate.
    pub rate: Rate,
    /// Where the state of the keys is kept.
    pub keyspace: Keyspace,
}

/// Where the state of a limit's keys is kept.
#[derive(Debug)]
pub struct Keyspace {
    /// The prefix of the shared-data keys.
    pub prefix: Box<str>,
    /// The number of records that the keys are distributed over.
    pub buckets: u64,
    /// The rate that takes the longest to recover.
    pub(super) longest: RateParams,
}

/// Ranges of HTTP statuses, both ends included. The status of a gRPC call counts as the HTTP status that it maps to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusRanges(pub Vec<(u16, u16)>);

impl StatusRanges {
    /// Whether a range contains `status`.
    pub fn contains(&self, status: u16) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&status))
    }
}

/// The `response` block of a limit.
#[derive(Debug)]
pub struct ResponseOptions {
    /// The status of a refusal.
    pub status: u16,
    /// The body of a refusal.
    pub body: RejectionBody,
    /// The `content-type` of a refusal.
    pub content_type: Option<Box<str>>,
    /// Headers of refusals, names in lower case.
    pub headers: Vec<(Box<str>, Box<str>)>,
    /// `x-ratelimit-limit`, `-remaining` and `-reset`, as Envoy writes them (draft-polli-ratelimit-headers-03).
    pub x_ratelimit: bool,
    /// `ratelimit` and `ratelimit-policy` (draft-ietf-httpapi-ratelimit-headers-10).
    pub fields: bool,
    /// `retry-after`.
    pub retry_after: bool,
    /// `x-envoy-ratelimited`, which prevents retries by Envoys in front.
    pub x_envoy_ratelimited: bool,
}

/// The body of a refusal.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum RejectionBody {
    /// One sentence.
    #[default]
    Sentence,
    /// The sentence as `application/problem+json` (RFC 9457), with the type that the draft defines.
    Problem,
    /// A text from the policy.
    Own(Box<str>),
}

impl Default for ResponseOptions {
    fn default() -> Self {
        ResponseOptions {
            status: 429,
            body: RejectionBody::default(),
            content_type: None,
            headers: Vec::new(),
            x_ratelimit: false,
            fields: false,
            retry_after: true,
            x_envoy_ratelimited: true,
        }
    }
}

impl ResponseOptions {
    /// Whether responses announce the remaining quota.
    pub fn announces_quota(&self) -> bool {
        self.x_ratelimit || self.fields
    }
}

impl Limit {
    /// All rates of the limit itself.
    pub fn rates(&self) -> impl Iterator<Item = &Rate> {
        std::iter::once(&self.rate).chain(self.overrides.iter().map(|other| &other.rate))
    }

    /// The rate of keys that `override_index` applies to, an index into the overrides.
    pub fn rate_of(&self, override_index: Option<usize>) -> &Rate {
        override_index.and_then(|index| self.overrides.get(index)).map_or(&self.rate, |other| &other.rate)
    }

    /// Whether the key contains the subset of the destination.
    pub fn reads_subset(&self) -> bool {
        self.key.iter().any(|source| matches!(source, KeySource::Subset))
    }
}

/// The default of `maxKeys`.
pub(super) const DEFAULT_MAX_KEYS: u64 = 65_536;

/// The shortest time, in nanoseconds, after which a request without a response counts. The longest is twice this time.
pub(super) const PENDING_EPOCH: u64 = 60_000_000_000;

/// The number of buckets for `keys` keys. Half of the entries stay free, so that full buckets are rare: with `keys` keys in
/// use, about one key in fifty has no entry.
pub(super) fn buckets(keys: u64) -> u64 {
    keys.div_ceil(WAYS as u64 / 2).max(1)
}

/// The secret of the hash of limit keys, which all workers share. Without it a client cannot construct keys that fill the
/// bucket of another client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Secret(pub [u8; 16]);

/// In schema 0 the 16 bytes of the secret had no number of a schema before them.
impl Record for Secret {
    const SCHEMA: u8 = 1;

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.0);
    }

    fn decode(schema: u8, bytes: &[u8]) -> Option<Secret> {
        if schema == Self::SCHEMA && bytes.len() == 16 {
            return bytes.try_into().ok().map(Secret);
        }
        let rest = bytes.first_chunk::<15>()?;
        [&[schema][..], rest].concat().try_into().ok().map(Secret)
    }
}

impl Secret {
    /// A hasher keyed with the secret (SipHash-2-4; Aumasson and Bernstein, 2012).
    pub(super) fn hasher(&self) -> impl Hasher + use<> {
        SipHasher24::new_with_key(&self.0)
    }
}
