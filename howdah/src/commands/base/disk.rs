//! Disks as they are given to `howdah base import`: made raw, and looked into for what boots them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
};

use guest_images::{
    Part,
    image::{
        Raw,
        boot::{self, BootError},
        qcow2::{self, Qcow2, Qcow2Error},
    },
    store::Progress,
};

use super::{Staging, with_bar};
use crate::{
    failure::{Exit, Failure},
    output::Output,
};

/// What boots a disk, as files in a staging directory.
pub(super) struct Found {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: Option<PathBuf>,
    pub(super) cmdline: String,
    /// Where that was found, for people.
    pub(super) found: String,
}

/// The disk as a raw image: the file itself, or what is in it if it is qcow2.
pub(super) fn raw(given: &Path, staging: &Staging, output: Output) -> Result<PathBuf, Failure> {
    // Whatever else it is, or is not there, an import says with more knowledge. A pipe is not opened.
    if !fs::metadata(given).is_ok_and(|meta| meta.is_file()) {
        return Ok(given.to_owned());
    }
    let opening = |e: io::Error| Failure::file("open", given, &e);
    let mut file = File::open(given).map_err(opening)?;
    let mut magic = [0; qcow2::MAGIC.len()];
    match file.read_exact(&mut magic) {
        Err(error) if error.kind() != ErrorKind::UnexpectedEof => return Err(opening(error)),
        _ if magic != *qcow2::MAGIC => return Ok(given.to_owned()),
        _ => {}
    }
    let told = |error: Qcow2Error| match &error {
        Qcow2Error::Io(why) if why.kind() == ErrorKind::UnexpectedEof => {
            let why = "it is cut short: fetch it again, or `qemu-img check` it";
            Failure::plain(Exit::Corrupt, given.display(), why)
        }
        Qcow2Error::Io(why) => Failure::file("convert", given, why),
        _ => Failure::plain(Exit::Corrupt, given.display(), error),
    };
    let image = Raw::new(file).map_err(Qcow2Error::Io).and_then(Qcow2::open).map_err(told)?;
    let path = staging.0.join(Part::Disk.file_name());
    let mut options = OpenOptions::new();
    let to = options.read(true).write(true).create_new(true).open(&path);
    let to = to.map_err(|e| Failure::file("create", &path, &e))?;
    with_bar(output, "converting", |progress| {
        let total_bytes = image.disk_bytes();
        let done = image.write_raw(&to, &mut |done_bytes| {
            progress(Progress { part: Part::Disk, done_bytes, total_bytes });
        });
        done.map_err(told)
    })?;
    Ok(path)
}

/// Kernel, initramfs and command line as the disk's own boot loader has them. `given` is what its user calls it.
pub(super) fn boot(given: &Path, disk: &Path, staging: &Staging) -> Result<Found, Failure> {
    let opening = |e: io::Error| Failure::file("open", given, &e);
    if fs::metadata(disk).map_err(opening)?.is_dir() {
        let way_out = "give a disk image";
        return Err(Failure::new(Exit::Usage, given.display(), "it is a directory", way_out));
    }
    if !fs::metadata(disk).map_err(opening)?.is_file() {
        let way_out = "copy it to a file first";
        return Err(Failure::new(Exit::Usage, given.display(), "it is no regular file", way_out));
    }
    let file = File::open(disk).map_err(opening)?;
    let found = boot::find(&file).map_err(|error| match error {
        BootError::Io(why) => Failure::file("read", given, &why),
        error => Failure::plain(Exit::Corrupt, given.display(), error),
    })?;
    let put = |part: Part, bytes: &[u8]| {
        let path = staging.0.join(part.file_name());
        fs::write(&path, bytes).map_err(|e| Failure::file("write", &path, &e)).map(|()| path)
    };
    Ok(Found {
        kernel: put(Part::Kernel, &found.kernel)?,
        initramfs: found.initramfs.map(|bytes| put(Part::Initramfs, &bytes)).transpose()?,
        cmdline: found.cmdline,
        found: found.found,
    })
}
