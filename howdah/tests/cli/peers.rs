//! Who may call, and what strangers hear.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use guest_images::BaseId;
use handoff::{
    Connect, Geometry, Offer, Transport,
    ownership::{Epoch, HandoffId, Journal, Question, Record, State, Verdict, VmId},
    tls::{Identity, PeerKey, TlsConnect},
    wire::{Frame, FrameReader, Hello, Intent, Versions, write_frame},
};

use crate::{
    common::{Cloudlet, key_of},
    error_table::listed,
};

const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn a_cloudlet_has_one_key_and_knows_others() {
    let (a, b) = (Cloudlet::new(), Cloudlet::new());
    let key = key_of(&b);
    assert_eq!(key, key_of(&b));
    assert_ne!(key, key_of(&a));
    assert_eq!(a.line("peer ls --json").ok().json(), serde_json::json!([]));
    let add =
        format!("peer add b {key} --address 127.0.0.1:7070 --may receive --bases web --for-days 3");
    a.line(&add).ok();
    let shown = a.line("peer ls").ok().stdout;
    for word in ["b", "127.0.0.1:7070", "receive", "web", "3 days", &key] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    a.line(&format!("peer add c {key}")).fails(4, &["peer b", "peer rm"]);
    a.line("peer add d howdah:abc").fails(2, &["howdah identity"]);
    let own = key_of(&a);
    a.line(&format!("peer add me {own}")).fails(2, &["own key"]);
    a.line("peer rm b").ok();
    a.line("peer rm b").fails(3, &["peer ls"]);
}

/// A listener with its first line, which says where; `None` where VMs cannot run.
pub(crate) struct Listener {
    child: Child,
    out: BufReader<ChildStdout>,
    pub(crate) address: String,
}

impl Listener {
    pub(crate) fn start(cloudlet: &Cloudlet, flags: &[&str]) -> Option<Self> {
        let mut command = cloudlet.command();
        command.args(["receive", "--listen", "127.0.0.1:0", "--json"]).args(flags);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut listener = Self { child, out, address: String::new() };
        let said: serde_json::Value = serde_json::from_str(&listener.says()).ok()?;
        listener.address = said["address"].as_str()?.to_owned();
        Some(listener)
    }

