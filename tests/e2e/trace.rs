//! Trace propagation: what the upstream is told.

use crate::world::{World, policy};
use std::ops::Range;
use std::path::Path;
use trimtab_testbed::{
    Bootstrap, Client, Direction, Envoy, Listener, Request, Upstream, by_subset, cluster, eventually, needs_envoy,
    repository, wasm, wasm_filter,
};

#[path = "../conformance/cases.rs"]
mod cases;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn valid_in_valid_out() {
    needs_envoy!();
    let world = World::start(&policy("", r#", "trace": {"sampling": {"percentage": "100%"}}"#)).await;
    let client = world.client();

    let request =
        Request::get("/").header("traceparent", TRACEPARENT).header("tracestate", "a=1").header("tracestate", "b=2");
    client.send(request).await;
    let seen = world.v1.next_request().await;
    let traceparent = seen.header("traceparent").unwrap();
    assert_eq!(traceparent[..36], TRACEPARENT[..36], "the same trace");
    assert_ne!(traceparent[36..52], TRACEPARENT[36..52], "a new parent");
    assert_eq!(traceparent[52..], TRACEPARENT[52..], "the same flags");
    let tracestate: Vec<_> = seen.headers.get_all("tracestate").iter().map(|value| value.to_str().unwrap()).collect();
    assert_eq!(tracestate.join(","), "a=1,b=2");

    let bad: [&[&str]; 4] =
        [&[], &["nonsense"], &[TRACEPARENT, TRACEPARENT], &["00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"]];
    for values in bad {
        let mut request = Request::get("/").header("tracestate", "a=1");
        for value in values {
            request = request.header("traceparent", value);
        }
        client.send(request).await;
        let seen = world.v1.next_request().await;
        let traceparent = seen.header("traceparent").unwrap();
        assert_ne!(traceparent[3..35], TRACEPARENT[3..35], "{values:?} begins a new trace");
        assert!(traceparent.ends_with("-03"), "{traceparent}: sampled, with a random id");
        assert_eq!(seen.headers.get_all("traceparent").iter().count(), 1);
        assert_eq!(seen.header("tracestate"), Some("ot=th:0"), "{values:?}: only how it was sampled");
    }
    assert_eq!(world.metric("trace.valid").await, 1);
    assert_eq!(world.metric("trace.missing").await, 1);
    assert_eq!(world.metric("trace.invalid").await, 3);
    world.assert_no_trap().await;
}

/// A sidecar: requests to the application pass "inbound", its own requests pass "outbound" on their way to the next
/// hop. Both listeners load the same plugin: only their `traffic_direction` tells them apart.
struct Sidecar {
    envoy: Envoy,
    application: Upstream,
    next: Upstream,
    /// Where Envoy's own tracer reports its spans, if it has one.
    collector: Option<Upstream>,
}

impl Sidecar {
    async fn start(workers: u32, trace: &str) -> Sidecar {
        let (application, next) = (Upstream::start("application").await, Upstream::start("next").await);
        let plugin = wasm_filter("trimtab", &wasm(), &policy("", &format!(r#", "trace": {trace}"#)));
        let listener = |name: &str, direction, to: &str| {
            Listener::new(name).direction(direction).filter(plugin.clone()).routes(by_subset(&[], to))
        };
        let bootstrap = Bootstrap::new()
            .listener(listener("inbound", Direction::Inbound, "application"))
            .listener(listener("outbound", Direction::Outbound, "next"))
            .cluster(cluster("application", application.address()))
            .cluster(cluster("next", next.address()));
        let envoy = Envoy::options().concurrency(workers).start(&bootstrap).await;
        Sidecar { envoy, application, next, collector: None }
    }

    /// A sidecar as `example` in `envoy/` configures it, but that every new trace is sampled.
    async fn from_example(workers: u32, example: &str) -> Sidecar {
        let (application, next) = (Upstream::start("application").await, Upstream::start("next").await);
        let collector = Upstream::start("collector").await;
        let mut text = std::fs::read_to_string(repository().join(example)).expect("the example is there");
        let mut replace = |written: &str, by: &str| {
            assert!(text.contains(written), "{example} no longer says {written}");
            text = text.replace(written, by);
        };
        replace("/etc/trimtab/trimtab.wasm", &wasm().display().to_string());
        replace("{\"value\": 1}", "{\"value\": 100}");
        replace("random_sampling: {value: 1}", "random_sampling: {value: 100}");
        replace("address: 0.0.0.0, port_value: 10000", "address: 127.0.0.1, port_value: 0");
        replace("address: 127.0.0.1, port_value: 10001", "address: 127.0.0.1, port_value: 0");
        for (written, upstream) in [
            ("address: application, port_value: 8080", &application),
            ("address: next, port_value: 8081", &next),
            ("address: collector, port_value: 4318", &collector),
        ] {
            replace(written, &format!("address: 127.0.0.1, port_value: {}", upstream.address().port()));
        }
        let envoy = Envoy::options().concurrency(workers).try_start_text(&text).await;
        Sidecar {
            envoy: envoy.unwrap_or_else(|failure| panic!("{example}: {failure}")),
            application,
            next,
            collector: Some(collector),
        }
    }

    /// What the next hop sees of `calls` requests by an application that copies these headers.
    async fn chain(&self, headers: &[(&str, &str)], copied: &[&str], calls: usize) -> Vec<cases::Headers> {
        let with = |headers: &[(&str, &str)]| {
            headers.iter().fold(Request::get("/"), |request, (name, value)| request.header(name, value))
        };
        let client = |listener| Client::http1(self.envoy.address(listener)).without_reuse();
        client("inbound").send(with(headers)).await;
        let arrived = headers_of(&self.application.next_request().await);
        let copy: Vec<(&str, &str)> = arrived
            .iter()
            .filter(|(name, _)| copied.contains(&name.as_str()))
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let mut seen = Vec::new();
        for _ in 0..calls {
            client("outbound").send(with(&copy)).await;
            seen.push(headers_of(&self.next.next_request().await));
        }
        seen
    }

    async fn metric(&self, name: &str) -> u64 {
        self.envoy.module_metric(&format!("wasmcustom.trimtab.policy.user-service.{name}")).await.unwrap_or_default()
    }
}

fn headers_of(received: &trimtab_testbed::Received) -> cases::Headers {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    received.headers.iter().map(|(name, value)| (name.to_string(), text(value.as_bytes()))).collect()
}

fn value<'h>(headers: &'h cases::Headers, name: &str) -> Option<&'h str> {
    headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_conformance_cases_pass_through_a_sidecar() {
    needs_envoy!();
    let settings: [(u32, &[&str]); 4] =
        [(2, &["x-request-id"]), (8, &["x-request-id"]), (2, &["traceparent"]), (2, &["traceparent", "tracestate"])];
    for (workers, copied) in settings {
        let sidecar = Sidecar::start(workers, r#"{"bridge": {}, "sampling": {"percentage": "100%"}}"#).await;
        cases::run(&format!("{workers} workers, the application copies {copied:?}"), true, &mut |headers, calls| {
            let chain = sidecar.chain(headers, copied, calls);
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(chain))
        });
        assert_eq!(sidecar.metric("trace.ambiguous").await, 0);
        assert!(sidecar.metric("trace.valid").await > 0);
        let (bridged, valid) =
            (sidecar.metric("outbound.trace.bridged").await, sidecar.metric("outbound.trace.valid").await);
        assert_eq!((bridged > 0, valid > 0), if copied[0] == "traceparent" { (false, true) } else { (true, false) });
    }
}

#[tokio::test]
async fn an_application_that_copies_a_request_id_keeps_trace_baggage_and_cohort() {
    needs_envoy!();
    let trace = r#"{"extract": ["tracecontext", "b3"], "bridge": {"carry": ["baggage", "x-cohort"]}, "response": "serverTiming"}"#;
    let sidecar = Sidecar::start(2, trace).await;
    let b3 = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1";
    for n in 0..20 {
        let (baggage, cohort) = (format!("user=u{n}"), format!("v{n}"));
        let headers = [("b3", b3), ("baggage", &*baggage), ("x-cohort", &*cohort)];
        let seen = sidecar.chain(&headers, &["x-request-id"], 1).await.remove(0);
        assert_eq!(value(&seen, "traceparent").unwrap()[..36], TRACEPARENT[..36]);
        assert_eq!(value(&seen, "baggage"), Some(&*baggage));
        assert_eq!(value(&seen, "x-cohort"), Some(&*cohort));
        assert_eq!(value(&seen, "b3"), None, "b3 is read, not written");
    }
    assert_eq!(sidecar.metric("trace.from.b3").await, 20);
    assert_eq!(sidecar.metric("trace.converted").await, 20);
    assert_eq!(sidecar.metric("outbound.trace.bridged").await, 20);

    let response = Client::http1(sidecar.envoy.address("inbound")).send(Request::get("/").header("b3", b3)).await;
    let timing = response.header("server-timing").unwrap();
    assert!(timing.starts_with("trace;desc=00-4bf92f3577b34da6a3ce929d0e0e4736-"), "{timing}");
    let response = Client::http1(sidecar.envoy.address("outbound")).send(Request::get("/")).await;
    assert_eq!(response.header("server-timing"), None, "the application is no client of its own sidecar");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_conformance_cases_pass_beside_envoys_tracer() {
    needs_envoy!();
    let settings: [(u32, &str, &[&str]); 7] = [
        (2, "envoy/otel.yaml", &["x-request-id"]),
        (8, "envoy/otel.yaml", &["x-request-id"]),
        (2, "envoy/otel.yaml", &["traceparent"]),
        (2, "envoy/otel.yaml", &["traceparent", "tracestate"]),
        (2, "envoy/upstream-filter.yaml", &["x-request-id"]),
        (2, "envoy/upstream-filter.yaml", &["traceparent"]),
        (2, "envoy/upstream-filter.yaml", &["traceparent", "tracestate"]),
    ];
    for (workers, example, copied) in settings {
        let sidecar = Sidecar::from_example(workers, example).await;
        cases::run(
            &format!("{example}, {workers} workers, the application copies {copied:?}"),
            false,
            &mut |headers, calls| {
                let chain = sidecar.chain(headers, copied, calls);
                tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(chain))
            },
        );
        let collector = sidecar.collector.as_ref().unwrap();
        let spans = collector.next_request().await;
        assert_eq!(spans.path, "/v1/traces", "the tracer is at work");
        assert_eq!(sidecar.metric("trace.ambiguous").await, 0);
    }
}

/// An access log prints the trace that the request went on with, even where it went nowhere; so does our own log line.
#[tokio::test]
async fn an_access_log_and_our_own_line_tell_the_trace_id() {
    needs_envoy!();
    let next = Upstream::start("v1").await;
    let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("access-{}.log", std::process::id()));
    let limit = r#"{"name": "l", "limit": {"requestsPerUnit": 1, "unit": "hour"}}"#;
    let trace = r#", "trace": {"filterState": ["traceId"]}"#;
    let listener = Listener::new("inbound")
        .policy(&policy(&format!(r#"{{"name": "r", "rateLimits": [{limit}]}}"#), trace))
        .access_log(&log, "%RESPONSE_CODE% %FILTER_STATE(wasm.trimtab.trace_id:PLAIN)%\n");
    let bootstrap = Bootstrap::new().listener(listener).cluster(cluster("v1", next.address()));
    let envoy = Envoy::start(&bootstrap).await;
    let client = Client::http1(envoy.address("inbound"));
    for _ in 0..2 {
        client.send(Request::get("/").header("traceparent", TRACEPARENT)).await;
    }
    let lines = eventually("two lines in the access log", async || {
        std::fs::read_to_string(&log).ok().filter(|log| log.lines().count() == 2)
    });
    let id = &TRACEPARENT[3..35];
    assert_eq!(lines.await, format!("200 {id}\n429 {id}\n"));
    for decided in [r#"verdict=continue details="""#, r#"verdict=answer details="trimtab_rate_limited""#] {
        envoy.wait_for_log(&format!(r#"request: route="r" destination="" {decided} trace_id={id}"#)).await;
    }
    std::fs::remove_file(log).unwrap();
}

/// So many requests of their own ids and traces, from `first` on, as many at once as there are `clients`. What reached
/// the upstream is compared with what belongs to the id: whether it is that.
async fn exchange_all(clients: &[Client], numbers: Range<usize>, inbound: bool) -> usize {
    // Half of an id, so that none that is drawn at random can be taken for one of these.
    const OURS: &str = "c0ffee0000000000";
    let share = numbers.len().div_ceil(clients.len());
    let tasks = clients.iter().enumerate().map(|(place, client)| {
        let (client, numbers) = (client.clone(), numbers.clone().skip(place * share).take(share));
        tokio::spawn(async move {
            let mut own = 0;
            for n in numbers {
                let (id, trace) = (format!("request-{n}"), format!("{OURS}{n:016x}"));
                let mut request = Request::get("/").header("x-request-id", &id);
                if inbound {
                    request = request.header("traceparent", format!("00-{trace}-{:016x}-01", n + 1));
                    request = request.header("baggage", format!("n={n}"));
                }
                let response = client.send(request).await;
                let traceparent = response.echoed("traceparent").expect("every request has a trace");
                let baggage = response.echoed("baggage");
                if traceparent[3..35] == trace {
                    assert_eq!(baggage, Some(format!("n={n}")), "{id}");
                    own += 1;
                } else {
                    assert!(!traceparent[3..].starts_with(OURS), "{id} was given the trace of another: {traceparent}");
                    assert_eq!(baggage, None, "{id} was given the baggage of another");
                }
            }
            own
        })
    });
    let mut own = 0;
    for task in tasks.collect::<Vec<_>>() {
        own += task.await.expect("no request was given what is another's");
    }
    own
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_traces_at_once_are_kept_apart_within_their_slots() {
    needs_envoy!();
    const TRACES: usize = 10_000;
    const CAPACITY: u64 = 4096;
    let sidecar = Sidecar::start(4, r#"{"bridge": {"capacity": 4096, "ttl": "24h"}}"#).await;
    let clients =
        |listener| -> Vec<Client> { (0..64).map(|_| Client::http1(sidecar.envoy.address(listener))).collect() };
    let (inbound, outbound) = (clients("inbound"), clients("outbound"));

    // All have arrived before the first one leaves: so many are alive at once.
    assert_eq!(exchange_all(&inbound, 0..TRACES, true).await, TRACES);
    let displaced = sidecar.metric("trace.displaced").await;
    let remembered = exchange_all(&outbound, 0..TRACES, false).await as u64;
    assert_eq!(remembered, TRACES as u64 - displaced, "each is remembered that nothing has displaced");
    assert!((CAPACITY / 2..=CAPACITY).contains(&remembered), "{remembered} of {CAPACITY} slots are in use");
    assert_eq!(sidecar.metric("outbound.trace.bridged").await, remembered);
    assert_eq!(sidecar.metric("outbound.trace.missing").await, TRACES as u64);

    // Some arrive while others leave, all over the same slots.
    let arriving = exchange_all(&inbound, TRACES..TRACES + 2_000, true);
    let leaving = exchange_all(&outbound, 0..2_000, false);
    let (arrived, left) = tokio::join!(arriving, leaving);
    assert_eq!(arrived, 2_000);
    assert!(left as u64 <= remembered);
    assert_eq!(sidecar.metric("trace.ambiguous").await, 0);
    for worker in 0..4 {
        // Both listeners count under the address that they were configured with.
        let name = format!("listener.127.0.0.1_0.worker_{worker}.downstream_cx_total");
        assert!(sidecar.envoy.stat(&name).await > Some(0), "{name}");
    }

    // Envoy's memory stays where it is: without a bound, so many traces more would take several megabytes.
    let before = allocated(&sidecar.envoy).await;
    exchange_all(&inbound, 2 * TRACES..3 * TRACES, true).await;
    let after = allocated(&sidecar.envoy).await;
    assert!(after < before + (1 << 20), "from {before} to {after} bytes");
}

/// The bytes that Envoy has allocated.
async fn allocated(envoy: &Envoy) -> u64 {
    let memory = envoy.admin("/memory").await;
    let (_, rest) = memory.split_once("\"allocated\": \"").expect("Envoy tells what it has allocated");
    rest.split_once('"').and_then(|(bytes, _)| bytes.parse().ok()).expect("it is a number")
}
