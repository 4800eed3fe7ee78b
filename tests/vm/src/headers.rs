//! Header maps, and their form on the wire between host and guest.

use std::fmt;

/// An ordered multimap of headers. Names are lower case; values are bytes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, Vec<u8>)>);

impl Headers {
    /// Copies pairs of anything that is bytes.
    pub fn new<N: AsRef<[u8]>, V: AsRef<[u8]>>(pairs: &[(N, V)]) -> Self {
        Self(pairs.iter().map(|(name, value)| (lower(name.as_ref()), value.as_ref().to_vec())).collect())
    }

    /// The first value of a name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.all(name).next()
    }

    /// The first value of a name, as text.
    ///
    /// # Panics
    /// When the value is not UTF-8.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).map(|value| std::str::from_utf8(value).expect("the header's value is text"))
    }

    /// Every value of a name, in order.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.iter().filter(move |(found, _)| *found == name).map(|(_, value)| value)
    }

    /// All pairs, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_slice()))
    }

    /// The number of pairs.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a value. As in Envoy's map, pseudo-headers stay in front.
    pub(crate) fn add(&mut self, name: &[u8], value: impl Into<Vec<u8>>) {
        let name = lower(name);
        let at = if name.starts_with(':') {
            self.0.iter().position(|(name, _)| !name.starts_with(':')).unwrap_or(self.len())
        } else {
            self.len()
        };
        self.0.insert(at, (name, value.into()));
    }

    /// Puts one value in the place of all values of its name.
    pub(crate) fn replace(&mut self, name: &[u8], value: impl Into<Vec<u8>>) {
        self.remove(name);
        self.add(name, value);
    }

    pub(crate) fn remove(&mut self, name: &[u8]) {
        let name = lower(name);
        self.0.retain(|(found, _)| *found != name);
    }

    pub(crate) fn first(&self, name: &[u8]) -> Option<&[u8]> {
        self.get(&lower(name))
    }

    /// Names and values together, as Envoy counts the size of a map.
    pub(crate) fn byte_size(&self) -> usize {
        self.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// The ABI's form: a count, all the lengths, then all the strings, each
    /// with a zero after it. A map without pairs is no bytes at all.
    pub(crate) fn serialise(&self) -> Vec<u8> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut bytes = length(self.len()).to_vec();
        for (name, value) in self.iter() {
            bytes.extend_from_slice(&length(name.len()));
            bytes.extend_from_slice(&length(value.len()));
        }
        for (name, value) in self.iter() {
            for part in [name.as_bytes(), value] {
                bytes.extend_from_slice(part);
                bytes.push(0);
            }
        }
        bytes
    }

    /// Reads the ABI's form. As in Envoy, what is malformed has no pairs.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        Self::try_parse(bytes).unwrap_or_default()
    }

    fn try_parse(bytes: &[u8]) -> Option<Self> {
        let (count, rest) = number(bytes)?;
        let (mut lengths, mut strings) = rest.split_at_checked(count.checked_mul(8)?)?;
        let mut headers = Self::default();
        let mut string = |length: usize| {
            let (string, rest) = strings.split_at_checked(length)?;
            strings = rest.strip_prefix(&[0])?;
            Some(string)
        };
        while !lengths.is_empty() {
            let (name, rest) = number(lengths)?;
            let (value, rest) = number(rest)?;
            headers.0.push((lower(string(name)?), string(value)?.to_vec()));
            lengths = rest;
        }
        strings.is_empty().then_some(headers)
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|(name, value)| format!("{name}: {}", value.escape_ascii()))).finish()
    }
}

fn lower(name: &[u8]) -> String {
    String::from_utf8_lossy(name).to_ascii_lowercase()
}

fn length(length: usize) -> [u8; 4] {
    u32::try_from(length).expect("a header map is far below 4 GiB").to_le_bytes()
}

fn number(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*number) as usize, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_form_is_the_abis() {
        let headers = Headers::new(&[("a", "xyz"), ("bc", "")]);
        let bytes = b"\x02\0\0\0\x01\0\0\0\x03\0\0\0\x02\0\0\0\0\0\0\0a\0xyz\0bc\0\0";
        assert_eq!(headers.serialise(), bytes);
        assert_eq!(Headers::parse(bytes), headers);
        assert_eq!(Headers::parse(&[]), Headers::default());
        assert_eq!(Headers::parse(&[0; 4]), Headers::default());
    }

    #[test]
    fn what_is_malformed_has_no_pairs() {
        let bytes = Headers::new(&[("a", "xyz"), ("bc", "")]).serialise();
        for end in 0..bytes.len() {
            assert!(Headers::parse(&bytes[..end]).is_empty(), "cut at {end}");
        }
        assert!(Headers::parse(&[bytes, vec![0]].concat()).is_empty());
        assert!(Headers::parse(&[0xff; 64]).is_empty());
    }

    #[test]
    fn replace_leaves_one_value_and_pseudo_headers_stay_in_front() {
        let mut headers = Headers::new(&[(":path", "/"), ("a", "1"), ("b", "2"), ("a", "3")]);
        headers.replace(b"A", "4");
        headers.replace(b":path", "/new");
        headers.add(b":scheme", "https");
        assert_eq!(headers, Headers::new(&[(":path", "/new"), (":scheme", "https"), ("b", "2"), ("a", "4")]));
    }
}
