//! From arguments to policies: which files there are, what is in them, and which part of it is a policy.
//!
//! A file that is named has to hold a policy. Below a directory anything may lie about: what never says `trimtab` is
//! passed over unread, and so are documents of other kinds.

use crate::finding::Finding;
use crate::tree::{Kind, Position, Tree};
use crate::{json, yaml};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use trimtab::diagnostic::MAX_DIAGNOSTICS;
use trimtab::document::{MAX_DOCUMENT_BYTES, Node};
use trimtab::policy::{API_VERSION, Policy};

/// A file to read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// `-` is the standard input.
    path: PathBuf,
    /// Whether it was named, and not found below a directory.
    named: bool,
}

/// What a file holds.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) policies: Vec<Candidate>,
    /// What is wrong with the file, the policies aside.
    pub(crate) findings: Vec<Finding>,
    /// Documents of other kinds, in words.
    pub(crate) skipped: Vec<String>,
}

/// A part of a document that is meant to be a policy.
#[derive(Debug)]
pub(crate) struct Candidate {
    root: Rc<Tree>,
    policy: Rc<Tree>,
    /// Where the policy stands in the document.
    pointer: String,
    /// What is wrong with the document as YAML.
    findings: Vec<Finding>,
}

impl Source {
    /// The files that `path` stands for, in order.
    pub(crate) fn find(path: &Path) -> io::Result<Vec<Source>> {
        if path.as_os_str() == "-" || !fs::metadata(path)?.is_dir() {
            return Ok(vec![Source { path: path.into(), named: true }]);
        }
        let mut found = Vec::new();
        below(path, &mut found)?;
        found.sort();
        Ok(found.into_iter().map(|path| Source { path, named: false }).collect())
    }

    pub(crate) fn name(&self) -> String {
        if self.path.as_os_str() == "-" { "<stdin>".into() } else { self.path.display().to_string() }
    }

    /// The file at `path`, as if it were named for a policy.
    pub(crate) fn named(path: PathBuf) -> Source {
        Source { path, named: true }
    }

    /// The documents of the file, whatever they are, and what is wrong with them as YAML or JSON.
    pub(crate) fn trees(&self) -> io::Result<(Vec<Rc<Tree>>, Vec<Finding>)> {
        let bytes = self.bytes()?;
        let text = match text(&bytes) {
            Ok(text) => text,
            Err(finding) => return Ok((Vec::new(), vec![finding])),
        };
        let (documents, fatal) = self.parse(text);
        let mut findings: Vec<Finding> = fatal.into_iter().collect();
        let mut trees = Vec::new();
        for document in documents {
            findings.extend(document.findings);
            trees.push(document.root);
        }
        Ok((trees, findings))
    }

    /// Reads the file. What is wrong with it is among the contents; an error is a file that cannot be read.
    pub(crate) fn read(&self) -> io::Result<Contents> {
        let bytes = self.bytes()?;
        if !self.named && !bytes.windows(7).any(|window| window.eq_ignore_ascii_case(b"trimtab")) {
            return Ok(Contents::default());
        }
        Ok(self.contents(&bytes))
    }

