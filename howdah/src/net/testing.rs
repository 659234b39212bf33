//! Hosts for tests: threads in network namespaces of their own. Where a test may not make them it is
//! skipped, and says so.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::mpsc::{Receiver, Sender, channel},
    thread::JoinHandle,
    time::Duration,
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage},
};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::gettid,
};

use super::netlink::Netlink;

type Work = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own, which does as it is told.
pub(super) struct Host {
    pid: u32,
    work: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// A host with nothing but loopback; none where that is not allowed.
    pub(super) fn new() -> Option<Self> {
        let (tell, told) = channel();
        let (work, jobs): (_, Receiver<Work>) = channel();
        let thread = std::thread::spawn(move || {
            let made = unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid().as_raw() as u32);
            let _ = tell.send(made);
            jobs.iter().for_each(|job| job());
        });
        match told.recv().unwrap() {
            Ok(pid) => {
                let host = Self { pid, work: Some(work), thread: Some(thread) };
                host.run(|| up("lo"));
                Some(host)
            }
            Err(e) => {
                eprintln!("skipped: no network namespaces for this user ({e})");
                None
            }
        }
    }

    /// Does something there.
    pub(super) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = channel();
        let job: Work = Box::new(move || {
            let _ = tell.send(job());
        });
        self.work.as_ref().unwrap().send(job).unwrap();
        told.recv().expect("what was to be done there failed")
    }

    /// Joins two hosts by a cable with this name at either end.
    pub(super) fn cable(&self, name: &'static str, other: &Self, there: &'static str) {
        let pid = other.pid;
        self.run(move || {
            let mut peer = LinkMessage::default();
            peer.attributes.push(LinkAttribute::IfName(there.into()));
            peer.attributes.push(LinkAttribute::NetNsPid(pid));
            let data = Some(LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))));
            Netlink::open().unwrap().add_link(name, InfoKind::Veth, [], data).unwrap();
            up(name);
        });
        other.run(move || up(there));
    }

    /// Plugs the end of a cable that is here into another host, as a port of a bridge there.
    pub(super) fn replug(&self, name: &'static str, other: &Self, bridge: &'static str) {
        let pid = other.pid;
        self.run(move || {
            let mut netlink = Netlink::open().unwrap();
            let mut link = LinkMessage::default();
            link.header.index = netlink.link(name).unwrap().unwrap().index;
            link.attributes.push(LinkAttribute::NetNsPid(pid));
            netlink.change(RouteNetlinkMessage::SetLink(link), 0, "move it").unwrap();
        });
        other.plug(name, bridge);
    }

    /// Makes an interface a port of a bridge.
    pub(super) fn plug(&self, name: &'static str, bridge: &'static str) {
        self.run(move || {
            let mut netlink = Netlink::open().unwrap();
            let port = netlink.link(name).unwrap().unwrap().index;
            let bridge = netlink.link(bridge).unwrap().unwrap().index;
            netlink.join(port, bridge, name).unwrap();
            up(name);
        });
    }

    /// Gives an interface an address.
    pub(super) fn address(&self, name: &'static str, address: [u8; 4], prefix: u8) {
        self.run(move || {
            let mut netlink = Netlink::open().unwrap();
            let index = netlink.link(name).unwrap().unwrap().index;
            netlink.add_address(index, address.into(), prefix).unwrap();
        });
    }

    /// Answers whoever calls, each word with itself and from whom it came, until the test ends.
    pub(super) fn echo(&self, port: u16) {
        self.run(move || {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { return };
                    std::thread::spawn(move || {
                        let from = stream.peer_addr().unwrap().ip();
                        let mut word = [0; 64];
                        while let Ok(count @ 1..) = stream.read(&mut word) {
                            let word = String::from_utf8_lossy(&word[..count]);
                            let _ = stream.write_all(format!("{word} from {from}").as_bytes());
                        }
                    });
                }
            });
        });
    }

    /// Calls an echo.
    pub(super) fn call(&self, address: [u8; 4], port: u16) -> std::io::Result<Call> {
        self.run(move || {
            let address = SocketAddr::from((address, port));
            let stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            Ok(Call(stream))
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A connection to an echo.
pub(super) struct Call(TcpStream);

impl Call {
    /// What it says to a word.
    pub(super) fn say(&mut self, word: &str) -> std::io::Result<String> {
        self.0.write_all(word.as_bytes())?;
        let mut answer = [0; 128];
        let count = self.0.read(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
    }
}

fn up(name: &str) {
    let mut netlink = Netlink::open().unwrap();
    let index = netlink.link(name).unwrap().unwrap().index;
    netlink.set_up(index, name).unwrap();
}
