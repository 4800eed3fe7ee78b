//! A document with the place of everything in it.
//!
//! The core reads a plain [`Node`] and reports by JSON Pointer. People want a line, so YAML and JSON are read into this
//! tree first; it yields the node for the core, and afterwards the place of every pointer that the core names.

use std::rc::Rc;
use trimtab::document::Node;

/// The deepest that a document may nest: what the module's JSON reader takes.
pub(crate) const MAX_DEPTH: usize = 127;

/// A place in a text. Both count from 1; columns are characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    pub(crate) line: usize,
    pub(crate) column: usize,
}

impl Position {
    pub(crate) const START: Position = Position { line: 1, column: 1 };
}

/// A value and where it is written. Children are shared, so that an alias costs nothing until it is written out.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) at: Position,
    pub(crate) kind: Kind,
    /// How many values there are in it, itself included, with every alias written out.
    pub(crate) size: usize,
    /// How deep it nests: 0 for a scalar.
    pub(crate) depth: usize,
}

#[derive(Debug)]
pub(crate) enum Kind {
    Scalar(Node),
    Array(Vec<Rc<Tree>>),
    Object(Vec<Entry>),
}

/// A field of an object and where its key is written.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) at: Position,
    pub(crate) value: Rc<Tree>,
}

impl Tree {
    pub(crate) fn new(at: Position, kind: Kind) -> Tree {
        let children = || -> Box<dyn Iterator<Item = &Rc<Tree>>> {
            match &kind {
                Kind::Scalar(_) => Box::new(std::iter::empty()),
                Kind::Array(items) => Box::new(items.iter()),
                Kind::Object(entries) => Box::new(entries.iter().map(|entry| &entry.value)),
            }
        };
        let size = children().fold(1, |size: usize, child| size.saturating_add(child.size));
        let is_scalar = matches!(kind, Kind::Scalar(_));
        let depth = if is_scalar { 0 } else { 1 + children().map(|child| child.depth).max().unwrap_or(0) };
        Tree { at, kind, size, depth }
    }

    /// The field `key` of an object.
    pub(crate) fn get(&self, key: &str) -> Option<&Rc<Tree>> {
        match &self.kind {
            Kind::Object(entries) => entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value),
            _ => None,
        }
    }

    /// The text of a string.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar(Node::String(text)) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(self.kind, Kind::Scalar(Node::Null))
    }

    /// The tree as the core reads it.
    pub(crate) fn to_node(&self) -> Node {
        match &self.kind {
            Kind::Scalar(node) => node.clone(),
            Kind::Array(items) => Node::Array(items.iter().map(|item| item.to_node()).collect()),
            Kind::Object(entries) => {
                Node::Object(entries.iter().map(|entry| (entry.key.clone(), entry.value.to_node())).collect())
            }
        }
    }

    /// Where the value at `pointer` is written: its key in an object, itself in a list. A pointer that leads out of the
    /// tree stands where it left.
    pub(crate) fn position(&self, pointer: &str) -> Position {
        let mut at = self.at;
        let mut tree = self;
        for segment in pointer.split('/').skip(1) {
            let segment = segment.replace("~1", "/").replace("~0", "~");
            let next = match &tree.kind {
                Kind::Scalar(_) => None,
                Kind::Array(items) => {
                    segment.parse::<usize>().ok().and_then(|index| items.get(index)).map(|item| (item.at, item))
                }
                Kind::Object(entries) => {
                    entries.iter().find(|entry| entry.key == segment).map(|entry| (entry.at, &entry.value))
                }
            };
            let Some((found, child)) = next else { break };
            at = found;
            tree = child;
        }
        at
    }
}

/// `segment` as a part of a JSON Pointer (RFC 6901, section 3).
pub(crate) fn escape_segment(segment: &str) -> String {
    segment.replace('~', "~0").replace('/', "~1")
}
