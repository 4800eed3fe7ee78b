//! The cohort header: it carries the canary's decision with the request, so that every hop with the same rollout takes the
//! same decision.
//!
//! The value is a list of Structured Fields (RFC 9651), one member for each rollout that a hop has decided on:
//!
//! ```text
//! "2026-11-new-ranking";place=114621;weight=50000;issued=1795251600;sig="9f…"
//! ```
//!
//! `place` is the bucket of the request in the rollout and `weight` is the canary's weight, both in parts per million: a
//! request whose bucket is below the weight went to the canary. `issued` is in seconds since 1970. `sig` is the first half
//! of HMAC-SHA256 (RFC 2104; truncated as its section 5 allows) over the member up to `;sig=`, in hexadecimal digits.
//!
//! Any client can send a header, and this one chooses a version. So a member is followed only if it is signed with a key
//! of this policy, unless the policy trusts all callers. The first key signs and all keys verify, so that a key can be
//! replaced in two steps without losing a decision. A member that is too old is not followed, because it may be a replay.
//! Members of other rollouts are passed on, because a later hop may have these rollouts.

use crate::http::{HeaderId, HeaderMutation};
use crate::units::{Fraction, UnixNanos};
use hmac_sha256::HMAC;
use std::borrow::Cow;
use std::fmt::{self, Write};

/// Whether the header can carry a rollout of this name: the name has visible ASCII characters that need no escape in a
/// String of RFC 9651, and no comma, which separates members.
pub fn can_be_carried(rollout: &str) -> bool {
    rollout.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b','))
}

/// The bounds on the header that a request may arrive with. No chain of rollouts needs more.
const MOST_BYTES: usize = 2048;
const MOST_MEMBERS: usize = 8;

/// By how much the clocks of two proxies may differ.
const CLOCK_SKEW: u64 = 60;

const NANOSECONDS: u64 = 1_000_000_000;

/// The `cohort` block.
#[derive(Debug)]
pub struct CohortHeader {
    pub name: Box<str>,
    pub id: HeaderId,
    pub accept: Accept,
    /// The first key signs, all keys verify.
    pub(super) keys: Vec<SigningKey>,
    /// How old a followed member may be, in seconds.
    pub(super) max_age: u64,
}

/// Which members of earlier hops are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accept {
    /// Signed members.
    Signed,
    /// All members: every caller is trusted.
    Any,
    /// No members: each request is decided anew.
    None,
}

/// A signing key. Its bytes never appear in debug output.
pub(super) struct SigningKey(pub(super) Vec<u8>);

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey")
    }
}

/// The decision on one request: its bucket in a rollout, and the canary's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CohortAssignment {
    /// In parts per million.
    pub bucket_ppm: u32,
    pub weight: Fraction,
}

/// The assignments that a request arrived with, and how many members were refused.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct InboundAssignments {
    members: Vec<Member>,
    /// Whether the request itself has the header.
    is_sent: bool,
    pub refused: Refused,
}

/// How many members were neither followed nor passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Members with a syntax error, of a rollout that an earlier member has, or past the bounds.
    pub malformed: u64,
    /// Members without a signature of one of the keys.
    pub forged: u64,
    pub stale: u64,
}

impl Refused {
    pub fn is_none(&self) -> bool {
        *self == Refused::default()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Member {
    rollout: Box<str>,
    assignment: CohortAssignment,
    /// The member as it arrived, which is passed on.
    text: Box<str>,
}

impl InboundAssignments {
    /// The assignment of `rollout`.
    pub fn assignment(&self, rollout: &str) -> Option<CohortAssignment> {
        self.members.iter().find(|member| &*member.rollout == rollout).map(|member| member.assignment)
    }

    /// The rollouts that earlier hops have decided on.
    pub fn rollouts(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| &*member.rollout)
    }
}

impl CohortHeader {
    /// Reads the assignments of a request. `sent` is the value of its header; `stored` is the value that the bridge has
    /// kept for a request whose application has dropped the header. Neither is trusted.
    pub fn read_inbound(
        &self,
        sent: Option<&[u8]>,
        stored: Option<&[u8]>,
        now: impl FnOnce() -> UnixNanos,
    ) -> InboundAssignments {
        let mut inbound = InboundAssignments { is_sent: sent.is_some(), ..InboundAssignments::default() };
        let Some(value) = sent.or(stored).filter(|value| !value.is_empty()) else { return inbound };
        let Some(text) = std::str::from_utf8(value).ok().filter(|text| text.len() <= MOST_BYTES) else {
            inbound.refused.malformed = 1;
            return inbound;
        };
        let now = now().as_nanos() / NANOSECONDS;
        for (index, text) in text.split(',').enumerate() {
            let text = text.trim_matches([' ', '\t']);
            let refused = &mut inbound.refused;
            // A client can make the proxy check signatures, so their number is bounded.
            let found = if index < MOST_MEMBERS { self.verify(text, now) } else { Err(MemberError::Malformed) };
            match found {
                Ok((rollout, _)) if inbound.members.iter().any(|member| &*member.rollout == rollout) => {
                    refused.malformed += 1;
                }
                Ok((rollout, assignment)) => {
                    inbound.members.push(Member { rollout: rollout.into(), assignment, text: text.into() });
                }
                Err(MemberError::Malformed) => refused.malformed += 1,
                Err(MemberError::Forged) => refused.forged += 1,
                Err(MemberError::Stale) => refused.stale += 1,
            }
        }
        inbound
    }

