//! The host's side of a VM: what host functions read and write.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use wasmtime::{ResourceLimiter, StoreLimits, StoreLimitsBuilder};

use crate::abi::Status;
use crate::calls::{Answer, GrpcCall, HttpCall};
use crate::costs::Costs;
use crate::failure::{Level, LogLine};
use crate::stream::{Deferred, Stream};
use crate::vm::{Options, RootId};
use crate::wasi::Random;
use crate::world::World;

/// The memory that a guest can grow to.
const MEMORY: usize = 256 << 20;

/// A root context.
pub(crate) struct Root {
    name: String,
    /// The period, and when the next tick is due by the monotonic clock.
    pub(crate) tick: Option<(Duration, Duration)>,
    /// Whether it is to end with its last stream.
    pub(crate) stopped: bool,
    /// Whether the guest was asked to end it.
    pub(crate) ending: bool,
    /// Whether the guest put that off.
    pub(crate) put_off: bool,
}

impl Root {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), tick: None, stopped: false, ending: false, put_off: false }
    }
}

/// The host's side of one VM: what the host functions read and write.
pub(crate) struct Host {
    pub(crate) world: World,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) vm_configuration: Vec<u8>,
    /// There only while a plugin is being started.
    pub(crate) plugin_configuration: Option<Vec<u8>>,
    pub(crate) log_level: Level,
    pub(crate) log: Vec<LogLine>,
    pub(crate) random: Random,
    pub(crate) costs: Costs,
    pub(crate) initialising: bool,

    pub(crate) roots: BTreeMap<u32, Root>,
    pub(crate) streams: BTreeMap<u32, Stream>,
    /// The context of the callback, and what the guest put in its place.
    context: u32,
    effective_context: u32,

    /// A local reply was sent: the callback's result does not count.
    pub(crate) stop_iteration: bool,
    /// What the callback asked for that happens when it has returned.
    pub(crate) deferred: VecDeque<Deferred>,

    calls: u32,
    pub(crate) http_calls: BTreeMap<u32, HttpCall>,
    pub(crate) grpc_calls: BTreeMap<u32, GrpcCall>,
    /// What the current callback can read of the answer to a call.
    pub(crate) answer: Answer,

    limits: StoreLimits,
}

impl Host {
    pub(crate) fn new(world: &World, options: Options) -> Self {
        Self {
            world: world.clone(),
            environment: options.environment,
            vm_configuration: options.vm_configuration,
            plugin_configuration: None,
            log_level: options.log_level,
            log: Vec::new(),
            random: Random::new(world.next_seed()),
            costs: Costs::default(),
            initialising: true,
            roots: BTreeMap::new(),
            streams: BTreeMap::new(),
            context: 0,
            effective_context: 0,
            stop_iteration: false,
            deferred: VecDeque::new(),
            calls: 0,
            http_calls: BTreeMap::new(),
            grpc_calls: BTreeMap::new(),
            answer: Answer::default(),
            limits: StoreLimitsBuilder::new().memory_size(MEMORY).build(),
        }
    }

    pub(crate) fn limits(&mut self) -> &mut dyn ResourceLimiter {
        &mut self.limits
    }

    /// Begins a callback of a context.
    pub(crate) fn enter(&mut self, context: u32) {
        self.context = context;
        self.effective_context = 0;
        self.stop_iteration = false;
    }

    pub(crate) fn log(&mut self, level: Level, message: String) {
        self.log.push(LogLine { level, message });
    }

    /// The context that host calls are about.
    pub(crate) fn context(&self) -> u32 {
        if self.has_context(self.effective_context) { self.effective_context } else { self.context }
    }

    /// The root context of that context.
    pub(crate) fn root_context(&self) -> u32 {
        let context = self.context();
        self.streams.get(&context).map_or(context, |stream| stream.root.0)
    }

    /// The stream of that context, if it is one.
    pub(crate) fn stream(&mut self) -> Option<&mut Stream> {
        let context = self.context();
        self.streams.get_mut(&context)
    }

    fn has_context(&self, context: u32) -> bool {
        self.roots.contains_key(&context) || self.streams.contains_key(&context)
    }

    pub(crate) fn set_effective_context(&mut self, context: u32) -> Result<(), Status> {
        // 0 is the VM's own context: it means none.
        if context != 0 && !self.has_context(context) {
            return Err(Status::BadArgument);
        }
        self.effective_context = context;
        Ok(())
    }

    pub(crate) fn set_tick_period(&mut self, period: Duration) {
        let due = self.world.monotonic_clock() + period;
        if let Some(root) = self.roots.get_mut(&self.root_context()) {
            root.tick = (!period.is_zero()).then_some((period, due));
        }
    }

    /// A token for a call; as in Envoy, its low two bits are the call's type.
    pub(crate) fn next_token(&mut self, kind: u32) -> u32 {
        self.calls += 1;
        self.calls << 2 | kind
    }

    pub(crate) fn property(&mut self, path: &str) -> Option<Vec<u8>> {
        let of_stream = self.stream().and_then(|stream| stream.properties.get(path).cloned());
        of_stream.or_else(|| self.world.property(path)).or_else(|| match path {
            "plugin_name" | "plugin_root_id" => Some(self.roots.get(&self.root_context())?.name.clone().into_bytes()),
            "plugin_vm_id" => Some(Vec::new()),
            _ => None,
        })
    }

    /// `proxy_done`: allowed where the end was put off.
    pub(crate) fn done(&mut self) -> Result<(), Status> {
        let context = self.context();
        match self.roots.get_mut(&context) {
            Some(root) if root.put_off => {
                root.put_off = false;
                self.deferred.push_back(Deferred::Delete(RootId(context)));
                Ok(())
            }
            _ => Err(Status::NotFound),
        }
    }
}
