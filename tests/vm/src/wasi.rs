//! The few functions of WASI preview 1 that a Rust module imports, answered
//! as Envoy answers them: two clocks, chance, an environment, and standard
//! output that goes to the log. There are no files and no arguments.

use wasmtime::{Caller, Linker};

use crate::abi::{Fault, Guest, define};
use crate::failure::Level;
use crate::host::Host;

const MODULE: &str = "wasi_snapshot_preview1";

// Errors of WASI.
const BADF: u32 = 8;
const FAULT: u32 = 21;
const NOSYS: u32 = 52;
const NOTSUP: u32 = 58;

pub(crate) fn link(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    define(linker, (MODULE, "fd_write"), |guest, arguments| errno(fd_write(guest, arguments)))?;
    define(linker, (MODULE, "environ_sizes_get"), |guest, arguments| errno(environ_sizes_get(guest, arguments)))?;
    define(linker, (MODULE, "environ_get"), |guest, arguments| errno(environ_get(guest, arguments)))?;
    define(linker, (MODULE, "random_get"), |guest, arguments| errno(random_get(guest, arguments)))?;
    define(linker, (MODULE, "args_sizes_get"), |guest, [count, size]| {
        errno(guest.put_u32(count, 0).and_then(|()| guest.put_u32(size, 0)).map(|()| 0))
    })?;
    define(linker, (MODULE, "args_get"), |_, [_, _]| Ok(0))?;
    define(linker, (MODULE, "sched_yield"), |_, []| Ok(0))?;
    define(linker, (MODULE, "fd_close"), |_, [_]| Ok(0))?;
    define(linker, (MODULE, "fd_fdstat_get"), |guest, [fd, stat]| match level(fd) {
        // All zero but the right to write.
        Some(_) => errno(guest.put(stat, &[[0; 8], 64_u64.to_le_bytes(), [0; 8]].concat()).map(|()| 0)),
        None => Ok(BADF),
    })?;
    define(linker, (MODULE, "fd_fdstat_set_flags"), |_, [_, _]| Ok(NOSYS))?;
    define(linker, (MODULE, "fd_filestat_get"), |_, [_, _]| Ok(BADF))?;
    define(linker, (MODULE, "fd_prestat_get"), |_, [_, _]| Ok(BADF))?;
    define(linker, (MODULE, "fd_prestat_dir_name"), |_, [_, _, _]| Ok(NOSYS))?;
    define(linker, (MODULE, "fd_read"), |_, [_, _, _, _]| Ok(NOSYS))?;

    // These have arguments of 64 bits, or no result.
    linker.func_wrap(MODULE, "fd_seek", |caller: Caller<'_, Host>, _: u32, _: u64, _: u32, _: u32| {
        Guest::enter(caller, "fd_seek").map(|_| 0)
    })?;
    linker.func_wrap(MODULE, "clock_time_get", |caller: Caller<'_, Host>, clock: u32, _: u64, at: u32| {
        errno(clock_time_get(&mut Guest::enter(caller, "clock_time_get")?, clock, at))
    })?;
    linker.func_wrap(MODULE, "proc_exit", |_: Caller<'_, Host>, code: u32| -> wasmtime::Result<()> {
        Err(wasmtime::Error::msg(format!("the module exited with {code}")))
    })?;
    Ok(())
}

fn errno(result: Result<u32, Fault>) -> wasmtime::Result<u32> {
    match result {
        Ok(errno) => Ok(errno),
        Err(Fault::Status(_)) => Ok(FAULT),
        Err(Fault::Trap(error)) => Err(error),
    }
}

/// The level at which Envoy logs what is written to a file descriptor.
fn level(fd: u32) -> Option<Level> {
    match fd {
        1 => Some(Level::Info),
        2 => Some(Level::Error),
        _ => None,
    }
}

fn fd_write(guest: &mut Guest<'_>, [fd, vectors, count, written]: [u32; 4]) -> Result<u32, Fault> {
    let Some(level) = level(fd) else { return Ok(BADF) };
    let mut text = Vec::new();
    for vector in guest.bytes(vectors, count.saturating_mul(8))?.chunks_exact(8) {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| vector[at + i]));
        text.extend(guest.bytes(word(0), word(4))?);
    }
    let message = text.strip_suffix(b"\n").unwrap_or(&text);
    if !text.is_empty() {
        guest.host().log(level, String::from_utf8_lossy(message).into_owned());
    }
    guest.put_u32(written, u32::try_from(text.len()).expect("it was in a 32-bit memory"))?;
    Ok(0)
}

/// The environment's entries, each with the zero that ends it.
fn environment(guest: &mut Guest<'_>) -> Vec<Vec<u8>> {
    let entries = &guest.host().environment;
    entries.iter().map(|(name, value)| format!("{name}={value}\0").into_bytes()).collect()
}

fn environ_sizes_get(guest: &mut Guest<'_>, [count, size]: [u32; 2]) -> Result<u32, Fault> {
    let entries = environment(guest);
    let bytes: usize = entries.iter().map(Vec::len).sum();
    guest.put_u32(count, u32::try_from(entries.len()).expect("a short environment"))?;
    guest.put_u32(size, u32::try_from(bytes).expect("a short environment"))?;
    Ok(0)
}

fn environ_get(guest: &mut Guest<'_>, [mut pointers, mut strings]: [u32; 2]) -> Result<u32, Fault> {
    for entry in environment(guest) {
        guest.put_u32(pointers, strings)?;
        guest.put(strings, &entry)?;
        pointers += 4;
        strings += u32::try_from(entry.len()).expect("a short environment");
    }
    Ok(0)
}

fn random_get(guest: &mut Guest<'_>, [pointer, size]: [u32; 2]) -> Result<u32, Fault> {
    let bytes: Vec<u8> = (0..size).map(|_| guest.host().random.next()).collect();
    guest.put(pointer, &bytes)?;
    Ok(0)
}

fn clock_time_get(guest: &mut Guest<'_>, clock: u32, at: u32) -> Result<u32, Fault> {
    let world = &guest.host().world;
    let time = match clock {
        0 => world.wall_clock(),
        1 => world.monotonic_clock(),
        _ => return Ok(NOTSUP),
    };
    guest.put_u64(at, u64::try_from(time.as_nanos()).expect("a clock before the year 2554"))?;
    Ok(0)
}

/// A stream of bytes that looks like chance and follows from its seed
/// (SplitMix64).
pub(crate) struct Random {
    state: u64,
    bytes: std::vec::IntoIter<u8>,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed, bytes: Vec::new().into_iter() }
    }

    fn next(&mut self) -> u8 {
        if let Some(byte) = self.bytes.next() {
            return byte;
        }
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.bytes = (z ^ (z >> 31)).to_le_bytes().to_vec().into_iter();
        self.next()
    }
}
