//! The policy document: read strictly, and compiled to what a request needs.

use crate::breaker::BreakerPolicy;
use crate::canary::{Canary, CohortHeader, Destination, Split, Steering, can_be_carried};
use crate::diagnostic::{Diagnostic, Report, Severity};
use crate::document::{Environment, Fields, Node, Value, quoted};
use crate::fault::{FaultPolicy, RouteContext};
use crate::http::{HeaderId, HeaderMutation, HeaderNames, Request};
use crate::matcher::{Condition, RequestMatch};
use crate::outlier::{AdminEndpoint, OutlierDetection};
use crate::ratelimit::{self, RateLimits};
use crate::route_table::RouteTable;
use crate::slo::Slo;
use crate::trace::TracePolicy;
use std::borrow::Cow;
use std::sync::Arc;

/// The only version of the document so far.
pub const API_VERSION: &str = "trimtab/v1alpha1";

/// The schema of what is written to shared data; part of every key.
const STATE_SCHEMA: u32 = 1;

/// The most routes that a policy may have.
const MAX_ROUTES: usize = 4096;

/// A validated document.
#[derive(Debug)]
pub struct Policy {
    pub name: Box<str>,
    /// What the keys of this policy's shared words start with.
    pub state_prefix: Box<str>,
    pub header_names: HeaderNames,
    pub steering: Steering,
    pub steering_header: HeaderId,
    /// How decisions are carried from hop to hop.
    pub cohort: Option<CohortHeader>,
    pub routes: Vec<Route>,
    route_table: RouteTable,
    pub trace: Option<Arc<TracePolicy>>,
    /// Everything that requests are sent to, each once.
    pub targets: Vec<Target>,
    /// Whether a match asks for Envoy's own route name.
    pub reads_route_name: bool,
}

/// One route: which requests it is for, and what is done to them.
#[derive(Debug)]
pub struct Route {
    pub name: Box<str>,
    /// One of them has to match; none: every request does.
    pub matches: Vec<RequestMatch>,
    pub split: Option<Arc<Split>>,
    /// The target of each destination; where there are none, the route itself is the one target.
    pub targets: Vec<TargetId>,
    pub fault: Option<Arc<FaultPolicy>>,
    pub limits: Option<Arc<RateLimits>>,
    pub breaker: Option<Arc<BreakerPolicy>>,
    pub slo: Slo,
}

/// What requests are sent to: a destination, or a route without one.
#[derive(Debug, PartialEq, Eq)]
pub struct Target {
    pub name: Box<str>,
    /// Whether a guard watches it.
    pub watched: bool,
    /// The response times, in nanoseconds, above which a guard regards a response as slow; each once.
    pub latency_thresholds: Vec<u64>,
    /// What makes its hosts outliers, if a guard watches it.
    pub detection: Option<OutlierDetection>,
    /// Where to poll Envoy for the hosts that are ejected.
    pub admin: Option<AdminEndpoint>,
}

impl Target {
    /// Whether a guard depends on the state of its hosts.
    pub(crate) fn observes_hosts(&self) -> bool {
        self.detection.is_some() || self.admin.is_some()
    }
}

/// An index into [`Policy::targets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetId(pub usize);

const _: () = {
    const fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<Policy>();
};

impl Policy {
    /// Reads a JSON document, and from `environment` what it names there; with it come the warnings.
    ///
    /// # Errors
    /// Everything that is wrong with it, at least one error among them.
    pub fn from_json(text: &[u8], environment: Environment<'_>) -> Result<(Policy, Vec<Diagnostic>), Vec<Diagnostic>> {
        let node = Node::from_json(text).map_err(|diagnostic| vec![diagnostic])?;
        Policy::from_node(&node, environment)
    }

    /// Reads a document that was parsed already; with it come the warnings.
    ///
    /// # Errors
    /// Everything that is wrong with it, at least one error among them.
    pub fn from_node(node: &Node, environment: Environment<'_>) -> Result<(Policy, Vec<Diagnostic>), Vec<Diagnostic>> {
        let report = Report::default();
        let policy = Policy::read(&Value::root(node, &report), environment);
        match policy {
            Some(policy) if report.errors() == 0 => Ok((policy, report.into_diagnostics())),
            _ => {
                let is_error = |diagnostic: &Diagnostic| diagnostic.severity == Severity::Error;
                let (mut diagnostics, warnings): (Vec<_>, Vec<_>) =
                    report.into_diagnostics().into_iter().partition(is_error);
                diagnostics.extend(warnings);
                Err(diagnostics)
            }
        }
    }

