//! A document as it was written, and how to read one strictly.
//!
//! A derived deserialiser stops at the first mistake and silently takes the last of two equal keys. Here the text
//! becomes a plain tree of [`Node`]s first; then each feature reads its own block through [`Value`] and [`Fields`],
//! which note every mistake in a [`Report`] and go on. The tree has no idea of JSON or YAML: the command-line program
//! fills it from YAML, the module from JSON, and both are read by the same code.
//!
//! The readers are not inlined: every feature reads its block through them, and the module pays for each copy.

use crate::decimal::Decimal;
use crate::diagnostic::{Diagnostic, Report, Severity};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::ops::RangeInclusive;

/// The largest document that is read, in bytes. Three thousand routes fit.
pub const MAX_DOCUMENT_BYTES: usize = 1 << 20;

/// The most entries of one object. Each is compared with those before it.
const MAX_ENTRIES: usize = 1024;

/// A node of a document.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    Null,
    Bool(bool),
    Number(f64),
    String(String),
    Array(Vec<Node>),
    /// In the order written, equal keys included, so that a reader can refuse them.
    Object(Vec<(String, Node)>),
}

impl Node {
    /// Parses JSON text.
    ///
    /// # Errors
    /// One diagnostic for text that is too long, is not JSON, or nests more than 127 levels deep.
    pub fn from_json(text: &[u8]) -> Result<Node, Diagnostic> {
        let refused = |found: String, help: &str| Diagnostic {
            severity: Severity::Error,
            pointer: String::new(),
            found,
            help: help.into(),
        };
        if text.len() > MAX_DOCUMENT_BYTES {
            let found = format!("{} bytes", text.len());
            return Err(refused(found, &format!("a document has at most {MAX_DOCUMENT_BYTES} bytes")));
        }
        if text.iter().all(u8::is_ascii_whitespace) {
            return Err(refused("no document".into(), "write a policy as the plugin's configuration"));
        }
        serde_json::from_slice(text).map_err(|error| {
            refused(
                format!("not valid JSON: {error}"),
                "write one JSON object; in Envoy, as a google.protobuf.StringValue",
            )
        })
    }

    fn kind(&self) -> &'static str {
        match self {
            Node::Null => "null",
            Node::Bool(_) => "a boolean",
            Node::Number(_) => "a number",
            Node::String(_) => "a string",
            Node::Array(_) => "a list",
            Node::Object(_) => "an object",
        }
    }

    fn shown(&self) -> String {
        match self {
            Node::Bool(value) => value.to_string(),
            Node::Number(value) => shown_number(*value),
            Node::String(value) => quoted(value),
            other => other.kind().to_owned(),
        }
    }
}

/// A number to four decimals: what a diagnostic needs.
fn shown_number(value: f64) -> String {
    const LARGEST: f64 = 1e14;
    if value.abs() >= LARGEST {
        return "a very large number".to_owned();
    }
    let sign = if value < 0.0 { "-" } else { "" };
    format!("{sign}{}", Decimal((value.abs() * 10_000.0).round() as u64, 10_000))
}

/// `text` in quotes, cut where it is long: a diagnostic is one readable line.
pub fn quoted(text: &str) -> String {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        None => format!("{text:?}"),
        Some((cut, _)) => format!("{:?}...", text.get(..cut).unwrap_or_default()),
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        struct NodeVisitor;

        impl<'de> Visitor<'de> for NodeVisitor {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }
            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Bool(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Number(value as f64))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
                Ok(Node::Number(value as f64))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Number(value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Node, E> {
                Ok(Node::String(value.to_owned()))
            }
            fn visit_string<E>(self, value: String) -> Result<Node, E> {
                Ok(Node::String(value))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Node::Array(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Node::Object(entries))
            }
        }

        deserializer.deserialize_any(NodeVisitor)
    }
}

/// What a variable of the proxy's environment holds, by its name. A key has its place there, not in a document.
pub type Environment<'e> = &'e dyn Fn(&str) -> Option<Vec<u8>>;

/// A node, the document that it stands in, and where to report on it. Where it stands is searched for once there is
/// something to report: few values ever need it, and a value that brings it along costs at every step of every reader.
#[derive(Clone, Copy)]
pub struct Value<'a> {
    node: &'a Node,
    root: &'a Node,
    report: &'a Report,
}

