//! The table of errors in `docs/reference/errors.md` is what the program says: every line of it that
//! needs neither KVM nor a peer is provoked here, and what is provoked is in it.

use std::{fs, net::TcpListener, os::unix::net::UnixListener, path::Path, thread};

use howdah_api::SOCKET;
use serde_json::json;

use crate::{
    common::{Cloudlet, Ran, key_of},
    errors::{OWNER, committed, released, stopped},
    oci,
    serve::Daemon,
};

/// In the table, this stands for what differs from case to case.
const ANYTHING: &str = "…";
/// The heading of the rows that are not provoked here.
const ELSEWHERE: &str = "## Not without KVM, or a peer";

/// A row: what is printed, without the leading `howdah: `, and the exit code.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    pattern: String,
    code: i32,
    provoked_here: bool,
}

fn rows(page: &str) -> Vec<Row> {
    let mut here = true;
    let mut rows = Vec::new();
    for line in page.lines() {
        here &= line != ELSEWHERE;
        // Code spans of two back quotes, as messages have single ones.
        let Some(rest) = line.strip_prefix("| `` ") else { continue };
        let (pattern, rest) = rest.split_once(" `` |").unwrap_or_else(|| panic!("{line}"));
        let code = rest
            .split('|')
            .next()
            .unwrap()
            .trim()
            .parse()
            .unwrap_or_else(|e| panic!("{e}: {line}"));
        rows.push(Row { pattern: pattern.replace("\\|", "|"), code, provoked_here: here });
    }
    rows
}

/// Whether `text` is `pattern`, with anything in the place of [`ANYTHING`].
fn fits(text: &str, pattern: &str) -> bool {
    let Some((first, rest)) = pattern.split_once(ANYTHING) else { return text == pattern };
    let Some(text) = text.strip_prefix(first) else { return false };
    text.char_indices().map(|(at, _)| at).chain([text.len()]).any(|at| fits(&text[at..], rest))
}

fn table() -> Vec<Row> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/errors.md");
    rows(&fs::read_to_string(page).unwrap())
}

/// Which rows are what was said.
fn fitting(rows: &[Row], ran: &Ran) -> Vec<usize> {
    assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
    let said = ran.stderr.trim_end().strip_prefix("howdah: ").unwrap_or_else(|| panic!("{ran:?}"));
    let fits = |row: &Row| Some(row.code) == ran.code && fits(said, &row.pattern);
    (0..rows.len()).filter(|at| fits(&rows[*at])).collect()
}

/// What was provoked elsewhere is in the table, too.
pub(crate) fn listed(ran: &Ran) {
    assert!(!fitting(&table(), ran).is_empty(), "no row of the table has this: {ran:?}");
}

#[test]
fn patterns_fit_what_they_should() {
    assert!(fits("VM a: it is not running; x", "VM …: it is not running; …"));
    assert!(fits("VM a", "VM …") && fits("VM ", "VM …"));
    assert!(!fits("VM a: gone", "VM …: it is …") && !fits("a VM", "VM …"));
}

#[test]
fn the_table_is_what_the_program_says() {
    let rows = table();
    let (mut provoked, mut unknown) = (vec![false; rows.len()], Vec::new());
    for (words, ran) in provoke() {
        let fit = fitting(&rows, &ran);
        if fit.is_empty() {
            unknown.push(format!("{:?}: {}    <- howdah {words}", ran.code, ran.stderr.trim_end()));
        }
        fit.into_iter().for_each(|at| provoked[at] = true);
    }
    assert!(unknown.is_empty(), "no row has this:\n{}", unknown.join("\n"));
    let left: Vec<_> = rows
        .iter()
        .zip(provoked)
        .filter(|(row, provoked)| row.provoked_here && !provoked)
        .collect();
    assert!(left.is_empty(), "nothing says this any more: {left:#?}");
}

/// Every mistake that can be made here, and what was said.
fn provoke() -> Vec<(String, Ran)> {
    let mut seen = Vec::new();
    let mut all = |cloudlet: &Cloudlet, lines: &[&str]| {
        for line in lines {
            // Remarks (of a slow host, for instance) are not what the table is about.
            seen.push(((*line).to_owned(), cloudlet.line(&format!("--quiet {line}"))));
        }
    };
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    words(&cloudlet, &mut all);
    bases(&cloudlet, &mut all);
    vms(&cloudlet, &mut all);
    peers(&cloudlet, &mut all);
    files(&cloudlet, &mut all);
    networks(&mut all);
    daemon(&mut all);
    seen
}

