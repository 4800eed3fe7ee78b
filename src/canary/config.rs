//! Reads `steering` and `cohort`, and a route's `route` and `canary`.

use super::cohort_header::{Accept, CohortHeader, SigningKey};
use super::judge::Judge;
use super::policy::{Canary, Destination, Split, Steering};
use super::stages::{Schedule, Stage};
use crate::decimal::Decimal;
use crate::document::{Environment, Fields, Value, quoted};
use crate::http::HeaderNames;
use crate::key::KeySource;
use crate::matcher::read_header_name;
use crate::units::{Fraction, nanoseconds, read_duration, read_instant};
use std::sync::Arc;
use std::time::Duration;

const DEFAULT_HEADER: &str = "x-trimtab-subset";
/// The largest whole number up to which JSON numbers are exact.
const MOST_REQUESTS: u64 = 1 << 53;

const DEFAULT_TEMPLATE: &str = "{subset}";

impl Default for Steering {
    fn default() -> Self {
        Steering { header: DEFAULT_HEADER.into(), template: DEFAULT_TEMPLATE.into() }
    }
}

impl Steering {
    /// Reads the `steering` block.
    pub fn read(value: &Value<'_>, names: &mut HeaderNames) -> Option<Steering> {
        let mut fields = value.object()?;
        let mut steering = Steering::default();
        if let Some(value) = fields.optional("header")
            && let Some(name) = value.text()
        {
            if name.starts_with(':') {
                value.unfit("expected a header that is no pseudo-header");
            }
            read_header_name(&value, name, names);
            steering.header = name.to_ascii_lowercase().into();
        }
        if let Some(value) = fields.optional("value")
            && let Some(template) = value.text()
        {
            steering.template = template.into();
            let mut rest = template.to_owned();
            for placeholder in ["{subset}", "{host}", "{port}"] {
                rest = rest.replace(placeholder, "");
            }
            if rest.contains(['{', '}']) || !is_field_value(&rest) {
                value.unfit("expected visible text with no placeholders but {subset}, {host}, {port}");
            }
        }
        fields.end();
        Some(steering)
    }

    fn fill(&self, host: &str, subset: &str, port: Option<u64>) -> String {
        let port = port.map(|port| port.to_string()).unwrap_or_default();
        self.template.replace("{subset}", subset).replace("{host}", host).replace("{port}", &port)
    }
}

const DEFAULT_COHORT_HEADER: &str = "x-trimtab-cohort";

impl CohortHeader {
    /// Reads the `cohort` block. `None` if it has an error.
    pub fn read(value: &Value<'_>, environment: Environment<'_>, names: &mut HeaderNames) -> Option<CohortHeader> {
        const DEFAULT_AGE: Duration = Duration::from_secs(300);
        let mut fields = value.object()?;
        let header = match fields.optional("header") {
            Some(value) => {
                let name = value.text()?;
                if name.starts_with(':') {
                    value.unfit("expected a header that is no pseudo-header");
                }
                read_header_name(&value, name, names)?
            }
            None => names.intern(DEFAULT_COHORT_HEADER)?,
        };
        let accept = fields.optional("accept").map_or(Some(Accept::Signed), |value| {
            value.one_of(&[("signed", Accept::Signed), ("any", Accept::Any), ("none", Accept::None)])
        });
        let keys = fields.optional("signingKeys");
        if keys.is_none() && accept == Some(Accept::Signed) {
            value.error(
                "signed decisions are accepted and there are no signingKeys",
                "write signingKeys: [{env: TRIMTAB_COHORT_KEY}], or accept: any where every caller is trusted",
            );
        }
        let keys = keys.map_or(Some(Vec::new()), |keys| read_signing_keys(&keys, environment));
        let max_age = fields
            .optional("maxAge")
            .map_or(Some(DEFAULT_AGE), |value| read_duration(&value, Duration::from_secs(1)))
            .map(|age| age.as_secs());
        fields.end();
        Some(CohortHeader {
            name: names.name(header).into(),
            id: header,
            accept: accept?,
            keys: keys?,
            max_age: max_age?,
        })
    }
}

