//! IP addresses: read from text, cut to the network they are in, and written again in one spelling.

/// An address. One of IPv4 that is mapped into IPv6 (RFC 4291, section 2.5.5.2) is one of IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    V4(u32),
    V6(u128),
}

impl Address {
    /// Reads an address without a port; one of IPv6 may stand in brackets.
    pub fn parse(text: &[u8]) -> Option<Address> {
        let text = text.strip_prefix(b"[").and_then(|text| text.strip_suffix(b"]")).unwrap_or(text);
        if !text.contains(&b':') {
            return parse_v4(text).map(Address::V4);
        }
        let address = parse_v6(text)?;
        Some(if address >> 32 == 0xffff { Address::V4(address as u32) } else { Address::V6(address) })
    }

    /// The network that the address is in, as "192.0.2.0/24" or "2001:db8::/64"; the address itself where the prefix
    /// is as long as an address.
    pub fn network(self, v4_prefix: u32, v6_prefix: u32) -> String {
        let mut text = String::with_capacity(43);
        let (prefix, whole) = match self {
            Address::V4(address) => {
                let prefix = v4_prefix.min(32);
                let masked = address & u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
                let mut shift = 32;
                while shift > 0 {
                    shift -= 8;
                    text.push_str(&(masked >> shift & 0xff).to_string());
                    text.push_str(if shift > 0 { "." } else { "" });
                }
                (prefix, 32)
            }
            Address::V6(address) => {
                let prefix = v6_prefix.min(128);
                push_v6(&mut text, address & u128::MAX.checked_shl(128 - prefix).unwrap_or(0));
                (prefix, 128)
            }
        };
        if prefix < whole {
            text.push('/');
            text.push_str(&prefix.to_string());
        }
        text
    }
}

fn parse_v4(text: &[u8]) -> Option<u32> {
    let mut address = 0;
    let mut parts = 0;
    for part in text.split(|byte| *byte == b'.') {
        let leads_with_zero = part.len() > 1 && part.first() == Some(&b'0');
        if part.is_empty() || part.len() > 3 || leads_with_zero || parts == 4 {
            return None;
        }
        let number = part.iter().try_fold(0_u32, |number, digit| {
            digit.is_ascii_digit().then(|| number * 10 + u32::from(digit.wrapping_sub(b'0')))
        });
        address = address << 8 | number.filter(|number| *number <= 255)?;
        parts += 1;
    }
    (parts == 4).then_some(address)
}

fn parse_v6(text: &[u8]) -> Option<u128> {
    let Some(gap) = text.windows(2).position(|pair| pair == b"::") else {
        return parse_groups(text).and_then(|(address, groups)| (groups == 8).then_some(address));
    };
    let (head, head_groups) = parse_groups(text.get(..gap)?)?;
    let (tail, tail_groups) = parse_groups(text.get(gap + 2..)?)?;
    if head_groups + tail_groups > 7 {
        return None;
    }
    Some(head.checked_shl(128 - 16 * head_groups).unwrap_or(0) | tail)
}

/// Groups of hexadecimal digits, perhaps with an address of IPv4 in place of the last two; and how many there are.
fn parse_groups(text: &[u8]) -> Option<(u128, u32)> {
    let (mut address, mut groups, mut is_over) = (0_u128, 0, false);
    if text.is_empty() {
        return Some((0, 0));
    }
    for group in text.split(|byte| *byte == b':') {
        let (bits, number) = if group.contains(&b'.') {
            (32, parse_v4(group)?)
        } else if (1..=4).contains(&group.len()) {
            let digit = |byte: &u8| char::from(*byte).to_digit(16);
            (16, group.iter().try_fold(0, |number, byte| Some(number << 4 | digit(byte)?))?)
        } else {
            return None;
        };
        groups += bits / 16;
        if is_over || groups > 8 {
            return None;
        }
        is_over = bits == 32;
        address = address << bits | u128::from(number);
    }
    Some((address, groups))
}

