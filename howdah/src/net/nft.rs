//! The host's packet filter: one table of this cloudlet's, replaced whole.

use std::{
    fmt::Write,
    io::Write as _,
    net::Ipv4Addr,
    process::{Command, Stdio},
};

use super::{
    book::Network,
    plan::now_s,
    publish::Published,
    ways::{self, Way},
};
use crate::{
    failure::{Exit, Failure},
    home::Home,
};

/// What packets are to meet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) networks: Vec<Network>,
    /// Ports of the host, and whose they are.
    pub(crate) published: Vec<(Published, Ipv4Addr)>,
    /// Ways of guests that moved.
    pub(super) ways: Vec<Way>,
}

impl Rules {
    /// Whether the host needs none of it.
    pub(crate) fn is_empty(&self) -> bool {
        let nat = self.networks.iter().any(|network| network.nat);
        self.published.is_empty() && self.ways.is_empty() && !nat
    }

    /// The table of the cloudlet with this tag, as `nft -f` reads it. The kernel takes all of it or
    /// nothing.
    fn text(&self, tag: &str, now_s: u64) -> String {
        let table = format!("howdah_{tag}");
        let mut text = String::new();
        // Made, so that it is there to be removed.
        let _ = writeln!(text, "table ip {table} {{}}\ndelete table ip {table}");
        if self.is_empty() {
            return text;
        }
        let _ = writeln!(text, "table ip {table} {{");
        text += &ways::chains(&self.ways, tag, now_s);
        let elsewhere = ways::published(&self.ways);
        // Priorities as numbers: before translation of destinations, and of sources. Their names are not
        // known in every hook.
        for hook in ["prerouting", "output"] {
            let _ = writeln!(text, "  chain {hook} {{\n    type nat hook {hook} priority -100;");
            for (Published { host, guest, protocol }, address) in
                self.published.iter().chain(&elsewhere)
            {
                let _ = writeln!(
                    text,
                    "    fib daddr type local ip daddr != 127.0.0.0/8 {protocol} dport {host} dnat to {address}:{guest}"
                );
            }
            let _ = writeln!(text, "  }}");
        }
        let _ =
            writeln!(text, "  chain postrouting {{\n    type nat hook postrouting priority 100;");
        text += &ways::translations(&self.ways, tag);
        for network in &self.networks {
            let (subnet, bridge) = (network.subnet, network.name.bridge());
            // A guest that speaks to its own host's published port, or to another guest's.
            let _ = writeln!(
                text,
                "    ip saddr {subnet} oifname \"{bridge}\" ct status dnat masquerade"
            );
            if network.nat {
                let _ = writeln!(
                    text,
                    "    ip saddr {subnet} ip daddr != {subnet} oifname != \"hw-*\" masquerade"
                );
            }
        }
        let _ = writeln!(text, "  }}\n}}");
        text
    }
}

/// Gives the kernel these rules in place of those that it had from here.
pub(super) fn load(home: &Home, rules: &Rules) -> Result<(), Failure> {
    match feed(&rules.text(&home.tag(), now_s())) {
        // Nothing to hold, and nobody to hold it.
        Err(NftError::Missing) if rules.is_empty() => Ok(()),
        Err(error) => {
            let way_out = match &error {
                NftError::Missing => {
                    "install it (`apt install nftables`), or do without --nat and --publish"
                }
                NftError::Refused(_) => "run it as root, on a kernel with nf_tables",
                NftError::Io(_) => "see why `nft` cannot be run",
            };
            Err(Failure::new(Exit::Host, "the host's packet filter", error, way_out))
        }
        Ok(()) => Ok(()),
    }
}

#[derive(Debug, thiserror::Error)]
enum NftError {
    #[error("there is no `nft` on this host")]
    Missing,
    #[error("`nft` says: {0}")]
    Refused(String),
    #[error("`nft` cannot be run: {0}")]
    Io(#[from] std::io::Error),
}

fn feed(text: &str) -> Result<(), NftError> {
    let started = Command::new("nft")
        .args(["-f", "-"])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(NftError::Missing),
        started => started?,
    };
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(NftError::Refused(said.lines().next().unwrap_or("nothing").to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_replaced_whole() {
        let rules = Rules {
            networks: vec![Network {
                name: "edge".parse().unwrap(),
                subnet: "10.77.0.0/24".parse().unwrap(),
                nat: true,
                forward_for_s: 600,
            }],
            published: vec![("8080:80".parse().unwrap(), Ipv4Addr::new(10, 77, 0, 5))],
            ways: Vec::new(),
        };
        let text = rules.text("x", 0);
        assert!(
            text.starts_with("table ip howdah_x {}\ndelete table ip howdah_x\ntable ip"),
            "{text}"
        );
        for rule in [
            "fib daddr type local ip daddr != 127.0.0.0/8 tcp dport 8080 dnat to 10.77.0.5:80",
            "ip saddr 10.77.0.0/24 ip daddr != 10.77.0.0/24 oifname != \"hw-*\" masquerade",
        ] {
            assert!(text.contains(rule), "{text}");
        }
        assert_eq!(text.matches('{').count(), text.matches('}').count());
        let none = Rules::default().text("x", 0);
        assert_eq!(none, "table ip howdah_x {}\ndelete table ip howdah_x\n");
    }
}
