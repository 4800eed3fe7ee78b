//! The local reply to a refused request, and the headers that announce the remaining quota.
//!
//! The announced quota is the burst, and its window is the time after which a spent burst is available again. The client may
//! send the remaining number of requests at any time, and no more.

use super::decision::{QuotaStatus, Refusal, RefusalReason};
use super::policy::{Limit, Rate, RejectionBody};
use crate::http::LocalReply;
use crate::units::seconds_rounded_up;
use std::borrow::Cow;

/// A response header: its name, its value, and whether it is added to other headers of that name or replaces them.
pub(crate) type HeaderLine = (&'static str, String, bool);

impl Limit {
    /// Calls `write` with the headers that announce the remaining quota.
    pub(super) fn write_headers(&self, quota: &QuotaStatus, write: &mut dyn FnMut(HeaderLine)) {
        let rate = self.rate_of(quota.override_index);
        let reset = seconds_rounded_up(quota.reset);
        let burst = rate.gcra().burst();
        let window = seconds_rounded_up(rate.gcra().window()).max(1);
        if self.response.x_ratelimit {
            let burst = burst.to_string();
            let limit = [&burst, ", ", &burst, ";w=", &window.to_string(), ";name=\"", &self.name, "\""].concat();
            write(("x-ratelimit-limit", limit, false));
            write(("x-ratelimit-remaining", quota.remaining.to_string(), false));
            write(("x-ratelimit-reset", reset.to_string(), false));
        }
        if self.response.fields {
            write(("ratelimit-policy", self.item(";q=", burst, ";w=", window), true));
            write(("ratelimit", self.item(";r=", quota.remaining, ";t=", reset), true));
        }
    }

    /// An item of a structured field (RFC 9651): the limit's name with two parameters.
    fn item(&self, first: &str, value: u64, second: &str, other: u64) -> String {
        ["\"", &self.name, "\"", first, &value.to_string(), second, &other.to_string()].concat()
    }

    /// The reply to a request that this limit refused.
    pub(crate) fn refusal(&self, refusal: &Refusal, is_grpc: bool) -> LocalReply {
        let answer = &self.response;
        let wait = match refusal.reason {
            RefusalReason::RateExceeded(wait) => Some(seconds_rounded_up(wait).max(1)),
            RefusalReason::CostExceedsBurst | RefusalReason::IncompleteKey => None,
        };
        let sentence = self.sentence(self.rate_of(refusal.quota.override_index), refusal.reason, wait);
        let mut headers: Vec<(Cow<'static, str>, String)> = Vec::with_capacity(8);
        if let Some(wait) = wait.filter(|_| answer.retry_after) {
            headers.push(("retry-after".into(), wait.to_string()));
        }
        if answer.x_envoy_ratelimited {
            headers.push(("x-envoy-ratelimited".into(), "true".to_owned()));
        }
        if answer.announces_quota() {
            // The reset must not be before Retry-After.
            let reset = wait.unwrap_or(0).saturating_mul(1_000_000_000);
            let quota = QuotaStatus { reset, ..refusal.quota };
            self.write_headers(&quota, &mut |(name, value, _)| headers.push((name.into(), value)));
        }
        for (name, value) in &answer.headers {
            headers.push((Cow::Owned(name.to_string()), value.to_string()));
        }
        let (kind, body) = match &answer.body {
            // The body of the options applies to HTTP only: a gRPC reply has a status message.
            _ if is_grpc => (None, sentence),
            RejectionBody::Sentence => (answer.content_type.as_deref(), sentence),
            RejectionBody::Problem => (Some("application/problem+json"), self.problem(&sentence)),
            RejectionBody::Own(body) => (answer.content_type.as_deref(), body.to_string()),
        };
        if let Some(kind) = kind {
            headers.push(("content-type".into(), kind.to_owned()));
        }
        LocalReply {
            status: answer.status,
            details: "trimtab_rate_limited",
            headers,
            body,
            // RESOURCE_EXHAUSTED
            grpc_status: is_grpc.then_some(8),
        }
    }

    fn sentence(&self, rate: &Rate, reason: RefusalReason, wait: Option<u64>) -> String {
        let seconds = wait.map_or(String::new(), |wait| wait.to_string());
        let (what, how_much, then, unit) = match reason {
            RefusalReason::IncompleteKey => (": the request lacks a part of the key", "", "", ""),
            RefusalReason::CostExceedsBurst => {
                (" exceeded: ", &*rate.promise, "; the request costs more than the burst", "")
            }
            RefusalReason::RateExceeded(_) => (" exceeded: ", &*rate.promise, "; retry in ", " s"),
        };
        ["rate limit ", &self.name, what, how_much, then, &seconds, unit].concat()
    }

    /// The reply as JSON. Nothing needs escaping, because the name and the sentence contain no special characters.
    fn problem(&self, sentence: &str) -> String {
        [
            "{\"type\":\"https://iana.org/assignments/http-problem-types#quota-exceeded\",",
            "\"title\":\"The quota is exceeded\",\"status\":",
            &self.response.status.to_string(),
            ",\"detail\":\"",
            sentence,
            "\",\"violated-policies\":[\"",
            &self.name,
            "\"]}",
        ]
        .concat()
    }
}