fn read_signing_keys(value: &Value<'_>, environment: Environment<'_>) -> Option<Vec<SigningKey>> {
    /// The current key, the previous one and the next one.
    const MOST: usize = 3;
    /// The length of the hash (RFC 2104, section 3).
    const LEAST_BYTES: usize = 32;
    let items = value.array()?;
    if items.is_empty() || items.len() > MOST {
        value.error(format!("{} signing keys", items.len()), format!("write 1 to {MOST}: the first signs, all verify"));
    }
    let mut keys = Vec::new();
    for item in &items {
        let mut fields = item.object()?;
        let (written, variable) = (fields.optional("value"), fields.optional("env"));
        fields.end();
        let (found, key) = match (written, variable) {
            (Some(written), None) => {
                written.warning(
                    "every reader of the policy can read this signing key",
                    "name a variable of the proxy's environment in env",
                );
                let key = written.text()?.as_bytes().to_vec();
                (written, key)
            }
            (None, Some(variable)) => {
                let name = variable.text()?;
                let Some(key) = environment(name) else {
                    variable.error(
                        format!("the environment has no {}", quoted(name)),
                        "set it in vmConfig.env of the WasmPlugin, or environment_variables of Envoy's vm_config",
                    );
                    continue;
                };
                (variable, key)
            }
            _ => {
                item.error("a signing key has one source", "write {env: NAME} or {value: KEY}");
                continue;
            }
        };
        if key.len() < LEAST_BYTES {
            let help = format!("expected at least {LEAST_BYTES}, such as of openssl rand -hex {LEAST_BYTES}");
            found.error(format!("a key of {} bytes", key.len()), help);
        }
        keys.push(SigningKey(key));
    }
    (keys.len() == items.len()).then_some(keys)
}

/// Whether `text` is a valid header value (RFC 9110, section 5.5, ASCII only).
fn is_field_value(text: &str) -> bool {
    text.bytes().all(|byte| (0x20..0x7f).contains(&byte))
}

impl Split {
    /// Reads `route` and `canary` of one route. `None` if the route has no destinations.
    pub fn read(fields: &mut Fields<'_>, steering: &Steering, names: &mut HeaderNames) -> Option<Split> {
        let route = fields.optional("route");
        let canary = fields.optional("canary");
        let Some(route) = route else {
            if let Some(canary) = canary {
                canary.error("canary without route", "write the destinations that it chooses between");
            }
            return None;
        };
        let destinations = read_destinations(&route, steering)?;
        let canary = canary.and_then(|canary| read_canary(&canary, &destinations, names));
        Some(Split { destinations, canary: canary.map(Arc::new) })
    }
}

fn read_destinations(value: &Value<'_>, steering: &Steering) -> Option<Vec<(Destination, Fraction)>> {
    const MOST: usize = 64;
    let items = value.array()?;
    if items.is_empty() || items.len() > MOST {
        value.error(format!("{} destinations", items.len()), format!("write 1 to {MOST}"));
        return None;
    }
    let alone = items.len() == 1;
    let mut destinations: Vec<(Destination, Fraction)> = Vec::new();
    for item in &items {
        let Some(mut fields) = item.object() else { continue };
        let destination = fields.required("destination").and_then(|value| read_destination(&value, steering));
        let weight = match fields.optional("weight") {
            Some(weight) => Fraction::read_number(&weight),
            None if alone => Some(Fraction::WHOLE),
            None => Some(Fraction::NONE),
        };
        fields.refuse("headers", "set headers in the VirtualService");
        fields.end();
        let (Some(destination), Some(weight)) = (destination, weight) else { continue };
        if destinations.iter().any(|(known, _)| known.steering == destination.steering) {
            item.error(
                format!("two destinations are steered by the same value {}", quoted(&destination.steering)),
                "write each destination once, or name in steering.value what tells them apart",
            );
        }
        destinations.push((destination, weight));
    }
    if destinations.len() < items.len() {
        return None;
    }
    let sum: u64 = destinations.iter().map(|(_, weight)| u64::from(weight.ppm())).sum();
    if sum != u64::from(Fraction::WHOLE.ppm()) {
        value.error(format!("the weights sum to {}", Decimal(sum, 10_000)), "write weights that sum to 100");
    }
    Some(destinations)
}

