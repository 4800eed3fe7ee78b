//! Reads the `rateLimits` block of a route.

use super::gcra::Gcra;
use super::policy::{
    CandidateRate, Cost, DEFAULT_MAX_KEYS, Keyspace, Limit, MAX_OVERRIDES, OnMissing, Override, PENDING_EPOCH, Rate,
    RateLimits, RejectionBody, ResponseOptions, StatusRanges, buckets,
};
use super::service::{self, GlobalLimit, RateLimitService};
use super::table::RateParams;
use crate::document::{Value, quoted};
use crate::http::HeaderNames;
use crate::key::KeySource;
use crate::matcher::{is_header_name, read_header_name};

const UNITS: [(&str, (u64, &str)); 4] = [
    ("second", (1_000_000_000, "a second")),
    ("minute", (60_000_000_000, "a minute")),
    ("hour", (3_600_000_000_000, "an hour")),
    ("day", (86_400_000_000_000, "a day")),
];

/// The largest rate, burst and cost, in requests.
const MAX_REQUESTS: u64 = 1_000_000_000;

/// Reads the limits of the route `route`. The ids of their rates begin at `first`. `prefix` is the prefix of the policy's
/// shared-data keys.
pub(crate) fn read(value: &Value<'_>, first: usize, prefix: &str, route: &str, names: &mut HeaderNames) -> RateLimits {
    const MAX_ITEMS: usize = 16;
    let mut limits: Vec<Limit> = Vec::new();
    let mut global: Vec<GlobalLimit> = Vec::new();
    let mut next_id = first;
    for item in &read_items(value, MAX_ITEMS) {
        let Some((mut limit, service)) = read_limit(item, prefix, route, names) else { continue };
        let mut known = limits.iter().chain(global.iter().map(|global| &global.limit));
        if known.any(|known| known.name == limit.name) {
            item.error(
                format!("a second limit called {}", quoted(&limit.name)),
                "give each limit of a route its own name",
            );
        }
        match service {
            Some(service) => {
                // The fallback of a global limit is never leased: rates without an id of their own have no leases.
                limit.rate.lease = 0;
                global.push(GlobalLimit { limit, service });
            }
            None => {
                let overrides = limit.overrides.iter_mut().map(|other| &mut other.rate);
                for rate in std::iter::once(&mut limit.rate).chain(overrides) {
                    rate.id = next_id;
                    next_id += 1;
                }
                limits.push(limit);
            }
        }
    }
    RateLimits { local: limits, global }
}

/// The items of a list that has at most `most` items.
fn read_items<'a>(value: &Value<'a>, most: usize) -> Vec<Value<'a>> {
    let items = value.array().unwrap_or_default();
    if items.len() > most {
        value.error(format!("{} items", items.len()), format!("write at most {most}"));
        return Vec::new();
    }
    items
}

