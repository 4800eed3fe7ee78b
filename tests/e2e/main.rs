//! End to end: the module that ships in a real Envoy, between a real client and real upstreams. What is asserted is
//! what the client and the upstream saw.

mod breaker;
mod canary;
mod fault;
mod global;
mod guard;
mod hops;
mod hostile;
mod ratelimit;
mod rollout;
mod statistics;
mod steering;
mod storm;
mod trace;
mod trap;
mod update;
mod upstream;
mod world;
