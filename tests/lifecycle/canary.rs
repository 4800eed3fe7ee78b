//! Rollouts: stages, the cap on exposure, the judge, and the cohort header.

use crate::proxy::{Outcome, Proxy, exchange, get, value};
use crate::{Start, policy, subset};
use std::time::Duration;

/// The clocks of both proxies begin at 2025-01-01T00:00:00Z.
const STAGES: &str = r#""startTime": "2025-01-01T00:01:00Z",
    "stages": [{"weight": 10, "duration": "1m"}, {"weight": 50, "duration": "1m"}, {"weight": 100}]"#;

const METRICS: &str = "trimtab.policy.p.route.default.rollout";

fn with_rollout(rollout: &str, canary: &str) -> String {
    policy(
        &format!(
            r#"{{"name": "default",
                "route": [{{"destination": {{"host": "h", "subset": "v1"}}, "weight": 50}},
                          {{"destination": {{"host": "h", "subset": "v2"}}, "weight": 50}}],
                "canary": {{"destination": "v2", "rollout": "{rollout}", "key": [{{"header": "x-user"}}], {canary}}}}}"#
        ),
        "",
    )
}

/// Sends a request of each of `users` through both workers in turn; how many go to the canary. It answers `canary`,
/// and the others answer 200.
fn send(proxy: &mut dyn Proxy, users: std::ops::Range<usize>, canary: &str) -> usize {
    let is_canary = |user: &usize| {
        let (stream, outcome) = get(proxy, user % 2, "/", &[("x-user", &format!("user-{user}"))]);
        let is_canary = subset(outcome).as_deref() == Some("v2");
        proxy.response(stream, &[(":status", if is_canary { canary } else { "200" })]);
        proxy.end(stream);
        is_canary
    };
    users.filter(is_canary).count()
}

pub fn stages_follow_the_wall_clock(start: Start) {
    let mut proxy = start(&with_rollout("r", STAGES));
    let share = |proxy: &mut dyn Proxy| send(proxy, 0..400, "200");
    assert_eq!(share(&mut *proxy), 0, "before the start");
    proxy.advance(Duration::from_millis(59_999));
    assert_eq!(share(&mut *proxy), 0);
    proxy.advance(Duration::from_millis(1));
    assert!((25..=55).contains(&share(&mut *proxy)), "10 %");
    assert_eq!(proxy.metric(&format!("{METRICS}.r.weight_ppm")), 100_000);
    proxy.advance(Duration::from_secs(60));
    assert!((170..=230).contains(&share(&mut *proxy)), "50 %");
    proxy.advance(Duration::from_secs(60));
    assert_eq!(share(&mut *proxy), 400);
    proxy.advance(Duration::from_secs(3_600));
    assert_eq!(share(&mut *proxy), 400, "the last stage stays");
}

