//! The cases of the W3C conformance suite for Trace Context, under its names, on whatever passes requests on: the core,
//! and a real Envoy. Every new trace has to be sampled.

pub type Headers = Vec<(String, String)>;

/// Sends a request with these headers, and gives back so many of the requests that it led to.
pub type Send<'s> = &'s mut dyn FnMut(&[(&str, &str)], usize) -> Vec<Headers>;

/// What lies between a request and the next hop.
pub struct World<'s> {
    send: Send<'s>,
    sampled_by_us: bool,
}

/// What the next hop sees.
struct Seen {
    traceparent: String,
    tracestate: Option<String>,
}

const TRACE: &str = "12345678901234567890123456789012";
const VALID: &str = "00-12345678901234567890123456789012-1234567890123456-00";

/// Runs every case. Where we sample new traces, `tracestate` tells how, and nothing else; where somebody else has
/// decided, there is none.
pub fn run(setting: &str, sampled_by_us: bool, send: Send<'_>) {
    for (name, case) in CASES {
        println!("{name}, {setting}");
        case(&mut World { send: &mut *send, sampled_by_us });
    }
}

impl World<'_> {
    fn send_for(&mut self, headers: &[(&str, &str)], calls: usize) -> Vec<Seen> {
        let seen = (self.send)(headers, calls);
        assert_eq!(seen.len(), calls);
        seen.iter().map(Seen::read).collect()
    }

    fn send(&mut self, headers: &[(&str, &str)]) -> Seen {
        self.send_for(headers, 1).remove(0)
    }

    /// That these headers lead to a new trace, with nothing in its tracestate but how we sampled it.
    fn restarts(&mut self, headers: &[(&str, &str)]) {
        let seen = self.send(headers);
        assert_ne!(seen.trace_id(), TRACE, "{headers:?}");
        assert_eq!(seen.tracestate.as_deref(), self.sampled_by_us.then_some("ot=th:0"), "{headers:?}");
        assert_eq!(seen.flags(), 3, "{headers:?}: sampled, with a random id");
    }

    /// That these headers lead on in the same trace, with this tracestate.
    fn continues(&mut self, headers: &[(&str, &str)], tracestate: Option<&str>) {
        let seen = self.send(headers);
        assert_eq!(seen.trace_id(), TRACE, "{headers:?}");
        assert_ne!(seen.parent_id(), "1234567890123456", "{headers:?}");
        let squeezed = seen.tracestate.map(|list| list.replace([' ', '\t'], ""));
        assert_eq!(squeezed.as_deref(), tracestate, "{headers:?}");
    }

    fn traceparent(&mut self, good: &[&str], bad: &[&str]) {
        for value in good {
            self.continues(&[("traceparent", value), ("tracestate", "foo=1")], Some("foo=1"));
        }
        for value in bad {
            self.restarts(&[("traceparent", value), ("tracestate", "foo=1")]);
        }
    }

    fn tracestate(&mut self, good: &[&str], bad: &[&str]) {
        for list in good {
            let squeezed = list.replace([' ', '\t'], "");
            let expected = Some(squeezed.as_str()).filter(|list| !list.is_empty());
            self.continues(&[("traceparent", VALID), ("tracestate", list)], expected);
        }
        for list in bad {
            self.continues(&[("traceparent", VALID), ("tracestate", list)], None);
        }
    }
}

