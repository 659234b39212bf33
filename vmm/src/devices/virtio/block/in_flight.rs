//! A request that is being carried out: what it holds, and what it changes when it ends.

use std::{collections::VecDeque, os::fd::AsRawFd};

use guest_images::{
    CHUNK_SIZE,
    overlay::{ChunkState, Overlay, OverlayError},
};
use uring::{Action, FileEnd};
use vm_memory::GuestMemoryError;

use super::{
    Block, DiskDirty,
    plan::{self, Span, WritePiece},
    request::{ByteRange, Operation, Request},
    ring::{self, Token},
};
use crate::{
    devices::virtio::{buffers::Buffers, device::DeviceError},
    memory::GuestRam,
};

const CHUNK: u64 = CHUNK_SIZE as u64;

/// The chunks that a request works on. Requests that change none may share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Locks {
    spans: Vec<Span>,
    exclusive: bool,
}

impl Locks {
    pub(super) fn of(request: &Request) -> Self {
        let one = |range: &ByteRange| vec![Span::touched(*range)];
        let all = |ranges: &[ByteRange]| ranges.iter().map(|r| Span::touched(*r)).collect();
        let (spans, exclusive) = match &request.operation {
            Operation::Read(range) => (one(range), false),
            Operation::Write(range) => (one(range), true),
            Operation::Discard(ranges) | Operation::WriteZeroes(ranges) => (all(ranges), true),
            Operation::Flush | Operation::GetId | Operation::Refuse(_) => (Vec::new(), false),
        };
        Self { spans, exclusive }
    }

    pub(super) fn conflict(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive)
            && self.spans.iter().any(|mine| other.spans.iter().any(|span| mine.overlaps(*span)))
    }
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) head: u16,
    pub(super) status: Buffers,
    pub(super) locks: Locks,
    /// Operations that have not ended.
    pub(super) pending: usize,
    pub(super) failed: bool,
    /// Answer with this instead.
    pub(super) refused: Option<u8>,
    pub(super) is_flush: bool,
    /// Zeroing reaches every byte, not only whole chunks.
    exact: bool,
    /// Guest RAM that the kernel writes, to be marked once it has.
    filled: Buffers,
    /// States that chunks get if all goes well.
    flips: Vec<(Span, ChunkState)>,
    /// Chunks that differ afterwards, or may if something fails.
    changed: Vec<Span>,
    /// Whether any chunk was changed so far.
    changes: bool,
    /// Ranges whose turn comes when the operations for the one before have ended: they may overlap.
    ranges: VecDeque<ByteRange>,
}

impl InFlight {
    pub(super) fn new(request: &Request, locks: Locks) -> Self {
        let refused = match request.operation {
            Operation::Refuse(status) => Some(status),
            _ => None,
        };
        let fills = matches!(request.operation, Operation::Read(_) | Operation::GetId);
        Self {
            head: request.head,
            status: request.status.clone(),
            locks,
            pending: 0,
            failed: false,
            refused,
            is_flush: request.operation == Operation::Flush,
            exact: matches!(request.operation, Operation::WriteZeroes(_)),
            filled: if fills { request.data.clone() } else { Buffers::default() },
            flips: Vec::new(),
            changed: Vec::new(),
            changes: false,
            ranges: VecDeque::new(),
        }
    }

    pub(super) fn is_change(&self) -> bool {
        self.changes
    }

    /// Bytes of the data buffers that hold what was asked for.
    pub(super) fn filled_bytes(&self) -> u32 {
        // Chains are shorter than 4 GiB.
        u32::try_from(self.filled.len()).unwrap_or(u32::MAX)
    }

    /// Makes visible what the ended operations did: to readers of the overlay, then to handoffs.
    pub(super) fn apply(
        &mut self,
        overlay: &Overlay,
        dirty: &DiskDirty,
        ram: &GuestRam,
    ) -> Result<(), GuestMemoryError> {
        for (span, state) in self.flips.drain(..) {
            if !self.failed {
                span.chunks().for_each(|chunk| {
                    overlay.mark(chunk, state);
                });
            }
        }
        for span in self.changed.drain(..) {
            dirty.mark(span.chunks());
            self.changes = true;
        }
        self.filled.mark_dirty(ram)
    }
}

