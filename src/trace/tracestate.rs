//! W3C `tracestate` (level 2, section 3.3): whether a list is valid, and how it may be changed.
//!
//! A list that nothing has to be done to goes on as it came, byte for byte. Where a member is added, changed or taken
//! out, the list is written anew: ours first, the others in their order, at most 32 members and 512 characters, never
//! a part of a member.

use std::borrow::Cow;

/// The most members of a list (section 3.3.1.1).
const MAX_MEMBERS: usize = 32;

/// The longest list that is written. Every hop has to pass on this much (section 3.3.1.5).
const MAX_LENGTH: usize = 512;

/// Members longer than this go first where a list is too long (section 3.3.1.5).
const LONG_MEMBER: usize = 128;

/// OpenTelemetry's own key.
const OPEN_TELEMETRY: &[u8] = b"ot";

/// The members of all `tracestate` headers of a request; empty ones are allowed and say nothing.
fn members<'v>(values: impl Iterator<Item = &'v [u8]>) -> impl Iterator<Item = &'v [u8]> {
    values.flat_map(|value| value.split(|byte| *byte == b',')).map(trim_ows).filter(|member| !member.is_empty())
}

/// Whether the values of all `tracestate` headers of a request are one valid list (section 3.3.1). A list that is not
/// valid is dropped whole.
pub fn is_tracestate<'v>(mut values: impl Iterator<Item = &'v [u8]>) -> bool {
    let mut count = 0;
    values.all(|value| is_list(value, &mut count))
}

/// Whether one value is a list. `count` is of members, so far. Every request with a list is read here, so each byte is
/// looked at once.
#[inline(never)]
fn is_list(value: &[u8], count: &mut usize) -> bool {
    let mut bytes = value.iter().copied();
    'members: loop {
        // Empty members, and the space around a member, say nothing.
        let first = loop {
            match bytes.next() {
                None => return true,
                Some(b' ' | b'\t' | b',') => {}
                Some(first) => break first,
            }
        };
        *count += 1;
        if *count > MAX_MEMBERS || !is_alphanumeric(first) {
            return false;
        }
        // Section 3.3.1.3.1: up to 256 characters.
        let mut length = 1;
        loop {
            match bytes.next() {
                Some(b'=') => break,
                Some(byte) if length < 256 && is_in_key(byte) => length += 1,
                _ => return false,
            }
        }
        // Section 3.3.1.3.2: up to 256 printable characters but `,` and `=`, and the last is no space: such space is
        // around the member, and there it may be a tab.
        let (mut length, mut solid, mut has_tab) = (0, false, false);
        loop {
            match bytes.next() {
                None => return solid,
                Some(b',') if solid => continue 'members,
                Some(b' ') => length += 1,
                Some(b'\t') => has_tab = true,
                Some(b'!'..=b'+' | b'-'..=b'<' | b'>'..=b'~') if length < 256 && !has_tab => {
                    length += 1;
                    solid = true;
                }
                _ => return false,
            }
        }
    }
}

/// Whether the list has a member called `key`.
pub fn has_member<'v>(values: impl Iterator<Item = &'v [u8]>, key: &str) -> bool {
    members(values).any(|member| split_member(member).0 == key.as_bytes())
}

/// What is changed in a list.
#[derive(Clone, Copy, Debug, Default)]
pub struct TracestateEdit<'e> {
    /// Only members of these keys go on.
    pub allow: Option<&'e [Box<str>]>,
    /// A member of this key stands first.
    pub tracestate_key: Option<&'e str>,
    /// The sampling threshold becomes this one.
    pub threshold: Option<u64>,
    /// The sampling threshold goes.
    pub erase_threshold: bool,
}

/// The list after `edit`, and whether it had to be cut. An empty list has no members.
pub fn rewrite<'v>(values: &mut dyn Iterator<Item = &'v [u8]>, edit: &TracestateEdit<'_>) -> (Vec<u8>, bool) {
    let mut list: Vec<Cow<'v, [u8]>> = Vec::new();
    let mut ours = Vec::new();
    for member in members(values) {
        let (key, value) = split_member(member);
        let is_allowed = edit.allow.is_none_or(|allow| allow.iter().any(|known| known.as_bytes() == key));
        if !is_allowed || edit.tracestate_key.is_some_and(|own| own.as_bytes() == key) {
            continue;
        }
        if key == OPEN_TELEMETRY && (edit.erase_threshold || edit.threshold.is_some()) {
            let fields = value.unwrap_or_default().split(|byte| *byte == b';');
            for field in fields.filter(|field| !field.starts_with(b"th:")) {
                ours.extend(field);
                ours.push(b';');
            }
        } else {
            list.push(Cow::Borrowed(member));
        }
    }
    if let Some(threshold) = edit.threshold {
        ours.extend(b"th:");
        push_threshold(&mut ours, threshold);
    } else {
        ours.pop();
    }
    if !ours.is_empty() {
        list.insert(0, Cow::Owned([b"ot=", ours.as_slice()].concat()));
    }
    if let Some(tracestate_key) = edit.tracestate_key {
        list.insert(0, Cow::Owned([tracestate_key.as_bytes(), b"=1"].concat()));
    }
    let cut = list.len() > MAX_MEMBERS;
    list.truncate(MAX_MEMBERS);
    let shortened = shorten(&mut list);
    (list.join(&b','), cut || shortened)
}

