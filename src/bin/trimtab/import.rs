//! `trimtab import`: a first policy from an existing VirtualService and its DestinationRule.
//!
//! Matches, weights and faults of a route move into the policy. Fields that only the router or the cluster can honour stay
//! in their resource, and each of them is named. A field that would have another meaning in a policy is an error, and no
//! policy is written.

use crate::finding::{Finding, printable};
use crate::source::{Source, environment};
use crate::tree::{Kind, Tree, escape_segment};
use crate::{Outcome, WRONG};
use clap::Args;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::rc::Rc;
use trimtab::document::Node;
use trimtab::policy::{API_VERSION, Policy};

#[derive(Args)]
pub(crate) struct Import {
    /// Files with VirtualServices and DestinationRules; - is the standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// The conditions of a match that mean the same in a policy.
const CONDITIONS: [&str; 8] =
    ["uri", "scheme", "method", "authority", "headers", "withoutHeaders", "queryParams", "ignoreUriCase"];

/// What stays in a route of the VirtualService, and why.
const ROUTE_STAYS: [(&str, &str); 11] = [
    ("mirror", "the router copies requests"),
    ("mirrors", "the router copies requests"),
    ("mirrorPercentage", "the router copies requests"),
    ("rewrite", "the router rewrites, after the filter"),
    ("retries", "the router retries; each try takes the way that was chosen once"),
    ("timeout", "the router waits"),
    ("redirect", "the router answers"),
    ("directResponse", "the router answers"),
    ("corsPolicy", "Envoy's own filter answers"),
    ("headers", "the router changes headers"),
    ("delegate", "the other VirtualService's routes are not here"),
];

/// What stays elsewhere in a VirtualService.
const SERVICE_STAYS: [(&str, &str); 4] = [
    ("gateways", "the plugin's selector says where it runs"),
    ("exportTo", "it is about the resource"),
    ("tls", "not HTTP"),
    ("tcp", "not HTTP"),
];

/// One resource, and where it was found.
struct Resource {
    file: String,
    root: Rc<Tree>,
}

/// What there is to say.
#[derive(Default)]
struct Report {
    lines: Vec<String>,
    failed: bool,
}

impl Report {
    fn stays(&mut self, resource: &Resource, pointer: &str, why: &str) {
        self.note(resource, "stays with Istio", pointer, why);
    }

    fn moves(&mut self, resource: &Resource, pointer: &str, what: &str) {
        self.note(resource, "moves to the policy", pointer, what);
    }

    fn note(&mut self, resource: &Resource, note: &str, pointer: &str, why: &str) {
        let at = resource.root.position(pointer);
        let line = format!("{}:{}:{}: {note}: {pointer}: {why}", resource.file, at.line, at.column);
        self.lines.push(printable(&line));
    }

    fn error(&mut self, resource: &Resource, pointer: &str, found: &str, help: &str) {
        let finding = Finding::error(resource.root.position(pointer), pointer, found, help);
        self.lines.push(finding.line(&resource.file));
        self.failed = true;
    }

