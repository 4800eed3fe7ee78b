//! A request as the core sees it, and what the core may ask to have done to it.
//!
//! The host hands over all headers in one block. [`Request`] walks that block once and remembers where the values of
//! the headers stand that the policy names ([`HeaderNames`]); nothing is copied, and a header that no rule asks for
//! costs one failed look-up. Values are bytes: HTTP does not promise text.

use crate::bytes::is_same;
use memchr::{memchr, memchr2};
use std::borrow::Cow;

/// A header that the policy names: an index into the [`Request`]'s slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderId(u16);

/// The most header names that one policy may refer to.
pub const MAX_HEADER_NAMES: usize = 1024;

/// The names of the headers that a policy reads, lower-cased, each with its [`HeaderId`].
///
/// A look-up is made for every header of every request, nearly always in vain: the length and the last byte of a name
/// lead to an empty place of an open-addressed table for most of them.
#[derive(Debug)]
pub struct HeaderNames {
    names: Vec<Box<str>>,
    /// Power-of-two sized, at most an eighth full; 0 is empty, otherwise the id plus one.
    table: Vec<u16>,
}

impl HeaderNames {
    pub const PATH: HeaderId = HeaderId(0);
    pub const METHOD: HeaderId = HeaderId(1);
    pub const AUTHORITY: HeaderId = HeaderId(2);
    pub const SCHEME: HeaderId = HeaderId(3);
    pub const CONTENT_TYPE: HeaderId = HeaderId(4);
    pub const COOKIE: HeaderId = HeaderId(5);
    pub const TRACEPARENT: HeaderId = HeaderId(6);
    pub const TRACESTATE: HeaderId = HeaderId(7);

    /// The names behind the constants, in their order.
    const ALWAYS: [&str; 8] =
        [":path", ":method", ":authority", ":scheme", "content-type", "cookie", "traceparent", "tracestate"];

    /// The id of `name`, which is lower-cased and remembered if new. `None` where there are too many names.
    pub fn intern(&mut self, name: &str) -> Option<HeaderId> {
        let name = name.to_ascii_lowercase();
        if let Some(id) = self.find(name.as_bytes()) {
            return Some(id);
        }
        if self.names.len() >= MAX_HEADER_NAMES {
            return None;
        }
        let id = self.names.len();
        self.names.push(name.into());
        self.file(id);
        u16::try_from(id).ok().map(HeaderId)
    }

    /// The name of `id`.
    pub fn name(&self, id: HeaderId) -> &str {
        self.names.get(usize::from(id.0)).map_or("", |name| name)
    }

    #[inline(always)]
    fn find(&self, name: &[u8]) -> Option<HeaderId> {
        let mask = self.table.len() - 1;
        let mut place = hash(name) & mask;
        loop {
            let id = self.table.get(place)?.checked_sub(1)?;
            if self.names.get(usize::from(id)).is_some_and(|known| is_same(known.as_bytes(), name)) {
                return Some(HeaderId(id));
            }
            place = (place + 1) & mask;
        }
    }

    /// Enters the newest name into the table, which grows first where it would be more than an eighth full.
    fn file(&mut self, newest: usize) {
        let size = (self.names.len() * 8).next_power_of_two();
        let first = if size == self.table.len() { newest } else { 0 };
        if first == 0 {
            self.table = vec![0; size];
        }
        for (id, name) in (1..).zip(&self.names).skip(first) {
            let mut place = hash(name.as_bytes()) & (size - 1);
            while let Some(taken) = self.table.get(place)
                && *taken != 0
            {
                place = (place + 1) & (size - 1);
            }
            if let Some(free) = self.table.get_mut(place) {
                *free = id;
            }
        }
    }
}

impl Default for HeaderNames {
    fn default() -> Self {
        let mut names = HeaderNames { names: Vec::new(), table: vec![0] };
        for name in HeaderNames::ALWAYS {
            names.intern(name);
        }
        names
    }
}

fn hash(name: &[u8]) -> usize {
    // The last bytes are letters mostly, of which there are fewer than 32.
    name.len().wrapping_mul(29) ^ name.last().map_or(0, |last| usize::from(*last))
}

/// The first value of a header, and how many there are.
#[derive(Clone, Copy, Default)]
struct Slot<'a> {
    first: Option<&'a [u8]>,
    values: u32,
}

/// How many slots need no allocation: enough for most policies.
const INLINE_SLOTS: usize = 32;

/// The head of a request: its header block, indexed by the policy's header names.
pub struct Request<'a> {
    block: &'a [u8],
    slots: [Slot<'a>; INLINE_SLOTS],
    more_slots: Vec<Slot<'a>>,
    names: &'a HeaderNames,
    path: &'a [u8],
    has_body: bool,
    route_name: Option<Vec<u8>>,
}

