//! A ring, and the operations that it has.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use io_uring::{IoUring, Probe, opcode, register::Restriction};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::{operation::Operation, slab::Slab};

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel gives none.
    #[error(
        "io_uring is not available ({source}): it needs Linux 5.6 or newer, \
         kernel.io_uring_disabled = 0 and a sandbox that allows io_uring_setup"
    )]
    Unavailable {
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("this kernel's io_uring has no {0}: it needs Linux 5.6 or newer")]
    Missing(&'static str),
    /// The ring's event descriptor cannot be set up.
    #[error("cannot set up the ring's event descriptor: {0}")]
    Event(#[source] io::Error),
}

/// What a ring is wanted for: asked of the kernel when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// [`Action::Read`](crate::Action::Read).
    Read,
    /// [`Action::Write`](crate::Action::Write).
    Write,
    /// [`Action::Sync`](crate::Action::Sync).
    Sync,
    /// [`Action::Punch`](crate::Action::Punch).
    Punch,
}

impl Need {
    fn operation(self) -> (u8, &'static str) {
        match self {
            Self::Read => (opcode::Readv::CODE, "readv"),
            Self::Write => (opcode::Writev::CODE, "writev"),
            Self::Sync => (opcode::Fsync::CODE, "fsync"),
            Self::Punch => (opcode::Fallocate::CODE, "fallocate"),
        }
    }
}

/// A ring and the operations given to it. `T` tells its owner which is which.
///
/// Dropping it waits until the kernel is done with all memory that it was given.
pub struct Ring<T: Copy> {
    uring: IoUring,
    event: Option<File>,
    operations: Slab<Operation<T>>,
    /// Not yet in the submission queue.
    backlog: VecDeque<usize>,
    /// In the submission queue or the kernel.
    submitted: usize,
}

impl<T: Copy> std::fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("submitted", &self.submitted).finish_non_exhaustive()
    }
}

