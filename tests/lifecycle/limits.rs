//! Limits beyond the plain ones: what is told of them, who is under which, and what counts.

use crate::proxy::{Headers, Outcome, Proxy, exchange, get, value};
use crate::{Start, limited, policy};
use std::time::Duration;

/// What the client gets for a GET, whoever answers, and whether it was admitted.
fn client_gets(proxy: &mut dyn Proxy, headers: &[(&str, &str)], response: &[(&str, &str)]) -> (bool, Headers) {
    let (stream, outcome) = get(proxy, 0, "/", headers);
    let answer = match outcome {
        Outcome::Answered(reply) => (false, reply.headers),
        _ => (true, proxy.response(stream, response)),
    };
    proxy.end(stream);
    answer
}

/// How many of `count` requests are admitted, sent to the workers by turns and answered with `status`.
fn admitted(proxy: &mut dyn Proxy, count: usize, headers: &[(&str, &str)], status: &str) -> usize {
    (0..count).filter(|n| matches!(exchange(proxy, n % 2, headers, status), Outcome::Continued(_))).count()
}

fn told(headers: &Headers) -> Vec<(&str, &str)> {
    let is_told = |name: &str| name.contains("ratelimit") || name == "retry-after";
    let names = headers.iter().map(|(name, _)| &**name).filter(|name| is_told(name));
    names.map(|name| (name, value(headers, name).unwrap())).collect()
}

pub fn nothing_is_told_unless_asked(start: Start) {
    let mut proxy = start(&limited(
        r#"{"name": "a", "limit": {"requestsPerUnit": 1, "unit": "hour"},
            "response": {"enableRetryAfterHeader": false, "disableXEnvoyRatelimitedHeader": true}}"#,
    ));
    for expected in [true, false] {
        let (is_admitted, headers) = client_gets(&mut *proxy, &[], &[(":status", "200")]);
        assert_eq!((is_admitted, told(&headers)), (expected, vec![]), "{headers:?}");
    }
}

pub fn the_most_restrictive_limit_is_told(start: Start) {
    let tells = r#""response": {"enableXRatelimitHeaders": "DRAFT_VERSION_03", "enableRateLimitFields": true}"#;
    let mut proxy = start(&limited(&format!(
        r#"{{"name": "all", "limit": {{"requestsPerUnit": 10, "unit": "minute"}}, {tells}}},
           {{"name": "each", "limit": {{"requestsPerUnit": 60, "unit": "minute", "burst": 2}}, "key": [{{"header": "x-user"}}], {tells}}},
           {{"name": "silent", "limit": {{"requestsPerUnit": 4, "unit": "minute"}}}},
           {{"name": "shadow", "mode": "shadow", "limit": {{"requestsPerUnit": 1, "unit": "minute"}}, {tells}}}"#
    )));
    let upstream = [(":status", "200"), ("x-ratelimit-limit", "7"), ("ratelimit", "\"db\";r=7;t=1")];
    let (is_admitted, headers) = client_gets(&mut *proxy, &[("x-user", "ann")], &upstream);
    assert!(is_admitted);
    let expected = [
        ("ratelimit", "\"db\";r=7;t=1"),
        ("x-ratelimit-limit", "2, 2;w=2;name=\"each\""),
        ("x-ratelimit-remaining", "1"),
        ("x-ratelimit-reset", "1"),
        ("ratelimit-policy", "\"each\";q=2;w=2"),
        ("ratelimit", "\"each\";r=1;t=1"),
    ];
    let found: Vec<(&str, &str)> =
        headers.iter().map(|(name, value)| (&**name, std::str::from_utf8(value).unwrap())).collect();
    assert_eq!(found[1..], expected, "what the upstream says of its own limits stays where a list may be added to");

    client_gets(&mut *proxy, &[("x-user", "ann")], &upstream);
    let (is_admitted, headers) = client_gets(&mut *proxy, &[("x-user", "ann")], &upstream);
    assert!(!is_admitted);
    assert_eq!(
        told(&headers),
        [
            ("retry-after", "1"),
            ("x-envoy-ratelimited", "true"),
            ("x-ratelimit-limit", "2, 2;w=2;name=\"each\""),
            ("x-ratelimit-remaining", "0"),
            ("x-ratelimit-reset", "1"),
            ("ratelimit-policy", "\"each\";q=2;w=2"),
            ("ratelimit", "\"each\";r=0;t=1"),
        ]
    );
    let (_, headers) = client_gets(&mut *proxy, &[("x-user", "bob")], &[(":status", "200")]);
    assert_eq!(value(&headers, "ratelimit"), Some("\"each\";r=1;t=1"));
    proxy.advance(Duration::from_secs(3600));
    for n in 0..4 {
        let user = format!("user-{n}");
        client_gets(&mut *proxy, &[("x-user", &user)], &[(":status", "200")]);
    }
    let (is_admitted, headers) = client_gets(&mut *proxy, &[("x-user", "eve")], &[(":status", "200")]);
    assert!(!is_admitted);
    assert_eq!(
        told(&headers),
        [("retry-after", "15"), ("x-envoy-ratelimited", "true")],
        "the one that refused is told, and it says nothing"
    );
}