type All<'a> = dyn FnMut(&Cloudlet, &[&str]) + 'a;

fn words(cloudlet: &Cloudlet, all: &mut All) {
    all(
        cloudlet,
        &[
            "fly",
            "vm ls --jsn",
            "vm run",
            "vm run a --memory-mib 0",
            "vm stop ../../etc",
            "vm run a --mac 01:02:03:04:05:06",
            "handoff a b:1 --delta best",
            "receive --listen nowhere",
        ],
    );
}

fn bases(cloudlet: &Cloudlet, all: &mut All) {
    cloudlet.file("ram", &[7; 4096]);
    cloudlet.file("machine", b"not a machine");
    cloudlet.file("odd.raw", b"no whole sector");
    cloudlet.file("text", b"no kernel");
    let mut differing = [0; 512];
    differing[..12].copy_from_slice(b"QFI\xfb\0\0\0\x03\0\0\0\0");
    differing[15..20].copy_from_slice(b"\xf0\0\0\0\x04");
    differing[0xf0..0xf4].copy_from_slice(b"base");
    cloudlet.file("differing.qcow2", &differing);
    let mut encrypted = differing;
    encrypted[8..20].fill(0);
    encrypted[35] = 2;
    cloudlet.file("encrypted.qcow2", &encrypted);
    encrypted[35] = 0;
    cloudlet.file("damaged.qcow2", &encrypted);
    cloudlet.file("old.qcow2", b"QFI\xfb\0\0\0\x01");
    cloudlet.file("empty.raw", &[0; 4096]);
    containers(cloudlet, all);
    stopped(cloudlet, "uses", OWNER);
    all(
        cloudlet,
        &[
            "base verify nowhere",
            "base import x --disk missing.raw --kernel kernel",
            "base import x --disk odd.raw --kernel text",
            "base import x --disk differing.qcow2",
            "base import x --disk encrypted.qcow2",
            "base import x --disk damaged.qcow2",
            "base import x --disk old.qcow2",
            "base import x --disk empty.raw",
            "base import x --disk disk.raw --kernel kernel --memory ram --machine machine",
            "base rm tiny",
            "base build nowhere",
            "vm run a --base nowhere",
        ],
    );
    let nameless = Cloudlet::new();
    nameless.base("tiny").ok();
    let id = nameless.line("base ls --json").ok().json()[0]["id"].as_str().unwrap().to_owned();
    nameless.file("disk.raw", &[3; 4096]);
    nameless.line("base import tiny --disk disk.raw --kernel kernel").ok();
    let key = key_of(&Cloudlet::new());
    nameless.line(&format!("peer add b {key}")).ok();
    let lines = [&format!("base push {id} b")[..], "base push tiny b --as ../x"];
    all(&nameless, &lines);
    let other = Cloudlet::new();
    other.base_with_memory("warm", None).ok();
    all(&other, &["vm run a --base warm --memory-mib 512", "vm run a --base warm --tap t0"]);
}

fn containers(cloudlet: &Cloudlet, all: &mut All) {
    oci::image(cloudlet, &[("app", b"static")], &json!({"Cmd": ["/app"]}));
    let import = "base import x --kernel kernel --oci";
    all(cloudlet, &[&format!("{import} image"), &format!("{import} text")]);
    let large = [("bin/sh", &b"sh"[..]), ("large", &[7; 9 << 20])];
    oci::image(cloudlet, &large, &json!({}));
    all(
        cloudlet,
        &[
            "base import x --oci image",
            &format!("{import} image --ref other"),
            &format!("{import} image --disk-mib 8"),
        ],
    );
    let index = fs::read_to_string(cloudlet.path("image/index.json")).unwrap();
    let digest = index.split("sha256:").nth(1).and_then(|rest| rest.get(..64)).unwrap();
    let manifest = cloudlet.path("image/blobs/sha256").join(digest);
    let other = fs::read_to_string(&manifest).unwrap().replace("layers", "Layers");
    fs::write(&manifest, other).unwrap();
    all(cloudlet, &[&format!("{import} image")]);
}

