//! A VM that is being received, and whether its disk would survive a crash now.

use guest_images::Chunk;

use crate::{ChunkId, Space, TargetVm, vm::VmError};

/// Forwards to a VM, and makes its disk durable only where it holds anything that is not: while the
/// guest waits, nothing is flushed that is on the disk already.
pub(super) struct Landing<Vm> {
    vm: Vm,
    is_durable: bool,
}

impl<Vm: TargetVm> Landing<Vm> {
    pub(super) fn new(vm: Vm) -> Self {
        // What was made for it is not durable yet.
        Self { vm, is_durable: false }
    }

    pub(super) fn is_durable(&self) -> bool {
        self.is_durable
    }

    pub(super) fn into_inner(self) -> Vm {
        self.vm
    }

    fn touch(&mut self, id: ChunkId) {
        self.is_durable &= id.space != Space::Disk;
    }
}

impl<Vm: TargetVm> TargetVm for Landing<Vm> {
    fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
        self.touch(id);
        self.vm.write_chunk(id, chunk)
    }

    fn write_chunks(&mut self, chunks: &[(ChunkId, &Chunk)]) -> Result<(), VmError> {
        chunks.iter().for_each(|(id, _)| self.touch(*id));
        self.vm.write_chunks(chunks)
    }

    fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
        self.touch(id);
        self.vm.reset_chunk(id)
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        self.vm.read_chunk(id, into)
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        // A machine that is built may write to its disk.
        self.is_durable = false;
        self.vm.load_state(state)
    }

    fn make_disk_durable(&mut self) -> Result<(), VmError> {
        if !self.is_durable {
            self.vm.make_disk_durable()?;
            self.is_durable = true;
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
    use super::*;

    /// Counts flushes; fails them while told to.
    #[derive(Default)]
    struct Disk {
        flushes: u32,
        fails: bool,
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
            if self.fails {
                return Err("no space".into());
            }
            self.flushes += 1;
            Ok(())
        }

        fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
            Ok([0; 32])
        }

        fn resume(&mut self) -> Result<(), VmError> {
            Ok(())
        }

        fn discard(&mut self) {}
    }

    #[test]
    fn flushed_once_for_each_time_it_was_written() {
        let id = |space| ChunkId { space, index: 0 };
        let chunk = [0; guest_images::CHUNK_SIZE];
        let mut landing = Landing::new(Disk::default());
        let flushes = |landing: &mut Landing<Disk>| {
            landing.make_disk_durable().unwrap();
            landing.make_disk_durable().unwrap();
            landing.vm.flushes
        };
        assert_eq!(flushes(&mut landing), 1, "what was made for it");
        landing.write_chunk(id(Space::Ram), &chunk).unwrap();
        landing.reset_chunk(id(Space::Ram)).unwrap();
        assert_eq!(flushes(&mut landing), 1, "RAM is not on the disk");
        landing.write_chunk(id(Space::Disk), &chunk).unwrap();
        assert_eq!(flushes(&mut landing), 2);
        landing.reset_chunk(id(Space::Disk)).unwrap();
        assert_eq!(flushes(&mut landing), 3);

        landing.write_chunk(id(Space::Disk), &chunk).unwrap();
        landing.vm.fails = true;
        landing.make_disk_durable().unwrap_err();
        landing.vm.fails = false;
        assert_eq!(flushes(&mut landing), 4, "what failed is tried again");
    }
}