impl<'a> Value<'a> {
    /// The whole document.
    pub fn root(node: &'a Node, report: &'a Report) -> Self {
        Value { node, root: node, report }
    }

    /// Notes an error: what was `found` here and what would do.
    #[inline(never)]
    pub fn error(&self, found: impl Into<String>, help: impl Into<String>) {
        self.note(Severity::Error, found.into(), help.into());
    }

    /// Notes a warning.
    pub fn warning(&self, found: impl Into<String>, help: impl Into<String>) {
        self.note(Severity::Warning, found.into(), help.into());
    }

    /// Notes that this value will not do, with its own text as what was found.
    pub fn unfit(&self, help: impl Into<String>) {
        self.error(format!("found {}", self.node.shown()), help);
    }

    fn note(&self, severity: Severity, found: String, help: String) {
        self.report.note(severity, || Diagnostic { severity, pointer: pointer(self.root, self.node), found, help });
    }

    fn expected<T>(&self, what: &str) -> Option<T> {
        self.unfit(format!("expected {what}"));
        None
    }

    /// The value's own text, where it is a string; notes nothing otherwise.
    pub fn as_string(&self) -> Option<&'a str> {
        match self.node {
            Node::String(text) => Some(text),
            _ => None,
        }
    }

    /// Whether the value is an object.
    pub fn is_object(&self) -> bool {
        matches!(self.node, Node::Object(_))
    }

    /// A string.
    #[inline(never)]
    pub fn string(&self) -> Option<&'a str> {
        match self.node {
            Node::String(text) => Some(text),
            // YAML takes true and 42 for what they look like.
            Node::Bool(_) | Node::Number(_) => self.expected(&format!("a string: write \"{}\"", self.node.shown())),
            _ => self.expected("a string"),
        }
    }

    /// A string that is not empty.
    #[inline(never)]
    pub fn text(&self) -> Option<&'a str> {
        self.string().filter(|text| {
            if text.is_empty() {
                self.unfit("expected text");
            }
            !text.is_empty()
        })
    }

    /// A name that is a label of metrics and a part of keys: 1 to 63 of a-z, 0-9 and -.
    #[inline(never)]
    pub fn name(&self) -> Option<&'a str> {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        self.string().filter(|name| {
            let is_name = (1..=63).contains(&name.len()) && name.bytes().all(fits);
            if !is_name {
                self.unfit("expected 1 to 63 of a-z, 0-9 and -");
            }
            is_name
        })
    }

    /// A boolean.
    pub fn bool(&self) -> Option<bool> {
        match self.node {
            Node::Bool(value) => Some(*value),
            _ => self.expected("true or false"),
        }
    }

    /// The value's own number, where it is one; notes nothing otherwise.
    pub fn as_number(&self) -> Option<f64> {
        match self.node {
            Node::Number(value) => Some(*value),
            _ => None,
        }
    }

    /// A whole number within `range`.
    #[inline(never)]
    pub fn integer(&self, range: RangeInclusive<u64>) -> Option<u64> {
        match self.node {
            Node::Number(value) if value.fract() == 0.0 && *value >= 0.0 && range.contains(&(*value as u64)) => {
                Some(*value as u64)
            }
            _ => self.expected(&format!("a whole number from {} to {}", range.start(), range.end())),
        }
    }

    /// One of a fixed set of words.
    pub fn one_of<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        let place = self.place_of(&|place| words.get(place).map(|(word, _)| *word))?;
        words.get(place).map(|(_, value)| *value)
    }

    /// The place of this word among `words`. Apart, because it is the same whatever the words stand for.
    #[inline(never)]
    fn place_of<'w>(&self, words: &dyn Fn(usize) -> Option<&'w str>) -> Option<usize> {
        let words = || (0..).map_while(words);
        let found = words().position(|word| self.as_string() == Some(word));
        found.or_else(|| self.expected(&format!("one of {}", listed(words()))))
    }

    /// The items of a list.
    #[inline(never)]
    pub fn array(&self) -> Option<Vec<Value<'a>>> {
        match self.node {
            Node::Array(items) => Some(items.iter().map(|node| self.child(node)).collect()),
            _ => self.expected("a list"),
        }
    }

    /// The entries of an object whose keys are the user's own, such as header names. Equal keys are an error.
    #[inline(never)]
    pub fn entries(&self) -> Option<Vec<(&'a str, Value<'a>)>> {
        Some(self.written()?.iter().map(|(key, node)| (key.as_str(), self.child(node))).collect())
    }

    fn written(&self) -> Option<&'a [(String, Node)]> {
        let Node::Object(entries) = self.node else { return self.expected("an object") };
        if entries.len() > MAX_ENTRIES {
            self.error(format!("{} entries", entries.len()), format!("an object has at most {MAX_ENTRIES}"));
            return None;
        }
        for (index, (key, _)) in entries.iter().enumerate() {
            if entries.iter().take(index).any(|(earlier, _)| earlier == key) {
                self.error(format!("{} is written twice", quoted(key)), "keep one");
            }
        }
        Some(entries)
    }

    /// The fields of an object whose keys are ours. Call [`Fields::end`] when all are read.
    #[inline(never)]
    pub fn object(&self) -> Option<Fields<'a>> {
        Some(Fields { value: *self, entries: self.written()?, known: Vec::new() })
    }

    fn child(&self, node: &'a Node) -> Value<'a> {
        Value { node, ..*self }
    }
}