fn read_limit(
    value: &Value<'_>,
    prefix: &str,
    route: &str,
    names: &mut HeaderNames,
) -> Option<(Limit, Option<RateLimitService>)> {
    let mut fields = value.object()?;
    let name = fields.required("name").and_then(|value| value.name());
    let rate = fields.required("limit").and_then(|value| read_rate(&value));
    let key = fields.optional("key").map(|value| KeySource::read_list(&value, false, names)).unwrap_or_default();
    let shadow = fields.optional("mode").and_then(|value| value.one_of(&[("enforce", false), ("shadow", true)]));
    let keys = fields.optional("maxKeys").and_then(|value| value.integer(1..=1 << 24)).unwrap_or(DEFAULT_MAX_KEYS);
    let requests = rate.as_ref().map(|rate| rate.gcra().burst());
    let service = service::read(&mut fields, requests, &key, names);
    if let Some(Some(_)) = service {
        for field in ["onMissing", "overrides", "cost", "charge", "candidates"] {
            fields.refuse(field, "remove it, or keep the limit local: the service counts each request as one hit");
        }
    }
    let on_missing = fields.optional("onMissing").and_then(|value| {
        value.one_of(&[("share", OnMissing::Share), ("skip", OnMissing::Skip), ("deny", OnMissing::Deny)])
    });
    let overrides = fields.optional("overrides").map(|value| read_overrides(&value, key.len())).unwrap_or_default();
    let cost = fields.optional("cost").and_then(|value| read_cost(&value, names));
    let counted = fields.optional("charge").and_then(|value| read_charge(&value));
    let candidates = fields.optional("candidates").map(|value| read_candidates(&value)).unwrap_or_default();
    let response = fields.optional("response").map(|value| read_response(&value)).unwrap_or_default();
    if let Some(Some(_)) = service
        && response.announces_quota()
    {
        value.error(
            "a response that announces the quota of a global limit",
            "remove enableXRatelimitHeaders and enableRateLimitFields",
        );
    }
    fields.end();
    let (name, rate, service) = (name?, rate?, service?);
    let buckets = if key.is_empty() { 1 } else { buckets(keys) };
    let mut prefix = format!("{prefix}limit/{route}/{name}/");
    if counted.is_some() {
        prefix.push_str("answers/");
    }
    let keyspace = |prefix: &str, longest| Keyspace { prefix: prefix.into(), buckets, longest };
    let longest = overrides.iter().fold(rate.params, |longest, other: &Override| RateParams {
        gcra: longest.gcra.longer(other.rate.gcra()),
        ..longest
    });
    let mut limit = Limit {
        name: name.into(),
        keyspace: keyspace(&prefix, longest),
        key,
        on_missing: on_missing.unwrap_or_default(),
        cost: cost.unwrap_or(Cost::Fixed(1)),
        rate,
        overrides,
        candidates: candidates
            .into_iter()
            .map(|(name, rate)| {
                let keyspace = keyspace(&format!("{prefix}candidate/{name}/"), rate.params);
                CandidateRate { name, rate: Rate { lease: 0, ..rate }, keyspace }
            })
            .collect(),
        counted,
        shadow: shadow.unwrap_or(false),
        response,
    };
    let lowest = limit.rates().map(|rate| rate.gcra().burst()).min();
    if matches!(limit.cost, Cost::Fixed(cost) if lowest.is_some_and(|burst| u64::from(cost) > burst)) {
        value.error("a cost above the burst", "write a larger burst: no request would ever be admitted");
    }
    limit.disable_leases_of_exact_limits();
    Some((limit, service))
}

impl Limit {
    /// Disables leases of limits that need exact numbers: those that announce the remaining quota, and those with pending
    /// charges.
    fn disable_leases_of_exact_limits(&mut self) {
        let (is_counted, is_announced) = (self.counted.is_some(), self.response.announces_quota());
        let rates = std::iter::once(&mut self.rate)
            .chain(self.overrides.iter_mut().map(|other| &mut other.rate))
            .chain(self.candidates.iter_mut().map(|candidate| &mut candidate.rate));
        for rate in rates {
            if is_counted {
                rate.params.epoch = PENDING_EPOCH;
            }
            if is_counted || is_announced {
                rate.lease = 0;
            }
        }
        let keyspaces = self.candidates.iter_mut().map(|candidate| &mut candidate.keyspace);
        for keyspace in keyspaces.chain([&mut self.keyspace]) {
            keyspace.longest.epoch = self.rate.params.epoch;
        }
    }
}

fn read_rate(value: &Value<'_>) -> Option<Rate> {
    let mut fields = value.object()?;
    let requests = fields.required("requestsPerUnit").and_then(|value| value.integer(1..=MAX_REQUESTS));
    let unit = fields.required("unit").and_then(|value| value.one_of(&UNITS));
    let burst = fields.optional("burst").map(|value| value.integer(1..=MAX_REQUESTS));
    fields.end();
    let (requests, (nanoseconds, unit)) = (requests?, unit?);
    let burst = burst.unwrap_or(Some(requests))?;
    let gcra = Gcra::new(requests, nanoseconds, burst);
    if gcra.is_none() {
        value.error("the burst takes centuries to regain", "write a smaller burst or a higher rate");
    }
    let plural = if requests == 1 { "" } else { "s" };
    Some(Rate::new(gcra?, format!("{requests} request{plural} {unit}").into()))
}

