//! Circuit breakers: open, half-open and closed again, in all workers at once.

use crate::proxy::{Outcome, Proxy, StreamId, exchange, get, value};
use crate::{Start, policy};
use std::time::Duration;

const STATE: &str = "trimtab.policy.p.route.r.breaker.state";
const SECOND: Duration = Duration::from_secs(1);

fn broken(more: &str) -> String {
    let breaker =
        r#"{"errorThresholdPercentage": 50, "volumeThreshold": 10, "resetTimeout": "30s", "halfOpenRequests": 3}"#;
    policy(&format!(r#"{{"name": "r", "circuitBreaker": {breaker}{more}}}"#), "")
}

fn send(proxy: &mut dyn Proxy, count: usize, status: &str) {
    for n in 0..count {
        exchange(proxy, n % 2, &[], status).continued();
    }
}

/// The streams of `count` requests that were let through, and how many others were refused.
fn ask(proxy: &mut dyn Proxy, count: usize) -> (Vec<StreamId>, usize) {
    let asked: Vec<_> = (0..count).map(|n| get(proxy, n % 2, "/", &[])).collect();
    let through = asked.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Continued(_)));
    let through: Vec<StreamId> = through.map(|(stream, _)| *stream).collect();
    let refused = count - through.len();
    (through, refused)
}

fn answer(proxy: &mut dyn Proxy, stream: StreamId, status: &str) {
    proxy.response(stream, &[(":status", status)]);
    proxy.end(stream);
}

pub fn a_breaker_opens_in_all_workers(start: Start) {
    let mut proxy = start(&broken(""));
    send(&mut *proxy, 5, "200");
    send(&mut *proxy, 5, "503");
    for worker in [0, 1] {
        let refused = exchange(&mut *proxy, worker, &[], "200").answered();
        assert_eq!((refused.status, &*refused.details), (503, "trimtab_circuit_open"));
        assert_eq!(value(&refused.headers, "retry-after"), Some("30"));
        assert_eq!(refused.body, "the circuit breaker of route r is open; try again in 30 s");
    }
    let call = exchange(&mut *proxy, 1, &[("content-type", "application/grpc")], "200").answered();
    assert_eq!(call.grpc_status, Some(14));
    assert_eq!(proxy.metric(STATE), 1);
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.breaker.refused"), 3);
    proxy.update(&broken("")).unwrap();
    proxy.advance(Duration::from_millis(29_500));
    let refused = exchange(&mut *proxy, 0, &[], "200").answered();
    assert_eq!(value(&refused.headers, "retry-after"), Some("1"), "an update changes nothing");
}

pub fn half_open_lets_exactly_so_many_through(start: Start) {
    let mut proxy = start(&broken(""));
    send(&mut *proxy, 10, "500");
    proxy.advance(30 * SECOND);
    let (probes, refused) = ask(&mut *proxy, 20);
    assert_eq!((probes.len(), refused), (3, 17));
    assert_eq!(proxy.metric(STATE), 2);
    answer(&mut *proxy, probes[0], "200");
    answer(&mut *proxy, probes[1], "500");
    assert_eq!(proxy.metric(STATE), 1, "one probe failed: open for as long again");
    proxy.advance(29 * SECOND);
    assert_eq!(ask(&mut *proxy, 2).1, 2);
    answer(&mut *proxy, probes[2], "200");
    proxy.advance(2 * SECOND);
    let (probes, _) = ask(&mut *proxy, 4);
    for probe in &probes[..2] {
        answer(&mut *proxy, *probe, "200");
    }
    assert_eq!(ask(&mut *proxy, 2).1, 2, "two of three have shown that it is well");
    answer(&mut *proxy, probes[2], "404");
    assert_eq!(proxy.metric(STATE), 0);
    send(&mut *proxy, 9, "500");
    send(&mut *proxy, 1, "200");
    assert_eq!(ask(&mut *proxy, 1).1, 0, "what was before is forgotten");
}

pub fn a_probe_whose_client_left_is_available_again(start: Start) {
    let mut proxy = start(&broken(""));
    send(&mut *proxy, 10, "500");
    proxy.advance(30 * SECOND);
    let (probes, refused) = ask(&mut *proxy, 4);
    assert_eq!((probes.len(), refused), (3, 1));
    probes.into_iter().for_each(|probe| proxy.end(probe));
    let (probes, refused) = ask(&mut *proxy, 10);
    assert_eq!((probes.len(), refused), (3, 7), "the probes of the clients that left, and no more");
}

pub fn a_probe_that_a_limit_by_subset_refuses_is_available_again(start: Start) {
    let mut proxy = start(&policy(
        r#"{"name": "r", "route": [{"destination": {"host": "h", "subset": "v1"}}],
            "circuitBreaker": {"volumeThreshold": 10, "resetTimeout": "30s"},
            "rateLimits": [{"name": "each", "key": [{"subset": {}}, {"header": "x-user"}],
                            "limit": {"requestsPerUnit": 1, "unit": "hour"}}]}"#,
        "",
    ));
    for n in 0..10 {
        exchange(&mut *proxy, n % 2, &[("x-user", &format!("user-{n}"))], "500").continued();
    }
    let open = exchange(&mut *proxy, 0, &[("x-user", "ann")], "200").answered();
    assert_eq!(open.details, "trimtab_circuit_open");
    proxy.advance(30 * SECOND);
    let refused = exchange(&mut *proxy, 0, &[("x-user", "user-0")], "200").answered();
    assert_eq!(refused.details, "trimtab_rate_limited", "user-0 is over the limit");
    exchange(&mut *proxy, 1, &[("x-user", "ann")], "200").continued();
    exchange(&mut *proxy, 0, &[("x-user", "bob")], "200").continued();
    assert_eq!(proxy.metric(STATE), 0, "the probe of ann closes the circuit");
}

pub fn own_answers_do_not_open_a_breaker(start: Start) {
    let fault =
        r#", "fault": {"abort": {"percentage": {"value": 100}, "httpStatus": 503}, "guard": {"errorRate": "100%"}}"#;
    let mut proxy = start(&broken(fault));
    for n in 0..100 {
        assert_eq!(exchange(&mut *proxy, n % 2, &[], "200").answered().details, "trimtab_fault_abort");
    }
    assert_eq!(proxy.metric(STATE), 0);
}

pub fn a_probe_is_not_faulted(start: Start) {
    // Faults are drawn for half of the requests, so that the other half can open the breaker.
    let fault = r#", "fault": {"abort": {"percentage": {"value": 50}, "httpStatus": 503}, "key": "random",
        "guard": {"minRequests": 1000000}}"#;
    let mut proxy = start(&broken(fault));
    for n in 0..200 {
        exchange(&mut *proxy, n % 2, &[], "500");
    }
    assert_eq!(proxy.metric(STATE), 1);
    for _ in 0..3 {
        proxy.advance(31 * SECOND);
        let (probes, _) = ask(&mut *proxy, 3);
        assert_eq!(probes.len(), 3, "each probe reaches the target");
        probes.into_iter().for_each(|probe| answer(&mut *proxy, probe, "500"));
    }
}

pub fn garbage_opens_nothing(start: Start) {
    let mut proxy = start(&broken(""));
    for garbage in [&b""[..], b"\x01", b"\x02\x01", &[1; 34], &[0xff; 34]] {
        proxy.write_shared("trimtab/1/p/breaker/r", garbage);
        assert_eq!(ask(&mut *proxy, 2).1, 0, "{garbage:?}");
    }
    send(&mut *proxy, 10, "500");
    assert_eq!(ask(&mut *proxy, 2).1, 2, "and it opens all the same");
}
