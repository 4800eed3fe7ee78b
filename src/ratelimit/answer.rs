//! What a client is told: of a refusal, and of what is left to it.
//!
//! The quota that is told is the burst, and its window the time in which a burst is regained: the client may always send
//! what remains, and never more.

use super::decision::{Reason, Refusal, Told};
use super::policy::{Body, Limit, Rate};
use crate::http::LocalReply;
use crate::units::seconds_rounded_up;
use std::borrow::Cow;

/// A header to be written, and whether others of its name may stay.
pub type Line = (&'static str, String, bool);

impl Limit {
    /// Hands the headers that tell what is left to `write`.
    pub fn tell(&self, told: &Told, write: &mut dyn FnMut(Line)) {
        let rate = self.rate_of(told.exception);
        let reset = seconds_rounded_up(told.reset);
        let quota = rate.gcra().burst();
        let window = seconds_rounded_up(rate.gcra().window()).max(1);
        if self.answer.x_ratelimit {
            let quota = quota.to_string();
            let limit = [&quota, ", ", &quota, ";w=", &window.to_string(), ";name=\"", &self.name, "\""].concat();
            write(("x-ratelimit-limit", limit, false));
            write(("x-ratelimit-remaining", told.remaining.to_string(), false));
            write(("x-ratelimit-reset", reset.to_string(), false));
        }
        if self.answer.fields {
            write(("ratelimit-policy", self.item(";q=", quota, ";w=", window), true));
            write(("ratelimit", self.item(";r=", told.remaining, ";t=", reset), true));
        }
    }

    /// An item of a structured field (RFC 9651): the limit's name with two parameters.
    fn item(&self, first: &str, value: u64, second: &str, other: u64) -> String {
        ["\"", &self.name, "\"", first, &value.to_string(), second, &other.to_string()].concat()
    }

    /// The answer to a request that this limit refused.
    pub fn refusal(&self, refusal: &Refusal, is_grpc: bool) -> LocalReply {
        let answer = &self.answer;
        let wait = match refusal.reason {
            Reason::TooEarly(wait) => Some(seconds_rounded_up(wait).max(1)),
            Reason::TooDear | Reason::Incomplete => None,
        };
        let sentence = self.sentence(self.rate_of(refusal.told.exception), refusal.reason, wait);
        let mut headers: Vec<(Cow<'static, str>, String)> = Vec::with_capacity(8);
        if let Some(wait) = wait.filter(|_| answer.retry_after) {
            headers.push(("retry-after".into(), wait.to_string()));
        }
        if answer.x_envoy_ratelimited {
            headers.push(("x-envoy-ratelimited".into(), "true".to_owned()));
        }
        if answer.tells() {
            // No earlier than Retry-After.
            let reset = wait.unwrap_or(0).saturating_mul(1_000_000_000);
            let told = Told { reset, ..refusal.told };
            self.tell(&told, &mut |(name, value, _)| headers.push((name.into(), value)));
        }
        for (name, value) in &answer.headers {
            headers.push((Cow::Owned(name.to_string()), value.to_string()));
        }
        let (kind, body) = match &answer.body {
            // A call's message is its own protocol's.
            _ if is_grpc => (None, sentence),
            Body::Sentence => (answer.content_type.as_deref(), sentence),
            Body::Problem => (Some("application/problem+json"), self.problem(&sentence)),
            Body::Own(body) => (answer.content_type.as_deref(), body.to_string()),
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

    fn sentence(&self, rate: &Rate, reason: Reason, wait: Option<u64>) -> String {
        let seconds = wait.map_or(String::new(), |wait| wait.to_string());
        let (what, how_much, then, unit) = match reason {
            Reason::Incomplete => (": the request lacks a part of the key", "", "", ""),
            Reason::TooDear => (" exceeded: ", &*rate.promise, "; this one costs more than may come at once", ""),
            Reason::TooEarly(_) => (" exceeded: ", &*rate.promise, "; retry in ", " s"),
        };
        ["rate limit ", &self.name, what, how_much, then, &seconds, unit].concat()
    }

    /// None of what is put together here needs escaping: names are plain, and so are sentences.
    fn problem(&self, sentence: &str) -> String {
        [
            "{\"type\":\"https://iana.org/assignments/http-problem-types#quota-exceeded\",",
            "\"title\":\"The quota is exceeded\",\"status\":",
            &self.answer.status.to_string(),
            ",\"detail\":\"",
            sentence,
            "\",\"violated-policies\":[\"",
            &self.name,
            "\"]}",
        ]
        .concat()
    }
}