    fn read(value: &Value<'_>, environment: Environment<'_>) -> Option<Policy> {
        let mut fields = value.object()?;
        if let Some(version) = fields.required("apiVersion") {
            version.one_of(&[(API_VERSION, ())]);
        }
        let name = fields.required("name").and_then(|value| value.name()).unwrap_or("unnamed");
        let state_prefix = format!("trimtab/{STATE_SCHEMA}/{name}/");
        let mut header_names = HeaderNames::default();
        let steering = match fields.optional("steering") {
            Some(value) => Steering::read(&value, &mut header_names).unwrap_or_default(),
            None => Steering::default(),
        };
        let steering_header = header_names.intern(&steering.header)?;
        let cohort =
            fields.optional("cohort").and_then(|value| CohortHeader::read(&value, environment, &mut header_names));
        let trace = fields
            .optional("trace")
            .and_then(|value| TracePolicy::read(&value, &state_prefix, &mut header_names))
            .map(Arc::new);
        let (labels, routes, targets) = (Vec::new(), Vec::new(), Vec::new());
        let detection = fields.optional("outlierDetection").and_then(|value| OutlierDetection::read(&value));
        let mut reading = Reading { labels, state_prefix, steering, cohort, header_names, routes, targets, detection };
        if let Some(routes) = fields.optional("routes") {
            reading.routes(&routes);
        }
        for (field, why) in [
            ("http", "write its entries under routes"),
            ("spec", "write the fields of spec at the top of the document"),
            ("hosts", "select workloads in the WasmPlugin, and authorities in a match"),
            ("gateways", "select gateways in the WasmPlugin"),
            ("trafficPolicy", "keep it in the DestinationRule"),
            ("subsets", "keep them in the DestinationRule"),
        ] {
            fields.refuse(field, why);
        }
        fields.end();
        let Reading { state_prefix, steering, cohort, header_names, routes, targets, .. } = reading;
        Some(Policy {
            name: name.into(),
            state_prefix: state_prefix.into(),
            header_names,
            steering,
            steering_header,
            cohort,
            reads_route_name: routes.iter().flat_map(|route| &route.matches).any(RequestMatch::reads_route_name),
            route_table: RouteTable::new(routes.iter().map(|route| &*route.matches)),
            routes,
            trace,
            targets,
        })
    }

    /// The target, where a guard wants to know how it answers.
    pub fn watched(&self, target: TargetId) -> Option<&Target> {
        self.targets.get(target.0).filter(|target| target.watched)
    }

    /// Names `destination` in the steering header; with none, a client's own value is dropped. A header that is right
    /// already is left alone: every write makes the proxy choose its route again.
    pub fn steer<'p>(
        &'p self,
        request: &Request<'_>,
        destination: Option<&'p Destination>,
        mutations: &mut Vec<HeaderMutation<'p>>,
    ) {
        let found = (request.count(self.steering_header), request.first(self.steering_header));
        match destination.map(|destination| destination.steering.as_bytes()) {
            Some(value) if found == (1, Some(value)) => {}
            Some(value) => mutations.push(HeaderMutation::Set(&self.steering.header, Cow::Borrowed(value))),
            None if found.0 > 0 => mutations.push(HeaderMutation::Remove(&self.steering.header)),
            None => {}
        }
    }

    /// The key in shared data for `what` of the route, target or cluster called `name`.
    #[inline(never)]
    pub fn shared_key(&self, what: &str, name: &str) -> String {
        [&*self.state_prefix, what, &label(name)].concat()
    }

    /// Whether a route decides on `rollout`.
    pub fn knows(&self, rollout: &str) -> bool {
        self.routes.iter().filter_map(Route::canary).any(|canary| &*canary.rollout == rollout)
    }

    /// The rate limits of all routes.
    fn limits(&self) -> impl Iterator<Item = &RateLimits> {
        self.routes.iter().filter_map(|route| route.limits.as_deref())
    }

    /// Whether a service keeps one of the limits.
    pub fn has_services(&self) -> bool {
        self.limits().any(|limits| !limits.global.is_empty())
    }

    /// Whether a worker may reserve requests of a limit ahead.
    pub fn has_leases(&self) -> bool {
        self.limits().flat_map(RateLimits::rates).any(|rate| rate.lease > 0)
    }

    /// The first route that matches.
    pub fn route(&self, request: &Request<'_>) -> Option<(usize, &Route)> {
        let index = self.route_table.find(request, |index| self.routes.get(index).map(|route| &*route.matches))?;
        self.routes.get(index).map(|route| (index, route))
    }
}

