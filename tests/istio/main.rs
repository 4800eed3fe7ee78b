//! Istio for real: what is below `istio/` is rendered by kubectl, judged by Istio's own validation, kept by a real
//! Kubernetes API server, delivered by a real istiod and run by a real Envoy, between a real client and real upstreams.
//!
//! `make test-istio` builds all of them first. Where they were not built, each test says so and is skipped.

mod agent;
mod control_plane;
mod delivery;
mod examples;
mod manifests;
mod mesh;
mod tools;
