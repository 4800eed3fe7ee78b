//! What a request costs inside the module: WebAssembly instructions and calls to the host, for policies from empty to
//! everything. The counts are those of the module that ships, in the virtual machine of the tests; they repeat exactly.
//!
//! `make bench` prints the table.

use std::collections::BTreeMap;
use trimtab_vm::{Module, Vm, World};

/// What a browser behind a gateway sends: 15 headers.
const REQUEST: [(&str, &str); 15] = [
    (":method", "GET"),
    (":path", "/api/v1/items/42?verbose=1"),
    (":authority", "user-service"),
    (":scheme", "http"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/126.0 Safari/537.36"),
    ("accept", "text/html,application/json;q=0.9,*/*;q=0.8"),
    ("accept-encoding", "gzip, deflate, br"),
    ("accept-language", "en-GB,en;q=0.5"),
    ("cookie", "session=7f3c2b1a9d8e4f50a6b7c8d9e0f1a2b3; theme=dark"),
    ("authorization", "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP"),
    ("x-user-id", "user-0123456789"),
    ("x-canary", "never"),
    ("x-request-id", "5a1f3c9e-7b2d-4e8f-9a0b-1c2d3e4f5a6b"),
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ("tracestate", "vendor=value"),
];

const CANARY: &str = r#""route": [{"destination": {"host": "h", "subset": "v1"}, "weight": 90},
                                  {"destination": {"host": "h", "subset": "v2"}, "weight": 10}],
                        "canary": {"destination": "v2", "rollout": "r", "key": [{"cookie": "session"}]}"#;
const JUDGED: &str = r#""route": [{"destination": {"host": "h", "subset": "v1"}, "weight": 90},
                                  {"destination": {"host": "h", "subset": "v2"}, "weight": 10}],
                        "canary": {"destination": "v2", "rollout": "r", "key": [{"cookie": "session"}],
                                   "startTime": "2020-01-01T00:00:00Z",
                                   "stages": [{"weight": 1, "duration": "1h"}, {"weight": 10}],
                                   "maxRequests": 1000000, "judge": {"p99Increase": "100ms"}}"#;
const FAULT: &str = r#""fault": {"delay": {"percentage": {"value": 0}, "fixedDelay": "1s"},
                                 "abort": {"percentage": {"value": 0}, "httpStatus": 503}}"#;
const LIMIT: &str = r#""rateLimits": [{"name": "l", "limit": {"requestsPerUnit": 1000000, "unit": "second"},
                                       "key": [{"header": "x-user-id"}]}]"#;
const TOLD_LIMIT: &str = r#""rateLimits": [{"name": "l", "limit": {"requestsPerUnit": 1000000, "unit": "second"},
                                            "key": [{"header": "x-user-id"}], "response": {"enableRateLimitFields": true}}]"#;
const ATTEMPTS: &str = r#""rateLimits": [{"name": "l", "limit": {"requestsPerUnit": 1000000, "unit": "second"},
                                          "key": [{"header": "x-user-id"}],
                                          "charge": {"onResponse": {"statuses": [401]}}}]"#;
const TRACE: &str = r#", "trace": {}"#;
const TRACE_LEFT: &str = r#", "trace": {"filterState": ["traceId"]}"#;
const BRIDGE: &str = r#", "trace": {"direction": "inbound", "bridge": {}}"#;

/// A policy whose last route, after `others` that do not match, has these blocks.
fn policy(others: usize, blocks: &[&str], trace: &str) -> String {
    let others = (0..others).map(|n| {
        format!(
            r#"{{"name": "other-{n}", "match": [{{"uri": {{"prefix": "/other/{n}"}}, "headers": {{"x-canary": {{"exact": "true"}}}}}}],
                 "route": [{{"destination": {{"host": "h", "subset": "v2"}}}}]}}, "#
        )
    });
    let blocks: String = blocks.iter().map(|block| format!(", {block}")).collect();
    let others: String = others.collect();
    format!(
        r#"{{"apiVersion": "trimtab/v1alpha1", "name": "bench", "routes": [{others}{{"name": "last"{blocks}}}]{trace}}}"#
    )
}

fn main() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/target/wasm/trimtab.wasm");
    let module = Module::from_file(path).unwrap_or_else(|error| panic!("{path}: {error:#}; run `make build`"));
    println!("| policy | instructions: request | response | whole stream | calls to the host |");
    println!("|---|---:|---:|---:|---|");
    for (name, policy) in [
        ("one route, no block", policy(0, &[], "")),
        ("20 routes, the last matches", policy(19, &[], "")),
        ("1,000 routes, the last matches", policy(999, &[], "")),
        ("trace", policy(0, &[], TRACE)),
        ("trace, its id in filter state", policy(0, &[], TRACE_LEFT)),
        ("trace, remembered by the bridge", policy(0, &[], BRIDGE)),
        ("canary", policy(0, &[CANARY], "")),
        ("canary in stages, judged", policy(0, &[JUDGED], "")),
        ("rate limit per user", policy(0, &[LIMIT], "")),
        ("rate limit per user, which is told", policy(0, &[TOLD_LIMIT], "")),
        ("rate limit per user, of failed attempts", policy(0, &[ATTEMPTS], "")),
        ("fault, not drawn", policy(0, &[FAULT], "")),
        ("20 routes, canary, limit, trace", policy(19, &[CANARY, LIMIT], TRACE)),
        ("20 routes, canary, limit, fault, trace", policy(19, &[CANARY, LIMIT, FAULT], TRACE)),
    ] {
        let cost = Cost::of(&module, &policy);
        println!("| {name} | {} | {} | {} | {} |", cost.request, cost.response, cost.stream, cost.host_calls);
    }
}

/// The mean of a hundred requests, after fifty.
struct Cost {
    request: u64,
    response: u64,
    stream: u64,
    host_calls: String,
}

impl Cost {
    fn of(module: &Module, policy: &str) -> Cost {
        const COUNT: u64 = 100;
        let world = World::new(1);
        let mut vm = Vm::new(&world, module).expect("the module starts");
        let root = vm.start_plugin("bench", policy).unwrap_or_else(|refused| panic!("{refused:?}"));
        for n in 0..50 + COUNT {
            if n == 50 {
                vm.reset_costs();
            }
            let stream = vm.open_stream(root);
            vm.request_headers(stream, &REQUEST, true).expect("no trap");
            vm.response_headers(stream, &[(":status", "200")], true).expect("no trap");
            vm.close(stream).expect("no trap");
        }
        let costs = vm.reset_costs();
        let of = |callback: &str| costs.callbacks.get(callback).map_or(0, |spent| spent.fuel / COUNT);
        let mut calls: BTreeMap<String, u64> = BTreeMap::new();
        for (name, count) in &costs.host_calls {
            *calls.entry(name.trim_start_matches("proxy_").to_owned()).or_default() += count;
        }
        let calls: Vec<String> = calls
            .into_iter()
            .map(|(name, count)| match (count / COUNT, count % COUNT) {
                (1, 0) => name,
                (times, 0) => format!("{name} x{times}"),
                (times, part) => format!("{name} x{times}.{part:02}"),
            })
            .collect();
        Cost {
            request: of("proxy_on_request_headers"),
            response: of("proxy_on_response_headers"),
            stream: costs.fuel() / COUNT,
            host_calls: calls.join(", "),
        }
    }
}
