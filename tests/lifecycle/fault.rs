//! Faults beyond delays and aborts: asked for, capped, replaced, reset, aimed.

use crate::proxy::{Outcome, Proxy, StreamId, exchange, get, value};
use crate::{ABORT, DELAY, Start, faulty, policy};
use std::time::Duration;

fn metric(proxy: &mut dyn Proxy, name: &str) -> u64 {
    proxy.metric(&format!("trimtab.policy.p.route.r.fault.{name}"))
}

pub fn a_delay_is_drawn_from_its_distribution(start: Start) {
    let delay = r#""delay": {"percentage": {"value": 100}, "distribution": {"p50": "100ms", "p100": "1s"}}"#;
    let mut proxy = start(&faulty(delay));
    let streams: Vec<StreamId> = (0..400).map(|n| get(&mut *proxy, n % 2, "/", &[]).0).collect();
    let held = |proxy: &mut dyn Proxy| streams.iter().filter(|stream| proxy.outcome(**stream) == Outcome::Held).count();
    proxy.advance(Duration::from_millis(100));
    // Four standard deviations of 400 draws.
    let left = held(&mut *proxy);
    assert!((160..=240).contains(&left), "{left} of 400 are delayed by more than the median");
    proxy.advance(Duration::from_millis(450));
    let left = held(&mut *proxy);
    assert!((65..=135).contains(&left), "{left} of 400 are delayed by more than half of what lies beyond");
    proxy.advance(Duration::from_millis(450));
    assert_eq!(held(&mut *proxy), 0, "none is delayed by more than the last quantile");
}

pub fn a_trace_is_faulted_alike_everywhere(start: Start) {
    let fault = faulty(
        r#""abort": {"percentage": {"value": 50}, "httpStatus": 503},
           "delay": {"percentage": {"value": 50}, "distribution": {"p50": "100ms", "p99": "1s"}}"#,
    );
    let mut proxy = start(&fault);
    // What becomes of a request of this trace, and after how many steps of 50 ms.
    let mut fate = |id: u32, worker: usize| {
        let traceparent = format!("00-{:032x}-00f067aa0ba902b7-01", u128::from(id) + 1);
        let (stream, mut outcome) = get(&mut *proxy, worker, "/", &[("traceparent", &traceparent)]);
        let mut steps = 0;
        while outcome == Outcome::Held {
            proxy.advance(Duration::from_millis(50));
            outcome = proxy.outcome(stream);
            steps += 1;
        }
        proxy.end(stream);
        (matches!(outcome, Outcome::Answered(_)), steps)
    };
    let first: Vec<(bool, u32)> = (0..40).map(|id| fate(id, 0)).collect();
    let again: Vec<(bool, u32)> = (0..40).map(|id| fate(id, 1)).collect();
    assert_eq!(first, again, "a retry in another worker");
    let aborted = first.iter().filter(|(is_aborted, _)| *is_aborted).count();
    let delayed = first.iter().filter(|(_, steps)| *steps > 0).count();
    assert!((5..=35).contains(&aborted) && (5..=35).contains(&delayed), "{aborted} aborted, {delayed} delayed of 40");
    let mut lengths: Vec<u32> = first.iter().map(|(_, steps)| *steps).collect();
    lengths.sort_unstable();
    lengths.dedup();
    assert!(lengths.len() > 3, "the delays differ from trace to trace: {lengths:?}");
}

const MAY_ASK: &str = r#""headerControl": true,
    "delay": {"percentage": {"value": 100}, "fixedDelay": "1s"}, "abort": {"percentage": {"value": 100}}"#;

