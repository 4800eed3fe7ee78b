//! What a request costs inside the module: WebAssembly instructions and calls to the host, counted in the virtual machine
//! of the tests in the module that ships, and bytes allocated, counted natively. For policies from empty to everything,
//! for few and many routes and headers. The counts repeat exactly, so they are checked in, in `COUNTS.md`.
//!
//! `make bench` prints the table and writes it there. As a test, this fails where a change made a count worse by more
//! than 3 %, or added a call to the host, and the file was not written anew: whoever makes requests dearer says so.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use trimtab::filter::Filter;
use trimtab::host::sim::Sim;
use trimtab::http::encode_headers;
use trimtab::policy::Policy;
use trimtab_testbed::browser;
use trimtab_vm::{Module, Vm, World};

/// The system's allocator, which counts the bytes that it gives out.
struct Counting;

static ALLOCATED: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is done by the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size() as u64, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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

/// The first `count` of what a browser sends, and others that no policy asks for.
fn request(count: usize) -> Vec<(String, String)> {
    // The four that every request has, and the cookie that the canary's key is taken from, come first.
    let pseudo = [(":method", "GET"), (":path", browser::PATH), (":authority", "user-service"), (":scheme", "http")];
    let (cookie, others): (Vec<_>, Vec<_>) = browser::HEADERS.into_iter().partition(|(name, _)| *name == "cookie");
    let known = pseudo.into_iter().chain(cookie).chain(others);
    let unknown = (0..).map(|n| (format!("x-unknown-{n}"), format!("{n}-of-fifty")));
    known.map(|(name, value)| (name.to_owned(), value.to_owned())).chain(unknown).take(count).collect()
}

