//! YAML text to [`Tree`]s, one for each document.
//!
//! The tree is built from the parser's events: a loader of finished values would have thrown away what has to be
//! told, such as the line of a key that is written twice. What another reader of the same file would take differently
//! (the API server reads YAML 1.1, this is YAML 1.2) is a warning; what it would not take at all is an error.

use crate::finding::Finding;
use crate::tree::{Entry, Kind, MAX_DEPTH, Position, Tree, escape_segment};
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Tag};
use std::borrow::Cow;
use std::collections::HashMap;
use std::rc::Rc;
use trimtab::document::{Node, quoted};

/// How many values all aliases of a file may stand for: a few lines of them can stand for more than there is memory.
const MAX_ALIASED: usize = 100_000;

/// One document of a file, and what is wrong with its YAML.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) root: Rc<Tree>,
    pub(crate) findings: Vec<Finding>,
}

/// Reads all documents, up to an error that leaves no way to go on.
pub(crate) fn read(text: &str) -> (Vec<Document>, Option<Finding>) {
    let mut builder = Builder::default();
    let mut parser = Parser::new_from_str(text);
    while let Some(event) = parser.next_event() {
        let step = match event {
            Ok((event, span)) => builder.event(event, position(&span.start)),
            Err(error) => Err(syntax_error(&error)),
        };
        if let Err(finding) = step {
            return (builder.documents, Some(finding));
        }
    }
    (builder.documents, None)
}

fn position(marker: &Marker) -> Position {
    Position { line: marker.line().max(1), column: marker.col() + 1 }
}

fn syntax_error(error: &ScanError) -> Finding {
    let at = position(error.marker());
    if error.info().contains("recursion limit") {
        return too_deep(at);
    }
    let help = if error.info().contains("tabs") { "indent with spaces" } else { "" };
    Finding::error(at, "", format!("not valid YAML: {}", error.info()), help)
}

fn too_deep(at: Position) -> Finding {
    Finding::error(at, "", format!("nests more than {MAX_DEPTH} levels deep"), "write less")
}

#[derive(Default)]
struct Builder {
    documents: Vec<Document>,
    findings: Vec<Finding>,
    /// The collections that are not closed yet, outermost first.
    open: Vec<Open>,
    root: Option<Rc<Tree>>,
    anchors: HashMap<usize, Rc<Tree>>,
    aliased: usize,
}

/// A collection that is being read.
struct Open {
    at: Position,
    anchor: usize,
    body: Body,
}

enum Body {
    Array(Vec<Rc<Tree>>),
    Object {
        entries: Vec<Entry>,
        seen: HashMap<String, Position>,
        /// The key whose value comes next.
        key: Option<Key>,
    },
}

struct Key {
    text: String,
    at: Position,
    /// False where the key was refused: its value is read and dropped. One that is no string has no text.
    kept: bool,
}

impl Builder {
    fn event(&mut self, event: Event<'_>, at: Position) -> Result<(), Finding> {
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd => {}
            Event::DocumentStart(_) => self.anchors.clear(),
            Event::DocumentEnd => {
                if let Some(root) = self.root.take() {
                    self.documents.push(Document { root, findings: std::mem::take(&mut self.findings) });
                }
            }
            Event::Scalar(text, style, anchor, tag) => self.scalar(text, style, anchor, tag.as_deref(), at),
            Event::SequenceStart(anchor, tag) => {
                self.collection_tag(tag.as_deref(), "seq", at);
                self.start(at, anchor, Body::Array(Vec::new()))?;
            }
            Event::MappingStart(anchor, tag) => {
                self.collection_tag(tag.as_deref(), "map", at);
                self.start(at, anchor, Body::Object { entries: Vec::new(), seen: HashMap::new(), key: None })?;
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(),
            Event::Alias(anchor) => self.alias(anchor, at)?,
        }
        Ok(())
    }

    fn start(&mut self, at: Position, anchor: usize, body: Body) -> Result<(), Finding> {
        if self.open.len() == MAX_DEPTH {
            return Err(too_deep(at));
        }
        self.open.push(Open { at, anchor, body });
        Ok(())
    }

    fn end(&mut self) {
        let Some(Open { at, anchor, body }) = self.open.pop() else { return };
        let kind = match body {
            Body::Array(items) => Kind::Array(items),
            Body::Object { entries, .. } => Kind::Object(entries),
        };
        self.place(Rc::new(Tree::new(at, kind)), anchor, at);
    }

    fn alias(&mut self, anchor: usize, at: Position) -> Result<(), Finding> {
        let Some(tree) = self.anchors.get(&anchor).cloned() else {
            let help = "write the value out";
            return Err(Finding::error(at, &self.pointer(), "an alias inside the value that it stands for", help));
        };
        self.aliased = self.aliased.saturating_add(tree.size);
        if self.aliased > MAX_ALIASED {
            let found = format!("the aliases stand for more than {MAX_ALIASED} values");
            return Err(Finding::error(at, &self.pointer(), found, "write fewer aliases"));
        }
        if self.open.len() + tree.depth > MAX_DEPTH {
            return Err(too_deep(at));
        }
        self.place(tree, 0, at);
        Ok(())
    }

