//! A VM's disk as one raw image.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use guest_images::{CHUNK_SIZE, chunk::is_zero, overlay::Overlay};

use crate::failure::{Exit, Failure};

/// Writes the disk to a new file, with holes where it is zero.
pub(crate) fn export(overlay: &Overlay, to: &Path) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::file("write", to, &e);
    let file = OpenOptions::new().write(true).create_new(true).open(to).map_err(|e| {
        if e.kind() == io::ErrorKind::AlreadyExists {
            return Failure::new(
                Exit::Failed,
                to.display(),
                "it exists",
                "name a file that does not",
            );
        }
        failed(e)
    })?;
    let written = write(overlay, &file, failed);
    if written.is_err() {
        // Half an image looks like a whole one.
        let _ = std::fs::remove_file(to);
    }
    written
}

fn write(
    overlay: &Overlay,
    file: &File,
    failed: impl Fn(io::Error) -> Failure,
) -> Result<(), Failure> {
    let bytes = overlay.disk_bytes();
    file.set_len(bytes).map_err(&failed)?;
    let mut chunk = [0; CHUNK_SIZE];
    for index in 0..overlay.chunks() {
        overlay
            .read_chunk(index, &mut chunk)
            .map_err(|e| Failure::plain(Exit::Corrupt, "disk", e))?;
        if is_zero(&chunk) {
            continue;
        }
        let offset = index * CHUNK_SIZE as u64;
        let there = bytes.saturating_sub(offset).min(CHUNK_SIZE as u64) as usize;
        file.write_all_at(chunk.get(..there).unwrap_or_default(), offset).map_err(&failed)?;
    }
    file.sync_all().map_err(failed)
}
