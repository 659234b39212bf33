//! The API for peers: who comes in, what it may, and commands that are about another cloudlet.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};

use handoff::{
    Connect, Transport,
    tls::{Identity, Speech, TlsConnect},
};
use howdah_api::{PeerSpec, Rights};

use crate::{
    common::{Cloudlet, key_of},
    serve::Daemon,
};

const PATIENCE: Duration = Duration::from_secs(20);

const NOTHING: Rights = Rights {
    send: false,
    receive: false,
    push: false,
    pull: false,
    observe: false,
    operate: false,
};

/// A cloudlet whose daemon serves peers, and another that knows where.
struct Two {
    there: Cloudlet,
    daemon: Daemon,
    here: Cloudlet,
    address: String,
}

impl Two {
    fn new() -> Self {
        let (there, here) = (Cloudlet::new(), Cloudlet::new());
        there.base("edge").ok();
        let daemon = Daemon::start(&there, &["--api-listen", "127.0.0.1:0"]);
        let address = daemon.client.host().unwrap().api.unwrap();
        here.line(&format!("peer add there {} --api {address}", key_of(&there))).ok();
        Self { there, daemon, here, address }
    }

    /// Says what the cloudlet here may do there.
    fn allow(&self, rights: Rights) {
        let spec = PeerSpec {
            key: key_of(&self.here),
            address: None,
            api: None,
            rights: Some(rights),
            bases: None,
            until: None,
        };
        self.daemon.client.put_peer("here", &spec).unwrap();
    }
}

#[test]
fn a_peer_may_do_what_its_right_says() {
    let two = Two::new();
    let ls = || two.here.line("--cloudlet there base ls --json");
    // Nobody that is known, and somebody that is, without the right.
    ls().fails(4, &["API", &key_of(&two.here), "not known", "peer add"]);
    two.allow(Rights { send: true, pull: true, ..NOTHING });
    ls().fails(4, &["may not use the API", "--may observe"]);

    two.allow(Rights { observe: true, ..NOTHING });
    assert_eq!(ls().ok().stdout, two.there.line("base ls --json").ok().stdout);
    let said = two.here.line("--cloudlet there identity").ok().stdout;
    assert_eq!(said.trim(), key_of(&two.there));
    two.here.line("--cloudlet there base rm edge").fails(4, &["change nothing", "--may operate"]);
    two.here.line("--cloudlet there base verify edge").fails(4, &["--may operate"]);
    assert_eq!(two.daemon.client.bases().unwrap().len(), 1);

    two.allow(Rights { operate: true, ..NOTHING });
    let verified = two.here.line("--cloudlet there base verify edge").ok().stdout;
    assert!(verified.contains("is whole"), "{verified}");
    two.here.line("--cloudlet there vm inspect nobody").fails(3, &["nobody"]);
    two.here.line("--cloudlet there vm rm nobody").fails(3, &["nobody"]);
    two.here.line("--cloudlet there handoff nobody x").fails(3, &["nobody"]);
    two.here.line("--cloudlet there handoff nobody --cancel").fails(4, &["not handed off"]);
    two.here.line("--cloudlet there base rm edge").ok();
    assert!(two.daemon.client.bases().unwrap().is_empty());
    // The environment says it too, and commands without a cloudlet do not mind.
    let mut command = two.here.command();
    command.env("HOWDAH_CLOUDLET", "there").args(["base", "ls", "--json"]);
    assert_eq!(command.output().unwrap().stdout, b"[]\n");

    two.daemon.client.remove_peer("here").unwrap();
    ls().fails(4, &["not known"]);
}

/// Who may operate a cloudlet cannot give that to others, nor loosen what its host confines VMs by.
#[test]
fn some_things_are_said_on_the_cloudlet_itself() {
    let two = Two::new();
    two.allow(Rights { operate: true, ..NOTHING });
    let key = key_of(&Cloudlet::new());
    let add = |may: &str| two.here.line(&format!("--cloudlet there peer add c {key} --may {may}"));
    add("operate").fails(4, &["right to use the API", "peer here"]);
    add("send,observe").fails(4, &["right to use the API"]);
    assert!(two.daemon.client.peers().unwrap().iter().all(|peer| peer.name != "c"));
    add("send").ok();
    assert!(two.here.line("--cloudlet there peer ls").ok().stdout.contains(&key));
    let run = two.here.line("--cloudlet there vm run a --base edge --detach --no-jail");
    run.fails(4, &["confined", "peer here"]);
}

