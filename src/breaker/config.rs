//! Reads a route's `circuitBreaker` block.

use super::policy::BreakerPolicy;
use crate::document::Value;
use crate::units::duration_or;
use std::time::Duration;

impl BreakerPolicy {
    /// Reads the block of a route. `prefix` is what the policy's keys in shared data begin with, `route` the route's label.
    pub(crate) fn read(value: &Value<'_>, prefix: &str, route: &str) -> Option<BreakerPolicy> {
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
        let key = [prefix, "breaker/", route].concat().into();
        Some(BreakerPolicy { threshold, volume, window, reset, probes, key })
    }
}
