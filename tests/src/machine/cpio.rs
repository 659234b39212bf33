//! Writes the `newc` cpio format that the kernel unpacks as its first root file system.
//!
//! Owners and device nodes are only fields of the archive, so no privilege is needed to make one.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::{Component, Path},
};

/// Header, name and data each begin at a multiple of this.
const ALIGN: u64 = 4;

/// `newc` fields are eight hexadecimal digits.
const MAX_FILE_BYTES: u64 = u32::MAX as u64;

/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// An archive under construction. Parents of an entry are added where they are missing; an entry
/// added twice keeps its first content.
pub(crate) struct CpioWriter<W: Write> {
    out: W,
    written_bytes: u64,
    next_inode: u32,
    names: BTreeSet<String>,
}

/// The fields of one entry's header that differ between entries.
struct Entry<'a> {
    name: &'a str,
    mode: u32,
    size: u32,
    device: (u32, u32),
}

impl<W: Write> CpioWriter<W> {
    /// An empty archive written to `out`.
    pub(crate) fn new(out: W) -> Self {
        Self { out, written_bytes: 0, next_inode: 1, names: BTreeSet::new() }
    }

    /// A directory with mode 0755.
    pub(crate) fn dir(&mut self, path: &Path) -> io::Result<()> {
        let name = entry_name(path)?;
        self.parents(&name)?;
        self.dir_entry(&name)
    }

    /// A regular file holding `data`, with permission bits `mode`.
    pub(crate) fn file(&mut self, path: &Path, mode: u32, data: &[u8]) -> io::Result<()> {
        let name = entry_name(path)?;
        if data.len() as u64 > MAX_FILE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name}: {} bytes do not fit a cpio archive", data.len()),
            ));
        }
        self.parents(&name)?;
        let size = data.len() as u32;
        let mode = S_IFREG | (mode & 0o7777);
        self.entry(&Entry { name: &name, mode, size, device: (0, 0) }, data)
    }

    /// A symbolic link to `target`.
    pub(crate) fn symlink(&mut self, path: &Path, target: &str) -> io::Result<()> {
        let name = entry_name(path)?;
        self.parents(&name)?;
        let size = target.len() as u32;
        let mode = S_IFLNK | 0o777;
        self.entry(&Entry { name: &name, mode, size, device: (0, 0) }, target.as_bytes())
    }

    /// A character device.
    pub(crate) fn char_device(&mut self, path: &Path, major: u32, minor: u32) -> io::Result<()> {
        let name = entry_name(path)?;
        self.parents(&name)?;
        let mode = S_IFCHR | 0o600;
        self.entry(&Entry { name: &name, mode, size: 0, device: (major, minor) }, &[])
    }

    /// Ends the archive and gives back what it was written to.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry(&Entry { name: TRAILER, mode: 0, size: 0, device: (0, 0) }, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, name: &str) -> io::Result<()> {
        for (at, _) in name.match_indices('/') {
            self.dir_entry(&name[..at])?;
        }
        Ok(())
    }

    fn dir_entry(&mut self, name: &str) -> io::Result<()> {
        self.entry(&Entry { name, mode: S_IFDIR | 0o755, size: 0, device: (0, 0) }, &[])
    }

    fn entry(&mut self, entry: &Entry<'_>, data: &[u8]) -> io::Result<()> {
        if !self.names.insert(entry.name.to_owned()) {
            return Ok(());
        }
        let inode = self.next_inode;
        self.next_inode += 1;
        let links = if entry.mode & S_IFDIR != 0 { 2 } else { 1 };
        let (major, minor) = entry.device;
        let name_bytes = entry.name.len() + 1;
        let header = format!(
            "070701{inode:08x}{mode:08x}{uid:08x}{gid:08x}{links:08x}{mtime:08x}{size:08x}\
             {dev:08x}{dev:08x}{major:08x}{minor:08x}{name_bytes:08x}{check:08x}",
            mode = entry.mode,
            size = entry.size,
            uid = 0,
            gid = 0,
            mtime = 0,
            dev = 0,
            check = 0,
        );
        self.put(header.as_bytes())?;
        self.put(entry.name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = (ALIGN - self.written_bytes % ALIGN) % ALIGN;
        self.put(&[0; ALIGN as usize][..missing as usize])
    }
}

/// The archive's name of an absolute or relative path: no leading slash, no dots.
fn entry_name(path: &Path) -> io::Result<String> {
    let mut name = String::new();
    for part in path.components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(part) => {
                let part = part.to_str().ok_or_else(|| bad_name(path))?;
                if !name.is_empty() {
                    name.push('/');
                }
                name.push_str(part);
            }
            Component::ParentDir | Component::Prefix(_) => return Err(bad_name(path)),
        }
    }
    if name.is_empty() || name == TRAILER { Err(bad_name(path)) } else { Ok(name) }
}

fn bad_name(path: &Path) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{} cannot be a name in a cpio archive", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.char_device(Path::new("/dev/console"), 5, 1).unwrap();
        cpio.file(Path::new("/etc/motd"), 0o644, b"hello").unwrap();
        cpio.file(Path::new("etc/motd"), 0o644, b"a second one is not taken").unwrap();
        cpio.symlink(Path::new("/bin/sh"), "busybox").unwrap();
        cpio.dir(Path::new("/out")).unwrap();
        cpio.finish().unwrap()
    }

    /// Reads an archive by the format's definition: name, mode, data.
    fn parse(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let total = bytes.len();
        loop {
            let field = |n: usize| {
                let at = 6 + n * 8;
                let text = std::str::from_utf8(&bytes[at..at + 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, name_bytes) = (field(1) as u32, field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_bytes - 1].to_vec()).unwrap();
            let data_at = (110 + name_bytes).next_multiple_of(4);
            let data = bytes[data_at..data_at + size].to_vec();
            let next = (data_at + size).next_multiple_of(4);
            bytes = &bytes[next..];
            assert_eq!((total - bytes.len()) % 4, 0);
            if name == TRAILER {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push((name, mode, data));
        }
    }

    #[test]
    fn entries_come_with_their_parents_and_only_once() {
        let entries = parse(&sample());
        let names: Vec<&str> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "etc", "etc/motd", "bin", "bin/sh", "out"]);
        let motd = entries.iter().find(|(name, ..)| name == "etc/motd").unwrap();
        assert_eq!((motd.1, motd.2.as_slice()), (0o100_644, b"hello".as_slice()));
        let sh = entries.iter().find(|(name, ..)| name == "bin/sh").unwrap();
        assert_eq!((sh.1, sh.2.as_slice()), (0o120_777, b"busybox".as_slice()));
    }

    #[test]
    fn cpio_itself_reads_it() {
        let Ok(mut child) = Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            return; // Not installed: the test above reads the format by its definition.
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let listed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(listed.lines().count(), 7);
    }

    #[test]
    fn names_that_leave_the_archive_are_refused() {
        let mut cpio = CpioWriter::new(Vec::new());
        for name in ["../etc/passwd", "/", "", TRAILER] {
            assert!(cpio.file(Path::new(name), 0o644, b"").is_err(), "{name:?}");
        }
    }
}