/// Why a request could not be begun.
enum BeginError {
    /// The device cannot go on.
    Device(DeviceError),
    /// The disk failed: the driver is told.
    Disk(OverlayError),
}

impl From<GuestMemoryError> for BeginError {
    fn from(error: GuestMemoryError) -> Self {
        Self::Device(error.into())
    }
}

impl Block {
    /// Turns a request, whose chunks are locked, into operations.
    pub(super) fn begin(
        &mut self,
        index: usize,
        request: Request,
        ram: &GuestRam,
    ) -> Result<(), DeviceError> {
        let begun = self.try_begin(index, request, ram);
        self.begun(index, begun)
    }

    /// A disk that failed fails the request, once those operations that were begun have ended.
    fn begun(&mut self, index: usize, result: Result<(), BeginError>) -> Result<(), DeviceError> {
        match result {
            Ok(()) => Ok(()),
            Err(BeginError::Device(error)) => Err(error),
            Err(BeginError::Disk(error)) => {
                if let Some(times) = self.failures.due() {
                    tracing::error!(%error, times, "disk request fails");
                }
                if let Some(entry) = self.entries.get_mut(index) {
                    entry.failed = true;
                }
                Ok(())
            }
        }
    }

    fn try_begin(
        &mut self,
        index: usize,
        request: Request,
        ram: &GuestRam,
    ) -> Result<(), BeginError> {
        match request.operation {
            Operation::Read(range) => self.begin_read(index, range, &request.data, ram),
            Operation::Write(range) => self.begin_write(index, range, &request.data, ram),
            Operation::Discard(ranges) | Operation::WriteZeroes(ranges) => {
                if let Some(entry) = self.entries.get_mut(index) {
                    entry.ranges = ranges.into();
                }
                self.try_begin_range(index).map(|_| ())
            }
            Operation::GetId => {
                request.data.write_at(ram, 0, &self.id)?;
                Ok(())
            }
            Operation::Flush | Operation::Refuse(_) => Ok(()),
        }
    }

    /// Begins the request's next range; `false` if there is none or something has failed.
    pub(super) fn begin_next_range(&mut self, index: usize) -> Result<bool, DeviceError> {
        match self.try_begin_range(index) {
            Ok(begun) => Ok(begun),
            Err(error) => self.begun(index, Err(error)).map(|()| true),
        }
    }

    fn try_begin_range(&mut self, index: usize) -> Result<bool, BeginError> {
        let Some(entry) = self.entries.get_mut(index) else { return Ok(false) };
        if entry.failed {
            return Ok(false);
        }
        let exact = entry.exact;
        let Some(range) = entry.ranges.pop_front() else { return Ok(false) };
        self.begin_zero_chunks(index, range);
        if exact {
            self.begin_zero_edges(index, range)?;
        }
        Ok(true)
    }

    fn push(&mut self, index: usize, operation: ring::Operation) {
        // SAFETY: what is not the operation's own is guest RAM, which has no Rust references to it and
        // which `self.ram` keeps from activation on; `self.overlay` keeps the files. Both are dropped
        // after the ring, and before RAM is replaced, a reset has abandoned the ring.
        unsafe { self.ring.push(operation) };
        if let Some(entry) = self.entries.get_mut(index) {
            entry.pending += 1;
        }
    }

    fn change(&mut self, index: usize, span: Span, state: ChunkState) {
        if let Some(entry) = self.entries.get_mut(index)
            && !span.is_empty()
        {
            entry.flips.push((span, state));
            entry.changed.push(span);
        }
    }

