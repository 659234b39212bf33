//! Room for a VM that comes in: measured, and reserved against others that come in meanwhile.
//!
//! A reception needs its memory and disk over minutes, not at once. Two that are each told that
//! there is room would both fail half way. So whoever looks first notes what it will still need, in a
//! file of the home, and whoever looks later counts what is noted there:
//!
//! ```text
//! HOME/room    256 places of 16 bytes: [memory, u64 LE][disk, u64 LE], what a reception still needs
//! ```
//!
//! A place counts as long as its bytes are locked, and the kernel unlocks them however the process ends:
//! a crash leaves nothing to tidy up. Guests that run are not counted: what they have not touched may be
//! used by others.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use guest_images::overlay;
use handoff::Refusal;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, Flock, FlockArg, fcntl},
    libc,
};

use crate::{
    failure::Failure,
    home::{Home, VmDir},
};

/// Memory that must stay available besides guests'.
const MEMORY_MARGIN_BYTES: u64 = 64 << 20;
/// The file, in the home.
const FILE: &str = "room";
/// Receptions at once of which it is noted what they need.
const PLACES: u64 = 256;
const PLACE_BYTES: usize = 16;

/// Memory and disk that VMs that come in could have now, as far as that is known.
pub(crate) fn available(home: &Home) -> (u64, u64) {
    let memory = available_memory_bytes().unwrap_or(0).saturating_sub(MEMORY_MARGIN_BYTES);
    (memory, free_disk_bytes(home.root()).unwrap_or(0))
}

/// What a VM that comes in needs of its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// All of the guest's memory.
    pub(super) memory_bytes: u64,
    /// What of its disk differs from base.
    pub(super) disk_bytes: u64,
}

impl Needs {
    fn encode(self) -> [u8; PLACE_BYTES] {
        (u128::from(self.disk_bytes) << 64 | u128::from(self.memory_bytes)).to_le_bytes()
    }

    fn decode(bytes: [u8; PLACE_BYTES]) -> Self {
        let both = u128::from_le_bytes(bytes);
        Self { memory_bytes: both as u64, disk_bytes: (both >> 64) as u64 }
    }

    fn add(&mut self, other: Self) {
        self.memory_bytes = self.memory_bytes.saturating_add(other.memory_bytes);
        self.disk_bytes = self.disk_bytes.saturating_add(other.disk_bytes);
    }

    fn without(self, taken: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_sub(taken.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(taken.disk_bytes),
        }
    }
}

/// The room of a home. Opened before a process is confined to one VM.
#[derive(Debug)]
pub(crate) struct Room {
    file: File,
    /// What the control groups of this process left it when this was opened.
    group_bytes: Option<u64>,
}

impl Room {
    /// Opens the home's file of notes.
    pub(crate) fn open(home: &Home) -> Result<Self, Failure> {
        let path = home.root().join(FILE);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let opened = fs::create_dir_all(home.root()).and_then(|()| options.open(&path));
        let file = opened.map_err(|e| Failure::file("open", &path, &e))?;
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Ok(Self { file, group_bytes: group_available(Path::new("/sys/fs/cgroup"), &groups) })
    }

    /// Reserves what a VM needs in `dir`; `min_free_bytes` of the disk stay free besides.
    pub(super) fn reserve(
        &self,
        dir: &VmDir,
        needs: Needs,
        min_free_bytes: u64,
    ) -> Result<Reserved, Refusal> {
        // For the file as a whole: only one process of a home looks for room at a time.
        let file = self.file.try_clone().map_err(other)?;
        let looking = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| other(e))?;
        let (promised, place) = self.promised().map_err(other)?;
        let disk = free_disk_bytes(dir.path()).map_err(other)?.saturating_sub(promised.disk_bytes);
        need("the disk", needs.disk_bytes.saturating_add(min_free_bytes), disk)?;
        let memory = available_memory_bytes().map_err(other)?;
        let memory = self.group_bytes.map_or(memory, |group| group.min(memory));
        let memory = memory.saturating_sub(promised.memory_bytes);
        need("memory", needs.memory_bytes.saturating_add(MEMORY_MARGIN_BYTES), memory)?;
        let place = place.ok_or_else(|| {
            Refusal::Other(format!("{PLACES} VMs come in there already: try again later"))
        })?;
        let file = Arc::new(self.file.try_clone().map_err(other)?);
        let data = dir.path().join(overlay::DATA_FILE);
        let reserved = Reserved { file, place, needs, data };
        set(&reserved.file, libc::F_WRLCK, place).map_err(other)?;
        reserved.write(needs).map_err(other)?;
        drop(looking);
        Ok(reserved)
    }

    /// What other receptions were promised and have not taken yet; and a place that is free.
    fn promised(&self) -> io::Result<(Needs, Option<u64>)> {
        let (mut sum, mut free) = (Needs::default(), None);
        let places = self.file.metadata()?.len().div_ceil(PLACE_BYTES as u64).min(PLACES);
        for place in 0..places {
            if is_free(&self.file, place)? {
                free.get_or_insert(place);
                continue;
            }
            let mut bytes = [0; PLACE_BYTES];
            // One that has no numbers yet is cut short.
            if self.file.read_exact_at(&mut bytes, place * PLACE_BYTES as u64).is_ok() {
                sum.add(Needs::decode(bytes));
            }
        }
        Ok((sum, free.or_else(|| (places < PLACES).then_some(places))))
    }
}

