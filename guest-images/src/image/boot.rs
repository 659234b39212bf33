//! How a stock disk image boots: kernel, initrd and command line, found where its own boot loader finds them.
//!
//! Looked at are ext2 to ext4 file systems, on partitions or on the whole disk, for what GRUB, extlinux or a
//! boot loader entry says; failing that, for the newest `vmlinuz-*`.

mod config;
mod system;

use std::{
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use config::{Entry, first_entry, newest};
use system::{FileError, System};

use super::{
    Raw, ReadAt,
    partitions::{Partition, partitions},
};
use crate::{
    format::{self, HEAD_BYTES},
    manifest::MAX_CMDLINE_BYTES,
};

/// The largest kernel, and the most that all initrds of an entry are together.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// The longest configuration.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Initrds of one entry: the loader puts them together.
const MAX_INITRDS: usize = 8;
/// How long a disk is looked at. What is in a sound one is found in a moment.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the guest's messages go.
const CONSOLE: &str = "console=ttyS0";

/// What boots a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// The kernel.
    pub kernel: Vec<u8>,
    /// The initrd, if there is one.
    pub initramfs: Option<Vec<u8>>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where that was found, for people.
    pub found: String,
}

/// Why it was not found. Reads well after the image's path.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The disk cannot be read.
    #[error("reading it: {0}")]
    Io(#[from] std::io::Error),
    /// Nothing boots from it.
    #[error("no kernel was found in it: {0}; give one with --kernel (and --initramfs, --cmdline)")]
    None(String),
    /// A file in it cannot be read.
    #[error("its {path}: {why}; give the kernel with --kernel")]
    File {
        /// Which.
        path: String,
        /// Why.
        why: String,
    },
    /// Its command line is longer than a kernel takes.
    #[error(
        "its kernel's command line is longer than {MAX_CMDLINE_BYTES} bytes: give the kernel with --kernel"
    )]
    Cmdline,
    /// Its file system makes whoever reads it go in circles.
    #[error(
        "its file systems were read for a minute without an end; give the kernel with --kernel"
    )]
    Endless,
    /// Its file system is such that reading it fails badly.
    #[error(
        "its file systems are damaged: `e2fsck` may mend them, or give the kernel with --kernel"
    )]
    Damaged,
}

/// Finds out how the disk in a raw image boots.
///
/// Ends within a minute. On an image made to keep its reader busy for longer, a thread goes on behind the
/// error until the process ends.
pub fn find(disk: &File) -> Result<Boot, BootError> {
    let disk = disk.try_clone()?;
    let (says, hears) = mpsc::channel();
    thread::Builder::new().name("look-into-disk".into()).spawn(move || {
        // The reader of file systems is meant not to panic; that it never does is not ours to promise.
        let found = catch_unwind(AssertUnwindSafe(|| look(&disk)));
        let _ = says.send(found.unwrap_or(Err(BootError::Damaged)));
    })?;
    hears.recv_timeout(PATIENCE).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(BootError::Endless),
        RecvTimeoutError::Disconnected => Err(BootError::Damaged),
    })
}

fn look(disk: &File) -> Result<Boot, BootError> {
    let raw = Raw::new(disk.try_clone()?)?;
    let mut parts = partitions(&raw)?;
    if parts.is_empty() {
        parts.push(Partition { number: 0, at: 0, bytes: raw.len(), uuid: String::new() });
    }
    let (mut systems, mut root, mut loaded, mut unread) = (0, None, None, None);
    for part in &parts {
        // One that cannot be read may not be the one that boots.
        let system = match System::open(disk, part) {
            Ok(Some(system)) => system,
            Ok(None) => continue,
            Err(error) => {
                tracing::info!(number = part.number, %error, "a file system is left out");
                unread = unread.or(Some(error));
                continue;
            }
        };
        systems += 1;
        if root.is_none() && is_root(&system) {
            root = Some(part);
        }
        if loaded.is_none()
            && let Some((entry, path)) = entry_of(&system)
        {
            loaded = Some((part, load(&system, &entry)?, entry.options, path));
        }
    }
    let Some((part, (kernel, initramfs), options, path)) = loaded else {
        let mut what = match (systems, parts.len()) {
            (0, 1) => "it has no ext4 file system that can be read".to_owned(),
            (0, count) => {
                format!("none of its {count} partitions has an ext4 file system that can be read")
            }
            _ => "its ext4 file systems have no /boot with one".to_owned(),
        };
        if let Some(error) = unread {
            what = format!("{what} ({error})");
        }
        return Err(BootError::None(what));
    };
    let cmdline = cmdline(&options, root.unwrap_or(part))?;
    let place =
        if part.number == 0 { "the disk".into() } else { format!("partition {}", part.number) };
    Ok(Boot { kernel, initramfs, cmdline, found: format!("{path} of {place}") })
}

