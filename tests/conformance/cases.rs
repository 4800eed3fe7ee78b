//! The cases of the W3C conformance suite for Trace Context, under its names, on whatever passes requests on: the core,
//! and a real Envoy. Every new trace has to be sampled.

pub type Headers = Vec<(String, String)>;

/// Sends a request with these headers, and gives back so many of the requests that it led to.
pub type Send<'s> = &'s mut dyn FnMut(&[(&str, &str)], usize) -> Vec<Headers>;

/// What lies between a request and the next hop.
pub struct Harness<'s> {
    send: Send<'s>,
    samples_new_traces: bool,
}

/// What the next hop sees.
struct ReceivedTrace {
    traceparent: String,
    tracestate: Option<String>,
}

const TRACE: &str = "12345678901234567890123456789012";
const VALID: &str = "00-12345678901234567890123456789012-1234567890123456-00";

/// Runs every case. Where we sample new traces, `tracestate` tells how, and nothing else; where somebody else has
/// decided, there is none.
pub fn run(setting: &str, samples_new_traces: bool, send: Send<'_>) {
    for (name, case) in CASES {
        println!("{name}, {setting}");
        case(&mut Harness { send: &mut *send, samples_new_traces });
    }
}

impl Harness<'_> {
    fn send_for(&mut self, headers: &[(&str, &str)], calls: usize) -> Vec<ReceivedTrace> {
        let received = (self.send)(headers, calls);
        assert_eq!(received.len(), calls);
        received.iter().map(ReceivedTrace::read).collect()
    }

    fn send(&mut self, headers: &[(&str, &str)]) -> ReceivedTrace {
        self.send_for(headers, 1).remove(0)
    }

    /// That these headers lead to a new trace, with nothing in its tracestate but how we sampled it.
    fn expect_new_trace(&mut self, headers: &[(&str, &str)]) {
        let received = self.send(headers);
        assert_ne!(received.trace_id(), TRACE, "{headers:?}");
        assert_eq!(received.tracestate.as_deref(), self.samples_new_traces.then_some("ot=th:0"), "{headers:?}");
        assert_eq!(received.flags(), 3, "{headers:?}: sampled, with a random id");
    }

    /// That these headers lead on in the same trace, with this tracestate.
    fn expect_same_trace(&mut self, headers: &[(&str, &str)], tracestate: Option<&str>) {
        let received = self.send(headers);
        assert_eq!(received.trace_id(), TRACE, "{headers:?}");
        assert_ne!(received.parent_id(), "1234567890123456", "{headers:?}");
        let without_whitespace = received.tracestate.map(|list| list.replace([' ', '\t'], ""));
        assert_eq!(without_whitespace.as_deref(), tracestate, "{headers:?}");
    }

    fn traceparent(&mut self, good: &[&str], bad: &[&str]) {
        for value in good {
            self.expect_same_trace(&[("traceparent", value), ("tracestate", "foo=1")], Some("foo=1"));
        }
        for value in bad {
            self.expect_new_trace(&[("traceparent", value), ("tracestate", "foo=1")]);
        }
    }

    fn tracestate(&mut self, good: &[&str], bad: &[&str]) {
        for list in good {
            let without_whitespace = list.replace([' ', '\t'], "");
            let expected = Some(without_whitespace.as_str()).filter(|list| !list.is_empty());
            self.expect_same_trace(&[("traceparent", VALID), ("tracestate", list)], expected);
        }
        for list in bad {
            self.expect_same_trace(&[("traceparent", VALID), ("tracestate", list)], None);
        }
    }
}

impl ReceivedTrace {
    fn read(headers: &Headers) -> ReceivedTrace {
        let values = |name: &str| -> Vec<&str> {
            headers.iter().filter(|(found, _)| found == name).map(|(_, value)| value.as_str()).collect()
        };
        let [traceparent] = values("traceparent")[..] else { panic!("{headers:?}") };
        let (version, rest) = traceparent.split_at(3);
        assert_eq!((version, rest.len()), ("00-", 52), "{traceparent}");
        let tracestate = Some(values("tracestate").join(",")).filter(|list| !list.is_empty());
        ReceivedTrace { traceparent: traceparent.to_owned(), tracestate }
    }
    fn trace_id(&self) -> &str {
        &self.traceparent[3..35]
    }
    fn parent_id(&self) -> &str {
        &self.traceparent[36..52]
    }
    fn flags(&self) -> u8 {
        u8::from_str_radix(&self.traceparent[53..], 16).unwrap()
    }
}

/// A traceparent with these parts.
fn parts(version: &str, trace_id: &str, parent_id: &str, flags: &str) -> String {
    format!("{version}-{trace_id}-{parent_id}-{flags}")
}

