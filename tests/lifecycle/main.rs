//! The lifecycle table: what happens to requests, from their head to their end. Every case runs twice, natively on the
//! simulated host and in the module that ships.

mod breaker;
mod canary;
mod fault;
mod global;
mod guard;
mod limits;
mod native;
mod proxy;
mod trace;
mod wasm;

use breaker::{
    a_breaker_opens_in_all_workers, a_probe_is_not_faulted, a_probe_that_a_limit_by_subset_refuses_is_available_again,
    a_probe_whose_client_left_is_available_again, garbage_opens_nothing, half_open_lets_exactly_so_many_through,
    own_answers_do_not_open_a_breaker,
};
use canary::{
    a_canary_that_breaks_after_good_service_is_rolled_back, a_cap_on_exposure_is_exact,
    a_decision_at_another_weight_is_no_evidence, a_decision_is_carried_and_followed,
    a_failed_canary_overrides_an_inherited_assignment, a_failing_canary_is_rolled_back_in_all_workers_for_good,
    a_reported_failure_keeps_its_weight_and_enters_no_stage, a_stage_may_wait_for_evidence,
    forged_assignments_of_refused_requests_are_counted, garbage_is_no_verdict, grpc_failures_are_evidence,
    in_shadow_nothing_changes, limits_aborts_and_own_faults_are_no_evidence,
    no_worker_sends_another_request_after_the_last_failure, slowness_is_evidence, stages_follow_the_wall_clock,
    the_bridge_restores_a_dropped_assignment,
};
use fault::{
    a_delay_is_drawn_from_its_distribution, a_fault_of_another_hop_is_no_failure,
    a_host_that_is_not_reached_any_more_is_reported, a_replaced_answer_has_a_slot_until_its_end,
    a_request_is_given_no_more_than_is_written, a_request_may_ask_for_a_fault, a_trace_is_faulted_alike_everywhere,
    active_faults_are_capped_over_the_workers, an_abort_may_be_a_reset, an_answer_is_replaced,
    answers_need_not_be_marked, every_request_is_counted_once, only_the_named_are_faulted,
    what_envoy_says_itself_is_not_replaced,
};
use global::{
    a_batch_that_is_too_large_is_followed_by_a_single_hit, a_call_names_the_key_and_its_answer_lets_the_request_go_on,
    a_local_limit_takes_over, a_request_that_waited_is_decided_on_like_any_other,
    a_service_that_fails_is_counted_and_the_policy_decides, an_unknown_cluster_is_a_failure_like_any_other,
    an_update_does_not_lose_who_waits, garbage_among_the_hits_is_counted_and_replaced,
    hits_are_charged_ahead_and_shared_by_all_workers, hits_are_not_spent_in_another_window,
    in_shadow_a_global_limit_only_counts, one_call_serves_those_who_wait_together, the_choice_outlasts_the_wait,
    values_that_are_no_text_cannot_pass_a_limit_by, what_is_held_for_an_answer_is_let_go_with_who_waited,
    what_is_over_is_remembered_until_its_reset, what_is_refused_globally_is_charged_nowhere,
    who_leaves_while_waiting_is_not_charged, who_waits_takes_no_probe_of_the_breaker,
};
use guard::{
    a_budget_is_exact_over_the_workers, a_host_that_fails_now_and_then_is_an_outlier_too,
    a_spared_request_goes_on_as_any_other, an_abort_that_follows_a_delay_is_not_injected_any_more,
    an_answer_is_not_replaced_once_the_experiment_is_suspended, an_answer_that_says_nothing_permits_nothing,
    an_experiment_ends_in_time, an_outlier_stops_injection_and_comes_back, envoys_own_ejections_stop_it,
    garbage_is_no_permission, held_requests_are_let_go_when_the_upstream_fails, injection_comes_back_by_a_tenth,
    injection_stops_in_all_workers_while_the_upstream_fails, replaced_answers_spend_the_budget,
    slow_answers_and_outages_stop_it_too, the_last_suspension_is_for_good, who_is_let_go_gives_back_its_place,
};
use limits::{
    a_candidate_counts_what_it_would_refuse, a_client_that_leaves_during_a_delay_has_not_failed,
    a_forged_address_buys_nothing, a_key_has_one_spelling, a_key_of_60_kb_is_hashed,
    a_limit_may_count_each_subset_apart, a_missing_part_is_shared_skipped_or_denied, a_refusal_is_worded_as_configured,
    a_request_that_the_breaker_refuses_is_not_charged, a_step_of_the_wall_clock_changes_nothing,
    cookie_lines_are_matched_as_one_value, costs_are_fixed_or_the_requests_own, grpc_statuses_count_as_http_ones,
    leases_are_returned_when_the_configuration_goes_away, nothing_is_told_unless_asked,
    only_failed_attempts_are_charged, some_keys_have_limits_of_their_own, the_most_restrictive_limit_is_told,
    what_is_held_counts_if_no_answer_comes, what_we_inject_is_no_failed_attempt,
};
use proxy::{Headers, Outcome, Proxy, exchange, get, value};
use std::time::Duration;
use trace::{
    a_context_is_left_and_restored, a_limit_may_force_sampling, a_restored_context_keeps_debug_and_foreign_fields,
    a_rollback_may_force_sampling, an_injected_fault_may_force_sampling, an_unusual_sampling_field_keeps_the_trace,
    the_conformance_cases_pass, unknown_x_ray_fields_are_kept,
};

