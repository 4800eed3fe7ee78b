//! Cohorts: where a key stands in a rollout, from 0 to 999,999 parts per million.
//!
//! The same key stands in the same place in every worker, proxy and hop that knows the rollout, with no cookie and no
//! shared state. A canary of 5 % is everyone who stands below 50,000: raising the weight lets more in and nobody out.
//! Another rollout salts the hash anew and so draws other users.
//!
//! The place is `floor(XXH64(rollout + "\n" + key, seed 0) * 1,000,000 / 2^64)`. XXH64 (Collet; the canonical
//! implementation's specification, version 0.1.1) is at hand in most languages and in several SQL engines, so that
//! whoever evaluates a rollout can recompute its cohorts.

use crate::units::point;
use xxhash_rust::xxh64::Xxh64;

/// The place of `key` in `rollout`, in parts per million.
pub fn cohort(rollout: &[u8], key: &[u8]) -> u32 {
    point(hash(rollout, key, 0))
}

/// An independent number for the same key: which of the other destinations it goes to while it is no canary.
pub(super) fn stable_draw(rollout: &[u8], key: &[u8]) -> u64 {
    hash(rollout, key, 1)
}

fn hash(rollout: &[u8], key: &[u8], seed: u64) -> u64 {
    let mut hasher = Xxh64::new(seed);
    hasher.update(rollout);
    hasher.update(b"\n");
    hasher.update(key);
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// XXH64's published vectors, and places computed by another implementation of it.
    #[test]
    fn places_can_be_recomputed_by_others() {
        assert_eq!(xxhash_rust::xxh64::xxh64(b"", 0), 0xef46_db37_51d8_e999);
        assert_eq!(xxhash_rust::xxh64::xxh64(b"abc", 0), 0x44bc_2cf5_ad77_0999);
        for (rollout, key, place) in VECTORS {
            assert_eq!(cohort(rollout.as_bytes(), key.as_bytes()), place, "{rollout} {key}");
        }
    }

    const VECTORS: [(&str, &str, u32); 3] = [
        ("2026-11-new-ranking", "ann", 114_621),
        ("2026-11-new-ranking", "bob", 677_989),
        ("2026-12-new-ranking", "ann", 622_158),
    ];
}