fn rows() -> Vec<(&'static str, String, usize)> {
    let everything = [CANARY, LIMIT, FAULT];
    vec![
        ("one route, no block", policy(0, &[], ""), 15),
        ("20 routes, the last matches", policy(19, &[], ""), 15),
        ("1,000 routes, the last matches", policy(999, &[], ""), 15),
        ("trace", policy(0, &[], TRACE), 15),
        ("trace, its id in filter state", policy(0, &[], TRACE_LEFT), 15),
        ("trace, remembered by the bridge", policy(0, &[], BRIDGE), 15),
        ("canary", policy(0, &[CANARY], ""), 15),
        ("canary in stages, judged", policy(0, &[JUDGED], ""), 15),
        ("rate limit per user", policy(0, &[LIMIT], ""), 15),
        ("rate limit per user, which is told", policy(0, &[TOLD_LIMIT], ""), 15),
        ("rate limit per user, of failed attempts", policy(0, &[ATTEMPTS], ""), 15),
        ("fault, not drawn", policy(0, &[FAULT], ""), 15),
        ("20 routes, canary, limit, trace", policy(19, &[CANARY, LIMIT], TRACE), 15),
        ("20 routes, canary, limit, fault, trace", policy(19, &everything, TRACE), 15),
        ("the same with 1 route", policy(0, &everything, TRACE), 15),
        ("the same with 1,000 routes", policy(999, &everything, TRACE), 15),
        ("the same with 5 headers", policy(19, &everything, TRACE), 5),
        ("the same with 50 headers", policy(19, &everything, TRACE), 50),
    ]
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let writes = arguments.iter().any(|argument| argument == "--bench");
    // As a test among others this one can be left out by its name.
    let filters: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    if !writes && !filters.is_empty() && !filters.iter().any(|filter| "counts_are_no_worse".contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/target/wasm/trimtab.wasm");
    let module = Module::from_file(path).unwrap_or_else(|error| panic!("{path}: {error:#}; run `make build`"));
    let found: Vec<(&str, Cost)> = rows()
        .into_iter()
        .map(|(name, policy, headers)| (name, Cost::of(&module, &policy, &request(headers))))
        .collect();
    let file = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/COUNTS.md"));
    if writes {
        let table = table(&found);
        print!("{table}");
        std::fs::write(&file, table).expect("COUNTS.md can be written");
        return ExitCode::SUCCESS;
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    let complaints = complaints(&found, &written);
    complaints.iter().for_each(|complaint| println!("{complaint}"));
    println!("counts: {} passed, {} failed", found.len().saturating_sub(complaints.len()), complaints.len());
    if complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn table(found: &[(&str, Cost)]) -> String {
    let mut table = String::from(
        "# Counts of one request inside the module\n\nWritten by `make bench`: WebAssembly instructions and calls to the \
         host in the virtual machine of the tests,\nbytes allocated in a native build. The request has 15 headers.\n\n\
         | policy | instructions: request | response | whole stream | bytes allocated | calls to the host |\n\
         |---|---:|---:|---:|---:|---|\n",
    );
    for (name, cost) in found {
        let Cost { numbers: [request, response, stream, bytes], host_calls } = cost;
        let calls: Vec<String> = host_calls
            .iter()
            .map(|(name, count)| match (count / COUNT, count % COUNT) {
                (1, 0) => name.clone(),
                (times, 0) => format!("{name} x{times}"),
                (times, part) => format!("{name} x{times}.{part:02}"),
            })
            .collect();
        let calls = calls.join(", ");
        writeln!(table, "| {name} | {request} | {response} | {stream} | {bytes} | {calls} |").expect("a string grows");
    }
    table
}

/// What has become worse than it is `written`.
fn complaints(found: &[(&str, Cost)], written: &str) -> Vec<String> {
    let row = |name: &str| {
        let cells =
            |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        written.lines().map(cells).find(|cells| cells.first().is_some_and(|cell| cell == name))
    };
    let mut complaints = Vec::new();
    for (name, cost) in found {
        let Some(cells) = row(name) else {
            complaints.push(format!("{name}: not in benches/COUNTS.md; run `make bench`"));
            continue;
        };
        for ((what, now), cell) in ["request", "response", "stream", "bytes"].iter().zip(cost.numbers).zip(&cells[1..])
        {
            let before: u64 = cell.parse().unwrap_or(0);
            if now * 100 > before * 103 {
                complaints
                    .push(format!("{name}: {what} {now}, and {before} is written: if it has to be, `make bench`"));
            }
        }
        for (call, count) in &cost.host_calls {
            let known = cells[5].split(", ").find_map(|known| {
                let rest = known.strip_prefix(call.as_str())?;
                match rest.strip_prefix(" x") {
                    Some(times) => times.parse::<f64>().ok(),
                    None => rest.is_empty().then_some(1.0),
                }
            });
            if *count as f64 > known.unwrap_or(0.0) * COUNT as f64 + 0.5 {
                complaints.push(format!("{name}: {call} is called more often: if it has to be, `make bench`"));
            }
        }
    }
    complaints
}

/// How many requests are counted, after half as many.
const COUNT: u64 = 100;

/// The mean of a hundred requests, after fifty.
struct Cost {
    /// Instructions of the request, of the response and of the whole stream, and bytes allocated.
    numbers: [u64; 4],
    /// Of all hundred.
    host_calls: BTreeMap<String, u64>,
}

impl Cost {
    fn of(module: &Module, policy: &str, headers: &[(String, String)]) -> Cost {
        let world = World::new(1);
        let mut vm = Vm::new(&world, module).expect("the module starts");
        let root = vm.start_plugin("bench", policy).unwrap_or_else(|refused| panic!("{refused:?}"));
        let borrowed: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (&**name, &**value)).collect();
        for n in 0..50 + COUNT {
            if n == 50 {
                vm.reset_costs();
            }
            let stream = vm.open_stream(root);
            vm.request_headers(stream, &borrowed, true).expect("no trap");
            vm.response_headers(stream, &[(":status", "200")], true).expect("no trap");
            vm.close(stream).expect("no trap");
        }
        let costs = vm.reset_costs();
        let of = |callback: &str| costs.callbacks.get(callback).map_or(0, |spent| spent.fuel / COUNT);
        let mut host_calls = BTreeMap::new();
        for (name, count) in &costs.host_calls {
            *host_calls.entry(name.trim_start_matches("proxy_").to_owned()).or_default() += count;
        }
        let (request, response) = (of("proxy_on_request_headers"), of("proxy_on_response_headers"));
        Cost { numbers: [request, response, costs.fuel() / COUNT, allocated(policy, headers)], host_calls }
    }
}

/// The bytes that one request allocates natively, with what the simulated host allocates for it.
fn allocated(policy: &str, headers: &[(String, String)]) -> u64 {
    let host = Sim::new(1);
    let (policy, _) = Policy::from_json(policy.as_bytes(), &|_| None).expect("the policy is valid");
    let mut filter = Filter::new(policy, &host);
    let block = encode_headers(headers);
    let status = |name: &str| (name == ":status").then(|| b"200".to_vec());
    let mut before = 0;
    for n in 0..50 + COUNT {
        if n == 50 {
            before = ALLOCATED.load(Ordering::Relaxed);
        }
        let mut exchange = filter.on_request(&host, &block, false, true).exchange;
        filter.on_response(&host, &mut exchange, &status, &mut |_| {});
    }
    (ALLOCATED.load(Ordering::Relaxed) - before) / COUNT
}