fn read_destination(value: &Value<'_>, steering: &Steering) -> Option<Destination> {
    let mut fields = value.object()?;
    let host = fields.required("host").and_then(|value| value.text());
    let subset = fields.optional("subset").map(|value| value.text());
    let port = fields.optional("port").and_then(|value| {
        let mut fields = value.object()?;
        let number = fields.required("number").and_then(|number| number.integer(1..=65_535));
        fields.end();
        number
    });
    fields.end();
    for (placeholder, missing) in [("{subset}", subset.is_none()), ("{port}", port.is_none())] {
        if missing && steering.template.contains(placeholder) {
            value.error(
                format!("the steering value needs {placeholder} and this destination has none"),
                "name it here, or leave it out of steering.value",
            );
            return None;
        }
    }
    let (host, subset) = (host?, subset.unwrap_or(Some(""))?);
    if !is_field_value(host) || !is_field_value(subset) {
        value.error("a name with characters that no header can carry", "write names of visible ASCII characters");
        return None;
    }
    Some(Destination { host: host.into(), subset: subset.into(), steering: steering.fill(host, subset, port).into() })
}

fn read_canary(value: &Value<'_>, destinations: &[(Destination, Fraction)], names: &mut HeaderNames) -> Option<Canary> {
    let mut fields = value.object()?;
    let destination = fields.required("destination").and_then(|value| {
        let subset = value.text()?;
        let found = destinations.iter().position(|(destination, _)| &*destination.subset == subset);
        if found.is_none() {
            let known: Vec<&str> = destinations.iter().map(|(destination, _)| &*destination.subset).collect();
            value.error(
                format!("{} is no subset of this route", quoted(subset)),
                format!("expected one of {}", known.join(", ")),
            );
        }
        found
    });
    let rollout = fields.required("rollout").and_then(|value| {
        let rollout = value.text()?;
        if rollout.len() > 128 || rollout.contains('\n') {
            value.unfit("expected one line of at most 128 bytes");
        }
        Some(rollout)
    });
    let key = fields.optional("key").map(|value| KeySource::read_list(&value, true, names)).unwrap_or_default();
    let schedule = read_schedule(&mut fields);
    let max_requests = fields.optional("maxRequests").map(|value| value.integer(1..=MOST_REQUESTS));
    let judge = match fields.optional("judge") {
        Some(judge) => read_judge(&judge, schedule.as_ref().is_none_or(Option::is_some)).map(Some),
        None => Some(None),
    };
    let shadow = fields.optional("mode").and_then(|value| value.one_of(&[("enforce", false), ("shadow", true)]));
    fields.end();
    let rollout = rollout?;
    let canary = Canary {
        destination: destination?,
        rollout: rollout.into(),
        key,
        schedule: schedule?,
        max_requests: max_requests.unwrap_or_default(),
        judge: judge?,
        shadow: shadow.unwrap_or(false),
    };
    let alone = destinations.get(canary.destination).is_some_and(|(_, weight)| *weight == Fraction::WHOLE);
    if alone && canary.may_be_refused() {
        value.error(
            "no other destination has a weight",
            "give another one a weight: it serves the requests that do not go to the canary; stages replace the canary's weight",
        );
    }
    Some(canary)
}