    fn begin_read(
        &mut self,
        index: usize,
        range: ByteRange,
        data: &Buffers,
        ram: &GuestRam,
    ) -> Result<(), BeginError> {
        for piece in plan::read(&self.overlay, range) {
            let (offset, end) = (piece.range.start, piece.range.end);
            let buffers = data.slice(offset - range.start, end - offset);
            let (file, end_of_file) = match piece.state {
                ChunkState::Zero => {
                    buffers.fill_zero(ram)?;
                    continue;
                }
                ChunkState::Data => (self.overlay.data_fd(), FileEnd::Fails),
                ChunkState::Base => (self.overlay.base_fd(), FileEnd::Zeros),
            };
            let (token, file) = (Token::Request(index), file.as_raw_fd());
            let action = Action::Read { offset, end: end_of_file };
            let iovecs = buffers.iovecs(ram)?;
            self.push(index, ring::Operation::on(token, file, action, iovecs));
        }
        Ok(())
    }

    fn begin_write(
        &mut self,
        index: usize,
        range: ByteRange,
        data: &Buffers,
        ram: &GuestRam,
    ) -> Result<(), BeginError> {
        self.change(index, Span::touched(range), ChunkState::Data);
        let (token, file) = (Token::Request(index), self.overlay.data_fd().as_raw_fd());
        for piece in plan::write(&self.overlay, range) {
            let (WritePiece::Direct(part) | WritePiece::Fill { range: part, .. }) = piece;
            let buffers = data.slice(part.start - range.start, part.end - part.start);
            let operation = match piece {
                WritePiece::Direct(_) => {
                    let action = Action::Write { offset: part.start };
                    ring::Operation::on(token, file, action, buffers.iovecs(ram)?)
                }
                WritePiece::Fill { chunk, .. } => {
                    let mut content = [0; CHUNK_SIZE];
                    self.overlay.read_chunk(chunk, &mut content).map_err(BeginError::Disk)?;
                    let at = (part.start % CHUNK) as usize;
                    let len = (part.end - part.start) as usize;
                    buffers.read_at(ram, 0, &mut content[at..at + len])?;
                    ring::Operation::write_owned(token, file, chunk * CHUNK, Box::new(content))
                }
            };
            self.push(index, operation);
        }
        Ok(())
    }

    /// Makes the chunks inside `range` zero by their state, and gives their space back.
    fn begin_zero_chunks(&mut self, index: usize, range: ByteRange) {
        let span = Span::inside(range, &self.overlay);
        for (part, state) in plan::zero(&self.overlay, span) {
            self.change(index, part, state);
        }
        if span.any(&self.overlay, ChunkState::Data) {
            let file = self.overlay.data_fd().as_raw_fd();
            let (offset, len) = (span.first * CHUNK, (span.end - span.first) * CHUNK);
            let action = Action::Punch { offset, len };
            self.push(index, ring::Operation::plain(Token::Request(index), file, action));
        }
    }

    /// Writes zeros to the partial chunks at both ends of `range`.
    fn begin_zero_edges(&mut self, index: usize, range: ByteRange) -> Result<(), BeginError> {
        let (token, file) = (Token::Request(index), self.overlay.data_fd().as_raw_fd());
        for edge in plan::edges(&self.overlay, range) {
            let mut at = edge.start;
            while at < edge.end {
                let chunk = at / CHUNK;
                let end = ((chunk + 1) * CHUNK).min(edge.end);
                let (within, len) = ((at % CHUNK) as usize, (end - at) as usize);
                let operation = match self.overlay.state(chunk) {
                    ChunkState::Zero => None,
                    ChunkState::Data => {
                        let zeros = vec![0; len].into_boxed_slice();
                        Some(ring::Operation::write_owned(token, file, at, zeros))
                    }
                    ChunkState::Base => {
                        let mut content = [0; CHUNK_SIZE];
                        self.overlay.read_chunk(chunk, &mut content).map_err(BeginError::Disk)?;
                        content[within..within + len].fill(0);
                        let (start, bytes) = (chunk * CHUNK, Box::new(content));
                        Some(ring::Operation::write_owned(token, file, start, bytes))
                    }
                };
                if let Some(operation) = operation {
                    self.change(index, Span { first: chunk, end: chunk + 1 }, ChunkState::Data);
                    self.push(index, operation);
                }
                at = end;
            }
        }
        Ok(())
    }
}
