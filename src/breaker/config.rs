//! Reads a route's `circuitBreaker` block.

use super::policy::Breaker;
use crate::document::Value;
use crate::units::duration_or;
use std::time::Duration;

impl Breaker {
    /// Reads the block of the route with this label; `prefix` is what the policy's shared words start with.
    pub fn read(value: &Value<'_>, prefix: &str, route: &str) -> Option<Breaker> {
        const LEAST: Duration = Duration::from_secs(1);
        const SECOND: u64 = 1_000_000_000;
        let mut fields = value.object()?;
        let threshold = fields.integer_or("errorThresholdPercentage", 1..=100, 50) as u8;
        let volume = fields.integer_or("volumeThreshold", 1..=1_000_000, 20);
        let probes = fields.integer_or("halfOpenRequests", 1..=1_000, 1) as u32;
        let window = duration_or(&mut fields, "window", LEAST, 10 * SECOND);
        let reset = duration_or(&mut fields, "resetTimeout", LEAST, 30 * SECOND);
        for (field, why) in [
            ("maxConnections", "keep it in the DestinationRule's connectionPool"),
            ("timeout", "keep it in the VirtualService"),
        ] {
            fields.refuse(field, why);
        }
        fields.end();
        let word = [prefix, "breaker/", route].concat().into();
        Some(Breaker { threshold, volume, window, reset, probes, word })
    }
}