    fn warning(&mut self, resource: &Resource, pointer: &str, found: &str, help: &str) {
        let finding = Finding::warning(resource.root.position(pointer), pointer, found, help);
        self.lines.push(finding.line(&resource.file));
    }
}

impl Import {
    pub(crate) fn run(&self) -> Outcome {
        let mut outcome = Outcome::default();
        let (mut services, mut rules) = (Vec::new(), Vec::new());
        for path in &self.files {
            let source = Source::named(path.clone());
            let (trees, findings) = match source.trees() {
                Ok(read) => read,
                Err(error) => {
                    outcome.complain(&format!("{}: {error}", source.name()));
                    continue;
                }
            };
            for finding in findings {
                outcome.stderr += &finding.line(&source.name());
                outcome.stderr.push('\n');
                outcome.code = outcome.code.max(WRONG);
            }
            for root in trees {
                let resource = Resource { file: source.name(), root };
                match resource.root.get("kind").and_then(|kind| kind.text()) {
                    Some("VirtualService") => services.push(resource),
                    Some("DestinationRule") => rules.push(resource),
                    Some(kind) => {
                        outcome.stderr += &printable(&format!("{}: passed over {kind}", resource.file));
                        outcome.stderr.push('\n');
                    }
                    None => {}
                }
            }
        }
        if outcome.code > 0 {
            return outcome;
        }
        let [service] = services.as_slice() else {
            outcome.complain(&format!("{} VirtualServices; a policy is made of one", services.len()));
            return outcome;
        };
        let mut report = Report::default();
        let policy = import(service, &rules, &mut report);
        if !report.failed
            && let Err(diagnostics) = Policy::from_node(&policy, &environment)
        {
            for diagnostic in diagnostics {
                report.lines.push(printable(&format!("{}: the policy: {diagnostic}", service.file)));
            }
            report.failed = true;
        }
        for line in report.lines {
            outcome.stderr += &line;
            outcome.stderr.push('\n');
        }
        if report.failed {
            outcome.code = WRONG;
        } else {
            outcome.stdout = written(&policy);
        }
        outcome
    }
}

fn import(service: &Resource, rules: &[Resource], report: &mut Report) -> Node {
    let metadata = |key| service.root.get("metadata").and_then(|metadata| metadata.get(key)?.text().map(str::to_owned));
    let name = metadata("name").unwrap_or_else(|| "imported".into());
    let namespace = metadata("namespace").unwrap_or_else(|| "default".into());
    let empty = Rc::new(Tree::new(service.root.at, Kind::Object(Vec::new())));
    let spec = service.root.get("spec").unwrap_or(&empty);
    for (field, why) in SERVICE_STAYS {
        if spec.get(field).is_some() {
            report.stays(service, &format!("/spec/{field}"), why);
        }
    }
    let hosts = spec.get("hosts").map_or(&[][..], |hosts| items(hosts));
    let authority = authority(&hosts.iter().filter_map(|host| host.text()).collect::<Vec<_>>(), &namespace);
    let routes = spec.get("http").map_or(&[][..], |http| items(http));
    if routes.is_empty() {
        report.error(service, "/spec/http", "no HTTP route", "a policy is made of those");
    }
    let steering = steering(service, routes, report);
    let routes = routes.iter().enumerate().map(|(index, route)| {
        let pointer = format!("/spec/http/{index}");
        read_route(service, route, &pointer, authority.as_deref(), report)
    });
    let routes = Node::Array(routes.collect());
    for rule in rules {
        report_rule(rule, report);
    }
    for (host, subset) in missing_subsets(spec, rules) {
        report.warning(
            service,
            "/spec/http",
            &format!("no subset {subset} of {host} in a DestinationRule that was given"),
            "name the file that has it",
        );
    }
    let mut policy = vec![("apiVersion".into(), string(API_VERSION)), ("name".into(), string(&name))];
    if let Some(value) = steering {
        policy.push(("steering".into(), Node::Object(vec![("value".into(), string(value))])));
    }
    policy.push(("routes".into(), routes));
    Node::Object(policy)
}

/// The template of the steering header that tells the destinations of all routes apart, where it is not the default.
fn steering(service: &Resource, routes: &[Rc<Tree>], report: &mut Report) -> Option<&'static str> {
    let split = routes.iter().map(|route| destinations(route)).filter(|found| found.len() > 1);
    let (mut with, mut without) = (BTreeSet::new(), 0);
    for (host, subset) in split.flatten() {
        match subset {
            Some(subset) => {
                with.insert((host, subset));
            }
            None => without += 1,
        }
    }
    let subsets: BTreeSet<&String> = with.iter().map(|(_, subset)| subset).collect();
    match (with.len(), without) {
        (_, 0) if subsets.len() == with.len() => None,
        (_, 0) => Some("{host}.{subset}"),
        (0, _) => Some("{host}"),
        _ => {
            let help = "name a subset in each of them, so that one header can tell them apart";
            report.error(service, "/spec/http", "some destinations of a split have a subset, and some have none", help);
            None
        }
    }
}

