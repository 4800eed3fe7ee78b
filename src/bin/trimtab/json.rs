//! JSON text to a [`Tree`].
//!
//! YAML's reader would do for most JSON, but not for all of it (an escaped surrogate pair, for one), and the module
//! reads JSON. So `serde_json` judges the text and decodes its scalars, as in the module; what is left to do here is to
//! walk over text that is known to be valid, and to keep count of the lines.

use crate::finding::Finding;
use crate::tree::{Entry, Kind, Position, Tree};
use std::rc::Rc;
use trimtab::document::Node;

/// Reads one JSON value.
pub(crate) fn read(text: &str) -> Result<Tree, Finding> {
    if let Err(error) = serde_json::from_str::<Node>(text) {
        let place = format!(" at line {} column {}", error.line(), error.column());
        let message = error.to_string().replace(&place, "");
        let at = in_characters(text, error.line(), error.column());
        return Err(Finding::error(at, "", format!("not valid JSON: {message}"), "write one JSON object"));
    }
    let mut walk = Walk { rest: text, at: Position::START };
    walk.value().ok_or_else(|| Finding::error(walk.at, "", "not valid JSON", "write one JSON object"))
}

/// `serde_json` counts columns in bytes.
fn in_characters(text: &str, line: usize, column: usize) -> Position {
    let written = text.split('\n').nth(line.saturating_sub(1)).unwrap_or_default();
    let characters = written.char_indices().take_while(|(byte, _)| *byte < column).count();
    Position { line: line.max(1), column: characters.max(1) }
}

struct Walk<'t> {
    rest: &'t str,
    at: Position,
}

impl<'t> Walk<'t> {
    fn value(&mut self) -> Option<Tree> {
        self.skip_space();
        let at = self.at;
        let kind = match self.rest.bytes().next()? {
            b'{' => Kind::Object(self.items(|walk| {
                let at = walk.at;
                let Node::String(key) = walk.scalar()? else { return None };
                walk.skip_space();
                walk.take(1)?;
                Some(Entry { key, at, value: Rc::new(walk.value()?) })
            })?),
            b'[' => Kind::Array(self.items(|walk| walk.value().map(Rc::new))?),
            _ => Kind::Scalar(self.scalar()?),
        };
        Some(Tree::new(at, kind))
    }

    /// The items between a pair of brackets, each read by `item`.
    fn items<T>(&mut self, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let mut items = Vec::new();
        self.take(1)?;
        loop {
            self.skip_space();
            match self.rest.bytes().next()? {
                b'}' | b']' => {
                    self.take(1)?;
                    return Some(items);
                }
                b',' => {
                    self.take(1)?;
                }
                _ => items.push(item(self)?),
            }
        }
    }

    fn scalar(&mut self) -> Option<Node> {
        let length = if self.rest.starts_with('"') {
            let mut escaped = false;
            let end = self.rest.bytes().skip(1).position(|byte| {
                let closes = byte == b'"' && !escaped;
                escaped = byte == b'\\' && !escaped;
                closes
            })?;
            end + 2
        } else {
            let ends = |c: char| matches!(c, ',' | '}' | ']') || c.is_ascii_whitespace();
            self.rest.find(ends).unwrap_or(self.rest.len())
        };
        serde_json::from_str(self.take(length)?).ok()
    }

    fn skip_space(&mut self) {
        let space = self.rest.len() - self.rest.trim_ascii_start().len();
        self.take(space);
    }

    /// Moves on by `length` bytes and returns them.
    fn take(&mut self, length: usize) -> Option<&'t str> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        for c in taken.chars() {
            if c == '\n' {
                self.at = Position { line: self.at.line + 1, column: 1 };
            } else {
                self.at.column += 1;
            }
        }
        self.rest = rest;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_are_read_as_the_module_reads_them_and_places_are_kept() {
        let text = "{\"é\": [1, -2.5e3, true, null],\n \"a/b\": \"\\ud83d\\ude00\\\"\\\\\", \"a/b\" : {}}";
        let tree = read(text).unwrap();
        assert_eq!(tree.to_node(), Node::from_json(text.as_bytes()).unwrap());
        assert_eq!(tree.position("/é/1"), Position { line: 1, column: 11 });
        assert_eq!(tree.position("/a~1b"), Position { line: 2, column: 2 });
    }

    #[test]
    fn an_error_has_its_place() {
        let finding = read("{\"é\": [1,\n  2,,]}").unwrap_err();
        assert_eq!(finding.line("a"), "a:2:5: error: document: not valid JSON: expected value; write one JSON object");
        assert!(read(r#""\ud83d""#).is_err());
        assert!(read(&"[".repeat(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn agrees_with_the_module_on_everything(text in r#"([\[\]{},: \n0-9.eE"\\utrfalsn-]|"a":|é){0,40}"#) {
            match (read(&text), serde_json::from_str::<Node>(&text)) {
                (Ok(tree), Ok(node)) => prop_assert_eq!(tree.to_node(), node),
                (Err(_), Err(_)) => {}
                (ours, theirs) => prop_assert!(false, "{:?} {:?}", ours, theirs),
            }
        }
    }
}