/// Room that others keep clear of, until dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Reserved {
    file: Arc<File>,
    place: u64,
    needs: Needs,
    data: PathBuf,
}

impl Reserved {
    /// Notes what is still needed: what was taken is measured as used, and must not count twice.
    pub(super) fn refresh(&self) {
        let data = fs::metadata(&self.data).map_or(0, |meta| meta.blocks().saturating_mul(512));
        let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
        // The process's own memory is in it: the margin is there for that.
        let memory_bytes = private_bytes(&statm).unwrap_or_default();
        let taken = Needs { memory_bytes, disk_bytes: data };
        if let Err(error) = self.write(self.needs.without(taken)) {
            tracing::debug!(%error, "others count on less room than there is");
        }
    }

    fn write(&self, needs: Needs) -> io::Result<()> {
        self.file.write_all_at(&needs.encode(), self.place * PLACE_BYTES as u64)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = set(&self.file, libc::F_UNLCK, self.place) {
            tracing::debug!(%error, "room stays reserved until this process ends");
        }
    }
}

/// The lock of one place.
fn lock_of(place: u64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: (place * PLACE_BYTES as u64) as libc::off_t,
        l_len: PLACE_BYTES as libc::off_t,
        l_pid: 0,
    }
}

/// Locks belong to the open file: they go with it, and with the process.
fn set(file: &File, kind: libc::c_int, place: u64) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock_of(place, kind))).map(drop)
}