    /// The bytes of the file, one more than a document may have at most.
    fn bytes(&self) -> io::Result<Vec<u8>> {
        let limit = MAX_DOCUMENT_BYTES as u64 + 1;
        let mut bytes = Vec::new();
        if self.path.as_os_str() == "-" {
            io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
        } else {
            File::open(&self.path)?.take(limit).read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    }

    fn contents(&self, bytes: &[u8]) -> Contents {
        let mut contents = Contents::default();
        let text = match text(bytes) {
            Ok(text) => text,
            Err(finding) => {
                contents.findings.push(finding);
                return contents;
            }
        };
        let (documents, fatal) = self.parse(text);
        let mut is_blank = true;
        for yaml::Document { root, findings } in documents {
            let mut held = Vec::new();
            self.policies(&root, &root, "", &mut held, &mut contents);
            is_blank &= root.is_null();
            // What is wrong with the YAML of a document is told once, with the first of its policies.
            if let Some(first) = held.first_mut() {
                first.findings = findings;
            }
            contents.policies.append(&mut held);
        }
        contents.findings.extend(fatal);
        if self.named && contents.policies.is_empty() && contents.findings.is_empty() {
            let found = match contents.skipped.as_slice() {
                [] if is_blank => "no document".to_owned(),
                [] => "no policy".to_owned(),
                skipped => format!("no policy, only {}", skipped.join(", ")),
            };
            let help = "write a policy, or a WasmPlugin or TrafficExtension that carries one as pluginConfig";
            contents.findings.push(Finding::error(Position::START, "", found, help));
        }
        contents
    }

    fn parse(&self, text: &str) -> (Vec<yaml::Document>, Option<Finding>) {
        let is_json = self.path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        let may_be_json = text.trim_ascii_start().starts_with(['{', '[']);
        match (is_json || may_be_json).then(|| json::read(text)) {
            Some(Ok(root)) => (vec![yaml::Document { root: Rc::new(root), findings: Vec::new() }], None),
            Some(Err(finding)) if is_json => (Vec::new(), Some(finding)),
            _ => yaml::read(text),
        }
    }

    /// Finds the policies in `tree`, which stands at `pointer` of the document `root`.
    fn policies(
        &self,
        root: &Rc<Tree>,
        tree: &Rc<Tree>,
        pointer: &str,
        found: &mut Vec<Candidate>,
        contents: &mut Contents,
    ) {
        let mut add = |policy: &Rc<Tree>, pointer: String| {
            found.push(Candidate { root: Rc::clone(root), policy: Rc::clone(policy), pointer, findings: Vec::new() });
        };
        let text = |key| tree.get(key).and_then(|value| value.text());
        let (version, kind) = (text("apiVersion"), text("kind"));
        match kind {
            _ if is_ours(tree) => add(tree, pointer.to_owned()),
            Some("WasmPlugin" | "TrafficExtension")
                if version.is_some_and(|v| v.starts_with("extensions.istio.io/")) =>
            {
                match plugin_config(tree) {
                    Some((policy, within)) => add(policy, format!("{pointer}{within}")),
                    None if names_the_module(tree) => {
                        let at = root.position(&format!("{pointer}/spec"));
                        let help = "write the policy there, as an object";
                        let finding = Finding::error(at, &format!("{pointer}/spec"), "no pluginConfig", help);
                        contents.findings.push(finding);
                    }
                    None => contents.skipped.push(described(tree)),
                }
            }
            Some("List") => {
                if let Some(Tree { kind: Kind::Array(items), .. }) = tree.get("items").map(Rc::as_ref) {
                    for (index, item) in items.iter().enumerate() {
                        self.policies(root, item, &format!("{pointer}/items/{index}"), found, contents);
                    }
                }
            }
            Some(_) => contents.skipped.push(described(tree)),
            None if self.named && !tree.is_null() && pointer.is_empty() => add(tree, String::new()),
            None => {}
        }
    }
}

/// Collects the files below `folder` that may hold a policy. Hidden names are passed over, and so are links to folders,
/// which could lead in a circle.
fn below(folder: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            below(&path, found)?;
        } else if ["yaml", "yml", "json"].iter().any(|known| path.extension().is_some_and(|found| found == *known))
            && fs::metadata(&path).is_ok_and(|metadata| metadata.is_file())
        {
            found.push(path);
        }
    }
    Ok(())
}

/// `bytes` as the text of a document.
fn text(bytes: &[u8]) -> Result<&str, Finding> {
    if bytes.len() > MAX_DOCUMENT_BYTES {
        let found = format!("more than {MAX_DOCUMENT_BYTES} bytes");
        return Err(Finding::error(Position::START, "", found, "a document has at most that many"));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let lines: Vec<&[u8]> = before.split(|byte| *byte == b'\n').collect();
        let last = lines.last().map(|line| String::from_utf8_lossy(line)).unwrap_or_default();
        let at = Position { line: lines.len(), column: last.chars().count() + 1 };
        Finding::error(at, "", "bytes that are not UTF-8", "save the file as UTF-8 text")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(Finding::error(Position::START, "", "an empty file", "write a policy"));
    }
    Ok(text)
}

