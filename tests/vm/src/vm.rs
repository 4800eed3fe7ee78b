//! VMs and their root contexts, and how callbacks are run.

use std::fmt;

use wasmtime::{Instance, Memory, Store, Val};

use crate::costs::Costs;
use crate::failure::{Level, LogLine, Refused, Trap, describe};
use crate::host::{Host, Root};
use crate::module::Module;
use crate::world::World;

/// The fuel of one callback. A guest that spends it all does not end.
const FUEL: u64 = 10_000_000_000;

/// A root context of a VM: one plugin with one configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId(pub(crate) u32);

/// How to set up a VM, where the defaults do not do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The environment that the guest sees. Empty by default, as in Envoy.
    pub environment: Vec<(String, String)>,
    /// The VM's configuration, as opposed to a plugin's.
    pub vm_configuration: Vec<u8>,
    /// The level that the guest is told; all it logs is kept whatever it is.
    pub log_level: Level,
}

impl Default for Options {
    fn default() -> Self {
        Self { environment: Vec::new(), vm_configuration: Vec::new(), log_level: Level::Info }
    }
}

/// A running module, as one worker thread of Envoy has it.
pub struct Vm {
    pub(crate) store: Store<Host>,
    instance: Instance,
    memory: Option<Memory>,
    next_context: u32,
    failed: Option<Trap>,
}

impl Vm {
    /// Starts a VM with the default [`Options`].
    ///
    /// # Errors
    /// When the module cannot be instantiated, or traps.
    pub fn new(world: &World, module: &Module) -> Result<Self, Trap> {
        Self::with_options(world, module, Options::default())
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// When the module cannot be instantiated, or traps.
    pub fn with_options(world: &World, module: &Module, options: Options) -> Result<Self, Trap> {
        let mut store = Store::new(module.linker.engine(), Host::new(world, options));
        store.limiter(Host::limits);
        store.set_fuel(FUEL).expect("fuel is configured");
        let instance = module.linker.instantiate(&mut store, &module.module).map_err(|error| Trap {
            callback: "the module's start",
            reason: describe(&error),
            log: std::mem::take(&mut store.data_mut().log),
        })?;
        let memory = instance.get_memory(&mut store, "memory");
        let mut vm = Self { store, instance, memory, next_context: 0, failed: None };

        // A reactor may have a main besides; a command has only its start.
        if vm.call("_initialize", &[])?.is_none() {
            vm.call("_start", &[])?;
        } else if vm.call("main", &[0, 0])?.is_none() {
            vm.call("__main_void", &[])?;
        }
        vm.store.data_mut().initialising = false;
        Ok(vm)
    }

    /// Starts a plugin with a configuration, as a new root context.
    ///
    /// Called again it does what Envoy does when only a configuration changes:
    /// the new root context joins the old one in the same VM, and the old one
    /// lives until [`stop_plugin`](Self::stop_plugin). The name is also the
    /// root id. Where Envoy would fail the whole VM because a plugin is
    /// refused, this VM goes on without it: Envoy tries a configuration in a
    /// VM of its own before any worker sees it.
    ///
    /// # Errors
    /// When `proxy_on_vm_start` or `proxy_on_configure` answers `false` or traps.
    pub fn start_plugin(&mut self, name: &str, configuration: impl AsRef<[u8]>) -> Result<RootId, Refused> {
        let configuration = configuration.as_ref().to_vec();
        let id = self.new_context();
        let size = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a configuration is far below 4 GiB");
        let sizes = [size(&self.store.data().vm_configuration), size(&configuration)];
        let host = self.store.data_mut();
        let log_before = host.log.len();
        host.roots.insert(id, Root::new(name));
        host.plugin_configuration = Some(configuration);

        let mut start = || {
            self.callback("proxy_on_context_create", id, &[0])?;
            for (callback, size) in ["proxy_on_vm_start", "proxy_on_configure"].into_iter().zip(sizes) {
                if self.callback(callback, id, &[size])? == Some(0) {
                    return Ok(Some(callback));
                }
            }
            Ok(None)
        };
        let started = start();

        let host = self.store.data_mut();
        host.plugin_configuration = None;
        match started {
            Ok(None) => Ok(RootId(id)),
            Ok(Some(callback)) => {
                host.roots.remove(&id);
                Err(Refused::Answered { callback, log: host.log[log_before..].to_vec() })
            }
            Err(trap) => Err(Refused::Trapped(trap)),
        }
    }

    /// Ends a root context as soon as its last stream is closed, which may be
    /// at once: `proxy_on_done`, then `proxy_on_delete`. A guest that puts it
    /// off calls `proxy_done` before the latter. Until then it ticks.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn stop_plugin(&mut self, root: RootId) -> Result<(), Trap> {
        if let Some(state) = self.store.data_mut().roots.get_mut(&root.0) {
            state.stopped = true;
        }
        self.end_root(root)
    }

