//! Faults that a request asks for, with the headers of Envoy's fault filter.
//!
//! As there, only requests that ask are faulted, the first value of a header counts, a value that is no number is none,
//! an HTTP status goes before a gRPC status, and the headers stay on the request, so that each hop that listens to them
//! does as they say. The policy caps what may be asked: no share is larger than its `percentage`, and, other than in
//! Envoy, no delay is longer than the one that is written and no gRPC status is one that gRPC does not know.

use super::policy::{HeaderControl, Status};
use crate::http::{HeaderNames, Request};
use crate::units::Fraction;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Nanoseconds.
    pub delay: Option<u64>,
    pub delay_share: Fraction,
    pub abort: Option<Status>,
    pub abort_share: Fraction,
}

impl HeaderControl {
    /// The headers by their names; `None` where the policy names too many already.
    pub fn listen(names: &mut HeaderNames) -> Option<HeaderControl> {
        Some(HeaderControl {
            delay: names.intern("x-envoy-fault-delay-request")?,
            delay_percentage: names.intern("x-envoy-fault-delay-request-percentage")?,
            abort: names.intern("x-envoy-fault-abort-request")?,
            abort_grpc: names.intern("x-envoy-fault-abort-grpc-request")?,
            abort_percentage: names.intern("x-envoy-fault-abort-request-percentage")?,
        })
    }

    /// What `request` asks for. A delay is in milliseconds, a percentage in whole per cent.
    pub fn read(&self, request: &Request<'_>) -> Asked {
        let number = |id| -> Option<u64> { std::str::from_utf8(request.first(id)?.trim_ascii()).ok()?.parse().ok() };
        let share = |id| {
            let percent = number(id).unwrap_or(100).min(100) as u32;
            Fraction::from_ppm(percent.saturating_mul(10_000))
        };
        let http =
            || number(self.abort).filter(|status| (200..600).contains(status)).map(|code| Status::Http(code as u16));
        let grpc = || number(self.abort_grpc).filter(|code| *code <= 16).map(|code| Status::Grpc(code as u8));
        Asked {
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

    fn asked(headers: &[(&str, &str)]) -> Asked {
        let mut names = HeaderNames::default();
        let control = HeaderControl::listen(&mut names).unwrap();
        control.read(&Request::parse(&encode_headers(headers), &names))
    }

    const NOTHING: Asked =
        Asked { delay: None, delay_share: Fraction::WHOLE, abort: None, abort_share: Fraction::WHOLE };

    #[test]
    fn the_headers_are_envoys() {
        assert_eq!(asked(&[]), NOTHING);
        let headers = [
            ("x-envoy-fault-delay-request", "250"),
            ("x-envoy-fault-delay-request-percentage", "10"),
            ("x-envoy-fault-abort-request", "503"),
            ("x-envoy-fault-abort-grpc-request", "14"),
            ("x-envoy-fault-abort-request-percentage", "0"),
        ];
        let expected = Asked {
            delay: Some(250_000_000),
            delay_share: Fraction::from_ppm(100_000),
            abort: Some(Status::Http(503)),
            abort_share: Fraction::NONE,
        };
        assert_eq!(asked(&headers), expected);
        assert_eq!(asked(&[("x-envoy-fault-abort-grpc-request", "14")]).abort, Some(Status::Grpc(14)));
    }

    #[test]
    fn what_is_no_number_asks_for_nothing() {
        for bad in ["", "-1", "1e3", "0x10", "1.5", "99999999999999999999", "5 5", "ten", "\u{663}"] {
            for name in ["delay-request", "abort-request", "abort-grpc-request"] {
                assert_eq!(asked(&[(&format!("x-envoy-fault-{name}"), bad)]), NOTHING, "{name}: {bad}");
            }
            let asked = asked(&[("x-envoy-fault-delay-request-percentage", bad)]);
            assert_eq!(asked.delay_share, Fraction::WHOLE, "{bad}");
        }
        for bad in ["199", "600", "0"] {
            assert_eq!(asked(&[("x-envoy-fault-abort-request", bad)]), NOTHING, "{bad}");
        }
        assert_eq!(asked(&[("x-envoy-fault-abort-grpc-request", "17")]), NOTHING);
        assert_eq!(asked(&[("x-envoy-fault-delay-request", "0")]), NOTHING);
        let largest = asked(&[("x-envoy-fault-delay-request", &u64::MAX.to_string())]);
        assert_eq!(largest.delay, Some(u64::MAX));
        assert_eq!(
            asked(&[("x-envoy-fault-delay-request", "7"), ("x-envoy-fault-delay-request", "8")]).delay,
            Some(7_000_000)
        );
    }
}
