//! What is needed to break a handoff in its middle: a guest that does what is typed, a link that
//! stands still on demand, and the processes behind it all.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use guest_images::{CHUNK_SIZE, overlay::Overlay, store::Store};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    common::Ran,
    guests::{Site, elf, wait_for},
};

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The guest's disk.
const DISK_BYTES: usize = 16 << 20;
/// Of it, what a large guest has changed: more than a window of segments holds.
pub(crate) const LARGE_CHUNKS: u64 = 3000;
/// So much of a handoff passes before the link stands still: the offer, and a part of the guest.
pub(crate) const SOME_BYTES: u64 = 60_000;

/// Machine code, with jumps that are filled in later.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn add(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    fn add_u32(&mut self, op: &[u8], value: u32) -> &mut Self {
        self.add(op).add(&value.to_le_bytes())
    }

    fn here(&self) -> usize {
        self.0.len()
    }

    /// A jump with a distance of four bytes, to a place that is known.
    fn jump(&mut self, op: &[u8], to: usize) -> &mut Self {
        let from = self.here() + op.len() + 4;
        let distance = i32::try_from(to as i64 - from as i64).unwrap();
        self.add(op).add(&distance.to_le_bytes())
    }
}

/// An ELF kernel that fills 256 KiB with what no compressor makes smaller, says that it is ready, and
/// counts, writing every 4096th count. Of what is typed it obeys `r` (reboot), `o` (power off) and `x`
/// (crash: a fault without a handler).
pub(crate) fn obedient_kernel() -> Vec<u8> {
    const COUNTER: u32 = 0x110_0000;
    const FILLED: std::ops::Range<u32> = 0x120_0000..0x124_0000;
    let mut code = Code::default();
    code.add_u32(&[0xbf], FILLED.start).add_u32(&[0xbb], 1); // edi = FILLED; ebx = 1
    let fill = code.here();
    code.add_u32(&[0x48, 0x69, 0xdb], 0x41c6_4e6d).add(&[0x48, 0xff, 0xc3]); // rbx = rbx * k + 1
    code.add(&[0x48, 0x89, 0x1f, 0x48, 0x83, 0xc7, 8]); // [rdi] = rbx; rdi += 8
    code.add_u32(&[0x81, 0xff], FILLED.end).jump(&[0x0f, 0x82], fill); // below the end: go on
    code.add_u32(&[0xba], 0x3f8); // edx = COM1
    for byte in b"howdah: ready\n" {
        code.add(&[0xb0, *byte, 0xee]);
    }
    let count = code.here();
    code.add_u32(&[0x48, 0xff, 0x04, 0x25], COUNTER); // inc qword [COUNTER]
    code.add_u32(&[0x48, 0x8b, 0x04, 0x25], COUNTER); // mov rax, [COUNTER]
    code.add_u32(&[0xa9], 0xfff).jump(&[0x0f, 0x85], count); // no multiple of 4096: go on
    code.add(&[0x89, 0xc3]).add_u32(&[0xb9], 8); // ebx = eax; ecx = 8
    let digit = code.here();
    code.add(&[0xc1, 0xc3, 4, 0x88, 0xd8, 0x24, 0x0f, 0x04, b'a', 0xee]); // out the top digit
    code.add(&[0xff, 0xc9]).jump(&[0x0f, 0x85], digit); // dec ecx; jnz
    code.add(&[0xb0, b'\n', 0xee]);
    code.add(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1]); // line status: anything typed?
    code.add_u32(&[0xba], 0x3f8).jump(&[0x0f, 0x84], count); // edx = COM1; no
    code.add(&[0xec, 0x3c, b'r', 0x75, 4, 0xb0, 0xfe, 0xe6, 0x64]); // r: reset the CPU
    code.add(&[0x3c, b'x', 0x75, 2, 0x0f, 0x0b]); // x: an instruction that is none
    code.add(&[0x3c, b'o', 0x75, 8, 0x66, 0xba, 0, 0x06, 0xb0, 0x34, 0xee, 0xf4]); // o: sleep
    code.add_u32(&[0xba], 0x3f8).jump(&[0xe9], count);
    elf(&code.0)
}

