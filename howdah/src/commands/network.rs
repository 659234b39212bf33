//! `howdah network`: the networks of this cloudlet's guests.

use std::net::Ipv4Addr;

use handoff::tls::PeerKey;
use serde::Serialize;

use crate::{
    cli::{NetworkAddArgs, NetworkCommand},
    failure::{Exit, Failure},
    home::{Home, VmName},
    net::{self, Network, NetworkName, Networks, Published},
    output::{Output, table},
};

/// Runs a `howdah network` command.
pub(crate) fn run(command: NetworkCommand, home: &Home, output: Output) -> anyhow::Result<()> {
    match command {
        NetworkCommand::Add(args) => {
            let network = add(args, home)?;
            output.result(&network, |network| {
                format!(
                    "network {} of {} on {}",
                    network.name,
                    network.subnet,
                    network.name.bridge()
                )
            });
        }
        NetworkCommand::Ls => {
            let shown = list(home)?;
            output.result(&shown, |shown| show(shown));
        }
        NetworkCommand::Rm { name } => {
            let network = remove(&name, home)?;
            output.result(&network, |network| format!("network {} removed", network.name));
        }
    }
    Ok(())
}

fn add(args: NetworkAddArgs, home: &Home) -> Result<Network, Failure> {
    let NetworkAddArgs { name, subnet, nat, forward_for_s } = args;
    let network = Network { name, subnet, nat, forward_for_s };
    let mut networks = Networks::read(home)?;
    networks.put(network.clone())?;
    net::bring_up(&network)?;
    networks.write(home)?;
    net::refresh(home)?;
    Ok(network)
}

fn remove(name: &NetworkName, home: &Home) -> Result<Network, Failure> {
    let mut networks = Networks::read(home)?;
    let network = networks.remove(name)?;
    if let Some((vm, ..)) = net::attached(home)?.into_iter().find(|(.., a)| a.network == *name) {
        let why = format!("VM {vm} is in it");
        let way_out = format!("`howdah vm rm {vm}`, or start it with another --network");
        return Err(Failure::new(Exit::Conflict, format!("network {name}"), why, way_out));
    }
    net::take_down(&network)?;
    networks.write(home)?;
    net::refresh(home)?;
    Ok(network)
}

/// A network with who is in it.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    network: Network,
    gateway: Ipv4Addr,
    vms: Vec<Member>,
}

#[derive(Debug, Serialize)]
struct Member {
    vm: VmName,
    address: Option<Ipv4Addr>,
    mac: Option<String>,
    publish: Vec<Published>,
    /// Where its traffic goes on to, of a guest that left.
    #[serde(skip_serializing_if = "Option::is_none")]
    forwarded: Option<Forwarded>,
}

#[derive(Debug, Serialize)]
struct Forwarded {
    peer: PeerKey,
    address: Ipv4Addr,
    for_s: u64,
}

fn list(home: &Home) -> Result<Vec<Shown>, Failure> {
    let members = net::attached(home)?;
    let of =
        |network: &Network| {
            let mine = members.iter().filter(|(.., attachment)| attachment.network == network.name);
            mine.map(|(vm, config, attachment)| Member {
                vm: vm.clone(),
                address: attachment.address,
                mac: config.mac.clone(),
                publish: attachment.publish.clone(),
                forwarded: net::forwarded(home, network, vm)
                    .map(|(peer, address, for_s)| Forwarded { peer, address, for_s }),
            })
            .collect()
        };
    let networks = Networks::read(home)?;
    Ok(networks
        .all()
        .iter()
        .map(|network| Shown {
            network: network.clone(),
            gateway: network.subnet.gateway(),
            vms: of(network),
        })
        .collect())
}

fn show(shown: &[Shown]) -> String {
    let dash = || "-".to_owned();
    let mut rows = Vec::new();
    for Shown { network, vms, .. } in shown {
        let nat = if network.nat { "yes" } else { "no" };
        let head = [network.name.to_string(), network.subnet.to_string(), nat.to_owned()];
        let [name, subnet, nat] = head;
        if vms.is_empty() {
            rows.push([name.clone(), subnet.clone(), nat.clone(), dash(), dash(), dash(), dash()]);
        }
        for member in vms {
            let ports: Vec<_> = member.publish.iter().map(Published::to_string).collect();
            rows.push([
                name.clone(),
                subnet.clone(),
                nat.clone(),
                member.vm.to_string(),
                member.address.map_or_else(dash, |address| address.to_string()),
                if ports.is_empty() { dash() } else { ports.join(",") },
                member
                    .forwarded
                    .as_ref()
                    .map_or_else(dash, |to| format!("to {} for {} s", to.address, to.for_s)),
            ]);
        }
    }
    table(["NETWORK", "SUBNET", "NAT", "VM", "ADDRESS", "PUBLISHED", "FORWARDED"], &rows)
}
