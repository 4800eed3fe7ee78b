//! What is done to one request.

use super::control::Asked;
use super::policy::{Abort, Delay, DrawnFrom, Fault, Status};
use crate::http::{LocalReply, Request, http_from_grpc};
use crate::units::Fraction;
use xxhash_rust::xxh64::xxh64;

/// What a number is drawn for. Each has a draw of its own, independent of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    Delay = 0,
    Abort = 1,
    /// How long the delay is, where it is drawn.
    Length = 2,
    Response = 3,
    /// Whether it is of the tenth that is injected while an experiment is probing.
    Probe = 4,
}

/// What was drawn for a request. A delay may be followed by an abort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Injection {
    /// Nanoseconds.
    pub delay: Option<u64>,
    pub abort: Option<Abort>,
    /// What replaces the upstream's answer; none where there will be no answer of an upstream.
    pub response: Option<Status>,
}

/// Why no fault is injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withheld {
    /// The experiment is not aimed at the request.
    NotAimed,
    /// No fault was drawn.
    NotDrawn,
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
    /// As many faults are active as may be.
    MaxActive,
}

impl Injection {
    pub fn is_none(&self) -> bool {
        *self == Injection::default()
    }

    /// Whether the client is told of a failure.
    pub fn fails(&self) -> bool {
        self.abort.is_some() || self.response.is_some()
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

    /// What `request` asks for, where it may.
    pub fn asked(&self, request: &Request<'_>) -> Option<Asked> {
        self.header_control.as_ref().map(|control| control.read(request))
    }

    /// The faults of a request of this trace; `random` is asked where the trace id does not decide.
    pub fn draw(&self, asked: Option<Asked>, trace_id: Option<[u8; 16]>, mut random: impl FnMut() -> u64) -> Injection {
        let mut number = |what| self.number(what, trace_id).unwrap_or_else(&mut random);
        let most = |asked: Option<Fraction>| asked.unwrap_or(Fraction::WHOLE);
        let mut injection = Injection::default();
        if let Some((share, delay)) = &self.delay
            && most(asked.map(|asked| asked.delay_share)).min(*share).includes(number(Draw::Delay))
        {
            injection.delay = match (asked, delay) {
                (Some(asked), _) => asked.delay.map(|asked| asked.min(delay.longest())),
                (None, Delay::Fixed(time)) => Some(*time),
                (None, Delay::Distribution(distribution)) => Some(distribution.delay(number(Draw::Length))),
            };
        }
        if let Some((share, abort)) = &self.abort
            && most(asked.map(|asked| asked.abort_share)).min(*share).includes(number(Draw::Abort))
        {
            injection.abort = match asked {
                Some(asked) => asked.abort.map(Abort::Answer),
                None => Some(*abort),
            };
        }
        if let Some((share, status)) = &self.response
            && injection.abort.is_none()
            && share.includes(number(Draw::Response))
        {
            injection.response = Some(*status);
        }
        injection
    }
}

/// What tells an injected answer from one of the upstream: a header, unless the policy does without, and the message
/// of a gRPC status.
pub const MARK: &str = "x-trimtab-fault";
pub const MESSAGE: &str = "fault injected by trimtab";

impl Status {
    /// As an HTTP status.
    pub fn http(self) -> u16 {
        match self {
            Status::Http(status) => status,
            Status::Grpc(code) => http_from_grpc(code),
        }
    }

    /// As a gRPC status.
    pub fn grpc(self) -> u8 {
        match self {
            Status::Http(status) => grpc_from_http(status),
            Status::Grpc(code) => code,
        }
    }