/// Declares each case as a native test and as a test of the module.
macro_rules! cases {
    ($($case:ident),+ $(,)?) => {
        mod natively {
            $(#[test] fn $case() { crate::$case(&crate::native::Native::start); })+
        }
        mod in_the_module {
            $(#[test] fn $case() { crate::$case(&crate::wasm::Module::start); })+
        }
    };
}

cases![
    a_header_chooses_the_canary,
    a_forged_steering_header_never_gets_through,
    a_cohort_is_the_same_in_every_worker,
    raising_the_weight_moves_nobody_out,
    envoys_route_name_can_be_matched,
    a_valid_trace_goes_on,
    a_broken_trace_is_replaced,
    an_application_that_copies_an_id_keeps_its_trace,
    a_stranger_brings_no_trace_in,
    b3_is_translated,
    the_conformance_cases_pass,
    an_unusual_sampling_field_keeps_the_trace,
    unknown_x_ray_fields_are_kept,
    a_context_is_left_and_restored,
    a_restored_context_keeps_debug_and_foreign_fields,
    a_limit_may_force_sampling,
    an_injected_fault_may_force_sampling,
    a_rollback_may_force_sampling,
    a_limit_is_exact_over_the_workers,
    a_grpc_call_is_refused_in_grpc,
    limits_are_charged_all_or_none,
    spent_allowance_survives_an_update,
    garbage_in_shared_data_is_counted_and_replaced,
    nothing_is_told_unless_asked,
    the_most_restrictive_limit_is_told,
    a_refusal_is_worded_as_configured,
    some_keys_have_limits_of_their_own,
    a_key_has_one_spelling,
    leases_are_returned_when_the_configuration_goes_away,
    a_request_that_the_breaker_refuses_is_not_charged,
    a_client_that_leaves_during_a_delay_has_not_failed,
    cookie_lines_are_matched_as_one_value,
    costs_are_fixed_or_the_requests_own,
    a_missing_part_is_shared_skipped_or_denied,
    a_limit_may_count_each_subset_apart,
    a_forged_address_buys_nothing,
    a_key_of_60_kb_is_hashed,
    only_failed_attempts_are_charged,
    grpc_statuses_count_as_http_ones,
    what_is_held_counts_if_no_answer_comes,
    what_we_inject_is_no_failed_attempt,
    a_candidate_counts_what_it_would_refuse,
    a_step_of_the_wall_clock_changes_nothing,
    a_delay_ends_on_time,
    a_delay_may_be_followed_by_an_abort,
    a_client_may_leave_while_it_is_held,
    an_abort_speaks_the_clients_protocol,
    injection_stops_in_all_workers_while_the_upstream_fails,
    injection_comes_back_by_a_tenth,
    the_last_suspension_is_for_good,
    held_requests_are_let_go_when_the_upstream_fails,
    slow_answers_and_outages_stop_it_too,
    an_experiment_ends_in_time,
    a_budget_is_exact_over_the_workers,
    a_spared_request_goes_on_as_any_other,
    replaced_answers_spend_the_budget,
    an_answer_is_not_replaced_once_the_experiment_is_suspended,
    who_is_let_go_gives_back_its_place,
    garbage_is_no_permission,
    an_abort_that_follows_a_delay_is_not_injected_any_more,
    a_host_that_fails_now_and_then_is_an_outlier_too,
    an_outlier_stops_injection_and_comes_back,
    envoys_own_ejections_stop_it,
    an_answer_that_says_nothing_permits_nothing,
    a_breaker_opens_in_all_workers,
    half_open_lets_exactly_so_many_through,
    a_probe_whose_client_left_is_available_again,
    a_probe_that_a_limit_by_subset_refuses_is_available_again,
    own_answers_do_not_open_a_breaker,
    a_probe_is_not_faulted,
    garbage_opens_nothing,
    grpc_failures_are_seen_in_trailers,
    own_faults_are_no_failures_of_the_upstream,
    a_trace_is_faulted_alike_everywhere,
    a_delay_is_drawn_from_its_distribution,
    a_request_may_ask_for_a_fault,
    a_request_is_given_no_more_than_is_written,
    active_faults_are_capped_over_the_workers,
    a_replaced_answer_has_a_slot_until_its_end,
    an_answer_is_replaced,
    a_fault_of_another_hop_is_no_failure,
    what_envoy_says_itself_is_not_replaced,
    answers_need_not_be_marked,
    an_abort_may_be_a_reset,
    only_the_named_are_faulted,
    every_request_is_counted_once,
    a_host_that_is_not_reached_any_more_is_reported,
    a_bad_policy_is_refused_and_the_old_one_serves_on,
    stages_follow_the_wall_clock,
    a_cap_on_exposure_is_exact,
    a_failing_canary_is_rolled_back_in_all_workers_for_good,
    a_canary_that_breaks_after_good_service_is_rolled_back,
    no_worker_sends_another_request_after_the_last_failure,
    limits_aborts_and_own_faults_are_no_evidence,
    grpc_failures_are_evidence,
    a_reported_failure_keeps_its_weight_and_enters_no_stage,
    a_stage_may_wait_for_evidence,
    in_shadow_nothing_changes,
    slowness_is_evidence,
    garbage_is_no_verdict,
    a_call_names_the_key_and_its_answer_lets_the_request_go_on,
    one_call_serves_those_who_wait_together,
    hits_are_charged_ahead_and_shared_by_all_workers,
    hits_are_not_spent_in_another_window,
    what_is_over_is_remembered_until_its_reset,
    a_batch_that_is_too_large_is_followed_by_a_single_hit,
    a_service_that_fails_is_counted_and_the_policy_decides,
    an_unknown_cluster_is_a_failure_like_any_other,
    a_local_limit_takes_over,
    what_is_refused_globally_is_charged_nowhere,
    who_leaves_while_waiting_is_not_charged,
    a_request_that_waited_is_decided_on_like_any_other,
    what_is_held_for_an_answer_is_let_go_with_who_waited,
    who_waits_takes_no_probe_of_the_breaker,
    the_choice_outlasts_the_wait,
    values_that_are_no_text_cannot_pass_a_limit_by,
    garbage_among_the_hits_is_counted_and_replaced,
    in_shadow_a_global_limit_only_counts,
    an_update_does_not_lose_who_waits,
    a_decision_is_carried_and_followed,
    forged_assignments_of_refused_requests_are_counted,
    a_failed_canary_overrides_an_inherited_assignment,
    a_decision_at_another_weight_is_no_evidence,
    the_bridge_restores_a_dropped_assignment,
    hostile_requests_are_routed_like_any_other,
];

type Start<'a> = &'a dyn Fn(&str) -> Box<dyn Proxy>;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// A policy of these routes, and what else is written after them.
fn policy(routes: &str, more: &str) -> String {
    format!(r#"{{"apiVersion": "trimtab/v1alpha1", "name": "p", "routes": [{routes}]{more}}}"#)
}

fn weighted(canary: u32) -> String {
    let stable = 100 - canary;
    policy(
        &format!(
            r#"{{"name": "default",
                "route": [{{"destination": {{"host": "h", "subset": "v1"}}, "weight": {stable}}},
                          {{"destination": {{"host": "h", "subset": "v2"}}, "weight": {canary}}}],
                "canary": {{"destination": "v2", "rollout": "r", "key": [{{"header": "x-user"}}]}}}}"#
        ),
        "",
    )
}

/// Where a request was steered.
fn subset(outcome: Outcome) -> Option<String> {
    value(&outcome.continued(), "x-trimtab-subset").map(str::to_owned)
}

fn a_header_chooses_the_canary(start: Start) {
    let mut proxy = start(&policy(
        r#"{"name": "canary", "match": [{"headers": {"x-canary": {"exact": "true"}}}],
            "route": [{"destination": {"host": "h", "subset": "v2"}}]},
           {"name": "default", "route": [{"destination": {"host": "h", "subset": "v1"}}]}"#,
        "",
    ));
    for (header, expected) in [("true", "v2"), ("false", "v1"), ("true,true", "v1"), ("", "v1")] {
        let outcome = exchange(&mut *proxy, 0, &[("x-canary", header)], "200");
        assert_eq!(subset(outcome).as_deref(), Some(expected), "x-canary: {header}");
    }
    assert_eq!(proxy.metric("trimtab.policy.p.route.canary.subset.v2.requests"), 1);
    assert_eq!(proxy.metric("trimtab.policy.p.route.default.subset.v1.requests"), 3);
}

