//! Comparing bytes a word at a time. In the module a comparison of slices calls a function that goes byte by byte, and
//! a request compares names and paths more than it does anything else.

use std::cmp::Ordering;

/// Whether two strings are the same.
#[inline]
pub fn is_same(a: &[u8], b: &[u8]) -> bool {
    let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
    let half = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    if a.len() != b.len() {
        return false;
    }
    // The last word overlaps with what comes before it; most names have no more than two.
    if let (Some(a_first), Some(b_first), Some(a_last), Some(b_last)) =
        (a.first_chunk(), b.first_chunk(), a.last_chunk(), b.last_chunk())
    {
        let is_between = || a.as_chunks().0.iter().zip(b.as_chunks().0).all(|(a, b)| word(a) == word(b));
        return word(a_first) == word(b_first) && word(a_last) == word(b_last) && (a.len() <= 16 || is_between());
    }
    if let (Some(a_first), Some(b_first), Some(a_last), Some(b_last)) =
        (a.first_chunk(), b.first_chunk(), a.last_chunk(), b.last_chunk())
    {
        return half(a_first) == half(b_first) && half(a_last) == half(b_last);
    }
    a.iter().zip(b).all(|(a, b)| a == b)
}

/// Whether `text` begins with `prefix`.
#[inline]
pub fn begins_with(text: &[u8], prefix: &[u8]) -> bool {
    text.get(..prefix.len()).is_some_and(|head| is_same(head, prefix))
}

/// The order of two strings, as slices have it.
#[inline]
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    let ((a_words, a_rest), (b_words, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a_words.iter().zip(b_words) {
        let (a, b) = (u64::from_le_bytes(*a), u64::from_le_bytes(*b));
        if a != b {
            // The first byte that differs is the lowest that does.
            let place = (a ^ b).trailing_zeros() & !7;
            return ((a >> place) as u8).cmp(&((b >> place) as u8));
        }
    }
    // Of the longer one, the word where the other ends.
    let a_next = a_words.get(b_words.len()).map_or(a_rest, |word| &word[..]);
    let b_next = b_words.get(a_words.len()).map_or(b_rest, |word| &word[..]);
    a_next.iter().cmp(b_next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn comparing_is_what_slices_do(
            a in proptest::collection::vec(0_u8..3, 0..40),
            b in proptest::collection::vec(0_u8..3, 0..40),
            common in 0_usize..40,
        ) {
            // Alike up to some place, mostly.
            let b: Vec<u8> = a.iter().take(common).chain(b.iter().skip(common)).copied().collect();
            prop_assert_eq!(is_same(&a, &b), a == b);
            prop_assert_eq!(begins_with(&a, &b), a.starts_with(&b));
            prop_assert_eq!(compare(&a, &b), a.cmp(&b));
            prop_assert!(is_same(&a, &a.clone()));
            prop_assert!(begins_with(&a, &a[..common.min(a.len())]));
        }
    }
}
