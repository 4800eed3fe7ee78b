//! Headers that were valid once: pieces of every format, cut, spliced, repeated and with bytes changed, in a fixed
//! sequence. Random bytes seldom come past the first check of a parser; these do.

use super::tracestate::is_tracestate;
use super::w3c::parse_traceparent;
use crate::filter::Filter;
use crate::host::SharedData;
use crate::host::sim::Sim;
use crate::http::{HeaderMutation, encode_headers};
use crate::policy::Policy;
use crate::random::split_mix;

/// A header of each kind, as its specification shows it.
const CORPUS: [(&str, &str); 24] = [
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ("traceparent", "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff-what-the-future-will-be-like"),
    ("tracestate", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,ot=th:c;rv:0123456789abcd"),
    ("tracestate", "trimtab=1,fw529a3039@dt=FfAAAAAAAAAgBQ, a=1 \t, b=2"),
    ("baggage", "tenant=acme;private,user=%C3%A9mile ; ttl=1 , flag"),
    ("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90"),
    ("b3", "d"),
    ("x-b3-traceid", "80f198ee56343ba864fe8b2a57d3eff7"),
    ("x-b3-spanid", "e457b5a2e4d86bd1"),
    ("x-b3-sampled", "true"),
    ("x-b3-flags", "1"),
    ("uber-trace-id", "5b2b4e9f%3Aa1%3a0:3"),
    (
        "x-amzn-trace-id",
        "Self=1-67891234-12456789abcdef012345678;Root=1-67891233-abcdef012345678912345678;Parent=463ac35c9f6413ad;Sampled=1",
    ),
    ("x-cloud-trace-context", "105445aa7843bc8bf206b12000100000/18374686479671623803;o=1"),
    ("x-datadog-trace-id", "18446744073709551615"),
    ("x-datadog-parent-id", "5"),
    ("x-datadog-sampling-priority", "-1"),
    ("x-datadog-tags", "_dd.p.dm=-4,_dd.p.tid=640cfd8d00000000,_dd.p.usr.id=YQ=="),
    ("x-datadog-origin", "synthetics"),
    ("ot-tracer-traceid", "64fe8b2a57d3eff7"),
    ("ot-tracer-spanid", "e457b5a2e4d86bd1"),
    ("ot-tracer-sampled", "false"),
    ("grpc-trace-bin", "AABL+S81d7NNpqPOkp0ODkc2AQDwZ6oLqQK3AgE="),
    ("x-request-id", "a6f8a1b2-0c1d-9234-9abc-0123456789ab"),
];

struct Fuzz(u64);

impl Fuzz {
    fn below(&mut self, limit: usize) -> usize {
        (split_mix(&mut self.0) % limit.max(1) as u64) as usize
    }

    /// A value of the corpus after some accidents.
    fn value(&mut self) -> Vec<u8> {
        let mut value = CORPUS[self.below(CORPUS.len())].1.as_bytes().to_vec();
        for _ in 0..self.below(4) {
            let at = self.below(value.len());
            match self.below(6) {
                0 => value.truncate(at),
                1 => drop(value.drain(..at)),
                2 if !value.is_empty() => value[at] = self.below(256) as u8,
                3 if !value.is_empty() => value[at] = b"-:;,=/%0f\t"[self.below(10)],
                4 => {
                    let other = CORPUS[self.below(CORPUS.len())].1.as_bytes();
                    value.splice(at..at, other[self.below(other.len())..].iter().copied());
                }
                _ => value = value.repeat(1 + self.below(40)),
            }
            value.truncate(20_000);
        }
        value
    }

    /// A request's headers: each value mostly under a name of its own kind.
    fn headers(&mut self) -> Vec<(&'static str, Vec<u8>)> {
        (0..self.below(16))
            .map(|_| {
                let (name, value) = CORPUS[self.below(CORPUS.len())];
                let value = if self.below(3) == 0 { value.as_bytes().to_vec() } else { self.value() };
                (name, value)
            })
            .collect()
    }
}

#[test]
fn whatever_arrives_what_leaves_is_valid_and_no_larger() {
    const FORMATS: &str = r#"["b3", "tracecontext", "b3multi", "jaeger", "xray", "gcp", "datadog", "ottrace", "grpc"]"#;
    /// All that is written besides what is copied: the ids in nine formats, our members of `tracestate`.
    const OWN: usize = 1_000;
    let host = Sim::new(1);
    let filters = ["continue", "restart", "restartExternal"].map(|edge| {
        ["inbound", "outbound"].map(|direction| {
            let text = format!(
                r#"{{"apiVersion": "trimtab/v1alpha1", "name": "p", "trace": {{"extract": {FORMATS}, "inject": {FORMATS},
                    "edge": "{edge}", "direction": "{direction}", "filterState": ["traceId", "context"],
                    "bridge": {{"capacity": 8, "carry": ["baggage", "x-datadog-tags"]}}}}}}"#
            );
            Filter::new(Policy::from_json(text.as_bytes(), &|_| None).unwrap().0, &host)
        })
    });
    let mut filters: Vec<Filter> = filters.into_iter().flatten().collect();
    let mut fuzz = Fuzz(7);
    // What the bridge gives back, and no more, may come on top of what arrives.
    let mut largest = 0;
    let mut valid = 0;
    for round in 0..6_000 {
        let headers = fuzz.headers();
        let block = encode_headers(&headers);
        for filter in &mut filters {
            let decision = filter.on_request(&host, &block, false, true);
            let written: usize = decision
                .mutations
                .iter()
                .map(|mutation| match mutation {
                    HeaderMutation::Set(_, value) | HeaderMutation::Add(_, value) => value.len(),
                    HeaderMutation::Remove(_) => 0,
                })
                .sum();
            assert!(written <= block.len() + largest + OWN, "round {round}: {written} bytes for {headers:?}");
            let mut after: Vec<_> =
                headers.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.clone())).collect();
            decision.mutations.iter().for_each(|mutation| mutation.apply(&mut after));
            let values = |name: &str| {
                let name = name.as_bytes().to_vec();
                after.iter().filter(move |(found, _)| *found == name).map(|(_, value)| value.as_slice())
            };
            let traceparents: Vec<_> = values("traceparent").map(parse_traceparent).collect();
            assert!(matches!(traceparents[..], [Ok(_)]), "round {round}: {traceparents:?} for {headers:?}");
            assert!(is_tracestate(values("tracestate")), "round {round}: {headers:?}");
            let extraction = decision.reasons.trace.map(|trace| trace.extraction);
            valid += usize::from(extraction == Some(super::Extraction::Valid));
        }
        largest = host.keys().iter().filter_map(|key| host.get(key)).map(|(word, _)| word.len()).max().unwrap_or(0);
        assert!(largest <= 13 << 10, "a word of {largest} bytes");
    }
    assert!(host.keys().len() <= 2 * 8 + 2, "{:?}", host.keys());
    assert!((6_000..30_000).contains(&valid), "{valid} of 36,000 were valid: neither all nor none is a test");
}