pub fn a_request_may_ask_for_a_fault(start: Start) {
    let mut proxy = start(&faulty(MAY_ASK));
    let headers = exchange(&mut *proxy, 0, &[], "200").continued();
    assert_eq!(headers.len(), 4, "who asks for nothing is left alone: {headers:?}");
    let asks = [("x-envoy-fault-abort-request", "418"), ("x-envoy-fault-abort-grpc-request", "8")];
    assert_eq!(exchange(&mut *proxy, 0, &asks, "200").answered().status, 418);
    let call = [("content-type", "application/grpc"), ("x-envoy-fault-abort-grpc-request", "8")];
    assert_eq!(exchange(&mut *proxy, 0, &call, "200").answered().grpc_status, Some(8));

    let (stream, outcome) = get(&mut *proxy, 0, "/", &[("x-envoy-fault-delay-request", "86400000")]);
    assert_eq!(outcome, Outcome::Held);
    proxy.advance(Duration::from_secs(1));
    let headers = proxy.outcome(stream).continued();
    assert_eq!(value(&headers, "x-envoy-fault-delay-request"), Some("86400000"), "as with Envoy it stays");

    for (name, asked) in [
        ("x-envoy-fault-abort-request", "199"),
        ("x-envoy-fault-abort-request", "banana"),
        ("x-envoy-fault-delay-request", "-5"),
        ("x-envoy-fault-delay-request", ""),
    ] {
        exchange(&mut *proxy, 0, &[(name, asked)], "200").continued();
    }
    let never = [("x-envoy-fault-abort-request", "503"), ("x-envoy-fault-abort-request-percentage", "0")];
    exchange(&mut *proxy, 0, &never, "200").continued();
    proxy.update(&faulty(ABORT)).unwrap();
    assert_eq!(exchange(&mut *proxy, 0, &asks, "200").answered().status, 503, "nobody listens without headerControl");
}

pub fn a_request_is_given_no_more_than_is_written(start: Start) {
    let mut proxy = start(&faulty(
        r#""headerControl": true, "key": "random", "abort": {"percentage": {"value": 10}}, "delay": {"percentage": {"value": 0}, "fixedDelay": "1s"}"#,
    ));
    let asks = [
        ("x-envoy-fault-abort-request", "503"),
        ("x-envoy-fault-abort-request-percentage", "100"),
        ("x-envoy-fault-delay-request", "10"),
    ];
    let is_aborted = |_: &usize| matches!(exchange(&mut *proxy, 0, &asks, "200"), Outcome::Answered(_));
    let aborted = (0..1000).filter(is_aborted).count();
    assert!((62..=138).contains(&aborted), "{aborted} of 1000 asked for 100 % of 10 %");
    assert_eq!(metric(&mut *proxy, "delays"), 0);
}

