//! Reads a route's `circuitBreaker` block.

use super::policy::Breaker;
use crate::document::Value;
use crate::units::{nanoseconds, read_duration};
use std::time::Duration;

impl Breaker {
    /// Reads the block of the route with this label; `prefix` is what the policy's shared words start with.
    pub fn read(value: &Value<'_>, prefix: &str, route: &str) -> Option<Breaker> {
        const SECOND: Duration = Duration::from_secs(1);
        let mut fields = value.object()?;
        let mut number = |name, most, default| {
            let number = fields.optional(name).map(|value| value.integer(1..=most));
            number.unwrap_or(Some(default))
        };
        let threshold = number("errorThresholdPercentage", 100, 50);
        let volume = number("volumeThreshold", 1_000_000, 20);
        let probes = number("halfOpenRequests", 1_000, 1);
        let mut duration = |name, default| match fields.optional(name) {
            Some(value) => read_duration(&value, SECOND),
            None => Some(default),
        };
        let window = duration("window", 10 * SECOND);
        let reset = duration("resetTimeout", 30 * SECOND);
        for (field, why) in [
            ("maxConnections", "keep it in the DestinationRule's connectionPool"),
            ("timeout", "keep it in the VirtualService"),
        ] {
            fields.refuse(field, why);
        }
        fields.end();
        Some(Breaker {
            threshold: threshold? as u8,
            volume: volume?,
            window: nanoseconds(window?),
            reset: nanoseconds(reset?),
            probes: probes? as u32,
            word: [prefix, "breaker/", route].concat().into(),
        })
    }
}