/// Reads `judge`. `has_stages`: whether the canary has stages, which could wait for a verdict.
fn read_judge(value: &Value<'_>, has_stages: bool) -> Option<Judge> {
    const LEAST_CONFIDENCE: Fraction = Fraction::from_ppm(500_000);
    let mut fields = value.object()?;
    let tolerance = fields.optional("errorRateIncrease").map(|value| Fraction::read(&value));
    let limit = fields.optional("errorRateMax").map(|value| Fraction::read(&value));
    let p99_increase =
        fields.optional("p99Increase").map(|value| read_duration(&value, Duration::from_millis(1)).map(nanoseconds));
    let confidence = fields.optional("confidence").map(|value| {
        let confidence = Fraction::read(&value)?;
        if confidence < LEAST_CONFIDENCE || confidence == Fraction::WHOLE {
            value.unfit("expected \"50%\" to \"99.9999%\": no finite evidence makes anything certain");
        }
        Some(confidence)
    });
    let rolls_back = fields.optional("onFail").map(|value| value.one_of(&[("rollback", true), ("report", false)]));
    let waits_for_pass = fields.optional("onInsufficient").map(|value| {
        if !has_stages {
            value.error("onInsufficient without stages", "remove it, or write the stages that wait for evidence");
        }
        value.one_of(&[("hold", true), ("proceed", false)])
    });
    fields.end();
    Some(Judge {
        tolerance: tolerance.unwrap_or(Some(Fraction::NONE))?,
        limit: limit.unwrap_or_default(),
        p99_increase: p99_increase.unwrap_or_default(),
        confidence: confidence.unwrap_or(Some(Fraction::from_ppm(990_000)))?,
        rolls_back: rolls_back.unwrap_or(Some(true))?,
        waits_for_pass: waits_for_pass.unwrap_or(Some(false))?,
    })
}

/// Reads `stages` and `startTime`. `None` if they have an error.
fn read_schedule(fields: &mut Fields<'_>) -> Option<Option<Schedule>> {
    let start = fields.optional("startTime");
    let Some(stages) = fields.optional("stages") else {
        if let Some(start) = start {
            start.error("startTime without stages", "write stages: [{weight: 5, duration: 5m}, ...]");
        }
        return Some(None);
    };
    if start.is_none() {
        stages.error("stages without startTime", "write startTime: the instant of the first stage");
    }
    let start = start.and_then(|start| read_instant(&start));
    let stages = read_stages(&stages);
    Some(Some(Schedule { start: start?, stages: stages? }))
}

