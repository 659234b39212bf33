//! Guests that move between cloudlets that share nothing but routes: namespaces of the tests' own.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use guest_images::BaseId;
use handoff::ownership::{Epoch, HandoffId, State, Tenure, VmId};
use netlink_packet_route::link::InfoKind;
use tempfile::TempDir;

use super::{
    super::{
        netlink::{Netlink, Route},
        testing::{Call, Host},
        tunnel,
    },
    *,
};
use crate::home::VmConfig;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);
const PUBLISHED: u16 = 8080;
/// What a server pours out at once: packets of the largest size.
const MUCH: usize = 300_000;

fn network(forward_for_s: u32) -> Network {
    let (name, subnet) = ("edge".parse().unwrap(), "10.77.0.0/24".parse().unwrap());
    Network { name, subnet, nat: true, forward_for_s }
}

/// A host with a cloudlet's directory, in which a VM `web` may be.
struct Cloudlet {
    host: Host,
    home: Home,
    _dir: Arc<TempDir>,
    key: PeerKey,
    /// Where peers find it.
    address: [u8; 4],
}

impl Cloudlet {
    fn new(address: [u8; 4], forward_for_s: u32) -> Option<Self> {
        let host = Host::new()?;
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let home = Home::new(dir.path()).unwrap();
        let key = peers::identity(&home).unwrap().key();
        let mut networks = Networks::read(&home).unwrap();
        networks.put(network(forward_for_s)).unwrap();
        networks.write(&home).unwrap();
        let this = Self { host, home, _dir: dir, key, address };
        let (home, table) = (this.home.clone(), network(forward_for_s));
        let able = this.host.run(move || {
            attach::bring_up(&table).unwrap();
            let mut netlink = Netlink::open().unwrap();
            let vxlan = netlink.add_link("try", InfoKind::Vxlan, [], vxlan());
            let _ = netlink.remove_link("try");
            let rules = Rules { networks: vec![table], ..Rules::default() };
            vxlan.map_err(|e| e.to_string())?;
            nft::load(&home, &rules).map_err(|failure| failure.message)
        });
        if let Err(why) = able {
            eprintln!("skipped: it needs nft and VXLAN: {why}");
            return None;
        }
        Some(this)
    }

    fn peer(&self) -> String {
        format!("{}@{}:7070", self.key, Ipv4Addr::from(self.address))
    }

    /// The VM's record here, and what follows from it.
    fn record(&self, epoch: u64, state: State) {
        let dir = self.home.vm(&"web".parse().unwrap());
        dir.create().unwrap();
        let attachment = Attachment {
            network: "edge".parse().unwrap(),
            subnet: "10.77.0.0/24".parse().unwrap(),
            address: Some(GUEST),
            publish: vec![format!("{PUBLISHED}:80").parse().unwrap()],
        };
        let config = VmConfig { network: Some(attachment), ..VmConfig::of(&BaseId([7; 32])) };
        dir.write_config(&config).unwrap();
        let record = Record { state, epoch: Epoch(epoch), ..Record::created(VmId([1; 16])) };
        dir.journal().unwrap().write(record).unwrap();
        self.refresh();
    }

    fn refresh(&self) {
        let home = self.home.clone();
        self.host.run(move || attach::refresh(&home).unwrap());
    }

    fn owns(&self, epoch: u64) {
        self.record(epoch, State::Owner(Tenure::Settled));
    }

    /// Hands the guest's cable over as a handoff of that epoch does the guest.
    fn hands_off_to(&self, other: &Self, epoch: u8) {
        let handoff = HandoffId([epoch; 16]);
        let coming = State::Receiving { handoff, peer: self.peer() };
        other.record(epoch.into(), coming);
        self.host.replug("hwtguest", &other.host, "hw-edge");
        other.owns(epoch.into());
        let gone = State::Released { handoff, peer: other.peer() };
        self.record(epoch.into(), gone);
    }