/// Host and subset of each destination of a route.
fn destinations(route: &Tree) -> Vec<(String, Option<String>)> {
    let entries = route.get("route").map_or(&[][..], |route| items(route));
    let destinations = entries.iter().filter_map(|entry| entry.get("destination"));
    let text = |tree: &Tree, key| tree.get(key).and_then(|value| value.text()).map(str::to_owned);
    destinations.map(|tree| (text(tree, "host").unwrap_or_default(), text(tree, "subset"))).collect()
}

fn read_route(service: &Resource, route: &Tree, pointer: &str, authority: Option<&str>, report: &mut Report) -> Node {
    let mut fields = Vec::new();
    if let Some(name) = route.get("name") {
        fields.push(("name".into(), name.to_node()));
    }
    let entries = route.get("match").map_or(&[][..], |entries| items(entries));
    let mut matches = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        matches.push(read_match(service, entry, &format!("{pointer}/match/{index}"), authority, report));
    }
    if let (true, Some(authority)) = (matches.is_empty(), authority) {
        matches.push(Node::Object(vec![of_authority(authority)]));
    }
    if !matches.is_empty() {
        fields.push(("match".into(), Node::Array(matches)));
    }
    let found = destinations(route);
    match found.as_slice() {
        [] => {}
        [(_, None)] => report.stays(
            service,
            &format!("{pointer}/route"),
            "one destination without a subset is the router's default",
        ),
        _ => {
            let what = "match the steering header here, one route for each destination";
            report.moves(service, &format!("{pointer}/route"), what);
            fields.push(("route".into(), read_split(service, route, pointer, report)));
        }
    }
    if let Some(fault) = route.get("fault") {
        report.moves(service, &format!("{pointer}/fault"), "remove it here, or requests are faulted twice");
        fields.push(("fault".into(), fault.to_node()));
    }
    for (field, why) in ROUTE_STAYS {
        if route.get(field).is_some() {
            report.stays(service, &format!("{pointer}/{field}"), why);
        }
    }
    Node::Object(fields)
}

fn read_match(service: &Resource, entry: &Tree, pointer: &str, authority: Option<&str>, report: &mut Report) -> Node {
    let Kind::Object(written) = &entry.kind else { return entry.to_node() };
    let mut conditions = Vec::new();
    for field in written {
        match field.key.as_str() {
            "name" | "statPrefix" => {}
            known if CONDITIONS.contains(&known) => conditions.push((field.key.clone(), field.value.to_node())),
            _ => {
                let help = "a filter does not see it: bind the plugin where it holds (selector, match.ports), and remove it here";
                let at = format!("{pointer}/{}", escape_segment(&field.key));
                report.error(service, &at, &format!("{} cannot be imported", field.key), help);
            }
        }
    }
    if let (None, Some(authority)) = (entry.get("authority"), authority) {
        conditions.push(of_authority(authority));
    }
    Node::Object(conditions)
}

/// The destinations with weights that sum to 100, as a policy has them; in Istio they are in proportion.
fn read_split(service: &Resource, route: &Tree, pointer: &str, report: &mut Report) -> Node {
    let entries = route.get("route").map_or(&[][..], |route| items(route));
    let weight = |entry: &Tree| match entry.get("weight").map(|weight| &weight.kind) {
        Some(Kind::Scalar(Node::Number(number))) => number.min(1e9) as u64,
        _ => 0,
    };
    let weights: Vec<u64> = entries.iter().map(|entry| weight(entry)).collect();
    let sum: u64 = weights.iter().sum();
    let alone = entries.len() == 1;
    if sum == 0 && !alone {
        let help = "write the weights, such as 90 and 10";
        report.error(service, &format!("{pointer}/route"), "several destinations without weights", help);
    } else if sum != 100 && !alone {
        let help = format!("the policy has {}", shares(&weights).iter().map(ppm).collect::<Vec<_>>().join(" and "));
        report.warning(service, &format!("{pointer}/route"), &format!("weights that sum to {sum}"), &help);
    }
    let shares = shares(&weights);
    let destinations = entries.iter().zip(shares).enumerate().map(|(index, (entry, share))| {
        if entry.get("headers").is_some() {
            report.stays(service, &format!("{pointer}/route/{index}/headers"), "the router changes headers");
        }
        let destination = entry.get("destination").map_or(Node::Null, |destination| destination.to_node());
        let mut fields = vec![("destination".to_owned(), destination)];
        if !alone {
            fields.push(("weight".into(), number(&ppm(&share))));
        }
        Node::Object(fields)
    });
    Node::Array(destinations.collect())
}

