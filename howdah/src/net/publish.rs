//! Ports of the host that are a guest's.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A transport protocol that has ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One port of the host that leads to one of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Published {
    pub(crate) host: u16,
    pub(crate) guest: u16,
    pub(crate) protocol: Protocol,
}

impl FromStr for Published {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "HOST:GUEST or HOST:GUEST/udp, two ports from 1 to 65535, as in 8080:80".into();
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(wrong()),
        };
        let port = |text: &str| text.parse().ok().filter(|port: &u16| *port != 0);
        let both =
            ports.split_once(':').and_then(|(host, guest)| Some((port(host)?, port(guest)?)));
        let (host, guest) = both.ok_or_else(wrong)?;
        Ok(Self { host, guest, protocol })
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.guest, self.protocol)
    }
}

impl From<Published> for String {
    fn from(published: Published) -> Self {
        published.to_string()
    }
}

impl TryFrom<String> for Published {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_said_as_everywhere() {
        let dns = Published { host: 5353, guest: 53, protocol: Protocol::Udp };
        assert_eq!("5353:53/udp".parse(), Ok(dns));
        assert_eq!("8080:80".parse::<Published>().unwrap().to_string(), "8080:80/tcp");
        for text in ["80:80/tcp", "5353:53/udp"] {
            assert_eq!(text.parse::<Published>().unwrap().to_string(), text);
        }
        for wrong in ["", "80", "0:80", "80:0", "80:70000", "80:80/sctp", "a:b", "1:2:3"] {
            assert!(wrong.parse::<Published>().unwrap_err().contains("8080:80"), "{wrong}");
        }
    }
}
