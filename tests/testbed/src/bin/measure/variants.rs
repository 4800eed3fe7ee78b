//! What is compared: chains of HTTP filters that do the same job, a part of it, or nothing.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::{Value, json};
use trimtab_testbed::browser::HEADERS;
use trimtab_testbed::{
    Bootstrap, Envoy, Listener, Options, by_subset, cluster, direct_response, repository, wasm, wasm_filter,
};

use crate::load::{BODY_SIZE, USER};

/// One way to treat a request.
#[derive(Clone)]
pub struct Variant {
    /// The listener's name.
    pub id: &'static str,
    /// What the tables say.
    pub name: &'static str,
    routes: Value,
    filters: Vec<Value>,
}

impl Variant {
    fn new(id: &'static str, name: &'static str, routes: Value, filters: Vec<Value>) -> Self {
        Self { id, name, routes, filters }
    }

    fn trimtab(id: &'static str, name: &'static str, policy: &str) -> Self {
        // The listeners of one Envoy share what is kept under a policy's name.
        let policy = policy.replace("POLICY", id);
        Self::new(id, name, by_subset(&["v2"], "v1"), vec![wasm_filter(id, &wasm(), &policy)])
    }

    fn listener(&self) -> Listener {
        let listener = Listener::new(self.id).routes(self.routes.clone());
        self.filters.iter().cloned().fold(listener, Listener::filter)
    }
}

pub fn router() -> Variant {
    Variant::new("router", "router only", by_subset(&[], "v1"), Vec::new())
}

/// The control: what a difference of nothing looks like.
pub fn router_again() -> Variant {
    Variant { name: "router only, again", ..router() }
}

pub fn steered() -> Variant {
    let name = "the routes that match the steering header, alone";
    Variant::new("steered", name, by_subset(&["v2"], "v1"), Vec::new())
}

/// Envoy's own filters for a part of the job.
pub fn native() -> Variant {
    const BUCKET: u64 = 1_000_000_000;
    let bucket = json!({"max_tokens": BUCKET, "tokens_per_fill": BUCKET, "fill_interval": "1s"});
    let always = json!({"default_value": {"numerator": 100, "denominator": "HUNDRED"}});
    let user = HEADERS.iter().find(|(name, _)| *name == USER).map_or("", |(_, value)| value);
    let limit = json!({
        "@type": format!("{FILTERS}.local_ratelimit.v3.LocalRateLimit"),
        "stat_prefix": "limit",
        "filter_enabled": always,
        "filter_enforced": always,
        "token_bucket": bucket,
        "rate_limits": [{"actions": [{"request_headers": {"header_name": USER, "descriptor_key": "user"}}]}],
        "descriptors": [{"entries": [{"key": "user", "value": user}], "token_bucket": bucket}],
    });
    let per_route = json!({"envoy.filters.http.local_ratelimit": limit});
    let canary = json!([{"name": "x-canary", "string_match": {"exact": "true"}}]);
    let routes = json!([
        {"match": {"prefix": "/", "headers": canary}, "route": {"cluster": "v2"}, "typed_per_filter_config": per_route},
        {
            "match": {"prefix": "/"},
            "route": {"weighted_clusters": {"clusters": [{"name": "v1", "weight": 90}, {"name": "v2", "weight": 10}]}},
            "typed_per_filter_config": per_route,
        },
    ]);
    let set = |name: &str, value: &str| {
        json!({"append": {
            "header": {"key": name, "value": value},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }})
    };
    let filters = vec![
        filter(
            "fault",
            "HTTPFault",
            json!({
                "headers": [{"name": "x-experiment", "present_match": true}],
                "delay": {"fixed_delay": "1s", "percentage": {"numerator": 100}},
                "abort": {"http_status": 503, "percentage": {"numerator": 100}},
            }),
        ),
        filter("local_ratelimit", "LocalRateLimit", json!({"stat_prefix": "limit"})),
        filter(
            "header_mutation",
            "HeaderMutation",
            json!({"mutations": {"request_mutations": [
                set("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-%REQ(x-span-id?x-user-id):16%-01"),
                set("x-variant", "v1"),
            ]}}),
        ),
    ];
    let name = "Envoy's own: header route and weighted clusters, fault, local rate limit, header mutation";
    Variant::new("native", name, routes, filters)
}

