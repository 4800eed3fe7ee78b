//! Traces: the conformance cases through a sidecar, what is left in filter state, and what forces sampling.

use crate::proxy::{Headers, Outcome, Proxy, exchange, get, value};
use crate::{Start, TRACEPARENT, policy, subset};

#[path = "../conformance/cases.rs"]
mod cases;

/// Envoy's word for a listener's place.
fn listen(proxy: &mut dyn Proxy, direction: i64) {
    proxy.set_property("xds.listener_direction", &direction.to_le_bytes());
}

/// Sends headers as Envoy has them: names in lower case, values without the space around them.
fn send(proxy: &mut dyn Proxy, worker: usize, headers: &[(&str, &str)]) -> cases::Headers {
    let ows = |c| c == ' ' || c == '\t';
    let wire: Vec<(String, &[u8])> =
        headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.trim_matches(ows).as_bytes())).collect();
    let wire: Vec<(&str, &[u8])> = wire.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let (stream, outcome) = proxy.request(worker, &wire);
    proxy.end(stream);
    let text = |value: Vec<u8>| String::from_utf8(value).expect("a case's headers are text");
    outcome.continued().into_iter().map(|(name, value)| (name, text(value))).collect()
}

pub fn the_conformance_cases_pass(start: Start) {
    for copied in [&["x-request-id"][..], &["traceparent"], &["traceparent", "tracestate"]] {
        let mut proxy = start(&policy("", r#", "trace": {"bridge": {}, "sampling": {"percentage": "100%"}}"#));
        let mut requests = 0;
        cases::run(&format!("the application copies {copied:?}"), true, &mut |headers, calls| {
            requests += 1;
            let id = format!("request-{requests}");
            listen(&mut *proxy, 1);
            let arrived = send(&mut *proxy, 0, &[headers, &[("x-request-id", &id)]].concat());
            let copy: Vec<(&str, &str)> = arrived
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_str()))
                .filter(|(name, _)| copied.contains(name))
                .collect();
            // The other worker sends the application's requests.
            listen(&mut *proxy, 2);
            (0..calls).map(|_| send(&mut *proxy, 1, &copy)).collect()
        });
        assert_eq!(proxy.metric("trimtab.policy.p.trace.ambiguous"), 0);
    }
}

const ALL_FORMATS: &str = r#"["tracecontext", "b3", "b3multi", "jaeger", "xray", "gcp", "datadog", "ottrace", "grpc"]"#;