/// Weights in parts per million of their sum. What rounding leaves goes to the first that has any.
fn shares(weights: &[u64]) -> Vec<u64> {
    let sum: u64 = weights.iter().sum::<u64>().max(1);
    let mut shares: Vec<u64> = weights.iter().map(|weight| weight.saturating_mul(1_000_000) / sum).collect();
    let left = 1_000_000u64.saturating_sub(shares.iter().sum());
    if let Some(first) = shares.iter_mut().find(|share| **share > 0) {
        *first += left;
    }
    shares
}

/// `33.3333`, of 333,333 parts per million.
fn ppm(share: &u64) -> String {
    let (whole, part) = (share / 10_000, share % 10_000);
    if part == 0 { whole.to_string() } else { format!("{whole}.{part:04}").trim_end_matches('0').to_owned() }
}

/// Subsets that a route names and no DestinationRule has, where one was given for the host.
fn missing_subsets(spec: &Tree, rules: &[Resource]) -> BTreeSet<(String, String)> {
    let routes = spec.get("http").map_or(&[][..], |http| items(http));
    let named = routes.iter().flat_map(|route| destinations(route));
    let named = named.filter_map(|(host, subset)| Some((host, subset?)));
    let known: BTreeSet<(String, String)> = rules.iter().flat_map(subsets).collect();
    named.filter(|pair| !rules.is_empty() && !known.contains(pair)).collect()
}

fn subsets(rule: &Resource) -> Vec<(String, String)> {
    let spec = rule.root.get("spec");
    let host = spec.and_then(|spec| spec.get("host")?.text()).unwrap_or_default();
    let subsets = spec.and_then(|spec| spec.get("subsets")).map_or(&[][..], |subsets| items(subsets));
    let names = subsets.iter().filter_map(|subset| subset.get("name")?.text());
    names.map(|name| (host.to_owned(), name.to_owned())).collect()
}

fn report_rule(rule: &Resource, report: &mut Report) {
    let Some(spec) = rule.root.get("spec") else { return };
    if spec.get("subsets").is_some() {
        report.stays(rule, "/spec/subsets", "the labels say which hosts are a subset");
    }
    let mut policies = vec![("/spec/trafficPolicy".to_owned(), spec.get("trafficPolicy").cloned())];
    for (index, subset) in spec.get("subsets").map_or(&[][..], |subsets| items(subsets)).iter().enumerate() {
        policies.push((format!("/spec/subsets/{index}/trafficPolicy"), subset.get("trafficPolicy").cloned()));
    }
    for (pointer, policy) in policies {
        let Some(Kind::Object(fields)) = policy.as_ref().map(|policy| &policy.kind) else { continue };
        for field in fields {
            let why = match field.key.as_str() {
                "outlierDetection" => "Envoy ejects hosts; a guard keeps faults away meanwhile",
                "connectionPool" => "Envoy limits connections and requests",
                "loadBalancer" => "Envoy chooses the host",
                _ => "the cluster has it",
            };
            report.stays(rule, &format!("{pointer}/{}", escape_segment(&field.key)), why);
        }
    }
}