pub fn active_faults_are_capped_over_the_workers(start: Start) {
    let mut proxy = start(&faulty(&format!(r#"{DELAY}, "maxActive": 3"#)));
    let held = |proxy: &mut dyn Proxy, times: usize| {
        let streams = (0..times).map(|n| get(proxy, n % 2, "/", &[]));
        streams.filter(|(_, outcome)| *outcome == Outcome::Held).map(|(stream, _)| stream).collect::<Vec<_>>()
    };
    let first = held(&mut *proxy, 10);
    assert_eq!(first.len(), 3);
    assert_eq!(metric(&mut *proxy, "max_active"), 7);
    proxy.end(first[0]);
    proxy.end(first[1]);
    assert_eq!(held(&mut *proxy, 10).len(), 2, "clients that leave free their slots");
    proxy.advance(Duration::from_millis(250));
    assert_eq!(held(&mut *proxy, 10).len(), 3, "a delay that is over frees its slot, the stream goes on");
    proxy.end(first[2]);
    assert_eq!(held(&mut *proxy, 10).len(), 0, "no slot is given back twice");
}

pub fn a_replaced_answer_has_a_slot_until_its_end(start: Start) {
    let response = r#""response": {"percentage": {"value": 100}, "httpStatus": 503}"#;
    let mut proxy = start(&faulty(&format!(r#"{DELAY}, {response}, "maxActive": 1"#)));
    let (stream, _) = get(&mut *proxy, 0, "/", &[]);
    proxy.advance(Duration::from_millis(250));
    proxy.outcome(stream).continued();
    get(&mut *proxy, 1, "/", &[]).1.continued();
    proxy.response(stream, &[(":status", "200")]);
    get(&mut *proxy, 1, "/", &[]).1.continued();
    proxy.end(stream);
    assert_eq!(get(&mut *proxy, 1, "/", &[]).1, Outcome::Held);
    assert_eq!(metric(&mut *proxy, "responses"), 1);
}

pub fn an_answer_is_replaced(start: Start) {
    let mut proxy = start(&faulty(r#""response": {"percentage": {"value": 100}, "httpStatus": 503}"#));
    let (stream, outcome) = get(&mut *proxy, 0, "/", &[]);
    outcome.continued();
    let headers = proxy.response(stream, &[(":status", "200"), ("content-type", "text/plain")]);
    assert_eq!(value(&headers, ":status"), Some("503"));
    assert_eq!(value(&headers, "x-trimtab-fault"), Some("response"));
    assert_eq!(value(&headers, "content-type"), Some("text/plain"));

    let call = [("content-type", "application/grpc")];
    let (stream, _) = get(&mut *proxy, 0, "/", &call);
    let headers = proxy.response(stream, &[(":status", "200")]);
    assert_eq!(value(&headers, ":status"), Some("200"), "a gRPC call fails in gRPC's own terms");
    let trailers = proxy.response_trailers(stream, &[("grpc-status", "0"), ("grpc-message", "fine")]);
    assert_eq!(value(&trailers, "grpc-status"), Some("14"));
    assert_eq!(value(&trailers, "grpc-message"), Some("fault injected by trimtab"));
    assert_eq!(value(&trailers, "x-trimtab-fault"), Some("response"));
    let (stream, _) = get(&mut *proxy, 0, "/", &call);
    let headers = proxy.response(stream, &[(":status", "404")]);
    assert_eq!(value(&headers, ":status"), Some("503"), "an answer that is no gRPC");
    let (stream, _) = get(&mut *proxy, 0, "/", &call);
    let headers = proxy.response(stream, &[(":status", "200"), ("grpc-status", "5")]);
    assert_eq!(value(&headers, "grpc-status"), Some("14"), "trailers only");

    for status in ["101", "banana"] {
        let (stream, _) = get(&mut *proxy, 0, "/", &[]);
        let headers = proxy.response(stream, &[(":status", status)]);
        assert_eq!(value(&headers, ":status"), Some(status), "left alone");
    }
    assert_eq!(metric(&mut *proxy, "responses"), 4);
    let target = |name: &str| format!("trimtab.policy.p.target.route_r.{name}");
    assert_eq!(proxy.metric(&target("requests")), 5);
    assert_eq!(proxy.metric(&target("failures")), 0, "what the upstream said is learned, not what we made of it");
}

pub fn a_fault_of_another_hop_is_no_failure(start: Start) {
    let mut proxy = start(&faulty(r#""abort": {"percentage": {"value": 0}, "httpStatus": 503}"#));
    let marked = ("x-trimtab-fault", "abort");
    let (stream, _) = get(&mut *proxy, 0, "/", &[]);
    proxy.response(stream, &[(":status", "503"), marked]);
    let (stream, _) = get(&mut *proxy, 0, "/", &[("content-type", "application/grpc")]);
    proxy.response(stream, &[(":status", "200")]);
    proxy.response_trailers(stream, &[("grpc-status", "14"), marked]);
    let target = |name: &str| format!("trimtab.policy.p.target.route_r.{name}");
    assert_eq!(proxy.metric(&target("requests")), 0);
    exchange(&mut *proxy, 0, &[], "503");
    assert_eq!((proxy.metric(&target("requests")), proxy.metric(&target("failures"))), (1, 1));
}

pub fn what_envoy_says_itself_is_not_replaced(start: Start) {
    let mut proxy = start(&faulty(r#""response": {"percentage": {"value": 100}, "httpStatus": 418}"#));
    proxy.set_property("response.code_details", b"upstream_reset_before_response_started");
    let (stream, _) = get(&mut *proxy, 0, "/", &[]);
    assert_eq!(value(&proxy.response(stream, &[(":status", "503")]), ":status"), Some("503"));
    proxy.set_property("response.code_details", b"via_upstream");
    let (stream, _) = get(&mut *proxy, 0, "/", &[]);
    assert_eq!(value(&proxy.response(stream, &[(":status", "503")]), ":status"), Some("418"));
    assert_eq!(metric(&mut *proxy, "responses"), 1);
}

pub fn answers_need_not_be_marked(start: Start) {
    let response = r#""response": {"percentage": {"value": 100}, "httpStatus": 503}"#;
    let mut proxy = start(&faulty(&format!(r#"{response}, "markAnswers": false"#)));
    let (stream, _) = get(&mut *proxy, 0, "/", &[]);
    let headers = proxy.response(stream, &[(":status", "200")]);
    assert_eq!((value(&headers, ":status"), value(&headers, "x-trimtab-fault")), (Some("503"), None));
    proxy.update(&faulty(&format!(r#"{ABORT}, "markAnswers": false"#))).unwrap();
    let reply = exchange(&mut *proxy, 0, &[], "200").answered();
    assert_eq!((value(&reply.headers, "x-trimtab-fault"), &*reply.details), (None, "trimtab_fault_abort"));
}

pub fn an_abort_may_be_a_reset(start: Start) {
    let reset = r#""abort": {"percentage": {"value": 100}, "reset": true}"#;
    let mut proxy = start(&faulty(reset));
    assert_eq!(exchange(&mut *proxy, 0, &[], "200"), Outcome::Reset);
    proxy.update(&faulty(&format!(r#"{DELAY}, {reset}, "maxActive": 1"#))).unwrap();
    for round in 0..3 {
        let (stream, outcome) = get(&mut *proxy, 0, "/", &[]);
        assert_eq!(outcome, Outcome::Held, "round {round}");
        proxy.advance(Duration::from_millis(250));
        assert_eq!(proxy.outcome(stream), Outcome::Reset);
        proxy.end(stream);
    }
    assert_eq!((metric(&mut *proxy, "resets"), metric(&mut *proxy, "aborts")), (4, 0));
}

pub fn only_the_named_are_faulted(start: Start) {
    let spiffe = "connection.uri_san_peer_certificate";
    let mut proxy = start(&policy(
        &format!(
            r#"{{"name": "r",
                "match": [{{"headers": {{"x-to": {{"exact": "v2"}}}}}}],
                "route": [{{"destination": {{"host": "h", "subset": "v1"}}, "weight": 0}},
                          {{"destination": {{"host": "h", "subset": "v2"}}, "weight": 100}}],
                "fault": {{{ABORT}, "destinations": ["v2"],
                    "source": {{"headers": {{"x-team": {{"exact": "chaos"}}}},
                                "properties": {{"{spiffe}": {{"prefix": "spiffe://shop/"}}}}}}}}}},
               {{"name": "others", "route": [{{"destination": {{"host": "h", "subset": "v1"}}}}],
                "fault": {{{ABORT}, "destinations": ["v1"], "source": {{"headers": {{"x-team": {{"exact": "chaos"}}}}}}}}}}"#
        ),
        "",
    ));
    let is_faulted = |proxy: &mut dyn Proxy, headers: &[(&str, &str)]| {
        matches!(exchange(proxy, 0, headers, "200"), Outcome::Answered(_))
    };
    assert!(!is_faulted(&mut *proxy, &[("x-to", "v2"), ("x-team", "chaos")]), "a caller without a certificate");
    proxy.set_property(spiffe, b"spiffe://elsewhere/cart");
    assert!(!is_faulted(&mut *proxy, &[("x-to", "v2"), ("x-team", "chaos")]));
    proxy.set_property(spiffe, b"spiffe://shop/cart");
    assert!(is_faulted(&mut *proxy, &[("x-to", "v2"), ("x-team", "chaos")]));
    assert!(!is_faulted(&mut *proxy, &[("x-to", "v2")]));
    assert!(is_faulted(&mut *proxy, &[("x-team", "chaos")]), "by its header alone, to v1");
    assert_eq!(metric(&mut *proxy, "aborts"), 1);
    assert_eq!(metric(&mut *proxy, "not_drawn"), 0, "whom it is not aimed at is not counted");
}

pub fn every_request_is_counted_once(start: Start) {
    let abort = r#""abort": {"percentage": {"value": 30}, "httpStatus": 503}, "key": "random""#;
    let mut proxy = start(&faulty(abort));
    for n in 0..300 {
        exchange(&mut *proxy, n % 2, &[], "200");
    }
    let (aborts, not_drawn) = (metric(&mut *proxy, "aborts"), metric(&mut *proxy, "not_drawn"));
    assert_eq!(aborts + not_drawn, 300);
    assert!(aborts > 0 && not_drawn > 0);
    proxy.update(&faulty(&format!(r#"{abort}, "mode": "shadow""#))).unwrap();
    for n in 0..300 {
        exchange(&mut *proxy, n % 2, &[], "200").continued();
    }
    assert_eq!(metric(&mut *proxy, "aborts"), aborts);
    assert_eq!(metric(&mut *proxy, "shadow") + metric(&mut *proxy, "not_drawn"), 300 + not_drawn);
}

pub fn a_host_that_is_not_reached_any_more_is_reported(start: Start) {
    let fault = r#""hosts": ["10.0.0.7:80"], "response": {"percentage": {"value": 100}, "httpStatus": 503}"#;
    let mut proxy = start(&faulty(fault));
    exchange(&mut *proxy, 0, &[], "200");
    assert_eq!(metric(&mut *proxy, "experiment.misplaced"), 1, "no upstream filter: no host is known");
    let attempt = |proxy: &mut dyn Proxy, worker: usize, address: &str, attempt: u64| {
        proxy.set_property("upstream.address", address.as_bytes());
        proxy.set_property("upstream.request_attempt_count", &attempt.to_le_bytes());
        proxy.set_property("upstream.num_endpoints", &3_u64.to_le_bytes());
        let (stream, outcome) = get(proxy, worker, "/", &[]);
        outcome.continued();
        let status = value(&proxy.response(stream, &[(":status", "200")]), ":status").unwrap().to_owned();
        proxy.end(stream);
        status
    };
    for n in 0..3 {
        assert_eq!(attempt(&mut *proxy, n % 2, "10.0.0.7:80", 1), "503");
        assert_eq!(attempt(&mut *proxy, n % 2, "10.0.0.8:80", 2), "200");
    }
    for n in 0..28 {
        assert_eq!(attempt(&mut *proxy, n % 2, "10.0.0.9:80", 1), "200");
    }
    let host = |proxy: &mut dyn Proxy, name: &str| metric(proxy, &format!("host.10_0_0_7_80.{name}"));
    assert_eq!(host(&mut *proxy, "ejected"), 0, "29 attempts have passed it by, of three hosts");
    attempt(&mut *proxy, 1, "10.0.0.8:80", 1);
    assert_eq!((host(&mut *proxy, "ejected"), host(&mut *proxy, "errors_until_ejection")), (1, 3));
    proxy.advance(Duration::from_secs(30));
    for n in 0..2 {
        attempt(&mut *proxy, n, "10.0.0.7:80", 1);
    }
    assert_eq!((host(&mut *proxy, "ejected"), host(&mut *proxy, "ejected_ms")), (0, 30_000));
    assert_eq!(host(&mut *proxy, "ejections"), 1);
    for (name, expected) in [("requests", 34), ("retries", 3), ("succeeded", 32), ("masked", 3), ("misplaced", 1)] {
        assert_eq!(metric(&mut *proxy, &format!("experiment.{name}")), expected, "{name}");
    }
    for n in 0..40 {
        attempt(&mut *proxy, n % 2, "10.0.0.9:80", 1);
    }
    assert_eq!((host(&mut *proxy, "ejected"), host(&mut *proxy, "errors_until_ejection")), (1, 2), "since its return");
}
