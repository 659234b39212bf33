//! The addresses of a network.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use serde::{Deserialize, Serialize};

/// An IPv4 subnet whose first host is the cloudlet: on every cloudlet the same, so that a guest that
/// has moved finds its gateway where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Subnet {
    first: u32,
    prefix: u8,
}

impl Subnet {
    /// Room for a cloudlet and two guests, up to 16 bits of hosts.
    const PREFIXES: std::ops::RangeInclusive<u8> = 16..=29;

    /// Bits that tell the network.
    pub(crate) fn prefix(self) -> u8 {
        self.prefix
    }

    /// The cloudlet's own address.
    pub(crate) fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(self.first + 1)
    }

    fn size(self) -> u32 {
        1 << (32 - self.prefix)
    }

    /// Whether a guest may have this address.
    pub(crate) fn is_guests(self, address: Ipv4Addr) -> bool {
        let offset = u32::from(address).wrapping_sub(self.first);
        (2..self.size() - 1).contains(&offset)
    }

    /// An address for a guest of this name: the same one everywhere, unless it is taken.
    pub(crate) fn address_for(
        self,
        name: &str,
        taken: impl Fn(Ipv4Addr) -> bool,
    ) -> Option<Ipv4Addr> {
        let guests = self.size() - 3;
        let hash = blake3::hash(name.as_bytes());
        let [a, b, c, d, ..] = *hash.as_bytes();
        let begin = u32::from_le_bytes([a, b, c, d]) % guests;
        let after = (0..guests).map(|n| Ipv4Addr::from(self.first + 2 + (begin + n) % guests));
        let mut after = after;
        after.find(|address| !taken(*address))
    }

    /// The address of the bridge's own interface: of this subnet on every cloudlet the same, so that what
    /// a guest has noted of its gateway stays true.
    pub(crate) fn gateway_mac(self) -> [u8; 6] {
        let hash = blake3::hash(self.to_string().as_bytes());
        let [a, b, c, ..] = *hash.as_bytes();
        [0x02, 0x68, 0x77, a, b, c]
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.first), self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (least, most) = (Self::PREFIXES.start(), Self::PREFIXES.end());
        let wrong = || format!("an IPv4 subnet of {least} to {most} bits, as in 10.77.0.0/24");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().ok().filter(|prefix| Self::PREFIXES.contains(prefix));
        let subnet = Self { first: address.into(), prefix: prefix.ok_or_else(wrong)? };
        if subnet.first & (subnet.size() - 1) != 0 {
            let right = Self { first: subnet.first & !(subnet.size() - 1), ..subnet };
            return Err(format!("a subnet begins at its first address: {right}"));
        }
        if !address.is_private() && address.octets()[..2] != [198, 18] {
            return Err(format!("a private subnet, as in 10.77.0.0/24; {text} is other people's"));
        }
        Ok(subnet)
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_guest_gets_an_address_until_there_are_no_more() {
        let subnet: Subnet = "10.77.0.0/28".parse().unwrap();
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 77, 0, 1));
        let mut taken = BTreeSet::new();
        for n in 0..13 {
            let address = subnet.address_for(&format!("vm{n}"), |a| taken.contains(&a)).unwrap();
            assert!(subnet.is_guests(address) && taken.insert(address), "{address}");
        }
        assert_eq!(subnet.address_for("one more", |a| taken.contains(&a)), None);
        let free = |_| false;
        assert_eq!(subnet.address_for("web", free), subnet.address_for("web", free));
        for not in ["10.77.0.0", "10.77.0.1", "10.77.0.15", "10.77.0.16", "10.76.255.255"] {
            assert!(!subnet.is_guests(not.parse().unwrap()), "{not}");
        }
    }

    #[test]
    fn subnets_are_said_as_everywhere() {
        for text in ["10.77.0.0/24", "192.168.4.0/29", "172.16.0.0/16"] {
            let subnet: Subnet = text.parse().unwrap();
            assert_eq!(subnet.to_string(), text);
            assert_eq!(subnet.gateway_mac()[0] & 3, 2, "local and of one");
        }
        for (wrong, says) in [
            ("10.77.0.0", "as in"),
            ("10.77.0.0/30", "16 to 29"),
            ("10.77.0.9/24", "10.77.0.0/24"),
            ("8.8.8.0/24", "private"),
            ("::/64", "IPv4"),
        ] {
            let said = wrong.parse::<Subnet>().unwrap_err();
            assert!(said.contains(says), "{wrong}: {said}");
        }
    }
}