fn with_trace_id(trace_id: &str) -> String {
    parts("00", trace_id, "1234567890123456", "01")
}

fn with_parent_id(parent_id: &str) -> String {
    parts("00", TRACE, parent_id, "01")
}

fn with_version(version: &str, rest: &str) -> String {
    parts(version, TRACE, "1234567890123456", "01") + rest
}

fn with_flags(flags: &str) -> String {
    parts("00", TRACE, "1234567890123456", flags)
}

type Case = (&'static str, fn(&mut Harness<'_>));

const CASES: [Case; 41] = [
    ("both_traceparent_and_tracestate_missing", |harness| harness.expect_new_trace(&[])),
    ("traceparent_included_tracestate_missing", |harness| harness.expect_same_trace(&[("traceparent", VALID)], None)),
    ("traceparent_duplicated", |harness| {
        let other = with_trace_id("12345678901234567890123456789011");
        harness.expect_new_trace(&[("traceparent", &other), ("traceparent", VALID)]);
    }),
    ("traceparent_header_name", |harness| {
        harness.expect_new_trace(&[("trace-parent", VALID)]);
        harness.expect_new_trace(&[("trace.parent", VALID)]);
    }),
    ("traceparent_header_name_valid_casing", |harness| {
        for name in ["TraceParent", "TrAcEpArEnT", "TRACEPARENT"] {
            harness.expect_same_trace(&[(name, VALID)], None);
        }
    }),
    ("traceparent_version_0x00", |harness| {
        harness.traceparent(&[], &[&with_version("00", "."), &with_version("00", "-what-the-future-will-be-like")]);
    }),
    ("traceparent_version_0xcc", |harness| {
        let known = [with_version("cc", ""), with_version("cc", "-what-the-future-will-be-like")];
        harness.traceparent(&[&known[0], &known[1]], &[&with_version("cc", ".what-the-future-will-not-be-like")]);
    }),
    ("traceparent_version_0xff", |harness| harness.traceparent(&[], &[&with_version("ff", "")])),
    ("traceparent_version_illegal_characters", |harness| {
        harness.traceparent(&[], &[&with_version(".0", ""), &with_version("0.", "")]);
    }),
    ("traceparent_version_too_long", |harness| {
        harness.traceparent(&[], &[&with_version("000", ""), &with_version("0000", "")]);
    }),
    ("traceparent_version_too_short", |harness| harness.traceparent(&[], &[&with_version("0", "")])),
    ("traceparent_trace_id_all_zero", |harness| harness.traceparent(&[], &[&with_trace_id(&"0".repeat(32))])),
    ("traceparent_trace_id_illegal_characters", |harness| {
        harness.traceparent(&[], &[&with_trace_id(&TRACE.replace('9', ".")), &with_trace_id(&TRACE.replace('9', "A"))]);
    }),
    ("traceparent_trace_id_too_long", |harness| harness.traceparent(&[], &[&with_trace_id(&format!("{TRACE}3"))])),
    ("traceparent_trace_id_too_short", |harness| harness.traceparent(&[], &[&with_trace_id(&TRACE[1..])])),
    ("traceparent_parent_id_all_zero", |harness| harness.traceparent(&[], &[&with_parent_id(&"0".repeat(16))])),
    ("traceparent_parent_id_illegal_characters", |harness| {
        harness.traceparent(&[], &[&with_parent_id(".234567890123456"), &with_parent_id("123456789012345.")]);
    }),
    ("traceparent_parent_id_too_long", |harness| harness.traceparent(&[], &[&with_parent_id("12345678901234567")])),
    ("traceparent_parent_id_too_short", |harness| harness.traceparent(&[], &[&with_parent_id("123456789012345")])),
    ("traceparent_trace_flags_illegal_characters", |harness| {
        harness.traceparent(&[], &[&with_flags(".0"), &with_flags("0.")]);
    }),
    ("traceparent_trace_flags_too_long", |harness| harness.traceparent(&[], &[&with_flags("001")])),
    ("traceparent_trace_flags_too_short", |harness| harness.traceparent(&[], &[&with_flags("1")])),
    ("traceparent_ows_handling", |harness| {
        for value in [format!(" {VALID}"), format!("\t{VALID}"), format!("{VALID} "), format!("\t {VALID} \t")] {
            harness.expect_same_trace(&[("traceparent", &value)], None);
        }
    }),
    ("tracestate_included_traceparent_missing", |harness| harness.expect_new_trace(&[("tracestate", "foo=1")])),
    ("tracestate_included_traceparent_included", |harness| harness.tracestate(&["foo=1,bar=2"], &[])),
    ("tracestate_header_name", |harness| {
        harness.expect_same_trace(&[("traceparent", VALID), ("trace-state", "foo=1")], None);
        harness.expect_same_trace(&[("traceparent", VALID), ("trace.state", "foo=1")], None);
    }),
    ("tracestate_header_name_valid_casing", |harness| {
        for name in ["TraceState", "TrAcEsTaTe", "TRACESTATE"] {
            harness.expect_same_trace(&[("traceparent", VALID), (name, "foo=1")], Some("foo=1"));
        }
    }),
    ("tracestate_empty_header", |harness| {
        harness.expect_same_trace(&[("traceparent", VALID), ("tracestate", "")], None);
        let received = harness.send(&[("traceparent", VALID), ("tracestate", "foo=1"), ("tracestate", "")]);
        assert!(received.tracestate.unwrap().contains("foo=1"));
    }),
    ("tracestate_multiple_headers_different_keys", |harness| {
        let lists = [("tracestate", "foo=1,bar=2"), ("tracestate", "rojo=1,congo=2"), ("tracestate", "baz=3")];
        let headers = [&[("traceparent", VALID)], &lists[..]].concat();
        harness.expect_same_trace(&headers, Some("foo=1,bar=2,rojo=1,congo=2,baz=3"));
    }),
    ("tracestate_duplicated_keys", |harness| harness.tracestate(&["foo=1,foo=1", "foo=1,foo=2"], &[])),
    ("tracestate_all_allowed_characters", |harness| {
        let key = "0123456789abcdefghijklmnopqrstuvwxyz_-*/";
        let tenant = format!("{key}@a-z0-9_-*/");
        let value: String = (' '..='~').filter(|c| *c != ',' && *c != '=').collect();
        let value = value.trim_start();
        harness.tracestate(&[&format!("{key}={value}"), &format!("{tenant}={value}")], &[]);
    }),
    ("tracestate_ows_handling", |harness| {
        harness.tracestate(&["foo=1 \t , \t bar=2, \t baz=3", "foo=1 ,\tbar=2\t,baz=3"], &[]);
        harness.expect_same_trace(&[("traceparent", VALID), ("tracestate", " \tfoo=1\t ")], Some("foo=1"));
    }),
    ("tracestate_key_illegal_characters", |harness| {
        harness.tracestate(&[], &["foo =1", "FOO=1", "foo.bar=1", "f\u{f6}o=1"]);
    }),
    ("tracestate_key_illegal_vendor_format", |harness| {
        harness.tracestate(&["foo@=1,bar=2", "foo@@bar=1,bar=2", "foo@bar@baz=1"], &["@foo=1,bar=2"]);
    }),
    ("tracestate_member_count_limit", |harness| {
        let list = |members: usize| (0..members).map(|n| format!("bar{n:02}={n:02}")).collect::<Vec<_>>().join(",");
        harness.tracestate(&[&list(32)], &[&list(33)]);
    }),
    ("tracestate_key_length_limit", |harness| {
        let tenant = format!("{}@{}", "t".repeat(241), "v".repeat(14));
        let (fits, long) = ("z".repeat(256), "z".repeat(257));
        harness.tracestate(&[&format!("foo=1,{fits}=1"), &format!("foo=1,{tenant}=1")], &[&format!("foo=1,{long}=1")]);
    }),
    ("tracestate_value_illegal_characters", |harness| {
        harness.tracestate(&[], &["foo=bar=baz", "foo=,bar=3"]);
    }),
    ("multiple_requests_with_valid_traceparent", |harness| {
        let received = harness.send_for(&[("traceparent", VALID)], 3);
        assert!(received.iter().all(|received| received.trace_id() == TRACE));
        assert!(parents_differ(&received));
    }),
    ("multiple_requests_without_traceparent", |harness| {
        let received = harness.send_for(&[], 3);
        assert!(parents_differ(&received));
    }),
    ("multiple_requests_with_illegal_traceparent", |harness| {
        let received = harness.send_for(&[("traceparent", &with_version("ff", ""))], 3);
        assert!(received.iter().all(|received| received.trace_id() != TRACE));
        assert!(parents_differ(&received));
    }),
    ("propagates_random_flag", |harness| {
        for (sent, expected) in [("02", 2), ("03", 3), ("00", 0), ("01", 1), ("ff", 3)] {
            assert_eq!(harness.send(&[("traceparent", &with_flags(sent))]).flags(), expected, "{sent}");
        }
    }),
];

fn parents_differ(received: &[ReceivedTrace]) -> bool {
    let parents: std::collections::BTreeSet<_> = received.iter().map(ReceivedTrace::parent_id).collect();
    parents.len() == received.len()
}
