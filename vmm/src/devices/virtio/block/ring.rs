//! Asynchronous file I/O on io_uring, for memory that belongs to the guest or to the operation.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    time::{Duration, Instant},
};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vmm_sys_util::eventfd::EventFd;

use super::slab::Slab;

/// Operations in the kernel at once, at most.
const RING_ENTRIES: u32 = 256;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel gives none.
    #[error(
        "io_uring is not available ({source}): the disk needs Linux 5.6 or newer, \
         kernel.io_uring_disabled = 0 and a sandbox that allows io_uring_setup"
    )]
    Unavailable {
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("this kernel's io_uring has no {0}: the disk needs Linux 5.6 or newer")]
    Missing(&'static str),
    /// The ring's event descriptor cannot be set up.
    #[error("cannot set up the disk's event descriptor: {0}")]
    Event(#[source] io::Error),
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Read at an offset; with `zero_tail` the file may end early and zeros follow.
    Read { offset: u64, zero_tail: bool },
    /// Write at an offset.
    Write { offset: u64 },
    /// `fdatasync`.
    Sync,
    /// Give space back; a file system that cannot is no failure.
    Punch { offset: u64, len: u64 },
}

/// Who is told of the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The request with this number.
    Request(usize),
    /// The running flush.
    Flush,
}

/// An operation and the memory it works on.
pub(super) struct Operation {
    token: Token,
    file: RawFd,
    action: Action,
    iovecs: Vec<libc::iovec>,
    /// Memory that `iovecs` points into, if it is not the guest's.
    _owned: Option<Box<[u8]>>,
    left: u64,
}

// SAFETY: the pointers in `iovecs` are to guest RAM or to `_owned`, which any thread may access; the
// operation is only ever used by the thread that owns the ring.
unsafe impl Send for Operation {}

impl Operation {
    /// An operation on memory that outlives the ring: see [`Ring::push`].
    pub(super) fn on_guest(
        token: Token,
        file: RawFd,
        action: Action,
        iovecs: Vec<libc::iovec>,
    ) -> Self {
        let left = iovecs.iter().map(|v| v.iov_len as u64).sum();
        Self { token, file, action, iovecs, _owned: None, left }
    }

    /// A write of bytes that the operation owns.
    pub(super) fn write_owned(token: Token, file: RawFd, offset: u64, bytes: Box<[u8]>) -> Self {
        let mut owned = bytes;
        let iovecs =
            vec![libc::iovec { iov_base: owned.as_mut_ptr().cast(), iov_len: owned.len() }];
        let left = owned.len() as u64;
        Self { token, file, action: Action::Write { offset }, iovecs, _owned: Some(owned), left }
    }

    /// An operation without memory.
    pub(super) fn plain(token: Token, file: RawFd, action: Action) -> Self {
        Self { token, file, action, iovecs: Vec::new(), _owned: None, left: 0 }
    }

    fn entry(&self, index: usize) -> squeue::Entry {
        let file = types::Fd(self.file);
        // Chains are bounded far below IOV_MAX, hence below u32.
        let (iovecs, count) = (self.iovecs.as_ptr(), self.iovecs.len() as u32);
        let entry = match self.action {
            Action::Read { offset, .. } => {
                opcode::Readv::new(file, iovecs, count).offset(offset).build()
            }
            Action::Write { offset } => {
                opcode::Writev::new(file, iovecs, count).offset(offset).build()
            }
            Action::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Action::Punch { offset, len } => opcode::Fallocate::new(file, len)
                .offset(offset)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
        };
        entry.user_data(index as u64)
    }

    /// Takes a completion's result; `None` if the rest must be submitted again.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let done = match u64::try_from(result) {
            Ok(done) => done,
            Err(_) if [-libc::EINTR, -libc::EAGAIN].contains(&result) => return None,
            // Space that cannot be given back is wasted, not wrong: the map counts.
            Err(_) if matches!(self.action, Action::Punch { .. }) => return Some(Ok(())),
            Err(_) => return Some(Err(io::Error::from_raw_os_error(-result))),
        };
        let (Action::Read { offset, .. } | Action::Write { offset }) = &mut self.action else {
            return Some(Ok(()));
        };
        *offset += done;
        self.left = self.left.saturating_sub(done);
        skip(&mut self.iovecs, done);
        match self.action {
            _ if self.left == 0 => Some(Ok(())),
            _ if done > 0 => None,
            Action::Read { zero_tail: true, .. } => {
                self.zero_rest();
                Some(Ok(()))
            }
            Action::Read { .. } => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            _ => Some(Err(io::ErrorKind::WriteZero.into())),
        }
    }

    /// Fills what is left with zeros.
    fn zero_rest(&mut self) {
        for piece in &self.iovecs {
            // SAFETY: each piece is guest RAM or memory of this operation, writable and mapped until
            // the operation is dropped; the kernel is done with it. Guest RAM has no Rust
            // references into it, so the guest writing at the same time is not aliasing.
            unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
        }
    }
}

