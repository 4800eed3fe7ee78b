//! The faults of one request: how they are drawn, and the responses that they lead to.

use super::control::RequestedFault;
use super::policy::{Abort, Delay, DrawnFrom, FaultPolicy, FaultStatus};
use crate::http::{LocalReply, Request, http_from_grpc};
use crate::units::Fraction;
use xxhash_rust::xxh64::xxh64;

/// The purpose of a random number. The numbers of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrawPurpose {
    Delay = 0,
    Abort = 1,
    /// The length of a delay from a distribution.
    Length = 2,
    Response = 3,
    /// Whether the request belongs to the tenth that is faulted while an experiment is probing.
    Probe = 4,
}

/// The faults that were drawn for a request. An abort can follow a delay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrawnFaults {
    /// Nanoseconds.
    pub delay: Option<u64>,
    pub abort: Option<Abort>,
    /// The status that replaces that of the upstream's response. `None` if the request is aborted.
    pub response: Option<FaultStatus>,
}

/// Why no fault is injected into a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// The experiment does not target the request.
    NotTargeted,
    /// No fault was drawn.
    NotDrawn,
    /// The guard has suspended the experiment, or ended it.
    Suspended,
    /// It is unknown which hosts of the target are ejected.
    Unknown,
    /// The experiment is probing, and the request does not belong to the tenth that is faulted.
    Probing,
    /// The term of the experiment has ended or not begun, or its lease was not renewed.
    Expired,
    /// The error budget has not earned another failure.
    Budget,
    /// The policy is in shadow mode.
    Shadow,
    /// The worker holds too many streams already.
    Overflow,
    /// `maxActive` faults are active already.
    MaxActive,
}

impl DrawnFaults {
    pub fn is_none(&self) -> bool {
        *self == DrawnFaults::default()
    }

    /// Whether the client gets a failure.
    pub(super) fn fails(&self) -> bool {
        self.abort.is_some() || self.response.is_some()
    }
}

impl FaultPolicy {
    /// The number for `what` of a request with this trace id. `None` if the policy draws at random or there is no trace id.
    pub fn number(&self, what: DrawPurpose, trace_id: Option<[u8; 16]>) -> Option<u64> {
        match (self.drawn_from, trace_id) {
            (DrawnFrom::TraceId, Some(id)) => Some(xxh64(&id, self.salt.wrapping_add(what as u64))),
            _ => None,
        }
    }

    /// The fault that `request` asks for. `None` if the policy does not permit that.
    pub fn requested(&self, request: &Request<'_>) -> Option<RequestedFault> {
        self.header_control.as_ref().map(|control| control.read(request))
    }

    /// Draws the faults of a request with this trace id. `random` is called for each number that the trace id does not
    /// determine.
    pub(super) fn draw(
        &self,
        requested: Option<RequestedFault>,
        trace_id: Option<[u8; 16]>,
        mut random: impl FnMut() -> u64,
    ) -> DrawnFaults {
        let mut number = |what| self.number(what, trace_id).unwrap_or_else(&mut random);
        let most = |share: Option<Fraction>| share.unwrap_or(Fraction::WHOLE);
        let mut injection = DrawnFaults::default();
        if let Some((share, delay)) = &self.delay
            && most(requested.map(|requested| requested.delay_share)).min(*share).includes(number(DrawPurpose::Delay))
        {
            injection.delay = match (requested, delay) {
                (Some(requested), _) => requested.delay.map(|length| length.min(delay.longest())),
                (None, Delay::Fixed(time)) => Some(*time),
                (None, Delay::Distribution(distribution)) => Some(distribution.delay(number(DrawPurpose::Length))),
            };
        }
        if let Some((share, abort)) = &self.abort
            && most(requested.map(|requested| requested.abort_share)).min(*share).includes(number(DrawPurpose::Abort))
        {
            injection.abort = match requested {
                Some(requested) => requested.abort.map(Abort::Answer),
                None => Some(*abort),
            };
        }
        if let Some((share, status)) = &self.response
            && injection.abort.is_none()
            && share.includes(number(DrawPurpose::Response))
        {
            injection.response = Some(*status);
        }
        injection
    }
}

/// The header of an injected response, unless the policy turns it off.
pub const FAULT_HEADER: &str = "x-trimtab-fault";

/// The body of an aborted request's response, and the message of an injected gRPC status.
pub(super) const FAULT_MESSAGE: &str = "fault injected by trimtab";

