//! Every mistake a user can make gets one line that names the thing and the way out. None of these
//! needs KVM.

use std::{fs, net::TcpListener};

use crate::common::Cloudlet;
use handoff::ownership::{HandoffId, Journal, Record, State, VmId};

pub(crate) const OWNER: fn(Record) -> Record = |record| record;

/// A VM that was created here and is not running, with the record that `change` makes.
pub(crate) fn stopped(cloudlet: &Cloudlet, name: &str, change: impl Fn(Record) -> Record) {
    let id = cloudlet.line("base ls --json").json()[0]["id"].as_str().unwrap().to_owned();
    let config = format!(
        r#"{{"version":1,"base":"{id}","memory_mib":64,"vcpus":1,"tap":null,"mac":null,"append":""}}"#
    );
    cloudlet.file(&format!("home/vms/{name}/config.json"), config.as_bytes());
    let path = cloudlet.home().join("vms").join(name).join("ownership");
    Journal::open(path).unwrap().write(change(Record::created(VmId([1; 16])))).unwrap();
}

pub(crate) fn released(peer: &str) -> impl Fn(Record) -> Record {
    let state = State::Released { handoff: HandoffId([2; 16]), peer: peer.into() };
    move |record| Record { state: state.clone(), ..record }
}

pub(crate) fn committed(peer: &str) -> impl Fn(Record) -> Record {
    let root = handoff::StateRoot([3; 32]);
    let state = State::Committed { handoff: HandoffId([2; 16]), peer: peer.into(), root };
    move |record| Record { state: state.clone(), ..record }
}

#[test]
fn wrong_words() {
    let cloudlet = Cloudlet::new();
    cloudlet.line("fly").fails(2, &["fly", "howdah --help"]);
    cloudlet.line("vm run").fails(2, &["NAME", "howdah vm run --help"]);
    cloudlet.line("vm run a --memory-mib many").fails(2, &["many", "--memory-mib"]);
    cloudlet.line("vm run a --memory-mib 0").fails(2, &["--memory-mib"]);
    cloudlet.line("vm run a --vcpus 0").fails(2, &["--vcpus"]);
    cloudlet.line("vm run a --mac 01:02:03:04:05:06").fails(2, &["multicast"]);
    cloudlet.line("vm stop ../../etc").fails(2, &["../../etc"]);
    cloudlet.line("base import a").fails(2, &["--disk"]);
    cloudlet.line("base import a --disk d --memory m").fails(2, &["--kernel"]);
    cloudlet.line("receive --listen nowhere").fails(2, &["nowhere", "--listen"]);
    cloudlet.line("handoff a").fails(2, &["PEER"]);
    cloudlet.line("handoff a b:1 --without all").fails(2, &["all", "base-memory"]);
    cloudlet.line("handoff a b:1 --delta best").fails(2, &["best", "xor"]);
    cloudlet.line("handoff a b:1 --keep-mib some").fails(2, &["some", "--keep-mib"]);
    cloudlet.line("handoff a --cancel --keep-mib 0").fails(2, &["--keep-mib"]);
    cloudlet.line("save a").fails(2, &["FILE"]);
    let ran = cloudlet.line("vm inspect --json").fails(2, &["NAME"]);
    assert_eq!(ran.json()["error"]["exit"], 2);
}

#[test]
fn bases_that_cannot_be_built_with_memory() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    cloudlet.line("base build --from nowhere --name warm").fails(3, &["nowhere"]);
    cloudlet
        .line("base build --from tiny --name warm --mac 02:00:00:00:00:01")
        .fails(2, &["--tap"]);
    cloudlet.line("base build tiny --vcpus 2").fails(2, &["--boot"]);
    let append = ["base", "build", "--from", "tiny", "--name", "warm", "--append", "a\nb"];
    cloudlet.run(&append).fails(2, &["--append"]);
    cloudlet.file("ram", &[7; 4096]);
    cloudlet.file("machine", b"not a machine");
    let import = "base import x --disk disk.raw --kernel kernel --memory ram --machine";
    cloudlet.line(&format!("{import} missing")).fails(3, &["missing"]);
    cloudlet.line(&format!("{import} machine")).fails(6, &["machine"]);
}

#[test]
fn flags_that_contradict_a_base_with_memory() {
    let cloudlet = Cloudlet::new();
    cloudlet.base_with_memory("warm", None).ok();
    cloudlet.base_with_memory("wired", Some([2, 0, 0, 0, 0, 1])).ok();
    let warm = |flags: &str| cloudlet.line(&format!("vm run a --base warm {flags}"));
    warm("--memory-mib 512").fails(2, &["--memory-mib", "32 MiB"]);
    warm("--memory-mib 512 --cold").fails(2, &["--memory-mib", "32 MiB"]);
    warm("--vcpus 1").fails(2, &["--vcpus", "2 vCPUs", "--cold"]);
    warm("--tap t0").fails(2, &["--tap", "no network device", "--cold"]);
    warm("--append quiet").fails(2, &["--append", "--cold"]);
    let wired = |flags: &str| cloudlet.line(&format!("vm run a --base wired {flags}"));
    wired("").fails(2, &["network device", "--tap", "--cold"]);
    let mac = "--mac 02:00:00:00:00:02 --tap t0";
    wired(mac).fails(2, &["--mac", "02:00:00:00:00:01", "--cold"]);
    assert_eq!(cloudlet.line("vm ls --json").json(), serde_json::json!([]));
}

