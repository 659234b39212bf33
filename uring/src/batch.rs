//! Reads and writes that are carried out together while their owner waits.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd},
};

use crate::{
    operation::{Action, FileEnd, Operation},
    ring::{Need, Ring, RingError},
};

/// Reads and writes to be carried out together, in any order, by [`Batches::run`]. Borrows files and
/// memory until then. They are numbered as they were added, from 0.
#[derive(Default)]
pub struct Batch<'m> {
    operations: Vec<Operation<usize>>,
    borrowed: PhantomData<(&'m mut [u8], BorrowedFd<'m>)>,
}

impl<'m> Batch<'m> {
    /// Room for so many, to be allocated once.
    pub fn with_capacity(operations: usize) -> Self {
        Self { operations: Vec::with_capacity(operations), borrowed: PhantomData }
    }

    /// Adds a read that fills `into`.
    pub fn read(&mut self, file: BorrowedFd<'m>, offset: u64, into: &'m mut [u8], end: FileEnd) {
        let piece = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        let (token, file) = (self.operations.len(), file.as_raw_fd());
        self.operations.push(Operation::on_one(token, file, Action::Read { offset, end }, piece));
    }

    /// Adds a write of pieces, one after the other; at most `IOV_MAX` of them.
    pub fn write(
        &mut self,
        file: BorrowedFd<'m>,
        offset: u64,
        from: impl IntoIterator<Item = &'m [u8]>,
    ) {
        // The kernel only reads what it is to write: no piece is changed through these pointers.
        let piece = |bytes: &'m [u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let pieces = from.into_iter().map(piece).collect();
        let (token, file) = (self.operations.len(), file.as_raw_fd());
        self.operations.push(Operation::on(token, file, Action::Write { offset }, pieces));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.operations.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }
}

/// Carries out batches, one after the other.
#[derive(Debug)]
pub struct Batches {
    /// Empty between batches.
    ring: Ring<usize>,
}

impl Batches {
    /// Has a ring made that takes `entries` operations at once. A batch may have more.
    pub fn new(entries: u32) -> Result<Self, RingError> {
        Ok(Self { ring: Ring::new(entries, &[Need::Read, Need::Write])? })
    }

    /// Carries out all of a batch, and calls `ended` with the number and the result of each.
    ///
    /// An error is one of the ring, after which any may have been carried out or not, and the ring is
    /// of no more use.
    pub fn run(
        &mut self,
        batch: Batch<'_>,
        ended: impl FnMut(usize, io::Result<()>),
    ) -> io::Result<()> {
        // Before the kernel gets anything, so that whatever happens from here on, be it a panic in
        // `ended`, it is done with the batch's memory when this function is left.
        let waits = WaitsForAll(&mut self.ring);
        for operation in batch.operations {
            // SAFETY: files and memory are borrowed for as long as `batch` was, hence until this
            // function returns, reads' exclusively. `waits` cannot be leaked: it is not given away,
            // and its drop abandons the ring, which waits for the kernel.
            unsafe { waits.0.push(operation) };
        }
        waits.0.finish(ended)
    }
}

/// Leaves the kernel nothing to do.
struct WaitsForAll<'a>(&'a mut Ring<usize>);

impl Drop for WaitsForAll<'_> {
    fn drop(&mut self) {
        self.0.abandon(|_, _| {});
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::{fd::AsFd, unix::fs::FileExt},
        panic::{AssertUnwindSafe, catch_unwind},
    };

    use proptest::prelude::*;

    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever is asked, in whatever number: the same bytes as by reading and writing one
        /// after the other, and an error for those alone that reach beyond the file's end.
        #[test]
        fn like_one_after_the_other(
            writes in prop::collection::vec((0u64..300, 0usize..90), 0..40),
            reads in prop::collection::vec((0u64..40_000, 0usize..9000, any::<bool>()), 0..40),
            entries in prop_oneof![Just(1u32), Just(4), Just(64)],
        ) {
            let (file, plain) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            let bytes = noise(1000);
            let mut batches = Batches::new(entries).unwrap();
            // Each in its own place: the order is nobody's promise.
            let mut batch = Batch::default();
            for (n, (at, len)) in writes.iter().enumerate() {
                let (offset, from) = (n as u64 * 500 + at, &bytes[n..n + len]);
                batch.write(file.as_fd(), offset, from.chunks(7));
                plain.write_all_at(from, offset).unwrap();
            }
            let mut ended = vec![0; writes.len()];
            batches.run(batch, |n, result| {
                result.unwrap();
                ended[n] += 1;
            }).unwrap();
            prop_assert!(ended.iter().all(|times| *times == 1));

            let mut found: Vec<_> = reads.iter().map(|(_, len, _)| vec![1; *len]).collect();
            let mut batch = Batch::with_capacity(reads.len());
            for (into, (at, _, zeros)) in found.iter_mut().zip(&reads) {
                let end = if *zeros { FileEnd::Zeros } else { FileEnd::Fails };
                batch.read(file.as_fd(), *at, into, end);
            }
            let mut results: Vec<_> = reads.iter().map(|_| None).collect();
            batches.run(batch, |n, result| results[n] = Some(result)).unwrap();
            for ((found, (at, len, zeros)), result) in found.iter().zip(&reads).zip(results) {
                let mut expected = vec![0; *len];
                let whole = plain.read_exact_at(&mut expected, *at);
                let result = result.unwrap();
                prop_assert_eq!(result.is_ok(), whole.is_ok() || *zeros);
                if let Err(error) = result {
                    prop_assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                } else {
                    expected.fill(0);
                    let mut at_end = 0;
                    while let Ok(n @ 1..) = plain.read_at(&mut expected[at_end..], *at + at_end as u64) {
                        at_end += n;
                    }
                    prop_assert!(*found == expected);
                }
            }
        }
    }

    #[test]
    fn a_panic_leaves_the_kernel_nothing_to_write() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&noise(1 << 20), 0).unwrap();
        let mut batches = Batches::new(8).unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let mut memory = vec![0; 1 << 20];
            let mut batch = Batch::default();
            for (n, into) in memory.chunks_mut(4096).enumerate() {
                batch.read(file.as_fd(), n as u64 * 4096, into, FileEnd::Fails);
            }
            let _ = batches.run(batch, |n, _| assert!(n < 3, "as this test wants it"));
        }));
        panicked.unwrap_err();
        assert!(batches.ring.is_empty());
        // And it is of use as before.
        let mut into = [0; 100];
        let mut batch = Batch::default();
        batch.read(file.as_fd(), 5, &mut into, FileEnd::Fails);
        batches.run(batch, |_, result| result.unwrap()).unwrap();
        assert_eq!(into[..], noise(200)[5..105]);
    }

    #[test]
    fn each_failure_is_its_own() {
        let (file, closed) =
            (tempfile::tempfile().unwrap(), std::fs::File::open("/dev/null").unwrap());
        let mut batch = Batch::default();
        batch.write(file.as_fd(), 0, [&[1u8; 10][..]]);
        batch.write(closed.as_fd(), 0, [&[1u8; 10][..]]);
        batch.write(file.as_fd(), 10, [&[2u8; 10][..], &[3; 10]]);
        let mut failed = Vec::new();
        let ended = |n, result: io::Result<()>| {
            if let Err(error) = result {
                failed.push((n, error.raw_os_error()));
            }
        };
        Batches::new(8).unwrap().run(batch, ended).unwrap();
        assert_eq!(failed, [(1, Some(libc::EBADF))]);
        let mut found = [0; 30];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!([found[9], found[10], found[29]], [1, 2, 3]);
    }
}
