//! Reads `rateLimits`.

use super::gcra::Gcra;
use super::lease::most;
use super::policy::{DEFAULT_MAX_KEYS, Limit, buckets};
use super::service::{self, GlobalLimit, Service};
use crate::document::{Value, quoted};
use crate::http::HeaderNames;
use crate::key::KeySource;

const UNITS: [(&str, (u64, &str)); 4] = [
    ("second", (1_000_000_000, "second")),
    ("minute", (60_000_000_000, "minute")),
    ("hour", (3_600_000_000_000, "hour")),
    ("day", (86_400_000_000_000, "day")),
];

/// Reads the limits of the route called `route`, whose ids begin at `first`: those that the proxy keeps, and those that
/// a service does. `prefix` is what the policy's shared words start with.
pub fn read(
    value: &Value<'_>,
    first: usize,
    prefix: &str,
    route: &str,
    names: &mut HeaderNames,
) -> (Vec<Limit>, Vec<GlobalLimit>) {
    const MOST: usize = 16;
    let items = value.array().unwrap_or_default();
    if items.len() > MOST {
        value.error(format!("{} limits", items.len()), format!("a route has at most {MOST}"));
    }
    let mut limits: Vec<Limit> = Vec::new();
    let mut global: Vec<GlobalLimit> = Vec::new();
    for item in items.iter().take(MOST) {
        let Some((limit, service)) = read_limit(item, first + limits.len(), prefix, route, names) else { continue };
        let mut known = limits.iter().chain(global.iter().map(|global| &global.limit));
        if known.any(|known| known.name == limit.name) {
            item.error(
                format!("a second limit called {}", quoted(&limit.name)),
                "give each limit of a route its own name",
            );
        }
        match service {
            // Its fallback leases nothing: a worker's leases are those of the limits that the proxy keeps.
            Some(service) => global.push(GlobalLimit { limit: Limit { lease: 0, ..limit }, service }),
            None => limits.push(limit),
        }
    }
    (limits, global)
}

fn read_limit(
    value: &Value<'_>,
    id: usize,
    prefix: &str,
    route: &str,
    names: &mut HeaderNames,
) -> Option<(Limit, Option<Service>)> {
    let mut fields = value.object()?;
    let name = fields.required("name").and_then(|value| crate::policy::read_name(&value));
    let rate = fields.required("limit").and_then(|value| read_rate(&value));
    let key = fields.optional("key").map(|value| KeySource::read_list(&value, names)).unwrap_or_default();
    let shadow = fields.optional("mode").and_then(|value| value.one_of(&[("enforce", false), ("shadow", true)]));
    let keys = fields.optional("maxKeys").and_then(|value| value.integer(1..=1 << 24)).unwrap_or(DEFAULT_MAX_KEYS);
    let requests = rate.as_ref().map(|(gcra, _)| gcra.burst());
    let service = service::read(&mut fields, requests, &key, names);
    for field in ["onMissing", "overrides", "charge", "cost", "response"] {
        fields.not_yet(field);
    }
    fields.end();
    let (name, (gcra, promise), service) = (name?, rate?, service?);
    let limit = Limit {
        id,
        lease: most(gcra.burst()),
        prefix: format!("{prefix}limit/{route}/{name}/").into(),
        name: name.into(),
        gcra,
        promise: promise.into(),
        buckets: if key.is_empty() { 1 } else { buckets(keys) },
        key,
        shadow: shadow.unwrap_or(false),
    };
    Some((limit, service))
}

fn read_rate(value: &Value<'_>) -> Option<(Gcra, String)> {
    const MOST: u64 = 1_000_000_000;
    let mut fields = value.object()?;
    let requests = fields.required("requestsPerUnit").and_then(|value| value.integer(1..=MOST));
    let unit = fields.required("unit").and_then(|value| value.one_of(&UNITS));
    let burst = fields.optional("burst").map(|value| value.integer(1..=MOST));
    fields.end();
    let (requests, (nanoseconds, unit)) = (requests?, unit?);
    let burst = burst.unwrap_or(Some(requests))?;
    let gcra = Gcra::new(requests, nanoseconds, burst);
    if gcra.is_none() {
        value.error("the burst takes centuries to regain", "write a smaller burst or a higher rate");
    }
    let plural = if requests == 1 { "" } else { "s" };
    Some((gcra?, format!("{requests} request{plural} a {unit}")))
}