/// Whether `tree` says itself that it is a policy, of whatever version.
fn is_ours(tree: &Tree) -> bool {
    let family = API_VERSION.split('/').next().unwrap_or(API_VERSION);
    let version = tree.get("apiVersion").and_then(|version| version.text());
    version.and_then(|version| version.strip_prefix(family)).is_some_and(|rest| rest.starts_with('/'))
}

/// The policy in an Istio manifest. A configuration that does not say whose it is counts where the module is named.
fn plugin_config(manifest: &Tree) -> Option<(&Rc<Tree>, &'static str)> {
    let spec = manifest.get("spec")?;
    let config = match spec.get("pluginConfig") {
        Some(config) => (config, "/spec/pluginConfig"),
        None => (spec.get("wasm")?.get("pluginConfig")?, "/spec/wasm/pluginConfig"),
    };
    (is_ours(config.0) || names_the_module(manifest)).then_some(config)
}

/// Whether an Istio manifest loads this module, as far as names tell.
fn names_the_module(manifest: &Tree) -> bool {
    let spec = manifest.get("spec");
    let wasm = spec.and_then(|spec| spec.get("wasm"));
    let names = [spec, wasm].into_iter().flatten().flat_map(|part| [part.get("url"), part.get("pluginName")]);
    names.flatten().filter_map(|name| name.text()).any(|name| name.contains("trimtab"))
}

/// `VirtualService user-service`.
fn described(manifest: &Tree) -> String {
    let kind = manifest.get("kind").and_then(|kind| kind.text()).unwrap_or_default();
    let name = manifest.get("metadata").and_then(|metadata| metadata.get("name")).and_then(|name| name.text());
    match name {
        Some(name) => format!("{kind} {name}"),
        None => kind.to_owned(),
    }
}

impl Candidate {
    /// The policy, if it has no error, and everything there is to say, from top to bottom.
    pub(crate) fn judge(self) -> (Option<Policy>, Vec<Finding>) {
        let node = self.policy.to_node();
        let mut findings = self.findings;
        let (policy, diagnostics) = match Policy::from_node(&node, &environment) {
            Ok((policy, warnings)) => (Some(policy), warnings),
            Err(diagnostics) => (None, diagnostics),
        };
        let is_cut = diagnostics.len() > MAX_DIAGNOSTICS;
        findings.extend(diagnostics.into_iter().map(|mut diagnostic| {
            diagnostic.pointer.insert_str(0, &self.pointer);
            Finding { at: self.root.position(&diagnostic.pointer), diagnostic }
        }));
        let length = json_length(&node);
        if length > MAX_DOCUMENT_BYTES {
            let help = format!("a document has at most {MAX_DOCUMENT_BYTES} bytes");
            let at = self.root.position(&self.pointer);
            findings.push(Finding::error(at, &self.pointer, format!("{length} bytes, written as JSON"), help));
        }
        // "more errors are not shown" is the only diagnostic without help, and the last.
        findings.sort_by_key(|finding| (is_cut && finding.diagnostic.help.is_empty(), finding.at));
        let policy = policy.filter(|_| !findings.iter().any(Finding::is_error));
        (policy, findings)
    }
}

/// The environment that a policy names variables of. The proxy's is not known here, so what is not set here is taken to
/// be set there.
pub(crate) fn environment(name: &str) -> Option<Vec<u8>> {
    const STAND_IN: &[u8] = b"this stands in for a key of the proxy";
    Some(std::env::var(name).map_or(STAND_IN.to_vec(), String::into_bytes))
}

