//! Whole lives of a guest of a few instructions. They need /dev/kvm, not hardware: an interpreted
//! guest is fast enough.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::common::{Cloudlet, disk, key_of};

const CODE: u64 = 0x100_0000;
/// Where the guest counts.
const COUNTER: u32 = 0x110_0000;
/// How long a guest is given for what it does at once.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pages that the guest fills with what no compressor makes smaller, and then leaves alone.
const FILLED: std::ops::Range<u32> = 0x120_0000..0x124_0000;
/// Beyond this count they are full.
const FULL: &str = "aaafaaaa";

/// An ELF kernel that says that it is ready, then counts for ever and every 4096 counts writes the
/// count, eight digits from `a` to `p`, so that later lines sort behind earlier ones, and fills a
/// page.
fn kernel() -> Vec<u8> {
    let mut code = vec![0xba, 0xf8, 0x03, 0, 0]; // mov edx, COM1
    code.push(0xbf); // mov edi, FILLED
    code.extend(FILLED.start.to_le_bytes());
    code.extend([0x48, 0x8d, 0x35, 0, 0, 0, 0]); // lea rsi, [rip + message]
    let after_lea = code.len();
    code.extend([0xac, 0x84, 0xc0, 0x74, 3, 0xee, 0xeb, 0xf8]); // out each byte until NUL
    let count = code.len();
    code.extend([0x48, 0xff, 0x04, 0x25]); // inc qword [COUNTER]
    code.extend(COUNTER.to_le_bytes());
    code.extend([0x48, 0x8b, 0x04, 0x25]); // mov rax, [COUNTER]
    code.extend(COUNTER.to_le_bytes());
    code.extend([0xa9, 0xff, 0x0f, 0, 0]); // test eax, 0xfff
    code.extend([0x75, back(count, code.len() + 2)]); // jnz count
    code.extend([0x89, 0xc3, 0xb9, 8, 0, 0, 0]); // ebx = eax; ecx = 8
    let digit = code.len();
    code.extend([0xc1, 0xc3, 4, 0x88, 0xd8, 0x24, 0x0f, 0x04, b'a', 0xee]); // out the top digit
    code.extend([0xff, 0xc9]); // dec ecx
    code.extend([0x75, back(digit, code.len() + 2)]); // jnz digit
    code.extend([0xb0, b'\n', 0xee]); // out '\n'
    code.extend([0x81, 0xff]); // cmp edi, end of FILLED
    code.extend(FILLED.end.to_le_bytes());
    code.extend([0x73, back(count, code.len() + 2)]); // jae count
    code.extend([0xb9, 0, 2, 0, 0]); // ecx = 512
    let word = code.len();
    code.extend([0x48, 0x69, 0xdb, 0x6d, 0x4e, 0xc6, 0x41]); // imul rbx, 0x41c64e6d
    code.extend([0x48, 0xff, 0xc3, 0x48, 0x89, 0x1f]); // inc rbx; mov [rdi], rbx
    code.extend([0x48, 0x83, 0xc7, 8, 0xff, 0xc9]); // add rdi, 8; dec ecx
    code.extend([0x75, back(word, code.len() + 2)]); // jnz word
    code.extend([0xeb, back(count, code.len() + 2)]); // jmp count
    let message = (code.len() - after_lea) as u32;
    code[after_lea - 4..after_lea].copy_from_slice(&message.to_le_bytes());
    code.extend(b"howdah: ready\n\0");
    elf(&code)
}

/// A short jump back from the instruction that ends at `from`.
fn back(to: usize, from: usize) -> u8 {
    u8::try_from(0x100 - (from - to)).unwrap()
}

/// An ELF file of one segment with `code` in it.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2u8, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend([CODE, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend([0u8, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1u8, 0, 0, 0, 7, 0, 0, 0]);
    let len = code.len() as u64;
    elf.extend([HEADERS, CODE, CODE, len, len, 4096].map(u64::to_le_bytes).concat());
    elf.extend(code);
    elf
}

pub(crate) fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = done() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The cloudlets of a test; their VMs end with it.
pub(crate) struct Site(pub(crate) Cloudlet);

impl Drop for Site {
    fn drop(&mut self) {
        for vm in self.0.line("vm ls --json").json().as_array().into_iter().flatten() {
            let name = vm["name"].as_str().unwrap_or_default();
            self.0.line(&format!("vm stop {name} --force"));
            let log = self.0.home().join("vms").join(name).join("vm.log");
            let said = fs::read_to_string(log).unwrap_or_default();
            let denied = said.contains("howdah: jail:");
            assert!(!denied || std::thread::panicking(), "its jail denied it something: {said}");
        }
    }
}

impl Site {
    /// `None`, and a word about it, where there is no KVM.
    pub(crate) fn new() -> Option<Self> {
        if let Err(error) = vmm::HostCheck::run() {
            eprintln!("skipped: {error}");
            return None;
        }
        Some(Self(Cloudlet::new()))
    }