fn read_overrides(value: &Value<'_>, parts: usize) -> Vec<Override> {
    if parts == 0 {
        value.error("overrides of a limit without a key", "write the key that the overrides match");
    }
    read_items(value, MAX_OVERRIDES).iter().filter_map(|item| read_override(item, parts)).collect()
}

fn read_override(value: &Value<'_>, parts: usize) -> Option<Override> {
    let mut fields = value.object()?;
    let wanted = fields.required("match").and_then(|value| {
        let wanted = match value.as_string() {
            Some(_) => vec![value.text()?],
            None => value.array()?.iter().map(Value::text).collect::<Option<_>>()?,
        };
        if parts > 0 && wanted.len() != parts {
            value.unfit(format!("expected one value for each of the {parts} parts of the key; \"*\" is any"));
        }
        Some(wanted.into_iter().map(|wanted| (wanted != "*").then(|| wanted.into())).collect())
    });
    let rate = fields.required("limit").and_then(|value| read_rate(&value));
    fields.end();
    Some(Override { parts: wanted?, rate: rate? })
}

fn read_cost(value: &Value<'_>, names: &mut HeaderNames) -> Option<Cost> {
    let mut fields = value.object()?;
    let number =
        fields.optional("number").map(|value| value.integer(1..=MAX_REQUESTS).map(|number| Cost::Fixed(number as u32)));
    let otherwise = fields.optional("default");
    let is_by_default = otherwise.is_some();
    let otherwise = otherwise.and_then(|value| value.integer(0..=MAX_REQUESTS)).unwrap_or(1) as u32;
    let header = fields.optional("header").map(|value| {
        let id = read_header_name(&value, value.text()?, names)?;
        Some(Cost::Header { id, otherwise })
    });
    let bytes = fields.optional("bytesPerRequest").map(|value| {
        let unit = value.integer(1..=MAX_REQUESTS)? as u32;
        Some(Cost::ContentLength { id: read_header_name(&value, "content-length", names)?, unit, otherwise })
    });
    if number.is_some() && is_by_default {
        value.error("a default beside a number", "remove it");
    }
    fields.end();
    let found: Vec<_> = [number, header, bytes].into_iter().flatten().collect();
    if found.len() != 1 {
        value.error(format!("{} costs", found.len()), "write one of number, header and bytesPerRequest");
    }
    found.into_iter().next().flatten()
}

fn read_charge(value: &Value<'_>) -> Option<StatusRanges> {
    let mut fields = value.object()?;
    let statuses = fields.required("onResponse").and_then(|value| {
        let mut fields = value.object()?;
        let statuses = fields.required("statuses").and_then(|value| read_statuses(&value));
        fields.end();
        statuses
    });
    fields.end();
    statuses
}

fn read_statuses(value: &Value<'_>) -> Option<StatusRanges> {
    const CLASSES: [(&str, (u16, u16)); 4] =
        [("2xx", (200, 299)), ("3xx", (300, 399)), ("4xx", (400, 499)), ("5xx", (500, 599))];
    const MAX_ITEMS: usize = 16;
    let items = read_items(value, MAX_ITEMS);
    if items.is_empty() {
        value.unfit("expected statuses, such as [401, \"5xx\"]");
    }
    let status = |item: &Value<'_>| match item.as_string() {
        Some(_) => item.one_of(&CLASSES),
        None => item.integer(200..=599).map(|status| (status as u16, status as u16)),
    };
    Some(StatusRanges(items.iter().filter_map(status).collect()))
}

