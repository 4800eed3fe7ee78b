//! Limits that a rate limit service keeps: the calls, what their answers do, and what happens without one.

use crate::proxy::{GrpcCall, Outcome, Proxy, StreamId, get, value};
use crate::{Start, policy};
use std::time::Duration;

/// A policy with one global limit of 1000 a minute for each user.
fn limited(service: &str, more: &str) -> String {
    policy(&format!(r#"{{"name": "r", "rateLimits": [{}]}}"#, limit(service, more)), "")
}

fn limit(service: &str, more: &str) -> String {
    format!(
        r#"{{"name": "fleet", "scope": "global", "limit": {{"requestsPerUnit": 1000, "unit": "minute"}},
             "key": [{{"header": "x-user"}}],
             "service": {{"cluster": "rls", "domain": "shop"{service}}}{more}}}"#
    )
}

fn start_with_service(start: Start, policy: &str) -> Box<dyn Proxy> {
    let mut proxy = start(policy);
    proxy.add_cluster("rls");
    proxy
}

fn ask(proxy: &mut dyn Proxy, worker: usize, user: &str) -> (StreamId, Outcome) {
    get(proxy, worker, "/", &[("x-user", user)])
}

/// Sends a request that has to wait; the call that it waits for is the worker's only one.
#[track_caller]
fn wait(proxy: &mut dyn Proxy, worker: usize, user: &str) -> (StreamId, GrpcCall) {
    let (stream, outcome) = ask(proxy, worker, user);
    assert_eq!(outcome, Outcome::Held);
    let calls = proxy.grpc_calls(worker);
    assert_eq!(calls.len(), 1, "{calls:?}");
    (stream, calls[0].clone())
}

fn metric(proxy: &mut dyn Proxy, name: &str) -> u64 {
    proxy.metric(&format!("trimtab.policy.p.route.r.limit.fleet.{name}"))
}

/// The hits that a call asks for: its last field.
fn hits(call: &GrpcCall) -> u32 {
    let at = call.message.iter().rposition(|byte| *byte == 0x18).expect("hits_addend");
    call.message[at + 1..].iter().rev().fold(0, |sum, byte| sum << 7 | u32::from(byte & 0x7f))
}