#[test]
fn help_is_help() {
    let cloudlet = Cloudlet::new();
    for line in ["--help", "vm run --help", "handoff --help", "receive -h", "--version"] {
        let ran = cloudlet.line(line).ok();
        assert!(!ran.stdout.is_empty() && ran.stderr.is_empty(), "{ran:?}");
    }
    assert!(cloudlet.line("--help").stdout.contains("Exit codes"));
}

#[test]
fn vms_that_are_not_there() {
    let cloudlet = Cloudlet::new();
    for line in [
        "vm inspect a",
        "vm stop a",
        "vm pause a",
        "vm rm a",
        "vm console a",
        "handoff a --plain 127.0.0.1:1",
        "save a file",
    ] {
        cloudlet.line(line).fails(3, &["VM a", "howdah vm ls"]);
    }
    let ran = cloudlet.line("vm ls --json").ok();
    assert_eq!(ran.json(), serde_json::json!([]));
}

#[test]
fn vms_that_do_not_run() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    stopped(&cloudlet, "a", OWNER);
    for line in [
        "vm stop a",
        "vm pause a",
        "vm resume a",
        "vm console a",
        "handoff a --plain 127.0.0.1:1",
        "save a file",
    ] {
        cloudlet.line(line).fails(4, &["VM a", "not running", "howdah vm run a"]);
    }
    // A socket and a pid that a dead process left prove nothing.
    cloudlet.file("home/vms/a/control.sock", b"");
    cloudlet.file("home/vms/a/lock", b"1\n");
    let seen = cloudlet.line("vm ls --json").ok().json();
    assert_eq!(seen[0]["state"], "stopped");
    cloudlet.line("vm takeover a --reason x").fails(4, &["VM a"]);
    cloudlet.line("base rm tiny").fails(4, &["tiny", "VM a", "howdah vm rm a"]);
    cloudlet.line("vm rm a").ok();
    cloudlet.line("base rm tiny").ok();
}

#[test]
fn vms_that_are_elsewhere() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    stopped(&cloudlet, "gone", released("b:7070"));
    stopped(&cloudlet, "doubt", committed("127.0.0.1:1"));
    let seen = cloudlet.line("vm ls --json").ok().json();
    assert_eq!((&seen[0]["state"], &seen[1]["state"]), (&"in-doubt".into(), &"handed-off".into()));
    cloudlet.line("vm stop gone").fails(4, &["b:7070"]);
    cloudlet.line("vm rm doubt").fails(4, &["doubt", "127.0.0.1:1", "takeover"]);
    cloudlet.line("vm takeover gone --reason x").fails(4, &["gone"]);
    cloudlet.line("vm takeover doubt --reason lost").ok();
    let seen = cloudlet.line("vm inspect doubt --json").ok().json();
    assert_eq!((&seen["state"], &seen["record"]["epoch"]), (&"stopped".into(), &2.into()));
    assert!(seen["record"]["ownership"].as_str().unwrap().contains("lost"), "{seen}");
    cloudlet.line("vm rm gone").ok();
}

#[test]
fn damage_is_shown_not_guessed_at() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    stopped(&cloudlet, "a", OWNER);
    let path = cloudlet.home().join("vms/a/ownership");
    let mut record = fs::read(&path).unwrap();
    record.truncate(record.len() - 1);
    fs::write(&path, &record).unwrap();
    let seen = cloudlet.line("vm ls --json").ok().json();
    assert_eq!(seen[0]["state"], "damaged");
    cloudlet.line("vm rm a").fails(6, &["VM a", "ownership", "may run elsewhere"]);
    cloudlet.line("vm takeover a --reason x").fails(6, &["ownership"]);
    stopped(&cloudlet, "b", OWNER);
    cloudlet.file("home/vms/b/config.json", b"{}");
    cloudlet.line("vm export-disk b out.raw").fails(6, &["config.json"]);
    // What belongs to nobody can go.
    cloudlet.file("home/vms/c/disk.data", b"");
    let seen = cloudlet.line("vm inspect c --json").ok().json();
    assert_eq!(seen["state"], "unfinished");
    cloudlet.line("vm rm c").ok();
}

#[test]
fn a_taken_port_and_a_foreign_address() {
    let cloudlet = Cloudlet::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    cloudlet.run(&["receive", "--listen", &address]).fails(1, &[&address, "another program"]);
    cloudlet.line("receive --listen 192.0.2.1:7070").fails(1, &["192.0.2.1:7070", "no interface"]);
}

#[test]
fn bad_peers() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    stopped(&cloudlet, "a", OWNER);
    cloudlet.line("handoff a nowhere").fails(3, &["nowhere", "HOST:PORT"]);
    cloudlet.line("handoff a --plain nowhere").fails(2, &["nowhere", "HOST:PORT"]);
    cloudlet.line("handoff a 127.0.0.1:70707").fails(2, &["127.0.0.1:70707"]);
    cloudlet.line("handoff a --cancel").fails(4, &["not running"]);
}

#[test]
fn a_home_that_cannot_be() {
    let cloudlet = Cloudlet::new();
    cloudlet.file("file", b"");
    cloudlet.line("--home file/sub base ls").fails(1, &["file/sub"]);
    cloudlet.line("--home file/sub vm ls").fails(1, &["file/sub"]);
}

#[test]
fn processes_started_by_hand_say_what_to_use() {
    let cloudlet = Cloudlet::new();
    let ran = cloudlet.line("receive-process a --min-free-mib 0");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    // Whoever starts it as it is meant to removes what it leaves.
    std::fs::remove_dir(cloudlet.home().join("vms/a")).unwrap();
    cloudlet.line("vm-process a").fails(3, &["VM a"]);
}
