//! As much of a base as a trace needs.

use std::{collections::HashMap, sync::Arc};

use guest_images::{BaseId, Chunk, ChunkHash, Part, Place, chunk::ZERO_CHUNK};

use super::{ContentId, Contents};
use crate::BaseView;

/// A base of which only those places are held that the trace's chunks began as or were equal to.
/// Others read as zeros, at both ends, and are never looked for.
#[derive(Clone, Debug)]
pub struct TraceBase {
    id: BaseId,
    /// How many chunks each part has, in the order of [`Part::ALL`].
    parts: [u64; Part::ALL.len()],
    held: HashMap<Place, ContentId>,
    index: HashMap<ChunkHash, Place>,
    contents: Arc<Contents>,
}

impl TraceBase {
    /// A base with these parts, of which these places are held. Places outside are left out, and so
    /// are numbers that are no content.
    pub(crate) fn new(
        parts: [u64; Part::ALL.len()],
        held: impl IntoIterator<Item = (Place, ContentId)>,
        contents: Arc<Contents>,
    ) -> Self {
        let inside = |place: &Place| place.index < parts[place.part as usize];
        let held: HashMap<_, _> = held
            .into_iter()
            .filter(|(place, content)| inside(place) && contents.get(*content).is_some())
            .collect();
        let mut places: Vec<_> = held.iter().map(|(place, content)| (*place, *content)).collect();
        places.sort_unstable();
        let mut hasher = blake3::Hasher::new();
        parts.iter().for_each(|chunks| _ = hasher.update(&chunks.to_le_bytes()));
        let mut index = HashMap::new();
        for (place, content) in places {
            let hash = ChunkHash::of(contents.get(content).unwrap_or(ZERO_CHUNK));
            hasher.update(&[place.part as u8]);
            hasher.update(&place.index.to_le_bytes());
            hasher.update(&hash.0);
            // The first place of a content, as in a base's index; zeros are not in it.
            if content != ContentId::ZERO {
                index.entry(hash).or_insert(place);
            }
        }
        Self { id: BaseId(*hasher.finalize().as_bytes()), parts, held, index, contents }
    }

    /// All contents of the trace.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// How many chunks each part has, in the order of [`Part::ALL`].
    pub fn parts(&self) -> [u64; Part::ALL.len()] {
        self.parts
    }

    /// The places held, in order.
    pub fn held(&self) -> Vec<(Place, ContentId)> {
        let mut held: Vec<_> =
            self.held.iter().map(|(place, content)| (*place, *content)).collect();
        held.sort_unstable();
        held
    }

    /// What the place holds, by number.
    pub(crate) fn content(&self, place: Place) -> ContentId {
        self.held.get(&place).copied().unwrap_or(ContentId::ZERO)
    }
}

impl BaseView for TraceBase {
    fn id(&self) -> BaseId {
        self.id
    }

    fn lookup(&self, hash: &ChunkHash) -> Option<Place> {
        self.index.get(hash).copied()
    }

    fn chunk(&self, place: Place) -> Option<&Chunk> {
        if !self.holds(place) {
            return None;
        }
        self.contents.get(self.content(place))
    }

    fn part_chunks(&self, part: Part) -> u64 {
        self.parts[part as usize]
    }
}