/// Whether nobody else has the place.
fn is_free(file: &File, place: u64) -> Result<bool, Errno> {
    let mut lock = lock_of(place, libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(libc::c_int::from(lock.l_type) == libc::F_UNLCK)
}

/// Resident memory that is no file's, of a process.
fn private_bytes(statm: &str) -> Option<u64> {
    let mut fields = statm.split_whitespace().skip(1).map(|field| field.parse::<u64>().ok());
    let (resident, shared) = (fields.next()??, fields.next()??);
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    resident.saturating_sub(shared).checked_mul(u64::try_from(page).ok()?)
}

fn other(error: impl std::fmt::Display) -> Refusal {
    Refusal::Other(error.to_string())
}

fn need(what: &str, needed_bytes: u64, available_bytes: u64) -> Result<(), Refusal> {
    if available_bytes >= needed_bytes {
        return Ok(());
    }
    Err(Refusal::NoSpace { what: what.into(), needed_bytes, available_bytes })
}

/// What the file system of `path` has left for this user.
pub(crate) fn free_disk_bytes(path: &Path) -> io::Result<u64> {
    let found = nix::sys::statvfs::statvfs(path)?;
    Ok(found.blocks_available().saturating_mul(found.fragment_size()))
}

/// What the host has left, by its own figure.
fn available_memory_bytes() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    parse_available(&text).ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The least that the control groups from this process's up to the root leave (version 2 of them;
/// `None` where nothing is limited). What the kernel can drop at once counts as free.
fn group_available(root: &Path, groups: &str) -> Option<u64> {
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    if own.split('/').any(|part| part == "..") {
        // A group outside of what this process may see.
        return None;
    }
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |dir: &Path| {
        let limit = number(dir.join("memory.max"))?;
        let used = number(dir.join("memory.current"))?;
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let files = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
        let droppable = files.and_then(|bytes| bytes.parse::<u64>().ok()).unwrap_or_default();
        Some(limit.saturating_sub(used.saturating_sub(droppable)))
    };
    let own = root.join(own);
    own.ancestors().take_while(|dir| dir.starts_with(root)).filter_map(left).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let root = tempfile::tempdir().unwrap();
        let home = Home::new(root.path()).unwrap();
        (root, home)
    }

    fn vm(home: &Home, name: &str) -> VmDir {
        let dir = home.vm(&name.parse().unwrap());
        dir.create().unwrap();
        dir
    }

    #[test]
    fn room_is_measured() {
        assert!(free_disk_bytes(Path::new("/")).unwrap() > 0);
        assert!(available_memory_bytes().unwrap() > 0);
        assert_eq!(parse_available("MemTotal: 9 kB\nMemAvailable:      12 kB\n"), Some(12 << 10));
        assert_eq!(parse_available("MemTotal: 9 kB"), None);
        assert!(private_bytes(&fs::read_to_string("/proc/self/statm").unwrap()).unwrap() > 0);
        assert_eq!(private_bytes("1 2"), None);
    }

    #[test]
    fn too_little_room_says_how_much() {
        need("memory", 5, 5).unwrap();
        let refusal = need("memory", 6, 5).unwrap_err();
        assert_eq!(
            refusal,
            Refusal::NoSpace { what: "memory".into(), needed_bytes: 6, available_bytes: 5 }
        );
    }

    #[test]
    fn the_narrowest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/memory.current", "900\n");
        write("a/memory.stat", "anon 1\ninactive_file 150\n");
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "800\n");
        assert_eq!(group_available(root.path(), "0::/a/b\n"), Some(250));
        assert_eq!(group_available(root.path(), "0::/\n"), None);
        assert_eq!(group_available(root.path(), "0::/../x\n"), None);
        assert_eq!(group_available(root.path(), "1:memory:/a\n"), None, "version 1");
    }

    /// Two receptions that each fit, and do not fit together.
    #[test]
    fn what_is_promised_to_one_is_not_there_for_another() {
        let (_root, home) = home();
        let (first, second) = (vm(&home, "a"), vm(&home, "b"));
        let free = free_disk_bytes(first.path()).unwrap();
        let most = Needs { memory_bytes: 0, disk_bytes: free / 3 * 2 };
        // As two processes open it.
        let rooms = [Room::open(&home).unwrap(), Room::open(&home).unwrap()];
        let reserved = rooms[0].reserve(&first, most, 0).unwrap();
        let refused = rooms[1].reserve(&second, most, 0).unwrap_err();
        assert!(matches!(refused, Refusal::NoSpace { .. }), "{refused}");
        let little = Needs { memory_bytes: 1, disk_bytes: 1 };
        drop(rooms[1].reserve(&second, little, 0).unwrap());
        drop(reserved);
        let kept = rooms[1].reserve(&second, most, 0).unwrap();
        rooms[0].reserve(&first, most, 0).unwrap_err();
        drop(kept);
        drop(rooms[0].reserve(&first, most, 0).unwrap());
        rooms[0].reserve(&first, Needs::default(), free.saturating_mul(2)).unwrap_err();
    }

    #[test]
    fn what_was_taken_is_not_counted_twice() {
        let (_root, home) = home();
        let dir = vm(&home, "a");
        fs::write(dir.path().join(overlay::DATA_FILE), vec![1; 1 << 20]).unwrap();
        let rooms = [Room::open(&home).unwrap(), Room::open(&home).unwrap()];
        let needs = Needs { memory_bytes: 1 << 20, disk_bytes: 3 << 20 };
        let reserved = rooms[0].reserve(&dir, needs, 0).unwrap();
        assert_eq!(rooms[1].promised().unwrap(), (needs, Some(1)));
        reserved.refresh();
        let (left, _) = rooms[1].promised().unwrap();
        assert!(left.disk_bytes <= 2 << 20 && left.memory_bytes < 1 << 20, "{left:?}");
        drop(reserved);
        assert_eq!(rooms[1].promised().unwrap(), (Needs::default(), Some(0)));
    }

    #[test]
    fn numbers_survive() {
        let needs = Needs { memory_bytes: 1 << 40, disk_bytes: u64::MAX };
        assert_eq!(Needs::decode(needs.encode()), needs);
        let mut sum = needs;
        sum.add(needs);
        assert_eq!(sum, Needs { memory_bytes: 2 << 40, disk_bytes: u64::MAX });
    }
}
