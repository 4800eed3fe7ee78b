//! Reads `rateLimits`.

use super::gcra::Gcra;
use super::lease::most;
use super::policy::{DEFAULT_MAX_KEYS, Limit, buckets};
use crate::document::{Value, quoted};
use crate::http::HeaderNames;
use crate::key::KeySource;

const UNITS: [(&str, (u64, &str)); 4] = [
    ("second", (1_000_000_000, "second")),
    ("minute", (60_000_000_000, "minute")),
    ("hour", (3_600_000_000_000, "hour")),
    ("day", (86_400_000_000_000, "day")),
];

/// Reads the limits of the route called `route`, whose ids begin at `first`. `prefix` is what the policy's shared words
/// start with.
pub fn read(value: &Value<'_>, first: usize, prefix: &str, route: &str, names: &mut HeaderNames) -> Vec<Limit> {
    const MOST: usize = 16;
    let items = value.array().unwrap_or_default();
    if items.len() > MOST {
        value.error(format!("{} limits", items.len()), format!("a route has at most {MOST}"));
    }
    let mut limits: Vec<Limit> = Vec::new();
    for item in items.iter().take(MOST) {
        let Some(limit) = read_limit(item, first + limits.len(), prefix, route, names) else { continue };
        if limits.iter().any(|known| known.name == limit.name) {
            item.error(
                format!("a second limit called {}", quoted(&limit.name)),
                "give each limit of a route its own name",
            );
        }
        limits.push(limit);
    }
    limits
}

fn read_limit(value: &Value<'_>, id: usize, prefix: &str, route: &str, names: &mut HeaderNames) -> Option<Limit> {
    let mut fields = value.object()?;
    let name = fields.required("name").and_then(|value| crate::policy::read_name(&value));
    let rate = fields.required("limit").and_then(|value| read_rate(&value));
    let key = fields.optional("key").map(|value| KeySource::read_list(&value, names)).unwrap_or_default();
    let shadow = fields.optional("mode").and_then(|value| value.one_of(&[("enforce", false), ("shadow", true)]));
    let keys = fields.optional("maxKeys").and_then(|value| value.integer(1..=1 << 24)).unwrap_or(DEFAULT_MAX_KEYS);
    for field in ["scope", "onMissing", "overrides", "charge", "cost", "response"] {
        fields.not_yet(field);
    }
    fields.end();
    let (name, (gcra, promise)) = (name?, rate?);
    Some(Limit {
        id,
        lease: most(gcra.burst()),
        prefix: format!("{prefix}limit/{route}/{name}/").into(),
        name: name.into(),
        gcra,
        promise: promise.into(),
        buckets: if key.is_empty() { 1 } else { buckets(keys) },
        key,
        shadow: shadow.unwrap_or(false),
    })
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
