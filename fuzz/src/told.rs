//! A target that says what it was told to say, and the guest that is handed off to it.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use guest_images::Chunk;
use handoff::{
    ChunkId, ChunkSet, Connect, Geometry, SourceVm, Space, StateRoot, TargetVm, Transport,
    ownership::{Journal, Question, Record, State},
    sim::MemTarget,
    vm::VmError,
    wire::{Decoder, Frame},
};

use crate::world::{GEOMETRY, QUESTION, bases, chunk};

/// How long the target waits for what is to come before the next thing that it says. Then the link breaks.
const PATIENCE: Duration = Duration::from_millis(30);
/// How long it waits at once: the source's own waits are looked at in between.
const TICK: Duration = Duration::from_millis(5);

/// What the source has said on a link.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    /// The handoff, by the Hello.
    pub question: Question,
    /// The number of the last segment.
    pub last_seq: u64,
    /// The root in Prepare.
    pub root: StateRoot,
    /// Kinds of frames, by [`Heard::bit`].
    kinds: u8,
}

impl Heard {
    fn nothing() -> Self {
        Self { question: QUESTION, last_seq: 0, root: StateRoot([0; 32]), kinds: 0 }
    }

    fn bit(frame: &Frame) -> u8 {
        match frame {
            Frame::Hello(_) => 1,
            Frame::Segment(_) => 2,
            Frame::Prepare(_) => 3,
            Frame::Commit(_) => 4,
            Frame::Released(_) => 5,
            Frame::Abort { .. } => 6,
            _ => 7,
        }
    }

    fn take(&mut self, frame: &Frame) {
        self.kinds |= 1 << Self::bit(frame);
        match frame {
            Frame::Hello(hello) => self.question = hello.handoff,
            Frame::Segment(segment) => self.last_seq = segment.seq,
            Frame::Prepare(prepare) => self.root = prepare.root,
            _ => {}
        }
    }

    fn satisfies(&self, after: u8) -> bool {
        after == 0 || self.kinds >> after & 1 == 1
    }
}

/// What the target says next: behind which kind of frame from the source (0: at once), and which bytes.
pub struct Line {
    /// Behind what: see [`Heard`].
    pub after: u8,
    /// The bytes.
    pub say: Say,
}

/// Makes what is said of what was heard until then.
pub type Say = Box<dyn Fn(&Heard) -> Vec<u8> + Send>;

/// The links that the source makes, one after the other; behind the last there is none.
pub struct Links {
    /// What is said on each.
    pub scripts: VecDeque<VecDeque<Line>>,
    /// Who watches the source.
    pub guard: Arc<Guard>,
}

impl Connect for Links {
    type Link = Link;

    fn connect(&mut self, _: Duration) -> io::Result<Link> {
        let script = self.scripts.pop_front().ok_or(io::ErrorKind::ConnectionRefused)?;
        Ok(Link { script, guard: Arc::clone(&self.guard) })
    }
}

/// One link.
pub struct Link {
    script: VecDeque<Line>,
    guard: Arc<Guard>,
}

struct Shared {
    heard: Mutex<Heard>,
    moved: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the source says.
pub struct Tx {
    shared: Arc<Shared>,
    guard: Arc<Guard>,
    decoder: Decoder,
}

/// What it hears.
pub struct Rx {
    shared: Arc<Shared>,
    script: VecDeque<Line>,
    waited: Duration,
    /// Said, and not read yet.
    left: VecDeque<u8>,
}

impl Transport for Link {
    type Tx = Tx;
    type Rx = Rx;

