//! `howdah base push`, `pull`, `gc` and `verify --heal`, between two cloudlets.

use std::fs;

use crate::{
    common::{Cloudlet, disk, key_of},
    peers::Listener,
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
    a.base_with_memory("warm", None).ok();
    let pushed = a.line("base push warm b --json").ok().json();
    assert_eq!((pushed["name"].as_str(), pushed["already"].as_bool()), (Some("warm"), Some(false)));
    b.line("base verify warm").ok();
    assert_eq!(id_of(&b, "warm"), id_of(&a, "warm"));
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
    a.line("base pull nothing b").fails(3, &["nothing", "no such base"]);
    // A name that is another base's there stays where it is.
    a.line("base push frosty b --as warm").fails(4, &["another base there", "--as"]);
    a.line("base push frosty nobody").fails(3, &["nobody", "peer ls"]);
    a.line("base push frosty b --as ../x").fails(2, &["../x", "--as"]);
}

#[test]
fn peers_may_do_what_they_were_let() {
    let Some((a, b, _listener)) = pair("send,pull", &["--base-quota-gib", "0"]) else { return };
    a.base("tiny").ok();
    a.line("base push tiny b").fails(4, &["may not push", "peer add a"]);
    b.line(&format!("peer add a {} --may push --bases other", key_of(&a))).ok();
    a.line("base push tiny b").fails(4, &["may not push a base as tiny"]);
    a.line("base push tiny b --as other").fails(1, &["MiB more"]);
    a.line("base pull tiny b").fails(3, &["no such base"]);
    b.base("tiny").ok();
    a.line("base pull tiny b").fails(4, &["may not pull"]);
}

#[test]
fn a_damaged_base_is_healed_by_a_peer() {
    let Some((a, b, _listener)) = pair("pull", &[]) else { return };
    for cloudlet in [&a, &b] {
        cloudlet.base_with_memory("warm", None).ok();
    }
    let part = a.home().join("store/bases").join(id_of(&a, "warm")).join("memory.raw");
    let mut content = fs::read(&part).unwrap();
    content[5000] ^= 1;
    fs::remove_file(&part).unwrap();
    fs::write(&part, &content).unwrap();
    a.line("base verify warm").fails(6, &["memory.raw"]);
    let healed = a.line("base verify warm --heal b --json").ok().json();
    assert_eq!(healed["chunks_on_link"], 1);
    a.line("base verify warm --heal b").ok();
    a.line("base verify warm").ok();
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
