//! The request that is measured wherever one is: what a browser behind a
//! gateway sends.

/// The path of the request, with its query.
pub const PATH: &str = "/api/v1/items/42?verbose=1";

/// With the four pseudo headers 15.
pub const HEADERS: [(&str, &str); 11] = [
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/126.0 Safari/537.36"),
    ("accept", "text/html,application/json;q=0.9,*/*;q=0.8"),
    ("accept-encoding", "gzip, deflate, br"),
    ("accept-language", "en-GB,en;q=0.5"),
    ("cookie", "session=7f3c2b1a9d8e4f50a6b7c8d9e0f1a2b3; theme=dark"),
    ("authorization", "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP"),
    ("x-user-id", "user-0123456789"),
    ("x-canary", "never"),
    ("x-request-id", "5a1f3c9e-7b2d-4e8f-9a0b-1c2d3e4f5a6b"),
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ("tracestate", "vendor=value"),
];
