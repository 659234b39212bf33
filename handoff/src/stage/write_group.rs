//! Disk chunks on their way from a batch to a VM: a VM writes many at once cheaper than one by one.

use guest_images::{Chunk, chunk::ZERO_CHUNK};

use super::{outbound::GROUP_CHUNKS, resolve::ResolveError};
use crate::{
    chunks::{ChunkId, Space},
    vm::TargetVm,
};

/// Chunks that are resolved and not written yet. Whoever reads through it finds them all the same.
///
/// RAM is not kept: to write it is to copy it.
#[derive(Default)]
pub(super) struct WriteGroup {
    ids: Vec<ChunkId>,
    chunks: Vec<Chunk>,
}

impl WriteGroup {
    /// Writes a chunk, or takes a copy of it that [`WriteGroup::flush`] writes.
    pub(super) fn write(
        &mut self,
        vm: &mut dyn TargetVm,
        id: ChunkId,
        chunk: &Chunk,
    ) -> Result<(), ResolveError> {
        if id.space == Space::Ram {
            return vm.write_chunk(id, chunk).map_err(|source| ResolveError::Vm { id, source });
        }
        if let Some(at) = self.find(id) {
            self.chunks[at] = *chunk;
            return Ok(());
        }
        self.ids.push(id);
        self.chunks.push(*chunk);
        if self.ids.len() == GROUP_CHUNKS { self.flush(vm) } else { Ok(()) }
    }

    /// Copies what a chunk holds, written or not.
    pub(super) fn read(
        &self,
        vm: &mut dyn TargetVm,
        id: ChunkId,
        into: &mut Chunk,
    ) -> Result<(), ResolveError> {
        if let Some(chunk) = self.find(id).and_then(|at| self.chunks.get(at)) {
            *into = *chunk;
            return Ok(());
        }
        vm.read_chunk(id, into).map_err(|source| ResolveError::Vm { id, source })
    }

    /// Makes a chunk equal to the base, whatever was to be written to it.
    pub(super) fn reset(&mut self, vm: &mut dyn TargetVm, id: ChunkId) -> Result<(), ResolveError> {
        if let Some(at) = self.find(id) {
            self.ids.swap_remove(at);
            self.chunks.swap_remove(at);
        }
        vm.reset_chunk(id).map_err(|source| ResolveError::Vm { id, source })
    }

    /// Writes what was kept.
    pub(super) fn flush(&mut self, vm: &mut dyn TargetVm) -> Result<(), ResolveError> {
        let Some(&first) = self.ids.first() else { return Ok(()) };
        let mut group: [(ChunkId, &Chunk); GROUP_CHUNKS] = [(first, ZERO_CHUNK); GROUP_CHUNKS];
        let kept = self.ids.iter().copied().zip(&self.chunks);
        group.iter_mut().zip(kept).for_each(|(place, chunk)| *place = chunk);
        let chunks = self.ids.len();
        vm.write_chunks(group.get(..chunks).unwrap_or_default())
            .map_err(|source| ResolveError::Group { chunks, first, source })?;
        self.ids.clear();
        self.chunks.clear();
        Ok(())
    }

    fn find(&self, id: ChunkId) -> Option<usize> {
        self.ids.iter().position(|kept| *kept == id)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use guest_images::CHUNK_SIZE;
    use proptest::prelude::*;

    use super::*;
    use crate::vm::VmError;

    /// Base state is a number's own byte.
    #[derive(Default)]
    struct Disk {
        chunks: BTreeMap<ChunkId, Chunk>,
        groups: usize,
    }

    impl TargetVm for Disk {
        fn write_chunk(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), VmError> {
            self.chunks.insert(id, *chunk);
            Ok(())
        }

        fn write_chunks(&mut self, chunks: &[(ChunkId, &Chunk)]) -> Result<(), VmError> {
            self.groups += 1;
            // Backwards: no order is promised, so none may be relied upon.
            for (at, (id, chunk)) in chunks.iter().enumerate().rev() {
                assert!(chunks.iter().skip(at + 1).all(|(other, _)| other != id), "{id:?} twice");
                self.write_chunk(*id, chunk)?;
            }
            Ok(())
        }

        fn reset_chunk(&mut self, id: ChunkId) -> Result<(), VmError> {
            self.chunks.remove(&id);
            Ok(())
        }

        fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
            *into = self.chunks.get(&id).copied().unwrap_or([id.index as u8; CHUNK_SIZE]);
            Ok(())
        }

        fn load_state(&mut self, _: &[u8]) -> Result<(), VmError> {
            Err("not in this test".into())
        }

        fn make_disk_durable(&mut self) -> Result<(), VmError> {
            Ok(())
        }

        fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
            Err("not in this test".into())
        }

        fn resume(&mut self) -> Result<(), VmError> {
            Err("not in this test".into())
        }

        fn discard(&mut self) {}
    }

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Write(ChunkId, u8),
        Read(ChunkId),
        Reset(ChunkId),
        Flush,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let space = prop_oneof![1 => Just(Space::Ram), 5 => Just(Space::Disk)];
        let id = (space, 0..100u64).prop_map(|(space, index)| ChunkId { space, index });
        let op = prop_oneof![
            20 => (id.clone(), any::<u8>()).prop_map(|(id, fill)| Op::Write(id, fill)),
            8 => id.clone().prop_map(Op::Read),
            4 => id.prop_map(Op::Reset),
            1 => Just(Op::Flush),
        ];
        prop::collection::vec(op, 0..400)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn like_a_vm_that_is_written_at_once(ops in ops()) {
            let (mut vm, mut plain) = (Disk::default(), Disk::default());
            let mut group = WriteGroup::default();
            let (mut found, mut expected) = ([0; CHUNK_SIZE], [0; CHUNK_SIZE]);
            for op in ops {
                match op {
                    Op::Write(id, fill) => {
                        group.write(&mut vm, id, &[fill; CHUNK_SIZE]).unwrap();
                        plain.write_chunk(id, &[fill; CHUNK_SIZE]).unwrap();
                    }
                    Op::Read(id) => {
                        group.read(&mut vm, id, &mut found).unwrap();
                        plain.read_chunk(id, &mut expected).unwrap();
                        prop_assert!(found == expected);
                    }
                    Op::Reset(id) => {
                        group.reset(&mut vm, id).unwrap();
                        plain.reset_chunk(id).unwrap();
                    }
                    Op::Flush => group.flush(&mut vm).unwrap(),
                }
            }
            group.flush(&mut vm).unwrap();
            prop_assert!(vm.chunks == plain.chunks);
        }
    }

    #[test]
    fn many_are_written_at_once() {
        let (mut vm, mut group) = (Disk::default(), WriteGroup::default());
        for index in 0..3 * GROUP_CHUNKS as u64 + 1 {
            let id = ChunkId { space: Space::Disk, index };
            group.write(&mut vm, id, &[7; CHUNK_SIZE]).unwrap();
        }
        assert_eq!((vm.groups, vm.chunks.len()), (3, 3 * GROUP_CHUNKS));
        group.flush(&mut vm).unwrap();
        group.flush(&mut vm).unwrap();
        assert_eq!((vm.groups, vm.chunks.len()), (4, 3 * GROUP_CHUNKS + 1));
    }
}