    fn split(self) -> io::Result<(Tx, Rx)> {
        let shared = Shared { heard: Mutex::new(Heard::nothing()), moved: Condvar::new() };
        let shared = Arc::new(shared);
        let rx = Rx {
            shared: Arc::clone(&shared),
            script: self.script,
            waited: Duration::ZERO,
            left: VecDeque::new(),
        };
        Ok((Tx { shared, guard: self.guard, decoder: Decoder::default() }, rx))
    }
}

impl Write for Tx {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.decoder.feed(bytes);
        while let Some(frame) = self.decoder.next_frame().expect("the source says frames") {
            self.guard.check(&frame);
            self.shared.lock().take(&frame);
            self.shared.moved.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Rx {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() {
            let Some(line) = self.script.front() else { return Ok(0) };
            let heard = self.shared.lock();
            let waiting = self
                .shared
                .moved
                .wait_timeout_while(heard, TICK, |heard| !heard.satisfies(line.after));
            let heard = *waiting.unwrap_or_else(PoisonError::into_inner).0;
            if heard.satisfies(line.after) {
                self.left.extend((line.say)(&heard));
                self.script.pop_front();
                self.waited = Duration::ZERO;
            } else {
                self.waited += TICK;
                if self.waited >= PATIENCE {
                    return Ok(0);
                }
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        self.left.read(into)
    }
}

/// Watches what the source does and says, against its record.
#[derive(Debug)]
pub struct Guard {
    journal: PathBuf,
    running: AtomicBool,
    starts: AtomicU32,
}

impl Guard {
    /// A guest that runs, and where its record is.
    pub fn new(journal: PathBuf) -> Self {
        Self { journal, running: AtomicBool::new(true), starts: AtomicU32::new(0) }
    }

    /// Whether the guest runs here.
    pub fn is_running(&self) -> bool {
        self.running.load(SeqCst)
    }

    /// The record as a process would find it that starts now.
    pub fn record(&self) -> Record {
        let journal = Journal::open(&self.journal).expect("a whole record");
        journal.record().cloned().expect("a source has a record")
    }

    /// What is said must be on disk, and the guest as the record says.
    fn check(&self, frame: &Frame) {
        match frame {
            Frame::Commit(_) => {
                let state = self.record().state;
                let given = matches!(state, State::Committed { .. } | State::Released { .. });
                assert!(given, "Commit, and the record says {state:?}");
                assert!(!self.is_running(), "Commit, and the guest runs");
            }
            Frame::Released(_) => {
                let state = self.record().state;
                let released = matches!(state, State::Released { .. });
                assert!(released, "Released, and the record says {state:?}");
                assert!(!self.is_running(), "Released, and the guest runs");
            }
            Frame::Abort { .. } => {
                let record = self.record();
                assert!(record.may_run(), "Abort, and the record says {record}");
            }
            _ => {}
        }
    }
}

/// A guest that writes a little while it runs.
pub struct Guest {
    memory: MemTarget,
    guard: Arc<Guard>,
    harvests: u64,
}

impl Guest {
    /// One that differs from its base in some chunks.
    pub fn new(guard: Arc<Guard>) -> Self {
        let mut guest = Self { memory: MemTarget::new(bases(), GEOMETRY), guard, harvests: 0 };
        for number in 0..12 {
            guest.write(number);
        }
        guest
    }

    fn write(&mut self, number: u64) -> ChunkId {
        let space = if number.is_multiple_of(3) { Space::Disk } else { Space::Ram };
        let id = ChunkId { space, index: number % GEOMETRY.space_len(space) };
        self.memory.write_chunk(id, &chunk(100 + number as u8)).expect("a chunk of the guest");
        id
    }

    fn all(&self) -> ChunkSet {
        let mut all = ChunkSet::new(GEOMETRY);
        for id in self.memory.written() {
            all.insert(id);
        }
        all
    }
}

impl SourceVm for Guest {
    fn geometry(&self) -> Geometry {
        GEOMETRY
    }

    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        Ok(self.memory.written().filter(|id| id.space == Space::Disk).count() as u64)
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        Ok(self.all())
    }

    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        let mut changed = ChunkSet::new(GEOMETRY);
        self.harvests += 1;
        if self.guard.is_running() && self.harvests < 3 {
            let id = self.write(20 + self.harvests);
            changed.insert(id);
        }
        Ok(changed)
    }

    fn stop_tracking(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        self.memory.read_chunk(id, into)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.guard.running.store(false, SeqCst);
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(b"the machine's state".to_vec())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        self.memory.full_hash()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let record = self.guard.record();
        assert!(record.may_run(), "set running, and the record says {record}");
        self.guard.running.store(true, SeqCst);
        self.guard.starts.fetch_add(1, SeqCst);
        Ok(())
    }
}
