//! What the kernel is asked to do, and what becomes of its answer.

use std::{io, os::fd::RawFd};

use io_uring::{opcode, squeue, types};

/// What it means that a file ends before a read does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileEnd {
    /// Zeros follow.
    Zeros,
    /// The read fails.
    Fails,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read.
    Read {
        /// Where from.
        offset: u64,
        /// What if the file ends early.
        end: FileEnd,
    },
    /// Write.
    Write {
        /// Where to.
        offset: u64,
    },
    /// `fdatasync`.
    Sync,
    /// Give space back; a file system that cannot is no failure.
    Punch {
        /// Where it begins.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
}

/// An operation and the memory it works on. `T` says whose it is.
pub struct Operation<T> {
    pub(crate) token: T,
    file: RawFd,
    action: Action,
    pieces: Pieces,
    /// Memory that `pieces` points into, if it is the operation's own.
    _owned: Option<Box<[u8]>>,
    left: u64,
}

// SAFETY: the pointers in `pieces` are only followed by the kernel and, where a file ended early, by
// the thread that owns the ring. Whoever gave the operation to the ring has vouched that the memory
// stays where it is, and none of it is bound to a thread.
unsafe impl<T: Send> Send for Operation<T> {}

/// Pieces of memory. Most operations have one, and need not be allocated for.
enum Pieces {
    One(libc::iovec),
    Many(Vec<libc::iovec>),
}

impl Pieces {
    fn as_slice(&self) -> &[libc::iovec] {
        match self {
            Self::One(piece) => std::slice::from_ref(piece),
            Self::Many(pieces) => pieces,
        }
    }

    /// Drops the first `done` bytes.
    fn skip(&mut self, mut done: u64) {
        let whole = self.as_slice().iter().take_while(|piece| {
            let len = piece.iov_len as u64;
            let past = done >= len;
            done -= if past { len } else { 0 };
            past
        });
        let whole = whole.count();
        let first = match self {
            Self::Many(pieces) => {
                pieces.drain(..whole);
                pieces.first_mut()
            }
            Self::One(piece) => {
                if whole == 1 {
                    piece.iov_len = 0;
                }
                Some(piece).filter(|_| whole == 0)
            }
        };
        if let Some(first) = first {
            // `done` is less than this piece's length here.
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done as usize).cast();
            first.iov_len -= done as usize;
        }
    }
}

impl<T: Copy> Operation<T> {
    /// An operation on memory of others; on what terms, [`Ring::push`](crate::Ring::push) says.
    /// There are at most `IOV_MAX` pieces.
    pub fn on(token: T, file: RawFd, action: Action, pieces: Vec<libc::iovec>) -> Self {
        Self::with(token, file, action, Pieces::Many(pieces))
    }

    /// The same with one piece.
    pub fn on_one(token: T, file: RawFd, action: Action, piece: libc::iovec) -> Self {
        Self::with(token, file, action, Pieces::One(piece))
    }

    fn with(token: T, file: RawFd, action: Action, pieces: Pieces) -> Self {
        let left = pieces.as_slice().iter().map(|v| v.iov_len as u64).sum();
        Self { token, file, action, pieces, _owned: None, left }
    }

    /// A write of bytes that the operation owns.
    pub fn write_owned(token: T, file: RawFd, offset: u64, bytes: Box<[u8]>) -> Self {
        let mut owned = bytes;
        let piece = libc::iovec { iov_base: owned.as_mut_ptr().cast(), iov_len: owned.len() };
        let operation = Self::with(token, file, Action::Write { offset }, Pieces::One(piece));
        Self { _owned: Some(owned), ..operation }
    }

    /// An operation without memory.
    pub fn plain(token: T, file: RawFd, action: Action) -> Self {
        Self::with(token, file, action, Pieces::Many(Vec::new()))
    }

    pub(crate) fn entry(&self, index: usize) -> squeue::Entry {
        let file = types::Fd(self.file);
        // At most IOV_MAX, hence below u32.
        let (iovecs, count) =
            (self.pieces.as_slice().as_ptr(), self.pieces.as_slice().len() as u32);
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
    pub(crate) fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
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
        self.pieces.skip(done);
        match self.action {
            _ if self.left == 0 => Some(Ok(())),
            _ if done > 0 => None,
            Action::Read { end: FileEnd::Zeros, .. } => {
                self.zero_rest();
                Some(Ok(()))
            }
            Action::Read { .. } => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            _ => Some(Err(io::ErrorKind::WriteZero.into())),
        }
    }

    /// Fills what is left with zeros.
    fn zero_rest(&mut self) {
        for piece in self.pieces.as_slice() {
            // SAFETY: each piece is memory to be read into, so writable, and in place until the
            // operation has ended (`Ring::push`). The kernel is done with it. Where it is a guest's
            // RAM there are no Rust references into it, so the guest writing at the same time is
            // not aliasing.
            unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::tests::{TOKEN, pieces};

    #[test]
    fn what_is_cut_short_goes_on() {
        let mut buffer = [0; 10];
        let iovecs = pieces(&mut buffer, &[4, 4, 2]);
        let start = iovecs[0].iov_base as usize;
        let action = Action::Write { offset: 100 };
        let mut operation = Operation::on(TOKEN, 0, action, iovecs);
        assert!(operation.advance(-libc::EAGAIN).is_none());
        assert!(operation.advance(5).is_none());
        assert_eq!(operation.action, Action::Write { offset: 105 });
        let left: Vec<_> = operation
            .pieces
            .as_slice()
            .iter()
            .map(|v| (v.iov_base as usize - start, v.iov_len))
            .collect();
        assert_eq!(left, [(5, 3), (8, 2)]);
        assert!(operation.advance(3).is_none());
        assert!(operation.advance(2).unwrap().is_ok());
        let mut stalled = Operation::write_owned(TOKEN, 0, 0, Box::new([1; 10]));
        assert!(stalled.advance(4).is_none());
        let left = stalled.pieces.as_slice();
        assert_eq!((left.len(), left[0].iov_len), (1, 6));
        assert_eq!(stalled.advance(0).unwrap().unwrap_err().kind(), io::ErrorKind::WriteZero);
    }
}
