//! Machines with a few instructions as their kernel. They need /dev/kvm, not hardware: an
//! interpreted guest is fast enough.

use std::{
    io::Write as _,
    sync::{Mutex, mpsc},
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress};

use ::handoff::SourceVm;

use super::*;
use crate::{
    AnyVm, VmSource,
    host::HostCheck,
    layout::{HIMEM_START, MIN_MEMORY_BYTES},
    state::StateError,
};

const CODE: u64 = 0x100_0000;
/// Where the guest counts.
const COUNTER: u64 = 0x110_0000;
/// How long a guest is given for something it does at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// An ELF file of one segment with `code` in it.
fn kernel(code: &[u8]) -> tempfile::NamedTempFile {
    const HEADERS: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2u8, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend([CODE, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend([0u8, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1u8, 0, 0, 0, 7, 0, 0, 0]);
    let len = code.len() as u64;
    elf.extend([HEADERS, CODE, CODE, len, len, 4096].map(u64::to_le_bytes).concat());
    elf.extend(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf).unwrap();
    file
}

/// Counts at [`COUNTER`] for ever: `inc qword [COUNTER]; jmp`.
fn counting() -> tempfile::NamedTempFile {
    let mut code = vec![0x48, 0xff, 0x04, 0x25];
    code.extend((COUNTER as u32).to_le_bytes());
    code.extend([0xeb, 0xf6]);
    kernel(&code)
}

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Bench {
    kernel: tempfile::NamedTempFile,
    screen: Screen,
    sender: Sender<VmEvent>,
    events: mpsc::Receiver<VmEvent>,
    vcpus: u8,
}

impl Bench {
    /// `None`, and a word about it, where there is no KVM.
    fn new(kernel: tempfile::NamedTempFile, vcpus: u8) -> Option<Self> {
        if let Err(error) = HostCheck::run() {
            println!("skipped: {error}");
            return None;
        }
        let (sender, events) = mpsc::channel();
        Some(Self { kernel, screen: Screen::default(), sender, events, vcpus })
    }

    fn config(&self) -> VmConfig {
        VmConfig {
            memory_bytes: MIN_MEMORY_BYTES,
            vcpus: self.vcpus,
            kernel: self.kernel.path().into(),
            initramfs: None,
            cmdline: "console=ttyS0".into(),
            base_memory: None,
            disk: None,
            net: None,
            cpu: Default::default(),
            rates: Default::default(),
            keep_free_pages: false,
            console: Box::new(self.screen.clone()),
            events: self.sender.clone(),
            threads: ThreadHook::default(),
        }
    }
}

fn count<S>(vm: &Vm<S>) -> u64 {
    vm.ram().read_obj(GuestAddress(COUNTER)).unwrap()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn copy_of(ram: &GuestRam) -> GuestRam {
    let copy = memory::allocate(MIN_MEMORY_BYTES).unwrap();
    let mut chunk = [0; CHUNK_SIZE];
    for index in 0..memory::chunk_count(ram) {
        memory::read_chunk(ram, index, &mut chunk).unwrap();
        if chunk != [0; CHUNK_SIZE] {
            memory::write_chunk(&copy, index, &chunk).unwrap();
        }
    }
    copy
}

#[test]
fn a_paused_guest_stands_still_and_then_goes_on() {
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let mut vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
    for _ in 0..5 {
        let before = count(&vm);
        wait_for("the guest counts", || count(&vm) > before + 1000);
        let paused = vm.pause().unwrap();
        let stopped = count(&paused);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(count(&paused), stopped);
        vm = paused.resume().unwrap();
    }
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    for vcpus in [1, 2] {
        let Some(bench) = Bench::new(counting(), vcpus) else { return };
        let mut vm = Vm::boot(bench.config()).unwrap();
        for moves in 0..4 {
            let before = count(&vm);
            let running = vm.resume().unwrap();
            assert_eq!(running.cutover_cost().is_some(), moves > 0);
            wait_for("the guest counts", || count(&running) > before + 1000);
            let mut paused = running.pause().unwrap();
            let state = paused.save().unwrap();
            let (stopped, hash) = (count(&paused), paused.full_hash().unwrap());
            let ram = copy_of(paused.ram());
            let profile = paused.profile().clone();
            drop(paused);
            let restored = Vm::restore(bench.config(), profile, ram, &state).unwrap();
            assert_eq!(restored.cutover_cost(), None, "it has not run yet");
            assert_eq!(count(&restored), stopped);
            assert_eq!(restored.full_hash().unwrap(), hash, "restoring wrote to RAM");
            vm = restored;
        }
    }
}

/// The parts of a base made of a guest that has counted for a while.
fn base_of(bench: &Bench) -> (Arc<File>, Vec<u8>) {
    let vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
    wait_for("the guest counts", || count(&vm) > 1000);
    let mut vm = vm.pause().unwrap();
    let memory = tempfile::tempfile().unwrap();
    let written = vm.write_memory(&memory).unwrap();
    assert!(written > 0 && written < memory::chunk_count(vm.ram()));
    assert_eq!(memory.metadata().unwrap().len(), MIN_MEMORY_BYTES);
    (Arc::new(memory), vm.machine().unwrap())
}

#[test]
fn a_guest_goes_on_from_its_base() {
    for vcpus in [1, 2] {
        let Some(bench) = Bench::new(counting(), vcpus) else { return };
        let (memory, machine) = base_of(&bench);
        let config = || VmConfig { base_memory: Some(memory.clone()), ..bench.config() };
        for _ in 0..2 {
            let vm = Vm::from_base(config(), &machine).unwrap();
            let before = count(&vm);
            assert!(before > 1000);
            let vm = vm.resume().unwrap();
            wait_for("the guest counts", || count(&vm) > before + 1000);
            // An audit does not ask where a chunk came from.
            let vm = vm.pause().unwrap();
            let hash = full_hash(&copy_of(vm.ram()), None).unwrap();
            assert_eq!(vm.full_hash().unwrap(), hash);
        }
        let refused = Vm::from_base(bench.config(), &machine).unwrap_err();
        assert!(matches!(refused, MachineError::NoBaseMemory), "{refused}");
        let other = VmConfig { memory_bytes: 2 * MIN_MEMORY_BYTES, ..config() };
        let refused = Vm::from_base(other, &machine).unwrap_err();
        assert!(matches!(refused, MachineError::Mismatch { .. }), "{refused}");
        for cut in [0, 9, 100, machine.len() - 1] {
            assert!(Vm::from_base(config(), &machine[..cut]).is_err());
        }
    }
}

/// A base that has lain for a while: the guest's clocks have gone on meanwhile.
#[test]
fn time_goes_on_while_a_base_lies() {
    let Some(bench) = Bench::new(counting(), 2) else { return };
    let (memory, machine) = base_of(&bench);
    let clocks = |blob: &[u8]| {
        let MachineSnapshot { profile, state } = MachineSnapshot::decode(blob).unwrap();
        let state = VmState::decode(&state, &profile).unwrap();
        (state.time.tsc, state.chips.kvmclock_ns(), u64::from(profile.tsc_khz))
    };
    let lies = Duration::from_millis(300);
    std::thread::sleep(lies);
    let config = VmConfig { base_memory: Some(memory), ..bench.config() };
    let mut vm = Vm::from_base(config, &machine).unwrap();
    let ((tsc, clock, khz), (tsc_now, clock_now, _)) =
        (clocks(&machine), clocks(&vm.machine().unwrap()));
    // Not less, and not by much more: this machine may be slow.
    let (least, most) = (lies.as_millis() as u64, PATIENCE.as_millis() as u64);
    assert!((least..most).contains(&((tsc_now - tsc) / khz)), "TSC: {tsc}, then {tsc_now}");
    assert!((least..most).contains(&((clock_now - clock) / 1_000_000)), "{clock}, {clock_now}");
}

/// A guest comes from a host whose clock is an hour behind, or was stepped back by that meanwhile.
/// Once its own clocks leapt an hour ahead for it.
#[test]
fn a_guest_that_was_awaited_does_not_leap_with_a_hosts_clock() {
    use ::handoff::TargetVm;
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
    wait_for("the guest counts", || count(&vm) > 0);
    let mut vm = vm.pause().unwrap();
    let profile = vm.profile().clone();
    let mut state = VmState::decode(&vm.save().unwrap(), &profile).unwrap();
    let hour = Duration::from_secs(3600);
    state.time.realtime_ns -= hour.as_nanos() as u64;
    state.chips.date_back(hour);
    let (bytes, khz) = (state.encode().unwrap(), u64::from(profile.tsc_khz));
    for awaited in [true, false] {
        let mut incoming = crate::IncomingVm::new(profile.clone(), bench.config()).unwrap();
        if awaited {
            incoming = incoming.awaited();
        }
        incoming.load_state(&bytes).unwrap();
        let Some(crate::AnyVm::Paused(mut vm)) = incoming.into_vm() else { panic!("no machine") };
        let now = VmState::decode(&vm.save().unwrap(), &profile).unwrap();
        let tsc_s = (now.time.tsc - state.time.tsc) / khz / 1000;
        let clock_s = (now.chips.kvmclock_ns() - state.chips.kvmclock_ns()) / 1_000_000_000;
        assert_eq!(clock_s < PATIENCE.as_secs(), awaited, "{clock_s} s");
        // Where KVM is interpreted, offsets of the TSC may not show: then it never leaps.
        assert!(tsc_s < PATIENCE.as_secs() || !awaited, "{tsc_s} s");
    }
}

/// Booted over base memory, a guest finds nothing in low memory but what the loader wrote.
#[test]
fn a_cold_boot_over_base_memory_is_a_boot() {
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(MIN_MEMORY_BYTES).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&memory, &[0xa5; 2 << 20], 0).unwrap();
    let config = VmConfig { base_memory: Some(Arc::new(memory)), ..bench.config() };
    let vm = Vm::boot(config).unwrap();
    let plain = Vm::boot(bench.config()).unwrap();
    let mut chunks = [[0; CHUNK_SIZE]; 2];
    for index in 0..HIMEM_START / CHUNK_SIZE as u64 {
        for (vm, chunk) in [&vm, &plain].iter().zip(&mut chunks) {
            memory::read_chunk(vm.ram(), index, chunk).unwrap();
        }
        assert!(chunks[0] == chunks[1], "chunk {index}");
    }
    let vm = vm.resume().unwrap();
    let before = count(&vm);
    wait_for("the guest counts", || count(&vm) > before + 1000);
}

#[test]
fn saving_twice_gives_the_same_but_for_the_time() {
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
    wait_for("the guest counts", || count(&vm) > 0);
    let mut vm = vm.pause().unwrap();
    let (one, two) = (vm.save().unwrap(), vm.save().unwrap());
    assert_eq!(one.len(), two.len());
    let differing = one.iter().zip(&two).filter(|(a, b)| a != b).count();
    assert!(differing < 100, "{differing} of {} bytes differ", one.len());
}

#[test]
fn kvms_log_and_the_vmms_writes_make_the_dirty_set() {
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let counter = ChunkId { space: Space::Ram, index: COUNTER / CHUNK_SIZE as u64 };
    let other = ChunkId { space: Space::Ram, index: counter.index + 100 };
    let mut vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
    wait_for("the guest counts", || count(&vm) > 1000);
    let initial = vm.start_tracking().unwrap();
    assert!(initial.contains(counter));
    assert!(initial.contains(ChunkId { space: Space::Ram, index: CODE / CHUNK_SIZE as u64 }));
    let mut chunk = [0; CHUNK_SIZE];
    for _ in 0..3 {
        vm.read_chunk(counter, &mut chunk).unwrap();
        let before = count(&vm);
        wait_for("the guest counts", || count(&vm) > before + 1000);
        assert!(vm.harvest().unwrap().contains(counter), "KVM's log");
    }
    // It may be in the first set, next to others in a large page: then it must have been read.
    vm.read_chunk(other, &mut chunk).unwrap();
    memory::write_chunk(vm.ram(), other.index, &[1; CHUNK_SIZE]).unwrap();
    assert!(vm.harvest().unwrap().contains(other), "the VMM's own write");
    let mut vm = vm.pause().unwrap();
    vm.harvest().unwrap();
    assert!(vm.harvest().unwrap().is_empty(), "nothing changes while paused");
    vm.stop_tracking().unwrap();
}

/// A throttled guest does less, and everything at full speed again once it is asked to, or was paused.
#[test]
fn a_throttled_guest_gets_its_speed_back() {
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let mut vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
    wait_for("the guest counts", || count(&vm) > 1000);
    let counts = |vm: &Vm<Running>| {
        let before = count(vm);
        std::thread::sleep(Duration::from_millis(300));
        count(vm) - before
    };
    // The machine may be busy with other tests: the best of a few tries counts.
    let full = (0..3).map(|_| counts(&vm)).max().unwrap();
    vm.throttle(0.1).unwrap();
    let slow = (0..3).map(|_| counts(&vm)).min().unwrap();
    assert!(slow > 0 && slow < full / 2, "{slow} throttled, {full} not");
    vm.throttle(1.0).unwrap();
    let again = (0..5).map(|_| counts(&vm)).max().unwrap();
    assert!(again > slow * 2, "{again} after, {slow} throttled");
    vm.throttle(0.1).unwrap();
    let vm = vm.pause().unwrap().resume().unwrap();
    let resumed = (0..5).map(|_| counts(&vm)).max().unwrap();
    assert!(resumed > slow * 2, "{resumed} after a pause, {slow} throttled");
}

/// A handoff that is given up leaves nothing behind that costs the guest anything.
#[test]
fn a_guest_that_stays_is_watched_no_more() {
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
    wait_for("the guest counts", || count(&vm) > 1000);
    let mut source = VmSource::new(vm);
    for paused in [false, true] {
        source.start_tracking().unwrap();
        source.throttle(0.1).unwrap();
        source.harvest().unwrap();
        if paused {
            SourceVm::pause(&mut source).unwrap();
        }
        let given_up = Instant::now();
        if paused {
            SourceVm::resume(&mut source).unwrap();
        }
        source.stop_tracking().unwrap();
        assert!(given_up.elapsed() < Duration::from_secs(1), "{:?}", given_up.elapsed());
        let Some(AnyVm::Running(vm)) = source.vm() else { panic!("it does not run") };
        assert!(!vm.core.tracker.is_logged(), "KVM still logs what the guest writes");
        assert!(vm.state.throttle.is_none(), "it is slowed down");
        let before = count(vm);
        wait_for("the guest counts", || count(vm) > before + 1000);
    }
}

/// Adds one to a quadword in one of 256 pages, in an order that looks random, for ever.
fn scribbling() -> tempfile::NamedTempFile {
    kernel(&[
        0xb9, 1, 0, 0, 0, // mov ecx, 1
        0x69, 0xc9, 0x0d, 0x66, 0x19, 0, // again: imul ecx, ecx, 0x19660d
        0x81, 0xc1, 0x5f, 0xf3, 0x6e, 0x3c, // add ecx, 0x3c6ef35f
        0x89, 0xc8, // mov eax, ecx
        0xc1, 0xe8, 0x18, // shr eax, 24
        0xc1, 0xe0, 0x0c, // shl eax, 12
        0x48, 0xff, 0x80, 0, 0, 0x20, 1, // inc qword [rax + 0x1200000]
        0xeb, 0xe3, // jmp again
    ])
}

/// How often [`scribbling`] has written.
fn scribbles<S>(vm: &Vm<S>) -> u64 {
    let page = |n: u64| vm.ram().read_obj::<u64>(GuestAddress(0x120_0000 + n * 4096)).unwrap();
    (0..256).map(page).sum()
}

/// What an engine copies, round by round, from a guest that keeps writing is in the end the guest.
#[test]
fn copies_made_while_the_guest_writes_end_equal() {
    for (manual, with_base) in [(true, false), (false, false), (true, true), (false, true)] {
        let Some(bench) = Bench::new(scribbling(), 1) else { return };
        let mut vm = Vm::boot(bench.config()).unwrap();
        let mut base = vec![[0; CHUNK_SIZE]; memory::chunk_count(vm.ram()) as usize];
        if with_base {
            let (memory, machine) = (tempfile::tempfile().unwrap(), vm.machine().unwrap());
            vm.write_memory(&memory).unwrap();
            for (index, chunk) in base.iter_mut().enumerate() {
                memory::read_chunk(vm.ram(), index as u64, chunk).unwrap();
            }
            let config = VmConfig { base_memory: Some(Arc::new(memory)), ..bench.config() };
            vm = Vm::from_base(config, &machine).unwrap();
        }
        if !manual {
            vm.core.tracker.use_plain_log().unwrap();
        }
        let mut vm = vm.resume().unwrap();
        wait_for("the guest writes", || scribbles(&vm) > 100);
        // A handoff that was aborted half way leaves nothing behind.
        let mut set = vm.start_tracking().unwrap();
        let mut chunk = [0; CHUNK_SIZE];
        for id in set.iter().step_by(3) {
            vm.read_chunk(id, &mut chunk).unwrap();
        }
        vm.harvest().unwrap();
        vm.stop_tracking().unwrap();
        let mut copy = base;
        set = vm.start_tracking().unwrap();
        for _ in 0..8 {
            for id in set.iter() {
                vm.read_chunk(id, &mut copy[id.index as usize]).unwrap();
            }
            let before = scribbles(&vm);
            wait_for("the guest writes", || scribbles(&vm) > before + 100);
            set = vm.harvest().unwrap();
            assert!(!set.is_empty(), "the guest writes, and nothing is seen of it");
            assert!(set.len() < 300, "{} chunks: more than the guest writes", set.len());
        }
        let mut vm = vm.pause().unwrap();
        set.union(&vm.harvest().unwrap());
        for id in set.iter() {
            vm.read_chunk(id, &mut copy[id.index as usize]).unwrap();
        }
        assert!(vm.harvest().unwrap().is_empty());
        let mut now = [0; CHUNK_SIZE];
        for (index, copied) in copy.iter().enumerate() {
            memory::read_chunk(vm.ram(), index as u64, &mut now).unwrap();
            assert!(now == *copied, "chunk {index} (manual {manual}, base {with_base})");
        }
    }
}

/// What a guest's memory is worth before a handoff and during one. To be run by itself, with
/// `--release --ignored --nocapture`, on a machine whose numbers mean something.
#[test]
#[ignore = "a measurement"]
fn memory_speed() {
    let Some(bench) = Bench::new(scribbling(), 1) else { return };
    let speed = |what: &str, vm: &Vm<Running>| {
        std::thread::sleep(Duration::from_millis(200));
        let (began, before) = (Instant::now(), scribbles(vm));
        std::thread::sleep(Duration::from_secs(1));
        let per_s = (scribbles(vm) - before) as f64 / began.elapsed().as_secs_f64();
        println!("{what}: {per_s:.0} writes/s");
    };
    let mut vm = Vm::boot(bench.config()).unwrap();
    let (memory, machine) = (tempfile::tempfile().unwrap(), vm.machine().unwrap());
    vm.write_memory(&memory).unwrap();
    speed("RAM of its own", &vm.resume().unwrap());
    let config = VmConfig { base_memory: Some(Arc::new(memory)), ..bench.config() };
    let mut vm = Vm::from_base(config, &machine).unwrap().resume().unwrap();
    speed("map of a base, before a handoff", &vm);
    let mut set = vm.start_tracking().unwrap();
    speed("tracked, nothing read yet", &vm);
    let mut chunk = [0; CHUNK_SIZE];
    let began = Instant::now();
    let before = scribbles(&vm);
    let mut rounds = 0;
    while began.elapsed() < Duration::from_secs(1) {
        for id in set.iter() {
            vm.read_chunk(id, &mut chunk).unwrap();
        }
        set = vm.harvest().unwrap();
        rounds += 1;
    }
    let per_s = (scribbles(&vm) - before) as f64 / began.elapsed().as_secs_f64();
    println!("harvested and read without a pause: {per_s:.0} writes/s, {rounds} rounds");
    vm.stop_tracking().unwrap();
    speed("after an abort", &vm);
}

#[test]
fn power_off_reset_and_console_reach_the_owner() {
    // mov dx, 0x3f8; mov al, 'K'; out dx, al; mov dx, PORT; mov al, VALUE; out dx, al; jmp self
    let guest = |port: u16, value: u8| {
        let [low, high] = port.to_le_bytes();
        kernel(&[
            0x66, 0xba, 0xf8, 0x03, 0xb0, b'K', 0xee, 0x66, 0xba, low, high, 0xb0, value, 0xee,
            0xeb, 0xfe,
        ])
    };
    for (port, value, expected) in [
        (0x600, 5 << 2 | 1 << 5, VmEvent::Shutdown),
        (0x602, 1, VmEvent::Reset),
        (0x64, 0xfe, VmEvent::Reset),
    ] {
        let Some(bench) = Bench::new(guest(port, value), 1) else { return };
        let vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
        assert_eq!(bench.events.recv_timeout(PATIENCE).unwrap(), expected);
        assert_eq!(*bench.screen.0.lock().unwrap(), b"K");
        assert!(vm.is_halted());
        let mut vm = vm.pause().unwrap();
        assert!(matches!(vm.save(), Err(MachineError::Halted)));
    }
}

#[test]
fn a_guest_that_crashes_is_an_event() {
    // ud2, without an IDT to handle it: a triple fault.
    let Some(bench) = Bench::new(kernel(&[0x0f, 0x0b]), 1) else { return };
    let _vm = Vm::boot(bench.config()).unwrap().resume().unwrap();
    let event = bench.events.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(event, VmEvent::Reset | VmEvent::Fault(_)), "{event:?}");
}

#[test]
fn states_that_are_not_this_machines_are_refused() {
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let mut vm = Vm::boot(bench.config()).unwrap();
    let (state, profile) = (vm.save().unwrap(), vm.profile().clone());
    let ram = vm.ram().clone();
    let restore = |profile: &MachineProfile, state: &[u8]| {
        Vm::restore(bench.config(), profile.clone(), ram.clone(), state).map(|_| ())
    };
    restore(&profile, &state).unwrap();
    for cut in [0, 5, 10, 200, state.len() - 1] {
        let refused = restore(&profile, &state[..cut]).unwrap_err();
        assert!(matches!(refused, MachineError::State(StateError::Codec(_))), "{refused}");
    }
    let mut other = state.clone();
    other[8] = other[8].wrapping_add(1);
    let refused = restore(&profile, &other).unwrap_err().to_string();
    assert!(refused.contains("version"), "{refused}");
    let slower = MachineProfile { tsc_khz: profile.tsc_khz - 1, ..profile.clone() };
    let refused = restore(&slower, &state).unwrap_err();
    assert!(matches!(refused, MachineError::State(StateError::OtherMachine)), "{refused}");
    let wider = MachineProfile { vcpus: 2, ..profile };
    assert!(matches!(restore(&wider, &state), Err(MachineError::Mismatch { .. })));
}

/// Whatever a peer puts into a state, restoring it returns.
#[test]
fn damaged_states_never_panic() {
    let Some(bench) = Bench::new(counting(), 1) else { return };
    let mut vm = Vm::boot(bench.config()).unwrap();
    let (state, profile) = (vm.save().unwrap(), vm.profile().clone());
    let ram = vm.ram().clone();
    drop(vm);
    let step = state.len() / 60;
    for at in (10..state.len()).step_by(step.max(1)) {
        let mut damaged = state.clone();
        for byte in &mut damaged[at..(at + 3).min(state.len())] {
            *byte ^= 0xff;
        }
        let _ = Vm::restore(bench.config(), profile.clone(), ram.clone(), &damaged);
    }
}
