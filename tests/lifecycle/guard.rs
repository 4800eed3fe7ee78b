//! Experiments that stop: when the target is unwell, when their time is over, when their budget is spent.

use crate::native::Native;
use crate::proxy::{Outcome, Proxy, exchange, get, value};
use crate::{Start, policy};
use proptest::prelude::*;
use std::time::Duration;

const ABORT: &str = r#""abort": {"percentage": {"value": 100}, "httpStatus": 503}"#;
const GUARD: &str = r#""guard": {"errorRate": "20%", "minRequests": 10, "window": "10s", "holdDown": "30s"}"#;
const EXPERIMENT: &str = "trimtab.policy.p.route.experiment";
const SECOND: Duration = Duration::from_secs(1);

/// Faults requests with `x-fault` only; the others are the control sample.
fn experiment(fault: &str, more: &str) -> String {
    policy(
        &format!(
            r#"{{"name": "experiment", "match": [{{"headers": {{"x-fault": {{}}}}}}],
                 "route": [{{"destination": {{"host": "h", "subset": "v1"}}}}],
                 "fault": {{{fault}}}{more}}},
               {{"name": "default", "route": [{{"destination": {{"host": "h", "subset": "v1"}}}}]}}"#
        ),
        "",
    )
}

fn guarded() -> String {
    experiment(&format!("{ABORT}, {GUARD}"), "")
}

fn is_faulted(proxy: &mut dyn Proxy, worker: usize) -> bool {
    matches!(exchange(proxy, worker, &[("x-fault", "")], "200"), Outcome::Answered(_))
}

/// Sends requests that are never faulted, in turn to both workers.
fn control(proxy: &mut dyn Proxy, count: usize, status: &str) {
    for n in 0..count {
        exchange(proxy, n % 2, &[], status).continued();
    }
}

fn state(proxy: &mut dyn Proxy) -> u64 {
    proxy.metric(&format!("{EXPERIMENT}.subset.v1.fault.state"))
}

pub fn injection_stops_in_all_workers_while_the_upstream_fails(start: Start) {
    let mut proxy = start(&guarded());
    control(&mut *proxy, 2, "500");
    control(&mut *proxy, 6, "200");
    assert!(is_faulted(&mut *proxy, 0), "8 requests are too few to tell");
    control(&mut *proxy, 2, "200");
    assert!(!is_faulted(&mut *proxy, 1), "2 of 10 failed, half of them seen by the other worker");
    assert!(!is_faulted(&mut *proxy, 0));
    proxy.advance(Duration::from_millis(29_900));
    control(&mut *proxy, 20, "200");
    assert!(!is_faulted(&mut *proxy, 0), "held down for 30 seconds");
    assert_eq!(state(&mut *proxy), 1);
    assert_eq!(proxy.metric(&format!("{EXPERIMENT}.fault.suspended")), 3);
}

pub fn injection_comes_back_by_a_tenth(start: Start) {
    let mut proxy = start(&guarded());
    control(&mut *proxy, 10, "500");
    assert!(!is_faulted(&mut *proxy, 0));
    proxy.advance(60 * SECOND);
    assert!(!is_faulted(&mut *proxy, 0), "without answers nothing is known");
    control(&mut *proxy, 9, "200");
    proxy.advance(SECOND);
    assert_eq!(state(&mut *proxy), 2, "a tick was enough to see that all is well");
    let probed = (0..1000).filter(|n| is_faulted(&mut *proxy, n % 2)).count();
    assert!((62..=138).contains(&probed), "{probed} of 1000 were faulted, expected a tenth");
    assert_eq!(proxy.metric(&format!("{EXPERIMENT}.fault.probing")), 1000 - probed as u64);

    control(&mut *proxy, 1000, "500");
    assert!((0..100).all(|n| !is_faulted(&mut *proxy, n % 2)), "it is unwell again");
    proxy.advance(59 * SECOND);
    control(&mut *proxy, 20, "200");
    assert_eq!(state(&mut *proxy), 1, "twice as long as before");
    proxy.advance(2 * SECOND);
    assert_eq!(state(&mut *proxy), 2);
    for _ in 0..11 {
        control(&mut *proxy, 10, "200");
        proxy.advance(SECOND);
    }
    assert_eq!(state(&mut *proxy), 0, "armed after a window without an alarm");
    assert!((0..100).all(|n| is_faulted(&mut *proxy, n % 2)));
    assert_eq!(proxy.metric(&format!("{EXPERIMENT}.subset.v1.fault.suspensions")), 2);
}