pub fn a_cap_on_exposure_is_exact(start: Start) {
    let capped = with_rollout("r", r#""maxRequests": 25"#);
    let mut proxy = start(&capped);
    assert_eq!(send(&mut *proxy, 0..300, "200"), 25);
    proxy.update(&capped).unwrap();
    assert_eq!(send(&mut *proxy, 0..300, "200"), 0, "an update does not open it again");
    assert!(proxy.metric(&format!("{METRICS}.r.capped")) > 100);
    proxy.update(&with_rollout("r", r#""maxRequests": 30"#)).unwrap();
    assert_eq!(send(&mut *proxy, 0..300, "200"), 5, "a higher cap goes on from there");
    proxy.update(&with_rollout("another", r#""maxRequests": 25"#)).unwrap();
    assert_eq!(send(&mut *proxy, 0..300, "200"), 25);
}

pub fn a_failing_canary_is_rolled_back_in_all_workers_for_good(start: Start) {
    let judged = with_rollout("r", r#""judge": {}"#);
    let mut proxy = start(&judged);
    // Half of all requests are the canary's, and all of those fail: each doubles the evidence, at the most.
    let exposed = send(&mut *proxy, 0..300, "503");
    assert!((7..=20).contains(&exposed), "{exposed} requests were exposed");
    assert_eq!(proxy.metric(&format!("{METRICS}.r.judge.failed")), 1);
    assert_eq!(proxy.metric(&format!("{METRICS}.r.judge.weight.500000.canary.failures")), exposed as u64);
    assert!(proxy.metric(&format!("{METRICS}.r.judge.against_decibans")) >= 20);
    assert_eq!(send(&mut *proxy, 0..300, "200"), 0);
    proxy.advance(Duration::from_secs(3_600));
    proxy.update(&judged).unwrap();
    assert_eq!(send(&mut *proxy, 0..300, "200"), 0, "an update changes nothing");
    proxy.update(&with_rollout("r.2", r#""judge": {}"#)).unwrap();
    assert!(send(&mut *proxy, 0..300, "200") > 100, "a new rollout has a new chance");
    proxy.update(&judged).unwrap();
    assert_eq!(send(&mut *proxy, 0..300, "200"), 0, "the old one has not");
}

pub fn a_canary_that_breaks_after_good_service_is_rolled_back(start: Start) {
    let judged = with_rollout("r", r#""judge": {}"#);
    let mut proxy = start(&judged);
    let failed = format!("{METRICS}.r.judge.failed");
    // Half of all requests are the canary's. One in fifty fails, and then all of the canary's.
    let mut exposed = 0;
    for n in 0..13_000 {
        let (stream, outcome) = get(&mut *proxy, n % 2, "/", &[("x-user", &format!("user-{n}"))]);
        let is_canary = subset(outcome).as_deref() == Some("v2");
        let breaks = is_canary && n >= 12_000;
        exposed += u32::from(breaks);
        proxy.response(stream, &[(":status", if breaks || n % 50 == 0 { "500" } else { "200" })]);
        proxy.end(stream);
        if n % 1_000 == 0 {
            assert_eq!(proxy.metric(&failed), 0, "after {n} requests");
            proxy.advance(Duration::from_secs(1));
            proxy.update(&judged).unwrap();
        }
    }
    assert_eq!(proxy.metric(&failed), 1);
    assert!((5..=40).contains(&exposed), "{exposed} failed requests; a canary without a past needs 7");
}

pub fn no_worker_sends_another_request_after_the_last_failure(start: Start) {
    let mut proxy = start(&with_rollout("r", r#""judge": {}"#));
    let failed = format!("{METRICS}.r.judge.failed");
    for n in 0..500 {
        let user = [("x-user", format!("user-{n}"))];
        let user = [("x-user", user[0].1.as_str())];
        let (stream, outcome) = get(&mut *proxy, 0, "/", &user);
        let is_canary = subset(outcome).as_deref() == Some("v2");
        let was_failed = proxy.metric(&failed) == 1;
        assert!(!is_canary || !was_failed, "request {n} went to a canary that has failed");
        proxy.response(stream, &[(":status", if is_canary { "500" } else { "200" })]);
        if proxy.metric(&failed) == 1 {
            for worker in [0, 1] {
                assert_eq!(subset(exchange(&mut *proxy, worker, &user, "200")).as_deref(), Some("v1"));
            }
        }
        proxy.end(stream);
    }
    assert_eq!(proxy.metric(&failed), 1);
}

pub fn limits_aborts_and_own_faults_are_no_evidence(start: Start) {
    let requests = format!("{METRICS}.r.judge.weight.500000.canary.requests");
    let failures = format!("{METRICS}.r.judge.weight.500000.canary.failures");
    let mut proxy = start(&with_rollout("r", r#""judge": {}"#));
    send(&mut *proxy, 0..100, "429");
    assert_eq!(proxy.metric(&requests), 0, "answers of a limit");
    for user in 0..100 {
        let (stream, _) = get(&mut *proxy, 0, "/", &[("x-user", &format!("user-{user}"))]);
        proxy.end(stream);
    }
    assert_eq!(proxy.metric(&requests), 0, "clients that went away");
    send(&mut *proxy, 0..20, "404");
    assert!(proxy.metric(&requests) > 0, "an answer");
    assert_eq!(proxy.metric(&failures), 0, "and no failure");

    let faulted = with_rollout("r", r#""judge": {}"#)
        .replace(r#""canary""#, r#""fault": {"abort": {"percentage": {"value": 100}, "httpStatus": 503}}, "canary""#);
    let mut proxy = start(&faulted);
    for user in 0..100 {
        let outcome = exchange(&mut *proxy, 0, &[("x-user", &format!("user-{user}"))], "200");
        assert!(matches!(outcome, Outcome::Answered(_)));
    }
    assert_eq!(proxy.metric(&requests), 0, "faults of our own");
}

pub fn grpc_failures_are_evidence(start: Start) {
    let mut proxy = start(&with_rollout("r", r#""judge": {}"#));
    let mut exposed = 0;
    for user in 0..100 {
        let user = format!("user-{user}");
        let call = [("content-type", "application/grpc"), ("x-user", user.as_str())];
        let (stream, outcome) = get(&mut *proxy, 0, "/", &call);
        let is_canary = subset(outcome).as_deref() == Some("v2");
        exposed += usize::from(is_canary);
        proxy.response(stream, &[(":status", "200")]);
        proxy.response_trailers(stream, &[("grpc-status", if is_canary { "14" } else { "0" })]);
        proxy.end(stream);
    }
    assert!((7..=20).contains(&exposed), "{exposed}");
}

pub fn a_reported_failure_keeps_its_weight_and_enters_no_stage(start: Start) {
    let mut proxy = start(&with_rollout("r", &format!(r#"{STAGES}, "judge": {{"onFail": "report"}}"#)));
    proxy.advance(Duration::from_secs(60));
    let before = send(&mut *proxy, 0..400, "500");
    assert!((25..=55).contains(&before), "10 %: {before}");
    assert_eq!(proxy.metric(&format!("{METRICS}.r.judge.failed")), 1);
    proxy.advance(Duration::from_secs(60));
    assert_eq!(send(&mut *proxy, 0..400, "500"), before, "the same users as before");
    assert_eq!(proxy.metric(&format!("{METRICS}.r.held")), 1);
}

pub fn a_stage_may_wait_for_evidence(start: Start) {
    let mut proxy = start(&with_rollout("r", &format!(r#"{STAGES}, "judge": {{"onInsufficient": "hold"}}"#)));
    proxy.advance(Duration::from_secs(60));
    let first = send(&mut *proxy, 0..400, "200");
    assert!((25..=55).contains(&first), "10 %: {first}");
    proxy.advance(Duration::from_secs(600));
    assert_eq!(send(&mut *proxy, 0..400, "200"), first, "400 answers are insufficient evidence");
    assert_eq!(proxy.metric(&format!("{METRICS}.r.held")), 1);
    for _ in 0..20 {
        send(&mut *proxy, 0..400, "200");
    }
    proxy.advance(Duration::from_secs(2));
    assert_eq!(proxy.metric(&format!("{METRICS}.r.judge.passed")), 1);
    let second = send(&mut *proxy, 0..400, "200");
    assert!((170..=230).contains(&second), "50 %, not yet all: {second}");
    assert_eq!(proxy.metric(&format!("{METRICS}.r.held")), 0);
    proxy.advance(Duration::from_secs(62));
    assert_eq!(send(&mut *proxy, 0..400, "200"), 400);
}

/// A policy whose decisions are carried on, and a rollout `r` that gives the canary `weight`.
fn carrying(weight: u32, canary: &str, more: &str) -> String {
    let stable = 100 - weight;
    policy(
        &format!(
            r#"{{"name": "default",
                "route": [{{"destination": {{"host": "h", "subset": "v1"}}, "weight": {stable}}},
                          {{"destination": {{"host": "h", "subset": "v2"}}, "weight": {weight}}}],
                "canary": {{"destination": "v2", "rollout": "r", "key": [{{"header": "x-user"}}]{canary}}}}}"#
        ),
        &format!(r#", "cohort": {{"signingKeys": [{{"env": "TRIMTAB_COHORT_KEY"}}]}}{more}"#),
    )
}

fn cohort(proxy: &mut dyn Proxy, headers: &[(&str, &str)]) -> (Option<String>, String) {
    let outcome = exchange(proxy, 0, headers, "200");
    let carried = value(&outcome.clone().continued(), "x-trimtab-cohort").unwrap_or_default().to_owned();
    (subset(outcome), carried)
}

pub fn a_decision_is_carried_and_followed(start: Start) {
    let mut edge = start(&carrying(40, "", ""));
    let mut service = start(&carrying(5, "", ""));
    for user in 0..50 {
        let user = format!("user-{user}");
        let (version, carried) = cohort(&mut *edge, &[("x-user", &user)]);
        let (followed, passed_on) = cohort(&mut *service, &[("x-trimtab-cohort", &carried)]);
        assert_eq!(followed, version, "{user}: {carried}");
        assert_eq!(passed_on, carried, "{user}");
        let forged = carried.replace("weight=400000", "weight=1000000");
        let (version, replaced) = cohort(&mut *service, &[("x-user", &user), ("x-trimtab-cohort", &forged)]);
        assert_eq!(version, cohort(&mut *service, &[("x-user", &user)]).0, "{user}: {forged}");
        assert!(replaced.contains(";weight=50000;"), "{user}: {replaced}");
    }
    assert_eq!(service.metric("trimtab.policy.p.cohort.followed"), 50);
    assert_eq!(service.metric("trimtab.policy.p.cohort.forged"), 50);

    let (_, carried) = cohort(&mut *edge, &[("x-user", "ann")]);
    service.advance(Duration::from_secs(301));
    cohort(&mut *service, &[("x-trimtab-cohort", &carried)]);
    assert_eq!(service.metric("trimtab.policy.p.cohort.stale"), 1);
}

pub fn a_failed_canary_overrides_an_inherited_assignment(start: Start) {
    let mut edge = start(&carrying(100 - 1, "", ""));
    let mut service = start(&carrying(50, r#", "judge": {}, "maxRequests": 1000000"#, ""));
    send(&mut *service, 0..400, "500");
    assert_eq!(service.metric(&format!("{METRICS}.r.judge.failed")), 1);
    let everyone = (0..50).map(|user| cohort(&mut *edge, &[("x-user", &format!("user-{user}"))]));
    let canaries: Vec<_> = everyone.filter(|(version, _)| version.as_deref() == Some("v2")).collect();
    assert!(canaries.len() > 40);
    for (_, carried) in canaries {
        let (version, passed_on) = cohort(&mut *service, &[("x-trimtab-cohort", &carried)]);
        assert_eq!(version.as_deref(), Some("v1"), "{carried}");
        assert!(passed_on.contains(";weight=0;"), "later hops get the weight of the rollback: {passed_on}");
    }
}

pub fn a_decision_at_another_weight_is_no_evidence(start: Start) {
    let judged = r#", "judge": {}"#;
    for (weight, expected) in [(50, 20), (40, 0)] {
        let mut edge = start(&carrying(weight, "", ""));
        let mut service = start(&carrying(50, judged, ""));
        for user in 0..20 {
            let (_, carried) = cohort(&mut *edge, &[("x-user", &format!("user-{user}"))]);
            cohort(&mut *service, &[("x-trimtab-cohort", &carried)]);
        }
        let counted = ["canary", "others"]
            .map(|side| service.metric(&format!("{METRICS}.r.judge.weight.500000.{side}.requests")));
        assert_eq!(counted.iter().sum::<u64>(), expected, "decided at {weight} %");
    }
}

pub fn the_bridge_restores_a_dropped_assignment(start: Start) {
    let bridge = r#", "trace": {"direction": "DIRECTION", "bridge": {"carry": ["x-trimtab-cohort"]}}"#;
    let mut proxy = start(&carrying(40, "", &bridge.replace("DIRECTION", "inbound")));
    let outbound = carrying(5, "", &bridge.replace("DIRECTION", "outbound"));
    let mut expected = Vec::new();
    let id = |user: usize| format!("0f0e0d0c-0b0a-4908-8706-{user:012}");
    for user in 0..20 {
        expected.push(cohort(&mut *proxy, &[("x-user", &format!("user-{user}")), ("x-request-id", &id(user))]));
    }
    proxy.update(&outbound).unwrap();
    for (user, expected) in expected.iter().enumerate() {
        assert_eq!(cohort(&mut *proxy, &[("x-request-id", &id(user))]), *expected, "user-{user}");
    }
}

pub fn in_shadow_nothing_changes(start: Start) {
    let plain = with_rollout("r", r#""mode": "enforce""#);
    let mut proxy = start(&plain);
    let expected = send(&mut *proxy, 0..300, "500");
    let shadowed = with_rollout("r", r#""mode": "shadow", "maxRequests": 200, "judge": {}"#);
    let mut proxy = start(&shadowed);
    assert_eq!(send(&mut *proxy, 0..300, "500"), expected);
    assert_eq!(proxy.metric(&format!("{METRICS}.r.judge.failed")), 1, "it would have been rolled back");
    let elsewhere = proxy.metric(&format!("{METRICS}.r.shadow"));
    assert!((expected as u64 - 20..expected as u64).contains(&elsewhere), "{elsewhere} of {expected}");
}

pub fn slowness_is_evidence(start: Start) {
    let slower = |by: u64| {
        let mut proxy = start(&with_rollout("r", r#""judge": {"p99Increase": "50ms"}"#));
        // Before the latency threshold is known, and after.
        for n in 0..3_000_u64 {
            let (stream, outcome) = get(&mut *proxy, 0, "/", &[("x-user", &format!("user-{n}"))]);
            let is_canary = subset(outcome).as_deref() == Some("v2");
            proxy.advance(Duration::from_millis(n % 100 + if is_canary { by } else { 0 }));
            proxy.response(stream, &[(":status", "200")]);
            proxy.end(stream);
        }
        let edge = proxy.metric(&format!("{METRICS}.r.judge.p99_edge_us"));
        assert!((98_000..=113_000).contains(&edge), "{edge}");
        ["failed", "passed"].map(|verdict| proxy.metric(&format!("{METRICS}.r.judge.{verdict}")))
    };
    assert_eq!(slower(10), [0, 1], "failed, passed: no answer is past the threshold");
    assert_eq!(slower(100), [1, 0], "failed, passed");
}

pub fn garbage_is_no_verdict(start: Start) {
    let judged = with_rollout("r", &format!(r#"{STAGES}, "maxRequests": 1000, "judge": {{"onInsufficient": "hold"}}"#));
    for garbage in [&b""[..], b"\x01\x02\xff", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"] {
        let mut proxy = start(&judged);
        for record in ["state", "counts", "restarted"] {
            proxy.write_shared(&format!("trimtab/1/p/rollout/default/0/{record}"), garbage);
        }
        proxy.update(&judged).unwrap();
        proxy.advance(Duration::from_secs(60));
        let exposed = send(&mut *proxy, 0..400, "200");
        assert!((25..=55).contains(&exposed), "10 %: {exposed}");
        proxy.write_shared("trimtab/1/p/rollout/default/0/exposed", garbage);
        assert_eq!(send(&mut *proxy, 0..400, "200"), 0, "without a count no request is exposed");
    }
}

pub fn forged_assignments_of_refused_requests_are_counted(start: Start) {
    let limited = r#""rateLimits": [{"name": "l", "limit": {"requestsPerUnit": 1, "unit": "hour"}}], "canary": "#;
    let mut proxy = start(&carrying(40, "", "").replacen(r#""canary": "#, limited, 1));
    let forged = [("x-user", "ann"), ("x-trimtab-cohort", "\"r\";place=1;weight=1000000;issued=1735689600;sig=\"00\"")];
    exchange(&mut *proxy, 0, &forged, "200").continued();
    let (_, refused) = get(&mut *proxy, 0, "/", &forged);
    assert_eq!(refused.answered().status, 429);
    assert_eq!(proxy.metric("trimtab.policy.p.cohort.forged"), 2);
}