    fn verify<'t>(&self, text: &'t str, now: u64) -> Result<(&'t str, CohortAssignment), MemberError> {
        let member = ParsedMember::parse(text).ok_or(MemberError::Malformed)?;
        match self.accept {
            Accept::None => return Err(MemberError::Forged),
            Accept::Signed if !self.is_signed(&member) => return Err(MemberError::Forged),
            Accept::Signed | Accept::Any => {}
        }
        if member.issued > now.saturating_add(CLOCK_SKEW) || now.saturating_sub(member.issued) > self.max_age {
            return Err(MemberError::Stale);
        }
        Ok((member.rollout, member.assignment))
    }

    fn is_signed(&self, member: &ParsedMember<'_>) -> bool {
        let Some(signature) = member.signature else { return false };
        self.keys.iter().any(|key| {
            // The comparison takes the same time however many digits are correct.
            let expected = sign(key, member.claim);
            let differ = expected.bytes().zip(signature.bytes()).fold(0, |differ, (a, b)| differ | (a ^ b));
            expected.len() == signature.len() && differ == 0
        })
    }

    /// The header for the next hop: the inbound assignments, in which `assignment` replaces the one of the same rollout.
    /// `None` if the request already has this header.
    pub fn write(
        &self,
        inbound: &InboundAssignments,
        assignment: Option<(&str, CohortAssignment)>,
        now: impl FnOnce() -> UnixNanos,
    ) -> Option<HeaderMutation<'_>> {
        if assignment.is_none() && inbound.refused.is_none() && (inbound.is_sent || inbound.members.is_empty()) {
            return None;
        }
        let mut value = String::new();
        let ours = assignment.map(|(rollout, _)| rollout);
        for member in inbound.members.iter().filter(|member| Some(&*member.rollout) != ours) {
            push_member(&mut value, &member.text);
        }
        if let Some((rollout, assignment)) = assignment {
            push_member(&mut value, &self.member(rollout, assignment, now().as_nanos() / NANOSECONDS));
        }
        if value.is_empty() {
            return inbound.is_sent.then_some(HeaderMutation::Remove(&self.name));
        }
        Some(HeaderMutation::Set(&self.name, Cow::Owned(value.into_bytes())))
    }

    fn member(&self, rollout: &str, assignment: CohortAssignment, issued: u64) -> String {
        let CohortAssignment { bucket_ppm: place, weight } = assignment;
        let mut member = String::with_capacity(rollout.len() + 100);
        // Writing to a string cannot fail.
        let _ = write!(member, "\"{rollout}\";place={place};weight={};issued={issued}", weight.ppm());
        if let Some(key) = self.keys.first() {
            let signature = sign(key, &member);
            member.push_str(";sig=\"");
            member.push_str(&signature);
            member.push('"');
        }
        member
    }
}

fn push_member(value: &mut String, member: &str) {
    if !value.is_empty() {
        value.push_str(", ");
    }
    value.push_str(member);
}

/// The first 128 bits of the HMAC in hexadecimal digits.
fn sign(key: &SigningKey, claim: &str) -> String {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let digit = |value: u8| DIGITS.get(usize::from(value)).copied().map_or('0', char::from);
    let mac = HMAC::mac(claim.as_bytes(), &key.0);
    mac.iter().take(16).flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Why a member is not followed.
enum MemberError {
    Malformed,
    Forged,
    Stale,
}

/// A member of the header, parsed.
struct ParsedMember<'t> {
    rollout: &'t str,
    assignment: CohortAssignment,
    issued: u64,
    /// The text that the signature covers.
    claim: &'t str,
    signature: Option<&'t str>,
}