    /// Tunnels that there are.
    fn tunnels(&self) -> usize {
        let tag = self.home.tag();
        self.host.run(move || {
            let all = nix::net::if_::if_nameindex().unwrap();
            let names = all.iter().map(|one| one.name().to_string_lossy().into_owned());
            names.filter(|name| name.starts_with(&tunnel::prefix(&tag))).count()
        })
    }

    /// Whether its bridge answers for guests that are elsewhere.
    fn answers(&self) -> String {
        let path = "/proc/sys/net/ipv4/conf/hw-edge/proxy_arp";
        let read = move || std::fs::read_to_string(path).unwrap();
        self.host.run(read).trim().to_owned()
    }
}

fn vxlan() -> Option<netlink_packet_route::link::LinkInfo> {
    use netlink_packet_route::link::{InfoData, InfoVxlan, LinkInfo};
    Some(LinkInfo::Data(InfoData::Vxlan(vec![InfoVxlan::Id(1), InfoVxlan::Port(tunnel::PORT)])))
}

fn default_route(via: [u8; 4]) -> impl FnOnce() + Send {
    move || {
        let via = Some(via.into());
        let route = Route { to: [0; 4].into(), prefix: 0, via, out: None, table: Route::MAIN };
        Netlink::open().unwrap().add_route(route).unwrap();
    }
}

/// Pours much out at whoever sends a byte, a second later: the guest is the first to say something
/// wherever it is then.
fn pour(host: &Host, port: u16) {
    host.run(move || {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream: TcpStream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() {
                        std::thread::sleep(Duration::from_secs(1));
                        let _ = stream.write_all(&vec![byte[0]; MUCH]);
                    }
                });
            }
        });
    });
}

/// A guest, and a client, of a cloudlet at 192.0.2.1 with a peer.
struct World {
    a: Cloudlet,
    b: Cloudlet,
    client: Host,
    guest: Host,
}

impl World {
    fn new(forward_for_s: u32) -> Option<Self> {
        let a = Cloudlet::new([198, 51, 100, 1], forward_for_s)?;
        let b = Cloudlet::new([198, 51, 100, 2], forward_for_s)?;
        let (client, guest) = (Host::new()?, Host::new()?);
        a.host.cable("under", &b.host, "under");
        a.host.address("under", a.address, 24);
        b.host.address("under", b.address, 24);
        a.host.cable("wan", &client, "eth0");
        a.host.address("wan", [192, 0, 2, 1], 24);
        client.address("eth0", [192, 0, 2, 9], 24);
        a.host.cable("hwtguest", &guest, "eth0");
        a.host.plug("hwtguest", "hw-edge");
        guest.address("eth0", GUEST.octets(), 24);
        guest.run(default_route([10, 77, 0, 1]));
        guest.echo(80);
        a.owns(1);
        Some(Self { a, b, client, guest })
    }

    fn call(&self) -> std::io::Result<Call> {
        self.client.call([192, 0, 2, 1], PUBLISHED)
    }
}

const FROM_CLIENT: &str = "hello from 192.0.2.9";