/// A regular expression of the authorities by which callers name the hosts; `None` for every host.
fn authority(hosts: &[&str], namespace: &str) -> Option<String> {
    if hosts.is_empty() || hosts.contains(&"*") {
        return None;
    }
    let escape = |text: &str| text.replace('.', r"\.");
    let one = |host: &&str| {
        if let Some(domain) = host.strip_prefix('*') {
            return format!(".+{}", escape(domain));
        }
        // A host of the cluster has a short name and longer ones.
        let local = host.strip_suffix(".svc.cluster.local").and_then(|rest| rest.split_once('.'));
        match (local, host.contains('.')) {
            (Some((service, namespace)), _) => {
                format!(r"{service}(\.{}(\.svc(\.cluster\.local)?)?)?", escape(namespace))
            }
            (None, false) => format!(r"{host}(\.{namespace}(\.svc(\.cluster\.local)?)?)?"),
            (None, true) => escape(host),
        }
    };
    let hosts: Vec<String> = hosts.iter().map(one).collect();
    let hosts = if hosts.len() == 1 { hosts.concat() } else { format!("({})", hosts.join("|")) };
    Some(format!(r"{hosts}(:\d+)?"))
}

fn of_authority(authority: &str) -> (String, Node) {
    ("authority".into(), Node::Object(vec![("regex".into(), string(authority))]))
}

fn items(tree: &Tree) -> &[Rc<Tree>] {
    match &tree.kind {
        Kind::Array(items) => items,
        _ => &[],
    }
}

fn string(text: &str) -> Node {
    Node::String(text.into())
}

fn number(text: &str) -> Node {
    text.parse().map_or(Node::Null, Node::Number)
}

/// A document as YAML, in the manner of the examples.
fn written(document: &Node) -> String {
    let mut text = String::new();
    write_block(document, 0, &mut text);
    text
}

fn write_block(node: &Node, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match node {
        Node::Object(entries) => {
            for (key, value) in entries {
                text.push_str(&format!("{indent}{}:", scalar(&string(key))));
                write_value(value, depth, text);
            }
        }
        Node::Array(items) => {
            for item in items {
                let mut block = String::new();
                write_block(item, depth + 1, &mut block);
                // The first line of the item stands behind its dash.
                let begin = indent.len() + 2;
                text.push_str(&format!("{indent}- {}", block.get(begin..).unwrap_or_default()));
            }
        }
        scalar_node => text.push_str(&format!("{indent}{}\n", scalar(scalar_node))),
    }
}

fn write_value(value: &Node, depth: usize, text: &mut String) {
    match value {
        // A list of blocks stands under its key.
        Node::Array(items) if items.iter().any(|item| matches!(item, Node::Object(_))) => {
            text.push('\n');
            write_block(value, depth, text);
        }
        Node::Object(entries) if entries.iter().any(|(_, value)| matches!(value, Node::Array(_))) => {
            text.push('\n');
            write_block(value, depth + 1, text);
        }
        _ => text.push_str(&format!(" {}\n", scalar(value))),
    }
}

/// A value on one line.
fn scalar(node: &Node) -> String {
    match node {
        Node::String(text) if is_plain(text) => text.to_string(),
        Node::String(text) if !text.contains(|c: char| c == '\'' || c.is_control()) => format!("'{text}'"),
        Node::String(text) => serde_json::to_string(text).unwrap_or_default(),
        Node::Null => "null".into(),
        Node::Bool(value) => value.to_string(),
        Node::Number(value) => value.to_string(),
        Node::Array(items) => format!("[{}]", items.iter().map(scalar).collect::<Vec<_>>().join(", ")),
        Node::Object(entries) => {
            let entry = |(key, value): &(String, Node)| format!("{}: {}", scalar(&string(key)), scalar(value));
            format!("{{{}}}", entries.iter().map(entry).collect::<Vec<_>>().join(", "))
        }
    }
}

/// Whether YAML reads `text` as that string without quotes, in a flow too.
fn is_plain(text: &str) -> bool {
    let may_begin = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
    let is_word =
        ["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&text.to_ascii_lowercase().as_str());
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    may_begin && !is_word && text.chars().all(fits)
}
