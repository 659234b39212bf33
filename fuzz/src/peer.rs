//! A link on which everything was said beforehand, and a target's host that watches what is done and
//! said.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Read, Write},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use crossbeam_channel::Sender;
use guest_images::Chunk;
use handoff::{
    ChunkId, Offer, Refusal, Space, TargetHost, TargetVm, Transport,
    engine::{Incoming, Limits, accept},
    ownership::{Journal, Record, State, Verdict, answer},
    sim::{MemHost, MemTarget},
    tcp::MonotonicClock,
    vm::{Prepared, VmError},
    wire::{Decoder, Frame},
};

use crate::world::{GEOMETRY, QUESTION, bases};

/// What fails here, as bits of an input's flags; bit 0 is not a fault.
mod fault {
    pub(super) const LOAD: u8 = 1 << 1;
    pub(super) const START: u8 = 1 << 2;
    pub(super) const DISK: u8 = 1 << 3;
    pub(super) const RECORD: u8 = 1 << 4;
    pub(super) const OFFER: u8 = 1 << 5;
}

/// Frames that a source waits for, by their numbers.
pub mod said {
    /// Welcome.
    pub const WELCOME: u8 = 0;
    /// Ack.
    pub const ACK: u8 = 1;
    /// Prepared.
    pub const PREPARED: u8 = 2;
    /// Resumed.
    pub const RESUMED: u8 = 3;
    /// Declined.
    pub const DECLINED: u8 = 4;
}

/// How long the source waits for a frame before it goes on all the same.
const PATIENCE: Duration = Duration::from_millis(40);

/// What the source says on a link.
#[derive(Debug, Default)]
pub struct Script(VecDeque<(Option<u8>, Vec<u8>)>);

impl Script {
    /// Bytes come next.
    pub fn say(&mut self, bytes: &[u8]) {
        match self.0.back_mut() {
            Some((_, last)) => last.extend_from_slice(bytes),
            None => self.0.push_back((None, bytes.to_vec())),
        }
    }

    /// What comes next comes behind this kind of frame from the target.
    pub fn wait(&mut self, kind: u8) {
        self.0.push_back((Some(kind), Vec::new()));
    }
}

/// What happened at the target, and where its record is.
#[derive(Debug)]
pub struct Watch {
    journal: PathBuf,
    faults: u8,
    started: AtomicU32,
    durable: AtomicBool,
    /// Kinds of frames that were said, by [`Watch::bit`].
    said: Mutex<u8>,
    moved: Condvar,
}

impl Watch {
    /// Nothing happened; `faults` say what will fail.
    pub fn new(journal: PathBuf, faults: u8) -> Self {
        let (started, durable) = (AtomicU32::new(0), AtomicBool::new(false));
        let (said, moved) = (Mutex::new(0), Condvar::new());
        Self { journal, faults, started, durable, said, moved }
    }

    /// How often the guest was started.
    pub fn started(&self) -> u32 {
        self.started.load(SeqCst)
    }

    fn fails(&self, fault: u8) -> Result<(), VmError> {
        if self.faults & fault == 0 { Ok(()) } else { Err("told to fail".into()) }
    }

    /// The record as a process would find it that starts now.
    fn record(&self) -> Option<Record> {
        let journal = Journal::open(&self.journal).expect("a whole record");
        journal.record().cloned()
    }

    /// The record, if it is about this handoff and gives the epoch that was offered.
    fn state(&self) -> Option<State> {
        let record = self.record()?;
        let ours = record.handoff() == Some(QUESTION.handoff) && record.epoch == QUESTION.epoch;
        ours.then_some(record.state)
    }

    /// The kinds of frames that a source waits for.
    fn bit(frame: &Frame) -> u8 {
        match frame {
            Frame::Welcome(_) => 1 << said::WELCOME,
            Frame::Ack(_) => 1 << said::ACK,
            Frame::Prepared { .. } => 1 << said::PREPARED,
            Frame::Resumed(_) => 1 << said::RESUMED,
            Frame::Declined { .. } => 1 << said::DECLINED,
            _ => 0,
        }
    }

    fn note(&self, frame: &Frame) {
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) |= Self::bit(frame);
        self.moved.notify_all();
    }

    /// Waits a little for a kind of frame.
    fn wait_for(&self, kind: u8) {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.moved.wait_timeout_while(said, PATIENCE, |said| *said >> (kind % 8) & 1 == 0);
    }

    /// What is said must be on disk.
    fn check(&self, frame: &Frame) {
        match frame {
            Frame::Prepared { handoff, root: said, .. } => {
                let state = self.state();
                let held = match &state {
                    Some(State::Prepared { root, .. }) => root == said,
                    Some(State::Owner(_)) => true,
                    _ => false,
                };
                assert!(held && *handoff == QUESTION, "Prepared, and the record says {state:?}");
                assert!(self.durable.load(SeqCst), "Prepared, and the disk is not durable");
            }
            Frame::Resumed(_) => {
                // Once the source has let go the record need not name the handoff any more.
                let owns = self.record().is_some_and(|record| {
                    record.epoch == QUESTION.epoch && matches!(record.state, State::Owner(_))
                });
                assert!(owns && self.started() == 1, "Resumed, and {:?}", self.record());
            }
            Frame::Declined { .. } => {
                let state = self.state();
                assert!(matches!(state, Some(State::Declined { .. })), "Declined, and {state:?}");
                assert_eq!(self.started(), 0, "Declined, and the guest runs");
            }
            // It may be older than what was decided since, but not than what cannot change any more.
            Frame::Status {
                question,
                verdict: verdict @ (Verdict::Owner | Verdict::Declined { .. }),
            } => {
                assert_eq!(*verdict, answer(self.record().as_ref(), *question));
            }
            _ => {}
        }
    }
}