#[test]
fn a_connection_lives_through_a_move_and_new_ones_reach_the_guest() {
    let Some(world) = World::new(600) else { return };
    let World { a, b, .. } = &world;
    let neighbour = Host::new().unwrap();
    a.host.cable("hwtnear", &neighbour, "eth0");
    a.host.plug("hwtnear", "hw-edge");
    neighbour.address("eth0", [10, 77, 0, 9], 24);
    let near = || neighbour.call(GUEST.octets(), 80);
    assert_eq!(near().unwrap().say("hello").unwrap(), "hello from 10.77.0.9");
    let mut old = world.call().unwrap();
    assert_eq!(old.say("hello").unwrap(), FROM_CLIENT);
    assert_eq!((a.tunnels(), b.tunnels()), (0, 0));
    a.hands_off_to(b, 2);
    assert_eq!(old.say("hello").unwrap(), FROM_CLIENT);
    assert_eq!(world.call().unwrap().say("hello").unwrap(), FROM_CLIENT);
    assert_eq!((a.tunnels(), b.tunnels()), (1, 1));
    // Those who stayed on the bridge are answered for it, though they remember its own MAC address.
    assert_eq!(a.answers(), "1");
    assert_eq!(near().unwrap().say("hello").unwrap(), "hello from 198.51.100.1");
    // The host of the old cloudlet itself.
    let mut own = a.host.call([192, 0, 2, 1], PUBLISHED).unwrap();
    assert!(own.say("hello").unwrap().starts_with("hello from "));
    // A peer that sends what is for another guest there is not heard.
    let other = Host::new().unwrap();
    b.host.cable("hwtother", &other, "eth0");
    b.host.plug("hwtother", "hw-edge");
    other.address("eth0", [10, 77, 0, 6], 24);
    other.run(default_route([10, 77, 0, 1]));
    other.echo(80);
    b.host.call([10, 77, 0, 6], 80).unwrap();
    let tag = a.home.tag();
    a.host.run(move || {
        let all = nix::net::if_::if_nameindex().unwrap();
        let ours = tunnel::prefix(&tag);
        let found = all.iter().find(|one| one.name().to_string_lossy().starts_with(&ours));
        let (out, via) = (Some(found.unwrap().index()), Some(Ipv4Addr::new(192, 0, 0, 8)));
        let to = Ipv4Addr::new(10, 77, 0, 6);
        let route = Route { to, prefix: 32, via, out, table: Route::MAIN };
        Netlink::open().unwrap().add_route(route).unwrap();
    });
    assert!(a.host.call([10, 77, 0, 6], 80).is_err(), "only the guest that moved");
    // The same again, as after a restart of either host: it is all in files.
    a.refresh();
    b.refresh();
    assert_eq!(old.say("hello").unwrap(), FROM_CLIENT);
    // A VM that is removed is followed no more.
    std::fs::remove_dir_all(a.home.vm(&"web".parse().unwrap()).path()).unwrap();
    a.refresh();
    assert_eq!((a.tunnels(), a.answers().as_str()), (0, "0"));
    assert!(world.call().is_err());
}

