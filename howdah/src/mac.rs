//! A guest's MAC address.

use std::{fmt, str::FromStr};

/// A unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl Mac {
    /// An address made from a VM's name: the same on every run, locally administered.
    pub(crate) fn of(name: &str) -> Self {
        // FNV-1a: any stable spread of names over 40 bits will do.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        let [a, b, c, d, e, ..] = (hash ^ hash >> 40).to_le_bytes();
        Self([0x02, a, b, c, d, e])
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = s
            .split(':')
            .map(|part| {
                let two_digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
                if two_digits { u8::from_str_radix(part, 16).ok() } else { None }
            })
            .collect();
        match bytes.and_then(|b| <[u8; 6]>::try_from(b).ok()) {
            Some(mac) if mac[0] & 1 == 0 => Ok(Self(mac)),
            Some(_) => Err("a multicast address: the first byte must be even".into()),
            None => Err("a MAC address is six hex bytes, like 02:00:00:00:00:01".into()),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_prints_and_nothing_else() {
        let mac = Mac::of("vm1");
        assert_eq!(mac.to_string().parse::<Mac>().unwrap(), mac);
        assert_ne!(mac, Mac::of("vm2"));
        for bad in [
            "",
            "02:00",
            "02:00:00:00:00:zz",
            "01:00:00:00:00:00",
            "+2:00:00:00:00:00",
            "2:00:00:00:00:000",
        ] {
            bad.parse::<Mac>().unwrap_err();
        }
    }
}