fn read_stages(value: &Value<'_>) -> Option<Vec<Stage>> {
    const MOST: usize = 16;
    let items = value.array()?;
    if items.is_empty() || items.len() > MOST {
        value.error(format!("{} stages", items.len()), format!("write 1 to {MOST}"));
        return None;
    }
    let mut stages: Vec<Stage> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let Some(mut fields) = item.object() else { continue };
        let weight = fields.required("weight").and_then(|weight| Fraction::read_number(&weight));
        let duration = if index + 1 < items.len() {
            fields.required("duration").and_then(|value| read_duration(&value, Duration::from_secs(1)))
        } else {
            if let Some(duration) = fields.optional("duration") {
                duration.error("the last stage has a duration", "remove it: the last stage stays");
            }
            Some(Duration::ZERO)
        };
        fields.end();
        let (Some(weight), Some(duration)) = (weight, duration) else { continue };
        if let Some(before) = stages.last()
            && weight < before.weight
        {
            item.error(
                format!("the weight goes down from {} to {weight}", before.weight),
                "write weights that grow; to take the canary back, lower the route's weight without stages",
            );
        }
        stages.push(Stage { weight, duration: nanoseconds(duration) });
    }
    (stages.len() == items.len()).then_some(stages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::Node;

    fn read(weights: [u32; 2], canary: &str) -> (Option<Split>, Vec<String>) {
        let [stable, trial] = weights;
        let text = format!(
            r#"{{"route": [{{"destination": {{"host": "h", "subset": "v1"}}, "weight": {stable}}},
                           {{"destination": {{"host": "h", "subset": "v2"}}, "weight": {trial}}}],
                "canary": {{"destination": "v2", "rollout": "r", {canary}}}}}"#
        );
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        let mut fields = Value::root(&node, &report).object().unwrap();
        let split = Split::read(&mut fields, &Steering::default(), &mut HeaderNames::default());
        fields.end();
        (split, report.into_diagnostics().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn stages_are_read() {
        let (split, told) = read(
            [100, 0],
            r#""stages": [{"weight": 5, "duration": "5m"}, {"weight": 100}], "startTime": "2026-11-21T09:00:00Z""#,
        );
        assert_eq!(told, [] as [&str; 0]);
        let schedule = split.unwrap().canary.unwrap().schedule.clone().unwrap();
        assert_eq!(schedule.start.as_nanos(), 1_795_251_600_000_000_000);
        let first = Stage { weight: Fraction::from_ppm(50_000), duration: 300_000_000_000 };
        assert_eq!(schedule.stages, [first, Stage { weight: Fraction::WHOLE, duration: 0 }]);
    }

    #[test]
    fn a_judge_is_read() {
        let (split, told) = read(
            [95, 5],
            r#""judge": {"errorRateIncrease": "1%", "errorRateMax": {"value": 5}, "p99Increase": "100ms",
                         "confidence": "99.9%", "onFail": "report"}, "mode": "shadow""#,
        );
        assert_eq!(told, [] as [&str; 0]);
        let canary = split.unwrap().canary.unwrap();
        assert!(canary.shadow);
        let expected = Judge {
            tolerance: Fraction::from_ppm(10_000),
            limit: Some(Fraction::from_ppm(50_000)),
            p99_increase: Some(100_000_000),
            confidence: Fraction::from_ppm(999_000),
            rolls_back: false,
            waits_for_pass: false,
        };
        assert_eq!(canary.judge, Some(expected));
        let (split, _) = read([95, 5], r#""judge": {}"#);
        let judge = split.unwrap().canary.unwrap().judge.unwrap();
        assert_eq!((judge.confidence, judge.rolls_back), (Fraction::from_ppm(990_000), true));
    }

    #[test]
    fn bad_canaries_are_refused() {
        let start = r#""startTime": "2026-11-21T09:00:00Z""#;
        for (weights, canary, expected) in [
            ([95, 5], r#""stages": [{"weight": 5}]"#.to_owned(), "canary/stages: stages without startTime"),
            ([95, 5], start.to_owned(), "canary/startTime: startTime without stages"),
            ([95, 5], format!(r#"{start}, "stages": []"#), "0 stages; write 1 to 16"),
            (
                [95, 5],
                format!(r#"{start}, "stages": [{{"weight": 5}}, {{"weight": 9}}]"#),
                "stages/0: duration is missing",
            ),
            (
                [95, 5],
                format!(r#"{start}, "stages": [{{"weight": 5, "duration": "1m"}}]"#),
                "stages/0/duration: the last stage has a duration",
            ),
            (
                [95, 5],
                format!(r#"{start}, "stages": [{{"weight": 9, "duration": "1m"}}, {{"weight": 5}}]"#),
                "stages/1: the weight goes down from 9% to 5%",
            ),
            ([95, 5], format!(r#"{start}, "stages": [{{"weight": 101}}]"#), "stages/0/weight: found 101"),
            ([95, 5], r#""stages": [{"weight": 5}], "startTime": "now""#.to_owned(), "expected an RFC 3339 instant"),
            ([95, 5], r#""maxRequests": 0"#.to_owned(), "canary/maxRequests: found 0; expected a whole number from 1"),
            ([95, 5], r#""maxRequests": 1.5"#.to_owned(), "canary/maxRequests: found 1.5"),
            ([0, 100], r#""judge": {}"#.to_owned(), "canary: no other destination has a weight"),
            ([95, 5], r#""judge": {"onInsufficient": "hold"}"#.to_owned(), "onInsufficient without stages"),
            (
                [95, 5],
                r#""judge": {"confidence": "100%"}"#.to_owned(),
                "judge/confidence: found \"100%\"; expected \"50%\"",
            ),
            ([95, 5], r#""judge": {"errorRateMax": 5}"#.to_owned(), "judge/errorRateMax: found 5"),
            ([95, 5], r#""judge": {"p99Increase": "0s"}"#.to_owned(), "judge/p99Increase: found"),
            ([95, 5], r#""judge": {"onFail": "explode"}"#.to_owned(), "expected one of rollback, report"),
            ([95, 5], r#""mode": "dark""#.to_owned(), "expected one of enforce, shadow"),
            ([0, 100], r#""maxRequests": 5"#.to_owned(), "canary: no other destination has a weight"),
            ([0, 100], format!(r#"{start}, "stages": [{{"weight": 5}}]"#), "no other destination has a weight"),
        ] {
            let (_, told) = read(weights, &canary);
            assert!(told.iter().any(|told| told.contains(expected)), "{canary}: {told:?}");
        }
    }
}
