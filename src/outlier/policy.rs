//! What counts as an outlier.

/// The `outlierDetection` block, with DestinationRule's names, defaults and meaning. A count of 0 turns its question
/// off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detection {
    /// `consecutive5xxErrors`: so many 5xx in a row eject a host.
    pub errors: u16,
    /// `consecutiveGatewayErrors`: so many 502, 503 or 504 in a row.
    pub gateway_errors: u16,
    /// `consecutiveLocalOriginFailures`: so many connections in a row that failed, where they are told apart.
    pub local_failures: u16,
    /// `splitExternalLocalOriginErrors`: whether a connection that failed is told apart from a 503 of the host.
    pub splits_local: bool,
    /// `interval`, in nanoseconds: a host that stayed healthy for so long is forgiven one ejection.
    pub interval: u64,
    /// `baseEjectionTime`, in nanoseconds: how long the first ejection lasts, the second twice as long, and so on.
    pub base_ejection_time: u64,
    /// No further host is ejected beyond this share, but one always may be.
    pub max_ejection_percent: u8,
    /// No further host is ejected where fewer than this share of them are healthy.
    pub min_health_percent: u8,
}

impl Default for Detection {
    fn default() -> Self {
        Detection {
            errors: 5,
            gateway_errors: 0,
            local_failures: 5,
            splits_local: false,
            interval: 10_000_000_000,
            base_ejection_time: 30_000_000_000,
            max_ejection_percent: 10,
            min_health_percent: 0,
        }
    }
}
