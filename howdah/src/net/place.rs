//! What is still free in a network for one VM. Looked up before the VM's process is confined: it does
//! not see the other VMs afterwards.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use super::{
    book::{Attachment, Network, attached},
    publish::{Protocol, Published},
};
use crate::{
    failure::{Exit, Failure},
    home::{Home, VmName},
};

/// A VM's place in a network.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    vm: VmName,
    network: Network,
    /// Addresses of other VMs in the network.
    addresses: BTreeSet<Ipv4Addr>,
    /// Ports of the host, of other VMs in any network.
    ports: BTreeMap<(Protocol, u16), VmName>,
}

impl Place {
    /// For `vm` in `network`.
    pub(crate) fn find(home: &Home, vm: &VmName, network: Network) -> Result<Self, Failure> {
        let mut place =
            Self { vm: vm.clone(), network, addresses: BTreeSet::new(), ports: BTreeMap::new() };
        for (other, _, has) in attached(home)?.into_iter().filter(|(other, ..)| other != vm) {
            if has.network == place.network.name {
                place.addresses.extend(has.address);
            }
            let ports = has.publish.iter().map(|port| ((port.protocol, port.host), other.clone()));
            place.ports.extend(ports);
        }
        Ok(place)
    }

    /// What a new VM gets: the address that it asks for, or with `choose` one that is free.
    pub(crate) fn give(
        &self,
        asked: Option<Ipv4Addr>,
        choose: bool,
        publish: Vec<Published>,
    ) -> Result<Attachment, Failure> {
        let what = format!("VM {} in network {}", self.vm, self.network.name);
        let refused = |why: String, way_out| Failure::new(Exit::Conflict, &what, why, way_out);
        self.check_ports(&publish)
            .map_err(|why| refused(why, "choose another port to --publish"))?;
        let address = match asked {
            Some(address) => {
                self.check(address).map_err(|why| refused(why, "choose another --address"))?;
                Some(address)
            }
            None if choose => Some(self.free().ok_or_else(|| {
                let why = format!("every address of {} is a VM's", self.network.subnet);
                refused(why, "`howdah vm rm` one, or add a network")
            })?),
            None => None,
        };
        if address.is_none() && !publish.is_empty() {
            let why = "ports are published, and the guest's address is not known".to_owned();
            return Err(refused(why, "name the one that it has with --address"));
        }
        let (network, subnet) = (self.network.name.clone(), self.network.subnet);
        Ok(Attachment { network, subnet, address, publish })
    }

    /// What a VM that comes in has here, if that can be what it had.
    pub(crate) fn take_in(&self, theirs: Option<&Attachment>) -> Result<Attachment, String> {
        let (network, subnet) = (self.network.name.clone(), self.network.subnet);
        let Some(theirs) = theirs else {
            return Ok(Attachment { network, subnet, address: None, publish: Vec::new() });
        };
        if theirs.subnet != subnet {
            return Err(format!(
                "it is in a network of {}, and the network {network} there is of {subnet}",
                theirs.subnet
            ));
        }
        if let Some(address) = theirs.address {
            self.check(address)?;
        }
        self.check_ports(&theirs.publish)?;
        Ok(Attachment { network, ..theirs.clone() })
    }

    fn free(&self) -> Option<Ipv4Addr> {
        self.network.subnet.address_for(self.vm.as_ref(), |a| self.addresses.contains(&a))
    }

    fn check(&self, address: Ipv4Addr) -> Result<(), String> {
        if !self.network.subnet.is_guests(address) {
            return Err(format!("{address} is no guest's address of {}", self.network.subnet));
        }
        if self.addresses.contains(&address) {
            return Err(format!("another VM there has the address {address}"));
        }
        Ok(())
    }

    fn check_ports(&self, wanted: &[Published]) -> Result<(), String> {
        let mut seen = BTreeSet::new();
        for port in wanted {
            let key = (port.protocol, port.host);
            if !seen.insert(key) {
                return Err(format!("port {}/{} is published twice", port.host, port.protocol));
            }
            if let Some(other) = self.ports.get(&key) {
                let (host, protocol) = (port.host, port.protocol);
                return Err(format!("port {host}/{protocol} there is VM {other}'s"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::VmConfig;

    fn network() -> Network {
        let (name, subnet) = ("edge".parse().unwrap(), "10.77.0.0/24".parse().unwrap());
        Network { name, subnet, nat: false, forward_for_s: 0 }
    }

    /// A cloudlet whose VM `old` has an address and a port.
    fn home(dir: &std::path::Path) -> Home {
        let home = Home::new(dir).unwrap();
        let old = home.vm(&"old".parse().unwrap());
        old.create().unwrap();
        let place = Place::find(&home, old.name(), network()).unwrap();
        let address = Some(Ipv4Addr::new(10, 77, 0, 5));
        let has = place.give(address, true, vec!["8080:80".parse().unwrap()]).unwrap();
        let config =
            VmConfig { network: Some(has), ..VmConfig::of(&guest_images::BaseId([7; 32])) };
        old.write_config(&config).unwrap();
        home
    }

    #[test]
    fn no_two_vms_have_one_address_or_port() {
        let dir = tempfile::tempdir().unwrap();
        let home = home(dir.path());
        let place = Place::find(&home, &"new".parse().unwrap(), network()).unwrap();
        let five = Some(Ipv4Addr::new(10, 77, 0, 5));
        assert!(place.give(five, true, Vec::new()).unwrap_err().message.contains("10.77.0.5"));
        let port = |text: &str| vec![text.parse::<Published>().unwrap()];
        assert!(place.give(None, true, port("8080:81")).unwrap_err().message.contains("VM old's"));
        place.give(None, true, port("8080:81/udp")).unwrap();
        assert!(place.give(None, false, port("1:1")).unwrap_err().message.contains("--address"));
        let twice = [port("1:1"), port("1:2")].concat();
        assert!(place.give(None, true, twice).is_err());
        let chosen = place.give(None, true, Vec::new()).unwrap().address.unwrap();
        assert!(Some(chosen) != five && network().subnet.is_guests(chosen));
        // The VM that has it may go on having it.
        Place::find(&home, &"old".parse().unwrap(), network())
            .unwrap()
            .give(five, true, port("8080:80"))
            .unwrap();
    }

    #[test]
    fn a_vm_that_comes_keeps_its_address_or_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let home = home(dir.path());
        let place = Place::find(&home, &"new".parse().unwrap(), network()).unwrap();
        let theirs = Attachment {
            network: "theirs".parse().unwrap(),
            subnet: "10.77.0.0/24".parse().unwrap(),
            address: Some(Ipv4Addr::new(10, 77, 0, 9)),
            publish: Vec::new(),
        };
        let here = place.take_in(Some(&theirs)).unwrap();
        assert_eq!(here, Attachment { network: "edge".parse().unwrap(), ..theirs.clone() });
        let taken = Attachment { address: Some(Ipv4Addr::new(10, 77, 0, 5)), ..theirs.clone() };
        assert!(place.take_in(Some(&taken)).unwrap_err().contains("10.77.0.5"));
        let other = Attachment { subnet: "10.78.0.0/24".parse().unwrap(), ..theirs };
        assert!(place.take_in(Some(&other)).unwrap_err().contains("10.78.0.0/24"));
        assert_eq!(place.take_in(None).unwrap().address, None);
    }
}
