//! Boots one machine with its console on the terminal: the shortest way to see a kernel run.
//!
//! ```text
//! boot --kernel FILE [--initramfs FILE] [--cmdline TEXT] [--memory-mib N] [--vcpus N]
//!      [--base DIR] [--tap NAME] [--seconds N] [--cycle MS [--first MS] [--copy yes | --same yes]]
//!      [--type TEXT] [--watch MS [--hints S,S]] [--base-memory FILE] [--keep yes]
//! ```
//!
//! `--cycle MS` pauses the machine every MS milliseconds (the first time after `--first`), saves it, and goes on in a second machine
//! made from the saved state. `--copy yes` gives that machine a copy of the memory and compares the
//! two; otherwise it takes the memory over. With `--same yes` the machine itself goes on, as after
//! a handoff that was aborted. `--type TEXT` types a line at the console before each cycle.
//! `--watch MS` says every MS milliseconds how much memory the guest has made its own, and how much it
//! has given back; `--hints FROM,TO` asks the guest at that second to name its free pages, and lets it
//! have them back at the other. With
//! `--keep yes` nothing is given back. `--base-memory FILE` lets RAM begin as a private map of FILE.

use std::{
    error::Error,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use guest_images::{Base, CHUNK_SIZE, overlay::Overlay};
use vmm::{
    HostCheck, NetConfig, Paused, Tap, ThreadHook, Vm, VmConfig,
    devices::virtio::balloon::BalloonHandle,
    memory::{self, GuestRam},
};

#[derive(Clone)]
struct Options {
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    cmdline: String,
    memory_mib: u64,
    vcpus: u8,
    base: Option<PathBuf>,
    tap: Option<Tap>,
    seconds: u64,
    cycle_ms: Option<u64>,
    first_ms: Option<u64>,
    copy: bool,
    same: bool,
    line: Option<String>,
    watch_ms: Option<u64>,
    hints_s: Option<(f32, f32)>,
    base_memory: Option<Arc<File>>,
    keep: bool,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        kernel: PathBuf::new(),
        initramfs: None,
        cmdline: "console=ttyS0 panic=-1".into(),
        memory_mib: 256,
        vcpus: 1,
        base: None,
        tap: None,
        seconds: 60,
        cycle_ms: None,
        first_ms: None,
        copy: false,
        same: false,
        line: None,
        watch_ms: None,
        hints_s: None,
        base_memory: None,
        keep: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--kernel" => options.kernel = value.into(),
            "--initramfs" => options.initramfs = Some(value.into()),
            "--cmdline" => options.cmdline = value,
            "--memory-mib" => options.memory_mib = value.parse()?,
            "--vcpus" => options.vcpus = value.parse()?,
            "--base" => options.base = Some(value.into()),
            "--tap" => options.tap = Some(Tap::open(&value)?),
            "--seconds" => options.seconds = value.parse()?,
            "--cycle" => options.cycle_ms = Some(value.parse()?),
            "--first" => options.first_ms = Some(value.parse()?),
            "--type" => options.line = Some(value + "\n"),
            "--watch" => options.watch_ms = Some(value.parse()?),
            "--hints" => {
                let (from, to) = value.split_once(',').ok_or("--hints FROM,TO")?;
                options.hints_s = Some((from.parse()?, to.parse()?));
            }
            "--base-memory" => options.base_memory = Some(Arc::new(File::open(value)?)),
            "--keep" => options.keep = value == "yes",
            "--same" => options.same = value == "yes",
            "--copy" => options.copy = value == "yes",
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok(options)
}

/// Writes whole lines, each with the host's time in front: to compare the guest's clock with.
///
/// The line under way outlives the machine, whose successor goes on with it.
struct Console;

static LINE: Mutex<Vec<u8>> = Mutex::new(Vec::new());

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut line = LINE.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            line.push(*byte);
            if *byte == b'\n' {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let mut out = std::io::stdout().lock();
                write!(out, "{}.{:06} ", now.as_secs(), now.subsec_micros())?;
                out.write_all(&std::mem::take(&mut *line))?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn config(
    options: &Options,
    disk: Option<Arc<Overlay>>,
    events: mpsc::Sender<vmm::VmEvent>,
) -> VmConfig {
    VmConfig {
        memory_bytes: options.memory_mib << 20,
        vcpus: options.vcpus,
        kernel: options.kernel.clone(),
        initramfs: options.initramfs.clone(),
        cmdline: options.cmdline.clone(),
        base_memory: options.base_memory.clone(),
        disk,
        net: options.tap.clone().map(|tap| NetConfig {
            tap,
            mac: [0x02, 0, 0, 0, 0, 1],
            addresses: Vec::new(),
        }),
        cpu: Default::default(),
        rates: Default::default(),
        keep_free_pages: options.keep,
        console: Box::new(Console),
        events,
        threads: ThreadHook::default(),
    }
}

fn open_disk(base: &Path, dir: &Path) -> Result<Arc<Overlay>, Box<dyn Error>> {
    let base = Arc::new(Base::open(base)?);
    Ok(Arc::new(Overlay::create(dir, base)?))
}

fn copy(from: &GuestRam) -> Result<GuestRam, Box<dyn Error>> {
    let ram = memory::allocate(memory::size_bytes(from))?;
    let mut chunk = [0; CHUNK_SIZE];
    for index in 0..memory::chunk_count(&ram) {
        memory::read_chunk(from, index, &mut chunk)?;
        if chunk != [0; CHUNK_SIZE] {
            memory::write_chunk(&ram, index, &chunk)?;
        }
    }
    Ok(ram)
}

/// Saves the machine and goes on in another one.
fn reincarnate(
    mut vm: Vm<Paused>,
    options: &Options,
    events: mpsc::Sender<vmm::VmEvent>,
) -> Result<Vm<Paused>, Box<dyn Error>> {
    let began = Instant::now();
    let state = vm.save()?;
    let saved = began.elapsed();
    if options.same {
        return Ok(vm);
    }
    let before = if options.copy { Some(vm.full_hash()?) } else { None };
    let ram = if options.copy { copy(vm.ram())? } else { vm.ram().clone() };
    let (profile, disk) = (vm.profile().clone(), vm.disk().cloned());
    drop(vm);
    let restoring = Instant::now();
    let vm = Vm::restore(config(options, disk, events), profile, ram, &state)?;
    eprintln!(
        "[boot] {} bytes of state; save {saved:?}, restore {:?}",
        state.len(),
        restoring.elapsed()
    );
    if before.is_some_and(|before| vm.full_hash().ok() != Some(before)) {
        return Err("restoring changed memory or disk".into());
    }
    Ok(vm)
}

/// Watches the machine's memory; the balloon is another one after each cycle.
struct Watch {
    balloon: Mutex<BalloonHandle>,
    hints_s: Option<(f32, f32)>,
}

impl Watch {
    fn start(self: &Arc<Self>, period: Duration) {
        let (watch, began) = (Arc::clone(self), Instant::now());
        std::thread::spawn(move || {
            let mut hinted_chunks = 0;
            loop {
                std::thread::sleep(period);
                watch.look(began.elapsed().as_secs_f32(), period.as_secs_f32(), &mut hinted_chunks);
            }
        });
    }

    /// Says how much memory of this process is not a file's, and what the guest has said of its own.
    fn look(&self, at_s: f32, period_s: f32, hinted_chunks: &mut u64) {
        let balloon = self.balloon.lock().unwrap_or_else(PoisonError::into_inner);
        let hints = balloon.hints();
        *hinted_chunks += hints.take().iter().map(|run| run.end - run.start).sum::<u64>();
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or("?");
        eprintln!(
            "[boot] {at_s:6.1} s: own {}; reported {} MiB, given back {} MiB; hinted {} MiB{}",
            own.trim(),
            balloon.reported_bytes() >> 20,
            balloon.discarded_bytes() >> 20,
            *hinted_chunks >> 8,
            if hints.is_complete() { ", all" } else { "" },
        );
        let Some((from, to)) = self.hints_s else { return };
        let is_due = |second: f32| (second..second + period_s).contains(&at_s);
        if is_due(from) {
            eprintln!("[boot] asking for hints: {}", hints.start());
        } else if is_due(to) {
            hints.stop();
        }
    }

    fn goes_on_with(&self, vm: &Vm<Paused>) {
        *self.balloon.lock().unwrap_or_else(PoisonError::into_inner) = vm.balloon().clone();
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    if !HostCheck::has_hardware_virtualisation()? {
        eprintln!("[boot] the CPU has neither svm nor vmx: this will be very slow");
    }
    let dir = std::env::temp_dir().join(format!("boot-{}", std::process::id()));
    let disk = match &options.base {
        Some(base) => {
            std::fs::create_dir_all(&dir)?;
            Some(open_disk(base, &dir)?)
        }
        None => None,
    };
    let (sender, events) = mpsc::channel();
    let deadline = Instant::now() + Duration::from_secs(options.seconds);
    let mut vm = Vm::boot(config(&options, disk, sender.clone()))?.resume().map_err(|e| e.error)?;
    let watch =
        Arc::new(Watch { balloon: Mutex::new(vm.balloon().clone()), hints_s: options.hints_s });
    if let Some(period_ms) = options.watch_ms {
        watch.start(Duration::from_millis(period_ms));
    }
    let cycle = options.cycle_ms.map_or(Duration::from_secs(3600), Duration::from_millis);
    let mut tick = options.first_ms.map_or(cycle, Duration::from_millis);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            eprintln!("[boot] time is up");
            return Ok(());
        }
        match events.recv_timeout(tick.min(left)) {
            Ok(event) => {
                eprintln!("[boot] {event:?}");
                return Ok(());
            }
            Err(_) if options.cycle_ms.is_some() => {
                tick = cycle;
                if let Some(line) = &options.line {
                    vm.console_input(line.as_bytes())?;
                }
                let began = Instant::now();
                let paused = vm.pause().map_err(|e| e.error)?;
                eprintln!("[boot] paused in {:?}", began.elapsed());
                let paused = reincarnate(paused, &options, sender.clone())?;
                watch.goes_on_with(&paused);
                vm = paused.resume().map_err(|e| e.error)?;
            }
            Err(_) => {}
        }
    }
}