/// Writes an address as RFC 5952 has it: lower case, no leading zeros, the first of the longest runs of zeros as "::".
fn push_v6(text: &mut String, address: u128) {
    let group = |index: u32| (address >> (112 - 16 * index)) as u16;
    let (mut gap, mut longest, mut run) = (8, 1, 0);
    for index in 0..8 {
        run = if group(index) == 0 { run + 1 } else { 0 };
        if run > longest {
            (gap, longest) = (index + 1 - run, run);
        }
    }
    let mut index = 0;
    while index < 8 {
        if index == gap {
            text.push_str("::");
            index += longest;
            continue;
        }
        if index > 0 && !text.ends_with(':') {
            text.push(':');
        }
        push_hex(text, group(index));
        index += 1;
    }
}

#[inline(never)]
fn push_hex(text: &mut String, number: u16) {
    let mut places = if number == 0 { 1 } else { 4 - number.leading_zeros() / 4 };
    while places > 0 {
        places -= 1;
        text.extend(char::from_digit(u32::from(number) >> (4 * places) & 0xf, 16));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn networks() {
        for (text, v4, v6, network) in [
            ("192.0.2.77", 32, 128, "192.0.2.77"),
            ("192.0.2.77", 24, 128, "192.0.2.0/24"),
            ("192.0.2.77", 0, 128, "0.0.0.0/0"),
            ("::ffff:192.0.2.77", 24, 64, "192.0.2.0/24"),
            ("::FFFF:c000:24d", 32, 64, "192.0.2.77"),
            ("2001:db8:1:2:3:4:5:6", 32, 64, "2001:db8:1:2::/64"),
            ("[2001:DB8::1]", 32, 128, "2001:db8::1"),
            ("::", 32, 56, "::/56"),
            ("2001:db8::1", 32, 0, "::/0"),
            ("1:0:0:2::", 32, 128, "1:0:0:2::"),
        ] {
            let address = Address::parse(text.as_bytes()).unwrap_or_else(|| panic!("{text} is an address"));
            assert_eq!(address.network(v4, v6), network, "{text}");
        }
    }

    #[test]
    fn what_is_no_address() {
        for text in [
            "",
            "a",
            "1.2.3",
            "1.2.3.4.5",
            "1.2.3.256",
            "1.2.3.04",
            "1.2.3.4:80",
            "1.2.3.-4",
            ":",
            ":::",
            "1::2::3",
            "g::",
            "12345::",
            "1:2:3:4:5:6:7",
            "1:2:3:4:5:6:7:8:9",
            "::1.2.3.4:5",
            "[::1]:80",
            "unknown",
            "_hidden",
            "fe80::1%0",
        ] {
            assert_eq!(Address::parse(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_address_is_read_and_written_as_the_standard_library_does(
            number: u128, zeros in 0..128_u32, v4: u32, v6_prefix in 0..=128_u32
        ) {
            let number = number & !(u128::from(u64::MAX) << (zeros / 2));
            let v6 = Ipv6Addr::from_bits(number);
            let v4 = Ipv4Addr::from_bits(v4);
            prop_assert_eq!(Address::parse(v4.to_string().as_bytes()), Some(Address::V4(v4.to_bits())));
            prop_assert_eq!(Address::V4(v4.to_bits()).network(32, 128), v4.to_string());
            if v6.to_ipv4_mapped().is_none() {
                prop_assert_eq!(Address::parse(v6.to_string().as_bytes()), Some(Address::V6(number)));
            }
            // The standard library writes what may be an embedded address of IPv4 in dots.
            if number >> 48 != 0 {
                prop_assert_eq!(Address::V6(number).network(32, 128), v6.to_string());
            }
            let network = Address::V6(number).network(32, v6_prefix);
            let (network, _) = network.split_once('/').unwrap_or((&network, ""));
            prop_assert!(network.parse::<Ipv6Addr>().is_ok(), "{}", network);
        }

        #[test]
        fn whatever_is_taken_for_an_address_is_one(text in "[0-9a-f:.]{0,24}") {
            let known = text.parse::<std::net::IpAddr>().ok().map(|address| address.to_canonical());
            let found = Address::parse(text.as_bytes()).map(|address| match address {
                Address::V4(bits) => Ipv4Addr::from_bits(bits).into(),
                Address::V6(bits) => std::net::IpAddr::from(Ipv6Addr::from_bits(bits)),
            });
            prop_assert_eq!(found, known);
        }
    }
}
