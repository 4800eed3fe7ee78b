//! Reads `service`, the block of a limit with `scope: global`.

use super::policy::{OnFailure, Service};
use crate::document::{Fields, Value};
use crate::http::HeaderNames;
use crate::key::KeySource;
use crate::units::read_duration;
use std::time::Duration;

/// The most hits that a call may charge ahead.
const MOST: u64 = 1_000_000;

/// The part of the limit that a call charges ahead, unless written.
const SHARE: u64 = 64;

/// Reads `scope` and `service` of a limit. `Some(None)` is a local one, `None` one with an error.
pub(in crate::ratelimit) fn read(
    fields: &mut Fields<'_>,
    requests: Option<u64>,
    key: &[KeySource],
    names: &HeaderNames,
) -> Option<Option<Service>> {
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

fn read_service(value: &Value<'_>, requests: Option<u64>, key: &[KeySource], names: &HeaderNames) -> Option<Service> {
    let mut fields = value.object()?;
    let cluster = fields.required("cluster").and_then(|value| value.text());
    let domain = fields.required("domain").and_then(|value| value.text());
    let timeout = fields.optional("timeout").map(|value| read_timeout(&value));
    let on_failure = fields.optional("onFailure").map(|value| {
        value.one_of(&[("allow", OnFailure::Allow), ("deny", OnFailure::Deny), ("local", OnFailure::Local)])
    });
    let batch = fields.optional("batch").map(|value| value.integer(1..=MOST));
    let own = fields.optional("descriptorKeys").map(|value| read_keys(&value, key));
    fields.end();
    let descriptor_keys = match own {
        Some(own) => own?,
        None if key.is_empty() => vec!["generic_key".into()],
        None => key.iter().map(|source| descriptor_key(source, names)).collect(),
    };
    let batch = batch.unwrap_or(Some((requests? / SHARE).clamp(1, 1000)))?;
    Some(Service {
        cluster: cluster?.into(),
        domain: domain?.into(),
        timeout: timeout.unwrap_or(Some(20))?,
        on_failure: on_failure.unwrap_or(Some(OnFailure::Allow))?,
        batch: u32::try_from(batch).unwrap_or(u32::MAX),
        descriptor_keys,
    })
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

fn read_keys(value: &Value<'_>, key: &[KeySource]) -> Option<Vec<Box<str>>> {
    let keys: Vec<Box<str>> = value.array()?.iter().filter_map(|key| key.text().map(Box::from)).collect();
    let wanted = key.len().max(1);
    if keys.len() != wanted {
        value.error(
            format!("{} descriptor keys", keys.len()),
            format!("write {wanted}: one for each part of key, in its order"),
        );
        return None;
    }
    Some(keys)
}

/// What an entry is called: as in Envoy's own actions where there is a name, else as the source is.
fn descriptor_key(source: &KeySource, names: &HeaderNames) -> Box<str> {
    match source {
        KeySource::Header(id) => names.name(*id).into(),
        KeySource::Cookie(name) | KeySource::QueryParameter(name) => name.clone(),
        KeySource::SourceAddress { .. } => "remote_address".into(),
        KeySource::Property(path) => path.join(".").into(),
        other => other.describe(names).replace(' ', "_").into(),
    }
}
