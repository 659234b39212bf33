//! Ctrl-C and kill, as events.

use crossbeam_channel::Sender;
use nix::sys::signal::{SigSet, Signal};

use super::Event;

/// Turns SIGINT and SIGTERM into [`Event::Terminate`]; a second one ends the process at once.
///
/// Called before any other thread starts, so that they inherit the mask: one that has not would take
/// the signal, and the process would be gone with the guest's unflushed writes.
pub(crate) fn watch(events: Sender<Event>) -> nix::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    std::thread::spawn(move || {
        let mut seen = 0;
        while let Ok(signal) = set.wait() {
            seen += 1;
            if seen > 1 {
                // As a shell expects of a process that a signal ended.
                std::process::exit(128 + signal as i32);
            }
            let _ = events.send(Event::Terminate);
        }
    });
    Ok(())
}