/// Drops the first `done` bytes.
fn skip(iovecs: &mut Vec<libc::iovec>, mut done: u64) {
    let whole = iovecs
        .iter()
        .take_while(|piece| {
            let len = piece.iov_len as u64;
            let past = done >= len;
            done -= if past { len } else { 0 };
            past
        })
        .count();
    iovecs.drain(..whole);
    if let Some(first) = iovecs.first_mut() {
        // `done` is less than this piece's length here.
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done as usize).cast();
        first.iov_len -= done as usize;
    }
}

/// A ring and the operations given to it.
pub(super) struct Ring {
    uring: IoUring,
    event: EventFd,
    operations: Slab<Operation>,
    /// Not yet in the submission queue.
    backlog: VecDeque<usize>,
    /// In the submission queue or the kernel.
    submitted: usize,
}

impl Ring {
    pub(super) fn new() -> Result<Self, RingError> {
        let unavailable = |source| RingError::Unavailable { source };
        let uring = IoUring::new(RING_ENTRIES).map_err(unavailable)?;
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe).map_err(unavailable)?;
        for (code, name) in [
            (opcode::Readv::CODE, "readv"),
            (opcode::Writev::CODE, "writev"),
            (opcode::Fsync::CODE, "fsync"),
            (opcode::Fallocate::CODE, "fallocate"),
        ] {
            if !probe.is_supported(code) {
                return Err(RingError::Missing(name));
            }
        }
        let event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(RingError::Event)?;
        uring.submitter().register_eventfd(event.as_raw_fd()).map_err(RingError::Event)?;
        Ok(Self {
            uring,
            event,
            operations: Slab::default(),
            backlog: VecDeque::new(),
            submitted: 0,
        })
    }

    /// Readable when operations ended.
    pub(super) fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// How many operations are not at their end.
    pub(super) fn len(&self) -> usize {
        self.operations.len()
    }

    /// Takes an operation on. Its memory and file must stay as they are until it has ended or this
    /// ring is dropped, which waits for all that is in the kernel.
    pub(super) fn push(&mut self, operation: Operation) {
        let index = self.operations.insert(operation);
        self.backlog.push_back(index);
    }

    /// Gives the kernel as much as it takes. A busy kernel takes the rest later.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        let room = self.uring.params().cq_entries() as usize;
        let mut queue = self.uring.submission();
        while self.submitted < room && !queue.is_full() {
            let Some(index) = self.backlog.pop_front() else { break };
            let Some(operation) = self.operations.get(index) else { continue };
            // SAFETY: iovecs and owned memory live in `operations` until the completion is reaped
            // or, at the latest, until drop has waited for it; the caller of `push` vouches for the
            // rest.
            if unsafe { queue.push(&operation.entry(index)) }.is_err() {
                self.backlog.push_front(index);
                break;
            }
            self.submitted += 1;
        }
        drop(queue);
        match self.uring.submit() {
            Ok(_) => Ok(()),
            Err(e) if is_busy(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// The next operation that ended, if one has.
    pub(super) fn reap(&mut self) -> Option<(Token, io::Result<()>)> {
        loop {
            let completion = self.uring.completion().next()?;
            self.submitted = self.submitted.saturating_sub(1);
            let index = completion.user_data() as usize;
            let Some(operation) = self.operations.get_mut(index) else { continue };
            let token = operation.token;
            match operation.advance(completion.result()) {
                Some(result) => {
                    self.operations.remove(index);
                    return Some((token, result));
                }
                None => self.backlog.push_front(index),
            }
        }
    }

    /// Forgets the event: whatever it told of will be reaped now.
    pub(super) fn clear_event(&self) {
        // An empty counter means that it was forgotten before.
        let _ = self.event.read();
    }

    /// Waits until an operation ends, or until `deadline`; says which.
    pub(super) fn wait(&mut self, deadline: Instant) -> io::Result<bool> {
        self.submit()?;
        if !self.uring.completion().is_empty() {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        // Short steps: a busy kernel may have to be asked again.
        let step = left.min(Duration::from_millis(100));
        let timeout = PollTimeout::try_from(step).unwrap_or(PollTimeout::ZERO);
        // SAFETY: the descriptor is open for as long as `self.event` lives, hence during this call.
        let event = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        match poll(&mut [PollFd::new(event, PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.clear_event();
        Ok(true)
    }

    /// Drops what the kernel has not got and waits, however long, for what it has; then nothing
    /// writes guest memory any more. Tells `ended` of each operation that the kernel finished.
    pub(super) fn abandon(&mut self, mut ended: impl FnMut(Token, io::Result<()>)) {
        const PATIENCE: Duration = Duration::from_secs(10);
        while self.submitted > 0 {
            // What was cut short is not continued either.
            self.drop_backlog();
            match self.wait(Instant::now() + PATIENCE) {
                Ok(true) => {}
                Ok(false) => tracing::warn!(operations = self.submitted, "waiting for the disk"),
                // There is no telling when the kernel stops writing but by its completions.
                Err(error) => {
                    tracing::error!(%error, "waiting for the disk");
                    std::thread::sleep(PATIENCE);
                }
            }
            while let Some((token, result)) = self.reap() {
                ended(token, result);
            }
        }
        self.drop_backlog();
    }

    fn drop_backlog(&mut self) {
        for index in self.backlog.drain(..) {
            self.operations.remove(index);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.abandon(|_, _| {});
    }
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use super::*;

    fn pieces(buffer: &mut [u8], cuts: &[usize]) -> Vec<libc::iovec> {
        let mut at = buffer.as_mut_ptr();
        let lens = cuts.iter().copied();
        lens.map(|iov_len| {
            let piece = libc::iovec { iov_base: at.cast(), iov_len };
            at = at.wrapping_add(iov_len);
            piece
        })
        .collect()
    }

    fn run(ring: &mut Ring, operation: Operation) -> io::Result<()> {
        ring.push(operation);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some((token, result)) = ring.reap() {
                assert_eq!(token, Token::Request(3));
                assert_eq!(ring.len(), 0);
                return result;
            }
            assert!(ring.wait(deadline).unwrap());
        }
    }

    const TOKEN: Token = Token::Request(3);

    #[test]
    fn reads_past_the_end_give_zeros_or_fail() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100]).unwrap();
        let fd = file.as_raw_fd();
        let mut ring = Ring::new().unwrap();
        for (offset, data) in [(0, 100), (90, 10), (100, 0), (5000, 0)] {
            let mut buffer = [1; 200];
            let read = |zero_tail| Action::Read { offset, zero_tail };
            let cuts = pieces(&mut buffer, &[50, 3, 147]);
            run(&mut ring, Operation::on_guest(TOKEN, fd, read(true), cuts)).unwrap();
            assert_eq!(buffer[..data], [7; 100][..data]);
            assert_eq!(buffer[data..], [0; 200][data..]);
            let cuts = pieces(&mut buffer, &[200]);
            let cut_off = run(&mut ring, Operation::on_guest(TOKEN, fd, read(false), cuts));
            assert_eq!(cut_off.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn what_is_cut_short_goes_on() {
        let mut buffer = [0; 10];
        let iovecs = pieces(&mut buffer, &[4, 4, 2]);
        let start = iovecs[0].iov_base as usize;
        let action = Action::Write { offset: 100 };
        let mut operation = Operation::on_guest(TOKEN, 0, action, iovecs);
        assert!(operation.advance(-libc::EAGAIN).is_none());
        assert!(operation.advance(5).is_none());
        assert_eq!(operation.action, Action::Write { offset: 105 });
        let left: Vec<_> =
            operation.iovecs.iter().map(|v| (v.iov_base as usize - start, v.iov_len)).collect();
        assert_eq!(left, [(5, 3), (8, 2)]);
        assert!(operation.advance(3).is_none());
        assert!(operation.advance(2).unwrap().is_ok());
        let mut stalled = Operation::write_owned(TOKEN, 0, 0, Box::new([1]));
        assert_eq!(stalled.advance(0).unwrap().unwrap_err().kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn failures_are_told_and_space_that_stays_is_none() {
        let read_only = File::open("/dev/null").unwrap();
        let fd = read_only.as_raw_fd();
        let mut ring = Ring::new().unwrap();
        let write = Operation::write_owned(TOKEN, fd, 0, Box::new([1; 10]));
        assert_eq!(run(&mut ring, write).unwrap_err().raw_os_error(), Some(libc::EBADF));
        let punch = Operation::plain(TOKEN, fd, Action::Punch { offset: 0, len: 4096 });
        run(&mut ring, punch).unwrap();
    }

    #[test]
    fn more_operations_than_the_ring_holds() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = Ring::new().unwrap();
        let count = 5 * RING_ENTRIES as usize;
        for n in 0..count {
            let bytes = Box::new((n as u32).to_le_bytes());
            ring.push(Operation::write_owned(TOKEN, file.as_raw_fd(), 4 * n as u64, bytes));
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut ended = 0;
        while ended < count {
            assert!(ring.wait(deadline).unwrap());
            while let Some((_, result)) = ring.reap() {
                result.unwrap();
                ended += 1;
            }
        }
        let written = std::os::unix::fs::FileExt::read_at;
        for n in [0, 1, count / 2, count - 1] {
            let mut bytes = [0; 4];
            written(&file, &mut bytes, 4 * n as u64).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), n as u32);
        }
    }
}
