//! Many chunks of an overlay at once.
//!
//! Neighbours that are in the same file are one operation. Reads go to the kernel together, by io_uring:
//! what is not in the page cache comes from the disk all at once and not one after the other. Writes
//! go there one after the other, because to write to the page cache is to copy, and most file systems
//! have io_uring do that on other threads: it costs more that way. ADR 0016 has the figures.

use std::{
    cmp::Reverse,
    io::{self, IoSlice},
    ops::Range,
    os::fd::AsFd,
    sync::Arc,
};

use nix::sys::uio::pwritev;
use uring::{Batch, Batches, FileEnd};

use super::{CHUNK_BYTES, ChunkState, DATA_FILE, Overlay, OverlayError};
use crate::chunk::{CHUNK_SIZE, Chunk};

/// Operations that are given to the kernel at once.
const RING_ENTRIES: u32 = 64;
/// Neighbours that the ring reads as one: few, so that a disk gets several requests for them.
const RING_RUN: usize = 8;
/// Neighbours that one system call reads or writes.
const CALL_RUN: usize = 64;

/// How many operations reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// By io_uring, together.
    Ring,
    /// By a system call each.
    Calls,
}

/// Reads and writes chunks of one overlay, many at a time. The same bytes and the same rules as
/// with [`Overlay::read_chunk`] and [`Overlay::write_chunk`], for each chunk by itself.
///
/// Several may read one overlay, and its one writer may be the block device meanwhile: as with
/// single reads, what is read while it is written may be half old, half new.
#[derive(Debug)]
pub struct ChunkIo {
    overlay: Arc<Overlay>,
    /// `None` where io_uring is not to be had, or nothing is to use it.
    ring: Option<Batches>,
    reads: Means,
    writes: Means,
    /// Positions of chunks to be written, kept for its memory.
    order: Vec<usize>,
}

impl ChunkIo {
    /// By what is best for each.
    pub fn new(overlay: Arc<Overlay>) -> Self {
        Self::by(overlay, Means::Ring, Means::Calls)
    }

    /// By these means, to measure what they bring. Without io_uring, calls do it all.
    pub fn by(overlay: Arc<Overlay>, reads: Means, writes: Means) -> Self {
        let wanted = [reads, writes].contains(&Means::Ring);
        let ring = wanted.then(|| Batches::new(RING_ENTRIES)).and_then(|made| {
            made.inspect_err(|error| {
                tracing::debug!(%error, "the disk's chunks are read by system calls instead");
            })
            .ok()
        });
        Self { overlay, ring, reads, writes, order: Vec::new() }
    }

    /// The overlay.
    pub fn overlay(&self) -> &Arc<Overlay> {
        &self.overlay
    }

    /// By what chunks are read here.
    pub fn reads_by(&self) -> Means {
        if self.ring.is_some() { self.reads } else { Means::Calls }
    }

    #[cfg(test)]
    pub(super) fn lose_ring(&mut self, error: &io::Error) {
        without_ring(&mut self.ring, error);
    }

    /// Copies the present content of each of `chunks` into the place with its number in `into`,
    /// which is as long. After an error any of `into` may have been changed.
    pub fn read(&mut self, chunks: &[u64], into: &mut [Chunk]) -> Result<(), OverlayError> {
        debug_assert_eq!(chunks.len(), into.len());
        for chunk in chunks {
            self.overlay.chunk_offset(*chunk)?;
        }
        let (overlay, by) = (Arc::clone(&self.overlay), self.reads_by());
        if let (Means::Ring, Some(ring)) = (by, &mut self.ring) {
            let pieces = read_pieces(&overlay, chunks, into, RING_RUN);
            match read_by_ring(&overlay, ring, pieces) {
                Ok(result) => return result,
                Err(error) => without_ring(&mut self.ring, &error),
            }
        }
        for piece in read_pieces(&overlay, chunks, into, CALL_RUN) {
            overlay.read_state(piece.state, piece.offset, piece.into)?;
        }
        Ok(())
    }

