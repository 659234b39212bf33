//! What operators expect of any tool: a doctor, quiet, logs, completions, a manual.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::Command,
    time::Duration,
};

use crate::common::Cloudlet;

#[test]
fn the_doctor_finds_and_mends() {
    let cloudlet = Cloudlet::new();
    let ran = cloudlet.line("doctor --json");
    let seen = ran.stdout.split("\n{\n").next().map(|first| serde_json::from_str(first).unwrap());
    let seen: serde_json::Value = seen.unwrap();
    assert_eq!(ran.code, Some(if seen["fit"] == true { 0 } else { 5 }), "{ran:?}");
    let findings = seen["findings"].as_array().unwrap();
    for check in ["kvm", "kernel", "io-uring", "files", "clock", "room", "tun", "hugepages"] {
        assert!(findings.iter().any(|finding| finding["check"] == check), "no {check}: {seen}");
    }
    let text = cloudlet.line("doctor").stdout;
    assert!(text.contains("io-uring") && !text.contains('\x1b'), "colours in a pipe: {text:?}");
    // A home that no cloudlet can be kept in.
    let broken = cloudlet.line("doctor --home /proc/nowhere");
    assert_eq!(broken.code, Some(5), "{broken:?}");
    assert!(broken.stderr.contains("sparse") || broken.stderr.contains("room"), "{broken:?}");
    assert!(broken.stdout.contains("--home"), "{broken:?}");
}

#[test]
fn quiet_says_nothing_but_what_was_asked_for() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    let named = cloudlet.line("base ls --quiet").ok();
    assert_eq!((named.stdout.as_str(), named.stderr.as_str()), ("tiny\n", ""));
    let verified = cloudlet.line("-q base verify tiny").ok();
    assert_eq!((verified.stdout.as_str(), verified.stderr.as_str()), ("", ""));
    cloudlet.line("-q vm stop nobody").fails(3, &["nobody"]);
}

#[test]
fn logs_are_shown_and_followed() {
    let cloudlet = Cloudlet::new();
    cloudlet.file("home/vms/a/vm.log", b"one\ntwo\nthree");
    cloudlet.file("home/vms/a/console.log", b"boot\r\n\x1b[2Jlogin:");
    assert_eq!(cloudlet.line("vm logs a").ok().stdout, "one\ntwo\nthree");
    assert_eq!(cloudlet.line("vm logs a -n 2").ok().stdout, "two\nthree");
    // Programs get what the guest printed, byte for byte.
    assert_eq!(cloudlet.line("vm logs a --console").ok().stdout, "boot\r\n\x1b[2Jlogin:");
    let lines = cloudlet.line("vm logs a -n 1 --json").ok();
    assert_eq!(lines.stdout, "{\"line\":\"three\"}\n");
    cloudlet.line("vm logs b").fails(3, &["VM b"]);
    fs::create_dir_all(cloudlet.home().join("vms/c")).unwrap();
    assert!(cloudlet.line("vm logs c").ok().stderr.contains("yet"));
    // Nobody runs it: there is nothing to wait for.
    let begun = std::time::Instant::now();
    assert_eq!(cloudlet.line("vm logs a --follow -n 1").ok().stdout, "three");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn shells_and_readers_are_served() {
    let cloudlet = Cloudlet::new();
    let bash = cloudlet.line("completion bash").ok().stdout;
    assert!(bash.contains("complete -F _howdah"), "{bash}");
    let script = cloudlet.file("howdah.bash", bash.as_bytes());
    let checked = Command::new("bash").arg("-n").arg(&script).status();
    assert!(checked.is_ok_and(|status| status.success()));
    cloudlet.line("completion powershell-2").fails(2, &["powershell-2", "bash"]);

    cloudlet.line("man pages/8").ok();
    let page = fs::read_to_string(cloudlet.path("pages/8/howdah-vm-run.8")).unwrap();
    assert!(page.contains("howdah\\-vm\\-run") && page.contains("SYNOPSIS"), "{page}");
    cloudlet.file("file", b"");
    cloudlet.line("man file").fails(1, &["file"]);
}

/// What the daemon answers to a GET over its socket: head and body.
fn get(cloudlet: &Cloudlet, path: &str) -> (String, String) {
    let socket = cloudlet.home().join("api.sock");
    let mut stream = (0..200)
        .find_map(|_| {
            std::thread::sleep(Duration::from_millis(50));
            UnixStream::connect(&socket).ok()
        })
        .expect("no daemon came");
    let request = format!("GET {path} HTTP/1.1\r\nHost: howdah\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

#[test]
fn a_daemon_shows_itself_to_people_and_to_prometheus() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    crate::errors::stopped(&cloudlet, "web", crate::errors::OWNER);
    let mut daemon = cloudlet.command().args(["--quiet", "serve"]).spawn().unwrap();
    let (head, page) = get(&cloudlet, "/");
    let (kind, metrics) = get(&cloudlet, "/metrics");
    let id = nix::unistd::Pid::from_raw(daemon.id() as i32);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());

    assert!(head.starts_with("HTTP/1.1 200") && head.contains("default-src 'none'"), "{head}");
    assert!(page.contains("<!DOCTYPE html>") && page.contains(">web</th>"), "{page}");
    assert!(page.contains("tiny") && page.contains("stopped"), "{page}");
    assert!(kind.contains("text/plain; version=0.0.4"), "{kind}");
    for line in [
        "howdah_vms{state=\"stopped\"} 1",
        "howdah_bases 1",
        "howdah_vm_up{vm=\"web\"} 0",
        "howdah_operations_ended_total{kind=\"handoff\",state=\"done\"} 0",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }
}