/// One link; when all that was said on it is read, the source makes the next one.
pub struct Link {
    said: Script,
    watch: Arc<Watch>,
    relink: Sender<Incoming<Link>>,
    later: VecDeque<Script>,
    limits: Limits,
}

impl Link {
    /// A link on which `said` is said, and behind it those on which `later` is.
    pub fn new(
        said: Script,
        watch: Arc<Watch>,
        relink: Sender<Incoming<Link>>,
        later: VecDeque<Script>,
        limits: Limits,
    ) -> Self {
        Self { said, watch, relink, later, limits }
    }
}

/// What the target hears.
pub struct Rx {
    link: Link,
    at: usize,
}

/// What the target says.
pub struct Tx {
    watch: Arc<Watch>,
    decoder: Decoder,
}

impl Transport for Link {
    type Tx = Tx;
    type Rx = Rx;

    fn split(self) -> io::Result<(Tx, Rx)> {
        let tx = Tx { watch: Arc::clone(&self.watch), decoder: Decoder::default() };
        Ok((tx, Rx { link: self, at: 0 }))
    }
}

impl Read for Rx {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while let Some((wait, bytes)) = self.link.said.0.front_mut() {
            if let Some(kind) = wait.take() {
                self.link.watch.wait_for(kind);
            }
            let taken = (&bytes[self.at..]).read(into)?;
            self.at += taken;
            if taken > 0 {
                return Ok(taken);
            }
            self.link.said.0.pop_front();
            self.at = 0;
        }
        if let Some(said) = self.link.later.pop_front() {
            let Link { watch, relink, later, limits, .. } = &mut self.link;
            let (watch, later) = (Arc::clone(watch), std::mem::take(later));
            let next = Link::new(said, watch, relink.clone(), later, limits.clone());
            // One that does not begin with a Hello is nothing to the target.
            if let Ok(next) = accept(next, limits, &MonotonicClock::default()) {
                let _ = relink.send(next);
            }
        }
        Ok(0)
    }
}

impl Write for Tx {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.decoder.feed(bytes);
        while let Some(frame) = self.decoder.next_frame().expect("the target says frames") {
            self.watch.check(&frame);
            self.watch.note(&frame);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes guests of one size.
pub struct Host {
    /// Who watches them.
    pub watch: Arc<Watch>,
}

impl TargetHost for Host {
    type Vm = Watched;

    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<Watched>, Refusal> {
        if offer.geometry != GEOMETRY || self.watch.fails(fault::OFFER).is_err() {
            return Err(Refusal::Other("no room for a guest of this size".into()));
        }
        let Prepared { vm, bases, start } = MemHost::new(bases()).prepare(offer)?;
        if self.watch.fails(fault::RECORD).is_err() {
            // The new record cannot be written where a directory is.
            let _ = fs::create_dir(self.watch.journal.with_extension("new"));
        }
        let vm = Watched { vm, watch: Arc::clone(&self.watch) };
        Ok(Prepared { vm, bases, start })
    }
}

/// A guest that is watched.
#[derive(Debug)]
pub struct Watched {
    vm: MemTarget,
    watch: Arc<Watch>,
}

impl Watched {
    /// The guest.
    pub fn inner(&self) -> &MemTarget {
        &self.vm
    }

    fn changed(&self, id: ChunkId) {
        assert_eq!(self.watch.started(), 0, "a guest that runs is written to");
        if id.space == Space::Disk {
            self.watch.durable.store(false, SeqCst);
        }
    }
}

impl TargetVm for Watched {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        self.changed(id);
        self.vm.write_chunk(id, chunk)
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        self.changed(id);
        self.vm.reset_chunk(id)
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        self.vm.read_chunk(id, into)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.watch.fails(fault::LOAD)?;
        self.vm.load_state(state)
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        self.watch.fails(fault::DISK)?;
        self.watch.durable.store(true, SeqCst);
        self.vm.make_disk_durable()
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        self.vm.full_hash()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let state = self.watch.state();
        assert!(matches!(state, Some(State::Owner(_))), "started, and the record says {state:?}");
        self.watch.fails(fault::START)?;
        self.vm.resume()?;
        assert_eq!(self.watch.started.fetch_add(1, SeqCst), 0, "started twice");
        Ok(())
    }

    fn discard(&mut self) {
        assert_eq!(self.watch.started(), 0, "a guest that runs is discarded");
        self.vm.discard();
    }
}