pub fn the_last_suspension_is_for_good(start: Start) {
    let mut latching = experiment(&format!(r#"{ABORT}, "guard": {{"minRequests": 10, "latchAfter": 1}}"#), "");
    let mut proxy = start(&latching);
    control(&mut *proxy, 20, "500");
    assert!(!is_faulted(&mut *proxy, 0));
    assert_eq!(state(&mut *proxy), 3);
    for _ in 0..40 {
        proxy.advance(SECOND);
        control(&mut *proxy, 20, "200");
    }
    assert!(!is_faulted(&mut *proxy, 1));
    proxy.update(&latching).unwrap();
    assert!(!is_faulted(&mut *proxy, 1), "an update changes nothing");
    latching = latching.replace(r#""abort""#, r#""experiment": "another", "abort""#);
    proxy.update(&latching).unwrap();
    assert!(is_faulted(&mut *proxy, 1), "another experiment has another state");
}

pub fn held_requests_are_let_go_when_the_upstream_fails(start: Start) {
    let delay = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "24h"}"#;
    let mut proxy = start(&experiment(&format!("{delay}, {ABORT}, {GUARD}"), ""));
    let held: Vec<_> = (0..20).map(|n| get(&mut *proxy, n % 2, "/", &[("x-fault", "")])).collect();
    assert!(held.iter().all(|(_, outcome)| *outcome == Outcome::Held));
    proxy.advance(SECOND);
    control(&mut *proxy, 10, "500");
    assert_eq!(proxy.outcome(held[0].0), Outcome::Held, "it is seen at the next tick");
    proxy.advance(Duration::from_millis(200));
    for (stream, _) in held {
        proxy.outcome(stream).continued();
        proxy.end(stream);
    }
}

pub fn an_abort_that_follows_a_delay_is_not_injected_any_more(start: Start) {
    let delay = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "1s"}"#;
    let mut proxy = start(&experiment(&format!("{delay}, {ABORT}, {GUARD}"), ""));
    let (aborted, _) = get(&mut *proxy, 1, "/", &[("x-fault", "")]);
    proxy.advance(Duration::from_millis(500));
    let (spared, _) = get(&mut *proxy, 1, "/", &[("x-fault", "")]);
    proxy.advance(Duration::from_millis(999));
    assert_eq!(proxy.outcome(aborted).answered().status, 503);
    control(&mut *proxy, 10, "500");
    proxy.advance(Duration::from_millis(1));
    proxy.outcome(spared).continued();
}

pub fn a_spared_request_goes_on_as_any_other(start: Start) {
    let delay = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "1s"}"#;
    let faulted = experiment(&format!("{delay}, {ABORT}, {GUARD}"), "");
    let edge = faulted.replacen(r#""routes""#, r#""trace": {}, "cohort": {"accept": "none"}, "routes""#, 1);
    let mut proxy = start(&edge);
    let forged = "\"r\";place=1;weight=1000000;issued=1735689600";
    let headers = [("x-fault", ""), ("traceparent", "00-broken"), ("x-trimtab-cohort", forged)];
    let (spared, _) = get(&mut *proxy, 0, "/", &headers);
    control(&mut *proxy, 10, "500");
    proxy.advance(SECOND);
    let headers = proxy.outcome(spared).continued();
    let traceparent = value(&headers, "traceparent").expect("a trace begins");
    assert!(traceparent.len() == 55 && traceparent != "00-broken", "what is broken is replaced: {traceparent}");
    assert_eq!(value(&headers, "x-trimtab-cohort"), None, "what is forged is dropped");
}

pub fn slow_answers_and_outages_stop_it_too(start: Start) {
    let slow = r#""guard": {"latencyP95": "100ms", "minRequests": 20}"#;
    let mut proxy = start(&experiment(&format!("{ABORT}, {slow}"), ""));
    let answer = |proxy: &mut dyn Proxy, milliseconds| {
        let (stream, _) = get(proxy, 0, "/", &[]);
        proxy.advance(Duration::from_millis(milliseconds));
        proxy.response(stream, &[(":status", "200")]);
        proxy.end(stream);
    };
    (0..19).for_each(|_| answer(&mut *proxy, 100));
    answer(&mut *proxy, 101);
    assert!(is_faulted(&mut *proxy, 0), "1 of 20 is slower than 100 ms: the 95th percentile is not");
    answer(&mut *proxy, 101);
    assert!(!is_faulted(&mut *proxy, 0));

    let mut proxy = start(&guarded());
    proxy.set_property("response.code_details", b"no_healthy_upstream");
    control(&mut *proxy, 1, "503");
    assert!(!is_faulted(&mut *proxy, 1), "one request without a host is enough");
}

pub fn an_experiment_ends_in_time(start: Start) {
    for (fault, begin, end) in [
        (r#""until": "2025-01-01T00:01:00Z""#, 0, 60),
        (r#""lease": {"renewed": "2025-01-01T00:00:10Z", "duration": "1m"}"#, 10, 70),
        (r#""lease": {"renewed": "2025-01-01T00:00:10Z", "duration": "1m"}, "until": "2025-01-01T00:00:40Z""#, 10, 40),
    ] {
        let delay = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "24h"}"#;
        let mut proxy = start(&experiment(&format!("{delay}, {fault}"), ""));
        let mut second = 0;
        let mut last = None;
        for (at, runs) in [(begin, true), (end - 1, true), (end, false)] {
            if at > 0 && second == 0 {
                let (stream, outcome) = get(&mut *proxy, 0, "/", &[("x-fault", "")]);
                assert_eq!(outcome == Outcome::Held, begin == 0, "{fault} at the beginning");
                proxy.end(stream);
            }
            proxy.advance((at - second) * SECOND);
            second = at;
            let (stream, outcome) = get(&mut *proxy, 1, "/", &[("x-fault", "")]);
            assert_eq!(outcome == Outcome::Held, runs, "{fault} after {at} s");
            last = if runs { Some(stream) } else { last };
        }
        proxy.advance(SECOND);
        proxy.outcome(last.unwrap()).continued();
        assert!(proxy.metric(&format!("{EXPERIMENT}.fault.expired")) > 0);
    }
}

pub fn a_budget_is_exact_over_the_workers(start: Start) {
    // A quarter of one in ten: one failure in forty requests.
    let budgeted =
        experiment(&format!(r#"{ABORT}, "guard": {{"budget": "25%"}}"#), r#", "slo": {"availability": "90%"}"#);
    let mut proxy = start(&budgeted);
    let mut faulted = Vec::new();
    for n in 1..=400 {
        if n == 130 {
            proxy.update(&budgeted).unwrap();
        }
        if is_faulted(&mut *proxy, n % 2) {
            faulted.push(n);
        }
    }
    assert_eq!(faulted, [40, 80, 120, 160, 200, 240, 280, 320, 360, 400]);
    assert_eq!(proxy.metric(&format!("{EXPERIMENT}.fault.budget")), 390);
}

pub fn replaced_answers_spend_the_budget(start: Start) {
    let response = r#""response": {"percentage": {"value": 100}, "httpStatus": 503}"#;
    let budgeted = format!(r#"{response}, "maxActive": 1, "guard": {{"budget": "25%"}}"#);
    let mut proxy = start(&experiment(&budgeted, r#", "slo": {"availability": "90%"}"#));
    let mut replaced = Vec::new();
    for n in 1..=120 {
        let (stream, _) = get(&mut *proxy, n % 2, "/", &[("x-fault", "")]);
        if value(&proxy.response(stream, &[(":status", "200")]), ":status") == Some("503") {
            replaced.push(n);
        }
        proxy.end(stream);
    }
    assert_eq!(replaced, [40, 80, 120], "and whom the budget refuses keeps no place");
}

pub fn an_answer_is_not_replaced_once_the_experiment_is_suspended(start: Start) {
    let response = r#""response": {"percentage": {"value": 100}, "httpStatus": 418}"#;
    let mut proxy = start(&experiment(&format!("{response}, {GUARD}"), ""));
    let (replaced, _) = get(&mut *proxy, 0, "/", &[("x-fault", "")]);
    let (spared, _) = get(&mut *proxy, 0, "/", &[("x-fault", "")]);
    assert_eq!(value(&proxy.response(replaced, &[(":status", "200")]), ":status"), Some("418"));
    control(&mut *proxy, 20, "500");
    proxy.advance(SECOND);
    assert_eq!(value(&proxy.response(spared, &[(":status", "200")]), ":status"), Some("200"));
}

pub fn who_is_let_go_gives_back_its_place(start: Start) {
    let delay = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "24h"}"#;
    let capped = format!(r#"{delay}, "maxActive": 3, {GUARD}"#);
    let mut proxy = start(&experiment(&capped, ""));
    let held = |proxy: &mut dyn Proxy| {
        let outcomes: Vec<_> = (0..9).map(|n| get(proxy, n % 2, "/", &[("x-fault", "")]).1).collect();
        outcomes.into_iter().filter(|outcome| *outcome == Outcome::Held).count()
    };
    assert_eq!(held(&mut *proxy), 3);
    control(&mut *proxy, 20, "500");
    proxy.advance(SECOND);
    // Another experiment of the same route, which nothing has suspended.
    proxy.update(&experiment(&format!(r#"{delay}, "maxActive": 3, "experiment": "next""#), "")).unwrap();
    assert_eq!(held(&mut *proxy), 3, "all places are free again");
}

pub fn garbage_is_no_permission(start: Start) {
    let mut proxy = start(&guarded());
    assert!(is_faulted(&mut *proxy, 0));
    for garbage in [&b""[..], b"\x01", b"\x02\0\0\0\0\0\0\0\0\0\0\0", b"\x01\x09\0\0\0\0\0\0\0\0\0\0"] {
        proxy.write_shared("trimtab/1/p/guard/experiment//h_v1", garbage);
        assert!(!is_faulted(&mut *proxy, 1), "{garbage:?}");
        assert!(!is_faulted(&mut *proxy, 0), "{garbage:?}");
    }
}

/// A host of the target answers with `status`.
fn answer_from(proxy: &mut dyn Proxy, address: &str, worker: usize, status: &str) {
    proxy.set_property("upstream.address", address.as_bytes());
    exchange(proxy, worker, &[], status).continued();
}

const EJECTED: &str = "trimtab.policy.p.target.h_v1.ejected_ppm";

pub fn an_outlier_stops_injection_and_comes_back(start: Start) {
    let never = r#""guard": {"errorRate": "100%", "minRequests": 1, "window": "10s", "ejectedPercent": "20%"}"#;
    let detection = r#", "outlierDetection": {"consecutive5xxErrors": 3, "interval": "1s", "baseEjectionTime": "30s"}"#;
    let mut proxy = start(&experiment(&format!("{ABORT}, {never}"), detection));
    proxy.set_property("upstream.num_endpoints", &4_u64.to_le_bytes());
    proxy.set_property("response.code_details", b"via_upstream");
    answer_from(&mut *proxy, "10.0.0.2:80", 0, "200");
    for status in ["500", "500", "200", "500", "500"] {
        answer_from(&mut *proxy, "10.0.0.1:80", 0, status);
        answer_from(&mut *proxy, "10.0.0.2:80", 1, "200");
    }
    assert!(is_faulted(&mut *proxy, 0), "no host has failed three times in a row");
    answer_from(&mut *proxy, "10.0.0.1:80", 1, "500");
    assert!(!is_faulted(&mut *proxy, 0), "one host of four is out, by what both workers saw");
    assert_eq!(proxy.metric(EJECTED), 250_000);
    proxy.advance(29 * SECOND);
    assert_eq!(proxy.metric(EJECTED), 250_000);
    proxy.advance(2 * SECOND);
    assert_eq!(proxy.metric(EJECTED), 0, "its time is over");
    answer_from(&mut *proxy, "10.0.0.1:80", 0, "200");
    proxy.advance(2 * SECOND);
    assert_eq!(state(&mut *proxy), 2, "probing");
}

pub fn a_host_that_fails_now_and_then_is_an_outlier_too(start: Start) {
    let never = r#""guard": {"errorRate": "100%", "minRequests": 1000, "window": "10s", "ejectedPercent": "20%"}"#;
    let detection = r#", "outlierDetection": {"interval": "1s", "failurePercentageThreshold": 20,
        "failurePercentageMinimumHosts": 2, "failurePercentageRequestVolume": 10}"#;
    let mut proxy = start(&experiment(&format!("{ABORT}, {never}"), detection));
    proxy.set_property("upstream.num_endpoints", &4_u64.to_le_bytes());
    proxy.set_property("response.code_details", b"via_upstream");
    for n in 0..10 {
        answer_from(&mut *proxy, "10.0.0.1:80", n % 2, if n % 4 == 0 { "500" } else { "200" });
        answer_from(&mut *proxy, "10.0.0.2:80", n % 2, "200");
    }
    assert!(is_faulted(&mut *proxy, 0), "the interval goes on");
    proxy.advance(SECOND);
    answer_from(&mut *proxy, "10.0.0.2:80", 0, "200");
    assert!(!is_faulted(&mut *proxy, 0), "three of ten answers were errors");
    assert_eq!(proxy.metric(EJECTED), 250_000);
}

/// What Envoy's admin endpoint says of a cluster with so many hosts, the first of them ejected.
fn clusters(name: &str, hosts: usize, ejected: usize) -> String {
    let host = |n| format!(r#"{{"address": {{}}, "health_status": {{"failed_outlier_check": {}}}}}"#, n < ejected);
    let hosts: Vec<String> = (0..hosts).map(host).collect();
    format!(r#"{{"cluster_statuses": [{{"name": "{name}", "host_statuses": [{}]}}]}}"#, hosts.join(", "))
}

fn asking(more: &str) -> String {
    let admin = r#""admin": {"cluster": "prometheus_stats", "interval": "5s"}"#;
    experiment(&format!(r#"{ABORT}, "guard": {{{admin}, "window": "10s"{more}}}"#), "")
}

/// Lets an interval pass, in which one worker asks for all, and answers it.
fn tell(proxy: &mut dyn Proxy, answer: Option<(&str, &[u8])>) {
    proxy.advance(5 * SECOND);
    let calls = proxy.calls();
    assert_eq!(calls.len(), 1, "one worker asks for all: {calls:?}");
    assert_eq!(calls[0].cluster, "prometheus_stats");
    assert_eq!(calls[0].path, "/clusters?format=json&filter=%5E(outbound.80.v1.h)%24");
    proxy.answer_call(&calls[0], answer);
}

pub fn envoys_own_ejections_stop_it(start: Start) {
    let mut proxy = start(&asking(""));
    proxy.add_cluster("prometheus_stats");
    assert!(!is_faulted(&mut *proxy, 0), "nothing is known yet");
    proxy.set_property("xds.cluster_name", b"outbound|80|v1|h");
    exchange(&mut *proxy, 0, &[], "200");
    tell(&mut *proxy, Some(("200", clusters("outbound|80|v1|h", 3, 0).as_bytes())));
    assert!(is_faulted(&mut *proxy, 0) && is_faulted(&mut *proxy, 1), "all workers know from the one that asked");
    tell(&mut *proxy, Some(("200", clusters("outbound|80|v1|h", 3, 1).as_bytes())));
    assert!(!is_faulted(&mut *proxy, 0) && !is_faulted(&mut *proxy, 1), "within one poll");
    assert_eq!(state(&mut *proxy), 1);
    assert_eq!(proxy.metric(EJECTED), 333_333);
    assert_eq!(proxy.metric(&format!("{EXPERIMENT}.fault.unknown")), 1);
}

pub fn an_answer_that_says_nothing_permits_nothing(start: Start) {
    let good = clusters("outbound|80|v1|h", 3, 0);
    let truncated = &good.as_bytes()[..good.len() - 1];
    let huge = format!("{good}{}", " ".repeat(2 << 20));
    let other = clusters("outbound|80|v2|h", 3, 0);
    let empty = clusters("outbound|80|v1|h", 0, 0);
    let bad: [Option<(&str, &[u8])>; 8] = [
        None,
        Some(("503", b"no healthy upstream")),
        Some(("200", b"")),
        Some(("200", b"\xff\x00 not JSON")),
        Some(("200", truncated)),
        Some(("200", huge.as_bytes())),
        Some(("200", other.as_bytes())),
        Some(("200", empty.as_bytes())),
    ];
    for (more, expected) in [("", false), (r#", "onUnknown": "continue""#, true)] {
        let mut proxy = start(&asking(more));
        proxy.add_cluster("prometheus_stats");
        proxy.set_property("xds.cluster_name", b"outbound|80|v1|h");
        exchange(&mut *proxy, 0, &[], "200");
        for answer in bad {
            tell(&mut *proxy, answer);
            assert_eq!(is_faulted(&mut *proxy, 1), expected, "{more} after {:.40?}", answer);
            assert_eq!(proxy.metric("trimtab.policy.p.admin.prometheus_stats.unknown"), 1);
        }
        tell(&mut *proxy, Some(("200", good.as_bytes())));
        assert!(is_faulted(&mut *proxy, 1), "{more}");
        assert_eq!(proxy.metric("trimtab.policy.p.admin.prometheus_stats.unknown"), 0);
        // No answer any more: what was learned grows old.
        proxy.advance(14 * SECOND);
        assert!(is_faulted(&mut *proxy, 0), "not too old yet");
        proxy.advance(2 * SECOND);
        assert_eq!(is_faulted(&mut *proxy, 0), expected, "too old");
    }
    let mut proxy = start(&asking(""));
    exchange(&mut *proxy, 0, &[], "200");
    proxy.advance(60 * SECOND);
    assert_eq!(proxy.calls(), [], "an unknown cluster cannot be called");
    assert!(!is_faulted(&mut *proxy, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the target answers, whenever, in whichever worker: no request is faulted while the experiment is
    /// suspended or latched, and it is armed again by way of probing only.
    #[test]
    fn nothing_is_injected_while_suspended(
        steps in proptest::collection::vec((0..300_u64, 0..2_usize, 0..4_u8, 0..25_usize), 1..60),
    ) {
        let guard = r#""guard": {"errorRate": "20%", "minRequests": 10, "window": "1s", "holdDown": "1s", "latchAfter": 5}"#;
        let mut proxy = Native::start(&experiment(&format!("{ABORT}, {guard}"), ""));
        let proxy = &mut *proxy;
        let mut known = 0;
        for (milliseconds, worker, kind, count) in steps {
            proxy.advance(Duration::from_millis(milliseconds));
            let status = if kind == 0 { "500" } else { "200" };
            for _ in 0..count {
                exchange(proxy, worker, &[], status).continued();
            }
            let was_faulted = is_faulted(proxy, 1 - worker);
            let now = state(proxy);
            prop_assert!(!was_faulted || now == 0 || now == 2, "faulted in state {now}");
            prop_assert!(was_faulted || now != 0, "armed, and not faulted");
            // Two changes may lie within one step: the tick that begins to probe, and the answers after it.
            let allowed = match known {
                0 => [0, 1, 1, 3],
                1 => [1, 2, 1, 3],
                2 => [0, 1, 2, 3],
                _ => [3; 4],
            };
            prop_assert!(allowed.contains(&now), "from {known} to {now}");
            known = now;
        }
    }
}