/// A script that does a part of the job in the same steps.
pub fn lua() -> Variant {
    const SCRIPT: &str = r#"
        local left = {}
        function envoy_on_request(handle)
            local headers = handle:headers()
            local path = headers:get(":path")
            local authority = headers:get(":authority")
            local canary = headers:get("x-canary")
            local user = headers:get("x-user-id")
            local parent = headers:get("traceparent")
            left[user] = (left[user] or 1000000000) - 1
            headers:replace("traceparent", parent:sub(1, 36) .. "b7ad6b7169203331-01")
            headers:replace("x-trimtab-subset", canary == "true" and "v2" or "v1")
        end
        function envoy_on_response(handle)
            local status = handle:headers():get(":status")
        end
    "#;
    let name = "Lua: five headers read, two written, a table, the status";
    let script = filter("lua", "Lua", json!({"default_source_code": {"inline_string": SCRIPT}}));
    Variant::new("lua", name, by_subset(&["v2"], "v1"), vec![script])
}

/// The least that a filter on the Rust SDK costs, as the SDK has it.
pub fn empty() -> Variant {
    let filter = wasm_filter("empty", &empty_module(), "");
    Variant::new("empty", "an empty WebAssembly filter on the Rust SDK", by_subset(&["v2"], "v1"), vec![filter])
}

/// A filter that does nothing but make these calls to the host, as `benches/calls_filter` reads them.
fn calls(id: &'static str, name: &'static str, calls: &str) -> Variant {
    let module = repository().join("target/wasm/calls_filter.wasm");
    Variant::new(id, name, by_subset(&["v2"], "v1"), vec![wasm_filter(id, &module, calls)])
}

/// The calls that Trimtab makes for some of the policies below.
pub fn boundary() -> Vec<Variant> {
    vec![
        calls("callbacks", "an empty filter with no callbacks but Trimtab's", ""),
        calls("calls-none", "the calls of \"no route of 20 matches\"", "read count"),
        calls("calls-limit", "the calls of \"one limit per user\"", "read clock count"),
        calls(
            "calls-request",
            "the calls of \"20 routes, sticky canary, limit per user, trace\"",
            "read clock write write count count",
        ),
        calls("calls-everything", "the calls of \"everything\"", CALLS_OF_EVERYTHING),
    ]
}

/// The judge looks whether the canary has failed, the limit and the judge ask for the time, and the judge again when the
/// answer comes; the route, the fault and the trace are counted, and then the target and what the judge compares.
const CALLS_OF_EVERYTHING: &str = "read look clock clock write write count count count | status clock count count";

/// Where `make bench-envoy` puts the module of `benches/empty_filter`.
pub fn empty_module() -> PathBuf {
    repository().join("target/wasm32-wasip1/release/empty_filter.wasm")
}

const FILTERS: &str = "type.googleapis.com/envoy.extensions.filters.http";

fn filter(name: &str, message: &str, mut configuration: Value) -> Value {
    configuration["@type"] = json!(format!("{FILTERS}.{name}.v3.{message}"));
    json!({"name": format!("envoy.filters.http.{name}"), "typed_config": configuration})
}

const SPLIT: &str = r#""route": [{"destination": {"host": "h", "subset": "v1"}, "weight": 90},
                                 {"destination": {"host": "h", "subset": "v2"}, "weight": 10}]"#;
const CANARY: &str = r#""canary": {"destination": "v2", "rollout": "POLICY", "key": [{"cookie": "session"}]}"#;
const JUDGED: &str = r#""canary": {"destination": "v2", "rollout": "POLICY", "key": [{"cookie": "session"}],
                                   "judge": {"p99Increase": "10s"}}"#;
const LIMIT: &str = r#""rateLimits": [{"name": "l", "limit": {"requestsPerUnit": 1000000, "unit": "second"},
                                       "maxKeys": 131072, "key": [{"header": "x-user-id"}]}]"#;
