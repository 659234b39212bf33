//! A played guest goes from one end to the other in one process.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::TraceVm;
use crate::{
    BaseView, Bases, ChunkId, ChunkSet, Clock, Connect, SourceVm, Transport,
    engine::{
        AcceptError, Incoming, KeptReason, ReceiveError, ReceiveOptions, SendError, SendOptions,
        SendOutcome, accept, receive, send,
    },
    ownership::{Journal, JournalError, Record, VmId},
    report::{Progress, Report},
    sim::{MemHost, MemTarget},
};

/// How often the receiving side looks whether it is still needed.
const TICK: Duration = Duration::from_millis(5);

/// A guest that moved.
#[derive(Debug)]
pub struct Played {
    /// What the engine says of it.
    pub report: Report,
    /// What arrived.
    pub target: MemTarget,
}

/// Why a played guest did not arrive as it was.
#[derive(Debug, thiserror::Error)]
pub enum PlayError {
    /// The files of the ownership records could not be made.
    #[error("cannot prepare {what}: {source}")]
    Scratch {
        /// What for.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// An ownership record could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// It could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// It stayed.
    #[error("the guest stayed: {reason}")]
    Kept {
        /// Why.
        reason: KeptReason,
        /// What was done until then.
        report: Box<Report>,
    },
    /// It is not known whether it arrived.
    #[error("the other end did not say in time whether the guest arrived")]
    InDoubt,
    /// No link came.
    #[error("no link came within {0:?}")]
    NoLink(Duration),
    /// A link came that begins otherwise.
    #[error(transparent)]
    Accept(#[from] AcceptError),
    /// It was not received.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// Something else arrived.
    #[error("{0:?} is not what it was at the source")]
    Differs(ChunkId),
    /// A thread ended unforeseen.
    #[error("the receiving side panicked")]
    Panicked,
}

/// Hands the guest of a trace off to a host in memory, with the real engine at both ends, and
/// compares every chunk that ever changed. `ends` are the other ends of the links that `connect`
/// makes; ownership records are kept in `scratch`, an empty directory.
#[allow(clippy::too_many_arguments)]
pub fn play<C: Connect + Send, K: Clock>(
    vm: &mut TraceVm<K>,
    connect: &mut C,
    ends: &Receiver<C::Link>,
    (sending, receiving): (&SendOptions, &ReceiveOptions),
    scratch: &Path,
    clock: &dyn Clock,
    progress: &mut dyn FnMut(&Progress),
    cancel: &AtomicBool,
) -> Result<Played, PlayError> {
    let host = MemHost::new(bases_of(vm));
    let over = AtomicBool::new(false);
    let (sent, received) = std::thread::scope(|scope| {
        let target = scope.spawn(|| {
            let first = first_link(ends, receiving, clock, &over)?;
            take(first, ends, host, scratch, receiving, clock, &over)
        });
        let sent = send_trace(vm, connect, sending, scratch, clock, progress, cancel);
        // A target that holds a prepared copy asks for long; one that was never reached waits too.
        if sent.is_err() {
            over.store(true, Relaxed);
        }
        (sent, target.join())
    });
    let report = sent?;
    let target = received.map_err(|_| PlayError::Panicked)??;
    compare(vm, &target)?;
    Ok(Played { report, target })
}

/// Hands the guest of a trace off to the other end of the links that `connect` makes, which holds the
/// trace's base, and says what it took.
pub fn send_trace<C: Connect + Send, K: Clock>(
    vm: &mut TraceVm<K>,
    connect: &mut C,
    options: &SendOptions,
    scratch: &Path,
    clock: &dyn Clock,
    progress: &mut dyn FnMut(&Progress),
    cancel: &AtomicBool,
) -> Result<Report, PlayError> {
    let mut journal = new_journal(&scratch.join("source"))?;
    journal.write(Record::created(VmId::random()))?;
    let bases = bases_of(vm);
    match send(vm, bases, connect, &mut journal, options, clock, progress, cancel)? {
        SendOutcome::Moved { report, .. } => Ok(report),
        SendOutcome::KeptHere { reason, report, .. } => {
            Err(PlayError::Kept { reason, report: Box::new(report) })
        }
        SendOutcome::InDoubt { .. } => Err(PlayError::InDoubt),
    }
}

fn bases_of<K: Clock>(vm: &TraceVm<K>) -> Bases {
    let base: Arc<dyn BaseView> = Arc::clone(vm.trace().base()) as _;
    base.into()
}

fn new_journal(path: &Path) -> Result<Journal, PlayError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(PlayError::Scratch { what: "an ownership record", source })
        }
        _ => Ok(Journal::open(path)?),
    }
}

/// Waits for the first link, as long as a source may take to make it.
fn first_link<L: Transport>(
    ends: &Receiver<L>,
    options: &ReceiveOptions,
    clock: &dyn Clock,
    over: &AtomicBool,
) -> Result<L, PlayError> {
    let limit = options.limits.connect + options.limits.greeting;
    let deadline = clock.now() + limit;
    loop {
        match ends.recv_timeout(TICK) {
            Ok(link) => return Ok(link),
            Err(_) if over.load(Relaxed) || clock.now() > deadline => {
                return Err(PlayError::NoLink(limit));
            }
            Err(_) => {}
        }
    }
}

/// Receives one guest over links that come one after the other. `over` ends the wait for another.
pub fn take<L: Transport>(
    first: L,
    ends: &Receiver<L>,
    mut host: MemHost,
    scratch: &Path,
    options: &ReceiveOptions,
    clock: &dyn Clock,
    over: &AtomicBool,
) -> Result<MemTarget, PlayError> {
    let mut journal = new_journal(&scratch.join("target"))?;
    let first = accept(first, &options.limits, clock)?;
    let (relink, relinks) = unbounded();
    let done = AtomicBool::new(false);
    let received = std::thread::scope(|scope| {
        scope.spawn(|| greet(ends, &relink, options, clock, (over, &done)));
        let received = receive(first, &mut host, &mut journal, &relinks, options, clock);
        done.store(true, Relaxed);
        received
    });
    Ok(received?.vm)
}

fn greet<L: Transport>(
    ends: &Receiver<L>,
    relink: &Sender<Incoming<L>>,
    options: &ReceiveOptions,
    clock: &dyn Clock,
    (over, done): (&AtomicBool, &AtomicBool),
) {
    while !done.load(Relaxed) && !over.load(Relaxed) {
        if let Ok(link) = ends.recv_timeout(TICK)
            // What cannot be read is another link that broke: the source makes the next.
            && let Ok(link) = accept(link, &options.limits, clock)
            && relink.send(link).is_err()
        {
            return;
        }
    }
}

fn compare<K: Clock>(vm: &TraceVm<K>, target: &MemTarget) -> Result<(), PlayError> {
    let trace = vm.trace();
    let mut changed = ChunkSet::new(vm.geometry());
    trace.initial().iter().for_each(|(id, _)| _ = changed.insert(*id));
    trace.changes().iter().for_each(|change| _ = changed.insert(change.id));
    target.written().for_each(|id| _ = changed.insert(id));
    match changed.iter().find(|id| vm.chunk(*id) != target.chunk(*id)) {
        Some(id) => Err(PlayError::Differs(id)),
        None => Ok(()),
    }
}
