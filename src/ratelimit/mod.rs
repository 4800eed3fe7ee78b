//! Per-route rate limiting: exact over all workers of a proxy.
//!
//! Each key's allowance is one number, its theoretical arrival time (`gcra`), kept in a fixed number of shared
//! words (`table`) that change by compare-and-swap. A worker reserves requests of hot keys ahead (`lease`). All
//! limits of a route must admit a request; where one refuses, what the earlier ones charged is given back. Where only
//! some answers count, room is held for a request until its answer is known. `answer` puts all of it in words. Limits of
//! a whole fleet are kept by a service that is asked for many hits at once (`service`).

mod answer;
mod config;
mod decision;
mod gcra;
mod lease;
mod policy;
pub mod service;
mod table;

pub use answer::Line;
pub use config::read;
pub use decision::{Admission, Held, Reason, Refusal, Remark, Told, admit, return_leases, settle, take_back};
pub use gcra::Gcra;
pub use lease::Leases;
pub use policy::{Keyspace, Limit, OnMissing, Rate, Secret};
