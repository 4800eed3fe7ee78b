//! The compiled `outlierDetection` block and `guard.admin`.

/// The `outlierDetection` block, with the names, defaults and meaning of a DestinationRule, and with Envoy's fields for
/// success rates and failure percentages. A threshold of 0 turns its check off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutlierDetection {
    /// `consecutive5xxErrors`: this many consecutive 5xx responses eject a host.
    pub errors: u16,
    /// `consecutiveGatewayErrors`: this many consecutive 502, 503 or 504 responses eject a host.
    pub gateway_errors: u16,
    /// `consecutiveLocalOriginFailures`: this many consecutive failed connections eject a host, if they are split.
    pub local_failures: u16,
    /// `splitExternalLocalOriginErrors`: whether a failed connection is counted apart from a 503 of the host.
    pub splits_local: bool,
    /// `interval`, in nanoseconds: the interval of the interval checks. Each interval without an ejection also shortens
    /// the next ejection of a host by one `baseEjectionTime`.
    pub interval: u64,
    /// `baseEjectionTime`, in nanoseconds: how long the first ejection lasts. The second lasts twice as long, and so on.
    pub base_ejection_time: u64,
    /// `maxEjectionPercent`: no further host is ejected beyond this share of hosts, but one host always may be.
    pub max_ejection_percent: u8,
    /// `minHealthPercent`: no further host is ejected if fewer hosts than this share are healthy.
    pub min_health_percent: u8,
    /// `failurePercentage..`: the threshold is the percentage of errors among a host's responses in an interval.
    pub failure_percentage: IntervalCheck,
    /// `successRate..`: the threshold is `successRateStdevFactor`, in thousandths of the standard deviation: how much
    /// worse than the mean of all hosts a host may be.
    pub success_rate: IntervalCheck,
}

/// A check of the responses of a whole interval, as Envoy makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntervalCheck {
    /// 0 turns the check off.
    pub threshold: u16,
    /// `..MinimumHosts`: the check is made if this many hosts have enough responses.
    pub hosts: u8,
    /// `..RequestVolume`: the number of responses that is enough.
    pub requests: u32,
}

impl OutlierDetection {
    /// Whether an interval check is on.
    pub(super) fn checks_intervals(&self) -> bool {
        self.failure_percentage.threshold > 0 || self.success_rate.threshold > 0
    }
}

impl Default for OutlierDetection {
    fn default() -> Self {
        OutlierDetection {
            errors: 5,
            gateway_errors: 0,
            local_failures: 5,
            splits_local: false,
            interval: 10_000_000_000,
            base_ejection_time: 30_000_000_000,
            max_ejection_percent: 10,
            min_health_percent: 0,
            failure_percentage: IntervalCheck { threshold: 0, hosts: 5, requests: 50 },
            success_rate: IntervalCheck { threshold: 0, hosts: 5, requests: 100 },
        }
    }
}

/// The `guard.admin` block: how to reach Envoy's admin endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminEndpoint {
    /// An Envoy cluster whose host is the admin endpoint.
    pub cluster: Box<str>,
    /// Nanoseconds from one poll to the next. A snapshot that is three intervals old is not used any more.
    pub interval: u64,
}