impl<T: Copy> Ring<T> {
    /// A ring with at most `entries` operations in the submission queue at once.
    pub fn new(entries: u32, needs: &[Need]) -> Result<Self, RingError> {
        let unavailable = |source| RingError::Unavailable { source };
        let uring =
            restricted(entries, needs).or_else(|_| IoUring::new(entries)).map_err(unavailable)?;
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe).map_err(unavailable)?;
        for (code, name) in needs.iter().map(|need| need.operation()) {
            if !probe.is_supported(code) {
                return Err(RingError::Missing(name));
            }
        }
        let (operations, backlog) = (Slab::default(), VecDeque::new());
        Ok(Self { uring, event: None, operations, backlog, submitted: 0 })
    }

    /// The same with a descriptor that tells of ends: see [`Ring::event_fd`].
    pub fn with_event(mut self) -> Result<Self, RingError> {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(RingError::Event(io::Error::last_os_error()));
        }
        // SAFETY: just made, and nobody else's.
        let event = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        self.uring.submitter().register_eventfd(fd).map_err(RingError::Event)?;
        self.event = Some(event);
        Ok(self)
    }

    /// Readable when operations ended, if the ring was made with it.
    pub fn event_fd(&self) -> Option<RawFd> {
        self.event.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// How many operations are not at their end.
    pub fn len(&self) -> usize {
        self.operations.len()
    }

    /// Whether all have ended.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes an operation on.
    ///
    /// # Safety
    ///
    /// Until the operation has ended or this ring is dropped or [abandoned](Ring::abandon), each of
    /// which waits for the kernel: its memory that is not its own must stay in place, and be writable and
    /// without Rust references to it where it is read into; its file must stay open.
    pub unsafe fn push(&mut self, operation: Operation<T>) {
        let index = self.operations.insert(operation);
        self.backlog.push_back(index);
    }

    /// Gives the kernel as much as it takes. A busy kernel takes the rest later.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// The same, and waits until `want` operations have come back, less if the kernel is busy.
    fn enter(&mut self, want: usize) -> io::Result<()> {
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
        // Not for more than can come.
        match self.uring.submit_and_wait(want.min(self.submitted)) {
            Ok(_) => Ok(()),
            Err(e) if is_busy(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// The next operation that ended, if one has.
    pub fn reap(&mut self) -> Option<(T, io::Result<()>)> {
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
    pub fn clear_event(&mut self) {
        if let Some(event) = &mut self.event {
            // An empty counter means that it was forgotten before.
            let _ = event.read(&mut [0; 8]);
        }
    }

    /// Waits until an operation ends, or until `deadline`; says which.
    pub fn wait(&mut self, deadline: Instant) -> io::Result<bool> {
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
        let fd = self.event_fd().unwrap_or(self.uring.as_raw_fd());
        // SAFETY: the descriptor is open for as long as this ring, hence during this call.
        let event = unsafe { BorrowedFd::borrow_raw(fd) };
        match poll(&mut [PollFd::new(event, PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.clear_event();
        Ok(true)
    }

    /// Carries out all that was pushed, and calls `ended` with each operation and its result.
    pub(crate) fn finish(&mut self, mut ended: impl FnMut(T, io::Result<()>)) -> io::Result<()> {
        while !self.is_empty() {
            self.enter(self.len())?;
            while let Some((token, result)) = self.reap() {
                ended(token, result);
            }
        }
        Ok(())
    }

    /// Drops what the kernel has not got and waits, however long, for what it has; then it writes
    /// nobody's memory any more. Tells `ended` of each operation that the kernel finished.
    pub fn abandon(&mut self, mut ended: impl FnMut(T, io::Result<()>)) {
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

impl<T: Copy> Drop for Ring<T> {
    fn drop(&mut self) {
        self.abandon(|_, _| {});
    }
}

/// A ring that carries out only what it is wanted for.
///
/// A sandbox that filters system calls does not see what a ring is given: without this, whoever holds
/// one could open files and connect sockets by it. Since Linux 5.10.
fn restricted(entries: u32, needs: &[Need]) -> io::Result<IoUring> {
    // Of linux/io_uring.h.
    const REGISTER_EVENTFD: u8 = 4;
    const REGISTER_PROBE: u8 = 8;
    let uring = IoUring::builder().setup_r_disabled().build(entries)?;
    let mut allowed: Vec<Restriction> =
        needs.iter().map(|need| Restriction::sqe_op(need.operation().0)).collect();
    allowed.extend([REGISTER_EVENTFD, REGISTER_PROBE].map(Restriction::register_op));
    uring.submitter().register_restrictions(&mut allowed)?;
    uring.submitter().register_enable_rings()?;
    Ok(uring)
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;
    use crate::operation::{Action, FileEnd};

    const ENTRIES: u32 = 64;
    pub(crate) const TOKEN: u32 = 3;

    fn ring() -> Ring<u32> {
        Ring::new(ENTRIES, &[Need::Read, Need::Write, Need::Sync, Need::Punch]).unwrap()
    }

    pub(crate) fn pieces(buffer: &mut [u8], cuts: &[usize]) -> Vec<libc::iovec> {
        let mut at = buffer.as_mut_ptr();
        let lens = cuts.iter().copied();
        lens.map(|iov_len| {
            let piece = libc::iovec { iov_base: at.cast(), iov_len };
            at = at.wrapping_add(iov_len);
            piece
        })
        .collect()
    }

    fn run(ring: &mut Ring<u32>, operation: Operation<u32>) -> io::Result<()> {
        // SAFETY: files and memory of these tests stay until this has returned.
        unsafe { ring.push(operation) };
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some((token, result)) = ring.reap() {
                assert_eq!(token, TOKEN);
                assert!(ring.is_empty());
                return result;
            }
            assert!(ring.wait(deadline).unwrap());
        }
    }

    #[test]
    fn reads_past_the_end_give_zeros_or_fail() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100]).unwrap();
        let fd = file.as_raw_fd();
        for mut ring in [ring(), ring().with_event().unwrap()] {
            for (offset, data) in [(0, 100), (90, 10), (100, 0), (5000, 0)] {
                let mut buffer = [1; 200];
                let read = |end| Action::Read { offset, end };
                let cuts = pieces(&mut buffer, &[50, 3, 147]);
                run(&mut ring, Operation::on(TOKEN, fd, read(FileEnd::Zeros), cuts)).unwrap();
                assert_eq!(buffer[..data], [7; 100][..data]);
                assert_eq!(buffer[data..], [0; 200][data..]);
                let whole = pieces(&mut buffer, &[200])[0];
                let read = Operation::on_one(TOKEN, fd, read(FileEnd::Fails), whole);
                let cut_off = run(&mut ring, read).unwrap_err();
                assert_eq!(cut_off.kind(), io::ErrorKind::UnexpectedEof);
            }
        }
    }

    #[test]
    fn failures_are_told_and_space_that_stays_is_none() {
        let read_only = File::open("/dev/null").unwrap();
        let fd = read_only.as_raw_fd();
        let mut ring = ring();
        let write = Operation::write_owned(TOKEN, fd, 0, Box::new([1; 10]));
        assert_eq!(run(&mut ring, write).unwrap_err().raw_os_error(), Some(libc::EBADF));
        let punch = Operation::plain(TOKEN, fd, Action::Punch { offset: 0, len: 4096 });
        run(&mut ring, punch).unwrap();
    }

    /// A ring does what it was made for and nothing else, so that it is no way around a sandbox.
    #[test]
    fn a_ring_cannot_be_used_for_anything_else() {
        let Ok(mut uring) = restricted(8, &[Need::Read]) else {
            return println!("skipped: this kernel cannot restrict a ring");
        };
        let nothing = std::ffi::CString::new("/dev/null").unwrap();
        let entries = [
            opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), nothing.as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
        ];
        for entry in entries {
            // SAFETY: the path lives until the completion has been seen.
            unsafe { uring.submission().push(&entry).unwrap() };
            uring.submit_and_wait(1).unwrap();
            let result = uring.completion().next().unwrap().result();
            assert_eq!(result, -libc::EACCES);
        }
        let again = uring.submitter().register_restrictions(&mut [Restriction::sqe_op(0)]);
        assert!(again.is_err());
    }

    #[test]
    fn more_operations_than_the_ring_holds() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = ring();
        let count = 5 * ENTRIES as usize;
        for n in 0..count {
            let bytes = Box::new((n as u32).to_le_bytes());
            let write = Operation::write_owned(TOKEN, file.as_raw_fd(), 4 * n as u64, bytes);
            // SAFETY: the file stays open, and the memory is the operation's own.
            unsafe { ring.push(write) };
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