impl Site {
    /// A base of the obedient guest, without memory.
    pub(crate) fn obedient_base(&self) {
        self.0.file("kernel", &obedient_kernel());
        let mut disk = vec![0; DISK_BYTES];
        disk[..CHUNK_SIZE].fill(1);
        self.0.file("disk.raw", &disk);
        self.0.line("base import cold --disk disk.raw --kernel kernel").ok();
    }

    /// Another cloudlet with the same base.
    pub(crate) fn neighbour(&self) -> Self {
        let other = Self::new().unwrap();
        other.obedient_base();
        other
    }

    /// Starts a VM, and waits until its guest counts.
    pub(crate) fn start(&self, vm: &str) {
        let known = self.0.home().join("vms").join(vm).exists();
        let base = if known { "" } else { "--base cold --memory-mib 32" };
        self.0.line(&format!("vm run {vm} {base} --detach")).ok();
        self.counts_on(vm);
    }

    /// The same for a guest that a handoff cannot put on its way all at once.
    pub(crate) fn start_large(&self, vm: &str) {
        self.start(vm);
        self.0.line(&format!("vm stop {vm}")).ok();
        self.fill_disk(vm, LARGE_CHUNKS);
        self.start(vm);
    }

    /// Waits until the guest has counted on since now: it runs here.
    pub(crate) fn counts_on(&self, vm: &str) {
        let before = self.last_count(vm).unwrap_or_default();
        wait_for("the guest counts", || {
            self.last_count(vm).filter(|count| *count != before).map(drop)
        });
    }

    /// Gives a VM that does not run a disk with so many chunks of its own, which cannot be compressed.
    pub(crate) fn fill_disk(&self, vm: &str, chunks: u64) {
        let store = Store::open(&self.0.home().join("store")).unwrap();
        let base = Arc::new(store.get("cold").unwrap());
        let overlay = Overlay::open(&self.0.home().join("vms").join(vm), base).unwrap();
        let mut seed = 1u64;
        for chunk in 0..chunks {
            let mut content = [0; CHUNK_SIZE];
            for word in content.as_chunks_mut::<8>().0 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                *word = (seed ^ seed >> 29).to_le_bytes();
            }
            overlay.write_chunk(chunk, &content).unwrap();
        }
        overlay.flush().unwrap();
    }

    /// The process of a VM.
    pub(crate) fn process(&self, vm: &str) -> Pid {
        let text = fs::read_to_string(self.0.home().join("vms").join(vm).join("lock")).unwrap();
        Pid::from_raw(text.trim().parse().unwrap())
    }

    pub(crate) fn state(&self, vm: &str) -> Option<String> {
        let listed = self.0.line("vm ls --json").ok().json();
        let found = listed.as_array().unwrap().iter().find(|line| line["name"] == vm)?.clone();
        found["state"].as_str().map(str::to_owned)
    }

    /// Waits until the VM is in this state.
    pub(crate) fn await_state(&self, vm: &str, state: &str) {
        let what = format!("VM {vm} is {state}");
        wait_for(&what, || (self.state(vm).as_deref() == Some(state)).then_some(()));
    }

    /// Waits until nothing is left of a VM that did not come, but the record that it did not.
    pub(crate) fn await_nothing_of(&self, vm: &str) {
        let disk = self.0.home().join("vms").join(vm).join("disk.data");
        wait_for("nothing is left", || match self.state(vm).as_deref() {
            None | Some("declined") if !disk.exists() => Some(()),
            _ => None,
        });
    }

    /// Types into the guest's console, and stays attached as long as what is returned lives.
    pub(crate) fn type_into(&self, vm: &str, text: &str) -> Running {
        let mut command = self.0.command();
        command.args(["vm", "console", vm]);
        let mut running = Running::spawn(command);
        running.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
        running
    }

    /// Begins a handoff.
    pub(crate) fn begin(&self, vm: &str, to: &str) -> Running {
        let mut command = self.0.command();
        command.args(["handoff", vm, to, "--plain"]);
        Running::spawn(command)
    }

    /// Listens for VMs until dropped.
    pub(crate) fn receiver(&self, flags: &str) -> Receiver {
        let mut command = self.0.command();
        command.args(["receive", "--listen", "127.0.0.1:0", "--json", "--plain"]);
        command.args(flags.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first: serde_json::Value =
            serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        let address = first["address"].as_str().unwrap().to_owned();
        let said = Arc::new(Mutex::new(Vec::new()));
        let saying = Arc::clone(&said);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                saying.lock().unwrap().push(serde_json::from_str(&line).unwrap());
            }
        });
        Receiver { child, address, said }
    }
}

