//! What is done to one request.

use super::policy::{Abort, DrawnFrom, Fault};
use crate::http::LocalReply;
use xxhash_rust::xxh64::xxh64;

/// Two independent numbers: one for the delay, one for the abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    pub delay: u64,
    pub abort: u64,
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
    /// The target is unwell, or was so too often.
    Suspended,
    /// It cannot be learned how the target is.
    Unknown,
    /// The target was unwell: a tenth is injected, and this is not of it.
    Probing,
    /// The experiment is over, or its lease was not renewed.
    Expired,
    /// The failures that it may inject are spent.
    Budget,
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
    /// The numbers that decide for a request: from its trace id where the policy says so and there is one.
    pub fn draws(&self, trace_id: Option<[u8; 16]>, mut random: impl FnMut() -> u64) -> Draws {
        match (self.drawn_from, trace_id) {
            (DrawnFrom::TraceId, Some(id)) => {
                Draws { delay: xxh64(&id, self.salt), abort: xxh64(&id, self.salt.wrapping_add(1)) }
            }
            _ => Draws { delay: random(), abort: random() },
        }
    }

    /// The faults that `draws` select.
    pub fn draw(&self, draws: Draws) -> Injection {
        let drawn = |share: crate::units::Fraction, draw| share.includes(draw);
        Injection {
            delay: self.delay.filter(|(share, _)| drawn(*share, draws.delay)).map(|(_, delay)| delay),
            abort: self.abort.filter(|(share, _)| drawn(*share, draws.abort)).map(|(_, abort)| abort),
        }
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
            delay: Some((half, 1)),
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
                let injection = fault.draw(fault.draws(Some(n.to_be_bytes()), &mut random));
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
        let id = 7_u128.to_be_bytes();
        assert_eq!(fault.draws(Some(id), || 1), fault.draws(Some(id), || 2));
        assert_ne!(fault.draws(None, || 1), fault.draws(None, || 2), "no trace id: a draw");
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
