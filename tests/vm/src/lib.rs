//! A host for one proxy-wasm module, for tests.
//!
//! Towards the module it behaves as Envoy does (ABI 0.2.1): which header map
//! is there when, what a compare-and-set on an absent key does, when a local
//! reply takes effect. Unlike Envoy it is deterministic: the clocks stand
//! still until the test moves them, chance follows from a seed, calls are
//! answered when the test answers them, and what a callback costs is counted
//! in fuel and host calls instead of seconds.
//!
//! ```no_run
//! use std::time::Duration;
//! use trimtab_vm::{Action, Module, Vm, World};
//!
//! # fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let module = Module::from_file("target/wasm/trimtab.wasm")?;
//! let world = World::new(7);
//! world.set_property("xds.route_name", "checkout");
//! let mut vm = Vm::new(&world, &module)?;
//! let root = vm.start_plugin("trimtab", r#"{"apiVersion": "trimtab/v1alpha1"}"#)?;
//!
//! let stream = vm.open_stream(root);
//! let request = [(":method", "GET"), (":path", "/"), (":authority", "shop")];
//! if vm.request_headers(stream, &request, true)? == Action::Pause {
//!     vm.advance(Duration::from_millis(50))?; // with the ticks that fall due
//! }
//! match vm.stream(stream).reply() {
//!     Some(reply) => assert_eq!(reply.status, 429),
//!     None => assert_eq!(vm.stream(stream).request_headers().text("x-canary"), Some("true")),
//! }
//! vm.close(stream)?;
//! println!("{} units of fuel", vm.costs().fuel());
//! # Ok(())
//! # }
//! ```
//!
//! A [`World`] is what the VMs of one proxy process share. A test has as many
//! VMs in it as it wants workers, on one thread or on several.
//!
//! What Envoy has and this host has not: shared queues and gRPC streams, which
//! answer with an error; buffering of bodies, of which a callback sees the part
//! that the test shows; connections; and failure policies, for a test wants
//! to see the trap.

mod abi;
mod calls;
mod costs;
mod env;
mod failure;
mod headers;
mod host;
mod module;
mod stream;
mod ticks;
mod vm;
mod wasi;
mod world;

pub use abi::Status;
pub use calls::{GrpcCall, HttpCall};
pub use costs::{Costs, Spent};
pub use failure::{Level, LogLine, Refused, Trap};
pub use headers::Headers;
pub use module::Module;
pub use stream::{Action, LocalReply, Stream, StreamId};
pub use ticks::advance;
pub use vm::{Options, RootId, Vm};
pub use wasmtime::Error;
pub use world::{Metric, World};