#[test]
fn what_is_about_a_host_is_not_asked_of_another() {
    let cloudlet = Cloudlet::new();
    for line in ["save a f", "restore f --name a", "base import x --disk f", "vm run a --base x"] {
        let ran = cloudlet.line(&format!("--cloudlet there {line}"));
        ran.fails(2, &["--cloudlet there"]);
    }
    cloudlet.line("--cloudlet there vm ls").fails(3, &["peer there"]);
    cloudlet.line(&format!("peer add there {}", key_of(&Cloudlet::new()))).ok();
    cloudlet.line("--cloudlet there vm ls").fails(2, &["--api HOST:PORT"]);
    cloudlet.line("--cloudlet there@127.0.0.1:1 vm ls").fails(1, &["127.0.0.1:1", "--api-listen"]);
}

/// Another key than the pinned one, a port for handoffs, and what is no TLS at all.
#[test]
fn strangers_get_no_http() {
    let two = Two::new();
    let other = key_of(&Cloudlet::new());
    two.here.line(&format!("peer add fake {other} --api {}", two.address)).ok();
    two.here.line("--cloudlet fake vm ls").fails(1, &["not the pinned", &other]);
    for said in ["GET /v1/host HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x7f\x7f"] {
        let mut stream = TcpStream::connect(&two.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(said.as_bytes()).unwrap();
        let (begun, mut heard) = (Instant::now(), Vec::new());
        let _ = stream.read_to_end(&mut heard);
        assert!(begun.elapsed() < Duration::from_secs(15));
        assert!(!String::from_utf8_lossy(&heard).contains("HTTP"), "{heard:?}");
    }
    // It goes on for others.
    two.allow(Rights { observe: true, ..NOTHING });
    two.here.line("--cloudlet there vm ls").ok();
    let log = std::fs::read_to_string(two.there.path("serve.log")).unwrap();
    assert!(log.contains("serving peers at 127.0.0.1"), "{log}");
    assert!(log.contains("does not speak TLS"), "{log}");
}

/// Longer answers than any buffer on the way.
#[test]
fn long_answers_come_whole() {
    let two = Two::new();
    two.allow(Rights { operate: true, ..NOTHING });
    let spec = PeerSpec {
        key: String::new(),
        address: None,
        api: None,
        rights: None,
        bases: Some(vec!["a".repeat(120); 60]),
        until: None,
    };
    for n in 0..20 {
        let key = key_of(&Cloudlet::new());
        two.daemon.client.put_peer(&format!("p{n}"), &PeerSpec { key, ..spec.clone() }).unwrap();
    }
    let seen = two.here.line("--cloudlet there peer ls --json").ok();
    assert!(seen.stdout.len() > 128 << 10, "{}", seen.stdout.len());
    assert_eq!(seen.stdout, two.there.line("peer ls --json").ok().stdout);
}

/// A connection on which HTTP is said by hand.
struct Line {
    tx: Box<dyn Write>,
    rx: Box<dyn Read>,
}

impl Line {
    fn new(two: &Two) -> Self {
        let pem = std::fs::read(two.here.home().join("identity")).unwrap();
        let identity = Arc::new(Identity::from_pem(&pem).unwrap());
        let key = key_of(&two.there).parse().unwrap();
        let mut connect = TlsConnect::new(&two.address, identity, key).speaking(Speech::Api);
        let (tx, rx) = connect.connect(PATIENCE).unwrap().split().unwrap();
        Self { tx: Box::new(tx), rx: Box::new(rx) }
    }

    fn ask(&mut self, path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        self.tx.write_all(request.as_bytes()).unwrap();
    }

    /// What is said until it holds a text, or until the end.
    fn hear(&mut self, until: &str) -> String {
        let (begun, mut heard, mut scratch) = (Instant::now(), String::new(), [0; 4096]);
        while !heard.contains(until) {
            assert!(begun.elapsed() < PATIENCE, "{heard}");
            match self.rx.read(&mut scratch) {
                Ok(0) => break,
                Ok(count) => heard += &String::from_utf8_lossy(&scratch[..count]),
                Err(e) => assert!(handoff::link::is_tick(&e), "{e}"),
            }
        }
        heard
    }
}

/// A right that ends does so for connections that are open, too.
#[test]
fn rights_are_asked_again() {
    let two = Two::new();
    two.allow(Rights { observe: true, ..NOTHING });
    let (mut asking, mut following) = (Line::new(&two), Line::new(&two));
    asking.ask("/v1/host");
    assert!(asking.hear("\"pid\"").starts_with("HTTP/1.1 200"));
    following.ask("/v1/events");
    assert!(following.hear("\r\n\r\n").contains("text/event-stream"));

    two.allow(Rights { send: true, ..NOTHING });
    asking.ask("/v1/host");
    let refused = asking.hear("--may observe");
    assert!(refused.contains("HTTP/1.1 403"), "{refused}");
    // The stream ends as it should, and so does not look broken.
    assert!(following.hear("0\r\n\r\n").ends_with("0\r\n\r\n"));
}
