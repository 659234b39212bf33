//! A pulse that makes every CPU of an emulated lab host take an interrupt now and then.
//!
//! QEMU's emulation of VMRUN, when an interrupt window is open, ors a bit into a CPU's word of pending
//! interrupt requests without a lock (`helper_vmrun`, 7.2 to 10.0). A timer or another CPU that sets
//! its bit at the same moment loses it. The interrupt stays requested in the emulated local APIC, but
//! nobody looks there before the next one for this CPU comes. If the lost one was the CPU's timer, no
//! next one comes: the timer is only set again by its own interrupt. Guests whose timers are on that
//! CPU then fall silent, and after minutes the host's kernel complains of a lost CPU. Any other
//! interrupt mends it, so each CPU is woken from each other one.

use std::{io, os::fd::OwnedFd, sync::Arc, thread, time::Duration};

use anyhow::{Context, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::eventfd::EventFd,
    unistd::{Pid, read, write},
};

/// Time between two wake-ups: what a lost interrupt costs at most, for about 1 % of the CPUs.
const PERIOD: Duration = Duration::from_millis(10);
/// Above all that is not real-time, so that a wake-up interrupts whatever runs there.
const PRIORITY: i32 = 1;

/// Starts the pulse, for as long as the lab host lives. One CPU needs none: it cannot lose what only
/// another one's thread could have set meanwhile.
pub(crate) fn start() -> Result<()> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    if cpus < 2 {
        return Ok(());
    }
    let bells = (0..cpus).map(|_| EventFd::new().map(OwnedFd::from)).collect::<Result<Vec<_>, _>>();
    let bells = Arc::new(bells.context("cannot make an eventfd")?);
    for cpu in 0..cpus {
        let (theirs, mine) = (Arc::clone(&bells), Arc::clone(&bells));
        spawn(cpu, "pulse", move || ring_others(&theirs, cpu))?;
        spawn(cpu, "bell", move || answer(&mine, cpu))?;
    }
    Ok(())
}

fn spawn(cpu: usize, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(format!("{name}-{cpu}"));
    let work = move || match settle(cpu) {
        Ok(()) => work(),
        Err(error) => eprintln!("lab host: no pulse on CPU {cpu}: {error}"),
    };
    thread.spawn(work).context("cannot start a thread")?;
    Ok(())
}

/// Binds the thread to its CPU.
fn settle(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    let priority = libc::sched_param { sched_priority: PRIORITY };
    // SAFETY: 0 is the calling thread, and the parameter outlives the call.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn ring_others(bells: &[OwnedFd], own: usize) {
    loop {
        thread::sleep(PERIOD);
        for (cpu, bell) in bells.iter().enumerate() {
            if cpu != own && write(bell, &1u64.to_ne_bytes()).is_err() {
                return;
            }
        }
    }
}

/// Is woken; that is all.
fn answer(bells: &[OwnedFd], own: usize) {
    let Some(bell) = bells.get(own) else { return };
    let mut count = [0; 8];
    while read(bell, &mut count).is_ok() {}
}
