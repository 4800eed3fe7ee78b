//! Reads the `outlierDetection` block.

use super::hosts::MAX_HOSTS;
use super::policy::OutlierDetection;
use crate::document::Value;
use crate::units::duration_or;
use std::ops::RangeInclusive;
use std::time::Duration;

const FAILURE_PERCENTAGE: [&str; 3] =
    ["failurePercentageThreshold", "failurePercentageMinimumHosts", "failurePercentageRequestVolume"];
const SUCCESS_RATE: [&str; 3] = ["successRateStdevFactor", "successRateMinimumHosts", "successRateRequestVolume"];

impl OutlierDetection {
    /// Reads the block. `None` if it is not an object; other errors are reported to the diagnostics.
    pub fn read(value: &Value<'_>) -> Option<OutlierDetection> {
        const LEAST: Duration = Duration::from_millis(1);
        const COUNT: RangeInclusive<u64> = 0..=u16::MAX as u64;
        let mut fields = value.object()?;
        let mut detection = OutlierDetection::default();
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
        let OutlierDetection { failure_percentage, success_rate, .. } = &mut detection;
        for (names, check, most) in
            [(FAILURE_PERCENTAGE, failure_percentage, 100), (SUCCESS_RATE, success_rate, u64::from(u16::MAX))]
        {
            let [threshold, hosts, requests] = names;
            check.threshold = fields.integer_or(threshold, 0..=most, 0) as u16;
            check.hosts = fields.integer_or(hosts, 1..=MAX_HOSTS as u64, check.hosts.into()) as u8;
            check.requests = fields.integer_or(requests, 1..=u32::MAX.into(), check.requests.into()) as u32;
        }
        if let Some(split) = fields.optional("splitExternalLocalOriginErrors").and_then(|value| value.bool()) {
            detection.splits_local = split;
        }
        fields.end();
        Some(detection)
    }
}
