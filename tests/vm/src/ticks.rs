//! Time: the clocks move only when a test moves them, and tick as they go.

use std::time::Duration;

use crate::failure::Trap;
use crate::vm::{RootId, Vm};

impl Vm {
    /// Moves the world's clocks, stopping at each tick of this VM that falls
    /// due, and gives the number of ticks. For several VMs see [`advance`].
    ///
    /// # Errors
    /// When the guest traps.
    pub fn advance(&mut self, time: Duration) -> Result<u32, Trap> {
        advance([self], time)
    }

    /// Ticks every root context that has a tick period, although no tick is due.
    ///
    /// # Errors
    /// When the guest traps.
    pub fn tick_all(&mut self) -> Result<(), Trap> {
        let roots: Vec<u32> =
            self.store.data().roots.iter().filter(|(_, root)| root.tick.is_some()).map(|(id, _)| *id).collect();
        roots.into_iter().try_for_each(|root| self.tick(root))
    }

    /// The tick period that the guest set for a root context.
    pub fn tick_period(&self, root: RootId) -> Option<Duration> {
        Some(self.store.data().roots.get(&root.0)?.tick?.0)
    }

    /// When the next tick is due, and of which root context.
    fn next_tick(&self) -> Option<(Duration, u32)> {
        let roots = self.store.data().roots.iter().filter(|_| self.failed().is_none());
        roots.filter_map(|(id, root)| Some((root.tick?.1, *id))).min()
    }

    fn tick(&mut self, id: u32) -> Result<(), Trap> {
        // Armed anew after the callback, with the period of then.
        let outcome = self.callback("proxy_on_tick", id, &[]);
        let host = self.store.data_mut();
        let now = host.world.monotonic_clock();
        if let Some((period, due)) = host.roots.get_mut(&id).and_then(|root| root.tick.as_mut()) {
            *due = now + *period;
        }
        outcome.map(|_| ())
    }
}

/// Moves the clocks of the world that the VMs share, stopping at each tick
/// that falls due in any of them, and gives the number of ticks. Of ticks that
/// fall due at the same moment, the first VM's come first, and in a VM those
/// of the oldest root context. A tick that is late comes once.
///
/// ```no_run
/// # use trimtab_vm::{Vm, advance};
/// # fn example(mut workers: Vec<Vm>) {
/// advance(&mut workers, std::time::Duration::from_secs(60)).expect("no tick traps");
/// # }
/// ```
///
/// # Errors
/// When a guest traps; the clocks then show when.
///
/// # Panics
/// When the VMs are not of one world.
pub fn advance<'v>(vms: impl IntoIterator<Item = &'v mut Vm>, time: Duration) -> Result<u32, Trap> {
    let mut vms: Vec<_> = vms.into_iter().collect();
    let Some(world) = vms.first().map(|vm| vm.world().clone()) else { return Ok(0) };
    assert!(vms.iter().all(|vm| vm.world().is(&world)), "the VMs to advance are of different worlds");
    let end = world.monotonic_clock() + time;
    let mut ticks = 0;
    let due = |vms: &[&mut Vm]| {
        let ticks = vms.iter().enumerate().filter_map(|(vm, state)| Some((state.next_tick()?, vm)));
        ticks.map(|((due, root), vm)| (due, vm, root)).min().filter(|(due, _, _)| *due <= end)
    };
    while let Some((due, vm, root)) = due(&vms) {
        world.advance(due.saturating_sub(world.monotonic_clock()));
        vms[vm].tick(root)?;
        ticks += 1;
    }
    world.advance(end.saturating_sub(world.monotonic_clock()));
    Ok(ticks)
}
