//! Networks in the kernel, in namespaces of the tests' own.

use super::{
    super::{
        netlink::Route,
        nft::{self, Rules},
        testing::Host,
    },
    *,
};
use crate::net::Published;

fn network() -> Network {
    let (name, subnet) = ("edge".parse().unwrap(), "10.77.0.0/24".parse().unwrap());
    Network { name, subnet, nat: true, forward_for_s: 600 }
}

/// A cloudlet's host with a guest on its bridge: a namespace with the guest's address.
fn cloudlet() -> Option<(Host, Host)> {
    let (host, guest) = (Host::new()?, Host::new()?);
    host.run(|| bring_up(&network()).unwrap());
    host.cable("port0", &guest, "eth0");
    host.run(|| {
        let mut netlink = Netlink::open().unwrap();
        let bridge = netlink.link("hw-edge").unwrap().unwrap();
        assert_eq!(bridge.mac, network().subnet.gateway_mac());
        let port = netlink.link("port0").unwrap().unwrap().index;
        netlink.join(port, bridge.index, "port0").unwrap();
        assert_eq!(netlink.link("port0").unwrap().unwrap().controller, Some(bridge.index));
    });
    guest.address("eth0", [10, 77, 0, 5], 24);
    Some((host, guest))
}

fn guests_route() {
    let via = Some(network().subnet.gateway());
    let route = Route { to: [0; 4].into(), prefix: 0, via, out: None, table: Route::MAIN };
    Netlink::open().unwrap().add_route(route).unwrap();
}

#[test]
fn a_bridge_is_made_once_and_removed() {
    let Some(host) = Host::new() else { return };
    host.run(|| {
        bring_up(&network()).unwrap();
        bring_up(&network()).unwrap();
        take_down(&network()).unwrap();
        assert_eq!(Netlink::open().unwrap().link("hw-edge").unwrap(), None);
        take_down(&network()).unwrap();
        // Somebody else's interface of that name is left alone.
        let mut netlink = Netlink::open().unwrap();
        assert!(netlink.add_link("hw-edge", InfoKind::Bridge, [], None).unwrap());
        let failure = bring_up(&network()).unwrap_err();
        assert_eq!(failure.exit, Exit::Conflict, "{failure}");
    });
}

#[test]
fn a_vms_interface_is_a_port_of_its_bridge_and_goes_with_it() {
    let Some(host) = Host::new() else { return };
    host.run(|| {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path()).unwrap();
        let vm: VmName = "web".parse().unwrap();
        let tap = attach(&home, &vm, &network()).unwrap();
        let mut netlink = Netlink::open().unwrap();
        let bridge = netlink.link("hw-edge").unwrap().unwrap().index;
        let port = netlink.link(tap.name()).unwrap().unwrap();
        assert_eq!(port.controller, Some(bridge));
        let name = tap.name().to_owned();
        // A second process of the VM finds it in use.
        assert_eq!(attach(&home, &vm, &network()).unwrap_err().exit, Exit::Host);
        drop(tap);
        assert_eq!(netlink.link(&name).unwrap(), None);
    });
}

#[test]
fn a_published_port_leads_to_the_guest() {
    let Some((host, guest)) = cloudlet() else { return };
    let Some(client) = Host::new() else { return };
    host.cable("wan", &client, "eth0");
    host.address("wan", [192, 0, 2, 1], 24);
    client.address("eth0", [192, 0, 2, 9], 24);
    guest.echo(80);
    let loaded = host.run(|| {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path()).unwrap();
        let port: Published = "8080:80".parse().unwrap();
        let published = vec![(port, std::net::Ipv4Addr::new(10, 77, 0, 5))];
        nft::load(&home, &Rules { networks: vec![network()], published, ways: Vec::new() })
    });
    match loaded {
        Err(failure) if failure.message.contains("there is no `nft`") => {
            return eprintln!("skipped: {failure}");
        }
        loaded => loaded.unwrap(),
    }
    // The guest answers through its gateway.
    guest.run(guests_route);
    let mut call = client.call([192, 0, 2, 1], 8080).unwrap();
    assert_eq!(call.say("hello").unwrap(), "hello from 192.0.2.9");
    let mut own = host.call([192, 0, 2, 1], 8080).unwrap();
    assert!(own.say("hello").unwrap().starts_with("hello from "));
    assert!(client.call([192, 0, 2, 1], 80).is_err(), "only what is published");
}