/// The JSON Pointer of `node` in the document `root` (RFC 6901).
#[inline(never)]
fn pointer(root: &Node, node: &Node) -> String {
    /// Collects the segments of the pointer, the last first.
    fn find(at: &Node, node: &Node, segments: &mut Vec<String>) -> bool {
        if std::ptr::eq(at, node) {
            return true;
        }
        let segment = match at {
            Node::Array(items) => {
                items.iter().position(|item| find(item, node, segments)).map(|index| index.to_string())
            }
            Node::Object(entries) => {
                let entry = entries.iter().find(|(_, entry)| find(entry, node, segments));
                entry.map(|(key, _)| key.replace('~', "~0").replace('/', "~1"))
            }
            _ => None,
        };
        let is_within = segment.is_some();
        segments.extend(segment);
        is_within
    }
    let mut segments = Vec::new();
    find(root, node, &mut segments);
    segments.iter().rev().flat_map(|segment| ["/", segment]).collect()
}

/// The fields of one object: each is asked for by name, and what was never asked for is an error.
pub struct Fields<'a> {
    value: Value<'a>,
    entries: &'a [(String, Node)],
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The object itself, to report on.
    pub fn value(&self) -> &Value<'a> {
        &self.value
    }

    /// The field `name`, if written. `null` counts as not written.
    #[inline(never)]
    pub fn optional(&mut self, name: &'static str) -> Option<Value<'a>> {
        self.written(name).filter(|value| *value.node != Node::Null)
    }

    fn written(&mut self, name: &'static str) -> Option<Value<'a>> {
        self.known.push(name);
        let (_, node) = self.entries.iter().find(|(key, _)| key == name)?;
        Some(self.value.child(node))
    }

    /// The field `name`; its absence is an error.
    #[inline(never)]
    pub fn required(&mut self, name: &'static str) -> Option<Value<'a>> {
        let value = self.optional(name);
        if value.is_none() {
            self.value.error(format!("{name} is missing"), format!("write {name}"));
        }
        value
    }

    /// The whole number within `range` in the field `name`; `default` where none is written, or another.
    #[inline(never)]
    pub fn integer_or(&mut self, name: &'static str, range: RangeInclusive<u64>, default: u64) -> u64 {
        self.optional(name).and_then(|value| value.integer(range)).unwrap_or(default)
    }

    /// A field that exists where this block was copied from, and that cannot be honoured here.
    #[inline(never)]
    pub fn refuse(&mut self, name: &'static str, why: &str) {
        if let Some(value) = self.written(name) {
            value.error(format!("{name} cannot be honoured here"), why);
        }
    }

    /// A field of the policy document that this version does not implement.
    #[inline(never)]
    pub fn not_yet(&mut self, name: &'static str) {
        if let Some(value) = self.written(name) {
            value.error(format!("{name} is not yet supported"), "remove it");
        }
    }

    /// Reports every field that was not read.
    #[inline(never)]
    pub fn end(self) {
        for (key, node) in self.entries {
            if !self.known.contains(&&**key) {
                let help = match nearest(key, &self.known) {
                    Some(near) => format!("did you mean {near}?"),
                    None => format!("expected one of {}", listed(self.known.iter().copied())),
                };
                self.value.child(node).error(format!("unknown field {}", quoted(key)), help);
            }
        }
    }
}

fn listed<'w>(words: impl Iterator<Item = &'w str>) -> String {
    words.collect::<Vec<_>>().join(", ")
}

/// The known word that `word` was probably meant to be: at most two edits away.
fn nearest<'w>(word: &str, known: &[&'w str]) -> Option<&'w str> {
    known
        .iter()
        .map(|candidate| (edit_distance(word, candidate), *candidate))
        .filter(|(distance, candidate)| *distance <= 2 && *distance < candidate.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance, letter case aside.
fn edit_distance(a: &str, b: &str) -> usize {
    const LONGEST: usize = 40;
    if a.len() > LONGEST || b.len() > LONGEST {
        return LONGEST;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (above, y) in row.iter().skip(1).zip(b.bytes()) {
            let substituted = diagonal + usize::from(!x.eq_ignore_ascii_case(&y));
            left = substituted.min(left + 1).min(above + 1);
            diagonal = *above;
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, reader: impl Fn(Value<'_>)) -> Vec<String> {
        let node = Node::from_json(text.as_bytes()).unwrap();
        let report = Report::default();
        reader(Value::root(&node, &report));
        report.into_diagnostics().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_mistake_is_reported_with_its_pointer() {
        let told = read(r#"{"nmae": "a", "weight": -1, "a/b": 0, "weight": 2}"#, |value| {
            let mut fields = value.object().unwrap();
            fields.required("name");
            fields.optional("weight").and_then(|weight| weight.integer(0..=100));
            fields.end();
        });
        assert_eq!(
            told,
            [
                "error: document: \"weight\" is written twice; keep one",
                "error: document: name is missing; write name",
                "error: /weight: found -1; expected a whole number from 0 to 100",
                "error: /nmae: unknown field \"nmae\"; did you mean name?",
                "error: /a~1b: unknown field \"a/b\"; expected one of name, weight",
            ]
        );
    }

    #[test]
    fn what_is_not_json_too_long_or_too_deep_is_one_diagnostic() {
        assert!(Node::from_json(b"  ").unwrap_err().found.contains("no document"));
        assert!(Node::from_json(b"{").unwrap_err().found.contains("not valid JSON"));
        assert!(Node::from_json(&[b'['; 100_000]).unwrap_err().found.contains("recursion limit"));
        assert!(Node::from_json(&vec![b' '; 10 << 20]).unwrap_err().found.contains("10485760 bytes"));
        assert!(Node::from_json(b"\"\xff\"").unwrap_err().found.contains("not valid JSON"));
    }

    #[test]
    fn a_huge_object_is_refused_before_it_costs_anything() {
        let text = (0..=MAX_ENTRIES).map(|n| format!("\"k{n}\": 0")).collect::<Vec<_>>().join(", ");
        let told = read(&format!("{{{text}}}"), |value| assert!(value.object().is_none()));
        assert_eq!(told, ["error: document: 1025 entries; an object has at most 1024"]);
    }

    #[test]
    fn what_yaml_took_for_something_else_is_told() {
        let told = read("true", |value| assert!(value.string().is_none()));
        assert_eq!(told, ["error: document: found true; expected a string: write \"true\""]);
    }

    #[test]
    fn a_near_word_is_suggested_and_a_far_one_is_not() {
        assert_eq!(nearest("fixeddelay", &["fixedDelay", "percentage"]), Some("fixedDelay"));
        assert_eq!(nearest("banana", &["fixedDelay", "percentage"]), None);
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        assert_eq!(quoted(&"ä".repeat(61)), format!("{:?}...", "ä".repeat(60)));
    }
}