    pub(crate) fn cold_base(&self) {
        self.0.file("kernel", &kernel());
        self.0.file("disk.raw", &disk());
        self.0.line("base import cold --disk disk.raw --kernel kernel").ok();
    }

    /// Builds a base with memory; another site with the same bases.
    pub(crate) fn warm(&self) {
        self.cold_base();
        let build = "base build --from cold --name warm --memory-mib 32 --settle-s 0";
        self.0.line(build).ok();
    }

    pub(crate) fn twin(&self) -> Self {
        let twin = Self::new().unwrap();
        let copied =
            Command::new("cp").arg("-r").args([self.0.home(), twin.0.home()]).status().unwrap();
        assert!(copied.success());
        twin
    }

    fn log(&self, vm: &str) -> PathBuf {
        self.0.home().join("vms").join(vm).join("console.log")
    }

    /// Lines that the guest wrote here, the unfinished last one left out.
    fn lines(&self, vm: &str) -> Vec<String> {
        let text = fs::read_to_string(self.log(vm)).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| line.trim().to_owned()).collect()
    }

    pub(crate) fn last_count(&self, vm: &str) -> Option<String> {
        let is_count =
            |line: &String| line.len() == 8 && line.bytes().all(|b| (b'a'..=b'p').contains(&b));
        self.lines(vm).into_iter().rfind(is_count)
    }

    /// Waits until the guest has counted beyond `before`; what it wrote then.
    pub(crate) fn counts_beyond(&self, vm: &str, before: &str) -> String {
        wait_for("the guest counts", || self.last_count(vm).filter(|count| count.as_str() > before))
    }

    /// Whether the guest ever said here that it is ready: then it booted here.
    pub(crate) fn booted(&self, vm: &str) -> usize {
        self.lines(vm).iter().filter(|line| line.contains("howdah: ready")).count()
    }

    fn listen(&self) -> Listener {
        let mut command = self.0.command();
        command.args(["receive", "--listen", "127.0.0.1:0", "--once", "--json"]);
        Listener::start(command)
    }

    /// Listens until that is dropped. What receives does this at a step.
    pub(crate) fn listen_on(&self, step: &str) -> Ended {
        let mut command = self.0.command();
        command.args(["receive", "--listen", "127.0.0.1:0", "--json", "--plain"]);
        if !step.is_empty() {
            command.env("HOWDAH_STEP", step);
        }
        Ended(Listener::start(command))
    }

    /// Hands the VM off to another site; the report.
    fn hand_off(&self, vm: &str, to: &Site, flags: &str) -> serde_json::Value {
        let listener = to.listen();
        let (here, there) = (key_of(&self.0), key_of(&to.0));
        to.0.line(&format!("peer add {} {here}", &here[7..15])).ok();
        let (name, address) = (&there[7..15], &listener.address);
        self.0.line(&format!("peer add {name} {there} --address {address}")).ok();
        let line = format!("handoff {vm} {name} --audit --json {flags}");
        let report = self.0.line(&line).ok().json();
        drop(listener);
        report
    }
}

/// A listener that ends when it is no longer wanted.
pub(crate) struct Ended(Listener);

impl Ended {
    pub(crate) fn address(&self) -> &str {
        &self.0.address
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.child.kill();
    }
}

impl Listener {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        let said: serde_json::Value = serde_json::from_str(&line).unwrap();
        let address = said["address"].as_str().unwrap().to_owned();
        Self { child, _out: out, address }
    }
}

struct Listener {
    child: Child,
    // Closed, it would end the listener before its time.
    _out: BufReader<std::process::ChildStdout>,
    address: String,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let since = Instant::now();
        while self.child.try_wait().unwrap().is_none() && since.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn chunks_of(report: &serde_json::Value, class: &str) -> u64 {
    let classes = report["classes"].as_array().unwrap();
    let found = classes.iter().find(|share| share["name"] == class);
    found.and_then(|share| share["chunks"].as_u64()).unwrap_or_default()
}

#[test]
fn a_vm_goes_on_from_its_base_once_and_boots_from_then_on() {
    let Some(site) = Site::new() else { return };
    site.warm();
    let listed = site.0.line("base ls --json").ok().json();
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    let ran = site.0.line("vm run a --base warm --detach --json").ok().json();
    assert_eq!(ran["from"], "base-memory");
    assert!(ran["started_ms"].as_u64().unwrap() < 20_000, "{ran}");
    let count = site.counts_beyond("a", "aaaaaaaa");
    assert_eq!(site.booted("a"), 0);
    // The same again, with the same past.
    site.0.line("vm run twin --base warm --detach").ok();
    site.counts_beyond("twin", "aaaaaaaa");
    site.0.line("vm stop a").ok();
    let again = site.0.line("vm run a --detach --json").ok().json();
    assert_eq!(again["from"], "kernel");
    wait_for("the guest boots", || (site.booted("a") == 1).then_some(()));
    // The log goes on, though the guest counts from the beginning.
    assert!(site.lines("a").contains(&count));
    let cold = site.0.line("vm run c --base warm --cold --detach --json").ok().json();
    assert_eq!(cold["from"], "kernel");
    wait_for("the guest boots", || (site.booted("c") == 1).then_some(()));
}

#[test]
fn a_guest_that_is_never_ready_makes_no_base() {
    let Some(site) = Site::new() else { return };
    site.cold_base();
    let build = "base build --from cold --name warm --memory-mib 32";
    let late = site.0.line(&format!("{build} --ready never --timeout-s 1"));
    assert_eq!(late.code, Some(1), "{late:?}");
    for part in ["never", "last words", "base-build.console.log", "--timeout-s"] {
        assert!(late.stderr.contains(part), "no {part:?} in {late:?}");
    }
    let left: Vec<_> =
        fs::read_dir(site.0.home()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("build.")), "{left:?}");
    site.0.line("base verify warm").fails(3, &["warm"]);
}