/// Armed: it applies to the request, and the draw says no.
const FAULT: &str = r#""fault": {"abort": {"percentage": {"value": 0}, "httpStatus": 503}}"#;
const TRACE: &str = r#""trace": {}"#;

/// A policy of `others` routes that do not match and, unless `blocks` is empty, a last one that does and has them.
fn policy(others: usize, blocks: &[&str], trace: &str) -> String {
    let mut routes: Vec<String> = (0..others)
        .map(|number| {
            format!(
                r#"{{"name": "other-{number}",
                     "match": [{{"uri": {{"prefix": "/other/{number}"}}, "headers": {{"x-canary": {{"exact": "true"}}}}}}],
                     "route": [{{"destination": {{"host": "h", "subset": "v2"}}}}]}}"#
            )
        })
        .collect();
    if !blocks.is_empty() {
        routes.push(format!(r#"{{"name": "last", {}}}"#, blocks.join(", ")));
    }
    let trace = if trace.is_empty() { String::new() } else { format!(", {trace}") };
    format!(r#"{{"apiVersion": "trimtab/v1alpha1", "name": "POLICY", "routes": [{}]{trace}}}"#, routes.join(", "))
}

pub fn none() -> Variant {
    Variant::trimtab("none", "Trimtab, no route of 20 matches", &policy(20, &[], ""))
}

pub fn limit() -> Variant {
    Variant::trimtab("limit", "Trimtab, one limit per user", &policy(0, &[LIMIT], ""))
}

/// A limit that is never leased and forgets nobody within the hour.
pub fn lasting_limit() -> Variant {
    let limit = LIMIT.replace("1000000", "500").replace("second", "hour");
    Variant::trimtab("lasting", "Trimtab, one limit of 500 an hour per user", &policy(0, &[&limit], ""))
}

/// The same with a burst that many users can use up in little time.
pub fn small_limit() -> Variant {
    let limit = LIMIT.replace("1000000", "20").replace("second", "hour");
    Variant::trimtab("small", "Trimtab, one limit of 20 an hour per user", &policy(0, &[&limit], ""))
}

pub fn trace() -> Variant {
    Variant::trimtab("trace", "Trimtab, trace alone", &policy(0, &[r#""match": []"#], TRACE))
}

pub fn canary() -> Variant {
    Variant::trimtab("canary", "Trimtab, a sticky canary alone", &policy(0, &[SPLIT, CANARY], ""))
}

pub fn request_side() -> Variant {
    let policy = policy(19, &[SPLIT, CANARY, LIMIT], TRACE);
    Variant::trimtab("request", "Trimtab, 20 routes, sticky canary, limit per user, trace", &policy)
}

pub fn everything() -> Variant {
    let name = "Trimtab, everything: the same and a judge and an armed fault, which read the response's status";
    Variant::trimtab("everything", name, &policy(19, &[SPLIT, JUDGED, LIMIT, FAULT], TRACE))
}

/// An Envoy of one listener that answers at once. It runs apart, so that its work is in no figure.
pub async fn start_upstream() -> Result<Envoy, String> {
    let answer = direct_response(200, &"x".repeat(BODY_SIZE));
    let bootstrap = Bootstrap::new().listener(Listener::new("upstream").routes(answer));
    options(1).try_start(&bootstrap).await
}

/// An Envoy with a listener for each variant.
pub async fn start(options: Options, variants: &[Variant], upstream: SocketAddr) -> Result<Envoy, String> {
    let bootstrap = Bootstrap::new()
        .cluster(cluster("v1", upstream))
        .cluster(cluster("v2", upstream))
        // Collecting statistics is work of the workers that no request asks for.
        .field("stats_flush_interval", json!("299s"));
    let listeners = variants.iter().map(Variant::listener);
    options.try_start(&listeners.fold(bootstrap, Bootstrap::listener)).await
}

/// How Envoy is run here: itself, and not talkative.
pub fn options(workers: u32) -> Options {
    Envoy::options().launcher(trimtab_testbed::Launcher::Direct).concurrency(workers).quiet()
}
