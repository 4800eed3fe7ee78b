//! What a VM spent, in units that are the same on every machine.

use std::collections::BTreeMap;

/// What has been spent since the costs were last reset. Wall time is not in
/// it: two runs that do the same spend the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    /// The callbacks into the guest, by name.
    pub callbacks: BTreeMap<&'static str, Spent>,
    /// How often the guest called each host function.
    pub host_calls: BTreeMap<&'static str, u64>,
    /// How often the guest allocated memory for the host's answers.
    pub allocations: u64,
    /// How many bytes those were.
    pub allocated_bytes: u64,
}

/// What the calls of one callback spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    pub calls: u64,
    /// Fuel: about one unit a WebAssembly instruction. What the guest's
    /// allocator spends on the host's answers is included.
    pub fuel: u64,
}

impl Costs {
    /// The fuel of all callbacks.
    pub fn fuel(&self) -> u64 {
        self.callbacks.values().map(|spent| spent.fuel).sum()
    }

    /// The number of all host calls.
    pub fn host_calls(&self) -> u64 {
        self.host_calls.values().sum()
    }

    pub(crate) fn callback(&mut self, name: &'static str, fuel: u64) {
        let spent = self.callbacks.entry(name).or_default();
        spent.calls += 1;
        spent.fuel += fuel;
    }

    pub(crate) fn host_call(&mut self, name: &'static str) {
        *self.host_calls.entry(name).or_default() += 1;
    }

    pub(crate) fn allocation(&mut self, size: u32) {
        self.allocations += 1;
        self.allocated_bytes += u64::from(size);
    }
}