    /// Ends a root context that has been stopped and has no stream any more.
    pub(crate) fn end_root(&mut self, root: RootId) -> Result<(), Trap> {
        let host = self.store.data_mut();
        let in_use = host.streams.values().any(|stream| stream.root == root);
        let Some(state) = host.roots.get_mut(&root.0).filter(|state| state.stopped && !state.ending && !in_use) else {
            return Ok(());
        };
        state.ending = true;
        if self.callback("proxy_on_done", root.0, &[])? != Some(0) {
            return self.delete_root(root);
        }
        if let Some(state) = self.store.data_mut().roots.get_mut(&root.0) {
            state.put_off = true;
        }
        Ok(())
    }

    pub(crate) fn delete_root(&mut self, root: RootId) -> Result<(), Trap> {
        self.callback("proxy_on_delete", root.0, &[])?;
        self.store.data_mut().roots.remove(&root.0);
        Ok(())
    }

    /// Whether a root context still exists.
    pub fn is_running(&self, root: RootId) -> bool {
        self.store.data().roots.contains_key(&root.0)
    }

    /// The world it is in.
    pub fn world(&self) -> &World {
        &self.store.data().world
    }

    /// All that the guest logged.
    pub fn log(&self) -> &[LogLine] {
        &self.store.data().log
    }

    /// All that the guest logged since this was last called.
    pub fn take_log(&mut self) -> Vec<LogLine> {
        std::mem::take(&mut self.store.data_mut().log)
    }

    /// Changes the level that the guest is told.
    pub fn set_log_level(&mut self, level: Level) {
        self.store.data_mut().log_level = level;
    }

    /// What was spent since the costs were last reset.
    pub fn costs(&self) -> &Costs {
        &self.store.data().costs
    }

    /// Sets the costs to nothing, and gives what they were.
    pub fn reset_costs(&mut self) -> Costs {
        std::mem::take(&mut self.store.data_mut().costs)
    }

    /// The bytes of the guest's linear memory. It never shrinks.
    pub fn memory_size(&self) -> usize {
        self.memory.map_or(0, |memory| memory.data_size(&self.store))
    }

    /// The trap that ended the VM, if one did.
    pub fn failed(&self) -> Option<&Trap> {
        self.failed.as_ref()
    }

    pub(crate) fn new_context(&mut self) -> u32 {
        self.next_context += 1;
        self.next_context
    }

    /// Runs a callback of a context, then all that it asked for to happen
    /// after it. `None` is a module that has no such callback.
    pub(crate) fn callback(
        &mut self,
        name: &'static str,
        context: u32,
        arguments: &[u32],
    ) -> Result<Option<u32>, Trap> {
        let result = self.enter(name, context, arguments)?;
        self.settle()?;
        Ok(result)
    }

    /// Runs a callback and leaves what it asked for to
    /// [`settle`](Self::settle), which must come next.
    pub(crate) fn enter(&mut self, name: &'static str, context: u32, arguments: &[u32]) -> Result<Option<u32>, Trap> {
        self.store.data_mut().enter(context);
        let arguments: Vec<u32> = std::iter::once(context).chain(arguments.iter().copied()).collect();
        self.call(name, &arguments)
    }

    fn call(&mut self, name: &'static str, arguments: &[u32]) -> Result<Option<u32>, Trap> {
        if let Some(trap) = &self.failed {
            let reason = format!("the VM has failed before: {trap}");
            return Err(Trap { callback: name, reason, log: Vec::new() });
        }
        let Some(function) = self.instance.get_func(&mut self.store, name) else { return Ok(None) };
        let arguments: Vec<Val> = arguments.iter().map(|argument| Val::I32(argument.cast_signed())).collect();
        let mut results = vec![Val::I32(0); function.ty(&self.store).results().len()];
        let log_before = self.store.data().log.len();
        self.store.set_fuel(FUEL).expect("fuel is configured");

        let outcome = function.call(&mut self.store, &arguments, &mut results);

        let fuel = FUEL - self.store.get_fuel().expect("fuel is configured");
        let host = self.store.data_mut();
        host.costs.callback(name, fuel);
        match outcome {
            // A callback without a result agrees to whatever was asked.
            Ok(()) => Ok(Some(results.first().and_then(Val::i32).map_or(1, i32::cast_unsigned))),
            Err(error) => {
                host.deferred.clear();
                let log = host.log[log_before..].to_vec();
                let trap = Trap { callback: name, reason: describe(&error), log };
                Err(self.failed.insert(trap).clone())
            }
        }
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("failed", &self.failed).finish_non_exhaustive()
    }
}
