//! Who may call, and what strangers hear.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use handoff::{
    Connect, Transport,
    tls::{Identity, PeerKey, TlsConnect},
    wire::{Frame, FrameReader},
};

use crate::common::Cloudlet;

const PATIENCE: Duration = Duration::from_secs(10);

fn key_of(cloudlet: &Cloudlet) -> String {
    let shown = cloudlet.line("identity --json").ok().json();
    shown["key"].as_str().unwrap().to_owned()
}

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
    let listed = a.line("peer ls").ok().stdout;
    for word in ["b", "127.0.0.1:7070", "receive", "web", "3 days", &key] {
        assert!(listed.contains(word), "{word}: {listed}");
    }
    a.line(&format!("peer add c {key}")).fails(4, &["peer b", "peer rm"]);
    a.line("peer add d howdah:abc").fails(2, &["howdah identity"]);
    let own = key_of(&a);
    a.line(&format!("peer add me {own}")).fails(2, &["own key"]);
    a.line("peer rm b").ok();
    a.line("peer rm b").fails(3, &["peer ls"]);
}

/// A listener with its first line, which says where; `None` where VMs cannot run.
struct Listener {
    child: Child,
    out: BufReader<ChildStdout>,
    address: String,
}

impl Listener {
    fn start(cloudlet: &Cloudlet, flags: &[&str]) -> Option<Self> {
        let mut command = cloudlet.command();
        command.args(["receive", "--listen", "127.0.0.1:0", "--json"]).args(flags);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut listener = Self { child, out, address: String::new() };
        let said: serde_json::Value = serde_json::from_str(&listener.says()).ok()?;
        listener.address = said["address"].as_str()?.to_owned();
        Some(listener)
    }

    fn says(&mut self) -> String {
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

fn called(listener: &Listener, by: &Identity, to: PeerKey) -> Frame {
    let mut connect = TlsConnect::new(
        listener.address.clone(),
        Identity::from_pem(by.to_pem().as_bytes()).unwrap().into(),
        to,
    );
    let link = connect.connect(PATIENCE).unwrap();
    let (_tx, rx) = link.split().unwrap();
    let (mut reader, begun) = (FrameReader::new(rx), Instant::now());
    loop {
        if let Some(frame) = reader.read_frame().unwrap() {
            return frame;
        }
        assert!(begun.elapsed() < PATIENCE);
    }
}

#[test]
fn strangers_are_turned_away_and_told_of_once() {
    let cloudlet = Cloudlet::new();
    let key: PeerKey = key_of(&cloudlet).parse().unwrap();
    let Some(mut listener) = Listener::start(&cloudlet, &[]) else { return };
    let stranger = Identity::generate().unwrap();
    for _ in 0..3 {
        let Frame::Refuse(refusal) = called(&listener, &stranger, key) else { panic!("let in") };
        assert!(refusal.to_string().contains("not known"), "{refusal}");
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