    fn scalar(&mut self, text: Cow<'_, str>, style: ScalarStyle, anchor: usize, tag: Option<&Tag>, at: Position) {
        let is_string = match tag {
            None => style != ScalarStyle::Plain,
            Some(tag) if tag.suffix == "!" || tag.is_yaml_core_schema() && tag.suffix == "str" => true,
            Some(tag) => {
                self.refuse_tag(tag, at);
                true
            }
        };
        if !is_string {
            if self.expects_key() && text == "<<" {
                let help = "write its fields out, since not every reader of YAML merges";
                self.findings.push(Finding::error(at, &self.pointer(), "a merge key", help));
                self.key("<<", at, false);
                return;
            }
            if let Some(trap) = trap(&text) {
                let pointer = self.pointer();
                self.findings.push(Finding::warning(at, &pointer, trap, format!("write {}", quoted(&text))));
            }
        }
        let node = if is_string { Node::String(text.into_owned()) } else { resolve(&text) };
        self.place(Rc::new(Tree::new(at, Kind::Scalar(node))), anchor, at);
    }

    fn collection_tag(&mut self, tag: Option<&Tag>, own: &str, at: Position) {
        if let Some(tag) = tag
            && !(tag.is_yaml_core_schema() && tag.suffix == own)
        {
            self.refuse_tag(tag, at);
        }
    }

    fn refuse_tag(&mut self, tag: &Tag, at: Position) {
        let found = format!("the tag {}", quoted(&tag.to_string()));
        self.findings.push(Finding::error(at, &self.pointer(), found, "write the value without it"));
    }

    fn expects_key(&self) -> bool {
        matches!(self.open.last(), Some(Open { body: Body::Object { key: None, .. }, .. }))
    }

    /// Puts a value that is complete where it belongs; `at` is where it, or the alias for it, is written.
    fn place(&mut self, tree: Rc<Tree>, anchor: usize, at: Position) {
        if anchor > 0 {
            self.anchors.insert(anchor, Rc::clone(&tree));
        }
        if self.expects_key() {
            match &tree.kind {
                Kind::Scalar(Node::String(text)) => self.key(text, at, true),
                kind => {
                    let found = match kind {
                        Kind::Scalar(Node::Null) => "an empty key",
                        Kind::Scalar(Node::Bool(_)) => "a key that is a boolean",
                        Kind::Scalar(_) => "a key that is a number",
                        Kind::Array(_) => "a key that is a list",
                        Kind::Object(_) => "a key that is an object",
                    };
                    self.findings.push(Finding::error(at, &self.pointer(), found, "write a string, in quotes"));
                    self.key("", at, false);
                }
            }
            return;
        }
        match self.open.last_mut().map(|open| &mut open.body) {
            None => self.root = Some(tree),
            Some(Body::Array(items)) => items.push(tree),
            Some(Body::Object { entries, key, .. }) => {
                if let Some(Key { text, at, kept: true }) = key.take() {
                    entries.push(Entry { key: text, at, value: tree });
                }
            }
        }
    }

    /// Takes a key; one that was written before is refused, and the first stays.
    fn key(&mut self, text: &str, at: Position, kept: bool) {
        let pointer = self.pointer();
        let Some(Open { body: Body::Object { seen, key, .. }, .. }) = self.open.last_mut() else { return };
        let first = if kept { seen.get(text).copied() } else { None };
        *key = Some(Key { text: text.to_owned(), at, kept: kept && first.is_none() });
        match first {
            Some(first) => {
                let found = format!("{} is written twice, first in line {}", quoted(text), first.line);
                self.findings.push(Finding::error(at, &pointer, found, "keep one"));
            }
            None => {
                seen.insert(text.to_owned(), at);
            }
        }
    }

    /// A JSON Pointer to what is being read.
    fn pointer(&self) -> String {
        let mut pointer = String::new();
        for open in &self.open {
            match &open.body {
                Body::Array(items) => pointer.push_str(&format!("/{}", items.len())),
                Body::Object { key: Some(key), .. } if key.kept || !key.text.is_empty() => {
                    pointer.push_str(&format!("/{}", escape_segment(&key.text)))
                }
                Body::Object { .. } => {}
            }
        }
        pointer
    }
}

/// What a plain scalar is in YAML 1.2's core schema (section 10.3.2). Infinity and "not a number" stay text: JSON has
/// no such numbers.
fn resolve(text: &str) -> Node {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Node::Null,
        "true" | "True" | "TRUE" => return Node::Bool(true),
        "false" | "False" | "FALSE" => return Node::Bool(false),
        _ => {}
    }
    let radix = |digits: &str, radix| {
        let digits = Some(digits).filter(|digits| !digits.starts_with(['+', '-']))?;
        u64::from_str_radix(digits, radix).ok().map(|value| value as f64)
    };
    let number = match text.get(..2) {
        Some("0o") => text.get(2..).and_then(|digits| radix(digits, 8)),
        Some("0x") => text.get(2..).and_then(|digits| radix(digits, 16)),
        _ if text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte)) => text.parse::<f64>().ok(),
        _ => None,
    };
    match number.filter(|number| number.is_finite()) {
        Some(number) => Node::Number(number),
        None => Node::String(text.to_owned()),
    }
}