    pub(crate) fn says(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the listener says to this first frame, if any is said.
fn told(listener: &Listener, by: &Identity, to: PeerKey, first: Option<Frame>) -> Frame {
    let own = Identity::from_pem(by.to_pem().as_bytes()).unwrap();
    let mut connect = TlsConnect::new(listener.address.clone(), own.into(), to);
    let (mut tx, rx) = connect.connect(PATIENCE).unwrap().split().unwrap();
    if let Some(frame) = first {
        write_frame(&mut tx, &frame, &mut Vec::new()).unwrap();
    }
    let (mut reader, begun) = (FrameReader::new(rx), Instant::now());
    loop {
        match reader.read_frame().unwrap() {
            Some(Frame::Ping(_)) | None => assert!(begun.elapsed() < PATIENCE),
            Some(frame) => return frame,
        }
    }
}

fn refused(listener: &Listener, by: &Identity, to: PeerKey, first: Option<Frame>) -> String {
    match told(listener, by, to, first) {
        Frame::Refuse(refusal) => refusal.to_string(),
        other => panic!("let in: {other:?}"),
    }
}

fn hello(vm_name: &str, intent: Intent) -> Hello {
    let handoff = Question { vm: VmId([1; 16]), handoff: HandoffId([2; 16]), epoch: Epoch(2) };
    Hello { versions: Versions::OURS, handoff, vm_name: vm_name.into(), intent, audit: false }
}

fn offer(base: BaseId) -> Intent {
    Intent::New(Offer {
        vm_name: "web".into(),
        base,
        geometry: Geometry { ram_chunks: 8192, disk_chunks: 3 },
        changed_disk_chunks: 0,
        machine: Vec::new(),
        also: Vec::new(),
        known: Vec::new(),
    })
}

fn frame(hello: Hello) -> Option<Frame> {
    Some(Frame::Hello(Box::new(hello)))
}

#[test]
fn a_peer_may_do_what_is_said_and_no_more() {
    let cloudlet = Cloudlet::new();
    let key: PeerKey = key_of(&cloudlet).parse().unwrap();
    let Some(listener) = Listener::start(&cloudlet, &[]) else { return };
    let peer = Identity::generate().unwrap();
    let add = |flags: &str| {
        cloudlet.line(&format!("peer add a {} {flags}", peer.key())).ok();
    };
    let offered = || frame(hello("web", offer(BaseId([7; 32]))));
    add("--may receive");
    let why = refused(&listener, &peer, key, offered());
    assert!(why.contains("may not hand VMs off"), "{why}");
    add("--bases tiny");
    let why = refused(&listener, &peer, key, offered());
    assert!(why.contains("may not hand off VMs of base"), "{why}");
    let book = cloudlet.home().join("peers.json");
    let text = std::fs::read_to_string(&book).unwrap();
    cloudlet.file("home/new", text.replace("\"rights\"", "\"until\": 1, \"rights\"").as_bytes());
    std::fs::rename(cloudlet.path("home/new"), &book).unwrap();
    let why = refused(&listener, &peer, key, offered());
    assert!(why.contains("is over"), "{why}");
    // With all rights it gets as far as the base that is not there, and as the version.
    add("");
    let why = refused(&listener, &peer, key, offered());
    assert!(why.contains("base"), "{why}");
    // By another name: the process that refused the last one may still be on its way out, and would
    // be given the link of what looks like the same handoff.
    let old =
        Hello { versions: Versions { min: 1, max: 1 }, ..hello("old", offer(BaseId([7; 32]))) };
    let why = refused(&listener, &peer, key, frame(old));
    assert!(why.contains("protocol 1"), "{why}");
    cloudlet.line("peer rm a").ok();
    let why = refused(&listener, &peer, key, offered());
    assert!(why.contains("not known"), "{why}");
    assert!(!cloudlet.home().join("vms/web/disk.map").exists());
}

/// What became of a handoff is between its two sides.
#[test]
fn a_handoff_is_nobody_elses() {
    let cloudlet = Cloudlet::new();
    let key: PeerKey = key_of(&cloudlet).parse().unwrap();
    let [party, other] = [0; 2].map(|_| Identity::generate().unwrap());
    for (name, peer) in [("party", &party), ("other", &other)] {
        cloudlet.line(&format!("peer add {name} {}", peer.key())).ok();
    }
    let state = State::Released {
        handoff: HandoffId([2; 16]),
        peer: format!("{}@127.0.0.1:9", party.key()),
    };
    let config =
        r#"{"version":1,"base":"00","memory_mib":64,"vcpus":1,"tap":null,"mac":null,"append":""}"#;
    cloudlet.file("home/vms/web/config.json", config.as_bytes());
    let path = cloudlet.home().join("vms/web/ownership");
    let record = Record { vm: VmId([1; 16]), epoch: Epoch(2), state };
    Journal::open(path).unwrap().write(record).unwrap();
    let listed = cloudlet.line("vm ls").ok().stdout;
    assert!(listed.contains("party at 127.0.0.1:9"), "{listed}");
    let Some(listener) = Listener::start(&cloudlet, &[]) else { return };
    let settle = || frame(hello("web", Intent::Settle));
    let why = refused(&listener, &other, key, settle());
    assert!(why.contains("between other cloudlets"), "{why}");
    let said = told(&listener, &party, key, settle());
    assert!(matches!(said, Frame::Status { verdict: Verdict::Released, .. }), "{said:?}");
}

#[test]
fn strangers_are_turned_away_and_told_of_once() {
    let cloudlet = Cloudlet::new();
    let key: PeerKey = key_of(&cloudlet).parse().unwrap();
    let Some(mut listener) = Listener::start(&cloudlet, &[]) else { return };
    let stranger = Identity::generate().unwrap();
    for _ in 0..3 {
        let why = refused(&listener, &stranger, key, None);
        assert!(why.contains("not known"), "{why}");
    }
    let said = listener.says();
    assert!(said.contains("dropped") && said.contains(&stranger.key().to_string()), "{said}");
    // Without TLS, and without sense.
    let mut plain = TcpStream::connect(&listener.address).unwrap();
    plain.write_all(&[&[200, 1, 0, 0, 1][..], b"howdah/h"].concat()).unwrap();
    let mut heard = Vec::new();
    plain.read_to_end(&mut heard).unwrap();
    assert!(String::from_utf8_lossy(&heard).contains("--plain"), "{heard:?}");
    // The stranger's other calls made no line.
    let said = listener.says();
    assert!(said.contains("without TLS"), "{said}");
    TcpStream::connect(&listener.address).unwrap().write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    assert!(listener.says().contains("does not speak TLS"));
}

#[test]
fn a_plain_listener_says_what_it_is() {
    let cloudlet = Cloudlet::new();
    let Some(mut listener) = Listener::start(&cloudlet, &["--plain"]) else { return };
    let own = Identity::generate().unwrap();
    let mut connect =
        TlsConnect::new(listener.address.clone(), own.into(), Identity::generate().unwrap().key());
    let error = connect.connect(PATIENCE).err().unwrap();
    assert!(error.to_string().contains("--plain"), "{error}");
    assert!(listener.says().contains("speaks TLS"));
}

#[test]
fn one_address_cannot_hold_the_door() {
    let cloudlet = Cloudlet::new();
    let Some(mut listener) = Listener::start(&cloudlet, &[]) else { return };
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(&listener.address).unwrap()).collect();
    let said = listener.says();
    assert!(said.contains("too many links at once from that address"), "{said}");
    drop(silent);
}

/// Known to each other by their keys, `b` with a base.
fn acquainted(a: &Cloudlet, b: &Cloudlet, may: &str) -> Option<Listener> {
    b.base("web").ok();
    b.line(&format!("peer add a {} --may {may}", key_of(a))).ok();
    let listener = Listener::start(b, &[])?;
    a.line(&format!("peer add b {} --address {}", key_of(b), listener.address)).ok();
    Some(listener)
}

#[test]
fn a_peer_says_how_it_is_and_what_could_go_there() {
    let (a, b) = (Cloudlet::new(), Cloudlet::new());
    let Some(listener) = acquainted(&a, &b, "send") else { return };
    let dir = a.home().join("vms/guest");
    std::fs::create_dir_all(&dir).unwrap();
    let config = r#"{"version":2,"base":"0000000000000000000000000000000000000000000000000000000000000000",
        "memory_mib":64,"vcpus":1,"tap":null,"mac":"02:00:00:00:00:01","append":""}"#;
    std::fs::write(dir.join("config.json"), config).unwrap();
    let record = Record::created(VmId([3; 16]));
    Journal::open(dir.join("ownership")).unwrap().write(record).unwrap();

