//! What can be said of a received batch without the VM: whether it may be applied at all, and what
//! the contents that stand by themselves hash to.
//!
//! This is the expensive half of the target's work, and each batch stands alone in it: batches are
//! inspected side by side, in any order, and then applied one after the other by the
//! [`Resolver`](super::Resolver).

use guest_images::{Chunk, ChunkHash, chunk::ZERO_CHUNK};

use super::{
    pack::{Layout, Step, What},
    resolve::ResolveError,
};
use crate::{
    base_view::{BasePlace, Bases, is_base_state},
    chunks::{ChunkId, Geometry},
};

/// What is known of a content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fact {
    pub(super) hash: ChunkHash,
    /// Whether it is the base state of the chunk that it is for.
    pub(super) is_base: bool,
}

/// A batch that may be applied, with its body.
#[derive(Debug, Default)]
pub struct Inspected {
    body: Vec<u8>,
    layout: Layout,
    /// In the order of the steps; none for a step whose content depends on the VM.
    facts: Vec<Fact>,
}

impl Inspected {
    /// The generation of every chunk in it.
    pub(super) fn generation(&self) -> u32 {
        self.layout.generation()
    }

    /// The steps, each with what is known of its content if it stands by itself.
    pub(super) fn steps(&self) -> impl Iterator<Item = (Step<'_>, Option<Fact>)> {
        let mut facts = self.facts.iter().copied();
        self.layout.steps_of(&self.body).map(move |step| {
            let fact = if stands_alone(&step.what) { facts.next() } else { None };
            (step, fact)
        })
    }

    /// The body.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The buffer, for the next body.
    pub fn body_mut(&mut self) -> &mut Vec<u8> {
        &mut self.body
    }
}

/// Whether what is written depends on nothing but the step and the bases.
fn stands_alone(what: &What<'_>) -> bool {
    matches!(what, What::Zero | What::FromBase(_) | What::Data(_))
}

/// Inspects batches for one guest. Cheap to clone; each thread has its own.
#[derive(Clone, Debug)]
pub struct Inspector {
    bases: Bases,
    geometry: Geometry,
    zero: ChunkHash,
}

impl Inspector {
    /// For a guest of these sizes.
    pub fn new(bases: Bases, geometry: Geometry) -> Self {
        Self { bases, geometry, zero: ChunkHash::of(ZERO_CHUNK) }
    }

    /// The bases that batches refer to.
    pub fn bases(&self) -> &Bases {
        &self.bases
    }

    /// Reads the body that is in `inspected`, and all that can be known of it beforehand.
    pub fn inspect(&self, inspected: &mut Inspected) -> Result<(), ResolveError> {
        let Inspected { body, layout, facts } = inspected;
        facts.clear();
        layout.read(body)?;
        for step in layout.steps_of(body) {
            self.check(&step)?;
            let fact = match step.what {
                What::Zero => self.fact(step.id, ZERO_CHUNK, Some(self.zero))?,
                What::FromBase(at) => {
                    let missing = || self.no_such_place(step.id, at);
                    self.fact(step.id, self.bases.chunk(at).ok_or_else(missing)?, None)?
                }
                What::Data(chunk) => self.fact(step.id, chunk, None)?,
                What::Reset | What::FromSeen(_) | What::Delta(..) => continue,
            };
            facts.push(fact);
        }
        Ok(())
    }

    /// What is known of `chunk` as the content of `id`.
    pub(super) fn fact(
        &self,
        id: ChunkId,
        chunk: &Chunk,
        hash: Option<ChunkHash>,
    ) -> Result<Fact, ResolveError> {
        let is_base = is_base_state(self.bases.own(), id, chunk)
            .map_err(|source| ResolveError::Base { id, source })?;
        Ok(Fact { hash: hash.unwrap_or_else(|| ChunkHash::of(chunk)), is_base })
    }

    fn check(&self, step: &Step<'_>) -> Result<(), ResolveError> {
        let geometry = self.geometry;
        let source_id = match step.what {
            What::FromSeen(source_id) => source_id,
            _ => step.id,
        };
        for id in [step.id, source_id] {
            if !geometry.contains(id) {
                return Err(ResolveError::Outside { id, geometry });
            }
        }
        match step.what {
            What::FromBase(at) if !self.bases.holds(at) => Err(self.no_such_place(step.id, at)),
            _ => Ok(()),
        }
    }

    pub(super) fn no_such_place(&self, id: ChunkId, at: BasePlace) -> ResolveError {
        ResolveError::NoSuchPlace { id, at, chunks: self.bases.part_chunks(at) }
    }
}