fn varint(mut number: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// A response as envoyproxy/ratelimit gives it for a limit of 1000 a minute.
fn response(code: u8, remaining: u32, reset: u32) -> Vec<u8> {
    let duration = [&[8][..], &varint(reset)].concat();
    let remaining = [&[0x18][..], &varint(remaining)].concat();
    let limit = b"\x12\x05\x08\xe8\x07\x10\x02";
    let status = [&[8, code][..], limit, &remaining, &[0x22, duration.len() as u8], &duration].concat();
    [&[8, code, 0x12, status.len() as u8][..], &status].concat()
}

fn ok(remaining: u32, reset: u32) -> Vec<u8> {
    response(1, remaining, reset)
}

fn over(reset: u32) -> Vec<u8> {
    response(2, 0, reset)
}

pub fn a_call_names_the_key_and_its_answer_lets_the_request_go_on(start: Start) {
    let mut proxy = start_with_service(start, &limited("", ""));
    let (stream, call) = wait(&mut *proxy, 0, "ann");
    assert_eq!(call.cluster, "rls");
    assert_eq!(call.path, "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit");
    assert_eq!(call.timeout, Duration::from_millis(20));
    assert_eq!(call.message, b"\x0a\x04shop\x12\x0f\x0a\x0d\x0a\x06x-user\x12\x03ann\x18\x01");
    proxy.answer_grpc_call(0, call.id, 0, &ok(999, 30));
    let headers = proxy.outcome(stream).continued();
    assert_eq!(value(&headers, "x-user"), Some("ann"));
    assert_eq!(metric(&mut *proxy, "service.calls"), 1);
    assert_eq!(proxy.grpc_calls(0), []);
    let (_, call) = wait(&mut *proxy, 0, "bob");
    assert!(call.message.ends_with(b"bob\x18\x01"), "another user, another call: {:?}", call.message);
}

pub fn one_call_serves_those_who_wait_together(start: Start) {
    let mut proxy = start_with_service(start, &limited(r#", "batch": 1"#, ""));
    let (first, call) = wait(&mut *proxy, 0, "ann");
    let others: Vec<StreamId> = (0..4).map(|_| wait(&mut *proxy, 0, "ann").0).collect();
    proxy.answer_grpc_call(0, call.id, 0, &ok(999, 30));
    proxy.outcome(first).continued();
    let call = proxy.grpc_calls(0).remove(0);
    assert_eq!(hits(&call), 4, "as many as wait");
    proxy.answer_grpc_call(0, call.id, 0, &ok(995, 30));
    for stream in others {
        proxy.outcome(stream).continued();
    }
    assert_eq!(proxy.grpc_calls(0), []);
    assert_eq!(metric(&mut *proxy, "service.calls"), 2);
}

/// Sends requests of ann to both workers in turn and answers each call out of what is left of 1000, until `requests`
/// were admitted; how many calls it took.
fn serve(proxy: &mut dyn Proxy, requests: u32, left: &mut u32) -> u32 {
    let mut calls = 0;
    for n in 0..requests {
        let worker = n as usize % 2;
        let (stream, outcome) = ask(proxy, worker, "ann");
        if outcome == Outcome::Held {
            let call = proxy.grpc_calls(worker).remove(0);
            *left -= hits(&call);
            calls += 1;
            proxy.answer_grpc_call(worker, call.id, 0, &ok(*left, 30));
        }
        proxy.outcome(stream).continued();
    }
    calls
}

pub fn hits_are_charged_ahead_and_shared_by_all_workers(start: Start) {
    let mut proxy = start_with_service(start, &limited(r#", "batch": 100"#, ""));
    let mut left = 1000;
    let calls = serve(&mut *proxy, 1000, &mut left);
    assert_eq!(left, 0, "every hit was for a request");
    // 1, 2, 4, .. 64, then 100 until an eighth of what is left is less.
    assert!(calls <= 60, "{calls} calls");
    let (stream, call) = wait(&mut *proxy, 1, "ann");
    assert_eq!(hits(&call), 1);
    proxy.answer_grpc_call(1, call.id, 0, &over(30));
    assert_eq!(proxy.outcome(stream).answered().status, 429);
}

pub fn hits_are_not_spent_in_another_window(start: Start) {
    let mut proxy = start_with_service(start, &limited(r#", "batch": 100"#, ""));
    let mut left = 1000;
    serve(&mut *proxy, 4, &mut left);
    assert_eq!(left, 1000 - 7, "three are ahead");
    // The service told 30 seconds, rounded up: after 29 the next window may have begun.
    proxy.advance(Duration::from_millis(28_999));
    ask(&mut *proxy, 0, "ann").1.continued();
    proxy.advance(Duration::from_millis(1));
    let (_, call) = wait(&mut *proxy, 0, "ann");
    assert_eq!(hits(&call), 1);
    proxy.answer_grpc_call(0, call.id, 0, &ok(999, 60));
    // In a window's first second the hit may have been charged to the window before.
    let (_, call) = wait(&mut *proxy, 0, "ann");
    proxy.answer_grpc_call(0, call.id, 0, &ok(997, 60));
    let (_, call) = wait(&mut *proxy, 1, "ann");
    assert_eq!(hits(&call), 2, "now the window is known");
    proxy.answer_grpc_call(1, call.id, 0, &ok(995, 60));
    ask(&mut *proxy, 0, "ann").1.continued();
}

pub fn what_is_over_is_remembered_until_its_reset(start: Start) {
    let mut proxy = start_with_service(start, &limited("", ""));
    let (first, call) = wait(&mut *proxy, 0, "ann");
    let (second, _) = wait(&mut *proxy, 0, "ann");
    proxy.answer_grpc_call(0, call.id, 0, &over(10));
    for stream in [first, second] {
        let reply = proxy.outcome(stream).answered();
        assert_eq!((reply.status, value(&reply.headers, "retry-after")), (429, Some("10")));
        assert_eq!(reply.body, "rate limit fleet exceeded: 1000 requests a minute; retry in 10 s");
    }
    proxy.advance(Duration::from_millis(8_999));
    let reply = ask(&mut *proxy, 1, "ann").1.answered();
    assert_eq!(value(&reply.headers, "retry-after"), Some("2"), "never before the reset");
    proxy.advance(Duration::from_millis(1));
    let (_, call) = wait(&mut *proxy, 1, "ann");
    proxy.answer_grpc_call(1, call.id, 0, &over(1));
    proxy.advance(Duration::from_millis(49));
    ask(&mut *proxy, 0, "ann").1.answered();
    proxy.advance(Duration::from_millis(1));
    wait(&mut *proxy, 0, "ann");
    assert_eq!(metric(&mut *proxy, "refused"), 5);
    assert_eq!(metric(&mut *proxy, "service.calls"), 3);
}

pub fn a_batch_that_is_too_large_is_followed_by_a_single_hit(start: Start) {
    let mut proxy = start_with_service(start, &limited(r#", "batch": 100"#, ""));
    let mut left = 1000;
    serve(&mut *proxy, 7, &mut left);
    let (stream, call) = wait(&mut *proxy, 0, "ann");
    assert_eq!(hits(&call), 8);
    proxy.answer_grpc_call(0, call.id, 0, &over(30));
    assert_eq!(proxy.outcome(stream), Outcome::Held);
    let call = proxy.grpc_calls(0).remove(0);
    assert_eq!(hits(&call), 1);
    proxy.answer_grpc_call(0, call.id, 0, &ok(0, 30));
    proxy.outcome(stream).continued();
}

pub fn a_service_that_fails_is_counted_and_the_policy_decides(start: Start) {
    let failures: [(u32, &[u8]); 6] = [
        (14, b"no healthy upstream"),
        (14, b"upstream request timeout{response_timeout}"),
        (4, b""),
        (0, b"\xff\xff"),
        (0, b""),
        (0, b"\x08\x07"),
    ];
    for (on_failure, status) in [("allow", None), ("deny", Some(503))] {
        let mut proxy = start_with_service(start, &limited(&format!(r#", "onFailure": "{on_failure}""#), ""));
        for (code, message) in failures {
            let (stream, call) = wait(&mut *proxy, 0, "ann");
            proxy.answer_grpc_call(0, call.id, code, message);
            match (proxy.outcome(stream), status) {
                (Outcome::Continued(_), None) => {}
                (Outcome::Answered(reply), Some(status)) => {
                    assert_eq!((reply.status, &*reply.details), (status, "trimtab_rate_limit_service"));
                    assert_eq!(reply.body, "rate limit fleet: its service does not answer");
                }
                (outcome, _) => panic!("{on_failure}, {code}, {message:?}: {outcome:?}"),
            }
        }
        for (name, count) in [("status", 1), ("timeout", 2), ("garbage", 1), ("unknown_code", 2), ("undecided", 6)] {
            assert_eq!(metric(&mut *proxy, &format!("service.{name}")), count, "{name}");
        }
        assert_eq!(metric(&mut *proxy, "refused"), if status.is_some() { 6 } else { 0 });
    }
}

pub fn an_unknown_cluster_is_a_failure_like_any_other(start: Start) {
    let mut proxy = start(&limited(r#", "onFailure": "deny""#, ""));
    assert_eq!(ask(&mut *proxy, 0, "ann").1.answered().status, 503);
    let (_, outcome) = get(&mut *proxy, 0, "/", &[("x-user", "ann"), ("content-type", "application/grpc")]);
    assert_eq!(outcome.answered().grpc_status, Some(14), "UNAVAILABLE");
    assert_eq!(metric(&mut *proxy, "service.unreachable"), 2);
    assert_eq!(metric(&mut *proxy, "service.calls"), 0);
}

pub fn a_local_limit_takes_over(start: Start) {
    let mut proxy = start_with_service(
        start,
        &policy(
            r#"{"name": "r", "rateLimits": [{"name": "fleet", "scope": "global",
                "limit": {"requestsPerUnit": 3, "unit": "minute"},
                "service": {"cluster": "rls", "domain": "shop", "onFailure": "local"}}]}"#,
            "",
        ),
    );
    let mut admitted = 0;
    for n in 0..5 {
        let worker = n % 2;
        let (stream, call) = wait(&mut *proxy, worker, "");
        assert!(call.message.ends_with(b"\x0a\x0bgeneric_key\x12\x05fleet\x18\x01"), "{:?}", call.message);
        proxy.answer_grpc_call(worker, call.id, 14, b"");
        match proxy.outcome(stream) {
            Outcome::Continued(_) => admitted += 1,
            outcome => assert_eq!(value(&outcome.answered().headers, "retry-after"), Some("20")),
        }
    }
    assert_eq!(admitted, 3);
}

/// Two global limits behind a local one, and the calls for them.
fn several(start: Start) -> Box<dyn Proxy> {
    let second = limit("", "").replace("fleet", "second").replace("shop", "mall");
    let limits = format!(
        r#"{{"name": "own", "limit": {{"requestsPerUnit": 2, "unit": "hour"}}}}, {}, {second}"#,
        limit(r#", "batch": 1"#, "")
    );
    start_with_service(start, &policy(&format!(r#"{{"name": "r", "rateLimits": [{limits}]}}"#), ""))
}

pub fn what_is_refused_globally_is_charged_nowhere(start: Start) {
    let mut proxy = several(start);
    let (stream, call) = wait(&mut *proxy, 0, "ann");
    proxy.answer_grpc_call(0, call.id, 0, &ok(999, 30));
    assert_eq!(proxy.outcome(stream), Outcome::Held, "the second is asked now");
    let call = proxy.grpc_calls(0).remove(0);
    assert!(call.message.starts_with(b"\x0a\x04mall"));
    proxy.answer_grpc_call(0, call.id, 0, &over(30));
    assert!(proxy.outcome(stream).answered().body.starts_with("rate limit second exceeded"));

    // The first one's hit is there again, for as often as the second refuses: from what it knows.
    for worker in [0, 1, 0] {
        assert!(ask(&mut *proxy, worker, "ann").1.answered().body.starts_with("rate limit second exceeded"));
    }
    assert_eq!(metric(&mut *proxy, "service.calls"), 1);
    // And so is the local limit's whole allowance.
    proxy.advance(Duration::from_secs(29));
    for _ in 0..2 {
        let (stream, _) = ask(&mut *proxy, 0, "ann");
        while let Some(call) = proxy.grpc_calls(0).pop() {
            proxy.answer_grpc_call(0, call.id, 0, &ok(900, 30));
        }
        proxy.outcome(stream).continued();
    }
    assert_eq!(ask(&mut *proxy, 0, "ann").1.answered().body.split(':').next(), Some("rate limit own exceeded"));
}

pub fn who_leaves_while_waiting_is_not_charged(start: Start) {
    let mut proxy = several(start);
    for _ in 0..5 {
        let (stream, _) = wait(&mut *proxy, 0, "ann");
        proxy.end(stream);
    }
    assert_eq!(metric(&mut *proxy, "service.gone"), 5);
    let call = proxy.grpc_calls(0).remove(0);
    proxy.answer_grpc_call(0, call.id, 0, &ok(999, 30));
    let (stream, call) = wait(&mut *proxy, 0, "ann");
    assert!(call.message.starts_with(b"\x0a\x04mall"), "the hit that nobody waited for any more is ahead");
    proxy.answer_grpc_call(0, call.id, 0, &ok(999, 30));
    proxy.outcome(stream).continued();
}

pub fn a_request_that_waited_is_decided_on_like_any_other(start: Start) {
    let route = format!(
        r#"{{"name": "r", "rateLimits": [{}],
            "route": [{{"destination": {{"host": "h", "subset": "v2"}}}}],
            "fault": {{"delay": {{"percentage": {{"value": 100}}, "fixedDelay": "250ms"}}}}}}"#,
        limit("", "")
    );
    let trace = r#", "trace": {"response": "traceresponse"}"#;
    let mut proxy = start_with_service(start, &policy(&route, trace));
    let (stream, call) = wait(&mut *proxy, 0, "ann");
    assert_eq!(proxy.metric("trimtab.policy.p.trace.missing"), 0, "not decided yet");
    proxy.answer_grpc_call(0, call.id, 0, &ok(999, 30));
    assert_eq!(proxy.outcome(stream), Outcome::Held, "for the delay now");
    proxy.advance(Duration::from_millis(250));
    let headers = proxy.outcome(stream).continued();
    assert_eq!(value(&headers, "x-trimtab-subset"), Some("v2"));
    assert!(value(&headers, "traceparent").is_some());
    assert_eq!(proxy.metric("trimtab.policy.p.trace.missing"), 1);
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.subset.v2.requests"), 1);
    proxy.response(stream, &[(":status", "200")]);
    proxy.end(stream);
}

pub fn what_is_held_for_an_answer_is_let_go_with_who_waited(start: Start) {
    let own = r#"{"name": "own", "limit": {"requestsPerUnit": 1, "unit": "hour"},
                  "charge": {"onResponse": {"statuses": [401]}}, "response": {"enableXRatelimitHeaders": "DRAFT_VERSION_03"}}"#;
    let limits = format!("{own}, {}", limit(r#", "batch": 1"#, ""));
    let route = format!(r#"{{"name": "r", "rateLimits": [{limits}]}}"#);
    let mut proxy = start_with_service(start, &policy(&route, ""));

    let (left, _) = wait(&mut *proxy, 0, "ann");
    proxy.end(left);
    let (refused, call) = wait(&mut *proxy, 0, "ann");
    proxy.answer_grpc_call(0, call.id, 0, &over(30));
    let reply = proxy.outcome(refused).answered();
    assert!(reply.body.starts_with("rate limit fleet exceeded"), "{reply:?}");
    assert_eq!(proxy.response(refused, &[(":status", "429")]).len(), 1, "nothing is told of what was given back");
    proxy.end(refused);

    proxy.advance(Duration::from_secs(30));
    for status in ["200", "401"] {
        let (stream, call) = wait(&mut *proxy, 0, "ann");
        assert!(ask(&mut *proxy, 0, "ann").1.answered().body.starts_with("rate limit own exceeded"), "one is held");
        proxy.answer_grpc_call(0, call.id, 0, &ok(999, 30));
        proxy.outcome(stream).continued();
        let told = proxy.response(stream, &[(":status", status)]);
        assert_eq!(value(&told, "x-ratelimit-remaining"), Some("0"), "{told:?}");
        proxy.end(stream);
    }
    assert!(ask(&mut *proxy, 0, "ann").1.answered().body.starts_with("rate limit own exceeded"), "401 counts");
}

pub fn who_waits_takes_no_probe_of_the_breaker(start: Start) {
    let breaker =
        r#"{"errorThresholdPercentage": 50, "volumeThreshold": 10, "resetTimeout": "30s", "halfOpenRequests": 3}"#;
    let route =
        format!(r#"{{"name": "r", "circuitBreaker": {breaker}, "rateLimits": [{}]}}"#, limit(r#", "batch": 1"#, ""));
    let mut proxy = start_with_service(start, &policy(&route, ""));
    let settled = |proxy: &mut dyn Proxy| {
        let (stream, call) = wait(proxy, 0, "ann");
        proxy.answer_grpc_call(0, call.id, 0, &ok(900, 30));
        stream
    };
    for _ in 0..10 {
        let stream = settled(&mut *proxy);
        proxy.outcome(stream).continued();
        proxy.response(stream, &[(":status", "503")]);
        proxy.end(stream);
    }
    let refused = settled(&mut *proxy);
    assert_eq!(proxy.outcome(refused).answered().details, "trimtab_circuit_open");
    proxy.advance(Duration::from_secs(31));
    for _ in 0..4 {
        let (stream, _) = wait(&mut *proxy, 0, "ann");
        proxy.end(stream);
    }
    let call = proxy.grpc_calls(0).remove(0);
    proxy.answer_grpc_call(0, call.id, 0, &over(1));
    proxy.advance(Duration::from_secs(2));
    for probe in 0..3 {
        let stream = settled(&mut *proxy);
        assert!(matches!(proxy.outcome(stream), Outcome::Continued(_)), "probe {probe}");
    }
    let fourth = settled(&mut *proxy);
    assert_eq!(proxy.outcome(fourth).answered().details, "trimtab_circuit_open");
}

pub fn the_choice_outlasts_the_wait(start: Start) {
    let by_subset = |text: String| text.replace(r#"{"header": "x-user"}"#, r#"{"subset": {}}"#);
    let route = format!(
        r#"{{"name": "r", "rateLimits": [{}, {}],
            "route": [{{"destination": {{"host": "h", "subset": "v1"}}, "weight": 50}},
                      {{"destination": {{"host": "h", "subset": "v2"}}, "weight": 50}}],
            "canary": {{"destination": "v2", "rollout": "r"}}}}"#,
        r#"{"name": "own", "limit": {"requestsPerUnit": 15, "unit": "hour"}, "key": [{"subset": {}}]}"#,
        by_subset(limit(r#", "batch": 1"#, "")),
    );
    let mut proxy = start_with_service(start, &policy(&route, ""));
    for n in 0..16 {
        let (stream, call) = wait(&mut *proxy, n % 2, "ann");
        let message = String::from_utf8_lossy(&call.message).into_owned();
        proxy.answer_grpc_call(n % 2, call.id, 0, &ok(900, 30));
        let headers = proxy.outcome(stream).continued();
        let subset = value(&headers, "x-trimtab-subset").expect("it is steered");
        assert!(message.contains(subset), "asked about {message:?}, sent to {subset}");
    }
    let requests =
        |proxy: &mut dyn Proxy, subset| proxy.metric(&format!("trimtab.policy.p.route.r.subset.{subset}.requests"));
    let (v1, v2) = (requests(&mut *proxy, "v1"), requests(&mut *proxy, "v2"));
    assert!(v1 > 0 && v2 > 0 && v1 + v2 == 16, "{v1} and {v2}");
}

pub fn values_that_are_no_text_cannot_pass_a_limit_by(start: Start) {
    let mut proxy = start_with_service(start, &limited("", ""));
    let large = vec![b'x'; 60_000];
    for user in [&b"\xff\xfe"[..], &large] {
        let (stream, outcome) = proxy.request(0, &[(":path", b"/"), ("x-user", user)]);
        assert_eq!(outcome, Outcome::Held);
        let call = proxy.grpc_calls(0).remove(0);
        let message = String::from_utf8(call.message.clone()).expect("only text goes out");
        assert!(message.contains("xxh64:") && message.len() < 80, "{message:?}");
        proxy.answer_grpc_call(0, call.id, 0, &over(30));
        proxy.outcome(stream).answered();
    }
}

pub fn garbage_among_the_hits_is_counted_and_replaced(start: Start) {
    let unkeyed = limited("", "").replace(r#""key": [{"header": "x-user"}],"#, "");
    let mut proxy = start_with_service(start, &unkeyed);
    proxy.write_shared("trimtab/1/p/limit/r/fleet/quota/00000000", b"not ours");
    let (stream, call) = wait(&mut *proxy, 0, "");
    proxy.answer_grpc_call(0, call.id, 0, &over(30));
    proxy.outcome(stream).answered();
    ask(&mut *proxy, 1, "").1.answered();
    assert_eq!(proxy.metric("trimtab.policy.p.state.garbage"), 1);
}

pub fn in_shadow_a_global_limit_only_counts(start: Start) {
    let mut proxy = start_with_service(start, &limited("", r#", "mode": "shadow""#));
    let (stream, call) = wait(&mut *proxy, 0, "ann");
    proxy.answer_grpc_call(0, call.id, 0, &over(30));
    proxy.outcome(stream).continued();
    ask(&mut *proxy, 1, "ann").1.continued();
    assert_eq!(metric(&mut *proxy, "refused"), 2);
}

pub fn an_update_does_not_lose_who_waits(start: Start) {
    let mut proxy = start_with_service(start, &limited(r#", "batch": 100"#, ""));
    let mut left = 1000;
    serve(&mut *proxy, 4, &mut left);
    proxy.update(&limited(r#", "batch": 100"#, "")).unwrap();
    for _ in 0..3 {
        ask(&mut *proxy, 0, "ann").1.continued();
    }
    let (stream, call) = wait(&mut *proxy, 1, "ann");
    proxy.answer_grpc_call(1, call.id, 0, &ok(left, 30));
    proxy.outcome(stream).continued();
}