/// How long `node` is as compact JSON, which is what the module is given.
fn json_length(node: &Node) -> usize {
    let quoted = |text: &str| serde_json::to_string(text).map_or(0, |text| text.len());
    // Brackets and commas: one of each more than there are items, and two brackets where there is none.
    let listed = |items: usize| 2 + items.saturating_sub(1);
    match node {
        Node::Null => 4,
        Node::Bool(value) => value.to_string().len(),
        Node::Number(value) => value.to_string().len(),
        Node::String(text) => quoted(text),
        Node::Array(items) => listed(items.len()) + items.iter().map(json_length).sum::<usize>(),
        Node::Object(entries) => {
            let entry = |(key, value): &(String, Node)| quoted(key) + 1 + json_length(value);
            listed(entries.len()) + entries.iter().map(entry).sum::<usize>()
        }
    }
}

/// The sources that all `paths` stand for, each once, and what could not be looked at.
pub(crate) fn find_all(paths: &[impl AsRef<Path>]) -> (Vec<Source>, Vec<String>) {
    let mut sources: Vec<Source> = Vec::new();
    let mut failures = Vec::new();
    let mut known = BTreeSet::new();
    for path in paths.iter().map(AsRef::as_ref) {
        match Source::find(path) {
            Ok(found) if found.is_empty() => failures.push(format!("{}: no .yaml, .yml or .json file", path.display())),
            Ok(found) => sources.extend(found.into_iter().filter(|source| known.insert(source.path.clone()))),
            Err(error) => failures.push(format!("{}: {error}", path.display())),
        }
    }
    (sources, failures)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn contents(name: &str, bytes: &[u8]) -> Contents {
        Source { path: name.into(), named: true }.contents(bytes)
    }

    #[test]
    fn length_is_that_of_compact_json() {
        let text = r#"{"a":[1,2.5,"é\n\"",[],{}],"b":{"c":null,"d":true}}"#;
        assert_eq!(json_length(&Node::from_json(text.as_bytes()).unwrap()), text.len());
    }

    #[test]
    fn a_policy_that_only_grows_too_long_as_json_is_refused() {
        let text = format!("apiVersion: trimtab/v1alpha1\nname: a\nx: [{}]\n", "a,".repeat(400_000));
        let candidate = contents("a.yaml", text.as_bytes()).policies.remove(0);
        let (policy, findings) = candidate.judge();
        assert!(policy.is_none());
        assert!(findings.iter().any(|finding| finding.diagnostic.found.ends_with("bytes, written as JSON")));
    }

    #[test]
    fn a_list_of_manifests_is_opened() {
        let text = "kind: List\napiVersion: v1\nitems:\n- kind: Service\n- apiVersion: extensions.istio.io/v1alpha1\n  \
                    kind: WasmPlugin\n  spec: {pluginConfig: {apiVersion: trimtab/v1alpha1, name: B}}\n";
        let mut contents = contents("-", text.as_bytes());
        assert_eq!(contents.skipped, ["Service"]);
        let (_, findings) = contents.policies.remove(0).judge();
        assert_eq!(findings[0].diagnostic.pointer, "/items/1/spec/pluginConfig/name");
        assert_eq!(findings[0].at, Position { line: 7, column: 55 });
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_without_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            text in r"(apiVersion: trimtab/v1alpha1\nname: a\n)?(routes:\n)?([ \n:?\-,{}\[\]&*!|>'#a-c0-9<~]|- |: |&a |\*a |name|match|route|canary|fault){0,40}",
        ) {
            for (name, bytes) in [("a.yaml", bytes.as_slice()), ("a.json", &bytes), ("a.yaml", text.as_bytes()), ("a.json", text.as_bytes())] {
                let contents = contents(name, bytes);
                prop_assert!(!contents.policies.is_empty() || !contents.findings.is_empty());
                for candidate in contents.policies {
                    let (policy, findings) = candidate.judge();
                    prop_assert_eq!(policy.is_none(), findings.iter().any(Finding::is_error));
                }
            }
        }
    }
}