    /// The answer of an abort, as the client's protocol wants it.
    pub fn reply(self, is_grpc: bool, marks: bool) -> LocalReply {
        LocalReply {
            status: self.http(),
            details: "trimtab_fault_abort",
            headers: if marks { vec![(MARK.into(), "abort".to_owned())] } else { Vec::new() },
            body: MESSAGE.to_owned(),
            grpc_status: is_grpc.then(|| self.grpc()),
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

#[cfg(test)]
mod tests {
    use super::super::guard::Guard;
    use super::super::target::Target;
    use super::*;

    fn half_and_half(drawn_from: DrawnFrom) -> Fault {
        let half = Fraction::from_ppm(500_000);
        Fault {
            delay: Some((half, Delay::Fixed(1))),
            abort: Some((half, Abort::Answer(Status::Http(503)))),
            response: Some((half, Status::Http(500))),
            header_control: None,
            drawn_from,
            target: Target::default(),
            slots: None,
            marks: true,
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
            let (mut delays, mut aborts, mut both, mut responses) = (0_u32, 0_u32, 0_u32, 0_u32);
            for n in 0..u128::from(count) {
                let injection = fault.draw(None, Some(n.to_be_bytes()), &mut random);
                delays += u32::from(injection.delay.is_some());
                aborts += u32::from(injection.abort.is_some());
                both += u32::from(injection.delay.is_some() && injection.abort.is_some());
                responses += u32::from(injection.response.is_some());
            }
            for (found, share) in [(delays, 0.5), (aborts, 0.5), (both, 0.25), (responses, 0.25)] {
                let expected = f64::from(count) * share;
                let sigma = (expected * (1.0 - share)).sqrt();
                assert!((f64::from(found) - expected).abs() < 4.0 * sigma, "{drawn_from:?}: {found} of {expected}");
            }
        }
    }

    #[test]
    fn a_trace_id_always_draws_the_same() {
        let fault = half_and_half(DrawnFrom::TraceId);
        let drawn = |id: Option<u128>, random: u64| fault.draw(None, id.map(u128::to_be_bytes), || random);
        for id in 0..100 {
            assert_eq!(drawn(Some(id), 0), drawn(Some(id), u64::MAX));
        }
        assert_ne!(drawn(None, 0), drawn(None, u64::MAX), "no trace id: a draw");
    }

    #[test]
    fn any_percentage_is_drawn_exactly() {
        let count = 100_000_u32;
        for ppm in [1, 100, 10_000, 333_333, 999_000, 1_000_000] {
            let share = Fraction::from_ppm(ppm);
            let fault = Fault { abort: Some((share, Abort::Reset)), ..half_and_half(DrawnFrom::TraceId) };
            let is_aborted = |n: &u32| fault.draw(None, Some(u128::from(*n).to_be_bytes()), || 0).abort.is_some();
            let found = (0..count).filter(is_aborted).count() as f64;
            let expected = f64::from(count) * f64::from(ppm) / 1e6;
            let sigma = (expected * (1.0 - f64::from(ppm) / 1e6)).sqrt();
            assert!((found - expected).abs() <= 4.0 * sigma, "{ppm} ppm: {found} of {expected}");
        }
    }

    #[test]
    fn what_is_asked_is_given_up_to_what_is_written() {
        let whole = Fraction::WHOLE;
        let fault = Fault {
            delay: Some((whole, Delay::Fixed(100))),
            abort: Some((whole, Abort::Asked)),
            response: None,
            ..half_and_half(DrawnFrom::TraceId)
        };
        let drawn = |asked: Asked| fault.draw(Some(asked), Some([7; 16]), || 0);
        let nothing = Asked { delay: None, delay_share: whole, abort: None, abort_share: whole };
        assert!(drawn(nothing).is_none(), "who asks for nothing gets nothing");
        assert_eq!(drawn(Asked { delay: Some(99), ..nothing }).delay, Some(99));
        assert_eq!(drawn(Asked { delay: Some(101), ..nothing }).delay, Some(100), "the longest that is written");
        let abort = Asked { abort: Some(Status::Grpc(8)), ..nothing };
        assert_eq!(drawn(abort).abort, Some(Abort::Answer(Status::Grpc(8))));
        assert!(drawn(Asked { abort_share: Fraction::NONE, ..abort }).is_none());
        let fault = Fault { delay: Some((Fraction::NONE, Delay::Fixed(100))), ..fault };
        assert_eq!(fault.draw(Some(Asked { delay: Some(1), ..nothing }), Some([7; 16]), || 0).delay, None);
    }

    #[test]
    fn an_abort_speaks_the_clients_protocol() {
        let told = |status: Status, is_grpc| {
            let reply = status.reply(is_grpc, true);
            (reply.status, reply.grpc_status)
        };
        assert_eq!(told(Status::Http(503), false), (503, None));
        assert_eq!(told(Status::Http(503), true), (503, Some(14)));
        assert_eq!(told(Status::Grpc(8), true), (429, Some(8)));
        assert_eq!(told(Status::Grpc(14), false), (503, None));
    }
}