impl Seen {
    fn read(headers: &Headers) -> Seen {
        let values = |name: &str| -> Vec<&str> {
            headers.iter().filter(|(found, _)| found == name).map(|(_, value)| value.as_str()).collect()
        };
        let [traceparent] = values("traceparent")[..] else { panic!("{headers:?}") };
        let (version, rest) = traceparent.split_at(3);
        assert_eq!((version, rest.len()), ("00-", 52), "{traceparent}");
        let tracestate = Some(values("tracestate").join(",")).filter(|list| !list.is_empty());
        Seen { traceparent: traceparent.to_owned(), tracestate }
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

type Case = (&'static str, fn(&mut World<'_>));

const CASES: [Case; 41] = [
    ("both_traceparent_and_tracestate_missing", |world| world.restarts(&[])),
    ("traceparent_included_tracestate_missing", |world| world.continues(&[("traceparent", VALID)], None)),
    ("traceparent_duplicated", |world| {
        let other = with_trace_id("12345678901234567890123456789011");
        world.restarts(&[("traceparent", &other), ("traceparent", VALID)]);
    }),
    ("traceparent_header_name", |world| {
        world.restarts(&[("trace-parent", VALID)]);
        world.restarts(&[("trace.parent", VALID)]);
    }),
    ("traceparent_header_name_valid_casing", |world| {
        for name in ["TraceParent", "TrAcEpArEnT", "TRACEPARENT"] {
            world.continues(&[(name, VALID)], None);
        }
    }),
    ("traceparent_version_0x00", |world| {
        world.traceparent(&[], &[&with_version("00", "."), &with_version("00", "-what-the-future-will-be-like")]);
    }),
    ("traceparent_version_0xcc", |world| {
        let known = [with_version("cc", ""), with_version("cc", "-what-the-future-will-be-like")];
        world.traceparent(&[&known[0], &known[1]], &[&with_version("cc", ".what-the-future-will-not-be-like")]);
    }),
    ("traceparent_version_0xff", |world| world.traceparent(&[], &[&with_version("ff", "")])),
    ("traceparent_version_illegal_characters", |world| {
        world.traceparent(&[], &[&with_version(".0", ""), &with_version("0.", "")]);
    }),
    ("traceparent_version_too_long", |world| {
        world.traceparent(&[], &[&with_version("000", ""), &with_version("0000", "")]);
    }),
    ("traceparent_version_too_short", |world| world.traceparent(&[], &[&with_version("0", "")])),
    ("traceparent_trace_id_all_zero", |world| world.traceparent(&[], &[&with_trace_id(&"0".repeat(32))])),
    ("traceparent_trace_id_illegal_characters", |world| {
        world.traceparent(&[], &[&with_trace_id(&TRACE.replace('9', ".")), &with_trace_id(&TRACE.replace('9', "A"))]);
    }),
    ("traceparent_trace_id_too_long", |world| world.traceparent(&[], &[&with_trace_id(&format!("{TRACE}3"))])),
    ("traceparent_trace_id_too_short", |world| world.traceparent(&[], &[&with_trace_id(&TRACE[1..])])),
    ("traceparent_parent_id_all_zero", |world| world.traceparent(&[], &[&with_parent_id(&"0".repeat(16))])),
    ("traceparent_parent_id_illegal_characters", |world| {
        world.traceparent(&[], &[&with_parent_id(".234567890123456"), &with_parent_id("123456789012345.")]);
    }),
    ("traceparent_parent_id_too_long", |world| world.traceparent(&[], &[&with_parent_id("12345678901234567")])),
    ("traceparent_parent_id_too_short", |world| world.traceparent(&[], &[&with_parent_id("123456789012345")])),
    ("traceparent_trace_flags_illegal_characters", |world| {
        world.traceparent(&[], &[&with_flags(".0"), &with_flags("0.")]);
    }),
    ("traceparent_trace_flags_too_long", |world| world.traceparent(&[], &[&with_flags("001")])),
    ("traceparent_trace_flags_too_short", |world| world.traceparent(&[], &[&with_flags("1")])),
    ("traceparent_ows_handling", |world| {
        for value in [format!(" {VALID}"), format!("\t{VALID}"), format!("{VALID} "), format!("\t {VALID} \t")] {
            world.continues(&[("traceparent", &value)], None);
        }
    }),
    ("tracestate_included_traceparent_missing", |world| world.restarts(&[("tracestate", "foo=1")])),
    ("tracestate_included_traceparent_included", |world| world.tracestate(&["foo=1,bar=2"], &[])),
    ("tracestate_header_name", |world| {
        world.continues(&[("traceparent", VALID), ("trace-state", "foo=1")], None);
        world.continues(&[("traceparent", VALID), ("trace.state", "foo=1")], None);
    }),
    ("tracestate_header_name_valid_casing", |world| {
        for name in ["TraceState", "TrAcEsTaTe", "TRACESTATE"] {
            world.continues(&[("traceparent", VALID), (name, "foo=1")], Some("foo=1"));
        }
    }),
    ("tracestate_empty_header", |world| {
        world.continues(&[("traceparent", VALID), ("tracestate", "")], None);
        let seen = world.send(&[("traceparent", VALID), ("tracestate", "foo=1"), ("tracestate", "")]);
        assert!(seen.tracestate.unwrap().contains("foo=1"));
    }),
    ("tracestate_multiple_headers_different_keys", |world| {
        let lists = [("tracestate", "foo=1,bar=2"), ("tracestate", "rojo=1,congo=2"), ("tracestate", "baz=3")];
        let headers = [&[("traceparent", VALID)], &lists[..]].concat();
        world.continues(&headers, Some("foo=1,bar=2,rojo=1,congo=2,baz=3"));
    }),
    ("tracestate_duplicated_keys", |world| world.tracestate(&["foo=1,foo=1", "foo=1,foo=2"], &[])),
    ("tracestate_all_allowed_characters", |world| {
        let key = "0123456789abcdefghijklmnopqrstuvwxyz_-*/";
        let tenant = format!("{key}@a-z0-9_-*/");
        let value: String = (' '..='~').filter(|c| *c != ',' && *c != '=').collect();
        let value = value.trim_start();
        world.tracestate(&[&format!("{key}={value}"), &format!("{tenant}={value}")], &[]);
    }),
    ("tracestate_ows_handling", |world| {
        world.tracestate(&["foo=1 \t , \t bar=2, \t baz=3", "foo=1 ,\tbar=2\t,baz=3"], &[]);
        world.continues(&[("traceparent", VALID), ("tracestate", " \tfoo=1\t ")], Some("foo=1"));
    }),
    ("tracestate_key_illegal_characters", |world| {
        world.tracestate(&[], &["foo =1", "FOO=1", "foo.bar=1", "f\u{f6}o=1"]);
    }),
    ("tracestate_key_illegal_vendor_format", |world| {
        world.tracestate(&["foo@=1,bar=2", "foo@@bar=1,bar=2", "foo@bar@baz=1"], &["@foo=1,bar=2"]);
    }),
    ("tracestate_member_count_limit", |world| {
        let list = |members: usize| (0..members).map(|n| format!("bar{n:02}={n:02}")).collect::<Vec<_>>().join(",");
        world.tracestate(&[&list(32)], &[&list(33)]);
    }),
    ("tracestate_key_length_limit", |world| {
        let tenant = format!("{}@{}", "t".repeat(241), "v".repeat(14));
        let (fits, long) = ("z".repeat(256), "z".repeat(257));
        world.tracestate(&[&format!("foo=1,{fits}=1"), &format!("foo=1,{tenant}=1")], &[&format!("foo=1,{long}=1")]);
    }),
    ("tracestate_value_illegal_characters", |world| {
        world.tracestate(&[], &["foo=bar=baz", "foo=,bar=3"]);
    }),
    ("multiple_requests_with_valid_traceparent", |world| {
        let seen = world.send_for(&[("traceparent", VALID)], 3);
        assert!(seen.iter().all(|seen| seen.trace_id() == TRACE));
        assert!(parents_differ(&seen));
    }),
    ("multiple_requests_without_traceparent", |world| {
        let seen = world.send_for(&[], 3);
        assert!(parents_differ(&seen));
    }),
    ("multiple_requests_with_illegal_traceparent", |world| {
        let seen = world.send_for(&[("traceparent", &with_version("ff", ""))], 3);
        assert!(seen.iter().all(|seen| seen.trace_id() != TRACE));
        assert!(parents_differ(&seen));
    }),
    ("propagates_random_flag", |world| {
        for (sent, expected) in [("02", 2), ("03", 3), ("00", 0), ("01", 1), ("ff", 3)] {
            assert_eq!(world.send(&[("traceparent", &with_flags(sent))]).flags(), expected, "{sent}");
        }
    }),
];

fn parents_differ(seen: &[Seen]) -> bool {
    let parents: std::collections::BTreeSet<_> = seen.iter().map(Seen::parent_id).collect();
    parents.len() == seen.len()
}