impl Route {
    /// The destination on trial.
    pub fn canary(&self) -> Option<&Canary> {
        self.split.as_ref()?.canary.as_deref()
    }

    fn matches(&self, request: &Request<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|found| found.first_mismatch(request).is_none())
    }

    /// For each entry of `match`, the first condition that does not hold. Empty where the route matches.
    pub fn mismatches(&self, request: &Request<'_>) -> Vec<&Condition> {
        if self.matches(request) {
            return Vec::new();
        }
        self.matches.iter().filter_map(|entry| entry.first_mismatch(request)).collect()
    }
}

/// What has been read of a document so far.
struct Reading {
    /// The routes' names as metrics and keys bear them, sorted.
    labels: Vec<String>,
    state_prefix: String,
    steering: Steering,
    cohort: Option<CohortHeader>,
    header_names: HeaderNames,
    routes: Vec<Route>,
    targets: Vec<Target>,
    /// What makes outliers where a route does not say.
    detection: Option<OutlierDetection>,
}

impl Reading {
    fn routes(&mut self, value: &Value<'_>) {
        let items = value.array().unwrap_or_default();
        if items.len() > MAX_ROUTES {
            value.error(format!("{} routes", items.len()), format!("a policy has at most {MAX_ROUTES}"));
            return;
        }
        let mut detections = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let Some(mut fields) = item.object() else { continue };
            let detection = fields.optional("outlierDetection");
            let route = self.route(index, &mut fields);
            fields.end();
            let Some(route) = route else { continue };
            if let Some(value) = detection {
                detections.push((value, route.targets.clone()));
            }
            let label = label(&route.name);
            let known = self.labels.binary_search(&label);
            if let Err(place) = known {
                self.labels.insert(place, label);
            } else {
                item.error(format!("a second route called {}", quoted(&route.name)), "give each route its own name");
            }
            if let Some(rollout) = self.shared_rollout(&route) {
                item.error(
                    format!("a second route with the rollout {}", quoted(rollout)),
                    "give each its own: its cap and its verdict are kept under its name",
                );
            }
            if let Some(canary) = route.canary()
                && self.cohort.is_some()
                && !can_be_carried(&canary.rollout)
            {
                item.error(
                    format!("the cohort header cannot carry the rollout {}", quoted(&canary.rollout)),
                    "name it in visible ASCII characters without \" \\ and comma",
                );
            }
            if let Some(earlier) = self.routes.iter().find(|known| known.matches.is_empty()) {
                item.warning(
                    format!("{} matches every request before this route is reached", quoted(&earlier.name)),
                    "put the route without match last",
                );
            }
            self.routes.push(route);
        }
        for (value, targets) in detections {
            self.detect(&value, &targets);
        }
        for target in self.targets.iter_mut().filter(|target| target.watched) {
            target.detection = target.detection.or(self.detection);
        }
    }

    /// Reads a route's own `outlierDetection`, once it is known which of its `targets` a guard looks at.
    fn detect(&mut self, value: &Value<'_>, targets: &[TargetId]) {
        let Some(detection) = OutlierDetection::read(value) else { return };
        let mut is_used = false;
        for TargetId(index) in targets {
            let Some(target) = self.targets.get_mut(*index).filter(|target| target.watched) else { continue };
            is_used = true;
            if target.detection.is_some_and(|known| known != detection) {
                value.error(format!("a second outlierDetection for {}", quoted(&target.name)), "write it on one route");
            }
            target.detection = Some(detection);
        }
        if !is_used {
            value.warning("nobody looks at its hosts", "write it where a fault is injected: its guard does");
        }
    }

    fn route(&mut self, index: usize, fields: &mut Fields<'_>) -> Option<Route> {
        let name = match fields.optional("name") {
            Some(value) => value.text().filter(|name| {
                if name.len() > 128 {
                    value.unfit("expected at most 128 bytes");
                }
                name.len() <= 128
            })?,
            None => &format!("route-{index}"),
        };
        let matches = fields.optional("match").and_then(|value| value.array()).unwrap_or_default();
        let matches: Vec<RequestMatch> =
            matches.iter().filter_map(|entry| RequestMatch::read(entry, &mut self.header_names)).collect();
        let split = Split::read(fields, &self.steering, &mut self.header_names).map(Arc::new);
        let slo = fields.optional("slo").and_then(|value| Slo::read(&value)).unwrap_or_default();
        let fault = fields.optional("fault").and_then(|value| {
            let destinations = split.iter().flat_map(|split| &split.destinations);
            let around = RouteContext {
                route: name,
                destinations: destinations.map(|(destination, _)| destination.label()).collect(),
                slo: &slo,
                state_prefix: format!("{}fault/{}/", self.state_prefix, label(name)),
                header_names: &mut self.header_names,
            };
            FaultPolicy::read(&value, around).map(Arc::new)
        });
        let limits = fields.optional("rateLimits").map(|value| {
            let earlier = self.routes.iter().filter_map(|route| route.limits.as_deref());
            let first = earlier.flat_map(RateLimits::rates).count();
            ratelimit::read(&value, first, &self.state_prefix, &label(name), &mut self.header_names)
        });
        let breaker = fields
            .optional("circuitBreaker")
            .and_then(|value| BreakerPolicy::read(&value, &self.state_prefix, &label(name)))
            .map(Arc::new);
        for field in [
            "mirror",
            "mirrors",
            "mirrorPercentage",
            "rewrite",
            "retries",
            "timeout",
            "redirect",
            "directResponse",
            "corsPolicy",
            "headers",
            "delegate",
        ] {
            fields.refuse(field, "keep it in the VirtualService, on the route that matches the steering header");
        }
        let targets = self.targets(name, split.as_deref(), fault.as_deref());
        if let Some(admin) = fault.as_ref().and_then(|fault| fault.guard.admin.as_ref()) {
            let known = targets.iter().filter_map(|target| self.targets.get(target.0)?.admin.as_ref());
            if known.into_iter().any(|known| known.cluster != admin.cluster) {
                fields
                    .value()
                    .error("a second way to ask about one destination's hosts", "write one guard.admin.cluster");
            }
        }
        if limits.as_ref().is_some_and(RateLimits::reads_subset) && split.is_none() {
            fields.value().error("a limit by subset, and no destinations", "write the route's destinations");
        }
        Some(Route {
            name: name.into(),
            matches,
            split,
            targets,
            fault,
            limits: limits.filter(|limits| !limits.is_empty()).map(Arc::new),
            breaker,
            slo,
        })
    }

    /// The rollout that `route` shares with an earlier one, where one of the two has to have it for itself.
    fn shared_rollout<'r>(&self, route: &'r Route) -> Option<&'r str> {
        let canary = route.canary()?;
        let others = self.routes.iter().filter_map(Route::canary).filter(|other| other.rollout == canary.rollout);
        let shares = |other: &Canary| other.is_exclusive() || canary.is_exclusive();
        others.into_iter().any(shares).then_some(&*canary.rollout)
    }

    fn targets(&mut self, route: &str, split: Option<&Split>, fault: Option<&FaultPolicy>) -> Vec<TargetId> {
        let names: Vec<String> = match split {
            Some(split) => split
                .destinations
                .iter()
                .map(|(destination, _)| match &*destination.subset {
                    "" => destination.host.to_string(),
                    subset => format!("{}.{subset}", destination.host),
                })
                .collect(),
            None => vec![format!("route.{route}")],
        };
        names.into_iter().map(|name| self.target(&name, fault)).collect()
    }

    fn target(&mut self, name: &str, fault: Option<&FaultPolicy>) -> TargetId {
        let found = self.targets.iter().position(|target| &*target.name == name);
        let index = found.unwrap_or_else(|| {
            self.targets.push(Target {
                name: name.into(),
                watched: false,
                latency_thresholds: Vec::new(),
                detection: None,
                admin: None,
            });
            self.targets.len() - 1
        });
        if let (Some(target), Some(fault)) = (self.targets.get_mut(index), fault) {
            target.watched = true;
            if let Some(admin) = &fault.guard.admin {
                let known = target.admin.get_or_insert_with(|| admin.clone());
                known.interval = known.interval.min(admin.interval);
            }
            let thresholds = &mut target.latency_thresholds;
            thresholds.extend(fault.guard.latency_p95.filter(|threshold| !thresholds.contains(threshold)));
        }
        TargetId(index)
    }
}

