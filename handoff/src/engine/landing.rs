//! A VM that is being received, and whether its disk would survive a crash now.

use std::thread::Scope;

use guest_images::Chunk;

use super::flush::Flushing;
use crate::{ChunkId, Space, TargetVm, vm::VmError};

/// Forwards to a VM, and makes its disk durable only where it holds anything that is not: while the
/// guest waits, nothing is flushed that is on the disk already.
pub(super) struct Landing<Vm> {
    vm: Vm,
    flushing: Flushing,
}

impl<Vm: TargetVm> Landing<Vm> {
    pub(super) fn new<'scope>(scope: &'scope Scope<'scope, '_>, mut vm: Vm) -> Self {
        Self { flushing: Flushing::start(scope, vm.disk_flusher()), vm }
    }

    /// The disk is wanted durable soon.
    pub(super) fn hurry(&self) {
        self.flushing.hurry();
    }

    /// What went wrong while the disk was made durable beside all else.
    pub(super) fn take_failure(&self) -> Option<VmError> {
        self.flushing.take_failure()
    }

    pub(super) fn into_inner(self) -> Vm {
        self.vm
    }

    /// After the write, so that a flush which counts it has it.
    fn wrote(&self, mut spaces: impl Iterator<Item = Space>) {
        if spaces.any(|space| space == Space::Disk) {
            self.flushing.wrote();
        }
    }
}

impl<Vm: TargetVm> TargetVm for Landing<Vm> {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        self.vm.write_chunk(id, chunk)?;
        self.wrote([id.space].into_iter());
        Ok(())
    }

    fn write_chunks(&mut self, chunks: &[(ChunkId, &Chunk)]) -> Result<(), VmError> {
        self.vm.write_chunks(chunks)?;
        self.wrote(chunks.iter().map(|(id, _)| id.space));
        Ok(())
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        self.vm.reset_chunk(id)?;
        self.wrote([id.space].into_iter());
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        self.vm.read_chunk(id, into)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.vm.load_state(state)
    }

    /// Ends the flushing beside all else.
    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        if !self.flushing.finish()? {
            self.vm.make_disk_durable()?;
            self.flushing.all_durable();
        }
        Ok(())
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        self.vm.full_hash()
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.vm.resume()
    }

    fn discard(&mut self) {
        self.vm.discard();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
        },
        thread,
        time::Duration,
    };

    use super::*;
    use crate::vm::DiskFlusher;

    /// Counts flushes, from which thread they may be; fails them while told to.
    #[derive(Clone, Default)]
    struct Disk {
        flushes: Arc<AtomicU32>,
        beside: Arc<AtomicU32>,
        fails: Arc<AtomicBool>,
        has_flusher: bool,
    }

    struct Beside(Disk);

    impl DiskFlusher for Beside {
        fn flush(&self) -> Result<(), VmError> {
            if self.0.fails.load(SeqCst) {
                return Err("no space".into());
            }
            self.0.beside.fetch_add(1, SeqCst);
            Ok(())
        }
    }

    impl TargetVm for Disk {
        fn write_chunk(&mut self, _: ChunkId, _: &Chunk) -> Result<(), VmError> {
            Ok(())
        }

        fn reset_chunk(&mut self, _: ChunkId) -> Result<(), VmError> {
            Ok(())
        }

        fn read_chunk(&mut self, _: ChunkId, _: &mut Chunk) -> Result<(), VmError> {
            Ok(())
        }

        fn load_state(&mut self, _: &[u8]) -> Result<(), VmError> {
            Ok(())
        }

        fn make_disk_durable(&mut self) -> Result<(), VmError> {
            if self.fails.load(SeqCst) {
                return Err("no space".into());
            }
            self.flushes.fetch_add(1, SeqCst);
            Ok(())
        }

        fn disk_flusher(&mut self) -> Option<Box<dyn DiskFlusher>> {
            self.has_flusher.then(|| Box::new(Beside(self.clone())) as Box<dyn DiskFlusher>)
        }

        fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
            Ok([0; 32])
        }

        fn resume(&mut self) -> Result<(), VmError> {
            Ok(())
        }

        fn discard(&mut self) {}
    }

    const CHUNK: Chunk = [0; guest_images::CHUNK_SIZE];

    fn id(space: Space) -> ChunkId {
        ChunkId { space, index: 0 }
    }

    fn eventually(what: &str, mut done: impl FnMut() -> bool) {
        let tries = (0..500).take_while(|_| !done()).inspect(|_| {
            thread::sleep(Duration::from_millis(10));
        });
        assert!(tries.count() < 500, "{what}");
    }

    #[test]
    fn flushed_once_for_each_time_it_was_written() {
        let disk = Disk::default();
        thread::scope(|scope| {
            let mut landing = Landing::new(scope, disk.clone());
            let flushes = |landing: &mut Landing<Disk>| {
                landing.make_disk_durable().unwrap();
                landing.make_disk_durable().unwrap();
                disk.flushes.load(SeqCst)
            };
            assert_eq!(flushes(&mut landing), 1, "what was made for it");
            landing.write_chunk(id(Space::Ram), &CHUNK).unwrap();
            landing.reset_chunk(id(Space::Ram)).unwrap();
            assert_eq!(flushes(&mut landing), 1, "RAM is not on the disk");
            landing.write_chunk(id(Space::Disk), &CHUNK).unwrap();
            assert_eq!(flushes(&mut landing), 2);
            landing.reset_chunk(id(Space::Disk)).unwrap();
            assert_eq!(flushes(&mut landing), 3);

            landing.write_chunks(&[(id(Space::Ram), &CHUNK), (id(Space::Disk), &CHUNK)]).unwrap();
            disk.fails.store(true, SeqCst);
            landing.make_disk_durable().unwrap_err();
            disk.fails.store(false, SeqCst);
            assert_eq!(flushes(&mut landing), 4, "what failed is tried again");
        });
    }

    #[test]
    fn what_was_flushed_beside_the_writing_is_not_waited_for() {
        let disk = Disk { has_flusher: true, ..Disk::default() };
        thread::scope(|scope| {
            let mut landing = Landing::new(scope, disk.clone());
            let flushed = |n| eventually("flushed", || disk.beside.load(SeqCst) >= n);
            flushed(1);
            landing.write_chunk(id(Space::Disk), &CHUNK).unwrap();
            landing.hurry();
            flushed(2);
            eventually("quiet", || {
                let before = disk.beside.load(SeqCst);
                thread::sleep(Duration::from_millis(250));
                disk.beside.load(SeqCst) == before
            });
            landing.make_disk_durable().unwrap();
            assert_eq!(disk.flushes.load(SeqCst), 0, "nothing was left to do");
        });
        thread::scope(|scope| {
            disk.fails.store(true, SeqCst);
            let landing = Landing::new(scope, disk.clone());
            eventually("noticed", || landing.take_failure().is_some());
        });
    }
}
