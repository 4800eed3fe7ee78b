//! The rules of ARCHITECTURE.md that can be read off the sources.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The features: no one uses another.
const FEATURES: [&str; 5] = ["breaker", "canary", "fault", "ratelimit", "trace"];

/// The sources of the library, by their paths below `src`.
fn sources() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut sources) = (vec![root.clone()], BTreeMap::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the folder of the sources can be read") {
            let path: PathBuf = entry.expect("the folder of the sources can be read").path();
            if path.is_dir() && !path.ends_with("src/bin") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).expect("it is below src").display().to_string();
                sources.insert(name, std::fs::read_to_string(&path).expect("a source is text"));
            }
        }
    }
    assert!(sources.len() > 50, "the sources are in src");
    sources
}

/// The code without its unit tests.
fn code(source: &str) -> &str {
    source.split("#[cfg(test)]\nmod tests").next().unwrap_or(source)
}

#[test]
fn no_two_public_types_share_a_name() {
    let mut types: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, source) in sources() {
        for line in code(&source).lines() {
            let mut words = line.split_whitespace();
            let is_public = words.next().is_some_and(|word| word == "pub" || word.starts_with("pub("));
            let kind = words.next().unwrap_or_default();
            if is_public && ["struct", "enum", "trait", "type", "union"].contains(&kind) {
                let name = words.next().unwrap_or_default();
                let name: String = name.chars().take_while(|c| c.is_alphanumeric()).collect();
                types.entry(name).or_default().push(path.clone());
            }
        }
    }
    assert!(types.len() > 100, "found {} public types", types.len());
    let shared: Vec<_> = types.iter().filter(|(_, paths)| paths.len() > 1).collect();
    assert!(shared.is_empty(), "public types that share a name: {shared:#?}");
}

#[test]
fn no_feature_uses_another() {
    for (path, source) in sources() {
        let Some(feature) = FEATURES.iter().find(|feature| path.starts_with(&format!("{feature}/"))) else { continue };
        for other in FEATURES.iter().filter(|other| *other != feature) {
            let used = code(&source).contains(&format!("crate::{other}::"));
            assert!(!used, "{path} uses the feature {other}");
        }
    }
}

#[test]
fn only_the_abi_is_unsafe() {
    for (path, source) in sources() {
        let calls = code(&source).lines().filter(|line| {
            let line = line.trim_start();
            !line.starts_with("//") && (line.contains("unsafe {") || line.contains("unsafe fn"))
        });
        let count = calls.count();
        assert!(count == 0 || path == "host/proxy_wasm/abi.rs", "{path} has {count} unsafe blocks");
    }
}

#[test]
fn the_core_reads_no_clock_and_draws_no_random_number() {
    for (path, source) in sources().into_iter().filter(|(path, _)| !path.starts_with("host/")) {
        for forbidden in ["Instant::now", "SystemTime", "rand::", "getrandom"] {
            assert!(!code(&source).contains(forbidden), "{path} contains {forbidden}");
        }
    }
}