    /// Writes whole chunks. Of a chunk that is there more than once the last content counts. All are
    /// checked before any is written; after an error of the disk any may have been.
    pub fn write(&mut self, chunks: &[(u64, &Chunk)]) -> Result<(), OverlayError> {
        for (chunk, content) in chunks {
            self.overlay.check_content(*chunk, content)?;
        }
        let overlay = Arc::clone(&self.overlay);
        let cuts = write_runs(chunks, &mut self.order);
        let run = |cut: &Range<usize>| Run {
            chunks,
            positions: self.order.get(cut.clone()).unwrap_or_default(),
        };
        let runs: Vec<Run<'_>> = cuts.iter().map(run).collect();
        if let (Means::Ring, Some(ring)) = (self.writes, &mut self.ring) {
            match write_by_ring(&overlay, ring, &runs) {
                Ok(result) => return result,
                Err(error) => without_ring(&mut self.ring, &error),
            }
        }
        runs.iter().try_for_each(|run| run.write_by_call(&overlay))
    }
}

/// A ring that fails by itself, and not in what it was to do, has nothing more to give. What it was
/// given last is done again: to read or write a chunk twice is no harm.
fn without_ring(ring: &mut Option<Batches>, error: &io::Error) {
    tracing::debug!(%error, "io_uring failed: the disk's chunks take system calls from here on");
    *ring = None;
}

/// Chunks next to each other, in one file and in memory.
struct ReadPiece<'m> {
    state: ChunkState,
    offset: u64,
    into: &'m mut [u8],
}

/// Cuts a read into pieces of at most `longest` chunks.
fn read_pieces<'m>(
    overlay: &Overlay,
    chunks: &[u64],
    into: &'m mut [Chunk],
    longest: usize,
) -> Vec<ReadPiece<'m>> {
    let mut pieces = Vec::with_capacity(chunks.len().min(into.len()));
    let (mut chunks, mut into) = (chunks, into);
    while let Some(&first) = chunks.first() {
        // Each state is asked for once: one that changes meanwhile cannot tear a piece apart.
        let state = overlay.state(first);
        let rest = chunks.iter().zip(first..).skip(1).take(longest - 1);
        let more =
            rest.take_while(|&(&chunk, next)| chunk == next && overlay.state(chunk) == state);
        let run = (1 + more.count()).min(into.len());
        let (now, later) = into.split_at_mut(run);
        if run == 0 {
            break;
        }
        let into_bytes = now.as_flattened_mut();
        pieces.push(ReadPiece { state, offset: first * CHUNK_BYTES, into: into_bytes });
        (chunks, into) = (chunks.get(run..).unwrap_or_default(), later);
    }
    pieces
}

/// The outer error is the ring's own.
fn read_by_ring(
    overlay: &Overlay,
    ring: &mut Batches,
    pieces: Vec<ReadPiece<'_>>,
) -> io::Result<Result<(), OverlayError>> {
    // One operation gains nothing from a ring.
    if pieces.len() < 2 {
        let mut pieces = pieces.into_iter();
        return Ok(pieces.try_for_each(|p| overlay.read_state(p.state, p.offset, p.into)));
    }
    let mut batch = Batch::with_capacity(pieces.len());
    let mut states = Vec::with_capacity(pieces.len());
    for ReadPiece { state, offset, into } in pieces {
        let file = match state {
            ChunkState::Zero => {
                into.fill(0);
                continue;
            }
            ChunkState::Data => overlay.data.as_fd(),
            ChunkState::Base => overlay.base_fd(),
        };
        let inside = match state {
            ChunkState::Base => overlay.disk_bytes.saturating_sub(offset).min(into.len() as u64),
            _ => into.len() as u64,
        };
        let (inside, outside) = into.split_at_mut(inside as usize);
        outside.fill(0);
        batch.read(file, offset, inside, FileEnd::Fails);
        states.push(state);
    }
    let mut failed = Ok(());
    ring.run(batch, |number, result| {
        if let (Err(source), Some(state)) = (result, states.get(number)) {
            failed = Err(overlay.read_failed(*state, source));
        }
    })?;
    Ok(failed)
}