/// What a reader of YAML 1.1 makes of a plain scalar, where that is something else.
fn trap(text: &str) -> Option<String> {
    const BOOLEANS: [&str; 6] = ["y", "n", "yes", "no", "on", "off"];
    // Written yes, Yes or YES, and no other way.
    let is_word = |word: &str| {
        let rest_is_small = text.chars().skip(1).all(|c| c.is_ascii_lowercase());
        word.eq_ignore_ascii_case(text) && (rest_is_small || text.chars().all(|c| c.is_ascii_uppercase()))
    };
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let what = if BOOLEANS.iter().any(|word| is_word(word)) {
        "a boolean"
    } else if digits.len() > 1 && digits.bytes().all(|byte| (b'0'..=b'7').contains(&byte)) && digits.starts_with('0') {
        "an octal number"
    } else if digits.contains('_')
        && digits.starts_with(|c: char| c.is_ascii_digit())
        && digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_')
    {
        "a number"
    } else {
        return None;
    };
    Some(format!("{text} without quotes is {what} to readers of YAML 1.1, kubectl among them"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn told(text: &str) -> Vec<String> {
        let (documents, fatal) = read(text);
        let findings = documents.into_iter().flat_map(|document| document.findings).chain(fatal);
        findings.map(|finding| finding.line("f")).collect()
    }

    #[test]
    fn scalars_are_those_of_the_core_schema() {
        for (text, node) in [
            ("", Node::Null),
            ("~", Node::Null),
            ("True", Node::Bool(true)),
            ("12", Node::Number(12.0)),
            ("-0.5e1", Node::Number(-5.0)),
            ("0x1F", Node::Number(31.0)),
            ("0o17", Node::Number(15.0)),
            ("5.", Node::Number(5.0)),
        ] {
            assert_eq!(resolve(text), node, "{text}");
        }
        for text in ["on", "yes", "1_000", ".inf", ".nan", "1e999", "0x", "0x+1", "+", ".", "e", "5%", "250ms", "1-2"] {
            assert_eq!(resolve(text), Node::String(text.into()));
        }
    }

    #[test]
    fn what_yaml_allows_and_a_policy_does_not_is_told_with_its_line() {
        assert_eq!(
            told("a: 1\nb: {c: 1, c: 2}\na: 2\n1: x\n? [x]\n: off\nd: !foo x\n"),
            [
                "f:2:11: error: /b: \"c\" is written twice, first in line 2; keep one",
                "f:3:1: error: document: \"a\" is written twice, first in line 1; keep one",
                "f:4:1: error: document: a key that is a number; write a string, in quotes",
                "f:5:3: error: document: a key that is a list; write a string, in quotes",
                "f:6:3: warning: document: off without quotes is a boolean to readers of YAML 1.1, kubectl among them; \
                 write \"off\"",
                "f:7:4: error: /d: the tag \"!foo\"; write the value without it",
            ]
        );
    }

    #[test]
    fn aliases_are_resolved_and_merge_keys_are_not() {
        let (documents, fatal) = read("a: &x {c: 1}\nb: [*x, *x]\n");
        assert!(fatal.is_none());
        let expected = Node::from_json(br#"{"a": {"c": 1}, "b": [{"c": 1}, {"c": 1}]}"#).unwrap();
        assert_eq!(documents[0].root.to_node(), expected);
        assert!(told("a: &x {c: 1}\nb:\n  <<: *x\n")[0].starts_with("f:3:3: error: /b: a merge key"));
        assert!(told("a: &x [*x]\n")[0].contains("inside the value that it stands for"));
    }

    #[test]
    fn neither_depth_nor_laughter_is_unbounded() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..30 {
            bomb += &format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(", "));
        }
        assert!(told(&bomb)[0].contains("the aliases stand for more than"));
        let mut chain = "- &a0 []\n".to_owned();
        for n in 1..200 {
            chain += &format!("- &a{n} [*a{}]\n", n - 1);
        }
        for deep in ["[".repeat(100_000), "{a: ".repeat(100_000), "- ".repeat(100_000), "? ".repeat(100_000), chain] {
            assert!(told(&deep)[0].contains("levels deep"));
        }
    }

    #[test]
    fn what_yaml_1_1_reads_otherwise_is_a_warning() {
        let told = told("a: on\nb: 'on'\nno: 010\nc: 08\nd: oN\ne: 2026_11\nf: v_1\n");
        assert_eq!(told.len(), 4, "{told:#?}");
        assert_eq!(
            told[0],
            "f:1:4: warning: /a: on without quotes is a boolean to readers of YAML 1.1, kubectl among them; write \"on\""
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in r"([ \n\t:?\-,{}\[\]&*!|>'%@`#a-c0-9<~]|é|\PC|- |: |&a |\*a |!!str ){0,60}") {
            let (documents, _) = read(&text);
            for document in documents {
                let _ = document.root.to_node();
            }
        }
    }
}
