//! Faults that a request asks for, with the headers of Envoy's fault filter.
//!
//! As in Envoy, only requests with these headers are faulted. The first value of a header counts, and a value that is not a
//! number is ignored. An HTTP status takes precedence over a gRPC status. The headers stay on the request, so that each
//! hop with `headerControl` applies them. The policy limits the faults: no share is larger than its `percentage`. Unlike in
//! Envoy, no delay is longer than the delay of the policy, and a gRPC status has to be defined by gRPC.

use super::policy::{FaultStatus, HeaderControl};
use crate::http::{HeaderNames, Request};
use crate::units::Fraction;

/// The fault that a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestedFault {
    /// Nanoseconds.
    pub delay: Option<u64>,
    pub delay_share: Fraction,
    pub abort: Option<FaultStatus>,
    pub abort_share: Fraction,
}

impl HeaderControl {
    /// Interns the names of the headers. `None` if the policy has too many header names.
    pub(super) fn intern(names: &mut HeaderNames) -> Option<HeaderControl> {
        Some(HeaderControl {
            delay: names.intern("x-envoy-fault-delay-request")?,
            delay_percentage: names.intern("x-envoy-fault-delay-request-percentage")?,
            abort: names.intern("x-envoy-fault-abort-request")?,
            abort_grpc: names.intern("x-envoy-fault-abort-grpc-request")?,
            abort_percentage: names.intern("x-envoy-fault-abort-request-percentage")?,
        })
    }

    /// Reads the headers of `request`. Delays are in milliseconds, percentages are whole numbers.
    pub(super) fn read(&self, request: &Request<'_>) -> RequestedFault {
        let number = |id| -> Option<u64> { std::str::from_utf8(request.first(id)?.trim_ascii()).ok()?.parse().ok() };
        let share = |id| {
            let percent = number(id).unwrap_or(100).min(100) as u32;
            Fraction::from_ppm(percent.saturating_mul(10_000))
        };
        let http = || {
            number(self.abort).filter(|status| (200..600).contains(status)).map(|code| FaultStatus::Http(code as u16))
        };
        let grpc = || number(self.abort_grpc).filter(|code| *code <= 16).map(|code| FaultStatus::Grpc(code as u8));
        RequestedFault {
            delay: number(self.delay).filter(|delay| *delay > 0).map(|delay| delay.saturating_mul(1_000_000)),
            delay_share: share(self.delay_percentage),
            abort: http().or_else(grpc),
            abort_share: share(self.abort_percentage),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::encode_headers;

    fn requested(headers: &[(&str, &str)]) -> RequestedFault {
        let mut names = HeaderNames::default();
        let control = HeaderControl::intern(&mut names).unwrap();
        control.read(&Request::parse(&encode_headers(headers), &names))
    }

    const NOTHING: RequestedFault =
        RequestedFault { delay: None, delay_share: Fraction::WHOLE, abort: None, abort_share: Fraction::WHOLE };

    #[test]
    fn the_headers_have_envoys_meaning() {
        assert_eq!(requested(&[]), NOTHING);
        let headers = [
            ("x-envoy-fault-delay-request", "250"),
            ("x-envoy-fault-delay-request-percentage", "10"),
            ("x-envoy-fault-abort-request", "503"),
            ("x-envoy-fault-abort-grpc-request", "14"),
            ("x-envoy-fault-abort-request-percentage", "0"),
        ];
        let expected = RequestedFault {
            delay: Some(250_000_000),
            delay_share: Fraction::from_ppm(100_000),
            abort: Some(FaultStatus::Http(503)),
            abort_share: Fraction::NONE,
        };
        assert_eq!(requested(&headers), expected);
        assert_eq!(requested(&[("x-envoy-fault-abort-grpc-request", "14")]).abort, Some(FaultStatus::Grpc(14)));
    }

    #[test]
    fn a_value_that_is_not_a_number_is_ignored() {
        for bad in ["", "-1", "1e3", "0x10", "1.5", "99999999999999999999", "5 5", "ten", "\u{663}"] {
            for name in ["delay-request", "abort-request", "abort-grpc-request"] {
                assert_eq!(requested(&[(&format!("x-envoy-fault-{name}"), bad)]), NOTHING, "{name}: {bad}");
            }
            let asked = requested(&[("x-envoy-fault-delay-request-percentage", bad)]);
            assert_eq!(asked.delay_share, Fraction::WHOLE, "{bad}");
        }
        for bad in ["199", "600", "0"] {
            assert_eq!(requested(&[("x-envoy-fault-abort-request", bad)]), NOTHING, "{bad}");
        }
        assert_eq!(requested(&[("x-envoy-fault-abort-grpc-request", "17")]), NOTHING);
        assert_eq!(requested(&[("x-envoy-fault-delay-request", "0")]), NOTHING);
        let largest = requested(&[("x-envoy-fault-delay-request", &u64::MAX.to_string())]);
        assert_eq!(largest.delay, Some(u64::MAX));
        assert_eq!(
            requested(&[("x-envoy-fault-delay-request", "7"), ("x-envoy-fault-delay-request", "8")]).delay,
            Some(7_000_000)
        );
    }
}