impl<'t> ParsedMember<'t> {
    /// Parses a member, which has one canonical spelling.
    fn parse(text: &'t str) -> Option<ParsedMember<'t>> {
        let (claim, signature) = match text.split_once(";sig=\"") {
            Some((claim, signature)) => (claim, Some(signature.strip_suffix('"')?)),
            None => (text, None),
        };
        let (rollout, rest) = claim.strip_prefix('"')?.split_once('"')?;
        let rest = rest.strip_prefix(";place=")?;
        let (place, rest) = rest.split_once(";weight=")?;
        let (weight, issued) = rest.split_once(";issued=")?;
        let place = u32::try_from(number(place)?).ok().filter(|place| *place < Fraction::WHOLE.ppm())?;
        let weight = u32::try_from(number(weight)?).ok().filter(|weight| *weight <= Fraction::WHOLE.ppm())?;
        let assignment = CohortAssignment { bucket_ppm: place, weight: Fraction::from_ppm(weight) };
        Some(ParsedMember { rollout, assignment, issued: number(issued)?, claim, signature })
    }
}

/// An Integer of RFC 9651, section 3.3.1, that is not negative.
fn number(text: &str) -> Option<u64> {
    let fits = text.len() <= 15 && text.bytes().all(|byte| byte.is_ascii_digit());
    if fits { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::HeaderNames;
    use proptest::prelude::*;

    const NOW: UnixNanos = UnixNanos::from_nanos(1_795_251_600 * NANOSECONDS);
    const OLD: &[u8] = b"an old key of thirty-two bytes..";
    const NEW: &[u8] = b"a new key of thirty-two bytes...";
    const ASSIGNMENT: CohortAssignment = CohortAssignment { bucket_ppm: 114_621, weight: Fraction::from_ppm(150_000) };

    fn header(accept: Accept, keys: &[&[u8]]) -> CohortHeader {
        CohortHeader {
            name: "x-trimtab-cohort".into(),
            id: HeaderNames::COOKIE,
            accept,
            keys: keys.iter().map(|key| SigningKey(key.to_vec())).collect(),
            max_age: 300,
        }
    }

    fn read(header: &CohortHeader, value: &str) -> InboundAssignments {
        header.read_inbound(Some(value.as_bytes()), None, || NOW)
    }

    fn value(
        header: &CohortHeader,
        carried: &InboundAssignments,
        assignment: Option<(&str, CohortAssignment)>,
    ) -> Option<String> {
        match header.write(carried, assignment, || NOW)? {
            HeaderMutation::Set(_, value) => Some(String::from_utf8(value.into_owned()).unwrap()),
            HeaderMutation::Remove(_) => Some(String::new()),
            HeaderMutation::Add(..) => panic!("the header is one"),
        }
    }

    fn signed(keys: &[&[u8]], rollout: &str) -> String {
        value(&header(Accept::Signed, keys), &InboundAssignments::default(), Some((rollout, ASSIGNMENT))).unwrap()
    }

    /// RFC 4231, test case 2, and a member signed by another implementation (Python's `hmac`).
    #[test]
    fn signatures_can_be_recomputed_by_others() {
        assert_eq!(
            sign(&SigningKey(b"Jefe".to_vec()), "what do ya want for nothing?"),
            "5bdcc146bf60754e6a042426089575c7"
        );
        assert_eq!(
            signed(&[NEW], "r"),
            "\"r\";place=114621;weight=150000;issued=1795251600;sig=\"b70d174dc6c446b91dbfee383c0c8ef3\""
        );
    }

    #[test]
    fn a_signed_decision_is_followed_and_passed_on_as_it_is() {
        let (carried, header) = (signed(&[OLD], "r"), header(Accept::Signed, &[NEW, OLD]));
        let found = read(&header, &carried);
        assert_eq!(
            (found.assignment("r"), found.assignment("s"), found.refused),
            (Some(ASSIGNMENT), None, Refused::default())
        );
        assert_eq!(value(&header, &found, None), None);
    }

    #[test]
    fn what_is_unsigned_foreign_altered_or_old_is_dropped() {
        let good = signed(&[NEW], "r");
        let (claim, _) = good.split_once(";sig").unwrap();
        let forged = Refused { forged: 1, ..Refused::default() };
        let stale = Refused { stale: 1, ..Refused::default() };
        let malformed = Refused { malformed: 1, ..Refused::default() };
        let header = header(Accept::Signed, &[NEW]);
        let aged = |by: i64| {
            let issued = 1_795_251_600_i64 + by;
            header.member("r", ASSIGNMENT, issued as u64)
        };
        for (carried, refused) in [
            (claim.to_owned(), forged),
            (signed(&[OLD], "r"), forged),
            (good.replace("114621", "000001"), forged),
            (good.replace("weight=150000", "weight=1000000"), forged),
            (good.replace("\"r\"", "\"s\""), forged),
            (good.replace("sig=\"", "sig=\"0"), forged),
            (aged(-301), stale),
            (aged(61), stale),
            ("true".to_owned(), malformed),
            (good.replace("114621", "1000000"), malformed),
            (good.replace("114621", "-1"), malformed),
            (good.replace("114621", "+1"), malformed),
            (good.trim_end_matches('"').to_owned(), malformed),
            ("x".repeat(MOST_BYTES + 1), malformed),
        ] {
            let found = read(&header, &carried);
            assert_eq!((found.rollouts().count(), found.refused), (0, refused), "{carried}");
            assert_eq!(value(&header, &found, None).as_deref(), Some(""), "{carried} is dropped");
        }
        for by in [-300, 60] {
            assert_eq!(read(&header, &aged(by)).assignment("r"), Some(ASSIGNMENT), "{by} s");
        }
    }

    #[test]
    fn what_is_decided_here_takes_the_place_of_what_was_carried() {
        let header = header(Accept::Signed, &[NEW]);
        let carried = format!("{},{}, {}", signed(&[NEW], "a"), signed(&[OLD], "b"), signed(&[NEW], "r"));
        let found = read(&header, &carried);
        assert_eq!(found.rollouts().collect::<Vec<_>>(), ["a", "r"]);
        let none = CohortAssignment { weight: Fraction::NONE, ..ASSIGNMENT };
        let written = value(&header, &found, Some(("r", none))).unwrap();
        assert_eq!(written.split(", ").next(), Some(&*signed(&[NEW], "a")));
        let again = read(&header, &written);
        assert_eq!((again.assignment("a"), again.assignment("r")), (Some(ASSIGNMENT), Some(none)));
        assert_eq!(again.refused, Refused::default());
    }

    #[test]
    fn the_number_of_members_is_bounded() {
        let trusting = header(Accept::Any, &[]);
        let many: Vec<String> = (0..12).map(|n| format!("\"{n}\";place=1;weight=2;issued=1795251600")).collect();
        let found = read(&trusting, &many.join(", "));
        assert_eq!((found.rollouts().count(), found.refused.malformed), (8, 4));
        let refused = read(&header(Accept::Signed, &[NEW]), &many.join(", ")).refused;
        assert_eq!((refused.forged, refused.malformed), (8, 4), "past the bound no signature is checked");
        let found = read(&trusting, &[&*many[0], &*many[0]].join(","));
        assert_eq!((found.rollouts().count(), found.refused.malformed), (1, 1));
    }

    #[test]
    fn trust_all_needs_no_key_and_trust_none_decides_anew() {
        let unsigned = "\"r\";place=114621;weight=150000;issued=1795251600";
        let trusting = header(Accept::Any, &[]);
        assert_eq!(
            value(&trusting, &InboundAssignments::default(), Some(("r", ASSIGNMENT))).as_deref(),
            Some(unsigned)
        );
        assert_eq!(read(&trusting, unsigned).assignment("r"), Some(ASSIGNMENT));
        assert_eq!(read(&header(Accept::None, &[NEW]), &signed(&[NEW], "r")).assignment("r"), None);
    }

    #[test]
    fn a_recalled_header_is_given_back() {
        let header = header(Accept::Signed, &[NEW]);
        let recalled = signed(&[NEW], "r");
        let found = header.read_inbound(None, Some(recalled.as_bytes()), || NOW);
        assert_eq!(found.assignment("r"), Some(ASSIGNMENT));
        assert_eq!(value(&header, &found, None), Some(recalled));
    }

    proptest! {
        #[test]
        fn no_bytes_are_followed_unless_they_are_signed(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let found = header(Accept::Signed, &[NEW]).read_inbound(Some(&bytes), None, || NOW);
            prop_assert_eq!(found.rollouts().count(), 0);
        }

        #[test]
        fn one_changed_byte_is_noticed(at in 0..100_usize, byte in any::<u8>()) {
            let header = header(Accept::Signed, &[NEW]);
            let mut bytes = signed(&[NEW], "r").into_bytes();
            let at = at % bytes.len();
            prop_assume!(bytes[at] != byte);
            bytes[at] = byte;
            let found = header.read_inbound(Some(&bytes), None, || NOW);
            prop_assert_eq!(found.assignment("r"), None);
        }

        #[test]
        fn what_is_written_is_read(rollout in "[!#-+--~]{1,40}", place in 0..1_000_000_u32, ppm in 0..=1_000_000_u32) {
            let header = header(Accept::Signed, &[NEW]);
            let assignment = CohortAssignment { bucket_ppm: place, weight: Fraction::from_ppm(ppm) };
            let written = value(&header, &InboundAssignments::default(), Some((&rollout, assignment))).unwrap();
            prop_assert_eq!(read(&header, &written).assignment(&rollout), Some(assignment));
        }
    }
}
