//! Pieces of guest RAM that a descriptor chain names.

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions, bitmap::Bitmap};

use crate::memory::GuestRam;

/// Bytes of a page: the unit in which the host takes memory back.
const PAGE_BYTES: u64 = guest_images::CHUNK_SIZE as u64;

/// One piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it begins.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
}

/// Pieces of guest RAM that together hold one run of bytes.
///
/// All of it lay in RAM when the chain was read, and RAM never shrinks; accesses are checked all the
/// same. Writes mark their pages dirty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    pieces: Vec<Buffer>,
    len: u64,
}

impl Buffers {
    /// Adds a piece at the end.
    pub(crate) fn push(&mut self, buffer: Buffer) {
        if buffer.len > 0 {
            self.len += u64::from(buffer.len);
            self.pieces.push(buffer);
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes from `offset` on, at most `len` of them.
    pub fn slice(&self, offset: u64, len: u64) -> Buffers {
        let mut out = Buffers::default();
        let (mut skip, mut left) = (offset, len);
        for piece in &self.pieces {
            let piece_len = u64::from(piece.len);
            if skip >= piece_len {
                skip -= piece_len;
                continue;
            }
            let take = (piece_len - skip).min(left);
            // Cannot wrap: the piece lies in RAM, and `skip` is inside it.
            let address = GuestAddress(piece.address.0.wrapping_add(skip));
            out.push(Buffer { address, len: take as u32 });
            skip = 0;
            left -= take;
            if left == 0 {
                break;
            }
        }
        out
    }

    /// The pages that lie wholly inside single pieces, as ranges of guest-physical addresses. Pieces
    /// may overlap, and so may these.
    pub fn whole_pages(&self) -> impl Iterator<Item = std::ops::Range<u64>> {
        self.pieces.iter().filter_map(|piece| {
            // The piece lies in RAM, far from the end of the address space.
            let start = piece.address.0.checked_next_multiple_of(PAGE_BYTES)?;
            let end = piece.address.0.checked_add(piece.len.into())? / PAGE_BYTES * PAGE_BYTES;
            (start < end).then_some(start..end)
        })
    }

    /// Copies as many bytes as both sides have from `offset` on; returns how many.
    pub fn read_at(
        &self,
        ram: &GuestRam,
        offset: u64,
        into: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for piece in self.slice(offset, into.len() as u64).pieces {
            let end = done + piece.len as usize;
            ram.read_slice(&mut into[done..end], piece.address)?;
            done = end;
        }
        Ok(done)
    }

    /// Copies as many bytes as both sides have to `offset` on; returns how many.
    pub fn write_at(
        &self,
        ram: &GuestRam,
        offset: u64,
        from: &[u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for piece in self.slice(offset, from.len() as u64).pieces {
            let end = done + piece.len as usize;
            ram.write_slice(&from[done..end], piece.address)?;
            done = end;
        }
        Ok(done)
    }

    /// Fills everything with zeros.
    pub fn fill_zero(&self, ram: &GuestRam) -> Result<(), GuestMemoryError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut offset = 0;
        while offset < self.len {
            let step = (self.len - offset).min(ZEROS.len() as u64);
            self.write_at(ram, offset, &ZEROS[..step as usize])?;
            offset += step;
        }
        Ok(())
    }

    /// Host addresses, for the kernel to read or write.
    ///
    /// What the kernel writes there is not tracked: [`Buffers::mark_dirty`] once it is written.
    pub fn iovecs(&self, ram: &GuestRam) -> Result<Vec<libc::iovec>, GuestMemoryError> {
        let mut out = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let slices =
                ram.get_slices(piece.address, piece.len as usize, Permissions::ReadWrite)?;
            for slice in slices {
                let slice = slice?;
                out.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(out)
    }

    /// Marks every page that these bytes touch.
    pub fn mark_dirty(&self, ram: &GuestRam) -> Result<(), GuestMemoryError> {
        for piece in &self.pieces {
            let slices =
                ram.get_slices(piece.address, piece.len as usize, Permissions::ReadWrite)?;
            for slice in slices {
                let slice = slice?;
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
        Ok(())
    }
}

/// The guest's memory failed where it was there before: for callers whose errors are I/O errors.
pub fn memory_to_io(error: GuestMemoryError) -> io::Error {
    io::Error::other(error)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryBackend;

    use super::*;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)]).unwrap()
    }

    fn buffers(pieces: &[(u64, u32)]) -> Buffers {
        let mut out = Buffers::default();
        for &(address, len) in pieces {
            out.push(Buffer { address: GuestAddress(address), len });
        }
        out
    }

    #[test]
    fn slices() {
        let all = buffers(&[(0x1000, 10), (0x2000, 0), (0x3000, 20)]);
        assert_eq!(all.len(), 30);
        assert_eq!(all.slice(0, 30), buffers(&[(0x1000, 10), (0x3000, 20)]));
        assert_eq!(all.slice(5, 10), buffers(&[(0x1005, 5), (0x3000, 5)]));
        assert_eq!(all.slice(10, 100), buffers(&[(0x3000, 20)]));
        assert!(all.slice(30, 1).is_empty());
        assert!(all.slice(u64::MAX, u64::MAX).is_empty());
        assert!(all.slice(3, 0).is_empty());
    }

    #[test]
    fn whole_pages_lie_inside() {
        let pages = buffers(&[(0x1000, 0x2000), (0xfff, 0x1001), (0x1001, 0x1fff), (0x1001, 5)]);
        let pages: Vec<_> = pages.whole_pages().collect();
        assert_eq!(pages, [0x1000..0x3000, 0x1000..0x2000, 0x2000..0x3000]);
        assert_eq!(buffers(&[(0x1fff, 2), (0x1001, 0xfff)]).whole_pages().count(), 0);
    }

    #[test]
    fn copies_across_pieces_and_regions_and_marks() {
        let ram = ram();
        let all = buffers(&[(0x1ffe, 4), (0x7fff, 2)]);
        assert_eq!(all.write_at(&ram, 1, &[1, 2, 3, 4, 5, 6, 7]).unwrap(), 5);
        let mut back = [9; 8];
        assert_eq!(all.read_at(&ram, 0, &mut back).unwrap(), 6);
        assert_eq!(back, [0, 1, 2, 3, 4, 5, 9, 9]);
        let dirty = |page: usize| {
            let region = ram.iter().nth(page / 8).unwrap();
            region.get_mmap().bitmap().dirty_at(page % 8 * 4096)
        };
        let set: Vec<usize> = (0..16).filter(|p| dirty(*p)).collect();
        assert_eq!(set, [1, 2, 7, 8]);
        assert_eq!(all.iovecs(&ram).unwrap().len(), 3);
        all.fill_zero(&ram).unwrap();
        all.read_at(&ram, 0, &mut back).unwrap();
        assert_eq!(back[..6], [0; 6]);
    }

    #[test]
    fn marks_what_the_kernel_wrote() {
        let ram = ram();
        buffers(&[(0x2fff, 2)]).mark_dirty(&ram).unwrap();
        let region = ram.iter().next().unwrap();
        assert!(!region.get_mmap().bitmap().dirty_at(0x1000));
        assert!(region.get_mmap().bitmap().dirty_at(0x2000));
        assert!(region.get_mmap().bitmap().dirty_at(0x3000));
    }
}
