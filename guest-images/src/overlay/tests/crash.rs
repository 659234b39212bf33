//! Crashes against an oracle.
//!
//! The oracle knows of every sector what it held at the last completed flush and everything it was
//! given since. A crash keeps, of each sector of `disk.data` and each sector of `disk.map` that was
//! written since it was last synced, the old or the new content, by chance: a power loss. (Keeping
//! all of the new is what a killed process leaves: a case of the same.) Opened again, every sector
//! must hold one of those contents.

use std::collections::HashSet;

use proptest::{prelude::*, test_runner::TestRunner};

use super::*;

const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

/// Steps of a flush, as a device makes them; a crash can follow each.
const FLUSH_STEPS: u8 = 4;

#[derive(Clone, Debug)]
enum Op {
    Write {
        sector: u64,
        sectors: u64,
        fill: u8,
    },
    WriteChunk {
        chunk: u64,
        fill: u8,
    },
    Zero {
        chunk: u64,
        count: u64,
    },
    ZeroRange {
        sector: u64,
        sectors: u64,
    },
    Reset {
        chunk: u64,
    },
    Flush,
    /// A write between the steps of a flush, which then goes on to its end.
    FlushAround {
        step: u8,
        chunk: u64,
        fill: u8,
    },
    /// A flush that gets so far, then the crash; `keep` chooses what survives.
    Crash {
        steps: u8,
        keep: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let (sector, chunk, fill) = (0u64..66, 0u64..8, 1u8..=255);
    prop_oneof![
        4 => (sector.clone(), 1u64..20, fill.clone())
            .prop_map(|(sector, sectors, fill)| Op::Write { sector, sectors, fill }),
        2 => (chunk.clone(), fill.clone()).prop_map(|(chunk, fill)| Op::WriteChunk { chunk, fill }),
        2 => (0..CHUNKS, 1u64..4).prop_map(|(chunk, count)| Op::Zero { chunk, count }),
        1 => (sector, 1u64..20).prop_map(|(sector, sectors)| Op::ZeroRange { sector, sectors }),
        2 => (0..CHUNKS).prop_map(|chunk| Op::Reset { chunk }),
        2 => Just(Op::Flush),
        2 => (0..FLUSH_STEPS, chunk, fill)
            .prop_map(|(step, chunk, fill)| Op::FlushAround { step, chunk, fill }),
        2 => (0..=FLUSH_STEPS, any::<u64>()).prop_map(|(steps, keep)| Op::Crash { steps, keep }),
    ]
}

/// What each sector may hold after a crash; the last is what it holds now.
struct Oracle {
    base: Vec<Sector>,
    sectors: Vec<Vec<Sector>>,
}

impl Oracle {
    fn new(image: &[u8]) -> Self {
        let base: Vec<Sector> = image.as_chunks::<SECTOR>().0.to_vec();
        Self { sectors: base.iter().map(|sector| vec![*sector]).collect(), base }
    }

    fn put(&mut self, sector: u64, count: u64, content: impl Fn(&Sector) -> Sector) {
        let range = sector as usize..((sector + count) as usize).min(self.sectors.len());
        for at in range {
            self.sectors[at].push(content(&self.base[at]));
        }
    }

    /// A flush completed that covers what was written before its first `known` versions ended.
    fn flushed(&mut self, known: &[usize]) {
        for (versions, known) in self.sectors.iter_mut().zip(known) {
            versions.drain(..known - 1);
        }
    }

    fn versions(&self) -> Vec<usize> {
        self.sectors.iter().map(Vec::len).collect()
    }

    fn now(&self) -> Vec<u8> {
        self.sectors.iter().flat_map(|versions| *versions.last().unwrap()).collect()
    }
}

/// The test's view of the host's disk: what is certainly durable.
struct Machine {
    vm: Vm,
    overlay: Option<Arc<Overlay>>,
    oracle: Oracle,
    durable_data: Vec<u8>,
    durable_map: Vec<u8>,
}

impl Machine {
    /// A new disk over a base that all cases share: importing one for each takes longer than they.
    fn new(base: &Arc<Base>, image: &[u8]) -> Self {
        let (base, image) = (Arc::clone(base), image.to_vec());
        let vm = Vm { base, image, dir: TempDir::new().unwrap() };
        let overlay = Some(Arc::new(vm.create()));
        let oracle = Oracle::new(&vm.image);
        let mut machine =
            Self { vm, overlay, oracle, durable_data: Vec::new(), durable_map: Vec::new() };
        machine.all_durable();
        machine
    }

    fn overlay(&self) -> &Arc<Overlay> {
        self.overlay.as_ref().unwrap()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.vm.file(name)).unwrap()
    }

    fn all_durable(&mut self) {
        (self.durable_data, self.durable_map) = (self.read(DATA_FILE), self.read(MAP_FILE));
    }