/// A command that runs.
pub(crate) struct Running {
    child: Option<Child>,
    stdin: Option<ChildStdin>,
}

impl Running {
    fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Self { stdin: child.stdin.take(), child: Some(child) }
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ran {
        self.stdin = None;
        Ran::from(self.child.take().unwrap().wait_with_output().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A listener.
pub(crate) struct Receiver {
    child: Child,
    pub(crate) address: String,
    said: Arc<Mutex<Vec<serde_json::Value>>>,
}

impl Receiver {
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for an event of this kind.
    pub(crate) fn await_event(&self, kind: &str) -> serde_json::Value {
        wait_for(kind, || {
            self.said.lock().unwrap().iter().find(|event| event["event"] == kind).cloned()
        })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Default)]
struct Passage {
    /// Bytes from the source that may pass yet.
    allowed: u64,
    /// Bytes that wait.
    waiting: bool,
    cut: bool,
    /// How often all links there were broke.
    breaks: u32,
}

/// A link that stands still after some bytes from the source, until it is opened.
pub(crate) struct Gate {
    pub(crate) address: String,
    passage: Arc<(Mutex<Passage>, Condvar)>,
}

impl Gate {
    /// Lets so many bytes pass to `to`.
    pub(crate) fn after(allowed: u64, to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let passage =
            Arc::new((Mutex::new(Passage { allowed, ..Passage::default() }), Condvar::new()));
        let (state, to) = (Arc::clone(&passage), to.to_owned());
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                // A peer that is gone is a link that closes at once.
                let Ok(far) = TcpStream::connect(&to) else { continue };
                let (back, forth) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                let state = Arc::clone(&state);
                let breaks = state.0.lock().unwrap().breaks;
                thread::spawn(move || carry(far, back, None));
                thread::spawn(move || carry(near, forth, Some((&state, breaks))));
            }
        });
        Self { address, passage }
    }

    /// Waits until the handoff stands still in its middle.
    pub(crate) fn await_still(&self) {
        wait_for("the link stands still", || self.passage.0.lock().unwrap().waiting.then_some(()));
    }

    /// Breaks the links there are, with what waits in them, and lets everything pass over later ones.
    pub(crate) fn break_links(&self) {
        self.passage.0.lock().unwrap().breaks += 1;
        self.open();
    }

    /// Lets everything pass.
    pub(crate) fn open(&self) {
        self.passage.0.lock().unwrap().allowed = u64::MAX;
        self.passage.1.notify_all();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.passage.0.lock().unwrap().cut = true;
        self.passage.1.notify_all();
    }
}

type Shared = (Mutex<Passage>, Condvar);

/// Carries what comes; of a link that was made after so many breaks, if it can be held up.
fn carry(mut from: TcpStream, mut to: TcpStream, state: Option<(&Shared, u32)>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if let Some(((passage, changed), breaks)) = state {
            let mut held = passage.lock().unwrap();
            while held.allowed < count as u64 && !held.cut && held.breaks == breaks {
                held.waiting = true;
                held = changed.wait_timeout(held, PATIENCE).unwrap().0;
            }
            if held.cut || held.breaks != breaks {
                break;
            }
            held.waiting = false;
            held.allowed = held.allowed.saturating_sub(if held.allowed == u64::MAX {
                0
            } else {
                count as u64
            });
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// Waits until a process is gone; one of its own parents' children must be reaped by them.
pub(crate) fn await_gone(process: Pid) {
    let since = Instant::now();
    while fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z"))
    {
        assert!(since.elapsed() < PATIENCE, "process {process} stays");
        thread::sleep(Duration::from_millis(10));
    }
}