impl<'a> Request<'a> {
    /// Indexes `block`, the serialised header map of the proxy-wasm ABI: a count, a pair of lengths for each header,
    /// then each name and value with a NUL after it, all numbers 32-bit little-endian. A block that is cut short
    /// yields the headers before the cut.
    pub fn parse(block: &'a [u8], names: &'a HeaderNames) -> Self {
        let more = names.names.len().saturating_sub(INLINE_SLOTS);
        let mut request = Request {
            block,
            slots: [Slot::default(); INLINE_SLOTS],
            more_slots: vec![Slot::default(); more],
            names,
            path: &[],
            has_body: false,
            route_name: None,
        };
        for (name, value) in Fields::new(block) {
            let Some(HeaderId(id)) = names.find(name) else { continue };
            let id = usize::from(id);
            let slot = match request.slots.get_mut(id) {
                Some(slot) => Some(slot),
                None => request.more_slots.get_mut(id - INLINE_SLOTS),
            };
            if let Some(slot) = slot {
                slot.first = slot.first.or(Some(value));
                slot.values += 1;
            }
        }
        let target = request.first(HeaderNames::PATH).unwrap_or_default();
        request.path = memchr2(b'?', b'#', target).and_then(|end| target.get(..end)).unwrap_or(target);
        request
    }

    /// Says whether a body follows.
    pub fn set_has_body(&mut self, has_body: bool) {
        self.has_body = has_body;
    }

    /// Whether a body follows.
    pub fn has_body(&self) -> bool {
        self.has_body
    }

    /// Says which route Envoy chose.
    pub fn set_route_name(&mut self, route_name: Option<Vec<u8>>) {
        self.route_name = route_name;
    }

    /// The name of the route that Envoy chose, where the policy asks for it.
    pub fn route_name(&self) -> Option<&[u8]> {
        self.route_name.as_deref()
    }

    #[inline]
    fn slot(&self, id: HeaderId) -> Slot<'a> {
        let id = usize::from(id.0);
        let slot = self.slots.get(id).or_else(|| self.more_slots.get(id.wrapping_sub(INLINE_SLOTS)));
        slot.copied().unwrap_or_default()
    }

    /// The first value of a header.
    pub fn first(&self, id: HeaderId) -> Option<&'a [u8]> {
        self.slot(id).first
    }

    /// Whether the header is there at all.
    pub fn has(&self, id: HeaderId) -> bool {
        self.slot(id).values > 0
    }

    /// How often the header was sent.
    pub fn count(&self, id: HeaderId) -> usize {
        self.slot(id).values as usize
    }

    /// Every value of a header, in order. The block is walked again only for a header that was sent more than once.
    pub fn values(&self, id: HeaderId) -> Values<'a> {
        let repeated = (self.count(id) > 1).then(|| {
            let mut repeated = Repeated { name: self.names.name(id).as_bytes(), fields: Fields::new(self.block) };
            repeated.next();
            repeated
        });
        Values { first: self.first(id), repeated }
    }

    /// The names of all headers, as often as they were sent: for those that no policy can name one by one. A name that
    /// is no text is left out.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        Fields::new(self.block).filter_map(|(name, _)| std::str::from_utf8(name).ok())
    }

    /// All values of a header, joined as Envoy joins the values of a repeated header before it matches them: by commas,
    /// and the lines of `cookie` by "; " (RFC 9113, section 8.2.3).
    pub fn joined(&self, id: HeaderId) -> Option<Cow<'a, [u8]>> {
        match self.slot(id).values {
            0 => None,
            1 => self.first(id).map(Cow::Borrowed),
            _ => {
                let separator = if id == HeaderNames::COOKIE { &b"; "[..] } else { b"," };
                Some(Cow::Owned(self.values(id).collect::<Vec<_>>().join(separator)))
            }
        }
    }

    /// The value of a header as the next hop will see it, once `mutations` are done.
    pub fn value_after<'m>(
        &'m self,
        name: &str,
        id: HeaderId,
        mutations: &'m [HeaderMutation<'_>],
    ) -> Option<Cow<'m, [u8]>> {
        match mutations.iter().rev().find(|mutation| mutation.name() == name) {
            Some(HeaderMutation::Set(_, value) | HeaderMutation::Add(_, value)) => Some(Cow::Borrowed(value)),
            Some(HeaderMutation::Remove(_)) => None,
            None => self.joined(id),
        }
    }

    /// The path without its query or fragment.
    pub fn path(&self) -> &'a [u8] {
        self.path
    }

    /// The first value of a query parameter, not decoded, as Envoy matches it.
    pub fn query_parameter(&self, name: &[u8]) -> Option<&'a [u8]> {
        self.query_parameters().find(|(found, _)| *found == name).map(|(_, value)| value)
    }

    /// The names and values of the query parameters, not decoded. The value of a parameter without `=` is empty.
    pub fn query_parameters(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let target = self.first(HeaderNames::PATH).unwrap_or_default();
        let query = target.get(self.path.len()..).and_then(|query| query.strip_prefix(b"?")).unwrap_or_default();
        let query = memchr(b'#', query).and_then(|end| query.get(..end)).unwrap_or(query);
        query.split(|byte| *byte == b'&').map(|parameter| {
            let end = memchr(b'=', parameter).unwrap_or(parameter.len());
            (parameter.get(..end).unwrap_or_default(), parameter.get(end + 1..).unwrap_or_default())
        })
    }

    /// The `index`-th segment of the path, from 0.
    pub fn path_segment(&self, index: usize) -> Option<&'a [u8]> {
        let path = self.path().strip_prefix(b"/")?;
        path.split(|byte| *byte == b'/').nth(index).filter(|segment| !segment.is_empty())
    }

    /// The value of the first cookie called `name` (RFC 6265, section 4.2.1).
    pub fn cookie(&self, name: &[u8]) -> Option<&'a [u8]> {
        let value = self.values(HeaderNames::COOKIE).find_map(|cookies| cookie(cookies, name))?;
        Some(value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value))
    }

    /// Whether the request is a gRPC call, so that its answer must be one.
    pub fn is_grpc(&self) -> bool {
        let after = |suffix: &[u8]| suffix.is_empty() || suffix.starts_with(b"+") || suffix.starts_with(b";");
        self.first(HeaderNames::CONTENT_TYPE).and_then(|kind| kind.strip_prefix(b"application/grpc")).is_some_and(after)
    }
}