impl FaultStatus {
    /// As an HTTP status.
    pub fn http(self) -> u16 {
        match self {
            FaultStatus::Http(status) => status,
            FaultStatus::Grpc(code) => http_from_grpc(code),
        }
    }

    /// As a gRPC status.
    pub fn grpc(self) -> u8 {
        match self {
            FaultStatus::Http(status) => grpc_from_http(status),
            FaultStatus::Grpc(code) => code,
        }
    }

    /// The response of an abort, in the client's protocol.
    pub(crate) fn reply(self, is_grpc: bool, marks: bool) -> LocalReply {
        LocalReply {
            status: self.http(),
            details: "trimtab_fault_abort",
            headers: if marks { vec![(FAULT_HEADER.into(), "abort".to_owned())] } else { Vec::new() },
            body: FAULT_MESSAGE.to_owned(),
            grpc_status: is_grpc.then(|| self.grpc()),
        }
    }
}

/// The gRPC status for an HTTP status, by gRPC's "HTTP to gRPC Status Code Mapping".
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
    use super::super::guard::GuardPolicy;
    use super::super::target::FaultTarget;
    use super::*;

    fn half_and_half(drawn_from: DrawnFrom) -> FaultPolicy {
        let half = Fraction::from_ppm(500_000);
        FaultPolicy {
            delay: Some((half, Delay::Fixed(1))),
            abort: Some((half, Abort::Answer(FaultStatus::Http(503)))),
            response: Some((half, FaultStatus::Http(500))),
            header_control: None,
            drawn_from,
            target: FaultTarget::default(),
            active: None,
            marks: true,
            shadow: false,
            guard: GuardPolicy::default(),
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
            let fault = FaultPolicy { abort: Some((share, Abort::Reset)), ..half_and_half(DrawnFrom::TraceId) };
            let is_aborted = |n: &u32| fault.draw(None, Some(u128::from(*n).to_be_bytes()), || 0).abort.is_some();
            let found = (0..count).filter(is_aborted).count() as f64;
            let expected = f64::from(count) * f64::from(ppm) / 1e6;
            let sigma = (expected * (1.0 - f64::from(ppm) / 1e6)).sqrt();
            assert!((found - expected).abs() <= 4.0 * sigma, "{ppm} ppm: {found} of {expected}");
        }
    }

    #[test]
    fn a_request_gets_at_most_what_the_policy_permits() {
        let whole = Fraction::WHOLE;
        let fault = FaultPolicy {
            delay: Some((whole, Delay::Fixed(100))),
            abort: Some((whole, Abort::Requested)),
            response: None,
            ..half_and_half(DrawnFrom::TraceId)
        };
        let drawn = |requested: RequestedFault| fault.draw(Some(requested), Some([7; 16]), || 0);
        let nothing = RequestedFault { delay: None, delay_share: whole, abort: None, abort_share: whole };
        assert!(drawn(nothing).is_none(), "a request without the headers is not faulted");
        assert_eq!(drawn(RequestedFault { delay: Some(99), ..nothing }).delay, Some(99));
        assert_eq!(
            drawn(RequestedFault { delay: Some(101), ..nothing }).delay,
            Some(100),
            "the longest that is written"
        );
        let abort = RequestedFault { abort: Some(FaultStatus::Grpc(8)), ..nothing };
        assert_eq!(drawn(abort).abort, Some(Abort::Answer(FaultStatus::Grpc(8))));
        assert!(drawn(RequestedFault { abort_share: Fraction::NONE, ..abort }).is_none());
        let fault = FaultPolicy { delay: Some((Fraction::NONE, Delay::Fixed(100))), ..fault };
        assert_eq!(fault.draw(Some(RequestedFault { delay: Some(1), ..nothing }), Some([7; 16]), || 0).delay, None);
    }

    #[test]
    fn the_response_of_an_abort_has_the_clients_protocol() {
        let reply = |status: FaultStatus, is_grpc| {
            let reply = status.reply(is_grpc, true);
            (reply.status, reply.grpc_status)
        };
        assert_eq!(reply(FaultStatus::Http(503), false), (503, None));
        assert_eq!(reply(FaultStatus::Http(503), true), (503, Some(14)));
        assert_eq!(reply(FaultStatus::Grpc(8), true), (429, Some(8)));
        assert_eq!(reply(FaultStatus::Grpc(14), false), (503, None));
    }
}
