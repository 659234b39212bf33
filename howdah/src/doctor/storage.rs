//! The file system of the home: room, rights, and what disks of VMs need of it.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::{
        statfs::{TMPFS_MAGIC, statfs},
        statvfs::statvfs,
    },
    unistd::{AccessFlags, access},
};

use super::Finding;
use crate::output::bytes;

/// Less than this takes no VM.
const LEAST_BYTES: u64 = 256 << 20;
/// Less than this takes few.
const LITTLE_BYTES: u64 = 4 << 30;
const LEAST_FILES: u64 = 1000;
/// What is written, and a hole in it.
const TRIAL_BYTES: usize = 64 << 10;

pub(super) fn look(home: &Path) -> Vec<Finding> {
    let place = nearest(home);
    let mut findings = Vec::new();
    match statvfs(&place) {
        Ok(found) => {
            let free = found.blocks_available().saturating_mul(found.fragment_size());
            findings.push(room(&place, free, found.files_available(), found.files()));
        }
        Err(errno) => findings.push(
            Finding::broken("room", format!("{}: {errno}", place.display()))
                .mended_by("choose another directory with --home"),
        ),
    }
    if statfs(&place).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC) {
        findings.push(in_memory(&place));
    }
    let may = access(&place, AccessFlags::W_OK | AccessFlags::X_OK);
    findings.push(if may.is_ok() {
        sparse(&place, try_holes(&place))
    } else {
        forbidden(home, &place)
    });
    findings
}

/// The directory itself, or the nearest above it that exists.
fn nearest(home: &Path) -> PathBuf {
    home.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn room(place: &Path, free: u64, files: u64, all_files: u64) -> Finding {
    const CHECK: &str = "room";
    const MEND: &str = "make room: `howdah base ls` and `howdah vm ls` show what is kept";
    let says = format!("{} free in {}", bytes(free), place.display());
    // File systems that make inodes as they go say that they have none.
    if all_files > 0 && files < LEAST_FILES {
        let says = format!("{says}, and {files} files can still be made");
        return Finding::broken(CHECK, says).mended_by("remove small files from that file system");
    }
    match free {
        free if free < LEAST_BYTES => Finding::broken(CHECK, says).mended_by(MEND),
        free if free < LITTLE_BYTES => Finding::warning(CHECK, says).mended_by(MEND),
        _ => Finding::ok(CHECK, says),
    }
}

fn in_memory(place: &Path) -> Finding {
    let says = format!(
        "{} is in memory: who owns a VM is forgotten when the power fails",
        place.display()
    );
    Finding::warning("durable", says).mended_by("choose a directory on a disk with --home")
}

fn forbidden(home: &Path, place: &Path) -> Finding {
    let says = format!("this user may not write in {}", place.display());
    let home = home.display();
    Finding::broken("sparse", says).mended_by(format!(
        "run as root, or: sudo install -d -o $USER -m 0700 {home} (--home chooses another)"
    ))
}

/// Writes a file that has no name, durably, and makes a hole in it, as a VM's disk does.
fn try_holes(place: &Path) -> io::Result<()> {
    let file: File = tempfile::tempfile_in(place)?;
    file.write_all_at(&vec![1; TRIAL_BYTES], 0)?;
    file.sync_data()?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.as_fd(), flags, 0, TRIAL_BYTES as i64 / 2)?;
    Ok(())
}

fn sparse(place: &Path, tried: io::Result<()>) -> Finding {
    const CHECK: &str = "sparse";
    let Err(error) = tried else {
        return Finding::ok(CHECK, "writes are durable, and holes can be made in files");
    };
    let place = place.display();
    if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) {
        let says = format!("the file system of {place} cannot make holes: disks of VMs only grow");
        return Finding::warning(CHECK, says).mended_by("put --home on ext4, XFS or btrfs");
    }
    Finding::broken(CHECK, format!("a file in {place} cannot be written: {error}"))
        .mended_by("`dmesg` says whether the disk fails; --home chooses another directory")
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn room_is_judged() {
        let free = |free| room(Path::new("/x"), free, 0, 0).verdict;
        assert_eq!(free(LEAST_BYTES - 1), Verdict::Broken);
        assert_eq!(free(LEAST_BYTES), Verdict::Warning);
        assert_eq!(free(LITTLE_BYTES), Verdict::Ok);
        assert_eq!(room(Path::new("/x"), LITTLE_BYTES, 3, 100).verdict, Verdict::Broken);
    }

    #[test]
    fn a_file_system_without_holes_is_told_from_one_that_fails() {
        let tried =
            |errno| sparse(Path::new("/x"), Err(io::Error::from_raw_os_error(errno))).verdict;
        assert_eq!(tried(nix::libc::EOPNOTSUPP), Verdict::Warning);
        assert_eq!(tried(nix::libc::EIO), Verdict::Broken);
    }

    #[test]
    fn a_home_that_is_not_yet_is_looked_for_above() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(nearest(&dir.path().join("a/b/c")), dir.path());
    }
}
