//! Reads the `service` block of a limit with `scope: global`.

use super::policy::{OnFailure, RateLimitService};
use crate::document::{Fields, Value};
use crate::http::HeaderNames;
use crate::key::KeySource;
use crate::units::read_duration;
use std::time::Duration;

/// The most hits that one call may prepay.
const MAX_BATCH: u64 = 1_000_000;

/// The divisor of the burst that gives the default batch.
const SHARE: u64 = 64;

/// Reads `scope` and `service` of a limit. Returns `Some(None)` for a local limit, and `None` after an error.
pub(in crate::ratelimit) fn read(
    fields: &mut Fields<'_>,
    requests: Option<u64>,
    key: &[KeySource],
    names: &HeaderNames,
) -> Option<Option<RateLimitService>> {
    let is_global = fields.optional("scope").map(|value| value.one_of(&[("local", false), ("global", true)]));
    let service = fields.optional("service");
    match (is_global, service) {
        (Some(Some(true)), Some(service)) => read_service(&service, requests, key, names).map(Some),
        (Some(Some(true)), None) => {
            fields.value().error("scope global without service", "write the service that keeps the limit");
            None
        }
        (None | Some(Some(false)), None) => Some(None),
        (None | Some(Some(false)), Some(service)) => {
            service.error("service without scope global", "write scope: global, or remove it");
            None
        }
        (Some(None), _) => None,
    }
}

#[inline(never)]
fn read_service(
    value: &Value<'_>,
    requests: Option<u64>,
    key: &[KeySource],
    names: &HeaderNames,
) -> Option<RateLimitService> {
    let mut fields = value.object()?;
    let cluster = read_text(&mut fields, "cluster");
    let domain = read_text(&mut fields, "domain");
    let timeout = match fields.optional("timeout") {
        Some(value) => read_timeout(&value),
        None => Some(20),
    };
    let on_failure = match fields.optional("onFailure") {
        Some(value) => {
            value.one_of(&[("allow", OnFailure::Allow), ("deny", OnFailure::Deny), ("local", OnFailure::Local)])
        }
        None => Some(OnFailure::Allow),
    };
    let batch = match fields.optional("batch") {
        Some(value) => value.integer(1..=MAX_BATCH),
        None => requests.map(|requests| (requests / SHARE).clamp(1, 1000)),
    };
    let descriptor_keys = match fields.optional("descriptorKeys") {
        Some(value) => read_keys(&value, key.len().max(1)),
        None if key.is_empty() => Some(vec!["generic_key".into()]),
        None => Some(key.iter().map(|source| descriptor_key(source, names)).collect()),
    };
    fields.end();
    Some(RateLimitService {
        cluster: cluster?,
        domain: domain?,
        timeout: timeout?,
        on_failure: on_failure?,
        batch: u32::try_from(batch?).unwrap_or(u32::MAX),
        descriptor_keys: descriptor_keys?,
    })
}

#[inline(never)]
fn read_text(fields: &mut Fields<'_>, name: &'static str) -> Option<Box<str>> {
    fields.required(name)?.text().map(Box::from)
}

fn read_timeout(value: &Value<'_>) -> Option<u32> {
    const LONGEST: Duration = Duration::from_secs(10);
    let timeout = read_duration(value, Duration::from_millis(1))?;
    if timeout > LONGEST {
        value.unfit("expected at most 10s: requests wait for it");
        return None;
    }
    u32::try_from(timeout.as_millis()).ok()
}

fn read_keys(value: &Value<'_>, wanted: usize) -> Option<Vec<Box<str>>> {
    let keys: Vec<Box<str>> = value.array()?.iter().filter_map(|key| key.text().map(Box::from)).collect();
    if keys.len() != wanted {
        value.error(
            format!("{} descriptor keys", keys.len()),
            format!("write {wanted}: one for each part of key, in its order"),
        );
        return None;
    }
    Some(keys)
}

/// The key of a descriptor entry: the one that Envoy's own action uses, or the name of the source.
#[inline(never)]
fn descriptor_key(source: &KeySource, names: &HeaderNames) -> Box<str> {
    let name = match source {
        KeySource::Header(HeaderNames::METHOD) => "method",
        KeySource::Header(id) => names.name(*id),
        KeySource::Cookie(name) | KeySource::QueryParameter(name) => name,
        KeySource::Network(network) if network.masks() => "masked_remote_address",
        KeySource::SourceAddress | KeySource::Network(_) => "remote_address",
        KeySource::Route => "route",
        KeySource::Subset => "subset",
        KeySource::PathSegment(index) => return format!("path_segment_{index}").into(),
        KeySource::Property(path) => {
            let mut name = String::new();
            for segment in path {
                if !name.is_empty() {
                    name.push('.');
                }
                name.push_str(segment);
            }
            return name.into();
        }
    };
    name.into()
}
