//! The daemon: what it says through its API, and that commands and VMs get along with and without it.

use std::{
    fs,
    process::{Child, Stdio},
    time::Duration,
};

use howdah_api::{
    Client, ClientError, Event, HandoffSpec, Kind, PeerSpec, SOCKET, State, VmRun, VmState,
};

use crate::{
    common::{Cloudlet, key_of},
    guests::{Site, wait_for},
};

/// A daemon that ends with the test.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) client: Client,
}

impl Daemon {
    pub(crate) fn start(cloudlet: &Cloudlet, words: &[&str]) -> Self {
        let log = fs::File::create(cloudlet.path("serve.log")).unwrap();
        let mut command = cloudlet.command();
        command.arg("serve").args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap();
        let client = Client::new(cloudlet.home().join(SOCKET));
        wait_for("the daemon answers", || client.host().ok().filter(|host| host.pid == child.id()));
        Self { child, client }
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Tells it to end, as systemd does; how it did.
    fn stop(mut self) -> std::process::ExitStatus {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.child.wait().unwrap()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn problem<T: std::fmt::Debug>(answered: Result<T, ClientError>) -> howdah_api::Problem {
    match answered {
        Err(ClientError::Problem(problem)) => *problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn there_is_one_daemon_and_it_leaves_nothing() {
    let cloudlet = Cloudlet::new();
    let daemon = Daemon::start(&cloudlet, &[]);
    cloudlet.line("serve").fails(4, &["one runs already"]);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(cloudlet.home().join(SOCKET)).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    // Whoever follows is told of the end, and does not hold it up.
    let events = daemon.client.events().unwrap();
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(events.count(), 0);
    assert!(!cloudlet.home().join(SOCKET).exists());
    // Killed, it leaves a socket that nobody answers at: neither commands nor the next one mind.
    Daemon::start(&cloudlet, &[]).kill();
    assert!(cloudlet.home().join(SOCKET).exists());
    cloudlet.line("vm ls").ok();
    Daemon::start(&cloudlet, &[]).client.vms().unwrap();
}

#[test]
fn commands_say_the_same_with_and_without_a_daemon() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("edge").ok();
    let lines = [
        "vm ls --json",
        "vm ls",
        "base ls --json",
        "base verify edge --json",
        "vm inspect nobody",
        "vm pause nobody",
        "vm rm nobody",
        "base rm nothing",
        "base verify nothing",
        "vm run web --detach",
        "vm run web --base nothing --detach",
        "handoff nobody elsewhere",
        "base push edge nobody",
        "base push nothing nobody",
        "base push edge deaf --as ../x",
        "base push edge deaf",
        "base pull edge 127.0.0.1:9",
        "base pull edge away@127.0.0.1:1",
        "base verify edge --heal nobody",
        "base gc --dry-run",
        "base gc --dry-run --named --json",
        "identity",
        "identity --json",
        "peer rm nobody",
        "peer add again howdah:OWN",
        "peer add deaf howdah:AWAY",
        "peer add away howdah:AWAY --address nowhere",
        "peer add away howdah:AWAY --may send,pull --bases edge --for-days 7",
        "peer add away howdah:AWAY --address 127.0.0.1:1 --json",
        "peer ls",
        "peer ls --json",
        "peer ls --quiet",
        "peer ping nobody",
        "peer ping away@127.0.0.1:1",
    ];
    let [deaf, away] = [0; 2].map(|_| key_of(&Cloudlet::new()));
    for (name, key) in [("deaf", &deaf), ("away", &away)] {
        cloudlet.line(&format!("peer add {name} {key}")).ok();
    }
    let own = key_of(&cloudlet);
    let ran = |line: &&str| {
        let line = line.replace("howdah:OWN", &own).replace("howdah:AWAY", &away);
        let ran = cloudlet.line(&line);
        (ran.code, ran.stdout, ran.stderr)
    };
    let without: Vec<_> = lines.iter().map(ran).collect();
    let daemon = Daemon::start(&cloudlet, &[]);
    for (line, without) in lines.iter().zip(without) {
        assert_eq!(ran(line), without, "{line}");
    }
    assert!(cloudlet.line("peer rm deaf").ok().stdout.contains("peer deaf removed"));
    assert!(daemon.client.peers().unwrap().iter().all(|peer| peer.name != "deaf"));
    cloudlet.line("base rm edge").ok();
    assert!(daemon.client.bases().unwrap().is_empty());
}

#[test]
fn peers_and_operations_by_api() {
    let (cloudlet, other) = (Cloudlet::new(), Cloudlet::new());
    cloudlet.base("edge").ok();
    let daemon = Daemon::start(&cloudlet, &[]);
    let key = key_of(&other);
    let spec = PeerSpec {
        key: key.clone(),
        address: Some("10.0.0.2:7070".into()),
        api: None,
        rights: None,
        bases: None,
        until: None,
    };
    for _ in 0..2 {
        assert_eq!(daemon.client.put_peer("b", &spec).unwrap().key, key);
    }
    assert!(cloudlet.line("peer ls").ok().stdout.contains("10.0.0.2:7070"));
    let own = PeerSpec { key: key_of(&cloudlet), ..spec.clone() };
    let own = problem(daemon.client.put_peer("me", &own));
    assert_eq!((own.status, own.exit, own.kind.as_str()), (422, 2, "usage"));
    assert_eq!(problem(daemon.client.put_peer("c", &spec)).status, 409);
    daemon.client.remove_peer("b").unwrap();

    let mut events = daemon.client.events().unwrap();
    let begun = daemon.client.verify_base("edge").unwrap();
    let ended = daemon.client.wait(&begun.id, 30).unwrap();
    assert_eq!((ended.state, ended.subject.as_str()), (State::Done, "edge"));
    assert!(ended.ended_at_ms >= Some(ended.started_at_ms));
    let told = events.find_map(|event| match event {
        Event::Operation { operation } if operation.state.is_over() => Some(*operation),
        _ => None,
    });
    assert_eq!(told, Some(ended.clone()));
    assert_eq!(daemon.client.cancel(&begun.id).unwrap(), ended, "what is over stays as it is");
    assert_eq!(problem(daemon.client.operation("00")).status, 404);

    let keyed = daemon.client.with_key("one");
    let id = |client: &Client| client.verify_base("edge").unwrap().id;
    assert_eq!(id(&keyed), id(&keyed), "it is done once");
    assert_ne!(id(&keyed), id(&daemon.client.with_key("two")));
    assert_eq!(problem(keyed.pause("edge")).status, 409, "another request");
}

#[test]
fn settings_come_from_a_file_and_flags() {
    let cloudlet = Cloudlet::new();
    let text = "[api]\nsocket_mode = 640\n[receive]\nmin_free_mib = 7\n";
    cloudlet.file("home/howdah.toml", text.as_bytes());
    let shown = cloudlet.line("config show --receive-min-free-mib=9 --json").ok().json();
    let settings = shown["settings"].as_array().unwrap();
    let of = |key: &str| settings.iter().find(|s| s["key"] == key).unwrap();
    assert_eq!(
        (&of("api.socket_mode")["value"], &of("api.socket_mode")["from"]),
        (&"640".into(), &"file".into())
    );
    assert_eq!(
        (&of("receive.min_free_mib")["value"], &of("receive.min_free_mib")["from"]),
        (&"9".into(), &"flag".into())
    );
    cloudlet.file("home/howdah.toml", b"[api]\nsokket = 1\n");
    cloudlet.line("serve").fails(2, &["howdah.toml", "api.sokket is no setting", "config show"]);
    let example = cloudlet.line("config example").ok().stdout;
    cloudlet.file("home/howdah.toml", example.as_bytes());
    cloudlet.line("config show").ok();
}

#[test]
fn a_vm_outlives_its_daemon_and_goes_on_to_another_cloudlet() {
    let Some(site) = Site::new() else { return };
    site.warm();
    let twin = site.twin();
    fs::remove_file(twin.0.home().join("identity")).ok();
    let there = Daemon::start(&twin.0, &["--receive-listen", "127.0.0.1:0"]);
    let here = Daemon::start(&site.0, &[]);
    let run = VmRun { name: "a".into(), base: Some("warm".into()), ..VmRun::default() };
    let running = here.client.run(&run).unwrap();
    assert_eq!(
        (running.state, running.started.unwrap().from.as_str()),
        (VmState::Running, "base-memory")
    );
    assert_eq!(problem(here.client.run(&run)).status, 409);
    let pid = |client: &Client| client.vm("a").unwrap().process.map(|process| process.pid);
    let before = pid(&here.client);
    here.client.pause("a").unwrap();

    // The daemon is killed, and another finds the VM as it was.
    here.kill();
    let here = Daemon::start(&site.0, &[]);
    assert_eq!(here.client.vm("a").unwrap().state, VmState::Paused);
    assert_eq!(pid(&here.client), before);
    assert_eq!(here.client.resume("a").unwrap().state, VmState::Running);

    let address = there.client.host().unwrap().receive.unwrap().address;
    let spec =
        |key, address| PeerSpec { key, address, api: None, rights: None, bases: None, until: None };
    there.client.put_peer("here", &spec(key_of(&site.0), None)).unwrap();
    here.client.put_peer("there", &spec(key_of(&twin.0), Some(address))).unwrap();
    let mut events = there.client.events().unwrap();
    let report = site.0.line("handoff a there --json").ok().json();
    assert!(report["downtime_ms"].is_number(), "{report}");
    let operation = here.client.operations().unwrap().remove(0);
    assert_eq!(operation.state, State::Done);
    assert!(operation.peer.unwrap().starts_with("there "));
    assert_eq!(operation.result, Some(report));
    assert_eq!(there.client.vm("a").unwrap().state, VmState::Running);
    assert_eq!(here.client.vm("a").unwrap().state, VmState::HandedOff);
    let received = events.find_map(|event| match event {
        Event::Receive { what } if what["event"] == "received" => Some(what),
        _ => None,
    });
    assert_eq!(received.unwrap()["vm"], "a");
    assert_eq!(there.stop().code(), Some(0));
    std::thread::sleep(Duration::from_millis(100));
    assert!(twin.0.line("vm ls").ok().stdout.contains("running"), "it outlives the listener");
}

/// A handoff is its VM's process's: a daemon that starts finds it, and can give it up.
#[test]
fn a_handoff_outlives_its_daemon() {
    let Some(site) = Site::new() else { return };
    site.warm();
    let daemon = Daemon::start(&site.0, &[]);
    site.0.line("vm run a --base warm --detach").ok();
    // Somebody who takes links and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = silent.local_addr().unwrap().to_string();
    let spec = HandoffSpec { peer: peer.clone(), plain: true, ..HandoffSpec::default() };
    let begun = daemon.client.handoff("a", &spec).unwrap();
    assert_eq!((begun.kind, begun.state), (Kind::Handoff, State::Running));
    let second = daemon.client.handoff("a", &spec).unwrap();
    let second = daemon.client.wait(&second.id, 30).unwrap();
    assert_eq!(second.error.unwrap().kind, "conflict", "it is being handed off");
    wait_for("it is handed off", || {
        (daemon.client.vm("a").unwrap().state == VmState::HandingOff).then_some(())
    });
    daemon.kill();

    let daemon = Daemon::start(&site.0, &[]);
    let found = wait_for("it is found", || daemon.client.operations().unwrap().pop());
    assert_eq!(
        (found.kind, found.state, found.subject.as_str()),
        (Kind::Handoff, State::Running, "a")
    );
    assert_ne!(found.id, begun.id);
    daemon.client.cancel(&found.id).unwrap();
    let ended = daemon.client.wait(&found.id, 30).unwrap();
    assert_eq!(ended.state, State::Cancelled);
    assert_eq!(daemon.client.vm("a").unwrap().state, VmState::Running);
}