/// A sampling field that its format does not define leaves the trace id alone. Here new decisions are "not sampled".
pub fn an_unusual_sampling_field_keeps_the_trace(start: Start) {
    const HIGH: &str = "4bf92f3577b34da6";
    const NONE: &str = "0000000000000000";
    let trace = format!(r#", "trace": {{"extract": {ALL_FORMATS}, "sampling": {{"percentage": "0%"}}}}"#);
    let mut proxy = start(&policy("", &trace));
    // The headers that are sent; then the high half of the trace id and the flags that are expected.
    let ids = |name: &str, state: &str| (name.to_owned(), format!("4bf92f3577b34da6a3ce929d0e0e4736{state}"));
    let b3multi = |state: &str| {
        let parent_id = ("x-b3-spanid".to_owned(), "00f067aa0ba902b7".to_owned());
        vec![ids("x-b3-traceid", ""), parent_id, ("x-b3-sampled".to_owned(), state.to_owned())]
    };
    let datadog = |priority: &str| {
        [("trace-id", "11803532876627986230"), ("parent-id", "67667974448284343"), ("sampling-priority", priority)]
            .map(|(name, value)| (format!("x-datadog-{name}"), value.to_owned()))
            .to_vec()
    };
    let ottrace = |sampled: &str| {
        [("traceid", "a3ce929d0e0e4736"), ("spanid", "00f067aa0ba902b7"), ("sampled", sampled)]
            .map(|(name, value)| (format!("ot-tracer-{name}"), value.to_owned()))
            .to_vec()
    };
    let xray = |sampled: &str| {
        let value = format!("Root=1-4bf92f35-77b34da6a3ce929d0e0e4736;Parent=00f067aa0ba902b7;Sampled={sampled}");
        vec![("x-amzn-trace-id".to_owned(), value)]
    };
    let grpc = |value: &str| vec![("grpc-trace-bin".to_owned(), value.to_owned())];
    let cases = [
        (vec![ids("b3", "-00f067aa0ba902b7-True")], HIGH, "01"),
        (vec![ids("b3", "-00f067aa0ba902b7-x")], HIGH, "00"),
        (vec![ids("b3", "-00f067aa0ba902b7-")], HIGH, "00"),
        (b3multi("True"), HIGH, "01"),
        (b3multi("d"), HIGH, "01"),
        (b3multi("x"), HIGH, "00"),
        (vec![ids("uber-trace-id", ":00f067aa0ba902b7:0:x")], HIGH, "00"),
        (vec![ids("uber-trace-id", ":00f067aa0ba902b7:0:")], HIGH, "00"),
        (xray("2"), HIGH, "00"),
        (xray(""), HIGH, "00"),
        (vec![ids("x-cloud-trace-context", "/67667974448284343;o=2")], HIGH, "00"),
        (vec![ids("x-cloud-trace-context", "/67667974448284343;o=")], HIGH, "00"),
        (datadog("3"), NONE, "01"),
        (datadog("-2"), NONE, "00"),
        (datadog(""), NONE, "00"),
        (ottrace("True"), NONE, "01"),
        (ottrace("x"), NONE, "00"),
        (grpc("AABL+S81d7NNpqPOkp0ODkc2AQDwZ6oLqQK3"), HIGH, "00"),
        (grpc("AABL+S81d7NNpqPOkp0ODkc2AQDwZ6oLqQK3Ag"), HIGH, "00"),
        (grpc("AABL+S81d7NNpqPOkp0ODkc2AQDwZ6oLqQK3Av8"), HIGH, "01"),
    ];
    for (headers, high, flags) in &cases {
        let sent: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let after = exchange(&mut *proxy, 0, &sent, "200").continued();
        let traceparent = value(&after, "traceparent").unwrap();
        assert_eq!(traceparent[3..35], format!("{high}a3ce929d0e0e4736"), "{sent:?}");
        assert_ne!(traceparent[36..52], *"00f067aa0ba902b7", "{sent:?}");
        assert_eq!(traceparent[53..], **flags, "{sent:?}");
    }
    assert_eq!(proxy.metric("trimtab.policy.p.trace.valid"), cases.len() as u64);
    assert_eq!(proxy.metric("trimtab.policy.p.trace.invalid"), 0);

    // Only W3C Trace Context requires a new trace for unreadable flags.
    let sent = [("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x")];
    let after = exchange(&mut *proxy, 0, &sent, "200").continued();
    assert_ne!(value(&after, "traceparent").unwrap()[3..35], TRACEPARENT[3..35]);
}

pub fn unknown_x_ray_fields_are_kept(start: Start) {
    let mut proxy = start(&policy("", r#", "trace": {"extract": ["xray"], "inject": ["xray", "tracecontext"]}"#));
    let sent = "Self=1-67891234-12456789abcdef012345678;Root=1-4bf92f35-77b34da6a3ce929d0e0e4736;\
                Parent=00f067aa0ba902b7;Sampled=1;Lineage=a87bd80c:1|68fd508a:5;CalledFrom=app";
    let after = exchange(&mut *proxy, 0, &[("x-amzn-trace-id", sent)], "200").continued();
    let parent_id = &value(&after, "traceparent").unwrap()[36..52];
    let expected = format!(
        "Root=1-4bf92f35-77b34da6a3ce929d0e0e4736;Parent={parent_id};Sampled=1;\
         Self=1-67891234-12456789abcdef012345678;Lineage=a87bd80c:1|68fd508a:5;CalledFrom=app"
    );
    assert_eq!(value(&after, "x-amzn-trace-id"), Some(expected.as_str()));

    let mut proxy = start(&policy("", r#", "trace": {"edge": "restart", "extract": ["xray"], "inject": ["xray"]}"#));
    let after = exchange(&mut *proxy, 0, &[("x-amzn-trace-id", sent)], "200").continued();
    let restarted = value(&after, "x-amzn-trace-id").unwrap();
    assert_eq!(restarted.split(';').count(), 3, "a restarting edge keeps no field of the caller: {restarted}");
}

/// Envoy's own tracer writes the headers that it knows, without the fields of others. `edge: restore` writes them as the
/// earlier filter did.
pub fn a_restored_context_keeps_debug_and_foreign_fields(start: Start) {
    const FORMATS: &str = r#"["b3", "xray", "datadog"]"#;
    let block = format!(r#", "trace": {{"extract": {FORMATS}, "inject": {FORMATS}, "filterState": ["context"]}}"#);
    let mut proxy = start(&policy("", &block));
    let sent = [
        ("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-d"),
        ("x-amzn-trace-id", "Root=1-4bf92f35-77b34da6a3ce929d0e0e4736;Lineage=a87bd80c:1"),
        ("x-datadog-trace-id", "1"),
        ("x-datadog-sampling-priority", "2"),
        ("x-datadog-tags", "_dd.p.dm=-4"),
    ];
    let (stream, outcome) = get(&mut *proxy, 0, "/", &sent);
    let decided = outcome.continued();
    let left = proxy.left(stream, "trimtab.context").unwrap();
    proxy.end(stream);
    assert!(value(&decided, "b3").unwrap().ends_with("-d"));
    assert!(value(&decided, "x-amzn-trace-id").unwrap().ends_with(";Lineage=a87bd80c:1"));

    let mut proxy = start(&policy("", &format!(r#", "trace": {{"edge": "restore", "inject": {FORMATS}}}"#)));
    proxy.set_property("trimtab.context", &left);
    let overwritten = [
        ("b3", "11111111111111111111111111111111-2222222222222222-0"),
        ("x-amzn-trace-id", "Root=1-11111111-111111111111111111111111;Parent=2222222222222222;Sampled=0"),
        ("x-datadog-trace-id", "1"),
        ("x-datadog-sampling-priority", "0"),
        ("x-datadog-tags", "_dd.p.dm=-1"),
        ("x-datadog-origin", "rum"),
    ];
    let mut restored = exchange(&mut *proxy, 0, &overwritten, "200").continued();
    let mut expected = decided;
    restored.sort();
    expected.sort();
    assert_eq!(restored, expected);
}

pub fn a_context_is_left_and_restored(start: Start) {
    let mut proxy = start(&policy("", r#", "trace": {"filterState": ["traceId", "context"]}"#));
    let sent = [("traceparent", TRACEPARENT), ("tracestate", "a=1"), ("tracestate", "b=2")];
    let (stream, outcome) = get(&mut *proxy, 0, "/", &sent);
    let decided = value(&outcome.continued(), "traceparent").unwrap().to_owned();
    let left = proxy.left(stream, "trimtab.context").unwrap();
    assert_eq!(String::from_utf8_lossy(&left), format!("{decided} a=1,b=2"));
    assert_eq!(proxy.left(stream, "trimtab.trace_id").unwrap(), TRACEPARENT.as_bytes()[3..35]);
    proxy.end(stream);

    // What the tracer wrote meanwhile is overruled.
    let mut proxy = start(&policy("", r#", "trace": {"edge": "restore"}"#));
    let written = [
        ("traceparent", "00-11111111111111111111111111111111-2222222222222222-00"),
        ("tracestate", "c=3"),
        ("b3", "11111111111111111111111111111111-2222222222222222-0"),
    ];
    let restored = |proxy: &mut dyn Proxy| {
        let headers = exchange(proxy, 0, &written, "200").continued();
        ["traceparent", "tracestate", "b3"].map(|name| value(&headers, name).map(str::to_owned))
    };
    let untouched = written.map(|(_, value)| Some(value.to_owned()));
    assert_eq!(restored(&mut *proxy), untouched, "nothing was left");
    proxy.set_property("trimtab.context", &left);
    assert_eq!(restored(&mut *proxy), [Some(decided.clone()), Some("a=1,b=2".to_owned()), None]);
    proxy.set_property("trimtab.context", decided.as_bytes());
    assert_eq!(restored(&mut *proxy), [Some(decided), None, None]);
    for garbage in [&b""[..], b"00-1", &[0xff; 80], &[b'0'; 55]] {
        proxy.set_property("trimtab.context", garbage);
        assert_eq!(restored(&mut *proxy), untouched, "{garbage:?} was left");
    }
}

/// A trace block that samples nothing but what is forced, and a caller who has decided against it, by a threshold.
fn forced_by(what: &str) -> String {
    format!(r#", "trace": {{"sampling": {{"percentage": "0%", "force": ["{what}"]}}, "filterState": ["context"]}}"#)
}

const UNSAMPLED: [(&str, &str); 2] = [
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),
    ("tracestate", "ot=th:c;rv:0123456789abcd,a=1"),
];

/// Whether a request that goes on is sampled; then, and only then, its threshold is gone.
#[track_caller]
fn is_sampled(headers: &Headers) -> bool {
    let traceparent = value(headers, "traceparent").unwrap();
    let is_sampled = traceparent.ends_with("-01");
    assert!(is_sampled || traceparent.ends_with("-00"), "{traceparent}");
    let expected = if is_sampled { "ot=rv:0123456789abcd,a=1" } else { UNSAMPLED[1].1 };
    assert_eq!(value(headers, "tracestate"), Some(expected));
    is_sampled
}

pub fn a_limit_may_force_sampling(start: Start) {
    let route = |mode| {
        let limit = format!(r#"{{"name": "l", "limit": {{"requestsPerUnit": 1, "unit": "hour"}}, "mode": "{mode}"}}"#);
        format!(r#"{{"name": "r", "rateLimits": [{limit}]}}"#)
    };
    let mut proxy = start(&policy(&route("shadow"), &forced_by("rateLimit")));
    let mut sampled = || is_sampled(&exchange(&mut *proxy, 0, &UNSAMPLED, "200").continued());
    assert_eq!([sampled(), sampled()], [false, true], "the second would have been refused");

    let mut proxy = start(&policy(&route("enforce"), &forced_by("rateLimit")));
    let mut left = || {
        let (stream, outcome) = get(&mut *proxy, 0, "/", &UNSAMPLED);
        let left = proxy.left(stream, "trimtab.context").unwrap();
        proxy.end(stream);
        (matches!(outcome, Outcome::Answered(_)), String::from_utf8(left).unwrap()[53..55].to_owned())
    };
    assert_eq!([left(), left()], [(false, "00".to_owned()), (true, "01".to_owned())]);

    let mut proxy = start(&policy(&route("shadow"), &forced_by("fault")));
    let mut sampled = || is_sampled(&exchange(&mut *proxy, 0, &UNSAMPLED, "200").continued());
    assert_eq!([sampled(), sampled()], [false, false], "only what is named forces");
}

pub fn an_injected_fault_may_force_sampling(start: Start) {
    let route = |mode| {
        let delay = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "1s"}"#;
        format!(r#"{{"name": "r", "fault": {{{delay}, "mode": "{mode}"}}}}"#)
    };
    let mut proxy = start(&policy(&route("enforce"), &forced_by("fault")));
    let (stream, outcome) = get(&mut *proxy, 0, "/", &UNSAMPLED);
    assert_eq!(outcome, Outcome::Held);
    proxy.advance(std::time::Duration::from_secs(1));
    assert!(is_sampled(&proxy.outcome(stream).continued()));
    let mut proxy = start(&policy(&route("shadow"), &forced_by("fault")));
    assert!(!is_sampled(&exchange(&mut *proxy, 0, &UNSAMPLED, "200").continued()), "nothing was done to it");
}

pub fn a_rollback_may_force_sampling(start: Start) {
    let route = r#"{"name": "r",
        "route": [{"destination": {"host": "h", "subset": "v1"}, "weight": 50},
                  {"destination": {"host": "h", "subset": "v2"}, "weight": 50}],
        "canary": {"destination": "v2", "rollout": "r", "key": [{"header": "x-user"}], "judge": {}}}"#;
    let mut proxy = start(&policy(route, &forced_by("rollback")));
    // Where a user is sent, and whether the request is sampled; the canary fails every request.
    let mut send = |user: usize| {
        let user = format!("user-{user}");
        let (stream, outcome) = get(&mut *proxy, 0, "/", &[&UNSAMPLED[..], &[("x-user", &user)]].concat());
        let is_canary = subset(outcome.clone()).as_deref() == Some("v2");
        proxy.response(stream, &[(":status", if is_canary { "503" } else { "200" })]);
        proxy.end(stream);
        (is_canary, is_sampled(&outcome.continued()))
    };
    let before: Vec<_> = (0..4).map(&mut send).collect();
    assert!(before.contains(&(true, false)) && before.contains(&(false, false)), "{before:?}");
    let exposed = (4..300).map(&mut send).filter(|(is_canary, _)| *is_canary).count();
    assert!((1..30).contains(&exposed), "{exposed} requests met the canary before it was rolled back");
    for (user, (was_canary, _)) in before.iter().enumerate() {
        assert_eq!(send(user), (false, *was_canary), "sampled are those whom the rollback has moved");
    }
}