pub fn a_refusal_is_worded_as_configured(start: Start) {
    let refusal = |response: &str, headers: &[(&str, &str)]| {
        let mut proxy = start(&limited(&format!(
            r#"{{"name": "a", "limit": {{"requestsPerUnit": 2, "unit": "minute"}}, "cost": {{"number": 2}}, "response": {response}}}"#
        )));
        exchange(&mut *proxy, 0, headers, "200").continued();
        exchange(&mut *proxy, 1, headers, "200").answered()
    };
    let reply = refusal(
        r#"{"statusCode": 503, "body": "<p>later</p>", "contentType": "text/html", "headers": {"X-Why": "busy"}}"#,
        &[],
    );
    assert_eq!((reply.status, &*reply.body), (503, "<p>later</p>"));
    assert_eq!(value(&reply.headers, "x-why"), Some("busy"));
    assert_eq!(value(&reply.headers, "content-type"), Some("text/html"));

    let sentence = "rate limit a exceeded: 2 requests a minute; retry in 60 s";
    let reply = refusal(r#"{"problemDetails": true}"#, &[]);
    assert_eq!((reply.status, value(&reply.headers, "content-type")), (429, Some("application/problem+json")));
    let problem: serde_json::Value = serde_json::from_str(&reply.body).expect("the body is JSON");
    assert_eq!(
        problem,
        serde_json::json!({
            "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
            "title": "The quota is exceeded",
            "status": 429,
            "detail": sentence,
            "violated-policies": ["a"],
        })
    );
    let reply = refusal(r#"{"problemDetails": true}"#, &[("content-type", "application/grpc")]);
    assert_eq!((reply.grpc_status, &*reply.body), (Some(8), sentence), "a call is told in its own protocol");
    assert_eq!(value(&reply.headers, "content-type"), None);
}

pub fn some_keys_have_limits_of_their_own(start: Start) {
    let each = |premium: &str| {
        limited(&format!(
            r#"{{"name": "each", "limit": {{"requestsPerUnit": 2, "unit": "hour"}},
                 "key": [{{"header": "x-tier"}}, {{"header": "x-user"}}],
                 "overrides": [{{"match": ["premium", "bob"], "limit": {{"requestsPerUnit": 7, "unit": "hour"}}}}{premium}]}}"#
        ))
    };
    let premium = r#", {"match": ["premium", "*"], "limit": {"requestsPerUnit": 5, "unit": "hour"}}"#;
    let mut proxy = start(&each(premium));
    for (tier, user, expected) in
        [("free", "ann", 2), ("premium", "ann", 5), ("premium", "bob", 7), ("free", "bob", 2), ("", "ann", 2)]
    {
        let found = admitted(&mut *proxy, 20, &[("x-tier", tier), ("x-user", user)], "200");
        assert_eq!(found, expected, "{user} of tier {tier:?}");
    }
    assert_eq!(admitted(&mut *proxy, 20, &[("x-tier", "premium")], "200"), 5, "* is any, and none at all");
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.limit.each.incomplete"), 40, "an empty value is absent");
    proxy.update(&each("")).unwrap();
    assert_eq!(admitted(&mut *proxy, 5, &[("x-tier", "premium"), ("x-user", "ann")], "200"), 0, "spent is spent");
}