fn a_forged_steering_header_never_gets_through(start: Start) {
    let mut proxy = start(&policy(
        r#"{"name": "steered", "match": [{"uri": {"prefix": "/steered"}}],
            "route": [{"destination": {"host": "h", "subset": "v1"}}]},
           {"name": "unsteered", "match": [{"uri": {"prefix": "/unsteered"}}]}"#,
        "",
    ));
    for (path, expected) in [("/steered", Some("v1")), ("/unsteered", None), ("/unmatched", None)] {
        let forged = [("x-trimtab-subset", "v2"), ("x-trimtab-subset", "v1")];
        let (_, outcome) = get(&mut *proxy, 0, path, &forged);
        let headers = outcome.continued();
        assert_eq!(value(&headers, "x-trimtab-subset"), expected, "{path}");
        let count = headers.iter().filter(|(name, _)| name == "x-trimtab-subset").count();
        assert_eq!(count, usize::from(expected.is_some()), "{path}");
    }
    assert_eq!(proxy.metric("trimtab.policy.p.unmatched"), 1);
}

fn a_cohort_is_the_same_in_every_worker(start: Start) {
    let mut proxy = start(&weighted(10));
    let mut canaries = 0;
    for user in 0..300 {
        let user = format!("user-{user}");
        let first = subset(exchange(&mut *proxy, 0, &[("x-user", &user)], "200")).unwrap();
        let second = subset(exchange(&mut *proxy, 1, &[("x-user", &user)], "200")).unwrap();
        assert_eq!(first, second, "{user}");
        // Computed with another implementation of XXH64, by the definition in canary/cohort.rs.
        canaries += usize::from(first == "v2");
    }
    assert_eq!(canaries, 30);
}