fn read_candidates(value: &Value<'_>) -> Vec<(Box<str>, Rate)> {
    const MAX_ITEMS: usize = 8;
    let mut candidates: Vec<(Box<str>, Rate)> = Vec::new();
    for item in &read_items(value, MAX_ITEMS) {
        let Some(mut fields) = item.object() else { continue };
        let name = fields.required("name").and_then(|value| value.name());
        let rate = fields.required("limit").and_then(|value| read_rate(&value));
        fields.end();
        let (Some(name), Some(rate)) = (name, rate) else { continue };
        if candidates.iter().any(|(known, _)| **known == *name) {
            item.error(format!("a second candidate called {}", quoted(name)), "give each its own name");
        }
        candidates.push((name.into(), rate));
    }
    candidates
}

fn read_response(value: &Value<'_>) -> ResponseOptions {
    let Some(mut fields) = value.object() else { return ResponseOptions::default() };
    let standard = ResponseOptions::default();
    let mut flag = |name, standard: bool| fields.optional(name).and_then(|value| value.bool()).unwrap_or(standard);
    let retry_after = flag("enableRetryAfterHeader", standard.retry_after);
    let x_envoy_ratelimited = !flag("disableXEnvoyRatelimitedHeader", !standard.x_envoy_ratelimited);
    let rate_limit_fields = flag("enableRateLimitFields", standard.fields);
    let is_problem = flag("problemDetails", false);
    let x_ratelimit = fields
        .optional("enableXRatelimitHeaders")
        .and_then(|value| value.one_of(&[("OFF", false), ("DRAFT_VERSION_03", true)]));
    let status = fields.optional("statusCode").and_then(|value| value.integer(400..=599));
    let content_type = fields.optional("contentType");
    let body = fields.optional("body");
    if is_problem && (body.is_some() || content_type.is_some()) {
        fields.value().error("problemDetails beside a body of your own", "remove one of them");
    }
    let headers = fields.optional("headers").map(|value| read_headers(&value)).unwrap_or_default();
    fields.end();
    let own = body.and_then(|value| {
        let text = value.string()?;
        if text.len() > MAX_BODY {
            value.error(format!("{} bytes", text.len()), format!("a body has at most {MAX_BODY}"));
        }
        Some(RejectionBody::Own(text.into()))
    });
    ResponseOptions {
        status: status.map_or(standard.status, |status| status as u16),
        body: if is_problem { RejectionBody::Problem } else { own.unwrap_or_default() },
        content_type: content_type.and_then(|value| read_header_value(&value)),
        headers,
        x_ratelimit: x_ratelimit.unwrap_or(standard.x_ratelimit),
        fields: rate_limit_fields,
        retry_after,
        x_envoy_ratelimited,
    }
}

/// The longest body of a refusal, in bytes. Every refusal contains it.
const MAX_BODY: usize = 4096;

fn read_headers(value: &Value<'_>) -> Vec<(Box<str>, Box<str>)> {
    const MAX_ITEMS: usize = 16;
    let entries = value.entries().unwrap_or_default();
    if entries.len() > MAX_ITEMS {
        value.error(format!("{} headers", entries.len()), format!("an answer has at most {MAX_ITEMS} of your own"));
    }
    let mut headers = Vec::new();
    for (name, value) in entries.iter().take(MAX_ITEMS) {
        let lower = name.to_ascii_lowercase();
        let is_ours = lower.starts_with(':')
            || lower.starts_with("grpc-")
            || ["content-length", "content-type", "transfer-encoding", "connection", "retry-after"].contains(&&*lower);
        if is_ours || !is_header_name(name) {
            value.error(
                format!("{} cannot be set here", quoted(name)),
                "write a header that is neither the proxy's own nor a field of this block",
            );
            continue;
        }
        headers.extend(read_header_value(value).map(|text| (lower.into(), text)));
    }
    headers
}

/// Reads the value of a header: visible ASCII characters, and blanks between them.
fn read_header_value(value: &Value<'_>) -> Option<Box<str>> {
    let text = value.text()?;
    if text.len() > 1024 || text.trim().len() != text.len() || !text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        value.unfit("expected at most 1024 visible ASCII characters, with no blank at either end");
        return None;
    }
    Some(text.into())
}
