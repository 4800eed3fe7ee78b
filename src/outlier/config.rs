//! Reads `outlierDetection`, as a DestinationRule has it.

use super::policy::Detection;
use crate::document::Value;
use crate::units::duration_or;
use std::ops::RangeInclusive;
use std::time::Duration;

impl Detection {
    pub fn read(value: &Value<'_>) -> Option<Detection> {
        const LEAST: Duration = Duration::from_millis(1);
        const COUNT: RangeInclusive<u64> = 0..=u16::MAX as u64;
        let mut fields = value.object()?;
        let mut detection = Detection::default();
        if let Some(value) = fields.optional("consecutiveErrors") {
            value.warning("consecutiveErrors is deprecated in Istio", "write consecutive5xxErrors");
            detection.errors = fields.integer_or("consecutiveErrors", COUNT, detection.errors.into()) as u16;
        }
        for (name, field) in [
            ("consecutive5xxErrors", &mut detection.errors),
            ("consecutiveGatewayErrors", &mut detection.gateway_errors),
            ("consecutiveLocalOriginFailures", &mut detection.local_failures),
        ] {
            *field = fields.integer_or(name, COUNT, u64::from(*field)) as u16;
        }
        for (name, field) in
            [("interval", &mut detection.interval), ("baseEjectionTime", &mut detection.base_ejection_time)]
        {
            *field = duration_or(&mut fields, name, LEAST, *field);
        }
        for (name, field) in [
            ("maxEjectionPercent", &mut detection.max_ejection_percent),
            ("minHealthPercent", &mut detection.min_health_percent),
        ] {
            *field = fields.integer_or(name, 0..=100, u64::from(*field)) as u8;
        }
        if let Some(split) = fields.optional("splitExternalLocalOriginErrors").and_then(|value| value.bool()) {
            detection.splits_local = split;
        }
        fields.end();
        Some(detection)
    }
}