    /// Makes the first `steps` steps of a flush, with `between` after so many of them; returns the
    /// flush, to be ended or given up.
    fn flush_steps(&mut self, steps: u8, between: Option<(u8, u64, u8)>) -> Option<DirtyMap> {
        let mut taken = None;
        for step in 0..steps {
            match step {
                0 => taken = Some(self.overlay().take_dirty_map().unwrap()),
                1 => self.durable_data = self.read(DATA_FILE),
                2 => {
                    for page in taken.as_ref().unwrap().pages() {
                        let map = OpenOptions::new().write(true).open(self.vm.file(MAP_FILE));
                        map.unwrap().write_all_at(&page.bytes, page.file_offset).unwrap();
                    }
                }
                _ => self.durable_map = self.read(MAP_FILE),
            }
            if let Some((_, chunk, fill)) = between.filter(|(at, ..)| *at == step) {
                self.write_chunk(chunk, fill);
            }
        }
        taken
    }

    fn write_chunk(&mut self, chunk: u64, fill: u8) {
        self.overlay().write_chunk(chunk, &[fill; CHUNK_SIZE]).unwrap();
        self.oracle.put(chunk * 8, 8, |_| [fill; SECTOR]);
    }

    fn apply(&mut self, op: &Op) {
        let last = self.oracle.base.len() as u64;
        match *op {
            Op::Write { sector, sectors, fill } => {
                let sectors = sectors.min(last - sector);
                let bytes = vec![fill; sectors as usize * SECTOR];
                self.overlay().write_at(sector * SECTOR as u64, &bytes).unwrap();
                self.oracle.put(sector, sectors, |_| [fill; SECTOR]);
            }
            Op::WriteChunk { chunk, fill } => self.write_chunk(chunk, fill),
            Op::Zero { chunk, count } => {
                let count = count.min(CHUNKS - chunk);
                self.overlay().zero_chunks(chunk, count).unwrap();
                self.oracle.put(chunk * 8, count * 8, |_| [0; SECTOR]);
            }
            Op::ZeroRange { sector, sectors } => {
                let sectors = sectors.min(last - sector);
                let unit = SECTOR as u64;
                self.overlay().zero_at(sector * unit, sectors * unit).unwrap();
                self.oracle.put(sector, sectors, |_| [0; SECTOR]);
            }
            Op::Reset { chunk } => {
                self.overlay().reset_chunk(chunk).unwrap();
                self.oracle.put(chunk * 8, 8, |base| *base);
            }
            Op::Flush => {
                self.overlay().flush().unwrap();
                let known = self.oracle.versions();
                self.oracle.flushed(&known);
                self.all_durable();
            }
            Op::FlushAround { step, chunk, fill } => {
                let known = self.oracle.versions();
                let taken = self.flush_steps(FLUSH_STEPS, Some((step, chunk, fill)));
                taken.unwrap().done();
                self.oracle.flushed(&known);
            }
            Op::Crash { steps, keep } => self.crash(steps, keep),
        }
    }

    fn crash(&mut self, steps: u8, keep: u64) {
        let known = self.oracle.versions();
        drop(self.flush_steps(steps, None));
        if steps == FLUSH_STEPS {
            self.oracle.flushed(&known);
        }
        self.overlay = None;
        for (name, durable) in [(DATA_FILE, &self.durable_data), (MAP_FILE, &self.durable_map)] {
            let mut survives = self.read(name);
            for (number, (new, old)) in
                survives.chunks_mut(SECTOR).zip(durable.chunks(SECTOR)).enumerate()
            {
                let chance = blake3::hash(&[keep, number as u64].map(u64::to_le_bytes).concat());
                if chance.as_bytes()[name.len() % 32] & 1 == 0 {
                    new.copy_from_slice(old);
                }
            }
            fs::write(self.vm.file(name), survives).unwrap();
        }
        self.overlay = Some(Arc::new(self.vm.open().unwrap()));
        let content = whole(self.overlay());
        for (at, (found, allowed)) in
            content.as_chunks::<SECTOR>().0.iter().zip(&mut self.oracle.sectors).enumerate()
        {
            assert!(allowed.contains(found), "sector {at} holds what it never was given");
            *allowed = vec![*found];
        }
        // What survived is what there is now, and durable.
        self.all_durable();
    }

    fn check(&self) {
        assert!(whole(self.overlay()) == self.oracle.now(), "the disk is not what was written");
        let changed: HashSet<u64> = self.overlay().changed().collect();
        let (now, image) = (self.oracle.now(), &self.vm.image);
        for (chunk, (now, base)) in now.chunks(CHUNK_SIZE).zip(image.chunks(CHUNK_SIZE)).enumerate()
        {
            assert!(now == base || changed.contains(&(chunk as u64)), "chunk {chunk} is not told");
        }
    }
}

#[test]
fn what_was_flushed_survives_any_crash() {
    let (_fixture, shared) = Vm::new();
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() };
    let cases = (proptest::collection::vec(op(), 1..40), any::<u64>());
    let outcome = TestRunner::new(config).run(&cases, |(ops, keep)| {
        let mut machine = Machine::new(&shared.base, &shared.image);
        for op in &ops {
            machine.apply(op);
            machine.check();
        }
        machine.apply(&Op::Crash { steps: 2, keep });
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}
