//! How a host function sees its caller, and how it answers.

use wasmtime::{AsContextMut, Caller, Extern, FuncType, Linker, Memory, Val, ValType};

use crate::headers::Headers;
use crate::host::Host;

/// The statuses of the ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    NotFound = 1,
    BadArgument = 2,
    ParseFailure = 4,
    InvalidMemoryAccess = 6,
    CasMismatch = 8,
    BrokenConnection = 11,
    Unimplemented = 12,
}

/// Why a host function did not do its work.
pub(crate) enum Fault {
    /// The guest is told so.
    Status(Status),
    /// The guest is stopped.
    Trap(wasmtime::Error),
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<wasmtime::Error> for Fault {
    fn from(error: wasmtime::Error) -> Self {
        Self::Trap(error)
    }
}

/// What a host function of the ABI comes to.
pub(crate) type Outcome = Result<(), Fault>;

/// The number that the guest gets for an outcome.
pub(crate) fn answer(outcome: Outcome) -> wasmtime::Result<u32> {
    match outcome {
        Ok(()) => Ok(0),
        Err(Fault::Status(status)) => Ok(status as u32),
        Err(Fault::Trap(error)) => Err(error),
    }
}

/// Defines a function whose arguments and result are all `i32`. Each host
/// function takes them as an array, in the order of the ABI.
pub(crate) fn define<const N: usize>(
    linker: &mut Linker<Host>,
    (module, name): (&'static str, &'static str),
    function: impl Fn(&mut Guest<'_>, [u32; N]) -> wasmtime::Result<u32> + Send + Sync + 'static,
) -> wasmtime::Result<()> {
    let ty = FuncType::new(linker.engine(), [const { ValType::I32 }; N], [ValType::I32]);
    linker.func_new(module, name, ty, move |caller, arguments, results| {
        let mut guest = Guest::enter(caller, name)?;
        let arguments = std::array::from_fn(|i| arguments[i].unwrap_i32().cast_unsigned());
        results[0] = Val::I32(function(&mut guest, arguments)?.cast_signed());
        Ok(())
    })?;
    Ok(())
}

/// The guest, as seen from a host function that it calls.
pub(crate) struct Guest<'a>(Caller<'a, Host>);

impl<'a> Guest<'a> {
    /// Counts the call, and refuses it where Envoy does: until the module has
    /// initialised itself it may log, and nothing else of `env`.
    pub(crate) fn enter(mut caller: Caller<'a, Host>, function: &'static str) -> wasmtime::Result<Self> {
        let host = caller.data_mut();
        host.costs.host_call(function);
        if host.initialising && function.starts_with("proxy_") && function != "proxy_log" {
            return Err(wasmtime::Error::msg(format!("{function} is not allowed while the module initialises itself")));
        }
        Ok(Self(caller))
    }

    pub(crate) fn host(&mut self) -> &mut Host {
        self.0.data_mut()
    }

    fn memory(&mut self) -> wasmtime::Result<Memory> {
        match self.0.get_export("memory") {
            Some(Extern::Memory(memory)) => Ok(memory),
            _ => Err(wasmtime::Error::msg("the module does not export its memory")),
        }
    }

    pub(crate) fn bytes(&mut self, pointer: u32, size: u32) -> Result<Vec<u8>, Fault> {
        let range = pointer as usize..pointer as usize + size as usize;
        let bytes = self.memory()?.data(&self.0).get(range).ok_or(Status::InvalidMemoryAccess)?;
        Ok(bytes.to_vec())
    }

    pub(crate) fn text(&mut self, pointer: u32, size: u32) -> Result<String, Fault> {
        Ok(String::from_utf8_lossy(&self.bytes(pointer, size)?).into_owned())
    }

    pub(crate) fn headers(&mut self, pointer: u32, size: u32) -> Result<Headers, Fault> {
        Ok(Headers::parse(&self.bytes(pointer, size)?))
    }

    pub(crate) fn put(&mut self, pointer: u32, bytes: &[u8]) -> Outcome {
        let memory = self.memory()?;
        memory.write(&mut self.0, pointer as usize, bytes).map_err(|_| Status::InvalidMemoryAccess.into())
    }

    pub(crate) fn put_u32(&mut self, pointer: u32, value: u32) -> Outcome {
        self.put(pointer, &value.to_le_bytes())
    }

    pub(crate) fn put_u64(&mut self, pointer: u32, value: u64) -> Outcome {
        self.put(pointer, &value.to_le_bytes())
    }

    /// Leaves bytes in memory that the guest allocates and then owns; no bytes
    /// are a null pointer.
    pub(crate) fn give(&mut self, bytes: &[u8], pointer_at: u32, size_at: u32) -> Outcome {
        let size = u32::try_from(bytes.len()).map_err(|_| Status::InvalidMemoryAccess)?;
        let pointer = if size == 0 { 0 } else { self.allocate(size)? };
        self.put(pointer, bytes)?;
        self.put_u32(pointer_at, pointer)?;
        self.put_u32(size_at, size)
    }

    fn allocate(&mut self, size: u32) -> Result<u32, Fault> {
        let allocate = ["proxy_on_memory_allocate", "malloc"].into_iter().find_map(|name| self.0.get_export(name));
        let Some(Extern::Func(allocate)) = allocate else {
            return Err(wasmtime::Error::msg("the module exports neither proxy_on_memory_allocate nor malloc").into());
        };
        self.host().costs.allocation(size);
        let pointer = allocate.typed::<u32, u32>(&self.0)?.call(self.0.as_context_mut(), size)?;
        if pointer == 0 { Err(Status::InvalidMemoryAccess.into()) } else { Ok(pointer) }
    }
}