    let said = a.line("peer ping b --json").ok().json();
    assert_eq!(said["takes_vms"], true, "{said}");
    assert_eq!(said["bases"][0]["names"], serde_json::json!(["web"]), "{said}");
    assert!(said["round_trip_ms"].as_f64().unwrap() > 0.0, "{said}");
    assert!(said["available_memory_bytes"].as_u64().unwrap() > 0, "{said}");
    let guest = &said["vms"][0];
    assert_eq!((&guest["vm"], &guest["could_go"]), (&"guest".into(), &false.into()), "{said}");
    let why = guest["why_not"].to_string();
    assert!(
        why.contains("does not hold base 0000") && why.contains("gives guests no network"),
        "{why}"
    );
    let shown = a.line("peer ping b").ok().stdout;
    assert!(shown.contains("round trip") && shown.contains("WHY NOT"), "{shown}");

    // What the peer may is its host's to say, and so is what it is told.
    b.line(&format!("peer add a {} --may receive --bases other", key_of(&a))).ok();
    let said = a.line("peer ping b --json").ok().json();
    assert_eq!(
        (&said["takes_vms"], &said["bases"]),
        (&false.into(), &serde_json::json!([])),
        "{said}"
    );
    b.line("peer rm a").ok();
    listed(&a.line("peer ping b").fails(4, &["not known here"]));
    drop(listener);
    listed(&a.line("peer ping b").fails(1, &["howdah receive"]));
}
