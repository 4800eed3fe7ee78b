//! Trimtab: canary routing, guarded fault injection, trace propagation and rate limiting inside the data plane. One
//! WebAssembly module for Envoy and Istio, driven by one policy document.
//!
//! # A request's way
//!
//! [`filter`] is the file to read first: a request from top to bottom, and why in this order.
//!
//! ```text
//!  document ──► policy ──► filter ◄── host (Envoy, or a simulation)
//!  (as written)  (compiled)   │
//!                             ├─ trace      which trace it belongs to
//!                             ├─ matcher    which route it takes (found by its path: route_table)
//!                             ├─ ratelimit  whether it is admitted
//!                             ├─ breaker    whether its target may be asked at all
//!                             ├─ canary     which destination it goes to
//!                             ├─ fault      what is injected, unless the destination is unwell
//!                             └─ outlier    what its answer says of the destination
//! ```
//!
//! # The rooms
//!
//! A feature is a folder of one shape: `config.rs` reads the block that is written, `policy.rs` is what it is compiled
//! to, `decision.rs` decides on one request from plain values. What has an idea of its own has a file of its own:
//! [`canary`]'s cohort, judge and cohort header, [`ratelimit`]'s GCRA, table and leases, [`fault`]'s guard and budget,
//! [`trace`]'s formats and bridge, [`outlier`]'s window, table of hosts and reading of Envoy's admin endpoint. What a
//! worker does about a feature with a host at hand, and keeps from one request to the next, stands beside the filter:
//! `filter/limiter.rs`, `filter/injection.rs` and `filter/watch.rs` for faults and their
//! guard, `filter/circuit.rs` for the breaker.
//!
//! [`document`] and [`diagnostic`] read strictly and tell all errors at once; [`policy`] puts the blocks together.
//! [`http`], [`key`], [`address`], [`bytes`], [`slo`] and [`units`] are the words that features speak in. [`telemetry`]
//! names the metrics. [`worker`] is a filter with the streams that it holds, which every host drives. [`host`] is what the
//! core asks of its surroundings; `host/proxy_wasm.rs` alone knows the ABI.
//!
//! # Invariants
//!
//! - No feature imports another feature; only [`filter`] and [`policy`] know several. ([`fault`] and [`breaker`] look
//!   through [`outlier`]'s windows, which is no feature but what features see by.)
//! - Features read no clock and draw no random number: both are arguments.
//! - What a request meets was validated: a document with an error becomes no [`policy::Policy`].
//! - Nothing panics: not for a request, a response, a document, or a neighbour's bytes in shared data. The lints below
//!   keep `unwrap`, `expect`, `panic` and indexing out.
//! - Every shared word's key begins with the policy's name and a schema version; their number is bounded.
//! - The headers of a request are fetched once.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::unreachable,
        clippy::todo
    )
)]

pub mod address;
pub mod breaker;
pub mod bytes;
pub mod canary;
pub mod decimal;
pub mod diagnostic;
pub mod document;
pub mod evidence;
pub mod fault;
pub mod filter;
pub mod host;
pub mod http;
pub mod key;
pub mod matcher;
pub mod outlier;
pub mod policy;
pub mod random;
pub mod ratelimit;
pub mod route_table;
pub mod shared_data;
pub mod slo;
pub mod telemetry;
pub mod trace;
pub mod units;
pub mod worker;
