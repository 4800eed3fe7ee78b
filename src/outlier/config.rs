//! Reads `outlierDetection`, as a DestinationRule has it.

use super::policy::Detection;
use crate::document::Value;
use crate::units::{nanoseconds, read_duration};
use std::time::Duration;

impl Detection {
    pub fn read(value: &Value<'_>) -> Option<Detection> {
        const LEAST: Duration = Duration::from_millis(1);
        let mut fields = value.object()?;
        let mut detection = Detection::default();
        let count = |value: Value<'_>| value.integer(0..=u64::from(u16::MAX)).map(|count| count as u16);
        if let Some(value) = fields.optional("consecutiveErrors") {
            value.warning("consecutiveErrors is deprecated in Istio", "write consecutive5xxErrors");
            detection.errors = count(value).unwrap_or(detection.errors);
        }
        for (name, field) in [
            ("consecutive5xxErrors", &mut detection.errors),
            ("consecutiveGatewayErrors", &mut detection.gateway_errors),
            ("consecutiveLocalOriginFailures", &mut detection.local_failures),
        ] {
            *field = fields.optional(name).and_then(count).unwrap_or(*field);
        }
        for (name, field) in
            [("interval", &mut detection.interval), ("baseEjectionTime", &mut detection.base_ejection_time)]
        {
            let duration = fields.optional(name).and_then(|value| read_duration(&value, LEAST));
            *field = duration.map_or(*field, nanoseconds);
        }
        let mut percent = |name, field: &mut u8| {
            *field = fields.optional(name).and_then(|value| value.integer(0..=100)).map_or(*field, |it| it as u8);
        };
        percent("maxEjectionPercent", &mut detection.max_ejection_percent);
        percent("minHealthPercent", &mut detection.min_health_percent);
        if let Some(split) = fields.optional("splitExternalLocalOriginErrors").and_then(|value| value.bool()) {
            detection.splits_local = split;
        }
        fields.end();
        Some(detection)
    }
}