/// The values of one header.
pub struct Values<'a> {
    /// Found without walking the block.
    first: Option<&'a [u8]>,
    repeated: Option<Repeated<'a>>,
}

/// The values of a header that was sent more than once.
struct Repeated<'a> {
    name: &'a [u8],
    fields: Fields<'a>,
}

impl<'a> Iterator for Values<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        self.first.take().or_else(|| self.repeated.as_mut()?.next())
    }
}

impl<'a> Iterator for Repeated<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.fields.find(|(name, _)| name == &self.name).map(|(_, value)| value)
    }
}

/// The value of the first pair called `name` in a list of pairs, as it is written.
fn cookie<'a>(mut pairs: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    loop {
        let end = memchr(b';', pairs).unwrap_or(pairs.len());
        let (pair, rest) = pairs.split_at_checked(end)?;
        let pair = pair.trim_ascii();
        if let Some((found, value)) = pair.split_at_checked(name.len())
            && let [b'=', value @ ..] = value
            && is_same(found, name)
        {
            return Some(value);
        }
        pairs = rest.split_first()?.1;
    }
}

/// The headers of a block, name and value, up to the first that is not all there.
struct Fields<'a> {
    lengths: std::slice::Iter<'a, [u8; 8]>,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn new(block: &'a [u8]) -> Self {
        let count = block.first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let data = count.saturating_mul(8).saturating_add(4);
        let (lengths, rest) = block.split_at_checked(data as usize).unwrap_or_default();
        let (lengths, _) = lengths.get(4..).unwrap_or_default().as_chunks::<8>();
        Fields { lengths: lengths.iter(), rest }
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a [u8], &'a [u8]);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let lengths = u64::from_le_bytes(*self.lengths.next()?);
        let (name, rest) = self.rest.split_at_checked(lengths as u32 as usize)?;
        let (value, rest) = rest.get(1..)?.split_at_checked((lengths >> 32) as usize)?;
        self.rest = rest.get(1..).unwrap_or_default();
        Some((name, value))
    }
}

/// Serialises headers as the host does: the inverse of [`Request::parse`].
pub fn encode_headers<N: AsRef<[u8]>, V: AsRef<[u8]>>(headers: &[(N, V)]) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let mut block = Vec::new();
    block.extend(number(headers.len()));
    for (name, value) in headers {
        block.extend(number(name.as_ref().len()));
        block.extend(number(value.as_ref().len()));
    }
    for (name, value) in headers {
        block.extend(name.as_ref());
        block.push(0);
        block.extend(value.as_ref());
        block.push(0);
    }
    block
}

/// One change to a header map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderMutation<'p> {
    /// The header has this one value afterwards.
    Set(&'p str, Cow<'p, [u8]>),
    /// The header has this value besides those it had.
    Add(&'p str, Cow<'p, [u8]>),
    /// The header is gone afterwards.
    Remove(&'p str),
}

