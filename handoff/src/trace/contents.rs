//! Contents of chunks, each once.

use std::collections::HashMap;

use guest_images::{CHUNK_SIZE, Chunk, ChunkHash};

/// The number of a content. [`ContentId::ZERO`] is in every store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId(pub(crate) u32);

impl ContentId {
    /// A chunk of zeros.
    pub const ZERO: Self = Self(0);

    /// The number.
    pub fn number(self) -> u32 {
        self.0
    }
}

/// Contents by number.
#[derive(Clone, Debug)]
pub struct Contents {
    chunks: Vec<Chunk>,
}

impl Contents {
    pub(crate) fn new() -> Self {
        Self { chunks: vec![[0; CHUNK_SIZE]] }
    }

    pub(crate) fn push(&mut self, chunk: &Chunk) -> Option<ContentId> {
        let id = u32::try_from(self.chunks.len()).ok().filter(|id| *id != u32::MAX)?;
        self.chunks.push(*chunk);
        Some(ContentId(id))
    }

    /// How many there are, the zeros included.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether there is none but the zeros.
    pub fn is_empty(&self) -> bool {
        self.chunks.len() <= 1
    }

    /// The content with this number.
    pub fn get(&self, id: ContentId) -> Option<&Chunk> {
        self.chunks.get(id.0 as usize)
    }

    /// All contents in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (ContentId, &Chunk)> {
        (0u32..).map(ContentId).zip(&self.chunks)
    }
}

/// A store that grows, and knows what it has.
#[derive(Clone, Debug)]
pub(crate) struct Interner {
    pub(crate) contents: Contents,
    known: HashMap<ChunkHash, ContentId>,
}

impl Interner {
    pub(crate) fn new() -> Self {
        let contents = Contents::new();
        let known = contents.iter().map(|(id, chunk)| (ChunkHash::of(chunk), id)).collect();
        Self { contents, known }
    }

    /// The number of a content, which is a new one if it was never seen; `None` if there is no room
    /// for more than `most`.
    pub(crate) fn intern(&mut self, chunk: &Chunk, most: usize) -> Option<ContentId> {
        let hash = ChunkHash::of(chunk);
        if let Some(id) = self.known.get(&hash) {
            return Some(*id);
        }
        if self.contents.len() >= most {
            return None;
        }
        let id = self.contents.push(chunk)?;
        self.known.insert(hash, id);
        Some(id)
    }
}
