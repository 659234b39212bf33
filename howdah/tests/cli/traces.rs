//! `howdah trace show`, `play` and `take`, on a trace that was made up.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::Duration,
};

use handoff::trace::{
    file,
    synth::{Mix, Synth},
};

use crate::common::{Cloudlet, Ran, key_of};

fn cloudlet() -> Cloudlet {
    let cloudlet = Cloudlet::new();
    let spec = Synth {
        ram_chunks: 8192,
        disk_chunks: 1024,
        cache_chunks: 200,
        changed: 800,
        changed_disk: 20,
        mix: Mix::PAGE_CACHE,
        hot: 50,
        writes_per_s: 100.0,
        duration: Duration::from_secs(3),
        ..Synth::default()
    };
    let mut bytes = Vec::new();
    file::write(&spec.build().unwrap(), &mut bytes).unwrap();
    cloudlet.file("guest.trace", &bytes);
    cloudlet
}

#[test]
fn a_trace_is_shown() {
    let cloudlet = cloudlet();
    let shown = cloudlet.line("trace show guest.trace").ok().stdout;
    for words in ["RAM 32.0 MiB", "in base", "WORKING SET", "changed since"] {
        assert!(shown.contains(words), "{shown}");
    }
    let json = cloudlet.line("--json trace show guest.trace --windows 3").ok().stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["initial_ram"], &json["changes"]), (&800.into(), &300.into()));
    assert_eq!(json["windows"].as_array().unwrap().len(), 3);
    let whole = std::fs::read(cloudlet.path("guest.trace")).unwrap();
    cloudlet.file("cut.trace", &whole[..whole.len() - 9]);
    cloudlet.file("other.trace", b"[package]");
    cloudlet.line("trace show cut.trace").fails(6, &["cut.trace", "cut off", "record it again"]);
    cloudlet.line("trace show other.trace").fails(6, &["other.trace", "not a trace"]);
    cloudlet.line("trace show none.trace").fails(3, &["none.trace"]);
    cloudlet.line("trace record none -o x.trace").fails(3, &["none"]);
}

#[test]
fn a_trace_is_played() {
    let cloudlet = cloudlet();
    let played = cloudlet
        .line("--json trace play guest.trace --mbps 40,80@1 --delay-ms 5 --workers 2 --mode zstd:3")
        .ok()
        .stdout;
    let report: serde_json::Value = serde_json::from_str(&played).unwrap();
    assert_eq!(report["outcome"], "moved");
    // One way over the link at least: nothing is waited for that goes back.
    assert!(report["downtime_ms"].as_f64().unwrap() > 5.0, "{played}");
    assert!(report["bytes_on_link"].as_f64().unwrap() > 100_000.0, "{played}");
    let text =
        cloudlet.line("trace play guest.trace --mbps 200 --serial --order ascending").ok().stdout;
    assert!(text.contains("s in all") && text.contains("base_disk"), "{text}");
    for wrong in ["--mbps 5@3", "--mode magic", "--delay-ms -1", "--to x:1 --mbps 4"] {
        cloudlet.line(&format!("trace play guest.trace {wrong}")).fails(2, &[]);
    }
    cloudlet.line("trace play guest.trace --plain --to 127.0.0.1:1").fails(7, &["cannot reach"]);
}

#[test]
fn a_trace_goes_from_process_to_process() {
    let (cloudlet, player, stranger) = (cloudlet(), Cloudlet::new(), Cloudlet::new());
    cloudlet.line(&format!("peer add player {} --may send", key_of(&player))).ok();
    let mut taker = cloudlet
        .command()
        .args(["trace", "take", "guest.trace", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut notes = BufReader::new(taker.stderr.take().unwrap());
    notes.read_line(&mut said).unwrap();
    let address = said.trim().strip_prefix("listening on ").unwrap().to_owned();
    let trace = cloudlet.path("guest.trace").display().to_string();
    let play = format!("--json trace play {trace} --to {address}");
    player.line(&play).fails(3, &["no peer has that address", "howdah identity"]);
    for known in [&player, &stranger] {
        known.line(&format!("peer add taker {} --address {address}", key_of(&cloudlet))).ok();
    }
    stranger.line(&play).fails(7, &[]);
    said.clear();
    notes.read_line(&mut said).unwrap();
    assert!(said.contains("is not known here"), "{said}");
    player.line(&format!("{play} --plain")).fails(7, &[]);
    let report = player.line(&play).ok().stdout;
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["outcome"], "moved");
    let taken = Ran::from(taker.wait_with_output().unwrap()).ok().stdout;
    assert!(taken.contains("is here"), "{taken}");
}
