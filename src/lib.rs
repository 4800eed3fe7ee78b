//! Trimtab: canary routing, guarded fault injection, trace propagation and rate limiting inside the data plane. One
//! WebAssembly module for Envoy and Istio, driven by one policy document.
//!
//! ARCHITECTURE.md is the map of the code. [`filter`] is the file to read first: one request from top to bottom.
//! [`worker`] is the driver that every host calls.
//!
//! # Invariants
//!
//! - No feature imports another feature; only [`filter`], [`policy`] and [`worker`] use several. ([`fault`] and [`breaker`]
//!   use the windows of [`outlier`], which is no feature of its own.)
//! - Features read no clock and draw no random number: both are arguments.
//! - No decision reads a metric.
//! - A document with an error does not become a [`policy::Policy`].
//! - Nothing panics, whatever a request, a response, a document or the bytes in shared data contain. The lints below forbid
//!   `unwrap`, `expect`, `panic` and indexing.
//! - Every key in shared data begins with the policy's name and a schema version. The number of keys is bounded.
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
