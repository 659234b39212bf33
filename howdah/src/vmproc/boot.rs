//! Starts a VM from its directory, and runs it to its end.

use std::{
    fmt,
    io::{self, Write},
    sync::Arc,
    time::Instant,
};

use crossbeam_channel::{Sender, bounded};
use serde::{Deserialize, Serialize};
use vmm::host::{HostCheck, HostError};

use super::{
    Coming, End, Event, HeldTap, Process, kvm,
    machine::Machine,
    settle::{Asking, settle},
    signals,
};
use crate::{
    cgroup::{self, Cgroup},
    cli::JailArgs,
    console::Console,
    control::{Phase, server, server::Server},
    failure::{Exit, Failure, guarded},
    home::{Home, VmDir},
    jail::{self, Kind},
    net,
    output::Output,
    spawn::{self, Ready},
    visit,
};

/// Who started the process, and wants to see what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    /// A user at a terminal: the serial console on stdout, Ctrl-C stops.
    Terminal,
    /// A command that waits for [`Ready`].
    Detached,
}

/// A machine whose guest runs, and what it went on from.
pub(crate) type Brought = (Box<dyn Machine>, Origin);

/// What a guest begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Origin {
    /// It boots.
    Kernel,
    /// It goes on from the memory of its base.
    BaseMemory,
    /// It goes on from a file.
    File,
}

/// How a guest came to run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Started {
    /// What it began with.
    from: Origin,
    /// From the start of the process until the guest ran.
    started_ms: u128,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "its kernel",
            Self::BaseMemory => "its base's memory",
            Self::File => "the file",
        })
    }
}

impl fmt::Display for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "started in {} ms from {}", self.started_ms, self.from)
    }
}

/// Checks that this host can run VMs.
pub(crate) fn check_host() -> Result<(), Failure> {
    match HostCheck::run() {
        Ok(_) => Ok(()),
        Err(e) => Err(host_failure(&e)),
    }
}

/// Says so where guests would be interpreted: such a /dev/kvm exists, and is of little use.
pub(crate) fn warn_of_slow_host(output: Output) {
    if matches!(HostCheck::has_hardware_virtualisation(), Ok(false)) {
        output.note(
            "howdah: this CPU shows neither svm nor vmx: /dev/kvm interprets guests here, about a \
             thousand times slower",
        );
    }
}

/// What a host lacks; the error itself says the way out.
pub(crate) fn host_failure(error: &HostError) -> Failure {
    Failure::plain(Exit::Host, "this host cannot run VMs", error)
}

/// Runs the VM of `dir` in this process until it ends.
pub(crate) fn run(dir: &VmDir, home: &Home, front: Front, jail: &JailArgs) -> anyhow::Result<End> {
    // A configuration that cannot be read is told of when the machine is made of it.
    let config = dir.config().ok();
    let tap = match &config {
        Some(config) => HeldTap::of(home, dir.name(), config),
        None => HeldTap::open(None),
    };
    if config.as_ref().is_some_and(|config| config.network.is_some()) {
        net::refresh(home)?;
    }
    let limits = config.map(|config| config.limits).unwrap_or_default();
    if limits.need_cgroup() {
        cgroup::limit(Cgroup::enter(home, dir.name()), &limits, dir.name())?;
    }
    let asking = Asking::prepare(dir, home, None)?;
    let (starting_dir, starting_home) = (dir.clone(), home.clone());
    run_with(dir, home, front, jail, move |console, events| {
        let mut journal = starting_dir.journal()?;
        settle(&starting_dir, asking, &mut journal)?;
        kvm::start(&starting_dir, &starting_home, journal, &tap, console, events)
    })
}

/// Runs the machine that `bring` makes, in this process until it ends. Confines the process; what
/// `bring` needs from outside must be open already.
pub(crate) fn run_with(
    dir: &VmDir,
    home: &Home,
    front: Front,
    jail: &JailArgs,
    bring: impl FnOnce(&Arc<Console>, &Sender<Event>) -> Result<Brought, Failure> + Send + 'static,
) -> anyhow::Result<End> {
    let begun = Instant::now();
    if front == Front::Detached {
        spawn::detach();
    }
    let lock = dir.lock()?;
    jail::enter(jail, dir, home)?;
    let (process, events) = Process::new(dir.clone());
    signals::watch(events.clone())?;
    let console = Arc::new(Console::new(&dir.console_log())?);
    let server = server::start(dir, Arc::clone(&console), events.clone(), Event::Asked)?;
    if front == Front::Terminal {
        show_on_stdout(&console);
    }
    let shown = Arc::clone(&console);
    let (tell, started) = bounded(1);
    std::thread::spawn(move || {
        let work = || {
            jail::confine(Kind::Handoff)?;
            let (machine, from) = bring(&console, &events)?;
            let _ = tell.send(Started { from, started_ms: begun.elapsed().as_millis() });
            Ok(machine)
        };
        let arrived = guarded("start of the VM", work).and_then(|started| started);
        let _ = events.send(Event::Arrived(arrived));
    });
    let ready = Box::new(move || {
        let Ok(started) = started.try_recv() else { return };
        tracing::info!("{started}");
        match front {
            Front::Detached => spawn::say(&Ready::Running(serde_json::to_value(&started).ok())),
            // The terminal may be gone already; the guest runs.
            Front::Terminal => _ = writeln!(io::stderr(), "howdah: {started}"),
        }
    });
    let end = process.run(Coming { phase: Phase::Starting, links: None, ready });
    let end = finish(dir, end, &shown, &server);
    drop(lock);
    end
}

/// What is left to do when the main loop has ended.
pub(crate) fn finish(
    dir: &VmDir,
    end: anyhow::Result<End>,
    console: &Console,
    server: &Server,
) -> anyhow::Result<End> {
    console.flush();
    server.finish();
    // A socket nobody listens on does no harm; a tidy directory says more.
    let _ = std::fs::remove_file(dir.path().join(VmDir::SOCKET));
    let end = end?;
    if end == End::HandedOff && visit::kept_bytes(dir) == 0 {
        // Released: the peer runs the guest, this disk is history.
        dir.remove_disk()?;
    }
    Ok(end)
}

/// A viewer like any other: a stuck terminal does not hold the guest up.
fn show_on_stdout(console: &Console) {
    let view = console.view();
    std::thread::spawn(move || {
        let mut stdout = io::stdout();
        for piece in view {
            if stdout.write_all(&piece).and_then(|()| stdout.flush()).is_err() {
                break;
            }
        }
    });
}
