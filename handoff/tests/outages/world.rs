//! A guest that notes what is done to it, and a cable that a hand can pull.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::{
    io::{self, Read, Write},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use guest_images::{CHUNK_SIZE, Chunk};
use handoff::{
    ChunkId, ChunkSet, Connect, Geometry, SourceVm, Space, Transport,
    link::{LinkGauge, READ_TICK, WRITE_TICK},
    vm::VmError,
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

/// What was done to a guest, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Done {
    Tracked,
    Harvested,
    Untracked,
    Paused,
    Resumed,
}

type Hook = Box<dyn FnMut(Done) + Send>;

struct Inside {
    ram: Vec<Chunk>,
    dirty: ChunkSet,
    running: bool,
    tracked: bool,
    done: Vec<(Done, Instant)>,
}

/// A guest in memory, which may write by itself.
#[derive(Clone)]
pub struct Guest {
    inside: Arc<Mutex<Inside>>,
    over: Arc<AtomicBool>,
    pub writes: Arc<AtomicU64>,
    /// Called at what is done to it.
    hook: Arc<Mutex<Option<Hook>>>,
}

fn geometry(chunks: usize) -> Geometry {
    Geometry { ram_chunks: chunks as u64, disk_chunks: 0 }
}

impl Guest {
    /// A guest of so many chunks, all of which are noise.
    pub fn noise(chunks: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(9);
        let mut ram = vec![[0; CHUNK_SIZE]; chunks];
        ram.iter_mut().for_each(|chunk| rng.fill(&mut chunk[..]));
        let inside = Inside {
            ram,
            dirty: ChunkSet::new(geometry(chunks)),
            running: true,
            tracked: false,
            done: Vec::new(),
        };
        Self {
            inside: Arc::new(Mutex::new(inside)),
            over: Arc::default(),
            writes: Arc::default(),
            hook: Arc::default(),
        }
    }

    pub fn hook(self, hook: impl FnMut(Done) + Send + 'static) -> Self {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
        self
    }

    /// Writes a few chunks again and again from now on, while it runs.
    pub fn writing(&self, every: Duration, hot: usize) -> JoinHandle<()> {
        let guest = self.clone();
        thread::spawn(move || {
            let mut rng = SmallRng::seed_from_u64(7);
            while !guest.over.load(SeqCst) {
                thread::sleep(every);
                let mut inside = guest.lock();
                if inside.running {
                    let index = rng.random_range(0..hot);
                    rng.fill(&mut inside.ram[index][..64]);
                    inside.dirty.insert(ChunkId { space: Space::Ram, index: index as u64 });
                    guest.writes.fetch_add(1, SeqCst);
                }
            }
        })
    }

    pub fn end(&self) {
        self.over.store(true, SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap()
    }

    fn note(&self, done: Done) {
        self.lock().done.push((done, Instant::now()));
        if let Some(hook) = self.hook.lock().unwrap().as_mut() {
            hook(done);
        }
    }

    pub fn ram(&self) -> Vec<Chunk> {
        self.lock().ram.clone()
    }

    /// Whether it runs as if nothing had ever been done to it.
    pub fn is_free(&self) -> bool {
        let inside = self.lock();
        inside.running && !inside.tracked
    }

    pub fn is_paused(&self) -> bool {
        !self.lock().running
    }

    pub fn when(&self, what: Done) -> Vec<Instant> {
        self.lock().done.iter().filter(|(done, _)| *done == what).map(|(_, at)| *at).collect()
    }
}

impl SourceVm for Guest {
    fn geometry(&self) -> Geometry {
        self.lock().dirty.geometry()
    }

    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        Ok(0)
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        self.note(Done::Tracked);
        let mut inside = self.lock();
        inside.tracked = true;
        inside.dirty = ChunkSet::new(inside.dirty.geometry());
        let mut all = inside.dirty.clone();
        for index in 0..inside.ram.len() as u64 {
            all.insert(ChunkId { space: Space::Ram, index });
        }
        Ok(all)
    }

    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        self.note(Done::Harvested);
        let mut inside = self.lock();
        assert!(inside.tracked);
        let none = ChunkSet::new(inside.dirty.geometry());
        Ok(std::mem::replace(&mut inside.dirty, none))
    }

    fn stop_tracking(&mut self) -> Result<(), VmError> {
        self.lock().tracked = false;
        self.note(Done::Untracked);
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        *into = self.lock().ram[id.index as usize];
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.lock().running = false;
        self.note(Done::Paused);
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(b"registers".to_vec())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Err("not asked for".into())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.lock().running = true;
        self.note(Done::Resumed);
        Ok(())
    }
}

/// How a cable is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Cable {
    #[default]
    Whole,
    /// Links broke, and none can be made.
    Cut,
    /// Nothing gets through, and nobody is told.
    Dead,
}

/// A hand on the cable.
#[derive(Clone, Default)]
pub struct Hand(Arc<Mutex<(Cable, u64)>>);

impl Hand {
    pub fn now(&self) -> Cable {
        self.0.lock().unwrap().0
    }

    pub fn set(&self, cable: Cable) {
        let mut held = self.0.lock().unwrap();
        held.0 = cable;
        held.1 += u64::from(cable == Cable::Cut);
    }

    /// Pulls it for a while.
    pub fn pull(&self, how: Cable, time: Duration) -> JoinHandle<()> {
        let hand = self.clone();
        hand.set(how);
        thread::spawn(move || {
            thread::sleep(time);
            hand.set(Cable::Whole);
        })
    }

    /// Whether a link of this many cuts ago carries anything now.
    fn carries(&self, cuts: u64, tick: Duration) -> io::Result<()> {
        let (cable, now) = *self.0.lock().unwrap();
        if cuts != now {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if cable == Cable::Dead {
            thread::sleep(tick);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }
}

/// Makes links over a cable.
pub struct Over<C> {
    pub inner: C,
    pub hand: Hand,
}

impl<C: Connect> Connect for Over<C> {
    type Link = Link<C::Link>;

    fn connect(&mut self, timeout: Duration) -> io::Result<Self::Link> {
        let (cable, cuts) = *self.hand.0.lock().unwrap();
        match cable {
            Cable::Whole => {}
            Cable::Cut => return Err(io::ErrorKind::ConnectionRefused.into()),
            Cable::Dead => {
                thread::sleep(timeout);
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        let inner = self.inner.connect(timeout)?;
        Ok(Link { inner, hand: self.hand.clone(), cuts })
    }
}

/// A link, or half of one, over a cable.
pub struct Link<L> {
    inner: L,
    hand: Hand,
    cuts: u64,
}

impl<L: Transport> Transport for Link<L> {
    type Tx = Link<L::Tx>;
    type Rx = Link<L::Rx>;

    fn gauge(&self) -> Option<Box<dyn LinkGauge>> {
        self.inner.gauge()
    }

    fn split(self) -> io::Result<(Self::Tx, Self::Rx)> {
        let Self { inner, hand, cuts } = self;
        let (tx, rx) = inner.split()?;
        Ok((Link { inner: tx, hand: hand.clone(), cuts }, Link { inner: rx, hand, cuts }))
    }
}

impl<W: Write> Write for Link<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hand.carries(self.cuts, WRITE_TICK)?;
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Link<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.hand.carries(self.cuts, READ_TICK)?;
        self.inner.read(into)
    }
}