/// Takes whole members out until the list is short enough.
fn shorten(list: &mut Vec<Cow<'_, [u8]>>) -> bool {
    let mut cut = false;
    while list.iter().map(|member| member.len() + 1).sum::<usize>() > MAX_LENGTH + 1 {
        let long = list.iter().rposition(|member| member.len() > LONG_MEMBER);
        list.remove(long.unwrap_or(list.len() - 1));
        cut = true;
    }
    cut
}

/// Appends a threshold as OpenTelemetry writes it: up to 14 digits, without zeros at the end.
fn push_threshold(text: &mut Vec<u8>, threshold: u64) {
    let digits = (threshold << 8).to_be_bytes();
    super::w3c::push_hex(text, &digits);
    text.truncate(text.len() - 2);
    let shortest = text.len() - 13;
    while text.len() > shortest && text.last() == Some(&b'0') {
        text.pop();
    }
}

fn split_member(member: &[u8]) -> (&[u8], Option<&[u8]>) {
    let mut parts = member.splitn(2, |byte| *byte == b'=');
    (parts.next().unwrap_or_default(), parts.next())
}

/// `text` without the spaces and tabs around it (RFC 9110, section 5.6.3).
pub(super) fn trim_ows(text: &[u8]) -> &[u8] {
    let ows = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = text.iter().position(|byte| !ows(byte)).unwrap_or(text.len());
    let end = text.iter().rposition(|byte| !ows(byte)).map_or(start, |last| last + 1);
    text.get(start..end).unwrap_or_default()
}

/// Level 2, section 3.3.1.3.1: a lower-case letter or digit, then up to 255 of those and `_-*/@`.
pub(super) fn is_key(key: &[u8]) -> bool {
    let Some((first, rest)) = key.split_first() else { return false };
    key.len() <= 256 && is_alphanumeric(*first) && rest.iter().all(|byte| is_in_key(*byte))
}

