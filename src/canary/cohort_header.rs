//! The cohort header: a canary's decision, carried on with the request so that every hop with the same rollout takes
//! the same one.
//!
//! The value is a list of Structured Fields (RFC 9651), one member for each rollout that was decided on the way:
//!
//! ```text
//! "2026-11-new-ranking";place=114621;weight=50000;issued=1795251600;sig="9f…"
//! ```
//!
//! `place` is where the request stands in the rollout and `weight` is what the canary was given, both in parts per
//! million: below its weight the request went to the canary. `issued` is in seconds since 1970. `sig` is the first half
//! of HMAC-SHA256 (RFC 2104; truncated as its section 5 allows) over the member up to `;sig=`, in hexadecimal digits.
//!
//! Anybody can send a header, and this one chooses a version: so what arrives is followed only where it is signed with
//! a key that this proxy knows, unless the policy says that all callers are trusted. The first key signs and all of them
//! verify, so that a key is replaced in two steps without one decision lost. A decision that is too old is not followed:
//! it may be a replay. Members of other rollouts are passed on, because a service further on may know them.

use crate::http::{HeaderId, HeaderMutation};
use crate::units::{Fraction, UnixNanos};
use hmac_sha256::HMAC;
use std::borrow::Cow;
use std::fmt::{self, Write};

/// Whether a rollout of this name can be carried: visible ASCII characters that need no escape in a String of RFC 9651
/// and no look at where a member ends.
pub fn can_be_carried(rollout: &str) -> bool {
    rollout.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b','))
}

/// What is read of a header at most. More than this no chain of rollouts needs, and whoever sends it is no friend.
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
    /// The first signs, all verify.
    pub(super) keys: Vec<Key>,
    /// In seconds.
    pub(super) max_age: u64,
}

/// Which decisions of others are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accept {
    /// Those that are signed.
    Signed,
    /// All: every caller is trusted.
    Any,
    /// None: each request is decided anew.
    None,
}

/// A signing key, which is shown to nobody.
pub(super) struct Key(pub(super) Vec<u8>);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// A decision: where a request stands in a rollout, and what the canary was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decided {
    /// In parts per million.
    pub place: u32,
    pub weight: Fraction,
}

/// The decisions that a request arrived with, and what was wrong with the others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Carried {
    members: Vec<Member>,
    /// Whether the request has the header itself.
    is_sent: bool,
    pub refused: Refused,
}

/// How many members were not followed, and not passed on either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Not of the form, twice the same rollout, or past the bounds.
    pub malformed: u64,
    /// With no signature or one of no key that is known here.
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
    decided: Decided,
    /// As it was sent, to be passed on.
    text: Box<str>,
}

impl Carried {
    /// What was decided for `rollout`.
    pub fn decided(&self, rollout: &str) -> Option<Decided> {
        self.members.iter().find(|member| &*member.rollout == rollout).map(|member| member.decided)
    }

    /// The rollouts that were decided on.
    pub fn rollouts(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| &*member.rollout)
    }
}

impl CohortHeader {
    /// Reads what a request carries: `sent` is the header's value, `recalled` the one that an application has lost.
    /// Both are bytes of anybody's making, the second of a neighbour's at best.
    pub fn carried(&self, sent: Option<&[u8]>, recalled: Option<&[u8]>, now: impl FnOnce() -> UnixNanos) -> Carried {
        let mut carried = Carried { is_sent: sent.is_some(), ..Carried::default() };
        let Some(value) = sent.or(recalled).filter(|value| !value.is_empty()) else { return carried };
        let Some(text) = std::str::from_utf8(value).ok().filter(|text| text.len() <= MOST_BYTES) else {
            carried.refused.malformed = 1;
            return carried;
        };
        let now = now().as_nanos() / NANOSECONDS;
        for (index, text) in text.split(',').enumerate() {
            let text = text.trim_matches([' ', '\t']);
            let refused = &mut carried.refused;
            // Checking a signature is work that anybody can ask for: past the bound nothing is checked.
            let found = if index < MOST_MEMBERS { self.verify(text, now) } else { Err(Flaw::Malformed) };
            match found {
                Ok((rollout, _)) if carried.members.iter().any(|member| &*member.rollout == rollout) => {
                    refused.malformed += 1;
                }
                Ok((rollout, decided)) => {
                    carried.members.push(Member { rollout: rollout.into(), decided, text: text.into() });
                }
                Err(Flaw::Malformed) => refused.malformed += 1,
                Err(Flaw::Forged) => refused.forged += 1,
                Err(Flaw::Stale) => refused.stale += 1,
            }
        }
        carried
    }

