//! Traces are made step by step, within a bound.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use guest_images::{Chunk, Part, Place};

use super::{Change, ContentId, Trace, TraceBase, contents::Interner};
use crate::{ChunkId, Geometry};

/// What cannot be in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// Another chunk than the geometry has.
    #[error("there is no chunk {0:?} in this guest")]
    NoSuchChunk(ChunkId),
    /// Too many contents.
    #[error("more than {most} different contents: record for a shorter time, or allow more")]
    Full {
        /// The bound.
        most: usize,
    },
    /// A change before one that is there already.
    #[error("a change at {at:?} comes after one at {last:?}")]
    NotInOrder {
        /// Its time.
        at: Duration,
        /// The time of the last one.
        last: Duration,
    },
}

/// Takes what happens to a guest, and makes a [`Trace`] of it.
#[derive(Clone, Debug)]
pub struct TraceBuilder {
    geometry: Geometry,
    parts: [u64; Part::ALL.len()],
    most: usize,
    interner: Interner,
    held: HashMap<Place, ContentId>,
    initial: BTreeMap<ChunkId, ContentId>,
    changes: Vec<Change>,
}

impl TraceBuilder {
    /// A trace of a guest of this size, whose base has parts of these sizes (in the order of
    /// [`Part::ALL`]). No more than `most` different contents are held.
    pub fn new(geometry: Geometry, parts: [u64; Part::ALL.len()], most: usize) -> Self {
        Self {
            geometry,
            parts,
            most,
            interner: Interner::new(),
            held: HashMap::new(),
            initial: BTreeMap::new(),
            changes: Vec::new(),
        }
    }

    fn intern(&mut self, chunk: &Chunk) -> Result<ContentId, BuildError> {
        let most = self.most;
        self.interner.intern(chunk, most).ok_or(BuildError::Full { most })
    }

    fn inside(&self, id: ChunkId) -> Result<(), BuildError> {
        if self.geometry.contains(id) { Ok(()) } else { Err(BuildError::NoSuchChunk(id)) }
    }

    /// What the base has at a place.
    pub fn base(&mut self, place: Place, chunk: &Chunk) -> Result<(), BuildError> {
        let content = self.intern(chunk)?;
        self.held.insert(place, content);
        Ok(())
    }

    /// Whether the base's content at a place is known.
    pub fn has_base(&self, place: Place) -> bool {
        self.held.contains_key(&place)
    }

    /// What a chunk holds when the trace begins.
    pub fn initial(&mut self, id: ChunkId, chunk: &Chunk) -> Result<(), BuildError> {
        self.inside(id)?;
        let content = self.intern(chunk)?;
        self.initial.insert(id, content);
        Ok(())
    }

    /// A chunk was found changed at `at`.
    pub fn change(&mut self, at: Duration, id: ChunkId, chunk: &Chunk) -> Result<(), BuildError> {
        self.inside(id)?;
        if let Some(last) = self.changes.last().map(|change| change.at)
            && at < last
        {
            return Err(BuildError::NotInOrder { at, last });
        }
        let content = self.intern(chunk)?;
        self.changes.push(Change { at, id, content });
        Ok(())
    }

    /// Different contents so far, the zeros included.
    pub fn contents(&self) -> usize {
        self.interner.contents.len()
    }

    /// Changes so far.
    pub fn changes(&self) -> usize {
        self.changes.len()
    }

    /// The trace, which is so long or as long as its last change asks.
    pub fn finish(self, duration: Duration) -> Trace {
        let last = self.changes.last().map_or(Duration::ZERO, |change| change.at);
        let contents = Arc::new(self.interner.contents);
        Trace {
            geometry: self.geometry,
            duration: duration.max(last),
            base: Arc::new(TraceBase::new(self.parts, self.held, contents)),
            initial: self.initial.into_iter().collect(),
            changes: self.changes,
        }
    }
}