impl<'p> HeaderMutation<'p> {
    /// The header's name.
    pub fn name(&self) -> &'p str {
        let (HeaderMutation::Set(name, _) | HeaderMutation::Add(name, _) | HeaderMutation::Remove(name)) = self;
        name
    }

    /// Does the change to a list of headers.
    pub fn apply(&self, headers: &mut Vec<(Vec<u8>, Vec<u8>)>) {
        let name = self.name().as_bytes();
        if !matches!(self, HeaderMutation::Add(..)) {
            headers.retain(|(found, _)| found != name);
        }
        if let HeaderMutation::Set(_, value) | HeaderMutation::Add(_, value) = self {
            headers.push((name.to_vec(), value.to_vec()));
        }
    }
}

/// An answer given in the upstream's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalReply {
    pub status: u16,
    /// For Envoy's `response.code_details`: who answered and why, in one word.
    pub details: &'static str,
    pub headers: Vec<(Cow<'static, str>, String)>,
    pub body: String,
    /// The status of a gRPC call (its message is `body`), sent without a body under HTTP status 200.
    pub grpc_status: Option<u8>,
}

/// The HTTP status of `google.rpc.Code`.
pub fn http_from_grpc(code: u8) -> u16 {
    match code {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_named_headers_are_found_and_the_others_passed_over() {
        let mut names = HeaderNames::default();
        let user = names.intern("X-User-Id").unwrap();
        let absent = names.intern("x-absent").unwrap();
        let block = encode_headers(&[
            (":path", "/a/b?x=1&y&x=2#f"),
            ("x-user-id", "ann"),
            ("x-other", "?"),
            ("x-user-id", "bob"),
            ("cookie", "theme=dark; session=\"s1\""),
            ("cookie", "late=1"),
        ]);
        let request = Request::parse(&block, &names);
        assert_eq!(request.first(user), Some(&b"ann"[..]));
        assert_eq!(request.joined(user).as_deref(), Some(&b"ann,bob"[..]));
        assert_eq!(request.values(user).count(), 2);
        assert_eq!(request.joined(absent), None);
        assert_eq!(request.path(), b"/a/b");
        assert_eq!(request.path_segment(1), Some(&b"b"[..]));
        assert_eq!(request.path_segment(2), None);
        assert_eq!(request.query_parameter(b"x"), Some(&b"1"[..]));
        assert_eq!(request.query_parameter(b"y"), Some(&b""[..]));
        assert_eq!(request.query_parameter(b"z"), None);
        let cookies = request.joined(HeaderNames::COOKIE);
        assert_eq!(cookies.as_deref(), Some(&b"theme=dark; session=\"s1\"; late=1"[..]));
        assert_eq!(request.cookie(b"session"), Some(&b"s1"[..]));
        assert_eq!(request.cookie(b"late"), Some(&b"1"[..]));
        assert_eq!(request.cookie(b"heme"), None);
    }

    #[test]
    fn grpc_is_told_from_what_only_starts_like_it() {
        let names = HeaderNames::default();
        for (kind, is_grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc-web", false),
            ("text/plain", false),
        ] {
            let block = encode_headers(&[("content-type", kind)]);
            assert_eq!(Request::parse(&block, &names).is_grpc(), is_grpc, "{kind}");
        }
    }

    #[test]
    fn the_names_of_a_policy_are_bounded() {
        let mut names = HeaderNames::default();
        let taken = (0..2 * MAX_HEADER_NAMES).filter(|n| names.intern(&format!("x-{n}")).is_some()).count();
        assert_eq!(taken + HeaderNames::ALWAYS.len(), MAX_HEADER_NAMES);
        assert_eq!(names.intern("x-17").map(|id| names.name(id).to_owned()).as_deref(), Some("x-17"));
    }

    proptest! {
        #[test]
        fn any_block_is_read_without_a_panic(block in proptest::collection::vec(any::<u8>(), 0..200)) {
            let names = HeaderNames::default();
            let request = Request::parse(&block, &names);
            let _ = (request.path(), request.cookie(b"a"), request.is_grpc());
        }

        #[test]
        fn what_is_encoded_is_found_again(
            headers in proptest::collection::vec(("[a-z]{1,9}", proptest::collection::vec(any::<u8>(), 0..20)), 0..30),
        ) {
            let mut names = HeaderNames::default();
            let ids: Vec<_> = headers.iter().map(|(name, _)| names.intern(name).unwrap()).collect();
            let block = encode_headers(&headers);
            let request = Request::parse(&block, &names);
            for ((name, _), id) in headers.iter().zip(ids) {
                let expected: Vec<&[u8]> = headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_slice()).collect();
                prop_assert_eq!(request.values(id).collect::<Vec<_>>(), expected);
            }
        }
    }
}