fn raising_the_weight_moves_nobody_out(start: Start) {
    let mut proxy = start(&weighted(5));
    let users: Vec<String> = (0..300).map(|user| format!("user-{user}")).collect();
    let is_canary = |proxy: &mut dyn Proxy, user: &String| {
        subset(exchange(proxy, 0, &[("x-user", user)], "200")).as_deref() == Some("v2")
    };
    let before: Vec<&String> = users.iter().filter(|user| is_canary(&mut *proxy, user)).collect();
    proxy.update(&weighted(25)).unwrap();
    assert!(!before.is_empty());
    for user in before {
        assert!(is_canary(&mut *proxy, user), "{user} was moved out");
    }
}

fn envoys_route_name_can_be_matched(start: Start) {
    let mut proxy = start(&policy(
        r#"{"name": "checkout", "match": [{"routeName": {"prefix": "checkout-"}}],
            "route": [{"destination": {"host": "h", "subset": "v2"}}]}"#,
        "",
    ));
    assert_eq!(subset(exchange(&mut *proxy, 0, &[], "200")), None);
    proxy.set_property("xds.route_name", b"checkout-eu");
    assert_eq!(subset(exchange(&mut *proxy, 0, &[], "200")).as_deref(), Some("v2"));
}

fn a_valid_trace_goes_on(start: Start) {
    let mut proxy = start(&policy("", r#", "trace": {}"#));
    let headers = exchange(&mut *proxy, 0, &[("traceparent", TRACEPARENT), ("tracestate", "a=1")], "200").continued();
    let traceparent = value(&headers, "traceparent").unwrap();
    assert_eq!(traceparent[..36], TRACEPARENT[..36], "the trace id is kept");
    assert_ne!(traceparent[36..52], TRACEPARENT[36..52], "the parent is new");
    assert_eq!(traceparent[52..], TRACEPARENT[52..], "the caller's flags are kept");
    assert_eq!(value(&headers, "tracestate"), Some("a=1"));
    assert_eq!(proxy.metric("trimtab.policy.p.trace.valid"), 1);
}

fn a_broken_trace_is_replaced(start: Start) {
    let mut proxy = start(&policy("", r#", "trace": {"sampling": {"percentage": "0%"}}"#));
    let broken: [&[(&str, &str)]; 4] = [
        &[],
        &[("tracestate", "a=1")],
        &[("traceparent", "00-zzz"), ("tracestate", "a=1")],
        &[("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT), ("tracestate", "a=1")],
    ];
    let mut seen = Vec::new();
    for headers in broken {
        let after = exchange(&mut *proxy, 0, headers, "200").continued();
        let traceparent = value(&after, "traceparent").unwrap().to_owned();
        assert_eq!(traceparent.len(), 55, "{traceparent}");
        assert_ne!(traceparent[..36], TRACEPARENT[..36]);
        assert_eq!(value(&after, "tracestate"), None);
        assert!(!seen.contains(&traceparent), "ids repeat");
        seen.push(traceparent);
    }
    assert_eq!(proxy.metric("trimtab.policy.p.trace.missing"), 2);
    assert_eq!(proxy.metric("trimtab.policy.p.trace.invalid"), 2);
}

fn an_application_that_copies_an_id_keeps_its_trace(start: Start) {
    let mut proxy = start(&policy("", r#", "trace": {"bridge": {}}"#));
    let sent = [("traceparent", TRACEPARENT), ("tracestate", "a=1"), ("baggage", "user=ann"), ("x-request-id", "r-1")];
    proxy.set_property("xds.listener_direction", &1_i64.to_le_bytes());
    let arrived = exchange(&mut *proxy, 0, &sent, "200").continued();
    let parent = value(&arrived, "traceparent").unwrap().to_owned();

    proxy.set_property("xds.listener_direction", &2_i64.to_le_bytes());
    let restored = |headers: &Headers| {
        let traceparent = value(headers, "traceparent").unwrap();
        traceparent[..36] == TRACEPARENT[..36]
            && traceparent[36..52] != parent[36..52]
            && value(headers, "tracestate") == Some("a=1")
            && value(headers, "baggage") == Some("user=ann")
    };
    // The other worker sends the application's requests.
    for copied in [("x-request-id", "r-1"), ("traceparent", parent.as_str())] {
        assert!(restored(&exchange(&mut *proxy, 1, &[copied], "200").continued()), "{copied:?}");
    }
    assert!(!restored(&exchange(&mut *proxy, 1, &[("x-request-id", "r-2")], "200").continued()));
    assert_eq!(proxy.metric("trimtab.policy.p.outbound.trace.bridged"), 1);
    assert_eq!(proxy.metric("trimtab.policy.p.outbound.trace.repaired"), 1);
    proxy.advance(Duration::from_secs(60));
    assert!(!restored(&exchange(&mut *proxy, 1, &[("x-request-id", "r-1")], "200").continued()), "it has lapsed");
}

fn a_stranger_brings_no_trace_in(start: Start) {
    let trace = r#", "trace": {"edge": "restartExternal", "tracestate": {"key": "acme"}, "direction": "inbound"}"#;
    let mut proxy = start(&policy("", trace));
    for (tracestate, is_ours) in [("acme=1", true), ("a=1", false)] {
        let sent = [
            ("traceparent", TRACEPARENT),
            ("tracestate", tracestate),
            ("baggage", "a=1"),
            ("uberctx-a", "1"),
            ("x-b3-flags", "1"),
        ];
        let headers = exchange(&mut *proxy, 0, &sent, "200").continued();
        assert_eq!(value(&headers, "traceparent").unwrap()[..36] == TRACEPARENT[..36], is_ours);
        assert_eq!(value(&headers, "baggage").is_some(), is_ours);
        assert_eq!(value(&headers, "uberctx-a").is_some(), is_ours);
        assert_eq!(value(&headers, "x-b3-flags"), None);
    }
    assert_eq!(proxy.metric("trimtab.policy.p.trace.restarted"), 1);
}

fn b3_is_translated(start: Start) {
    let mut proxy =
        start(&policy("", r#", "trace": {"extract": ["b3", "tracecontext"], "inject": ["tracecontext", "datadog"]}"#));
    let b3 = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1";
    let headers = exchange(&mut *proxy, 0, &[("b3", b3)], "200").continued();
    assert_eq!(value(&headers, "traceparent").unwrap()[..36], TRACEPARENT[..36]);
    assert_eq!(value(&headers, "x-datadog-trace-id"), Some("11803532876627986230"));
    assert_eq!(value(&headers, "x-datadog-tags"), Some("_dd.p.tid=4bf92f3577b34da6"));
    assert_eq!(value(&headers, "x-datadog-sampling-priority"), Some("1"));
    assert_eq!(value(&headers, "b3"), None);
    assert_eq!(proxy.metric("trimtab.policy.p.trace.converted"), 1);
}

fn limited(limits: &str) -> String {
    policy(&format!(r#"{{"name": "r", "rateLimits": [{limits}]}}"#), "")
}

const TEN_A_MINUTE: &str = r#"{"name": "all", "limit": {"requestsPerUnit": 10, "unit": "minute"}}"#;

fn a_limit_is_exact_over_the_workers(start: Start) {
    let mut proxy = start(&limited(TEN_A_MINUTE));
    let admitted = |proxy: &mut dyn Proxy| {
        let is_admitted = |n: &usize| matches!(exchange(proxy, n % 2, &[], "200"), Outcome::Continued(_));
        (0..40).filter(is_admitted).count()
    };
    assert_eq!(admitted(&mut *proxy), 10);
    proxy.advance(Duration::from_millis(5_999));
    assert_eq!(admitted(&mut *proxy), 0);
    proxy.advance(Duration::from_millis(1));
    assert_eq!(admitted(&mut *proxy), 1, "one every six seconds");
    proxy.advance(Duration::from_secs(3_600));
    assert_eq!(admitted(&mut *proxy), 10, "no more than the burst is saved up");

    let reply = exchange(&mut *proxy, 0, &[], "200").answered();
    assert_eq!((reply.status, reply.grpc_status), (429, None));
    assert_eq!(reply.details, "trimtab_rate_limited");
    assert_eq!(value(&reply.headers, "retry-after"), Some("6"));
    assert_eq!(value(&reply.headers, "x-envoy-ratelimited"), Some("true"));
    assert_eq!(reply.body, "rate limit all exceeded: 10 requests a minute; retry in 6 s");
    proxy.advance(Duration::from_millis(5_500));
    let reply = exchange(&mut *proxy, 0, &[], "200").answered();
    assert_eq!(value(&reply.headers, "retry-after"), Some("1"), "rounded up, never 0");
}

fn a_grpc_call_is_refused_in_grpc(start: Start) {
    let mut proxy = start(&limited(r#"{"name": "all", "limit": {"requestsPerUnit": 1, "unit": "hour"}}"#));
    let call = [("content-type", "application/grpc")];
    exchange(&mut *proxy, 0, &call, "200").continued();
    let reply = exchange(&mut *proxy, 0, &call, "200").answered();
    assert_eq!(reply.grpc_status, Some(8), "RESOURCE_EXHAUSTED");
}

fn limits_are_charged_all_or_none(start: Start) {
    let each = r#"{"name": "each", "limit": {"requestsPerUnit": 2, "unit": "minute"}, "key": [{"header": "x-user"}]}"#;
    let mut proxy = start(&limited(&format!("{TEN_A_MINUTE}, {each}")));
    let admitted = |proxy: &mut dyn Proxy, user: &str| {
        let is_admitted =
            |n: &usize| matches!(exchange(proxy, n % 2, &[("x-user", user)], "200"), Outcome::Continued(_));
        (0..20).filter(is_admitted).count()
    };
    assert_eq!(admitted(&mut *proxy, "ann"), 2);
    let others: usize = ["bob", "cid", "dee", "eve", "fay"].iter().map(|user| admitted(&mut *proxy, user)).sum();
    assert_eq!(others, 8, "what ann was refused spent nothing of the limit for all");
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.limit.each.refused"), 4 * 18);
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.limit.all.refused"), 18 + 20, "eve's rest and all of fay's");
}

fn spent_allowance_survives_an_update(start: Start) {
    let mut proxy = start(&limited(TEN_A_MINUTE));
    for _ in 0..10 {
        exchange(&mut *proxy, 0, &[], "200").continued();
    }
    proxy.update(&limited(TEN_A_MINUTE)).unwrap();
    exchange(&mut *proxy, 1, &[], "200").answered();
}

fn garbage_in_shared_data_is_counted_and_replaced(start: Start) {
    let mut proxy = start(&limited(TEN_A_MINUTE));
    proxy.write_shared("trimtab/1/p/limit/r/all/", b"\xff\x00not ours");
    for _ in 0..10 {
        exchange(&mut *proxy, 0, &[], "200").continued();
    }
    exchange(&mut *proxy, 1, &[], "200").answered();
    assert_eq!(proxy.metric("trimtab.policy.p.state.garbage"), 1);
}

fn faulty(fault: &str) -> String {
    policy(&format!(r#"{{"name": "r", "fault": {{{fault}}}}}"#), "")
}

const DELAY: &str = r#""delay": {"percentage": {"value": 100}, "fixedDelay": "250ms"}"#;
const ABORT: &str = r#""abort": {"percentage": {"value": 100}, "httpStatus": 503}"#;

fn a_delay_ends_on_time(start: Start) {
    let mut proxy = start(&faulty(DELAY));
    let (first, outcome) = get(&mut *proxy, 0, "/", &[]);
    assert_eq!(outcome, Outcome::Held);
    proxy.advance(Duration::from_millis(100));
    let (second, _) = get(&mut *proxy, 0, "/", &[]);
    proxy.advance(Duration::from_millis(149));
    assert_eq!(proxy.outcome(first), Outcome::Held, "not a millisecond early");
    proxy.advance(Duration::from_millis(1));
    proxy.outcome(first).continued();
    assert_eq!(proxy.outcome(second), Outcome::Held);
    proxy.advance(Duration::from_millis(100));
    proxy.outcome(second).continued();
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.fault.delays"), 2);
}

fn a_delay_may_be_followed_by_an_abort(start: Start) {
    let mut proxy = start(&faulty(&format!("{DELAY}, {ABORT}")));
    let (stream, outcome) = get(&mut *proxy, 1, "/", &[]);
    assert_eq!(outcome, Outcome::Held);
    proxy.advance(Duration::from_millis(250));
    assert_eq!(proxy.outcome(stream).answered().status, 503);
}

fn a_client_may_leave_while_it_is_held(start: Start) {
    let mut proxy = start(&faulty(DELAY));
    let (gone, _) = get(&mut *proxy, 0, "/", &[]);
    let (stays, _) = get(&mut *proxy, 0, "/", &[]);
    proxy.end(gone);
    proxy.advance(Duration::from_millis(250));
    proxy.outcome(stays).continued();
}

fn an_abort_speaks_the_clients_protocol(start: Start) {
    let mut proxy = start(&faulty(ABORT));
    let reply = exchange(&mut *proxy, 0, &[], "200").answered();
    assert_eq!((reply.status, reply.grpc_status), (503, None));
    assert_eq!(reply.details, "trimtab_fault_abort");
    assert_eq!(value(&reply.headers, "x-trimtab-fault"), Some("abort"));
    let reply = exchange(&mut *proxy, 0, &[("content-type", "application/grpc+proto")], "200").answered();
    assert_eq!(reply.grpc_status, Some(14), "UNAVAILABLE");
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.fault.aborts"), 2);
}

/// Faults requests with `x-fault` only; the others are the control sample.
fn guarded() -> String {
    policy(
        &format!(
            r#"{{"name": "experiment", "match": [{{"headers": {{"x-fault": {{}}}}}}],
                 "route": [{{"destination": {{"host": "h", "subset": "v1"}}}}],
                 "fault": {{{ABORT}, "guard": {{"errorRate": "20%", "minRequests": 10, "window": "10s", "holdDown": "30s"}}}}}},
               {{"name": "default", "route": [{{"destination": {{"host": "h", "subset": "v1"}}}}]}}"#
        ),
        "",
    )
}

fn is_faulted(proxy: &mut dyn Proxy, worker: usize) -> bool {
    matches!(exchange(proxy, worker, &[("x-fault", "")], "200"), Outcome::Answered(_))
}

fn grpc_failures_are_seen_in_trailers(start: Start) {
    let mut proxy = start(&guarded());
    let call = [("content-type", "application/grpc")];
    for status in ["14", "0", "5", "13"] {
        let (stream, _) = get(&mut *proxy, 0, "/", &call);
        proxy.response(stream, &[(":status", "200")]);
        proxy.response_trailers(stream, &[("grpc-status", status)]);
        proxy.end(stream);
    }
    let (stream, _) = get(&mut *proxy, 0, "/", &call);
    proxy.response(stream, &[(":status", "200"), ("grpc-status", "4")]);
    proxy.end(stream);
    assert_eq!(proxy.metric("trimtab.policy.p.target.h_v1.requests"), 5);
    assert_eq!(proxy.metric("trimtab.policy.p.target.h_v1.failures"), 3);
}

fn own_faults_are_no_failures_of_the_upstream(start: Start) {
    let mut proxy = start(&guarded());
    for n in 0..100 {
        assert!(is_faulted(&mut *proxy, n % 2), "request {n}");
    }
    assert_eq!(proxy.metric("trimtab.policy.p.target.h_v1.requests"), 0);
}

fn a_bad_policy_is_refused_and_the_old_one_serves_on(start: Start) {
    let mut proxy = start(&limited(TEN_A_MINUTE));
    for bad in ["", "{", "[]", "7", &"[".repeat(10_000), &" ".repeat(10 << 20), r#"{"apiVersion": "trimtab/v1alpha1"}"#]
    {
        let told = proxy.update(bad).unwrap_err();
        assert!(told.contains("policy refused: error: "), "{told}");
    }
    let told = proxy
        .update(r#"{"apiVersion": "x", "name": "y", "routes": [{"fault": {"abort": {}}}, {"mirror": {}}]}"#)
        .unwrap_err();
    for pointer in ["/apiVersion", "/routes/0/fault/abort", "/routes/1/mirror"] {
        assert!(told.contains(&format!("error: {pointer}: ")), "{told}");
    }
    for _ in 0..10 {
        exchange(&mut *proxy, 0, &[], "200").continued();
    }
    exchange(&mut *proxy, 0, &[], "200").answered();
}

fn hostile_requests_are_routed_like_any_other(start: Start) {
    let everything = r#"{"name": "r",
        "match": [{"uri": {"regex": "/x.*"}, "headers": {"x-a": {"regex": ".*"}}, "queryParams": {"q": {}}, "cookies": {"c": {}}},
                  {"withoutHeaders": {"x-a": {"exact": "never"}}}],
        "route": [{"destination": {"host": "h", "subset": "v1"}, "weight": 50},
                  {"destination": {"host": "h", "subset": "v2"}, "weight": 50}],
        "canary": {"destination": "v2", "rollout": "r",
                   "key": [{"cookie": "c"}, {"queryParam": "q"}, {"pathSegment": 3}, {"sourceAddress": {}}, {"header": "x-a"}]},
        "rateLimits": [{"name": "l", "limit": {"requestsPerUnit": 1000, "unit": "second"}, "key": [{"header": "x-a"}, {"cookie": "c"}]}],
        "fault": {"headerControl": true, "source": {"properties": {"no.such.attribute": {"regex": ".*"}}},
                  "delay": {"percentage": {"value": 100}, "fixedDelay": "1s"}, "abort": {"percentage": {"value": 100}}}}"#;
    let mut proxy = start(&policy(everything, r#", "trace": {}"#));
    let large = vec![b'x'; 60_000];
    let names: Vec<String> = (0..100).map(|n| format!("x-header-{n}")).collect();
    let mut many: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
    many.push((":path", b"/"));
    let requests: Vec<Vec<(&str, &[u8])>> = vec![
        vec![],
        vec![(":path", b"")],
        vec![(":path", b"*"), (":method", b"OPTIONS")],
        vec![(":authority", b"example.com:443"), (":method", b"CONNECT")],
        vec![(":path", b"http://example.com/absolute?q=")],
        vec![(":path", b"/x\xff\xfe?q=\xff&=&&;#"), ("x-a", b"\xff\x00\xfe")],
        vec![(":path", b"?"), ("x-a", b""), ("x-a", b""), ("cookie", b"c"), ("cookie", b"=;;c=\xff")],
        vec![
            (":path", b"/"),
            ("x-envoy-fault-delay-request", b"\xff\x00"),
            ("x-envoy-fault-delay-request-percentage", &large),
            ("x-envoy-fault-abort-request", b"-1"),
            ("x-envoy-fault-abort-grpc-request", b"99999999999999999999999"),
        ],
        vec![(":path", b"/"), ("x-a", &large), ("cookie", &large), ("traceparent", &large), ("tracestate", &large)],
        many,
    ];
    proxy.set_property("no.such.attribute", b"there is");
    for request in requests {
        let (stream, outcome) = proxy.request(0, &request);
        let headers = outcome.continued();
        let shown: Vec<_> = request.iter().map(|(name, _)| *name).collect();
        assert!(matches!(value(&headers, "x-trimtab-subset"), Some("v1" | "v2")), "{shown:?}");
        proxy.response(stream, &[(":status", "banana")]);
        proxy.end(stream);
        let (stream, _) = proxy.request(1, &request);
        proxy.response(stream, &[]);
        proxy.end(stream);
    }
}
