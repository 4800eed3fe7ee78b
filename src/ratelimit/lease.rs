//! Requests of hot keys that a worker has reserved ahead, so that it need not ask shared data for each.
//!
//! A reservation is room in the key's bucket that nobody else gets ([`super::table`]): all workers together never admit
//! more than the limit. It lasts one to two seconds. A worker reserves nothing for a key that it sees once in a while;
//! each reservation that it uses up within a second doubles the next, up to 1/512 of the burst. What one worker holds
//! another may lack, for two seconds at most; so small limits, of which people count every request, are never leased.

use super::table::Reservation;
use crate::units::MonotonicInstant;

/// The clock of leases, in nanoseconds.
pub(super) const EPOCH: u64 = 1_000_000_000;

/// The epoch of an instant; it wraps after 136 years.
fn epoch(now: MonotonicInstant) -> u32 {
    (now.as_nanos() / EPOCH) as u32
}

/// The part of the burst that one worker may hold.
const SHARE: u64 = 512;

/// How many keys a worker holds leases of; a further one takes the place of another, which then expires.
const PLACES: usize = 1024;

/// The most requests that a limit of this burst lets one worker reserve.
pub(super) fn most(burst: u64) -> u32 {
    u32::try_from(burst / SHARE).unwrap_or(u32::MAX)
}

/// The leases of one worker.
#[derive(Debug, Default)]
pub struct Leases {
    places: Vec<Lease>,
    /// When to look for leases that end; ticks come more often while streams are held.
    look_again: MonotonicInstant,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lease {
    limit: usize,
    fingerprint: u64,
    held: Reservation,
    /// How much to ask for next.
    wanted: u32,
}

impl Lease {
    fn left(&self) -> u32 {
        self.held.size.saturating_sub(self.held.used)
    }

    /// For how many epochs it has been held; it must not be used from the second on.
    fn age(&self, now: MonotonicInstant) -> u32 {
        epoch(now).wrapping_sub(self.held.epoch)
    }
}

impl Leases {
    /// How often leases that end have to be looked for, in nanoseconds: twice in an epoch.
    pub const TICK: u64 = EPOCH / 2;

    fn place(&mut self, limit: usize, fingerprint: u64) -> Option<&mut Lease> {
        if self.places.is_empty() {
            self.places = vec![Lease::default(); PLACES];
        }
        let place = (fingerprint ^ limit as u64) as usize % PLACES;
        self.places.get_mut(place)
    }

    fn find(&mut self, limit: usize, fingerprint: u64) -> Option<&mut Lease> {
        self.place(limit, fingerprint).filter(|lease| lease.limit == limit && lease.fingerprint == fingerprint)
    }

    /// Spends `cost` reserved requests of a key, if there are so many.
    pub(super) fn spend(&mut self, limit: usize, fingerprint: u64, cost: u32, now: MonotonicInstant) -> bool {
        match self.find(limit, fingerprint) {
            Some(lease) if lease.left() >= cost && lease.age(now) <= 1 => {
                lease.held.used += cost;
                true
            }
            _ => false,
        }
    }

    /// Takes back what [`Leases::spend`] spent.
    pub(super) fn take_back(&mut self, limit: usize, fingerprint: u64, cost: u32) {
        if let Some(lease) = self.find(limit, fingerprint) {
            lease.held.used = lease.held.used.saturating_sub(cost);
        }
    }

    /// What to settle and how much to ask for, now that shared data has to be asked anyhow.
    pub(super) fn renew(
        &mut self,
        limit: usize,
        fingerprint: u64,
        most: u32,
        now: MonotonicInstant,
    ) -> (Reservation, u32) {
        let Some(lease) = self.place(limit, fingerprint) else { return (Reservation::default(), 0) };
        if lease.limit != limit || lease.fingerprint != fingerprint {
            let held = Reservation { epoch: epoch(now), ..Reservation::default() };
            *lease = Lease { limit, fingerprint, held, wanted: 0 };
            return (held, 0);
        }
        lease.wanted = match lease.age(now) {
            0 => lease.wanted.saturating_mul(2).max(1),
            1 => lease.wanted,
            _ => lease.held.used,
        }
        .min(most);
        (lease.held, lease.wanted)
    }

    /// Notes what has been reserved instead of what was held.
    pub(super) fn hold(&mut self, limit: usize, fingerprint: u64, size: u32, now: MonotonicInstant) {
        if let Some(lease) = self.find(limit, fingerprint) {
            lease.held = Reservation { epoch: epoch(now), size, used: 0 };
        }
    }

    /// Takes the leases that end soon and have something left, to be settled: their limit, fingerprint, reservation.
    pub(super) fn ending(&mut self, now: MonotonicInstant) -> impl Iterator<Item = (usize, u64, Reservation)> {
        let is_due = now >= self.look_again;
        if is_due {
            self.look_again = now.saturating_add(Leases::TICK / 2);
        }
        let places = if is_due { self.places.as_mut_slice() } else { &mut [] };
        places.iter_mut().filter(move |lease| lease.left() > 0 && lease.age(now) == 1).map(|lease| {
            let held = lease.held;
            // Settled once: nothing is held any more, and next time as much is asked for as was used.
            lease.held = Reservation { epoch: held.epoch, ..Reservation::default() };
            lease.wanted = held.used;
            (lease.limit, lease.fingerprint, held)
        })
    }
}
