//! Compiled modules.

use std::fmt;
use std::path::Path;

use wasmtime::{Config, Engine, Linker, OptLevel};

use crate::host::Host;
use crate::{env, wasi};

/// A compiled module. Compiling takes a while: do it once, and clone.
#[derive(Clone)]
pub struct Module {
    pub(crate) module: wasmtime::Module,
    pub(crate) linker: Linker<Host>,
}

impl Module {
    /// Compiles a file.
    ///
    /// # Errors
    /// When it cannot be read, or is no module for this ABI.
    pub fn from_file(path: impl AsRef<Path>) -> wasmtime::Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path)
            .map_err(|error| wasmtime::Error::msg(format!("cannot read {}: {error}", path.display())))?;
        Self::new(&bytes).map_err(|error| error.context(format!("cannot use {}", path.display())))
    }

    /// Compiles a binary.
    ///
    /// # Errors
    /// When it is no module for this ABI.
    pub fn new(bytes: &[u8]) -> wasmtime::Result<Self> {
        let mut config = Config::new();
        // Fuel is counted before the optimiser runs: without it the costs are
        // the same, and the module is compiled sooner.
        config.consume_fuel(true).cranelift_opt_level(OptLevel::None);
        let engine = Engine::new(&config)?;
        let module = wasmtime::Module::new(&engine, bytes)?;
        let abis = ["proxy_abi_version_0_2_0", "proxy_abi_version_0_2_1"];
        if !abis.iter().any(|abi| module.get_export(abi).is_some()) {
            return Err(wasmtime::Error::msg(format!("the module exports neither {}", abis.join(" nor "))));
        }
        let mut linker = Linker::new(&engine);
        env::link(&mut linker)?;
        wasi::link(&mut linker)?;
        // Their traps name them.
        linker.define_unknown_imports_as_traps(&module)?;
        Ok(Self { module, linker })
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Module").finish_non_exhaustive()
    }
}