/// Makes `order` the positions of the chunks to be written, each chunk's last one, by their numbers, and
/// cuts it into runs of neighbours.
fn write_runs(chunks: &[(u64, &Chunk)], order: &mut Vec<usize>) -> Vec<Range<usize>> {
    let number = |at: usize| chunks.get(at).map(|(chunk, _)| *chunk);
    order.clear();
    order.extend(0..chunks.len());
    order.sort_unstable_by_key(|at| (number(*at), Reverse(*at)));
    order.dedup_by_key(|at| number(*at));
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (place, at) in order.iter().enumerate() {
        let before = place.checked_sub(1).and_then(|place| order.get(place));
        let before = before.and_then(|at| number(*at)).map(|chunk| chunk + 1);
        match runs.last_mut() {
            Some(run) if before == number(*at) && run.len() < CALL_RUN => run.end += 1,
            _ => runs.push(place..place + 1),
        }
    }
    runs
}

/// Chunks that are next to each other on the disk.
#[derive(Clone, Copy)]
struct Run<'c> {
    chunks: &'c [(u64, &'c Chunk)],
    /// Where in `chunks` they are.
    positions: &'c [usize],
}

impl<'c> Run<'c> {
    fn first(self) -> u64 {
        let first = self.positions.first().and_then(|at| self.chunks.get(*at));
        first.map_or(0, |(chunk, _)| *chunk)
    }

    fn contents(self) -> impl Iterator<Item = &'c [u8]> {
        let chunks = self.positions.iter().filter_map(move |at| self.chunks.get(*at));
        chunks.map(|(_, content)| content.as_slice())
    }

    /// Only when the data is there, as with every write: until then a chunk has its old state.
    fn mark(self, overlay: &Overlay) {
        for chunk in (self.first()..).take(self.positions.len()) {
            overlay.mark(chunk, ChunkState::Data);
        }
    }

    fn write_by_call(self, overlay: &Overlay) -> Result<(), OverlayError> {
        let mut pieces = [IoSlice::new(&[]); CALL_RUN];
        let mut count = 0;
        for (piece, content) in pieces.iter_mut().zip(self.contents()) {
            *piece = IoSlice::new(content);
            count += 1;
        }
        let pieces = pieces.get(..count).unwrap_or_default();
        let offset = self.first() * CHUNK_BYTES;
        let at = i64::try_from(offset).unwrap_or(i64::MAX);
        let written = pwritev(&overlay.data, pieces, at).unwrap_or_default();
        // What was cut short or refused is written one by one, which also tells why.
        for (number, content) in self.contents().enumerate().skip(written / CHUNK_SIZE) {
            overlay.write_data(offset + (number * CHUNK_SIZE) as u64, content)?;
        }
        self.mark(overlay);
        Ok(())
    }
}

/// The outer error is the ring's own.
fn write_by_ring(
    overlay: &Overlay,
    ring: &mut Batches,
    runs: &[Run<'_>],
) -> io::Result<Result<(), OverlayError>> {
    let mut batch = Batch::with_capacity(runs.len());
    for run in runs {
        batch.write(overlay.data.as_fd(), run.first() * CHUNK_BYTES, run.contents());
    }
    let mut failed = Ok(());
    ring.run(batch, |number, result| match (result, runs.get(number)) {
        (Ok(()), Some(run)) => run.mark(overlay),
        (Err(source), _) => failed = Err(overlay.io("writing", DATA_FILE)(source)),
        (Ok(()), None) => {}
    })?;
    Ok(failed)
}
