//! The conformance cases on the core, in every setting that an application puts it in: one hop alone, and inbound, an
//! application that copies some headers, and outbound.

use crate::filter::Filter;
use crate::host::Host;
use crate::host::sim::Sim;
use crate::http::encode_headers;
use crate::policy::Policy;
use cases::Headers;

#[path = "../../tests/conformance/cases.rs"]
mod cases;

fn filter(host: &Sim, direction: &str) -> Filter {
    let text = format!(
        r#"{{"apiVersion": "trimtab/v1alpha1", "name": "p",
            "trace": {{"direction": "{direction}", "bridge": {{}}, "sampling": {{"percentage": "100%"}}}}}}"#
    );
    Filter::new(Policy::from_json(text.as_bytes(), &|_| None).unwrap().0, host)
}

fn pass(filter: &mut Filter, host: &Sim, headers: &Headers) -> Headers {
    let block = encode_headers(headers);
    let decision = filter.on_request(host, &block, false, true);
    let bytes = |text: &String| text.as_bytes().to_vec();
    let mut after: Vec<_> = headers.iter().map(|(name, value)| (bytes(name), bytes(value))).collect();
    decision.mutations.iter().for_each(|mutation| mutation.apply(&mut after));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    after.into_iter().map(|(name, value)| (text(name), text(value))).collect()
}

/// Headers as a proxy has them, with the request id that it makes.
fn wire(headers: &[(&str, &str)], host: &Sim) -> Headers {
    let ows = |c| c == ' ' || c == '\t';
    let sent = headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.trim_matches(ows).to_owned()));
    sent.chain([("x-request-id".into(), format!("{:036x}", host.random()))]).collect()
}

#[test]
fn every_case_passes_on_one_hop() {
    let host = Sim::new(7);
    let mut filter = filter(&host, "inbound");
    cases::run("one hop", true, &mut |headers, calls| {
        (0..calls).map(|_| pass(&mut filter, &host, &wire(headers, &host))).collect()
    });
}

#[test]
fn every_case_passes_whatever_the_application_copies() {
    for copied in [&["x-request-id"][..], &["traceparent"], &["traceparent", "tracestate"]] {
        let host = Sim::new(7);
        let (mut inbound, mut outbound) = (filter(&host, "inbound"), filter(&host, "outbound"));
        cases::run(&format!("the application copies {copied:?}"), true, &mut |headers, calls| {
            let arrived = pass(&mut inbound, &host, &wire(headers, &host));
            let copy: Headers = arrived.into_iter().filter(|(name, _)| copied.contains(&name.as_str())).collect();
            (0..calls).map(|_| pass(&mut outbound, &host, &copy)).collect()
        });
    }
}
