//! Trace propagation: what the upstream is told.

use crate::world::{World, policy};
use trimtab_testbed::{Request, needs_envoy};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn valid_in_valid_out() {
    needs_envoy!();
    let world = World::start(&policy("", r#", "trace": {"sampling": {"percentage": "100%"}}"#)).await;
    let client = world.client();

    let request =
        Request::get("/").header("traceparent", TRACEPARENT).header("tracestate", "a=1").header("tracestate", "b=2");
    client.send(request).await;
    let seen = world.v1.next_request().await;
    let traceparent = seen.header("traceparent").unwrap();
    assert_eq!(traceparent[..36], TRACEPARENT[..36], "the same trace");
    assert_ne!(traceparent[36..52], TRACEPARENT[36..52], "a new parent");
    assert_eq!(traceparent[52..], TRACEPARENT[52..], "the same flags");
    let tracestate: Vec<_> = seen.headers.get_all("tracestate").iter().map(|value| value.to_str().unwrap()).collect();
    assert_eq!(tracestate.join(","), "a=1,b=2");

    let bad: [&[&str]; 4] =
        [&[], &["nonsense"], &[TRACEPARENT, TRACEPARENT], &["00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"]];
    for values in bad {
        let mut request = Request::get("/").header("tracestate", "a=1");
        for value in values {
            request = request.header("traceparent", value);
        }
        client.send(request).await;
        let seen = world.v1.next_request().await;
        let traceparent = seen.header("traceparent").unwrap();
        assert_ne!(traceparent[3..35], TRACEPARENT[3..35], "{values:?} begins a new trace");
        assert!(traceparent.ends_with("-03"), "{traceparent}: sampled, with a random id");
        assert_eq!(seen.headers.get_all("traceparent").iter().count(), 1);
        assert_eq!(seen.header("tracestate"), Some("ot=th:0"), "{values:?}: only how it was sampled");
    }
    assert_eq!(world.metric("trace.valid").await, 1);
    assert_eq!(world.metric("trace.missing").await, 1);
    assert_eq!(world.metric("trace.invalid").await, 3);
    world.assert_no_trap().await;
}