#[test]
fn a_guest_that_speaks_first_after_its_move_is_heard_in_full() {
    let Some(world) = World::new(600) else { return };
    let World { a, b, client, guest } = &world;
    pour(guest, 90);
    // The new cloudlet could send it elsewhere, under its own address.
    b.host.run(default_route([198, 51, 100, 1]));
    let dir = a.home.vm(&"web".parse().unwrap());
    let mut config = dir.config().unwrap();
    let publish = &mut config.network.as_mut().unwrap().publish;
    publish.push("9090:90".parse().unwrap());
    dir.write_config(&config).unwrap();
    a.refresh();
    let (poured, all_poured) = std::sync::mpsc::channel();
    client.run(move || {
        let mut stream = TcpStream::connect(("192.0.2.1", 9090)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
        stream.write_all(b"x").unwrap();
        std::thread::spawn(move || {
            let mut all = vec![0; MUCH];
            let _ = poured.send(stream.read_exact(&mut all).map(|()| all));
        });
    });
    std::thread::sleep(Duration::from_millis(200));
    a.hands_off_to(b, 2);
    let all = all_poured.recv().unwrap().unwrap();
    assert!(all.iter().all(|byte| *byte == b'x'));
}

#[test]
fn it_ends_in_time_without_anybodys_doing() {
    let Some(world) = World::new(5) else { return };
    let World { a, b, .. } = &world;
    a.hands_off_to(b, 2);
    let mut call = world.call().unwrap();
    assert_eq!(call.say("hello").unwrap(), FROM_CLIENT);
    std::thread::sleep(Duration::from_secs(6));
    // The kernel has forgotten the guest; nobody has looked.
    assert!(call.say("hello").is_err(), "an old connection");
    assert!(world.call().is_err(), "a new one");
    a.refresh();
    b.refresh();
    assert_eq!((a.tunnels(), b.tunnels(), a.answers().as_str()), (0, 0, "0"));
}

#[test]
fn a_guest_comes_back_and_what_it_began_elsewhere_follows() {
    let Some(world) = World::new(600) else { return };
    let World { a, b, .. } = &world;
    let user = Host::new().unwrap();
    b.host.cable("wan", &user, "eth0");
    b.host.address("wan", [203, 0, 113, 1], 24);
    user.address("eth0", [203, 0, 113, 9], 24);
    let mut call = world.call().unwrap();
    assert_eq!(call.say("hello").unwrap(), FROM_CLIENT);
    a.hands_off_to(b, 2);
    assert_eq!(call.say("hello").unwrap(), FROM_CLIENT);
    let mut of_user = user.call([203, 0, 113, 1], PUBLISHED).unwrap();
    assert_eq!(of_user.say("hello").unwrap(), "hello from 203.0.113.9");
    // While it comes back it is still there; and if it does not come after all.
    let handoff = HandoffId([3; 16]);
    a.record(3, State::Receiving { handoff, peer: b.peer() });
    assert_eq!(call.say("hello").unwrap(), FROM_CLIENT);
    a.record(3, State::Declined { handoff, reason: String::new() });
    assert_eq!(call.say("hello").unwrap(), FROM_CLIENT);
    b.hands_off_to(a, 4);
    assert_eq!(call.say("hello").unwrap(), FROM_CLIENT);
    assert_eq!(of_user.say("hello").unwrap(), "hello from 203.0.113.9");
    assert_eq!(world.call().unwrap().say("hello").unwrap(), FROM_CLIENT);
    let mut of_user = user.call([203, 0, 113, 1], PUBLISHED).unwrap();
    assert_eq!(of_user.say("hello").unwrap(), "hello from 203.0.113.9");
    assert_eq!((a.answers().as_str(), b.answers().as_str()), ("0", "1"));
}

#[test]
fn a_guest_that_goes_on_and_on_is_followed_from_one_to_the_next() {
    let Some(mut world) = World::new(600) else { return };
    let Some(c) = Cloudlet::new([198, 51, 101, 3], 600) else { return };
    let farther = [198, 51, 101, 2];
    world.b.host.cable("farther", &c.host, "under");
    world.b.host.address("farther", farther, 24);
    c.host.address("under", c.address, 24);
    let mut call = world.call().unwrap();
    assert_eq!(call.say("hello").unwrap(), FROM_CLIENT);
    world.a.hands_off_to(&world.b, 2);
    // As this one sees it.
    world.b.address = farther;
    world.b.hands_off_to(&c, 3);
    assert_eq!(call.say("hello").unwrap(), FROM_CLIENT);
    assert_eq!(world.call().unwrap().say("hello").unwrap(), FROM_CLIENT);
    assert_eq!((world.a.tunnels(), world.b.tunnels(), c.tunnels()), (1, 2, 1));
}

#[test]
fn where_it_is_off_or_the_bridge_leads_elsewhere_nothing_is_forwarded() {
    let Some(world) = World::new(0) else { return };
    let World { a, b, .. } = &world;
    a.hands_off_to(b, 2);
    assert!(world.call().is_err());
    assert_eq!((a.tunnels(), b.tunnels()), (0, 0));
    let Some(world) = World::new(600) else { return };
    let World { a, b, .. } = &world;
    // An uplink: whoever looks for the guest finds it by itself.
    let switch = Host::new().unwrap();
    a.host.cable("uplink", &switch, "port");
    a.host.plug("uplink", "hw-edge");
    a.hands_off_to(b, 2);
    assert_eq!((a.tunnels(), a.answers().as_str()), (0, "0"));
}