pub fn a_key_has_one_spelling(start: Start) {
    type Request<'r> = (&'r str, &'r [(&'r str, &'r str)]);
    let statuses = |key: &str, requests: &[Request<'_>]| {
        let mut proxy = start(&limited(&format!(
            r#"{{"name": "a", "limit": {{"requestsPerUnit": 1, "unit": "hour"}}, "key": [{key}]}}"#
        )));
        let mut statuses = Vec::new();
        for (n, (path, headers)) in requests.iter().enumerate() {
            let (stream, outcome) = get(&mut *proxy, n % 2, path, headers);
            proxy.end(stream);
            statuses.push(if let Outcome::Answered(reply) = outcome { reply.status } else { 200 });
        }
        statuses
    };
    let query =
        ["/?api_key=abc", "/?api_key=abc", "/?api_key=%61bc", "/?%61pi_k%65y=a%62c"].map(|path| (path, &[][..]));
    assert_eq!(statuses(r#"{"queryParam": "api_key"}"#, &query), [200, 429, 429, 429]);
    let paths = ["/u/abc", "/u/%61bc", "/u/abd"].map(|path| (path, &[][..]));
    assert_eq!(statuses(r#"{"pathSegment": 1}"#, &paths), [200, 429, 200]);
    let cookies = [[("cookie", "k=a@b")], [("cookie", "k=a%40b")], [("cookie", "k=\"a%40b\"")], [("cookie", "k=a@c")]];
    let cookies: Vec<_> = cookies.iter().map(|headers| ("/", &headers[..])).collect();
    assert_eq!(statuses(r#"{"cookie": "k"}"#, &cookies), [200, 429, 429, 200]);
    let headers: [&[(&str, &str)]; 4] = [
        &[("x-api-key", "abc")],
        &[("x-api-key", "abc"), ("x-api-key", "1")],
        &[("x-api-key", "abc"), ("x-api-key", "2"), ("x-api-key", "3")],
        &[("x-api-key", "1"), ("x-api-key", "abc")],
    ];
    assert_eq!(statuses(r#"{"header": "x-api-key"}"#, &headers.map(|headers| ("/", headers))), [200, 429, 429, 200]);
    let empty: [&[(&str, &str)]; 2] = [&[], &[("x-api-key", "")]];
    assert_eq!(statuses(r#"{"header": "x-api-key"}"#, &empty.map(|headers| ("/", headers))), [200, 429]);
}

pub fn cookie_lines_are_matched_as_one_value(start: Start) {
    let mut proxy = start(&policy(
        r#"{"name": "gold", "match": [{"headers": {"cookie": {"exact": "a=1; tier=gold"}}}],
            "rateLimits": [{"name": "a", "limit": {"requestsPerUnit": 1, "unit": "hour"}}]}"#,
        "",
    ));
    for cookies in [&[("cookie", "a=1; tier=gold")][..], &[("cookie", "a=1"), ("cookie", "tier=gold")]] {
        assert_eq!(admitted(&mut *proxy, 1, cookies, "200"), usize::from(cookies.len() == 1), "{cookies:?}");
    }
}

pub fn costs_are_fixed_or_the_requests_own(start: Start) {
    let admitted = |cost: &str, headers: &[(&str, &str)]| {
        let mut proxy = start(&limited(&format!(
            r#"{{"name": "a", "limit": {{"requestsPerUnit": 12, "unit": "hour"}}, "cost": {cost}}}"#
        )));
        admitted(&mut *proxy, 20, headers, "200")
    };
    assert_eq!(admitted(r#"{"number": 5}"#, &[]), 2);
    for (sent, expected) in [
        (&[("x-cost", "4")][..], 3),
        (&[("x-cost", "12")], 1),
        (&[("x-cost", "13")], 0),
        (&[("x-cost", "99999999999999999999999")], 0),
        (&[("x-cost", "0")], 20),
        (&[("x-cost", "-1")], 2),
        (&[("x-cost", "")], 2),
        (&[("x-cost", "1"), ("x-cost", "1")], 2),
        (&[], 2),
    ] {
        assert_eq!(admitted(r#"{"header": "x-cost", "default": 6}"#, sent), expected, "{sent:?}");
    }
    for (length, expected) in [("0", 12), ("1", 12), ("1000", 12), ("1001", 6), ("12000", 1), ("12001", 0), ("1e3", 12)]
    {
        let found = admitted(r#"{"bytesPerRequest": 1000}"#, &[("content-length", length)]);
        assert_eq!(found, expected, "content-length: {length}");
    }
    assert_eq!(admitted(r#"{"bytesPerRequest": 1000, "default": 4}"#, &[]), 12, "no body");
    let chunked = [("transfer-encoding", "chunked")];
    assert_eq!(admitted(r#"{"bytesPerRequest": 1000, "default": 4}"#, &chunked), 3, "a body of unknown length");

    let mut proxy = start(&limited(
        r#"{"name": "a", "limit": {"requestsPerUnit": 2, "unit": "hour"}, "cost": {"header": "x-cost"}}"#,
    ));
    let reply = exchange(&mut *proxy, 0, &[("x-cost", "3")], "200").answered();
    assert_eq!(reply.body, "rate limit a exceeded: 2 requests an hour; the request costs more than the burst");
    assert_eq!(value(&reply.headers, "retry-after"), None, "to wait is of no use");
}

pub fn a_missing_part_is_shared_skipped_or_denied(start: Start) {
    for (on_missing, expected) in [("", 2), (r#""onMissing": "skip","#, 9), (r#""onMissing": "deny","#, 0)] {
        let mut proxy = start(&limited(&format!(
            r#"{{"name": "a", {on_missing} "limit": {{"requestsPerUnit": 2, "unit": "hour"}},
                 "key": [{{"header": "x-org"}}, {{"header": "x-user"}}]}}"#
        )));
        let found = admitted(&mut *proxy, 9, &[("x-org", "acme")], "200");
        assert_eq!(found, expected, "{on_missing}");
        assert_eq!(proxy.metric("trimtab.policy.p.route.r.limit.a.incomplete"), 9, "{on_missing}");
        assert_eq!(proxy.metric("trimtab.policy.p.route.r.limit.a.refused"), 9 - expected as u64, "{on_missing}");
        if expected == 0 {
            let reply = exchange(&mut *proxy, 0, &[], "200").answered();
            assert_eq!(reply.body, "rate limit a: the request lacks a part of the key");
            assert_eq!(value(&reply.headers, "retry-after"), None);
        }
        assert_eq!(admitted(&mut *proxy, 9, &[("x-org", "acme"), ("x-user", "ann")], "200"), 2, "{on_missing}");
    }
}

pub fn a_limit_may_count_each_subset_apart(start: Start) {
    let mut proxy = start(&policy(
        r#"{"name": "r",
            "route": [{"destination": {"host": "h", "subset": "v1"}, "weight": 90},
                      {"destination": {"host": "h", "subset": "v2"}, "weight": 10}],
            "canary": {"destination": "v2", "rollout": "r", "key": [{"header": "x-user"}]},
            "rateLimits": [{"name": "all", "limit": {"requestsPerUnit": 1000, "unit": "hour"}},
                           {"name": "each", "limit": {"requestsPerUnit": 5, "unit": "hour"}, "key": [{"subset": {}}]}]}"#,
        "",
    ));
    let mut subsets = Vec::new();
    for n in 0..200 {
        if let Outcome::Continued(headers) = exchange(&mut *proxy, n % 2, &[("x-user", &format!("u{n}"))], "200") {
            subsets.push(value(&headers, "x-trimtab-subset").unwrap().to_owned());
        }
    }
    for subset in ["v1", "v2"] {
        assert_eq!(subsets.iter().filter(|found| *found == subset).count(), 5, "{subset}");
    }
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.limit.each.refused"), 190);
    assert_eq!(proxy.metric("trimtab.policy.p.route.r.subset.v2.requests"), 5, "the refused ones went nowhere");
}

pub fn a_forged_address_buys_nothing(start: Start) {
    let mut proxy = start(&limited(
        r#"{"name": "a", "limit": {"requestsPerUnit": 3, "unit": "hour"},
            "key": [{"sourceAddress": {"xffNumTrustedHops": 1, "v6PrefixMaskLen": 64}}]}"#,
    ));
    proxy.set_property("source.address", b"10.0.0.1:4711");
    let sent = |proxy: &mut dyn Proxy, forwarded: &dyn Fn(usize) -> String| {
        let mut ask = |n: &usize| exchange(proxy, n % 2, &[("x-forwarded-for", &forwarded(*n))], "200");
        (0..20).filter(|n| matches!(ask(n), Outcome::Continued(_))).count()
    };
    let forged = sent(&mut *proxy, &|n| format!("6.6.6.{n}, 192.0.2.7, 10.0.0.2"));
    assert_eq!(forged, 3, "what stands left of the trusted entry is the client's own word");
    let network = sent(&mut *proxy, &|n| format!("2001:db8:1:2::{n:x}, 10.0.0.2"));
    assert_eq!(network, 3, "one network, however many addresses");
    let short = sent(&mut *proxy, &|n| format!("6.6.6.{n}"));
    assert_eq!(short, 3, "too few entries: the connection's own address");
    assert_eq!(sent(&mut *proxy, &|n| format!("6.6.{n}.6, forged, 10.0.0.2")), 0, "the same address again");
}

pub fn a_key_of_60_kb_is_hashed(start: Start) {
    let mut proxy = start(&limited(
        r#"{"name": "a", "limit": {"requestsPerUnit": 2, "unit": "hour"}, "key": [{"header": "x-user"}]}"#,
    ));
    let long = "a".repeat(60 * 1024);
    let other = format!("{long}b");
    for user in [&*long, &*other, ""] {
        assert_eq!(admitted(&mut *proxy, 9, &[("x-user", user)], "200"), 2, "{} bytes", user.len());
    }
}

const ATTEMPTS: &str = r#"{"name": "attempts", "limit": {"requestsPerUnit": 3, "unit": "minute"}, "key": [{"header": "x-user"}],
                          "charge": {"onResponse": {"statuses": [401, "5xx"]}}}"#;

pub fn only_failed_attempts_are_charged(start: Start) {
    let mut proxy = start(&limited(ATTEMPTS));
    let ann = [("x-user", "ann")];
    assert_eq!(admitted(&mut *proxy, 50, &ann, "200"), 50, "what succeeds costs nothing");
    assert_eq!(admitted(&mut *proxy, 50, &ann, "403"), 50, "what is not listed costs nothing");
    assert_eq!(admitted(&mut *proxy, 1, &ann, "401"), 1);
    assert_eq!(admitted(&mut *proxy, 50, &ann, "503"), 2);
    assert_eq!(admitted(&mut *proxy, 50, &ann, "200"), 0, "refused before, whatever the answer would be");
    assert_eq!(admitted(&mut *proxy, 1, &[("x-user", "bob")], "401"), 1);
    proxy.advance(Duration::from_secs(20));
    assert_eq!(admitted(&mut *proxy, 50, &ann, "401"), 1, "one every twenty seconds");

    // However many are under way at once, no more than three fail.
    proxy.advance(Duration::from_secs(600));
    let sent: Vec<_> = (0..20).map(|n| get(&mut *proxy, n % 2, "/", &ann)).collect();
    let under_way: Vec<_> = sent.into_iter().filter(|(_, outcome)| matches!(outcome, Outcome::Continued(_))).collect();
    assert_eq!(under_way.len(), 3);
    for (stream, _) in under_way {
        proxy.response(stream, &[(":status", "200")]);
        proxy.end(stream);
    }
    assert_eq!(admitted(&mut *proxy, 50, &ann, "500"), 3, "those that succeeded made room again");
}

pub fn grpc_statuses_count_as_http_ones(start: Start) {
    let mut proxy = start(&limited(ATTEMPTS));
    let call = [("x-user", "ann"), ("content-type", "application/grpc")];
    let mut sent = |in_trailers: bool, status: &str| {
        let mut admitted = 0;
        for n in 0..9 {
            let (stream, outcome) = get(&mut *proxy, n % 2, "/", &call);
            if let Outcome::Continued(_) = outcome {
                admitted += 1;
                let trailers = [("grpc-status", status)];
                if in_trailers {
                    proxy.response(stream, &[(":status", "200")]);
                    proxy.response_trailers(stream, &trailers);
                } else {
                    proxy.response(stream, &[(":status", "200"), trailers[0]]);
                }
            }
            proxy.end(stream);
        }
        admitted
    };
    assert_eq!(sent(true, "0"), 9);
    assert_eq!(sent(false, "7"), 9, "PERMISSION_DENIED is a 403");
    assert_eq!(sent(true, "16"), 3, "UNAUTHENTICATED is a 401");
    assert_eq!(sent(false, "16"), 0);
}

pub fn what_is_held_counts_if_no_answer_comes(start: Start) {
    let mut proxy = start(&limited(ATTEMPTS));
    let ann = [("x-user", "ann")];
    for worker in [0, 1, 1] {
        let (stream, outcome) = get(&mut *proxy, worker, "/", &ann);
        outcome.continued();
        proxy.end(stream);
    }
    assert_eq!(admitted(&mut *proxy, 9, &ann, "200"), 0, "whoever leaves before the answer may have failed");
    proxy.advance(Duration::from_secs(120 + 60));
    assert_eq!(admitted(&mut *proxy, 9, &ann, "401"), 3, "and no room is lost for good");
}

pub fn what_we_inject_is_no_failed_attempt(start: Start) {
    let mut proxy = start(&policy(
        &format!(
            r#"{{"name": "r", "rateLimits": [{ATTEMPTS}],
                 "fault": {{"abort": {{"percentage": {{"value": 100}}, "httpStatus": 503}}}}}}"#
        ),
        "",
    ));
    for n in 0..9 {
        let reply = exchange(&mut *proxy, n % 2, &[("x-user", "ann")], "200").answered();
        assert_eq!((reply.status, &*reply.details), (503, "trimtab_fault_abort"), "request {n}");
    }

    // Nor is what another hop injected, and says so.
    let mut proxy = start(&limited(ATTEMPTS));
    let mut admitted = |fault: &[(&str, &str)]| {
        let mut count = 0;
        for n in 0..9 {
            let (stream, outcome) = get(&mut *proxy, n % 2, "/", &[("x-user", "ann")]);
            if let Outcome::Continued(_) = outcome {
                count += 1;
                proxy.response(stream, &[&[(":status", "503")], fault].concat());
            }
            proxy.end(stream);
        }
        count
    };
    assert_eq!(admitted(&[("x-trimtab-fault", "abort")]), 9);
    assert_eq!(admitted(&[]), 3);
}

pub fn leases_are_returned_when_the_configuration_goes_away(start: Start) {
    for requests in [100, 101, 106] {
        let limit = limited(r#"{"name": "a", "limit": {"requestsPerUnit": 5120, "unit": "day"}}"#);
        let mut proxy = start(&limit);
        let first = (0..requests).filter(|_| matches!(exchange(&mut *proxy, 0, &[], "200"), Outcome::Continued(_)));
        assert_eq!(first.count(), requests);
        proxy.update(&limit).unwrap();
        let rest = (0..5200).filter(|_| matches!(exchange(&mut *proxy, 1, &[], "200"), Outcome::Continued(_)));
        assert_eq!(rest.count(), 5120 - requests, "what the first worker had reserved is available at once");
    }
}

pub fn a_request_that_the_breaker_refuses_is_not_charged(start: Start) {
    let mut proxy = start(&policy(
        &format!(
            r#"{{"name": "r", "rateLimits": [{ATTEMPTS}, {{"name": "all", "limit": {{"requestsPerUnit": 5, "unit": "day"}}}}],
                 "circuitBreaker": {{"errorThresholdPercentage": 50, "volumeThreshold": 2, "resetTimeout": "2m"}}}}"#
        ),
        "",
    ));
    let ann = [("x-user", "ann")];
    assert_eq!(admitted(&mut *proxy, 2, &ann, "500"), 2, "the circuit opens, and two of three attempts have failed");
    for n in 0..9 {
        let reply = exchange(&mut *proxy, n % 2, &ann, "200").answered();
        assert_eq!(reply.details, "trimtab_circuit_open", "request {n}");
    }
    proxy.advance(Duration::from_secs(121));
    assert_eq!(admitted(&mut *proxy, 9, &ann, "200"), 3, "the circuit is closed, and three of five are left");
}

pub fn a_client_that_leaves_during_a_delay_has_not_failed(start: Start) {
    let mut proxy = start(&policy(
        &format!(
            r#"{{"name": "r", "rateLimits": [{ATTEMPTS}],
                 "fault": {{"delay": {{"percentage": {{"value": 100}}, "fixedDelay": "250ms"}}}}}}"#
        ),
        "",
    ));
    for n in 0..9 {
        let (stream, outcome) = get(&mut *proxy, n % 2, "/", &[("x-user", "ann")]);
        assert_eq!(outcome, Outcome::Held, "request {n}");
        proxy.end(stream);
    }
}

pub fn a_candidate_counts_what_it_would_refuse(start: Start) {
    let mut proxy = start(&limited(
        r#"{"name": "all", "limit": {"requestsPerUnit": 20, "unit": "hour"}},
           {"name": "a", "limit": {"requestsPerUnit": 5, "unit": "hour"}, "key": [{"header": "x-user"}],
            "overrides": [{"match": "bob", "limit": {"requestsPerUnit": 1, "unit": "hour"}}],
            "candidates": [{"name": "tighter", "limit": {"requestsPerUnit": 3, "unit": "hour"}},
                           {"name": "looser", "limit": {"requestsPerUnit": 8, "unit": "hour"}}]},
           {"name": "last", "limit": {"requestsPerUnit": 1000, "unit": "hour"}}"#,
    ));
    assert_eq!(admitted(&mut *proxy, 10, &[("x-user", "ann")], "200"), 5, "a candidate refuses nothing");
    let mut refused = |of: &str| proxy.metric(&format!("trimtab.policy.p.route.r.limit.a.{of}refused"));
    assert_eq!((refused(""), refused("candidate.tighter."), refused("candidate.looser.")), (5, 7, 2));
    assert_eq!(admitted(&mut *proxy, 3, &[("x-user", "bob")], "200"), 1, "candidates are for the limit's own rate");
    let mut refused = |of: &str| proxy.metric(&format!("trimtab.policy.p.route.r.limit.a.{of}refused"));
    assert_eq!((refused(""), refused("candidate.tighter."), refused("candidate.looser.")), (7, 7, 2));
    assert_eq!(admitted(&mut *proxy, 50, &[("x-user", "cid")], "200"), 5);
    assert_eq!(admitted(&mut *proxy, 50, &[("x-user", "dee")], "200"), 5);
    assert_eq!(admitted(&mut *proxy, 50, &[("x-user", "eve")], "200"), 4, "what is refused spends none of the 20");
}

pub fn a_step_of_the_wall_clock_changes_nothing(start: Start) {
    let mut proxy = start(&limited(
        r#"{"name": "a", "limit": {"requestsPerUnit": 5, "unit": "minute"}},
           {"name": "b", "limit": {"requestsPerUnit": 60, "unit": "minute"}, "charge": {"onResponse": {"statuses": ["2xx"]}}}"#,
    ));
    assert_eq!(admitted(&mut *proxy, 9, &[], "200"), 5);
    for step in [3600, -7200, 3600] {
        proxy.step_wall_clock(step);
        assert_eq!(admitted(&mut *proxy, 9, &[], "200"), 0, "a step of {step} s admitted somebody");
        proxy.advance(Duration::from_secs(12));
        let reply = exchange(&mut *proxy, 0, &[], "200");
        assert!(matches!(reply, Outcome::Continued(_)), "a step of {step} s delayed the next: {reply:?}");
        let reply = exchange(&mut *proxy, 1, &[], "200").answered();
        assert_eq!(value(&reply.headers, "retry-after"), Some("12"), "after a step of {step} s");
    }
}