#[test]
fn a_guest_goes_there_and_back_and_there_again() {
    let Some(here) = Site::new() else { return };
    here.warm();
    let there = here.twin();
    here.0.line("vm run a --base warm --detach").ok();
    let count = here.counts_beyond("a", FULL);
    let first = here.hand_off("a", &there, "");
    assert!(chunks_of(&first, "data") > 32, "{first}");
    let count = there.counts_beyond("a", &count);
    let left = here.0.line("vm ls --json").ok().json();
    assert_eq!(left[0]["state"], "handed-off");
    assert!(left[0]["kept_bytes"].as_u64().unwrap() > 0, "{left}");
    assert!(here.0.line("vm ls").stdout.contains("way back"));
    assert!(there.booted("a") == 0);

    let back = there.hand_off("a", &here, "");
    let count = here.counts_beyond("a", &count);
    assert!(!here.0.home().join("vms/a/visit").exists(), "a visit is used once");
    let returned = here.0.line("vm ls --json").ok().json();
    assert_eq!(returned[0]["kept_bytes"], serde_json::Value::Null);
    let bytes = |report: &serde_json::Value| report["bytes_on_link"].as_u64().unwrap();
    assert!(bytes(&back) * 4 < bytes(&first), "{first} {back}");
    assert!(chunks_of(&back, "data") < 8, "{back}");

    // The third time what was kept there is damaged, and nothing is kept here.
    let visit = there.0.home().join("vms/a/visit");
    let mut kept = fs::read(&visit).unwrap();
    let last = kept.len() - 1;
    kept[last] ^= 1;
    fs::write(&visit, kept).unwrap();
    here.hand_off(
        "a",
        &there,
        "--keep-mib 0 --without zero,delta,known".replace(",delta", "").as_str(),
    );
    there.counts_beyond("a", &count);
    let left = here.0.line("vm ls --json").ok().json();
    assert_eq!(left[0]["kept_bytes"], serde_json::Value::Null);
    assert!(!here.0.home().join("vms/a/disk.data").exists());

    // And back, and there, where the visit is whole but not asked for.
    there.hand_off("a", &here, "");
    let count = here.counts_beyond("a", &count);
    let unasked = here.hand_off("a", &there, "--without known");
    assert!(bytes(&unasked) > bytes(&first) / 2, "{first} {unasked}");
    there.counts_beyond("a", &count);
}

#[test]
fn a_guest_goes_on_from_a_file() {
    let Some(site) = Site::new() else { return };
    site.warm();
    site.0.line("vm run a --base warm --detach").ok();
    let count = site.counts_beyond("a", "aaaaaaaa");
    let report = site.0.line("save a saved --json").ok().json();
    let size = fs::metadata(site.0.path("saved")).unwrap().len();
    assert_eq!(report["bytes"], size);
    assert!(size < 1 << 20, "{size}");
    site.0.line("save a saved").fails(1, &["saved", "exists"]);
    let count = site.counts_beyond("a", &count);
    let seen = site.0.line("overlay inspect saved --json").ok().json();
    assert_eq!((&seen["vm"], &seen["machine"]["memory_mib"]), (&"a".into(), &32.into()));

    let other = site.twin();
    let _ = fs::remove_dir_all(other.0.home().join("vms"));
    other.0.file("saved", &fs::read(site.0.path("saved")).unwrap());
    let ran = other.0.line("restore saved --name b --detach --json").ok().json();
    assert_eq!(ran["from"], "file");
    other.counts_beyond("b", "aaaaaaaa");
    assert_eq!(other.booted("b"), 0);
    let ids = |cloudlet: &Cloudlet, vm: &str| {
        cloudlet.line(&format!("vm inspect {vm} --json")).ok().json()["record"]["vm_id"].to_string()
    };
    assert_ne!(ids(&other.0, "b"), ids(&site.0, "a"));
    other.0.line("restore saved --name b --detach").fails(4, &["VM b", "--name"]);

    site.0.line("save a last --stop").ok();
    assert_eq!(site.0.line("vm ls --json").ok().json()[0]["state"], "stopped");
    site.0.line("restore last --name c --detach").ok();
    site.counts_beyond("c", &count);
}