/// Whether that is what a system runs from, not only what it boots from.
fn is_root(system: &System) -> bool {
    ["/usr", "/sbin/init", "/etc/fstab"].iter().any(|path| system.exists(path))
}

/// Kernel and initrd of an entry.
fn load(system: &System, entry: &Entry) -> Result<(Vec<u8>, Option<Vec<u8>>), BootError> {
    let read = |path: &str, most_bytes| {
        let why =
            |error: FileError| BootError::File { path: path.to_owned(), why: error.to_string() };
        system.read(path, most_bytes).map_err(why)
    };
    let kernel = read(&entry.kernel, MAX_FILE_BYTES)?;
    format::check_kernel(kernel.get(..HEAD_BYTES).unwrap_or(&kernel)).map_err(|error| {
        BootError::File { path: entry.kernel.clone(), why: format!("it {error}") }
    })?;
    let mut initramfs = Vec::new();
    for path in entry.initrds.iter().take(MAX_INITRDS) {
        // The kernel finds the next one at a multiple of four.
        initramfs.resize(initramfs.len().next_multiple_of(4), 0);
        let room = MAX_FILE_BYTES.saturating_sub(initramfs.len() as u64);
        initramfs.extend(read(path, room)?);
    }
    Ok((kernel, Some(initramfs).filter(|bytes| !bytes.is_empty())))
}

/// The command line with what it cannot do without.
fn cmdline(options: &str, root: &Partition) -> Result<String, BootError> {
    // What a loader would have put in place of a variable is not known.
    let mut words: Vec<&str> =
        options.split_whitespace().filter(|word| !word.contains(['$', '"', '\''])).collect();
    let of_root = match root.number {
        0 => "root=/dev/vda".to_owned(),
        number if root.uuid.is_empty() => format!("root=/dev/vda{number}"),
        _ => format!("root=PARTUUID={}", root.uuid),
    };
    if !words.iter().any(|word| word.starts_with("root=")) {
        words.push(&of_root);
    }
    if !words.iter().any(|word| word.starts_with(CONSOLE)) {
        words.push(CONSOLE);
    }
    let line: String = words.join(" ").chars().filter(|c| !c.is_control()).collect();
    if line.len() > MAX_CMDLINE_BYTES { Err(BootError::Cmdline) } else { Ok(line) }
}

/// What the loader of a file system boots first, and which file says so.
fn entry_of(system: &System) -> Option<(Entry, String)> {
    for boot in ["/boot", ""] {
        for name in ["grub/grub.cfg", "grub2/grub.cfg", "extlinux/extlinux.conf"] {
            let path = format!("{boot}/{name}");
            if let Some(entry) = entry_in(system, &path) {
                return Some((entry, path));
            }
        }
        let dir = format!("{boot}/loader/entries");
        let names = system.names(&dir);
        let last = newest(names.iter().filter(|name| name.ends_with(".conf")));
        if let Some(path) = last.map(|name| format!("{dir}/{name}"))
            && let Some(entry) = entry_in(system, &path)
        {
            return Some((entry, path));
        }
    }
    ["/boot", ""].iter().find_map(|boot| newest_kernel(system, boot))
}

fn entry_in(system: &System, path: &str) -> Option<Entry> {
    let text = system.read(path, MAX_CONFIG_BYTES).ok()?;
    first_entry(&String::from_utf8_lossy(&text))
}

/// The newest `vmlinuz-VERSION`, with the initrd of that version.
fn newest_kernel(system: &System, boot: &str) -> Option<(Entry, String)> {
    let names = system.names(if boot.is_empty() { "/" } else { boot });
    let kernel = newest(names.iter().filter(|name| name.starts_with("vmlinuz")))?;
    let version = kernel.trim_start_matches("vmlinuz").trim_start_matches('-');
    let of_version = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
    ];
    let initrd = names.iter().find(|name| of_version.contains(name));
    let path = |name: &String| format!("{boot}/{name}");
    let initrds = initrd.map(path).into_iter().collect();
    let entry = Entry { kernel: path(kernel), initrds, options: "ro".into() };
    Some((entry, path(kernel)))
}

#[cfg(test)]
mod tests;
