//! Which file holds which part of a request: pure arithmetic over chunk states.

use guest_images::{
    CHUNK_SIZE, data_extent,
    overlay::{ChunkState, Overlay},
};

use super::request::ByteRange;

const CHUNK: u64 = CHUNK_SIZE as u64;

/// Chunks `first..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) end: u64,
}

impl Span {
    /// Every chunk that `range` touches.
    pub(super) fn touched(range: ByteRange) -> Self {
        Self { first: range.start / CHUNK, end: range.end.div_ceil(CHUNK) }
    }

    /// The chunks that lie wholly inside `range`; the one that the disk ends in is whole when the
    /// range reaches the disk's end.
    pub(super) fn inside(range: ByteRange, overlay: &Overlay) -> Self {
        let first = range.start.div_ceil(CHUNK);
        let at_end = range.end == overlay.disk_bytes();
        let end = if at_end { overlay.chunks() } else { range.end / CHUNK };
        Self { first, end: end.max(first) }
    }

    pub(super) fn is_empty(self) -> bool {
        self.first >= self.end
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        self.first < other.end && other.first < self.end
    }

    pub(super) fn chunks(self) -> std::ops::Range<u64> {
        self.first..self.end
    }

    /// Whether any of the chunks is in `state`.
    pub(super) fn any(self, overlay: &Overlay, state: ChunkState) -> bool {
        self.chunks().any(|chunk| overlay.state(chunk) == state)
    }
}

/// Part of a read that one file, or none, answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReadPiece {
    pub(super) state: ChunkState,
    pub(super) range: ByteRange,
}

/// Splits a read where chunk states change.
pub(super) fn read(overlay: &Overlay, range: ByteRange) -> Vec<ReadPiece> {
    let mut pieces = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let chunk = at / CHUNK;
        let (state, run) = overlay.state_run(chunk, range.end.div_ceil(CHUNK) - chunk);
        // At least the chunk itself: a range inside the disk has one.
        let end = ((chunk + run.max(1)) * CHUNK).min(range.end);
        pieces.push(ReadPiece { state, range: ByteRange { start: at, end } });
        at = end;
    }
    pieces
}

/// Part of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WritePiece {
    /// Goes to the data file as it is.
    Direct(ByteRange),
    /// Part of a chunk that is not data yet: the rest of the chunk must be written with it.
    Fill {
        /// The chunk.
        chunk: u64,
        /// What is written of it.
        range: ByteRange,
    },
}

/// Splits a write into what can go to the data file directly and the partial chunks at its ends
/// that must be filled up.
pub(super) fn write(overlay: &Overlay, range: ByteRange) -> Vec<WritePiece> {
    let whole = Span::inside(range, overlay);
    let mut pieces: Vec<WritePiece> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let chunk = at / CHUNK;
        let direct = whole.chunks().contains(&chunk) || overlay.state(chunk) == ChunkState::Data;
        // Whole chunks are one stretch; a partial chunk is looked at by itself.
        let end = if whole.chunks().contains(&chunk) { whole.end } else { chunk + 1 };
        let part = ByteRange { start: at, end: (end * CHUNK).min(range.end) };
        match pieces.last_mut() {
            Some(WritePiece::Direct(last)) if direct => last.end = part.end,
            _ if direct => pieces.push(WritePiece::Direct(part)),
            _ => pieces.push(WritePiece::Fill { chunk, range: part }),
        }
        at = part.end;
    }
    pieces
}

/// The parts of `range` outside its whole chunks: what write-zeroes must write.
pub(super) fn edges(overlay: &Overlay, range: ByteRange) -> Vec<ByteRange> {
    let whole = Span::inside(range, overlay);
    if whole.is_empty() {
        return if range.start < range.end { vec![range] } else { Vec::new() };
    }
    let head = ByteRange { start: range.start, end: whole.first * CHUNK };
    let tail = ByteRange { start: (whole.end * CHUNK).min(range.end), end: range.end };
    [head, tail].into_iter().filter(|edge| edge.start < edge.end).collect()
}

/// What zeroing whole chunks changes: which chunks get which state.
///
/// Where the base disk has a hole its content is zero, so that such a chunk becomes base again: a
/// handoff need not look at it. A file system that is trimmed names all its free blocks, most of
/// which were never written; those change nothing at all.
pub(super) fn zero(overlay: &Overlay, span: Span) -> Vec<(Span, ChunkState)> {
    let mut changes = Vec::new();
    let mut at = span.first;
    let end_bytes = span.end * CHUNK;
    while at < span.end {
        let data = data_extent(overlay.base().disk_file(), at * CHUNK, end_bytes);
        let (from, to) = data.map_or((span.end, span.end), |(start, end)| {
            (start / CHUNK, end.div_ceil(CHUNK).min(span.end))
        });
        let hole = Span { first: at, end: from.max(at) };
        push_others(overlay, hole, ChunkState::Base, &mut changes);
        push_others(overlay, Span { first: hole.end, end: to }, ChunkState::Zero, &mut changes);
        // Forward in any case, whatever the file system says of its extents.
        at = to.max(at + 1);
    }
    changes
}

/// The runs of chunks in `span` that are not in `state` yet.
fn push_others(
    overlay: &Overlay,
    span: Span,
    state: ChunkState,
    changes: &mut Vec<(Span, ChunkState)>,
) {
    let mut at = span.first;
    while at < span.end {
        let (now, run) = overlay.state_run(at, span.end - at);
        let end = at + run.max(1);
        match changes.last_mut() {
            _ if now == state => {}
            Some((last, as_last)) if last.end == at && *as_last == state => last.end = end,
            _ => changes.push((Span { first: at, end }, state)),
        }
        at = end;
    }
}
