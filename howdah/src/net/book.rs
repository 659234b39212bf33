//! The networks of a cloudlet, in a file.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{publish::Published, subnet::Subnet};
use crate::{
    failure::{Exit, Failure},
    home::{Home, VmConfig, VmName, read_json, write_json},
};

const VERSION: u32 = 1;
/// More networks than this make no sense on one host.
const MAX_NETWORKS: usize = 64;
/// How long traffic follows a guest that left, if nothing else is said.
pub(crate) const FORWARD_FOR_S: u32 = 600;

fn forward_for_s() -> u32 {
    FORWARD_FOR_S
}

/// A network's name: part of an interface's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct NetworkName(String);

impl NetworkName {
    /// An interface has 15 bytes.
    const MAX_BYTES: usize = 12;

    /// The network's bridge.
    pub(crate) fn bridge(&self) -> String {
        format!("hw-{self}")
    }
}

impl FromStr for NetworkName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let fits = (1..=Self::MAX_BYTES).contains(&text.len()) && text.bytes().all(plain);
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("the name of a network has 1 to {} of a-z 0-9", Self::MAX_BYTES))
        }
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<NetworkName> for String {
    fn from(name: NetworkName) -> Self {
        name.0
    }
}

impl TryFrom<String> for NetworkName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// A network of guests on this cloudlet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Network {
    pub(crate) name: NetworkName,
    /// The same on every cloudlet that guests of it move between.
    pub(crate) subnet: Subnet,
    /// Whether guests reach the world beyond, under this host's address.
    pub(crate) nat: bool,
    /// How long traffic for a guest that left goes on to where it is; 0 is not at all.
    #[serde(default = "forward_for_s")]
    pub(crate) forward_for_s: u32,
}

/// What a VM has of a network, wherever it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Attachment {
    /// The network.
    pub(crate) network: NetworkName,
    /// Its addresses.
    pub(crate) subnet: Subnet,
    /// The guest's address; none of a guest that has one by other means, unknown here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) address: Option<Ipv4Addr>,
    /// Ports of the host that are the guest's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) publish: Vec<Published>,
}

impl Attachment {
    /// The words of a kernel command line by which the recipes' guests learn of their address.
    pub(crate) fn cmdline(&self) -> String {
        let (prefix, gateway) = (self.subnet.prefix(), self.subnet.gateway());
        let words = |address| format!("howdah.ip={address}/{prefix} howdah.gw={gateway}");
        self.address.map(words).unwrap_or_default()
    }
}

/// All networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Networks {
    version: u32,
    networks: Vec<Network>,
}

impl Networks {
    /// As the cloudlet's file has them.
    pub(crate) fn read(home: &Home) -> Result<Self, Failure> {
        let path = home.networks();
        if !path.exists() {
            return Ok(Self { version: VERSION, networks: Vec::new() });
        }
        let read: Self = read_json(&path)?;
        if read.version != VERSION || read.networks.len() > MAX_NETWORKS {
            let why = format!("version {} with {} networks", read.version, read.networks.len());
            let what = path.display();
            return Err(Failure::new(Exit::Corrupt, what, why, "use the howdah that wrote it"));
        }
        Ok(read)
    }

    /// Makes it so.
    pub(crate) fn write(&self, home: &Home) -> Result<(), Failure> {
        home.create()?;
        write_json(&home.networks(), self)
    }

    /// Every one, by name.
    pub(crate) fn all(&self) -> &[Network] {
        &self.networks
    }

    /// The one of this name.
    pub(crate) fn get(&self, name: &NetworkName) -> Result<&Network, Failure> {
        self.networks.iter().find(|network| network.name == *name).ok_or_else(|| {
            let way_out = format!("`howdah network add {name} --subnet 10.77.0.0/24` makes it");
            let why = "this cloudlet has none of that name";
            Failure::new(Exit::NotFound, format!("network {name}"), why, way_out)
        })
    }

    /// Adds one, or finds that it is there already.
    pub(crate) fn put(&mut self, new: Network) -> Result<(), Failure> {
        let what = format!("network {}", new.name);
        if let Some(old) = self.networks.iter_mut().find(|old| old.name == new.name) {
            if old.subnet != new.subnet {
                let why = format!("it is there, with the subnet {}", old.subnet);
                let way_out = format!("`howdah network rm {}` first", new.name);
                return Err(Failure::new(Exit::Conflict, what, why, way_out));
            }
            *old = new;
            return Ok(());
        }
        let overlaps = |old: &&Network| {
            let within =
                |a: Subnet, b: Subnet| b.is_guests(a.gateway()) || a.gateway() == b.gateway();
            within(old.subnet, new.subnet) || within(new.subnet, old.subnet)
        };
        if let Some(other) = self.networks.iter().find(overlaps) {
            let why = format!("network {} has addresses of {} already", other.name, new.subnet);
            return Err(Failure::new(Exit::Conflict, what, why, "choose another --subnet"));
        }
        if self.networks.len() >= MAX_NETWORKS {
            let why = format!("there are {MAX_NETWORKS} networks");
            return Err(Failure::new(Exit::Conflict, what, why, "`howdah network rm` one of them"));
        }
        self.networks.push(new);
        self.networks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(())
    }

    /// Removes the one of this name.
    pub(crate) fn remove(&mut self, name: &NetworkName) -> Result<Network, Failure> {
        let found = self.get(name)?.clone();
        self.networks.retain(|network| network.name != *name);
        Ok(found)
    }
}

/// VMs of this cloudlet that are in a network, with their configurations. One that cannot be read is
/// left out: its owner hears of it when it is used.
pub(crate) fn attached(home: &Home) -> Result<Vec<(VmName, VmConfig, Attachment)>, Failure> {
    let vms = home.vms()?.into_iter();
    Ok(vms
        .filter_map(|dir| {
            let config = dir.config().ok()?;
            let attachment = config.network.clone()?;
            Some((dir.name().clone(), config, attachment))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(name: &str, subnet: &str) -> Network {
        let (name, subnet) = (name.parse().unwrap(), subnet.parse().unwrap());
        Network { name, subnet, nat: true, forward_for_s: FORWARD_FOR_S }
    }

    #[test]
    fn networks_are_kept_and_do_not_overlap() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path()).unwrap();
        let mut networks = Networks::read(&home).unwrap();
        networks.put(network("edge", "10.77.0.0/24")).unwrap();
        networks.put(Network { nat: false, ..network("edge", "10.77.0.0/24") }).unwrap();
        for (name, subnet) in
            [("edge", "10.78.0.0/24"), ("b", "10.77.0.0/16"), ("b", "10.77.0.0/28")]
        {
            assert_eq!(networks.put(network(name, subnet)).unwrap_err().exit, Exit::Conflict);
        }
        networks.put(network("b", "10.77.1.0/24")).unwrap();
        networks.write(&home).unwrap();
        let mut read = Networks::read(&home).unwrap();
        assert_eq!(read, networks);
        assert!(!read.get(&"edge".parse().unwrap()).unwrap().nat);
        read.remove(&"edge".parse().unwrap()).unwrap();
        assert_eq!(read.get(&"edge".parse().unwrap()).unwrap_err().exit, Exit::NotFound);
    }

    #[test]
    fn a_name_fits_an_interface() {
        let longest: NetworkName = "abcdefghijk9".parse().unwrap();
        assert_eq!(longest.bridge().len(), 15);
        for wrong in ["", "abcdefghijklm", "a-b", "A", "a/b", "ä"] {
            assert!(wrong.parse::<NetworkName>().is_err(), "{wrong}");
        }
    }
}
