//! A file to a VM.

use std::io::Read;

use super::{
    super::MAX_MACHINE_STATE_BYTES,
    SavedError,
    format::{Reader, Record},
};
use crate::{
    Offer, Refusal, StateTable, TargetHost,
    stage::{Decompressor, ResolveError, Resolver, Segment, SegmentKind},
    vm::{Prepared, TargetVm, VmError},
};

/// A VM out of a file.
#[derive(Debug)]
pub struct Restored<Vm> {
    /// The VM, verified, its disk durable, its machine loaded. It does not run: that is for
    /// [`TargetVm::resume`], once the caller has recorded that this side owns it.
    pub vm: Vm,
    /// What it was restored from.
    pub offer: Offer,
    /// The state in which it is.
    pub table: StateTable,
    /// Bytes of the file.
    pub bytes: u64,
}

/// Why no VM was restored. What there was of it was discarded.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file is not a saved VM, or not a whole one.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// This cloudlet cannot carry it.
    #[error("cannot restore this VM here: {0}")]
    Refused(#[from] Refusal),
    /// A batch could not be applied.
    #[error("segment {seq} of the saved VM: {source}")]
    Resolve {
        /// The segment.
        seq: u64,
        /// Why not.
        source: ResolveError,
    },
    /// The VM could not be built.
    #[error("{doing}: {source}")]
    Vm {
        /// What was being done.
        doing: &'static str,
        /// What the VM said.
        source: VmError,
    },
}

/// Makes a VM of what [`super::save`] wrote and the bases it speaks of. The bytes may be anything:
/// nothing becomes of a file that was cut off or altered.
pub fn restore<H: TargetHost>(
    host: &mut H,
    from: impl Read,
) -> Result<Restored<H::Vm>, RestoreError> {
    let mut reader = Reader::new(from)?;
    let prepared = host.prepare(&reader.offer)?;
    let Prepared { mut vm, bases, start } = prepared;
    let expected = std::iter::once(&reader.offer.base).chain(&reader.offer.also);
    let missing = expected
        .zip(bases.iter().map(|(_, base)| Some(base.id())).chain(std::iter::repeat(None)))
        .find(|(wanted, held)| Some(**wanted) != *held);
    let resolver = Resolver::new(bases.clone(), reader.offer.geometry);
    let filled = match missing {
        // References name bases by their number: all must be there.
        Some((id, _)) => Err(Refusal::UnknownBase(*id).into()),
        None if start.is_some() => {
            Err(Refusal::Other("a saved VM begins in its base state".into()).into())
        }
        None => fill(&mut reader, &mut vm, resolver),
    };
    match filled {
        Ok(table) => {
            let Reader { offer, bytes, .. } = reader;
            Ok(Restored { vm, offer, table, bytes })
        }
        Err(e) => {
            vm.discard();
            Err(e)
        }
    }
}

fn fill<Vm: TargetVm>(
    reader: &mut Reader<impl Read>,
    vm: &mut Vm,
    mut resolver: Resolver,
) -> Result<StateTable, RestoreError> {
    let mut decompressor = Decompressor::new();
    let mut state = Vec::new();
    let said = loop {
        let segment = match reader.next()? {
            Record::Segment(segment) => segment,
            Record::End(root) => break root,
        };
        let Segment { seq, kind, codec, raw_len, payload, .. } = segment;
        let body = decompressor
            .decompress(codec, raw_len, &payload)
            .map_err(|source| SavedError::Decompress { seq, source })?;
        match kind {
            SegmentKind::Chunks => {
                let applied = resolver.apply(vm, body);
                applied.map_err(|source| RestoreError::Resolve { seq, source })?;
            }
            SegmentKind::MachineState => append_state(&mut state, body)?,
        }
    };
    let found = resolver.root();
    if said != found {
        return Err(SavedError::Root { said, found }.into());
    }
    let failed = |doing| move |source| RestoreError::Vm { doing, source };
    vm.make_disk_durable().map_err(failed("making the disk durable"))?;
    vm.load_state(&state).map_err(failed("loading the machine's state"))?;
    Ok(resolver.into_table())
}

/// Adds a piece of the machine's state, within its bound.
pub(super) fn append_state(state: &mut Vec<u8>, piece: &[u8]) -> Result<(), SavedError> {
    if state.len() + piece.len() > MAX_MACHINE_STATE_BYTES {
        return Err(SavedError::State);
    }
    state.extend_from_slice(piece);
    Ok(())
}
