//! The formats in which a trace context travels, besides W3C's: one file a format, one shape. `HEADERS` names the
//! headers of the format, `parse` reads a context from them, `write` is its inverse. Both meet the headers by their
//! index in `HEADERS`.
//!
//! What a format cannot say is missing from what it parses to: a zero trace id is a sampling decision without ids, a
//! zero parent id is an unknown one, [`TraceFlags::DEFERRED`] leaves the decision open. Ids that a format shortens are
//! padded on the left, and no format but W3C's says whether an id is random.

mod b3;
mod b3multi;
mod datadog;
mod decimal;
mod gcp;
mod grpc;
mod jaeger;
mod ottrace;
mod xray;

use super::w3c::{InvalidContext, TraceContext, TraceFlags, format_traceparent, parse_padded_id, parse_traceparent};

/// The value of the header at an index; more than one value is an error.
pub type HeaderReader<'r, 'a> = &'r dyn Fn(usize) -> Result<Option<&'a [u8]>, InvalidContext>;

/// Takes the value of the header at an index.
pub type HeaderWriter<'w> = &'w mut dyn FnMut(usize, Vec<u8>);

/// What a request's headers say, if they say anything.
pub type ParseResult = Result<Option<TraceContext>, InvalidContext>;

/// A format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceFormat {
    TraceContext,
    B3,
    B3Multi,
    Jaeger,
    Xray,
    Gcp,
    Datadog,
    OtTrace,
    Grpc,
}

impl TraceFormat {
    /// All formats by their names in a policy.
    pub const ALL: [(&str, TraceFormat); 9] = [
        ("tracecontext", TraceFormat::TraceContext),
        ("b3", TraceFormat::B3),
        ("b3multi", TraceFormat::B3Multi),
        ("jaeger", TraceFormat::Jaeger),
        ("xray", TraceFormat::Xray),
        ("gcp", TraceFormat::Gcp),
        ("datadog", TraceFormat::Datadog),
        ("ottrace", TraceFormat::OtTrace),
        ("grpc", TraceFormat::Grpc),
    ];

    /// The format as it is told of: by its only header, or by its name.
    pub fn describe(self) -> &'static str {
        match (self.headers(), TraceFormat::ALL.iter().find(|(_, format)| *format == self)) {
            ([header], _) => header,
            (_, found) => found.map_or("", |(name, _)| name),
        }
    }

    /// Its headers; `tracestate` is a matter of its own.
    pub const fn headers(self) -> &'static [&'static str] {
        match self {
            TraceFormat::TraceContext => &["traceparent"],
            TraceFormat::B3 => &b3::HEADERS,
            TraceFormat::B3Multi => &b3multi::HEADERS,
            TraceFormat::Jaeger => &jaeger::HEADERS,
            TraceFormat::Xray => &xray::HEADERS,
            TraceFormat::Gcp => &gcp::HEADERS,
            TraceFormat::Datadog => &datadog::HEADERS,
            TraceFormat::OtTrace => &ottrace::HEADERS,
            TraceFormat::Grpc => &grpc::HEADERS,
        }
    }

    /// The places of the headers with more in them than the context: what [`TraceFormat::write`] keeps of an earlier value.
    pub const fn retained_headers(self) -> &'static [usize] {
        match self {
            TraceFormat::Xray => &xray::RETAINED,
            TraceFormat::Datadog => &datadog::RETAINED,
            _ => &[],
        }
    }

    /// The context in a request's headers.
    ///
    /// # Errors
    /// Why there is none that may be used, though there are headers.
    pub fn parse(self, read: HeaderReader<'_, '_>) -> ParseResult {
        match self {
            TraceFormat::TraceContext => read(0)?.map(parse_traceparent).transpose(),
            TraceFormat::B3 => b3::parse(read),
            TraceFormat::B3Multi => b3multi::parse(read),
            TraceFormat::Jaeger => jaeger::parse(read),
            TraceFormat::Xray => xray::parse(read),
            TraceFormat::Gcp => gcp::parse(read),
            TraceFormat::Datadog => datadog::parse(read),
            TraceFormat::OtTrace => ottrace::parse(read),
            TraceFormat::Grpc => grpc::parse(read),
        }
    }

    /// Writes `context`, whose ids are complete and whose sampling is decided. `read` is for what else the format keeps
    /// in its headers.
    pub fn write(self, context: &TraceContext, read: HeaderReader<'_, '_>, write: HeaderWriter<'_>) {
        match self {
            TraceFormat::TraceContext => write(0, format_traceparent(context)),
            TraceFormat::B3 => b3::write(context, write),
            TraceFormat::B3Multi => b3multi::write(context, write),
            TraceFormat::Jaeger => jaeger::write(context, write),
            TraceFormat::Xray => xray::write(context, read, write),
            TraceFormat::Gcp => gcp::write(context, write),
            TraceFormat::Datadog => datadog::write(context, read, write),
            TraceFormat::OtTrace => ottrace::write(context, write),
            TraceFormat::Grpc => grpc::write(context, write),
        }
    }
}

