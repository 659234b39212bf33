//! Runs: the entries of a batch's table. [`super::pack`] has their encoding.

use guest_images::{Part, Place};

use super::{
    delta::DeltaCodec,
    pack::{BatchError, What},
    pack_codec::{Cursor, put_delta, put_varint},
};
use crate::{
    base_view::{BasePlace, MAX_BASES},
    chunks::{ChunkId, Space},
};

/// What a run does to its chunks; a reference is that of its first chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunKind {
    Reset,
    Zero,
    Base(BasePlace),
    Seen(ChunkId),
    Data,
    Delta(DeltaCodec),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) kind: RunKind,
    pub(super) first: ChunkId,
    pub(super) chunks: u64,
}

impl Run {
    pub(super) fn of(id: ChunkId, what: &What<'_>) -> Self {
        let kind = match *what {
            What::Reset => RunKind::Reset,
            What::Zero => RunKind::Zero,
            What::FromBase(at) => RunKind::Base(at),
            What::FromSeen(source) => RunKind::Seen(source),
            What::Data(_) => RunKind::Data,
            What::Delta(codec, _) => RunKind::Delta(codec),
        };
        Self { kind, first: id, chunks: 1 }
    }

    /// The run's effect on its chunk number `n`.
    pub(super) fn kind_at(&self, n: u64) -> RunKind {
        match self.kind {
            RunKind::Base(BasePlace { base, place: Place { part, index } }) => {
                RunKind::Base(BasePlace { base, place: Place { part, index: index + n } })
            }
            RunKind::Seen(s) => RunKind::Seen(ChunkId { space: s.space, index: s.index + n }),
            kind => kind,
        }
    }

    pub(super) fn id_at(&self, n: u64) -> ChunkId {
        ChunkId { space: self.first.space, index: self.first.index + n }
    }

    /// Whether `next`, a run of one chunk, goes on where this one ends.
    pub(super) fn continues_with(&self, next: &Run) -> bool {
        let ends = [Some(self.first.index), reference_of(self.kind)];
        ends.into_iter().flatten().all(|start| start.checked_add(self.chunks).is_some())
            && self.id_at(self.chunks) == next.first
            && self.kind_at(self.chunks) == next.kind
    }

    fn tag(&self) -> u8 {
        let (kind, detail, base) = match self.kind {
            RunKind::Reset => (0, 0, 0),
            RunKind::Zero => (1, 0, 0),
            RunKind::Base(at) => (2, at.place.part as u8, at.base),
            RunKind::Seen(source) => (3, source.space as u8, 0),
            RunKind::Data => (4, 0, 0),
            RunKind::Delta(codec) => (5, codec as u8, 0),
        };
        kind | (self.first.space as u8) << 3 | detail << 4 | base << 6
    }

    /// A run of unknown extent from its tag, or `None` if the tag means nothing.
    fn from_tag(tag: u8) -> Option<Self> {
        let space = |bit: u8| if bit == 0 { Space::Ram } else { Space::Disk };
        let kind = match (tag & 7, tag >> 4 & 3, tag >> 6) {
            (0, 0, 0) => RunKind::Reset,
            (1, 0, 0) => RunKind::Zero,
            (2, part, base) => {
                let place = Place { part: Part::try_from(part).ok()?, index: 0 };
                RunKind::Base(BasePlace { base, place })
            }
            (3, bit @ 0..=1, 0) => RunKind::Seen(ChunkId { space: space(bit), index: 0 }),
            (4, 0, 0) => RunKind::Data,
            (5, codec, 0) => RunKind::Delta(DeltaCodec::from_u8(codec)?),
            _ => return None,
        };
        let first = ChunkId { space: space(tag >> 3 & 1), index: 0 };
        Some(Self { kind, first, chunks: 1 })
    }
}

fn reference_of(kind: RunKind) -> Option<u64> {
    match kind {
        RunKind::Base(at) => Some(at.place.index),
        RunKind::Seen(source) => Some(source.index),
        _ => None,
    }
}

/// How many parts two bits can name.
const PARTS: usize = 4;

/// Where the last run in each space, and the last reference to each part and space, ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ends {
    ids: [u64; 2],
    parts: [[u64; PARTS]; MAX_BASES],
    sources: [u64; 2],
}

impl Ends {
    fn id(&mut self, space: Space) -> &mut u64 {
        &mut self.ids[space as usize]
    }

    fn reference(&mut self, kind: RunKind) -> Option<&mut u64> {
        match kind {
            RunKind::Base(at) => {
                self.parts.get_mut(usize::from(at.base))?.get_mut(at.place.part as usize)
            }
            RunKind::Seen(source) => Some(&mut self.sources[source.space as usize]),
            _ => None,
        }
    }

    pub(super) fn encode(&mut self, run: &Run, delta_lens: &[u16], out: &mut Vec<u8>) {
        out.push(run.tag());
        let end = self.id(run.first.space);
        put_delta(out, *end, run.first.index);
        *end = run.first.index.wrapping_add(run.chunks);
        put_varint(out, run.chunks - 1);
        if let (Some(end), Some(start)) = (self.reference(run.kind), reference_of(run.kind)) {
            put_delta(out, *end, start);
            *end = start.wrapping_add(run.chunks);
        }
        for len in delta_lens {
            put_varint(out, u64::from(len - 1));
        }
    }

    pub(super) fn decode(&mut self, cursor: &mut Cursor<'_>) -> Result<Run, BatchError> {
        let at = cursor.at();
        let tag = cursor.byte()?;
        let mut run = Run::from_tag(tag).ok_or(BatchError::Tag { at, tag })?;
        let end = self.id(run.first.space);
        run.first.index = cursor.delta(*end)?;
        run.chunks = cursor.varint()?.checked_add(1).ok_or(BatchError::Overflow { at })?;
        let past = |start: u64| start.checked_add(run.chunks).ok_or(BatchError::Overflow { at });
        *end = past(run.first.index)?;
        if let Some(end) = self.reference(run.kind) {
            let start = cursor.delta(*end)?;
            *end = past(start)?;
            match &mut run.kind {
                RunKind::Base(at) => at.place.index = start,
                RunKind::Seen(source) => source.index = start,
                _ => {}
            }
        }
        Ok(run)
    }
}