fn vms(cloudlet: &Cloudlet, all: &mut All) {
    for (name, record) in [("a", None), ("gone", Some(released("b:7070")))] {
        match record {
            None => stopped(cloudlet, name, OWNER),
            Some(record) => stopped(cloudlet, name, record),
        }
    }
    stopped(cloudlet, "doubt", committed("127.0.0.1:1"));
    stopped(cloudlet, "damaged", OWNER);
    let path = cloudlet.home().join("vms/damaged/ownership");
    let mut record = fs::read(&path).unwrap();
    record.truncate(record.len() - 1);
    fs::write(&path, &record).unwrap();
    stopped(cloudlet, "odd", OWNER);
    cloudlet.file("home/vms/odd/config.json", b"{}");
    all(
        cloudlet,
        &[
            "vm inspect nobody",
            "vm logs nobody",
            "vm pause a",
            "vm stop gone",
            "vm run new",
            "vm rm doubt",
            "vm takeover gone --reason x",
            "vm takeover a --reason x",
            "vm rm damaged",
            "vm export-disk odd out.raw",
            "recover doubt",
        ],
    );
}

fn peers(cloudlet: &Cloudlet, all: &mut All) {
    let own = key_of(cloudlet);
    let other = key_of(&Cloudlet::new());
    cloudlet.line(&format!("peer add deaf {other} --may send")).ok();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    all(
        cloudlet,
        &[
            "handoff a nowhere",
            "handoff a --plain nowhere",
            "handoff a 127.0.0.1:70707",
            "handoff a deaf",
            "peer rm nowhere",
            "peer ping deaf",
            "peer ping 127.0.0.1:9",
            "peer ping deaf@127.0.0.1:1",
            "base pull tiny deaf@127.0.0.1:1",
            "peer add x howdah:short",
            &format!("peer add me {own}"),
            &format!("receive --listen {address}"),
            "receive --listen 192.0.2.1:7070",
        ],
    );
}

fn files(cloudlet: &Cloudlet, all: &mut All) {
    cloudlet.file("file", b"");
    cloudlet.file("not-a-report", b"{}");
    all(
        cloudlet,
        &[
            "--home file/sub base ls",
            "restore missing --name r",
            "overlay inspect text",
            "trace show text",
            "report not-a-report",
            "man file",
            "doctor --home /proc/nowhere",
        ],
    );
}

fn networks(all: &mut All) {
    let cloudlet = Cloudlet::new();
    let lan = br#"{"version":1,"networks":[{"name":"lan","subnet":"10.77.0.0/24","nat":false}]}"#;
    cloudlet.file("home/networks.json", lan);
    let odd = Cloudlet::new();
    odd.file("home/networks.json", br#"{"version":9,"networks":[]}"#);
    all(
        &cloudlet,
        &[
            "network rm nowhere",
            "network add lan --subnet 10.78.0.0/24",
            "network add other --subnet 10.77.0.128/25",
            "network add other --subnet 8.8.8.0/24",
            "vm run a --network lan --tap t0",
            "vm run a --cpu-max lots",
        ],
    );
    all(&odd, &["network ls"]);
}

fn daemon(all: &mut All) {
    let cloudlet = Cloudlet::new();
    cloudlet.file("unknown.toml", b"[api]\nsokket = 1\n");
    cloudlet.file("flat.toml", b"socket_mode = 640\n");
    cloudlet.file("odd.toml", b"[receive]\nmin_free_mib = -7\n");
    all(
        &cloudlet,
        &[
            "serve --config unknown.toml",
            "serve --config flat.toml",
            "serve --config odd.toml",
            "serve --api-socket-group no-such-group",
        ],
    );
    let running = Daemon::start(&cloudlet, &[]);
    all(&cloudlet, &["serve"]);
    drop(running);
    // Something that is no daemon listens where one would.
    let socket = cloudlet.home().join(SOCKET);
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    let hangs_up = thread::spawn(move || listener.incoming().take(2).for_each(drop));
    all(&cloudlet, &["vm ls"]);
    drop(hangs_up);
}
