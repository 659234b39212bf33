//! `howdah base push`, `pull`, `gc` and `verify --heal`, between two cloudlets.

use std::{
    fs,
    io::{self, Read},
    net::{Shutdown, TcpListener, TcpStream},
    process::Stdio,
    thread,
};

use howdah_api::{BasePull, BasePush, Kind, State};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    common::{Cloudlet, Ran, disk, key_of},
    error_table::listed,
    guests::wait_for,
    peers::Listener,
    serve::{Daemon, problem},
};

/// Two cloudlets, of which the second listens and lets the first do these things; nothing where VMs
/// cannot run, since nobody listens there.
fn pair(may: &str, flags: &[&str]) -> Option<(Cloudlet, Cloudlet, Listener)> {
    let (a, b) = (Cloudlet::new(), Cloudlet::new());
    b.line(&format!("peer add a {} --may {may}", key_of(&a))).ok();
    let listener = Listener::start(&b, flags)?;
    let add = format!("peer add b {} --address {}", key_of(&b), listener.address);
    a.line(&add).ok();
    Some((a, b, listener))
}

fn id_of(cloudlet: &Cloudlet, name: &str) -> String {
    let listed = cloudlet.line("base ls --json").ok().json();
    let named =
        |base: &&serde_json::Value| base["names"].as_array().unwrap().iter().any(|of| of == name);
    let found = listed.as_array().unwrap().iter().find(named).unwrap().clone();
    found["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_base_is_pushed_and_pulled_by_name() {
    let Some((a, b, mut listener)) = pair("push,pull", &[]) else { return };
    pushed_and_pulled(&a, &b, &mut listener);
}

#[test]
fn a_daemon_pushes_and_pulls_by_name() {
    let Some((a, b, mut listener)) = pair("push,pull", &[]) else { return };
    let daemon = Daemon::start(&a, &[]);
    pushed_and_pulled(&a, &b, &mut listener);
    let done = |kind| {
        let all = daemon.client.operations().unwrap();
        all.iter().filter(|of| of.kind == kind && of.state == State::Done).count()
    };
    assert_eq!((done(Kind::BasePush), done(Kind::BasePull)), (2, 1));
    let pull = BasePull { peer: "b".into(), called: Some("../x".into()) };
    assert_eq!(problem(daemon.client.pull_base("cold", &pull)).status, 400);
    let push = BasePush { peer: "b".into(), called: None };
    assert_eq!(problem(daemon.client.push_base("nothing", &push)).status, 404);
    assert_eq!(daemon.client.ping_peer("b", None).unwrap().bases.len(), 2);
    assert_eq!(problem(daemon.client.ping_peer("nobody", None)).status, 404);
    let nobody_there = daemon.client.ping_peer("b", Some("127.0.0.1:1"));
    assert_eq!(problem(nobody_there).status, 409);
}

fn pushed_and_pulled(a: &Cloudlet, b: &Cloudlet, listener: &mut Listener) {
    a.base_with_memory("warm", None).ok();
    let pushed = a.line("base push warm b --json").ok().json();
    assert_eq!((pushed["name"].as_str(), pushed["already"].as_bool()), (Some("warm"), Some(false)));
    b.line("base verify warm").ok();
    assert_eq!(id_of(b, "warm"), id_of(a, "warm"));
    let said: serde_json::Value = serde_json::from_str(&listener.says()).unwrap();
    assert_eq!((said["event"].as_str(), said["name"].as_str()), (Some("base-taken"), Some("warm")));
    let again = a.line("base push warm b").ok().stdout;
    assert!(again.contains("already"), "{again}");

    // Back, under another name, where the base it differs from is known.
    fs::write(b.path("disk.raw"), [disk(), vec![5; 4096]].concat()).unwrap();
    fs::write(b.path("kernel"), crate::common::kernel()).unwrap();
    b.line("base import cold --disk disk.raw --kernel kernel").ok();
    let pulled = a.line("base pull cold b --as frosty --json").ok().json();
    assert_eq!(
        (pulled["chunks_on_link"].as_u64(), pulled["name"].as_str()),
        (Some(1), Some("frosty"))
    );
    a.line("base verify frosty").ok();
    listed(&a.line("base pull nothing b").fails(3, &["nothing", "no such base"]));
    // A name that is another base's there stays where it is.
    listed(&a.line("base push frosty b --as warm").fails(4, &["another base there", "--as"]));
    a.line("base push frosty nobody").fails(3, &["nobody", "peer ls"]);
    a.line("base push frosty b --as ../x").fails(2, &["../x", "--as"]);
}

#[test]
fn peers_may_do_what_they_were_let() {
    let Some((a, b, _listener)) = pair("send,pull", &["--base-quota-gib", "0"]) else { return };
    a.base("tiny").ok();
    listed(&a.line("base push tiny b").fails(4, &["may not push", "peer add a"]));
    b.line(&format!("peer add a {} --may push --bases other", key_of(&a))).ok();
    listed(&a.line("base push tiny b").fails(4, &["may not push a base as tiny"]));
    listed(&a.line("base push tiny b --as other").fails(1, &["MiB more"]));
    a.line("base pull tiny b").fails(3, &["no such base"]);
    b.base("tiny").ok();
    listed(&a.line("base pull tiny b").fails(4, &["may not pull"]));
}

#[test]
fn a_damaged_base_is_healed_by_a_peer() {
    let Some((a, b, _listener)) = pair("pull", &[]) else { return };
    for cloudlet in [&a, &b] {
        cloudlet.base_with_memory("warm", None).ok();
    }
    spoil(&a, &id_of(&a, "warm"));
    a.line("base verify warm").fails(6, &["memory.raw"]);
    let healed = a.line("base verify warm --heal b --json").ok().json();
    assert_eq!(healed["chunks_on_link"], 1);
    a.line("base verify warm --heal b").ok();
    a.line("base verify warm").ok();

    // And by the daemon; a peer whose own is damaged is of no help.
    let daemon = Daemon::start(&a, &[]);
    spoil(&a, &id_of(&a, "warm"));
    let healed = a.line("base verify warm --heal b --json").ok().json();
    assert_eq!(healed["chunks_on_link"], 1);
    assert_eq!(daemon.client.operations().unwrap()[0].kind, Kind::BaseHeal);
    spoil(&a, &id_of(&a, "warm"));
    spoil(&b, &id_of(&b, "warm"));
    listed(&a.line("base verify warm --heal b --quiet").fails(6, &["at the peer is damaged"]));
}

fn spoil(cloudlet: &Cloudlet, id: &str) {
    let part = cloudlet.home().join("store/bases").join(id).join("memory.raw");
    let mut content = fs::read(&part).unwrap();
    content[5000] ^= 1;
    fs::remove_file(&part).unwrap();
    fs::write(&part, &content).unwrap();
}

/// Gives a daemon's operation up half-way, as the API does and as Ctrl-C does; it goes on where it ended.
#[test]
fn a_pull_is_given_up_and_goes_on() {
    let Some((a, b, listener)) = pair("pull", &[]) else { return };
    fs::write(b.path("disk.raw"), noise(6 << 20)).unwrap();
    fs::write(b.path("kernel"), crate::common::kernel()).unwrap();
    b.line("base import big --disk disk.raw --kernel kernel").ok();
    let daemon = Daemon::start(&a, &[]);
    let running = |id: &str| {
        let operation = daemon.client.operation(id).unwrap();
        assert_eq!(operation.state, State::Running, "{operation:?}");
        Some(operation).filter(|of| of.progress.done_bytes > 0)
    };
    // Behind the hashes and some of the contents nothing comes any more.
    let stalls = Stalls::before(&listener.address, 3 << 20);
    let pull = BasePull { peer: format!("b@{}", stalls.address), called: None };
    let begun = daemon.client.pull_base("big", &pull).unwrap();
    let seen = wait_for("chunks came", || running(&begun.id));
    assert!(seen.progress.done_bytes < seen.progress.total_bytes, "{seen:?}");
    daemon.client.cancel(&begun.id).unwrap();
    let ended = daemon.client.wait(&begun.id, 60).unwrap();
    assert_eq!(ended.state, State::Cancelled, "{ended:?}");
    assert_eq!(ended.error.unwrap().exit, 9);

    let stalls = Stalls::before(&listener.address, 1 << 20);
    let mut command = a.command();
    command.args(["base", "pull", "big", &format!("b@{}", stalls.address)]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = wait_for("it has begun", || {
        let all = daemon.client.operations().unwrap();
        all.into_iter().find(|of| of.state == State::Running)
    });
    wait_for("chunks were found", || running(&begun.id));
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    let ran = Ran::from(child.wait_with_output().unwrap());
    listed(&ran.fails(9, &["cancelled", "goes on where"]));
    assert_eq!(daemon.client.operation(&begun.id).unwrap().state, State::Cancelled);

    let pulled = a.line("base pull big b --json").ok().json();
    assert!(pulled["chunks_resumed"].as_u64().unwrap() >= 256, "{pulled}");
    a.line("base verify big").ok();
}

/// Bytes that do not compress.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

/// A way to a listener on which, towards the caller, so many bytes get through and then none.
struct Stalls {
    address: String,
}

impl Stalls {
    fn before(listener: &str, bytes: usize) -> Self {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = ours.local_addr().unwrap().to_string();
        let listener = listener.to_owned();
        thread::spawn(move || {
            let (caller, _) = ours.accept().unwrap();
            let called = TcpStream::connect(listener).unwrap();
            let (mut from, mut to) = (caller.try_clone().unwrap(), called.try_clone().unwrap());
            let up = thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            let _ = io::copy(&mut (&called).take(bytes as u64), &mut &caller);
            up.join().unwrap();
        });
        Self { address }
    }
}

#[test]
fn what_nothing_uses_is_collected() {
    let a = Cloudlet::new();
    a.base("tiny").ok();
    // Its name moves to another.
    fs::write(a.path("disk.raw"), [disk(), vec![5; 4096]].concat()).unwrap();
    a.line("base import tiny --disk disk.raw --kernel kernel").ok();
    let planned = a.line("base gc --dry-run --json").ok().json();
    assert!(planned["freed_bytes"].as_u64().unwrap() > 0);
    assert_eq!(a.line("base ls --json").json().as_array().unwrap().len(), 2);
    let said = a.line("base gc").ok().stdout;
    assert!(said.contains("kept: it is called tiny") && said.contains("removed"), "{said}");
    assert_eq!(a.line("base ls --json").json().as_array().unwrap().len(), 1);
    // Whoever has it open keeps it.
    let id = id_of(&a, "tiny");
    let manifest = a.home().join("store/bases").join(&id).join("manifest.json");
    let held = fs::File::open(manifest).unwrap();
    held.lock_shared().unwrap();
    let said = a.line("base gc --named").ok().stdout;
    assert!(said.contains("in use by process"), "{said}");
    drop(held);
    a.line("base gc --named").ok();
    assert!(a.line("base ls --json").json().as_array().unwrap().is_empty());
}
