//! Boots a guest only to take its snapshot: memory, machine and disk of a base with memory.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use guest_images::{Base, overlay::Overlay};
use vmm::{Paused, Vm};

use super::{HeldTap, kvm, ready, signals};
use crate::{
    cli::JailArgs,
    console::Console,
    disk,
    failure::{Exit, Failure},
    home::VmConfig,
    jail,
};

/// When to take the snapshot.
pub(crate) struct Wanted {
    /// After a line with this text on the serial console.
    pub(crate) ready: String,
    /// Which must come within this.
    pub(crate) timeout: Duration,
    /// And so much later.
    pub(crate) settle: Duration,
    /// Where the console is kept, if the guest does not get ready.
    pub(crate) console_log: PathBuf,
}

/// A guest at one instant.
pub(crate) struct Snapshot {
    /// The file of its RAM.
    pub(crate) ram: PathBuf,
    /// Its machine.
    pub(crate) machine: Vec<u8>,
    /// The file of its disk.
    pub(crate) disk: PathBuf,
}

/// Boots a guest of `base` and takes its snapshot into files in `dir`.
pub(crate) fn take(
    config: &VmConfig,
    base: Arc<Base>,
    dir: &Path,
    wanted: &Wanted,
    jail: &JailArgs,
) -> Result<Snapshot, Failure> {
    // The log of an earlier build would be read as this one's.
    let _ = fs::remove_file(&wanted.console_log);
    let tap = HeldTap::open(config.tap.as_deref());
    jail::enter_with_filters_only(jail)?;
    let (tell, events) = crossbeam_channel::unbounded();
    signals::watch(tell.clone()).map_err(failed)?;
    let console = Arc::new(Console::new(&wanted.console_log)?);
    let said = console.view();
    let overlay = Arc::new(Overlay::create(dir, Arc::clone(&base)).map_err(failed)?);
    let build = kvm::build(config, &base, &overlay, &tap, &console, &tell)?;
    let vm = Vm::boot(build).map_err(kvm::machine_failure(&"guest of the base"))?;
    let vm = vm.resume().map_err(|e| failed(e.error))?;
    let wait = || {
        ready::wait(&said, &events, &wanted.ready, wanted.timeout)?;
        ready::settle(&events, wanted.settle)
    };
    if let Err(why) = wait() {
        console.flush();
        return Err(not_ready(&why, wanted));
    }
    let vm = vm.pause().map_err(|e| failed(e.error))?;
    let taken = write(vm, &overlay, dir)?;
    let _ = fs::remove_file(&wanted.console_log);
    Ok(taken)
}

fn write(mut vm: Vm<Paused>, overlay: &Overlay, dir: &Path) -> Result<Snapshot, Failure> {
    // Saving may write guest memory, so it goes first.
    let machine = vm.machine().map_err(failed)?;
    let ram = dir.join("snapshot.memory");
    let file = File::create_new(&ram).map_err(|e| Failure::file("create", &ram, &e))?;
    vm.write_memory(&file).map_err(failed)?;
    let disk = dir.join("snapshot.disk");
    disk::export(overlay, &disk)?;
    Ok(Snapshot { ram, machine, disk })
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::plain(Exit::Failed, "guest of the base", error)
}

fn not_ready(why: &ready::NotReady, wanted: &Wanted) -> Failure {
    if *why == ready::NotReady::Interrupted {
        return Failure::plain(Exit::Cancelled, "base not built", why);
    }
    let way_out = format!(
        "see {}; --timeout-s gives it longer, --ready waits for other words",
        wanted.console_log.display()
    );
    Failure::new(Exit::Failed, "guest of the base", why, way_out)
}
