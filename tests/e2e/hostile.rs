//! Requests that no client should send: whatever Envoy lets through, the module survives.

use crate::world::{Setup, World, policy};
use trimtab_testbed::{Behaviour, RawConnection, Request, needs_envoy, raw};

/// Every block at work.
fn everything() -> String {
    policy(
        r#"{"name": "all",
            "match": [{"uri": {"regex": "/x.*"}, "headers": {"x-a": {"regex": ".*"}}, "queryParams": {"q": {}}, "cookies": {"c": {}}},
                      {"withoutHeaders": {"x-a": {"exact": "never"}}, "method": {"regex": ".*"}}],
            "route": [{"destination": {"host": "user-service", "subset": "v1"}, "weight": 50},
                      {"destination": {"host": "user-service", "subset": "v2"}, "weight": 50}],
            "canary": {"destination": "v2", "rollout": "r",
                       "key": [{"cookie": "c"}, {"queryParam": "q"}, {"pathSegment": 3}, {"header": "x-a"}, {"sourceAddress": {}}]},
            "rateLimits": [{"name": "l", "limit": {"requestsPerUnit": 100000, "unit": "second"},
                            "key": [{"header": "x-a"}, {"cookie": "c"}, {"sourceAddress": {}}, {"property": "request.id"}]}],
            "fault": {"delay": {"percentage": {"value": 20}, "fixedDelay": "5ms"}, "key": "random"}}"#,
        r#", "trace": {"extract": ["tracecontext", "b3", "b3multi", "jaeger", "xray", "gcp", "datadog", "ottrace", "grpc"],
            "inject": ["tracecontext", "b3", "datadog"], "direction": "inbound", "bridge": {"key": {"header": "x-a"}},
            "response": "serverTiming"}"#,
    )
}

#[tokio::test]
async fn no_request_traps_the_module() {
    needs_envoy!();
    let world = World::start(&everything()).await;
    let address = world.envoy.address("inbound");
    let large = "x".repeat(50_000);
    // The upstream takes 100 headers, and Envoy adds some.
    let many: String = (0..85).map(|n| format!("x-header-{n}: {n}\r\n")).collect();
    let ok = "HTTP/1.1 200";
    // What is sent after the request line, and how the answer begins. `None`: Envoy's own affair.
    let requests: Vec<(Vec<u8>, Option<&str>)> = vec![
        (b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".to_vec(), Some(ok)),
        (b"GET / HTTP/1.0\r\n\r\n".to_vec(), None),
        (b"GET http://example.com/absolute?q=1 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".to_vec(), Some(ok)),
        (b"OPTIONS * HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".to_vec(), None),
        (b"CONNECT example.com:443 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".to_vec(), None),
        (b"GET /x\xff?q=\xfe HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".to_vec(), None),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx-a: \xff\xfe\x80\r\ncookie: c=\xff\r\nconnection: close\r\n\r\n".to_vec(), Some(ok)),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx-a:\r\nx-a:\r\ncookie: ;;=;c\r\ncookie: c=\r\nconnection: close\r\n\r\n".to_vec(), Some(ok)),
        (format!("GET / HTTP/1.1\r\nhost: a\r\nx-a: {large}\r\nconnection: close\r\n\r\n").into_bytes(), Some(ok)),
        (format!("GET / HTTP/1.1\r\nhost: a\r\ntraceparent: {large}\r\nconnection: close\r\n\r\n").into_bytes(), Some(ok)),
        (format!("GET / HTTP/1.1\r\nhost: a\r\nb3: {large}\r\ntracestate: =,=\r\nx-amzn-trace-id: Root=1-é\r\nconnection: close\r\n\r\n").into_bytes(), Some(ok)),
        (format!("GET / HTTP/1.1\r\nhost: a\r\nbaggage: {},{large}\r\nuber-trace-id: 1:%3A:\r\nx-datadog-trace-id: -0\r\nconnection: close\r\n\r\n", "a=1,".repeat(200)).into_bytes(), Some(ok)),
        (format!("GET / HTTP/1.1\r\nhost: a\r\n{many}connection: close\r\n\r\n").into_bytes(), Some(ok)),
        (format!("GET /{large} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").into_bytes(), Some(ok)),
        (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntrailer: t\r\nconnection: close\r\n\r\n1\r\na\r\n0\r\nt: \xff\r\n\r\n".to_vec(), None),
    ];
    for (request, expected) in requests {
        for _ in 0..4 {
            let answer = String::from_utf8_lossy(&raw(address, &request).await).into_owned();
            let shown = String::from_utf8_lossy(request.get(..request.len().min(60)).unwrap()).into_owned();
            assert!(answer.starts_with("HTTP/1."), "{shown:?} was answered {answer:?}");
            if let Some(expected) = expected {
                assert!(answer.starts_with(expected), "{shown:?} was answered {answer:?}");
            }
        }
    }
    world.assert_no_trap().await;
}

#[tokio::test]
async fn clients_and_upstreams_may_break_off_at_any_point() {
    needs_envoy!();
    let world = World::with(&everything(), Setup { http2: true, ..Setup::default() }).await;
    let address = world.envoy.address("inbound");
    for bytes in
        [&b""[..], b"GET", b"GET / HTTP/1.1\r\nhost: a", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc"]
    {
        for _ in 0..10 {
            let mut connection = RawConnection::open(address).await;
            connection.write(bytes).await;
        }
    }
    let client = world.http2_client();
    for behaviour in [
        Behaviour::reset(),
        Behaviour::grpc(14),
        Behaviour::echo().trailer("t", b"\xff"),
        Behaviour::echo().body_size(1 << 20),
    ] {
        world.v1.set_behaviour(behaviour.clone());
        world.v2.set_behaviour(behaviour);
        for _ in 0..20 {
            let _ = client.try_send(Request::grpc("/a.B/C").trailer("x", b"\xff")).await;
            let _ = client.try_send(Request::post("/", vec![0; 100_000])).await;
        }
    }
    world.v1.set_behaviour(Behaviour::echo());
    world.v2.set_behaviour(Behaviour::echo());
    assert_eq!(client.send(Request::get("/")).await.status, 200);
    world.assert_no_trap().await;
}