    fn verify<'t>(&self, text: &'t str, now: u64) -> Result<(&'t str, Decided), Flaw> {
        let member = Written::parse(text).ok_or(Flaw::Malformed)?;
        match self.accept {
            Accept::None => return Err(Flaw::Forged),
            Accept::Signed if !self.is_signed(&member) => return Err(Flaw::Forged),
            Accept::Signed | Accept::Any => {}
        }
        if member.issued > now.saturating_add(CLOCK_SKEW) || now.saturating_sub(member.issued) > self.max_age {
            return Err(Flaw::Stale);
        }
        Ok((member.rollout, member.decided))
    }

    fn is_signed(&self, member: &Written<'_>) -> bool {
        let Some(signature) = member.signature else { return false };
        self.keys.iter().any(|key| {
            // The time that this takes does not tell how many of the digits were right.
            let expected = sign(key, member.claim);
            let differ = expected.bytes().zip(signature.bytes()).fold(0, |differ, (a, b)| differ | (a ^ b));
            expected.len() == signature.len() && differ == 0
        })
    }

    /// The header for the next hop: what was carried, and what was decided here in the place of what was carried for
    /// the same rollout. `None` where the request has the right one already.
    pub fn write(
        &self,
        carried: &Carried,
        decided: Option<(&str, Decided)>,
        now: impl FnOnce() -> UnixNanos,
    ) -> Option<HeaderMutation<'_>> {
        if decided.is_none() && carried.refused.is_none() && (carried.is_sent || carried.members.is_empty()) {
            return None;
        }
        let mut value = String::new();
        let ours = decided.map(|(rollout, _)| rollout);
        for member in carried.members.iter().filter(|member| Some(&*member.rollout) != ours) {
            push_member(&mut value, &member.text);
        }
        if let Some((rollout, decided)) = decided {
            push_member(&mut value, &self.member(rollout, decided, now().as_nanos() / NANOSECONDS));
        }
        if value.is_empty() {
            return carried.is_sent.then_some(HeaderMutation::Remove(&self.name));
        }
        Some(HeaderMutation::Set(&self.name, Cow::Owned(value.into_bytes())))
    }

    fn member(&self, rollout: &str, decided: Decided, issued: u64) -> String {
        let Decided { place, weight } = decided;
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
fn sign(key: &Key, claim: &str) -> String {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let digit = |value: u8| DIGITS.get(usize::from(value)).copied().map_or('0', char::from);
    let mac = HMAC::mac(claim.as_bytes(), &key.0);
    mac.iter().take(16).flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Why a member is not followed.
enum Flaw {
    Malformed,
    Forged,
    Stale,
}

/// A member as it is written.
struct Written<'t> {
    rollout: &'t str,
    decided: Decided,
    issued: u64,
    /// What is signed.
    claim: &'t str,
    signature: Option<&'t str>,
}

impl<'t> Written<'t> {
    /// Reads the one spelling in which members are written.
    fn parse(text: &'t str) -> Option<Written<'t>> {
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
        let decided = Decided { place, weight: Fraction::from_ppm(weight) };
        Some(Written { rollout, decided, issued: number(issued)?, claim, signature })
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
    const DECIDED: Decided = Decided { place: 114_621, weight: Fraction::from_ppm(150_000) };

    fn header(accept: Accept, keys: &[&[u8]]) -> CohortHeader {
        CohortHeader {
            name: "x-trimtab-cohort".into(),
            id: HeaderNames::COOKIE,
            accept,
            keys: keys.iter().map(|key| Key(key.to_vec())).collect(),
            max_age: 300,
        }
    }

    fn read(header: &CohortHeader, value: &str) -> Carried {
        header.carried(Some(value.as_bytes()), None, || NOW)
    }

    fn value(header: &CohortHeader, carried: &Carried, decided: Option<(&str, Decided)>) -> Option<String> {
        match header.write(carried, decided, || NOW)? {
            HeaderMutation::Set(_, value) => Some(String::from_utf8(value.into_owned()).unwrap()),
            HeaderMutation::Remove(_) => Some(String::new()),
            HeaderMutation::Add(..) => panic!("the header is one"),
        }
    }

    fn signed(keys: &[&[u8]], rollout: &str) -> String {
        value(&header(Accept::Signed, keys), &Carried::default(), Some((rollout, DECIDED))).unwrap()
    }

    /// RFC 4231, test case 2, and a member signed by another implementation (Python's `hmac`).
    #[test]
    fn signatures_can_be_recomputed_by_others() {
        assert_eq!(sign(&Key(b"Jefe".to_vec()), "what do ya want for nothing?"), "5bdcc146bf60754e6a042426089575c7");
        assert_eq!(
            signed(&[NEW], "r"),
            "\"r\";place=114621;weight=150000;issued=1795251600;sig=\"b70d174dc6c446b91dbfee383c0c8ef3\""
        );
    }

    #[test]
    fn a_signed_decision_is_followed_and_passed_on_as_it_is() {
        let (carried, header) = (signed(&[OLD], "r"), header(Accept::Signed, &[NEW, OLD]));
        let found = read(&header, &carried);
        assert_eq!((found.decided("r"), found.decided("s"), found.refused), (Some(DECIDED), None, Refused::default()));
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
            header.member("r", DECIDED, issued as u64)
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
            assert_eq!(read(&header, &aged(by)).decided("r"), Some(DECIDED), "{by} s");
        }
    }

    #[test]
    fn what_is_decided_here_takes_the_place_of_what_was_carried() {
        let header = header(Accept::Signed, &[NEW]);
        let carried = format!("{},{}, {}", signed(&[NEW], "a"), signed(&[OLD], "b"), signed(&[NEW], "r"));
        let found = read(&header, &carried);
        assert_eq!(found.rollouts().collect::<Vec<_>>(), ["a", "r"]);
        let none = Decided { weight: Fraction::NONE, ..DECIDED };
        let written = value(&header, &found, Some(("r", none))).unwrap();
        assert_eq!(written.split(", ").next(), Some(&*signed(&[NEW], "a")));
        let again = read(&header, &written);
        assert_eq!((again.decided("a"), again.decided("r")), (Some(DECIDED), Some(none)));
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
    fn who_trusts_everybody_needs_no_key_and_who_trusts_nobody_decides_anew() {
        let unsigned = "\"r\";place=114621;weight=150000;issued=1795251600";
        let trusting = header(Accept::Any, &[]);
        assert_eq!(value(&trusting, &Carried::default(), Some(("r", DECIDED))).as_deref(), Some(unsigned));
        assert_eq!(read(&trusting, unsigned).decided("r"), Some(DECIDED));
        assert_eq!(read(&header(Accept::None, &[NEW]), &signed(&[NEW], "r")).decided("r"), None);
    }

    #[test]
    fn a_recalled_header_is_given_back() {
        let header = header(Accept::Signed, &[NEW]);
        let recalled = signed(&[NEW], "r");
        let found = header.carried(None, Some(recalled.as_bytes()), || NOW);
        assert_eq!(found.decided("r"), Some(DECIDED));
        assert_eq!(value(&header, &found, None), Some(recalled));
    }

    proptest! {
        #[test]
        fn no_bytes_are_followed_unless_they_are_signed(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let found = header(Accept::Signed, &[NEW]).carried(Some(&bytes), None, || NOW);
            prop_assert_eq!(found.rollouts().count(), 0);
        }

        #[test]
        fn one_changed_byte_is_noticed(at in 0..100_usize, byte in any::<u8>()) {
            let header = header(Accept::Signed, &[NEW]);
            let mut bytes = signed(&[NEW], "r").into_bytes();
            let at = at % bytes.len();
            prop_assume!(bytes[at] != byte);
            bytes[at] = byte;
            let found = header.carried(Some(&bytes), None, || NOW);
            prop_assert_eq!(found.decided("r"), None);
        }

        #[test]
        fn what_is_written_is_read(rollout in "[!#-+--~]{1,40}", place in 0..1_000_000_u32, ppm in 0..=1_000_000_u32) {
            let header = header(Accept::Signed, &[NEW]);
            let decided = Decided { place, weight: Fraction::from_ppm(ppm) };
            let written = value(&header, &Carried::default(), Some((&rollout, decided))).unwrap();
            prop_assert_eq!(read(&header, &written).decided(&rollout), Some(decided));
        }
    }
}