/// `name` with everything that would break up a metric's name or a key replaced.
pub fn label(name: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    name.chars().map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Vec<String> {
        match Policy::from_json(text.as_bytes(), &|_| None) {
            Ok((_, warnings)) => warnings.iter().map(ToString::to_string).collect(),
            Err(diagnostics) => diagnostics.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn the_smallest_policy() {
        assert_eq!(told(r#"{"apiVersion": "trimtab/v1alpha1", "name": "a"}"#), [] as [&str; 0]);
    }

    #[test]
    fn all_errors_are_told_at_once() {
        let told = told(
            r#"{"apiVersion": "v1", "name": "A", "routes": [
                {"route": [{"destination": {"host": "h", "subset": "a"}, "weight": 50},
                           {"destination": {"host": "h", "subset": "b"}, "weight": 40}],
                 "canary": {"destination": "c", "rollout": "r"}, "timeout": "5s"},
                {"name": "route-0", "canary": {}, "fualt": {}}]}"#,
        );
        let expected = [
            "error: /apiVersion: found \"v1\"; expected one of trimtab/v1alpha1",
            "error: /name: found \"A\"; expected 1 to 63 of a-z, 0-9 and -",
            "error: /routes/0/route: the weights sum to 90; write weights that sum to 100",
            "error: /routes/0/canary/destination: \"c\" is no subset of this route; expected one of a, b",
            "error: /routes/0/timeout: timeout cannot be honoured here; keep it in the VirtualService, on the route that \
             matches the steering header",
            "error: /routes/1/canary: canary without route; write the destinations that it chooses between",
            "error: /routes/1/fualt: unknown field \"fualt\"; did you mean fault?",
            "error: /routes/1: a second route called \"route-0\"; give each route its own name",
            "warning: /routes/1: \"route-0\" matches every request before this route is reached; put the route without \
             match last",
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_rollout_with_a_cap_belongs_to_one_route() {
        let route = |name: &str, more: &str| {
            format!(
                r#"{{"name": "{name}", "match": [{{"uri": {{"exact": "/{name}"}}}}],
                    "route": [{{"destination": {{"host": "h", "subset": "v1"}}, "weight": 95}},
                              {{"destination": {{"host": "h", "subset": "v2"}}, "weight": 5}}],
                    "canary": {{"destination": "v2", "rollout": "r"{more}}}}}"#
            )
        };
        let of = |routes: [String; 2]| {
            format!(r#"{{"apiVersion": "trimtab/v1alpha1", "name": "a", "routes": [{}]}}"#, routes.join(", "))
        };
        assert_eq!(told(&of([route("a", ""), route("b", "")])), [] as [&str; 0], "one cohort on two routes");
        let expected = "error: /routes/1: a second route with the rollout \"r\"; give each its own: its cap and its \
                        verdict are kept under its name";
        assert_eq!(told(&of([route("a", r#", "maxRequests": 5"#), route("b", "")])), [expected]);
        assert_eq!(told(&of([route("a", ""), route("b", r#", "maxRequests": 5"#)])), [expected]);
    }

    #[test]
    fn targets_are_known_once() {
        let (policy, _) = Policy::from_json(
            br#"{"apiVersion": "trimtab/v1alpha1", "name": "a", "routes": [
                {"name": "x", "match": [{"headers": {"x": {}}}], "route": [{"destination": {"host": "h", "subset": "v2"}}]},
                {"name": "y", "match": [{"headers": {"y": {}}}], "fault": {"abort": {"percentage": {"value": 1}, "httpStatus": 500}}},
                {"name": "z", "route": [{"destination": {"host": "h", "subset": "v1"}, "weight": 90},
                                        {"destination": {"host": "h", "subset": "v2"}, "weight": 10}]}]}"#,
            &|_| None,
        )
        .unwrap();
        let names: Vec<_> = policy.targets.iter().map(|target| (&*target.name, target.watched)).collect();
        assert_eq!(names, [("h.v2", false), ("route.y", true), ("h.v1", false)]);
        assert_eq!(policy.routes[2].targets, [TargetId(2), TargetId(0)]);
    }
}