/// A decision that came without ids.
fn decision_without_ids(flags: TraceFlags) -> ParseResult {
    Ok(Some(TraceContext { trace_id: [0; 16], parent_id: [0; 8], flags }))
}

/// A context whose ids are written in digits, be they too few.
#[inline(never)]
fn parse_context(trace_id: &[u8], parent_id: &[u8], flags: TraceFlags) -> ParseResult {
    Ok(Some(TraceContext { trace_id: parse_padded_id(trace_id)?, parent_id: parse_padded_id(parent_id)?, flags }))
}

/// A boolean as formats write it: a digit or a word, in any case. `None` if the value is neither.
fn sampled_word(value: &[u8]) -> Option<bool> {
    match value {
        b"0" => Some(false),
        b"1" => Some(true),
        _ if value.eq_ignore_ascii_case(b"true") => Some(true),
        _ if value.eq_ignore_ascii_case(b"false") => Some(false),
        _ => None,
    }
}

/// `0` or `1`.
const fn bit(value: bool) -> u8 {
    if value { b'1' } else { b'0' }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::w3c::push_hex;
    use proptest::prelude::*;

    /// What `format` reads from headers by name.
    pub fn parse(format: TraceFormat, headers: &[(&str, &str)]) -> ParseResult {
        format.parse(&|index| {
            let name = format.headers()[index];
            let mut values = headers.iter().filter(|(found, _)| *found == name).map(|(_, value)| value.as_bytes());
            let first = values.next();
            if values.next().is_some() { Err(InvalidContext::Duplicate) } else { Ok(first) }
        })
    }

    /// What `format` writes, by name.
    pub fn write_all(format: TraceFormat, context: &TraceContext) -> Vec<(&'static str, String)> {
        let mut headers = Vec::new();
        format.write(context, &|_| Ok(None), &mut |index, value| {
            headers.push((format.headers()[index], String::from_utf8(value).unwrap()));
        });
        headers
    }

    fn describe(parsed: ParseResult) -> String {
        match parsed {
            Err(invalid) => format!("{invalid:?}"),
            Ok(None) => "-".into(),
            Ok(Some(context)) => {
                let mut text = Vec::new();
                push_hex(&mut text, &context.trace_id);
                text.push(b' ');
                push_hex(&mut text, &context.parent_id);
                let flags = match context.flags {
                    flags if flags.contains(TraceFlags::DEFERRED) => "undecided",
                    flags if flags.contains(TraceFlags::DEBUG) => "debug",
                    flags if flags.sampled() => "sampled",
                    _ => "not",
                };
                format!("{} {flags}", String::from_utf8(text).unwrap())
            }
        }
    }

    /// The examples of the formats' own specifications, and what lies just beside them.
    #[test]
    fn vectors() {
        const B3: &str = "80f198ee56343ba864fe8b2a57d3eff7 e457b5a2e4d86bd1";
        let one = |format: TraceFormat, value: &str| describe(parse(format, &[(format.headers()[0], value)]));
        let b3 = |value: &str| one(TraceFormat::B3, value);
        assert_eq!(b3("80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90"), format!("{B3} sampled"));
        assert_eq!(b3("80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-d"), format!("{B3} debug"));
        assert_eq!(b3("80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1"), format!("{B3} undecided"));
        assert_eq!(b3("64fe8b2a57d3eff7-e457b5a2e4d86bd1-0"), "000000000000000064fe8b2a57d3eff7 e457b5a2e4d86bd1 not");
        assert_eq!(b3("0"), "00000000000000000000000000000000 0000000000000000 not");
        for bad in [
            "",
            "x",
            "2",
            "80f198ee56343ba864fe8b2a57d3eff7",
            "80f198ee56343ba864fe8b2a57d3eff-e457b5a2e4d86bd1-1",
            "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90-",
        ] {
            assert_eq!(b3(bad), "Shape", "{bad}");
        }
        assert_eq!(b3("00000000000000000000000000000000-e457b5a2e4d86bd1-1"), "ZeroTraceId");

        let ids = [("x-b3-traceid", "80f198ee56343ba864fe8b2a57d3eff7"), ("x-b3-spanid", "e457b5a2e4d86bd1")];
        let multi = |more: &[(&str, &str)]| describe(parse(TraceFormat::B3Multi, &[&ids, more].concat()));
        assert_eq!(multi(&[]), format!("{B3} undecided"));
        assert_eq!(multi(&[("x-b3-sampled", "1"), ("x-b3-parentspanid", "05e3ac9a4f6e3b90")]), format!("{B3} sampled"));
        assert_eq!(multi(&[("x-b3-sampled", "false")]), format!("{B3} not"));
        assert_eq!(multi(&[("x-b3-flags", "1"), ("x-b3-sampled", "0")]), format!("{B3} debug"));
        assert_eq!(multi(&ids), "Duplicate");
        assert_eq!(describe(parse(TraceFormat::B3Multi, &ids[..1])), "Shape");
        let only = describe(parse(TraceFormat::B3Multi, &[("x-b3-sampled", "0")]));
        assert_eq!(only, "00000000000000000000000000000000 0000000000000000 not");

        let jaeger = |value: &str| one(TraceFormat::Jaeger, value);
        assert_eq!(jaeger("1:2:0:1"), "00000000000000000000000000000001 0000000000000002 sampled");
        assert_eq!(jaeger("a%3A2%3a0%3A3"), "0000000000000000000000000000000a 0000000000000002 debug");
        assert_eq!(jaeger("80f198ee56343ba864fe8b2a57d3eff7:e457b5a2e4d86bd1:0:0"), format!("{B3} not"));
        for (bad, why) in [("1:2:0", "Shape"), ("1:2:0:1:1", "Shape"), ("0:2:0:1", "ZeroTraceId")] {
            assert_eq!(jaeger(bad), why, "{bad}");
        }

        let xray = |value: &str| one(TraceFormat::Xray, value);
        let root = "5759e988bd862e3fe1be46a994272793";
        assert_eq!(
            xray("Root=1-5759e988-bd862e3fe1be46a994272793;Parent=53995c3f42cd8ad8;Sampled=1"),
            format!("{root} 53995c3f42cd8ad8 sampled")
        );
        assert_eq!(
            xray("Self=1-67891234-12456789abcdef012345678;Root=1-5759e988-bd862e3fe1be46a994272793"),
            format!("{root} 0000000000000000 undecided"),
            "what a load balancer adds"
        );
        assert_eq!(
            xray("Sampled=?; Parent=53995c3f42cd8ad8; Root=1-5759e988-bd862e3fe1be46a994272793"),
            format!("{root} 53995c3f42cd8ad8 undecided")
        );
        for bad in ["", "Root=", "Root=2-5759e988-bd862e3fe1be46a994272793", "Root=1-5759e98-8bd862e3fe1be46a994272793"]
        {
            assert_eq!(xray(bad), "Shape", "{bad}");
        }

        let gcp = |value: &str| one(TraceFormat::Gcp, value);
        assert_eq!(
            gcp("105445aa7843bc8bf206b12000100000/1;o=1"),
            "105445aa7843bc8bf206b12000100000 0000000000000001 sampled"
        );
        assert_eq!(
            gcp("105445aa7843bc8bf206b12000100000"),
            "105445aa7843bc8bf206b12000100000 0000000000000000 undecided"
        );
        assert_eq!(
            gcp("105445aa7843bc8bf206b12000100000/18446744073709551615;o=0"),
            "105445aa7843bc8bf206b12000100000 ffffffffffffffff not"
        );
        assert_eq!(gcp("105445aa7843bc8bf206b12000100000/18446744073709551616"), "Shape");
        assert_eq!(gcp("105445aa7843bc8bf206b1200010000/1"), "Shape");

        let datadog = |more: &[(&str, &str)]| {
            let ids = [("x-datadog-trace-id", "7277407061855694839"), ("x-datadog-parent-id", "16453819474850114513")];
            describe(parse(TraceFormat::Datadog, &[&ids, more].concat()))
        };
        assert_eq!(datadog(&[]), "000000000000000064fe8b2a57d3eff7 e457b5a2e4d86bd1 undecided");
        assert_eq!(
            datadog(&[
                ("x-datadog-tags", "_dd.p.dm=-4,_dd.p.tid=80f198ee56343ba8"),
                ("x-datadog-sampling-priority", "2")
            ]),
            format!("{B3} sampled")
        );
        assert_eq!(
            datadog(&[("x-datadog-tags", "_dd.p.tid=xyz"), ("x-datadog-sampling-priority", "-1")]),
            "000000000000000064fe8b2a57d3eff7 e457b5a2e4d86bd1 not",
            "a bad high half is as good as none"
        );
        assert_eq!(describe(parse(TraceFormat::Datadog, &[("x-datadog-trace-id", "0")])), "ZeroTraceId");
        assert_eq!(describe(parse(TraceFormat::Datadog, &[("x-datadog-trace-id", "-1")])), "Shape");
        assert_eq!(describe(parse(TraceFormat::Datadog, &[("x-datadog-parent-id", "1")])), "-");

        let ids = [("ot-tracer-traceid", "64fe8b2a57d3eff7"), ("ot-tracer-spanid", "e457b5a2e4d86bd1")];
        let ottrace = |more: &[(&str, &str)]| describe(parse(TraceFormat::OtTrace, &[&ids, more].concat()));
        assert_eq!(ottrace(&[]), "000000000000000064fe8b2a57d3eff7 e457b5a2e4d86bd1 undecided");
        assert_eq!(
            ottrace(&[("ot-tracer-sampled", "true")]),
            "000000000000000064fe8b2a57d3eff7 e457b5a2e4d86bd1 sampled"
        );
        assert_eq!(describe(parse(TraceFormat::OtTrace, &ids[..1])), "Shape");

        let grpc = |value: &str| one(TraceFormat::Grpc, value);
        let bytes = "AABAQUJDREVGR0hJSktMTU5PAWFiY2RlZmdoAgE";
        let expected = "404142434445464748494a4b4c4d4e4f 6162636465666768 sampled";
        assert_eq!(grpc(bytes), expected);
        assert_eq!(grpc(&format!("{bytes}=")), expected);
        for bad in
            ["", "A", "AABA", "AQBAQUJDREVGR0hJSktMTU5PAWFiY2RlZmdoAgE", "AABAQUJDREVGR0hJSktMTU5PAWFiY2RlZmdoAgE*"]
        {
            assert_ne!(grpc(bad), expected, "{bad}");
        }
    }

    /// A sampling field that its format does not define leaves the ids alone. It is read where its meaning is plain;
    /// otherwise the decision is left open.
    #[test]
    fn an_unusual_sampling_field_does_not_invalidate_the_ids() {
        const IDS: &str = "80f198ee56343ba864fe8b2a57d3eff7 e457b5a2e4d86bd1";
        const LOW: &str = "000000000000000064fe8b2a57d3eff7 e457b5a2e4d86bd1";
        let check = |format: TraceFormat, ids: &str, headers: &[(&str, &str)], decision: &str| {
            assert_eq!(describe(parse(format, headers)), format!("{ids} {decision}"), "{headers:?}");
        };

        let b3 = [
            ("", "undecided"),
            ("2", "undecided"),
            ("x", "undecided"),
            ("true", "sampled"),
            ("True", "sampled"),
            ("false", "not"),
            ("D", "debug"),
            ("1-05e3", "sampled"),
            ("?-", "undecided"),
        ];
        for (state, decision) in b3 {
            let value = format!("80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-{state}");
            check(TraceFormat::B3, IDS, &[("b3", &value)], decision);
        }

        let ids = [("x-b3-traceid", "80f198ee56343ba864fe8b2a57d3eff7"), ("x-b3-spanid", "e457b5a2e4d86bd1")];
        let sampled = [
            ("True", "sampled"),
            ("TRUE", "sampled"),
            ("False", "not"),
            ("d", "debug"),
            ("", "undecided"),
            ("2", "undecided"),
            ("maybe", "undecided"),
        ];
        for (value, decision) in sampled {
            check(TraceFormat::B3Multi, IDS, &[&ids[..], &[("x-b3-sampled", value)]].concat(), decision);
        }
        let twice = [("x-b3-sampled", "1"), ("x-b3-sampled", "1")];
        check(TraceFormat::B3Multi, IDS, &[&ids[..], &twice].concat(), "undecided");
        let flags = [("x-b3-flags", "x"), ("x-b3-sampled", "0")];
        check(TraceFormat::B3Multi, IDS, &[&ids[..], &flags].concat(), "not");
        let twice = [("x-b3-flags", "1"), ("x-b3-flags", "1"), ("x-b3-sampled", "1")];
        check(TraceFormat::B3Multi, IDS, &[&ids[..], &twice].concat(), "sampled");

        for (flags, decision) in [
            ("", "undecided"),
            ("x", "undecided"),
            ("-1", "undecided"),
            ("101", "undecided"),
            ("5", "sampled"),
            ("8", "not"),
            ("2", "debug"),
        ] {
            let value = format!("80f198ee56343ba864fe8b2a57d3eff7:e457b5a2e4d86bd1:0:{flags}");
            check(TraceFormat::Jaeger, IDS, &[("uber-trace-id", &value)], decision);
        }

        for (sampled, decision) in
            [("2", "undecided"), ("", "undecided"), ("true", "undecided"), ("1;Lineage=a:0", "sampled")]
        {
            let value = format!("Root=1-80f198ee-56343ba864fe8b2a57d3eff7;Parent=e457b5a2e4d86bd1;Sampled={sampled}");
            check(TraceFormat::Xray, IDS, &[("x-amzn-trace-id", &value)], decision);
        }

        for options in [";o=2", ";o=", ";o", ";", ";x=1", ";o=1;o=0"] {
            let value = format!("80f198ee56343ba864fe8b2a57d3eff7/16453819474850114513{options}");
            check(TraceFormat::Gcp, IDS, &[("x-cloud-trace-context", &value)], "undecided");
        }

        let ids = [("x-datadog-trace-id", "7277407061855694839"), ("x-datadog-parent-id", "16453819474850114513")];
        let priorities = [
            ("3", "sampled"),
            ("99999999999999999999", "sampled"),
            ("-2", "not"),
            ("-0", "not"),
            ("00", "not"),
            ("", "undecided"),
            ("-", "undecided"),
            ("+1", "undecided"),
            ("1.5", "undecided"),
            ("keep", "undecided"),
        ];
        for (priority, decision) in priorities {
            let headers = [&ids[..], &[("x-datadog-sampling-priority", priority)]].concat();
            check(TraceFormat::Datadog, LOW, &headers, decision);
        }
        for name in ["x-datadog-sampling-priority", "x-datadog-tags"] {
            let twice = [(name, "1"), (name, "1")];
            check(TraceFormat::Datadog, LOW, &[&ids[..], &twice].concat(), "undecided");
        }

        let ids = [("ot-tracer-traceid", "64fe8b2a57d3eff7"), ("ot-tracer-spanid", "e457b5a2e4d86bd1")];
        for (sampled, decision) in
            [("True", "sampled"), ("FALSE", "not"), ("", "undecided"), ("2", "undecided"), ("yes", "undecided")]
        {
            let headers = [&ids[..], &[("ot-tracer-sampled", sampled)]].concat();
            check(TraceFormat::OtTrace, LOW, &headers, decision);
        }
        let twice = [("ot-tracer-sampled", "true"), ("ot-tracer-sampled", "true")];
        check(TraceFormat::OtTrace, LOW, &[&ids[..], &twice].concat(), "undecided");

        let ids = "404142434445464748494a4b4c4d4e4f 6162636465666768";
        for (value, decision) in [
            ("AABAQUJDREVGR0hJSktMTU5PAWFiY2RlZmdo", "undecided"),
            ("AABAQUJDREVGR0hJSktMTU5PAWFiY2RlZmdoAg==", "undecided"),
            ("AABAQUJDREVGR0hJSktMTU5PAWFiY2RlZmdoAwE", "undecided"),
            ("AABAQUJDREVGR0hJSktMTU5PAWFiY2RlZmdoAv8", "sampled"),
            ("AABAQUJDREVGR0hJSktMTU5PAWFiY2RlZmdoAgEDBAUG", "sampled"),
        ] {
            check(TraceFormat::Grpc, ids, &[("grpc-trace-bin", value)], decision);
        }
    }

    #[test]
    fn unknown_fields_of_x_ray_are_kept() {
        let context = TraceContext { trace_id: [1; 16], parent_id: [2; 8], flags: TraceFlags::SAMPLED };
        let rewritten = |value: &str| {
            let mut text = Vec::new();
            TraceFormat::Xray.write(&context, &|_| Ok(Some(value.as_bytes())), &mut |_, value| text = value);
            String::from_utf8(text).unwrap()
        };
        let ours = "Root=1-01010101-010101010101010101010101;Parent=0202020202020202;Sampled=1";
        for (value, kept) in [
            (
                "Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=0;Lineage=a87bd80c:1|68fd508a:5",
                ";Lineage=a87bd80c:1|68fd508a:5",
            ),
            (
                "Self=1-67891234-12456789abcdef012345678;Root=1-5759e988-bd862e3fe1be46a994272793",
                ";Self=1-67891234-12456789abcdef012345678",
            ),
            (
                "Root=1-5759e988-bd862e3fe1be46a994272793; CalledFrom=app ;; Parent=53995c3f42cd8ad8;k=a=b",
                ";CalledFrom=app;k=a=b",
            ),
            ("Root=nonsense;word;=1;Lineage=", ";Lineage="),
            ("", ""),
        ] {
            assert_eq!(rewritten(value), format!("{ours}{kept}"), "{value}");
        }
    }

    #[test]
    fn a_priority_that_datadog_does_not_define_is_replaced() {
        for (priority, flags, expected) in [
            ("2", TraceFlags::SAMPLED, "2"),
            ("-1", TraceFlags::NONE, "-1"),
            ("-1", TraceFlags::SAMPLED, "1"),
            ("3", TraceFlags::SAMPLED, "1"),
            ("-2", TraceFlags::NONE, "0"),
            ("", TraceFlags::SAMPLED, "1"),
        ] {
            let context = TraceContext { trace_id: [1; 16], parent_id: [2; 8], flags };
            let read = |index| Ok((index == 2).then_some(priority.as_bytes()));
            let mut written = Vec::new();
            TraceFormat::Datadog.write(&context, &read, &mut |index, value| {
                if index == 2 {
                    written = value;
                }
            });
            assert_eq!(written, expected.as_bytes(), "{priority}");
        }
    }

    #[test]
    fn datadogs_own_tags_and_priority_stay() {
        let format = TraceFormat::Datadog;
        let context = TraceContext { trace_id: [1; 16], parent_id: [2; 8], flags: TraceFlags::SAMPLED };
        let inbound = |index: usize| {
            Ok(match format.headers()[index] {
                "x-datadog-tags" => Some(&b"_dd.p.dm=-4,_dd.p.tid=0,_dd.p.usr=x"[..]),
                "x-datadog-sampling-priority" => Some(&b"2"[..]),
                "x-datadog-origin" => Some(&b"rum"[..]),
                _ => None,
            })
        };
        let mut headers = Vec::new();
        format.write(&context, &inbound, &mut |index, value| {
            headers.push((format.headers()[index], String::from_utf8(value).unwrap()));
        });
        let value = |name| headers.iter().find(|(found, _)| *found == name).map(|(_, value)| value.as_str());
        assert_eq!(value("x-datadog-tags"), Some("_dd.p.dm=-4,_dd.p.usr=x,_dd.p.tid=0101010101010101"));
        assert_eq!(value("x-datadog-sampling-priority"), Some("2"));
        assert_eq!(value("x-datadog-origin"), Some("rum"));
    }

    proptest! {
        #[test]
        fn parse_and_write_are_inverse(trace_id: [u8; 16], parent_id: [u8; 8], sampled: bool, debug: bool) {
            prop_assume!(trace_id[8..] != [0; 8] && parent_id != [0; 8]);
            for (name, format) in TraceFormat::ALL {
                let carries_debug = matches!(format, TraceFormat::B3 | TraceFormat::B3Multi | TraceFormat::Jaeger);
                let flags = match (debug && carries_debug, sampled) {
                    (true, _) => TraceFlags::DEBUG.with(TraceFlags::SAMPLED),
                    (false, sampled) => TraceFlags::decided(Some(sampled)),
                };
                let mut context = TraceContext { trace_id, parent_id, flags };
                if format == TraceFormat::OtTrace {
                    context.trace_id[..8].fill(0);
                }
                let headers = write_all(format, &context);
                let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
                prop_assert_eq!(parse(format, &headers), Ok(Some(context)), "{}: {:?}", name, headers);
            }
        }

        #[test]
        fn no_bytes_panic(value in proptest::collection::vec(any::<u8>(), 0..120), index in 0..5_usize) {
            for (_, format) in TraceFormat::ALL {
                let _ = format.parse(&|_| Ok(Some(&value)));
                let _ = format.parse(&|asked| Ok(Some(if asked == index { &value } else { b"1" })));
            }
        }

        /// Near misses of the grammars, which random bytes never reach.
        #[test]
        fn nothing_near_a_format_panics(value in "[0-9a-f:;,=/%oRP_.dt-]{0,70}", prefix in 0..6_usize) {
            let prefix = ["", "Root=1-", "0123456789abcdef0123456789abcdef", "AAAA", "_dd.p.tid=", "1:2"][prefix];
            let value = format!("{prefix}{value}");
            for (_, format) in TraceFormat::ALL {
                let _ = format.parse(&|_| Ok(Some(value.as_bytes())));
            }
        }
    }
}
