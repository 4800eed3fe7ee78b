//! What is done to one request.

use super::policy::{Abort, Delay, DrawnFrom, Fault};
use crate::http::LocalReply;
use xxhash_rust::xxh64::xxh64;

/// What a number is drawn for. Each has a draw of its own, independent of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    Delay = 0,
    Abort = 1,
    /// How long the delay is, where it is drawn.
    Length = 2,
}

/// What was drawn for a request. A delay may be followed by an abort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Injection {
    /// Nanoseconds.
    pub delay: Option<u64>,
    pub abort: Option<Abort>,
}

/// Why a fault that was drawn is not injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withheld {
    /// The target is unwell.
    Suspended,
    /// The policy only wants to know.
    Shadow,
    /// Too many streams are held already.
    Overflow,
}

impl Injection {
    pub fn is_none(&self) -> bool {
        *self == Injection::default()
    }
}

impl Fault {
    /// The number that decides on `what` for a request of this trace, where the policy draws from trace ids.
    pub fn number(&self, what: Draw, trace_id: Option<[u8; 16]>) -> Option<u64> {
        match (self.drawn_from, trace_id) {
            (DrawnFrom::TraceId, Some(id)) => Some(xxh64(&id, self.salt.wrapping_add(what as u64))),
            _ => None,
        }
    }

    /// The faults of a request of this trace; `random` is asked where the trace id does not decide.
    pub fn draw(&self, trace_id: Option<[u8; 16]>, mut random: impl FnMut() -> u64) -> Injection {
        let mut number = |what| self.number(what, trace_id).unwrap_or_else(&mut random);
        let mut injection = Injection::default();
        if let Some((share, delay)) = &self.delay
            && share.includes(number(Draw::Delay))
        {
            injection.delay = Some(match delay {
                Delay::Fixed(time) => *time,
                Delay::Distribution(distribution) => distribution.delay(number(Draw::Length)),
            });
        }
        if let Some((share, abort)) = &self.abort
            && share.includes(number(Draw::Abort))
        {
            injection.abort = Some(*abort);
        }
        injection
    }
}

impl Abort {
    /// The answer, as the client's protocol wants it.
    pub fn reply(self, is_grpc: bool) -> LocalReply {
        let (status, grpc_status) = match self {
            Abort::Http(status) => (status, is_grpc.then(|| grpc_from_http(status))),
            Abort::Grpc(code) => (http_from_grpc(code), is_grpc.then_some(code)),
        };
        LocalReply {
            status,
            details: "trimtab_fault_abort",
            headers: vec![("x-trimtab-fault", "abort".to_owned())],
            body: "fault injected by trimtab".to_owned(),
            grpc_status,
        }
    }
}

/// gRPC's "HTTP to gRPC Status Code Mapping".
fn grpc_from_http(status: u16) -> u8 {
    match status {
        200 => 0,
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// The HTTP status of `google.rpc.Code`.
fn http_from_grpc(code: u8) -> u16 {
    match code {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

#[cfg(test)]
mod tests {
    use super::super::guard::Guard;
    use super::*;
    use crate::units::Fraction;

    fn half_and_half(drawn_from: DrawnFrom) -> Fault {
        let half = Fraction::from_ppm(500_000);
        Fault {
            delay: Some((half, Delay::Fixed(1))),
            abort: Some((half, Abort::Http(503))),
            drawn_from,
            shadow: false,
            guard: Guard::default(),
            salt: 99,
        }
    }

    #[test]
    fn delay_and_abort_are_drawn_exactly_and_independently() {
        for drawn_from in [DrawnFrom::TraceId, DrawnFrom::Random] {
            let fault = half_and_half(drawn_from);
            let mut state = 3;
            let mut random = || crate::random::split_mix(&mut state);
            let count = 100_000_u32;
            let (mut delays, mut aborts, mut both) = (0_u32, 0_u32, 0_u32);
            for n in 0..u128::from(count) {
                let injection = fault.draw(Some(n.to_be_bytes()), &mut random);
                delays += u32::from(injection.delay.is_some());
                aborts += u32::from(injection.abort.is_some());
                both += u32::from(injection.delay.is_some() && injection.abort.is_some());
            }
            for (found, share) in [(delays, 0.5), (aborts, 0.5), (both, 0.25)] {
                let expected = f64::from(count) * share;
                let sigma = (expected * (1.0 - share)).sqrt();
                assert!((f64::from(found) - expected).abs() < 4.0 * sigma, "{drawn_from:?}: {found} of {expected}");
            }
        }
    }

    #[test]
    fn a_trace_id_always_draws_the_same() {
        let fault = half_and_half(DrawnFrom::TraceId);
        let drawn = |id: Option<u128>, random: u64| fault.draw(id.map(u128::to_be_bytes), || random);
        for id in 0..100 {
            assert_eq!(drawn(Some(id), 0), drawn(Some(id), u64::MAX));
        }
        assert_ne!(drawn(None, 0), drawn(None, u64::MAX), "no trace id: a draw");
    }

    #[test]
    fn an_abort_speaks_the_clients_protocol() {
        let told = |abort: Abort, is_grpc| {
            let reply = abort.reply(is_grpc);
            (reply.status, reply.grpc_status)
        };
        assert_eq!(told(Abort::Http(503), false), (503, None));
        assert_eq!(told(Abort::Http(503), true), (503, Some(14)));
        assert_eq!(told(Abort::Grpc(8), true), (429, Some(8)));
        assert_eq!(told(Abort::Grpc(14), false), (503, None));
    }
}
