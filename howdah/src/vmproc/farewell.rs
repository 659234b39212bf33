//! What a peer that could not be reached is told later: that a handoff to it is over. Until it hears
//! so it holds memory and name of a VM that does not come.

use crossbeam_channel::{Receiver, Sender, bounded};
use handoff::{
    engine::{self, Limits, Untold},
    tcp::MonotonicClock,
};

use crate::{home::VmName, peers::Dial};

/// A thread that tries to tell it. It ends when this is dropped, and with the process.
#[derive(Debug)]
pub(crate) struct Farewell {
    _stop: Sender<()>,
}

impl Farewell {
    /// Begins to tell the peer at the other end of `connect`. The guest, and whoever asked for the handoff,
    /// wait for none of it. Nothing where there is no thread to be had: then the peer waits until its
    /// own patience is over.
    pub(super) fn begin(
        untold: Untold,
        vm: &VmName,
        connect: Dial,
        limits: Limits,
    ) -> Option<Self> {
        let (stop, stopped) = bounded(0);
        let vm = vm.to_string();
        let work = move || say(&untold, &vm, connect, &limits, &stopped);
        // As confined as the thread of the handoff, which starts it.
        let started = std::thread::Builder::new().name("farewell".into()).spawn(work);
        started.ok().map(|_| Self { _stop: stop })
    }
}

fn say(untold: &Untold, vm: &str, mut connect: Dial, limits: &Limits, stopped: &Receiver<()>) {
    let id = untold.handoff.handoff;
    let _entered = tracing::error_span!("handoff", trace = %id, side = "source").entered();
    tracing::debug!(
        "the peer may not know that it is over: it is told as soon as it can be reached"
    );
    let clock = MonotonicClock::default();
    match engine::say_farewell(untold, vm, &mut connect, limits, &clock, stopped) {
        engine::Farewell::Heard => tracing::info!("the peer has heard that it is over"),
        engine::Farewell::TakenThere => tracing::warn!(
            "the peer says that the VM is its own, and it is this side's: if somebody took it over \
             there, stop one of the two"
        ),
        // It has given up waiting by now, or is told more by the next handoff.
        engine::Farewell::Unheard(_) | engine::Farewell::Stopped => {}
    }
}
