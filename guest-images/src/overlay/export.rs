//! The disk as one raw image: the base's disk with what the overlay holds on top.

use std::{
    fs::{self, File, OpenOptions},
    path::Path,
};

use super::{CHUNK_BYTES, ChunkState, Overlay, OverlayError, open::io_error};
use crate::files;

/// Bytes that are read and written as one.
const PIECE_BYTES: u64 = 1 << 20;

impl Overlay {
    /// Writes the disk to a new file, with holes where it is zero, and makes it durable. Takes as
    /// long as the disk is full, not as it is large. A file that exists is left alone; one that
    /// could not be finished is removed.
    ///
    /// Whoever writes to the disk meanwhile makes the image a mixture.
    pub fn export(&self, to: &Path) -> Result<(), OverlayError> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(to)
            .map_err(io_error("creating", to))?;
        let written = self.write_image(&file, to);
        if written.is_err() {
            // Half an image looks like a whole one.
            let _ = fs::remove_file(to);
        }
        written
    }

    /// Writes the disk to an empty file, as [`Overlay::export`] does; `to` names it in errors.
    pub fn write_image(&self, file: &File, to: &Path) -> Result<(), OverlayError> {
        file.set_len(self.disk_bytes).map_err(io_error("writing", to))?;
        let mut chunk = 0;
        while chunk < self.chunks() {
            let (state, run) = self.state_run(chunk, u64::MAX);
            let holder = match state {
                ChunkState::Base => Some(self.base.disk_file()),
                ChunkState::Data => Some(&self.data),
                ChunkState::Zero => None,
            };
            let (mut at, end) =
                (chunk * CHUNK_BYTES, ((chunk + run) * CHUNK_BYTES).min(self.disk_bytes));
            while let Some((start, stop)) =
                holder.and_then(|file| files::data_extent(file, at, end))
            {
                self.write_extent(start, stop, file, to)?;
                at = stop;
            }
            chunk += run;
        }
        file.sync_all().map_err(io_error("syncing", to))
    }

    /// Writes what is not zero of a byte range.
    fn write_extent(
        &self,
        start: u64,
        end: u64,
        file: &File,
        to: &Path,
    ) -> Result<(), OverlayError> {
        let mut piece = vec![0; PIECE_BYTES.min(end - start) as usize];
        let mut at = start;
        while at < end {
            let len = PIECE_BYTES.min(end - at) as usize;
            let piece = piece.get_mut(..len).unwrap_or_default();
            self.read_at(at, piece)?;
            files::write_sparse(file, at, piece).map_err(io_error("writing", to))?;
            at += len as u64;
        }
        Ok(())
    }
}
