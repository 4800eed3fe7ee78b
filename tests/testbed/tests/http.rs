//! The upstream and the client, face to face, without Envoy.

use std::time::Duration;

use trimtab_testbed::{Behaviour, Client, RawConnection, Request, Upstream, raw};

#[tokio::test]
async fn the_echo_shows_what_was_sent() {
    let upstream = Upstream::start("v1").await;
    for client in [Client::http1(upstream.address()), Client::http2(upstream.address())] {
        let request = Request::post("/users/7?x=%20", "hello")
            .authority("users.example")
            .header("x-user-id", "7")
            .header("x-user-id", "")
            .header("x-bytes", b"caf\xe9");
        let response = client.send(request).await;

        assert_eq!(response.status, 200);
        assert_eq!(response.version(), "v1");
        assert_eq!(response.json()["path"], "/users/7?x=%20");
        assert_eq!(response.echoed("x-bytes").as_deref(), Some("caf\u{fffd}"));
        let received = upstream.next_request().await;
        let ids: Vec<_> = received.headers.get_all("x-user-id").iter().collect();
        assert_eq!(ids, ["7", ""], "{received:?}");
        assert_eq!(received.headers["x-bytes"], b"caf\xe9"[..]);
        assert_eq!(received.authority, "users.example");
        assert_eq!(received.body, "hello");
    }
    assert_eq!(upstream.count(), 2);
    upstream.clear();
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn failures_are_exact() {
    let upstream = Upstream::start("v1").await;
    upstream.set_behaviour(Behaviour::echo().failing(0.3, 503));
    let client = Client::http1(upstream.address());
    let mut failed = 0;
    for _ in 0..50 {
        failed += u32::from(client.send(Request::get("/")).await.status == 503);
    }
    assert_eq!(failed, 15);
}

#[tokio::test]
async fn behaviours() {
    let upstream = Upstream::start("v1").await;
    let client = Client::http1(upstream.address());
    let get = || Request::get("/").header("te", "trailers");

    upstream.set_behaviour(Behaviour::echo().body_size(100_000).trailer("x-sum", "9"));
    let response = client.send(get()).await;
    assert_eq!(response.body.len(), 100_000);
    assert_eq!(response.trailer("x-sum"), Some("9"), "{response:?}");

    upstream.set_behaviour(Behaviour::grpc(14));
    let response = Client::http2(upstream.address()).send(Request::grpc("/users.Users/Get")).await;
    assert_eq!(response.header("content-type"), Some("application/grpc"));
    assert_eq!(response.grpc_status(), Some("14"), "{response:?}");

    upstream.set_behaviour(Behaviour::echo());
    let slow = get().header("x-upstream-status", "418").header("x-upstream-latency", "50");
    let response = client.send(slow).await;
    assert_eq!(response.status, 418);
    assert!(response.elapsed >= Duration::from_millis(50), "{response:?}");

    upstream.set_behaviour(Behaviour::reset());
    let failure = client.try_send(get()).await.unwrap_err();
    assert!(failure.contains("reset"), "{failure}");

    upstream.set_behaviour(Behaviour::silent());
    let unanswered = tokio::time::timeout(Duration::from_millis(50), client.try_send(get()));
    assert!(unanswered.await.is_err());
}

#[tokio::test]
async fn raw_responses_end_where_they_end() {
    let upstream = Upstream::start("v1").await;
    upstream.set_behaviour(Behaviour::echo().status(404).body("no\r\n\r\nbody"));
    let mut connection = RawConnection::open(upstream.address()).await;
    for _ in 0..2 {
        connection.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let response = connection.read_response().await;
        assert!(response.starts_with(b"HTTP/1.1 404"), "{response:?}");
        assert!(response.ends_with(b"\r\n\r\nbody"), "{response:?}");
    }
    let head = raw(upstream.address(), "HEAD / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(head.ends_with(b"\r\n\r\n"), "{head:?}");

    upstream.set_behaviour(Behaviour::echo().trailer("x-sum", "9"));
    let request = "GET / HTTP/1.1\r\nhost: a\r\nte: trailers\r\n\r\n";
    let chunked = raw(upstream.address(), request).await;
    assert!(chunked.ends_with(b"\r\n0\r\nx-sum: 9\r\n\r\n"));
}
