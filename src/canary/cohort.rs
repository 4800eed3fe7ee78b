//! Cohorts: the bucket of a key in a rollout, from 0 to 999,999 parts per million.
//!
//! A key has the same bucket in every worker, proxy and hop with the same rollout, without a cookie and without shared
//! state. A canary of 5 % has the keys in the buckets below 50,000; a higher weight adds keys and removes none. The name
//! of the rollout salts the hash, so another rollout selects other users.
//!
//! The bucket is `floor(XXH64(rollout + "\n" + key, seed 0) * 1,000,000 / 2^64)`. XXH64 (Collet; the canonical
//! implementation's specification, version 0.1.1) is available in most languages and in several SQL engines, so the
//! cohorts of a rollout can be recomputed when its results are evaluated.

use crate::units::point;
use xxhash_rust::xxh64::Xxh64;

/// The bucket of `key` in `rollout`, in parts per million.
pub fn cohort(rollout: &[u8], key: &[u8]) -> u32 {
    point(hash(rollout, key, 0))
}

/// A number for the same key that is independent of its bucket. It chooses among the other destinations for keys that are
/// not in the canary's cohort.
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

    /// XXH64's published vectors, and buckets computed with another implementation of it.
    #[test]
    fn buckets_can_be_recomputed_elsewhere() {
        assert_eq!(xxhash_rust::xxh64::xxh64(b"", 0), 0xef46_db37_51d8_e999);
        assert_eq!(xxhash_rust::xxh64::xxh64(b"abc", 0), 0x44bc_2cf5_ad77_0999);
        for (rollout, key, bucket) in VECTORS {
            assert_eq!(cohort(rollout.as_bytes(), key.as_bytes()), bucket, "{rollout} {key}");
        }
    }

    const VECTORS: [(&str, &str, u32); 3] = [
        ("2026-11-new-ranking", "ann", 114_621),
        ("2026-11-new-ranking", "bob", 677_989),
        ("2026-12-new-ranking", "ann", 622_158),
    ];
}
