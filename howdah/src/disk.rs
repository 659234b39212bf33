//! A VM's disk as one raw image.

use std::{io, path::Path};

use guest_images::overlay::{Overlay, OverlayError};

use crate::failure::{Exit, Failure};

/// Writes the disk to a new file, with holes where it is zero.
pub(crate) fn export(overlay: &Overlay, to: &Path) -> Result<(), Failure> {
    overlay.export(to).map_err(|error| match error {
        OverlayError::Io { path, source, .. } if path == to => match source.kind() {
            io::ErrorKind::AlreadyExists => {
                Failure::new(Exit::Failed, to.display(), "it exists", "name a file that does not")
            }
            _ => Failure::file("write", to, &source),
        },
        error => Failure::plain(Exit::Corrupt, "disk", error),
    })
}
