//! Which route a request takes: the first that matches, found without asking each.
//!
//! Most matches name a path, exactly or by its prefix. Those paths are kept sorted, each with the longest other one that
//! it begins with. Of the paths at or before the request's own in that order, the last one begins with every path that
//! the request's begins with; so one binary search and a walk over ever shorter paths meets them all, and only their
//! matches, and those that name no path, are looked at.

use crate::bytes::{begins_with, compare};
use crate::http::Request;
use crate::matcher::{PathLiteral, RequestMatch};
use std::cmp::Ordering;

/// The matches of all routes, by path.
#[derive(Debug, Default)]
pub struct RouteTable {
    /// For each match, in the order of the document: its route, and its place among the route's matches; `None` for a
    /// route without any, which takes every request.
    entries: Vec<(usize, Option<usize>)>,
    paths: Vec<Path>,
    /// The entries that name no path, or one that is no literal.
    anywhere: Vec<usize>,
}

/// One path that is named, and the entries that name it. All lists of entries are in their order.
#[derive(Debug)]
struct Path {
    text: Box<[u8]>,
    head: u64,
    /// The longest other path that this one begins with.
    shorter: Option<usize>,
    exact: Vec<usize>,
    prefix: Vec<usize>,
}

impl RouteTable {
    /// The table of routes with these matches.
    pub fn new<'m>(routes: impl Iterator<Item = &'m [RequestMatch]>) -> RouteTable {
        let mut table = RouteTable::default();
        for (route, matches) in routes.enumerate() {
            if matches.is_empty() {
                table.anywhere.push(table.entries.len());
                table.entries.push((route, None));
            }
            for (place, found) in matches.iter().enumerate() {
                let entry = table.entries.len();
                table.entries.push((route, Some(place)));
                match found.path() {
                    Some(PathLiteral::Exact(text)) => table.path(text).exact.push(entry),
                    Some(PathLiteral::Prefix(text)) => table.path(text).prefix.push(entry),
                    None => table.anywhere.push(entry),
                }
            }
        }
        // In this order a path's prefixes precede it, so the ones still open are those it may begin with.
        let mut open: Vec<usize> = Vec::new();
        for index in 0..table.paths.len() {
            let (before, rest) = table.paths.split_at_mut(index);
            let Some(path) = rest.first_mut() else { break };
            let begins = |open: &usize| before.get(*open).is_some_and(|open| path.text.starts_with(&open.text));
            while open.last().is_some_and(|last| !begins(last)) {
                open.pop();
            }
            path.shorter = open.last().copied();
            open.push(index);
        }
        table
    }

    /// The entry of a path, new or known, in a list that stays sorted.
    fn path(&mut self, text: &[u8]) -> &mut Path {
        let place = match self.paths.binary_search_by(|path| (*path.text).cmp(text)) {
            Ok(place) => place,
            Err(place) => {
                let new =
                    Path { text: text.into(), head: head(text), shorter: None, exact: Vec::new(), prefix: Vec::new() };
                self.paths.insert(place, new);
                place
            }
        };
        #[expect(clippy::indexing_slicing, reason = "the place was found or filled just now")]
        &mut self.paths[place]
    }

    /// The first route that `request` matches; `matches` finds a route's.
    pub fn find<'m>(
        &self,
        request: &Request<'_>,
        matches: impl Fn(usize) -> Option<&'m [RequestMatch]>,
    ) -> Option<usize> {
        let mut first = usize::MAX;
        let mut look_at = |entries: &[usize]| {
            for entry in entries.iter().take_while(|entry| **entry < first) {
                let Some((route, place)) = self.entries.get(*entry) else { return };
                let found = place.and_then(|place| matches(*route)?.get(place));
                if found.is_none_or(|found| found.first_mismatch(request).is_none()) {
                    first = *entry;
                    return;
                }
            }
        };
        let target = request.path();
        let first_bytes = head(target);
        let is_before = |path: &Path| match path.head.cmp(&first_bytes) {
            Ordering::Equal => compare(&path.text, target).is_le(),
            order => order.is_lt(),
        };
        let after = self.paths.partition_point(is_before);
        let mut next = after.checked_sub(1);
        while let Some(path) = next.and_then(|index| self.paths.get(index)) {
            if begins_with(target, &path.text) {
                if target.len() == path.text.len() {
                    look_at(&path.exact);
                }
                look_at(&path.prefix);
            }
            next = path.shorter;
        }
        look_at(&self.anywhere);
        self.entries.get(first).map(|(route, _)| *route)
    }
}

/// The first eight bytes as a number that is ordered as they are, with zeros after the end of less: two that differ
/// order their texts, and most do.
fn head(text: &[u8]) -> u64 {
    match text.first_chunk() {
        Some(bytes) => u64::from_be_bytes(*bytes),
        None => {
            text.iter().zip([56, 48, 40, 32, 24, 16, 8]).fold(0, |head, (byte, place)| head | u64::from(*byte) << place)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostic::Report;
    use crate::document::{Node, Value};
    use crate::http::{HeaderNames, encode_headers};
    use proptest::prelude::*;

    proptest! {
        /// The table finds what asking every route in turn finds.
        #[test]
        fn finds_the_first_that_matches(
            routes in proptest::collection::vec(
                proptest::collection::vec((0..4_u8, "(a{7})?[ab/]{0,4}", any::<bool>()), 0..3),
                0..30,
            ),
            path in "(a{7})?[ab/]{0,6}",
            flagged in any::<bool>(),
        ) {
            let mut names = HeaderNames::default();
            let compiled: Vec<Vec<RequestMatch>> = routes.iter().map(|matches| {
                matches.iter().map(|(kind, path, flag)| {
                    let uri = match kind {
                        0 => format!(r#""uri": {{"exact": "{path}"}}"#),
                        1 => format!(r#""uri": {{"prefix": "{path}"}}"#),
                        2 => format!(r#""uri": {{"prefix": "{path}"}}, "ignoreUriCase": true"#),
                        _ => r#""method": {"exact": "GET"}"#.to_owned(),
                    };
                    let flag = if *flag { r#", "headers": {"x-flag": {}}"# } else { "" };
                    let node = Node::from_json(format!("{{{uri}{flag}}}").as_bytes()).unwrap();
                    RequestMatch::read(&Value::root(&node, &Report::default()), &mut names).unwrap()
                }).collect()
            }).collect();
            let mut headers = vec![(":path", path.as_str()), (":method", "GET")];
            if flagged {
                headers.push(("x-flag", ""));
            }
            let block = encode_headers(&headers);
            let request = Request::parse(&block, &names);
            let expected = compiled.iter().position(|matches| {
                matches.is_empty() || matches.iter().any(|found| found.first_mismatch(&request).is_none())
            });
            let table = RouteTable::new(compiled.iter().map(Vec::as_slice));
            prop_assert_eq!(table.find(&request, |route| compiled.get(route).map(Vec::as_slice)), expected);
        }
    }
}
