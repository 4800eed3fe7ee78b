//! W3C Baggage: a list that is passed on within its limits, and never with a part of a member (section 3.3.2). Baggage in
//! other formats is not translated, so that no service gets it twice. It is passed on unless baggage is removed.

use super::tracestate::trim_ows;
use crate::http::Request;

/// What every hop has to pass on.
const MAX_MEMBERS: usize = 64;
const MAX_LENGTH: usize = 8192;

/// The list as it may go on, or `None` where all of it may: the leading members that fit, and of them those that
/// `allow` names. The second half says whether a member was cut for want of room.
pub fn enforce_limits(values: &mut dyn Iterator<Item = &[u8]>, allow: Option<&[Box<str>]>) -> (Option<Vec<u8>>, bool) {
    let mut list = Vec::new();
    let (mut count, mut cut, mut changed) = (0, false, false);
    for member in values.flat_map(|value| value.split(|byte| *byte == b',')) {
        let key = member.split(|byte| matches!(byte, b'=' | b';')).next().unwrap_or_default();
        let is_allowed = allow.is_none_or(|allow| allow.iter().any(|known| known.as_bytes() == trim_ows(key)));
        let separator = usize::from(!list.is_empty());
        if !is_allowed {
            changed = true;
        } else if count == MAX_MEMBERS || list.len() + separator + member.len() > MAX_LENGTH {
            cut = true;
        } else {
            if separator > 0 {
                list.push(b',');
            }
            list.extend(member);
            count += 1;
        }
    }
    ((cut || changed).then_some(list), cut)
}

/// The headers of a request in which other formats send baggage, Jaeger's and OpenTracing's, a header for each key; but
/// for the keys that `allow` names.
pub fn per_key_headers<'a>(request: &Request<'a>, allow: &[Box<str>]) -> impl Iterator<Item = &'a str> {
    request.names().filter(|name| {
        let key = name.strip_prefix("uberctx-").or_else(|| name.strip_prefix("ot-baggage-"));
        // Header names have lost their case.
        key.is_some_and(|key| !allow.iter().any(|known| known.eq_ignore_ascii_case(key)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limited(value: &str, allow: Option<&[Box<str>]>) -> Option<String> {
        enforce_limits(&mut [value.as_bytes()].into_iter(), allow).0.map(|list| String::from_utf8(list).unwrap())
    }

    #[test]
    fn what_fits_is_left_alone() {
        assert_eq!(limited("a=1, b=2;p ,c=%20", None), None);
        assert_eq!(limited(&["k=v"; 64].join(","), None), None);
        assert_eq!(limited(&format!("a={}", "x".repeat(8190)), None), None);
    }

    #[test]
    fn whole_members_go() {
        assert_eq!(limited(&["k=v"; 65].join(","), None), Some(["k=v"; 64].join(",")));
        assert_eq!(limited(&format!("a=1,b={},c=3", "x".repeat(8190)), None).as_deref(), Some("a=1,c=3"));
        assert_eq!(limited(&format!("b={}", "x".repeat(8191)), None).as_deref(), Some(""));
    }

    #[test]
    fn only_what_is_allowed_goes_on() {
        let allow = ["a".into(), "c".into()];
        assert_eq!(limited("a=1, b=2 , c = 3;p=q", Some(&allow)).as_deref(), Some("a=1, c = 3;p=q"));
        assert_eq!(limited("a=1", Some(&allow)), None);
        assert_eq!(limited("a=1", Some(&[])).as_deref(), Some(""));
    }

    proptest! {
        #[test]
        fn the_limits_hold_for_any_bytes(values in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 0..6)) {
            let (list, cut) = enforce_limits(&mut values.iter().map(Vec::as_slice), None);
            prop_assert_eq!(list.is_some(), cut);
            if let Some(list) = list {
                prop_assert!(list.len() <= MAX_LENGTH && list.split(|byte| *byte == b',').count() <= MAX_MEMBERS);
            }
        }
    }
}
