//! How upstreams answer: what the arguments say of a subset at a time.

use std::str::FromStr;
use std::time::Duration;
use trimtab::units::{Fraction, nanoseconds, parse_duration, point};

/// What holds for one subset, or for all, for some of the time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule<T> {
    subset: Option<String>,
    value: T,
    /// Nanoseconds since the beginning; up to the second, which is not meant any more.
    during: (u64, u64),
}

/// The share of answers that fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failures(Fraction);

/// How long answers take, in nanoseconds: from half of it to half more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Latency(u64);

impl FromStr for Failures {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Failures, Self::Err> {
        Fraction::parse(text).map(Failures).ok_or("write a share such as 5%, from 0% to 100% in steps of 0.0001%")
    }
}

impl FromStr for Latency {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Latency, Self::Err> {
        parse_duration(text).map(|time| Latency(nanoseconds(time))).ok_or("write a duration such as 80ms")
    }
}

impl<T: FromStr<Err = &'static str>> Rule<T> {
    /// Reads `5%`, `v2=5%`, `v2=5%@10m..15m`, `v2=5%@10m..`.
    pub(super) fn parse(text: &str) -> Result<Rule<T>, &'static str> {
        let (rule, during) = match text.rsplit_once('@') {
            Some((rule, during)) => (rule, span(during).ok_or("write the time as 5m..10m, 5m.. or ..10m")?),
            None => (text, (0, u64::MAX)),
        };
        let (subset, value) = match rule.rsplit_once('=') {
            Some((subset, value)) => (Some(subset.to_owned()), value),
            None => (None, rule),
        };
        Ok(Rule { subset, value: value.parse()?, during })
    }
}

/// `5m..10m`, either of which may be left out.
fn span(text: &str) -> Option<(u64, u64)> {
    let (from, to) = text.split_once("..")?;
    let time = |text: &str, otherwise: Duration| if text.is_empty() { Some(otherwise) } else { parse_duration(text) };
    let (from, to) = (time(from, Duration::ZERO)?, time(to, Duration::MAX)?);
    (from < to).then(|| (nanoseconds(from), nanoseconds(to)))
}

/// All upstreams.
#[derive(Clone, Copy)]
pub(super) struct Upstreams<'a> {
    pub failures: &'a [Rule<Failures>],
    pub latency: &'a [Rule<Latency>],
}

impl<'a> Upstreams<'a> {
    /// The subsets that are named.
    pub fn subsets(&self) -> impl Iterator<Item = &'a str> {
        let failures = self.failures.iter().filter_map(|rule| rule.subset.as_deref());
        failures.chain(self.latency.iter().filter_map(|rule| rule.subset.as_deref()))
    }

    /// Whether `subset` fails a request that it gets `at`, and how many nanoseconds it takes to answer.
    pub fn answer(&self, subset: &str, at: u64, mut random: impl FnMut() -> u64) -> (bool, u64) {
        const USUAL: Latency = Latency(20_000_000);
        let Failures(share) = last(self.failures, subset, at).unwrap_or(Failures(Fraction::NONE));
        let Latency(usual) = last(self.latency, subset, at).unwrap_or(USUAL);
        let failed = share.includes(random());
        let spread = u128::from(usual) * u128::from(point(random())) / 1_000_000;
        (failed, usual / 2 + spread as u64)
    }
}

/// The last rule that holds.
fn last<T: Copy>(rules: &[Rule<T>], subset: &str, at: u64) -> Option<T> {
    let holds = |rule: &&Rule<T>| {
        rule.subset.as_ref().is_none_or(|named| named == subset) && (rule.during.0..rule.during.1).contains(&at)
    };
    rules.iter().rfind(holds).map(|rule| rule.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_has_a_value_and_perhaps_a_subset_and_a_time() {
        let parsed = |text| Rule::<Failures>::parse(text).map(|rule| (rule.subset, rule.value.0.ppm(), rule.during));
        assert_eq!(parsed("5%"), Ok((None, 50_000, (0, u64::MAX))));
        assert_eq!(parsed("v2=0.5%"), Ok((Some("v2".into()), 5_000, (0, u64::MAX))));
        assert_eq!(parsed("v2=5%@1s..2s"), Ok((Some("v2".into()), 50_000, (1_000_000_000, 2_000_000_000))));
        assert_eq!(parsed("5%@..2s"), Ok((None, 50_000, (0, 2_000_000_000))));
        assert_eq!(parsed("5%@1s.."), Ok((None, 50_000, (1_000_000_000, u64::MAX))));
        for bad in ["", "5", "v2=", "v2=101%", "5%@", "5%@1s", "5%@2s..1s", "5%@1s..1s", "5%@a..b", "-1%"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
        for bad in ["", "5%", "20", "v2=fast"] {
            assert!(Rule::<Latency>::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_last_rule_that_holds_decides() {
        let rules =
            |texts: &[&str]| texts.iter().map(|text| Rule::parse(text).unwrap()).collect::<Vec<Rule<Failures>>>();
        let failures = rules(&["0%", "v2=100%@1s..2s"]);
        let latency = [Rule::parse("v2=100ms").unwrap()];
        let upstreams = Upstreams { failures: &failures, latency: &latency };
        let answer = |subset, at| upstreams.answer(subset, at, || 0);
        assert_eq!(answer("v1", 1_500_000_000), (false, 10_000_000));
        assert_eq!(answer("v2", 999_999_999), (false, 50_000_000));
        assert_eq!(answer("v2", 1_000_000_000), (true, 50_000_000));
        assert_eq!(answer("v2", 2_000_000_000), (false, 50_000_000));
        assert_eq!(upstreams.answer("v1", 0, || u64::MAX).1, 29_999_980, "less than half more");
        assert_eq!(upstreams.subsets().collect::<Vec<_>>(), ["v2", "v2"]);
    }
}
