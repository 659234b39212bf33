//! Copies a directory tree into memory without giving memory to its holes, or twice to large files.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use anyhow::{Context, Result};

/// Pieces that are read, and left out when they are all zero. 9p does not tell where holes are.
const PIECE_BYTES: usize = 64 << 10;

/// Smaller files are copied even where links would do: they may be locked, or replaced.
const LINKED_BYTES: u64 = 1 << 20;

/// Copies what is below `from` to `to`. Sockets, devices and FIFOs are left out.
pub(crate) fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    walk(from, to, &copy_sparse)
}

/// The same on one file system, with large files as hard links: for files that never change.
pub(crate) fn link_tree(from: &Path, to: &Path) -> Result<()> {
    walk(from, to, &|source, target| {
        if fs::metadata(source)?.len() < LINKED_BYTES {
            return copy_sparse(source, target);
        }
        fs::hard_link(source, target)
    })
}

fn walk(from: &Path, to: &Path, bring: &dyn Fn(&Path, &Path) -> io::Result<()>) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", from.display()))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().with_context(|| format!("{}", source.display()))?;
        if kind.is_dir() {
            walk(&source, &target, bring)?;
        } else if kind.is_symlink() {
            fs::read_link(&source)
                .and_then(|link| std::os::unix::fs::symlink(link, &target))
                .with_context(|| format!("cannot copy the link {}", source.display()))?;
        } else if kind.is_file() {
            bring(&source, &target).with_context(|| format!("cannot copy {}", source.display()))?;
        }
    }
    Ok(())
}

/// Copies a file, leaving out pieces that are all zero.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    let mut target = File::create(to)?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = source.read(&mut piece)?;
        if count == 0 {
            break;
        }
        if piece[..count].iter().all(|byte| *byte == 0) {
            target.seek(SeekFrom::Current(count as i64))?;
        } else {
            target.write_all(&piece[..count])?;
        }
    }
    let end = target.stream_position()?;
    target.set_len(end)?;
    let mode = source.metadata()?.permissions().mode();
    target.set_permissions(fs::Permissions::from_mode(mode & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn trees_come_over_whole_and_holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        let mut content = vec![0; 4 << 20];
        content[3 << 20] = 7;
        fs::write(from.join("a/b/sparse"), &content).unwrap();
        fs::write(from.join("run"), b"#!/bin/sh\n").unwrap();
        fs::set_permissions(from.join("run"), fs::Permissions::from_mode(0o750)).unwrap();
        std::os::unix::fs::symlink("a/b", from.join("link")).unwrap();
        copy_tree(&from, &to).unwrap();
        assert_eq!(fs::read(to.join("a/b/sparse")).unwrap(), content);
        assert!(fs::metadata(to.join("a/b/sparse")).unwrap().blocks() * 512 < 1 << 20);
        assert_eq!(fs::metadata(to.join("run")).unwrap().mode() & 0o777, 0o750);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("a/b"));
        let linked = dir.path().join("linked");
        link_tree(&from, &linked).unwrap();
        let same = |name: &str| {
            let inode = |root: &Path| fs::metadata(root.join(name)).unwrap().ino();
            inode(&from) == inode(&linked)
        };
        assert!(same("a/b/sparse") && !same("run"));
    }
}
