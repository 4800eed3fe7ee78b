//! A route's service level objective. Nothing is done by it alone: it is what other blocks measure by.

use crate::document::Value;
use crate::units::{Fraction, nanoseconds, read_duration};
use std::time::Duration;

/// The `slo` block of a route.
#[derive(Debug, Default)]
pub struct Slo {
    /// The share of requests that have to succeed.
    pub availability: Option<Fraction>,
    /// In nanoseconds.
    pub latency_p99: Option<u64>,
    /// Whom log lines name.
    pub owner: Box<str>,
}

impl Slo {
    pub fn read(value: &Value<'_>) -> Option<Slo> {
        const LONGEST_OWNER: usize = 128;
        let mut fields = value.object()?;
        let availability = fields.optional("availability").and_then(|value| Fraction::read(&value));
        let latency = fields.optional("latencyP99").and_then(|value| read_duration(&value, Duration::from_millis(1)));
        let owner = fields.optional("owner").and_then(|value| {
            let owner = value.text()?;
            if owner.len() > LONGEST_OWNER {
                value.unfit("expected at most 128 bytes");
            }
            Some(owner)
        });
        fields.end();
        Some(Slo { availability, latency_p99: latency.map(nanoseconds), owner: owner.unwrap_or_default().into() })
    }
}
