//! What counts as an outlier.

/// The `outlierDetection` block, with DestinationRule's names, defaults and meaning, and Envoy's for what it does not
/// have. A count of 0 turns its question off.
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
    /// `failurePercentage..`: its threshold is the percentage of a host's answers within an interval that were errors.
    pub failure_percentage: Sweep,
    /// `successRate..`: its threshold is `successRateStdevFactor`, by how many thousandths of the standard deviation a
    /// host may do worse than the mean of all.
    pub success_rate: Sweep,
}

/// A question about the answers of a whole interval, as Envoy asks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// 0: it is not asked.
    pub threshold: u16,
    /// `..MinimumHosts`: it is asked where so many hosts have answered often enough.
    pub hosts: u8,
    /// `..RequestVolume`: how often that is.
    pub requests: u32,
}

impl Detection {
    /// Whether anything is asked of whole intervals.
    pub fn sweeps(&self) -> bool {
        self.failure_percentage.threshold > 0 || self.success_rate.threshold > 0
    }
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
            failure_percentage: Sweep { threshold: 0, hosts: 5, requests: 50 },
            success_rate: Sweep { threshold: 0, hosts: 5, requests: 100 },
        }
    }
}