fn is_alphanumeric(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_in_key(byte: u8) -> bool {
    is_alphanumeric(byte) || matches!(byte, b'_' | b'-' | b'*' | b'/' | b'@')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rewritten(values: &[&str], edit: &TracestateEdit<'_>) -> (String, bool) {
        let (list, cut) = rewrite(&mut values.iter().map(|value| value.as_bytes()), edit);
        (String::from_utf8(list).unwrap(), cut)
    }

    #[test]
    fn what_is_a_list() {
        let valid = |values: &[&str]| is_tracestate(values.iter().map(|value| value.as_bytes()));
        assert!(valid(&["foo=1,bar=2", "rojo=1"]));
        assert!(valid(&["foo=1 \t , \t bar=2, ", ""]));
        assert!(valid(&["foo@=1", "foo@@bar=1", "0a_-*/=x~!"]));
        for bad in ["foo", "foo=", "=1", "Foo=1", "foo =1", "foo=1=2", "é=1", "foo=\u{7f}", "@foo=1"] {
            assert!(!valid(&[bad]), "{bad}");
        }
        let members = |count: usize| (0..count).map(|n| format!("k{n}=1")).collect::<Vec<_>>().join(",");
        assert!(valid(&[&members(32)]));
        assert!(!valid(&[&members(33)]));
        let (key, value) = ("k".repeat(256), "v".repeat(256));
        assert!(valid(&[&format!("{key}={value}")]));
        assert!(!valid(&[&format!("k{key}=1")]));
        assert!(!valid(&[&format!("k={value}v")]));
    }

    #[test]
    fn our_members_stand_first_and_once() {
        let edit = TracestateEdit {
            tracestate_key: Some("acme"),
            threshold: Some(0xc0_0000_0000_0000),
            ..TracestateEdit::default()
        };
        assert_eq!(rewritten(&["a=1, acme=0", "b=2"], &edit), ("acme=1,ot=th:c,a=1,b=2".into(), false));
        assert_eq!(rewritten(&[], &edit).0, "acme=1,ot=th:c");
        let allow = ["b".into(), "c".into()];
        assert_eq!(
            rewritten(&["a=1,b=2,c=3"], &TracestateEdit { allow: Some(&allow), ..TracestateEdit::default() }).0,
            "b=2,c=3"
        );
    }

    #[test]
    fn a_threshold_is_erased_and_the_rest_of_its_member_stays() {
        let erase = TracestateEdit { erase_threshold: true, ..TracestateEdit::default() };
        assert_eq!(rewritten(&["a=1,ot=th:c;rv:01234567890abc"], &erase).0, "ot=rv:01234567890abc,a=1");
        assert_eq!(rewritten(&["a=1,ot=th:c"], &erase).0, "a=1");
        assert_eq!(rewritten(&["ot=rv:01234567890abc;th:c"], &erase).0, "ot=rv:01234567890abc");
    }

    #[test]
    fn thresholds_have_no_zeros_at_the_end() {
        let text = |threshold| {
            let mut text = Vec::new();
            push_threshold(&mut text, threshold);
            String::from_utf8(text).unwrap()
        };
        assert_eq!(text(0), "0");
        assert_eq!(text(0x80_0000_0000_0000), "8");
        assert_eq!(text(0xfd_70a3_d70a_3d71), "fd70a3d70a3d71");
        assert_eq!(text(0x00_0000_0000_0010), "0000000000001");
    }

    #[test]
    fn long_members_go_first_then_the_last() {
        let (long, short) = (format!("l={}", "x".repeat(200)), format!("s={}", "x".repeat(98)));
        let edit = TracestateEdit { tracestate_key: Some("k"), ..TracestateEdit::default() };
        let value = format!("{long},{short},{short},{long},{short},{short}");
        let expected = [short.as_str(); 4].join(",");
        assert_eq!(rewritten(&[&value], &edit), (format!("k=1,{expected}"), true));
        let value = [short.as_str(); 6].join(",");
        assert_eq!(rewritten(&[&value], &edit).0, format!("k=1,{}", [short.as_str(); 5].join(",")));
    }

    /// The grammar, member by member: what a list is split into, and what each part may be.
    fn is_list_by_grammar(value: &[u8]) -> bool {
        let is_value = |value: &[u8]| {
            let allowed = |byte: &u8| (0x20..0x7f).contains(byte) && *byte != b',' && *byte != b'=';
            (1..=256).contains(&value.len()) && value.iter().all(allowed) && value.last() != Some(&b' ')
        };
        let members = members([value].into_iter());
        let valid = members.map(|member| {
            let (key, value) = split_member(member);
            is_key(key) && value.is_some_and(is_value)
        });
        let valid: Vec<bool> = valid.collect();
        valid.len() <= MAX_MEMBERS && valid.iter().all(|valid| *valid)
    }

    proptest! {
        #[test]
        fn a_list_is_what_its_grammar_says(list in "([a-c@ \\t]{0,3}(=[a =\\t]{0,3}|=b{254}[a \\t]{0,4}|b{253}[a=]{0,5})?,?){0,35}") {
            prop_assert_eq!(is_list(list.as_bytes(), &mut 0), is_list_by_grammar(list.as_bytes()));
        }

        #[test]
        fn near_a_list_too(members in proptest::collection::vec("[ \\t]?[a-z0-9][a-z_@*/-]?= ?[!-~ ]{1,2}[ \\t]?", 0..34), byte: u8, at: proptest::sample::Index) {
            let mut list = members.join(",").into_bytes();
            prop_assert_eq!(is_list(&list, &mut 0), is_list_by_grammar(&list));
            if !list.is_empty() {
                let at = at.index(list.len());
                list[at] = byte;
                prop_assert_eq!(is_list(&list, &mut 0), is_list_by_grammar(&list));
            }
        }

        #[test]
        fn a_valid_list_stays_valid_and_within_its_limits(
            members in proptest::collection::vec("[a-z][a-z0-9@_*/-]{0,140}=[!-+.-<>-~]{1,140}", 0..33),
            has_key: bool,
            threshold in proptest::option::of(0_u64..1 << 56),
        ) {
            let value = members.join(",");
            prop_assume!(is_tracestate([value.as_bytes()].into_iter()));
            let edit = TracestateEdit { tracestate_key: has_key.then_some("acme"), threshold, ..TracestateEdit::default() };
            let (list, cut) = rewrite(&mut [value.as_bytes()].into_iter(), &edit);
            prop_assert!(is_tracestate([list.as_slice()].into_iter()));
            prop_assert!(list.len() <= MAX_LENGTH);
            prop_assert!(cut || super::members([list.as_slice()].into_iter()).count() >= members.len());
            prop_assert_eq!(has_member([list.as_slice()].into_iter(), "acme"), has_key);
        }

        #[test]
        fn no_bytes_panic(value in proptest::collection::vec(any::<u8>(), 0..1000), erase_threshold: bool) {
            let values = || [value.as_slice()].into_iter();
            let _ = (is_tracestate(values()), has_member(values(), "a"));
            rewrite(&mut values(), &TracestateEdit { erase_threshold, tracestate_key: Some("a"), ..TracestateEdit::default() });
        }
    }
}
