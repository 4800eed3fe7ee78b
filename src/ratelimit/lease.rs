//! Requests of hot keys that a worker has reserved ahead, so that it does not access shared data for each request.
//!
//! A lease is a reservation in the bucket of a key ([`super::table`]) that no other worker can use. So all workers together
//! never admit more than the limit. A lease lasts one to two seconds. A worker reserves nothing for a key with few requests.
//! Each lease that is used up within a second doubles the next one, up to 1/512 of the burst. Requests that one worker has
//! reserved are not available to the others for at most two seconds. So limits with a burst below 512 are never leased. A
//! worker whose configuration goes away returns its leases at once.

use super::table::Reservation;
use crate::units::MonotonicInstant;

/// The length of an epoch of leases, in nanoseconds.
pub(super) const EPOCH: u64 = 1_000_000_000;

/// The epoch of an instant. The number wraps after 136 years.
fn epoch(now: MonotonicInstant) -> u32 {
    (now.as_nanos() / EPOCH) as u32
}

/// The divisor of the burst that limits the lease of one worker.
const SHARE: u64 = 512;

/// The most keys that a worker has leases of. A further key replaces another one, whose lease expires.
const PLACES: usize = 1024;

/// The most requests of a key that one worker may reserve.
pub(super) fn most(burst: u64) -> u32 {
    u32::try_from(burst / SHARE).unwrap_or(u32::MAX)
}

/// The leases of one worker.
#[derive(Debug, Default)]
pub(super) struct Leases {
    places: Vec<Lease>,
    /// When to search for leases that end. Ticks are more frequent while streams are held.
    look_again: MonotonicInstant,
}

/// A lease that is to be settled: the id of the rate, the fingerprint of the key, and the reservation.
pub(super) type EndedLease = (usize, u64, Reservation);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Lease {
    limit: usize,
    fingerprint: u64,
    held: Reservation,
    /// How many requests to reserve next.
    wanted: u32,
}

impl Lease {
    fn left(&self) -> u32 {
        self.held.size.saturating_sub(self.held.used)
    }

    /// The number of epochs since the lease was made. A lease of age 2 has expired.
    fn age(&self, now: MonotonicInstant) -> u32 {
        epoch(now).wrapping_sub(self.held.epoch)
    }
}

impl Leases {
    /// The period, in nanoseconds, in which leases that end have to be returned: half an epoch.
    pub(super) const TICK: u64 = EPOCH / 2;

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

    /// Uses `cost` reserved requests of a key. Returns false if fewer are reserved.
    pub(super) fn spend(&mut self, limit: usize, fingerprint: u64, cost: u32, now: MonotonicInstant) -> bool {
        match self.find(limit, fingerprint) {
            Some(lease) if lease.left() >= cost && lease.age(now) <= 1 => {
                lease.held.used += cost;
                true
            }
            _ => false,
        }
    }

    /// Returns requests that [`Leases::spend`] used to the lease.
    pub(super) fn refund(&mut self, limit: usize, fingerprint: u64, cost: u32) {
        if let Some(lease) = self.find(limit, fingerprint) {
            lease.held.used = lease.held.used.saturating_sub(cost);
        }
    }

    /// The lease to settle, and the number of requests to reserve, for a request that accesses shared data.
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

    /// Replaces the lease of a key by a new one of `size` requests.
    pub(super) fn hold(&mut self, limit: usize, fingerprint: u64, size: u32, now: MonotonicInstant) {
        if let Some(lease) = self.find(limit, fingerprint) {
            lease.held = Reservation { epoch: epoch(now), size, used: 0 };
        }
    }

    /// Takes all leases that are not used up, to be settled: the id of the rate, the fingerprint of the key, the reservation.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = EndedLease> {
        let leases = std::mem::take(&mut self.places).into_iter().filter(|lease| lease.left() > 0);
        leases.map(|lease| (lease.limit, lease.fingerprint, lease.held))
    }

    /// Takes the leases that end soon and are not used up, as [`Leases::take_all`] does.
    pub(super) fn ending(&mut self, now: MonotonicInstant) -> impl Iterator<Item = EndedLease> {
        let is_due = now >= self.look_again;
        if is_due {
            self.look_again = now.saturating_add(Leases::TICK / 2);
        }
        let places = if is_due { self.places.as_mut_slice() } else { &mut [] };
        places.iter_mut().filter(move |lease| lease.left() > 0 && lease.age(now) == 1).map(|lease| {
            let held = lease.held;
            // The lease is settled once. The next one has the size that was used of this one.
            lease.held = Reservation { epoch: held.epoch, ..Reservation::default() };
            lease.wanted = held.used;
            (lease.limit, lease.fingerprint, held)
        })
    }
}
