//! The durable record: one small file, replaced as a whole.
//!
//! ```text
//! [magic 8 "howdahOW"][version u16 LE][length u16 LE][record, postcard][BLAKE3 of all before, 32]
//! ```
//!
//! Written to a temporary file, fsynced, renamed over the old one, directory fsynced: after a crash
//! the old or the new record is there, whole. Anything else is an error that names the file; a
//! damaged record is never guessed at, because a guess may start a second copy of the guest.
//!
//! The temporary file is always there, with its space: the two change places. A target whose disk got
//! full must still be able to write that it declines, and a source must not be left waiting for it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2},
    libc,
};

use super::Record;

const MAGIC: &[u8; 8] = b"howdahOW";
const VERSION: u16 = 2;
/// The oldest version that is read: it knew no [`State::Receiving`](super::State::Receiving).
const OLDEST: u16 = 1;
const HEADER_BYTES: usize = 12;
const HASH_BYTES: usize = 32;
/// No record is longer: two bounded texts and a few numbers.
const MAX_RECORD_BYTES: usize = 4096;

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system said no.
    #[error("ownership record {path}: cannot {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not a record this program wrote whole.
    #[error(
        "ownership record {path} is damaged ({what}): the VM is not started, because it may run \
         elsewhere; find out where it runs, then remove the VM here or restore this file"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A newer program wrote it.
    #[error(
        "ownership record {path} has format {found}, this program reads {OLDEST} to {VERSION}: \
         update it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The format it has.
        found: u16,
    },
}

/// One VM's ownership record on disk, and in memory as it is on disk.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    record: Option<Record>,
    doubtful: bool,
}

impl Journal {
    /// Reads the record at `path`; a file that does not exist is an empty journal.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, JournalError> {
        let path = path.into();
        let record = match File::open(&path) {
            Ok(file) => Some(read(&path, file)?),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(JournalError::Io { path, doing: "open it", source }),
        };
        Ok(Self { path, record, doubtful: false })
    }

    /// The record as it is on disk.
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// Where the record is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a write failed in such a way that the record it was to write may be on disk. Nobody
    /// may act on what [`Journal::record`] says until a later write succeeds.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Removes the record durably. Only of a VM of which there was none before the offer that was
    /// given up: any other record must go on refusing older offers.
    pub fn forget(&mut self) -> Result<(), JournalError> {
        let failed = |doing| {
            let path = self.path.clone();
            move |source| JournalError::Io { path, doing, source }
        };
        self.doubtful = true;
        fs::remove_file(&self.path).map_err(failed("remove it"))?;
        self.sync_directory()?;
        self.doubtful = false;
        self.record = None;
        Ok(())
    }

    fn sync_directory(&self) -> Result<(), JournalError> {
        let directory = self.path.parent().filter(|d| !d.as_os_str().is_empty());
        let synced = File::open(directory.unwrap_or(Path::new("."))).and_then(|d| d.sync_all());
        synced.map_err(|source| JournalError::Io {
            path: self.path.clone(),
            doing: "make its directory durable",
            source,
        })
    }

    /// Replaces the record durably. After an error this journal says what it said before; whether
    /// that is what the disk has, [`Journal::is_doubtful`] says.
    pub fn write(&mut self, record: Record) -> Result<(), JournalError> {
        let failed = |doing| {
            let path = self.path.clone();
            move |source| JournalError::Io { path, doing, source }
        };
        let bytes = encode(&record).ok_or_else(|| JournalError::Damaged {
            path: self.path.clone(),
            what: "the new record is too long",
        })?;
        let temporary = self.spare();
        // Not truncated before: what is overwritten in place takes no space.
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&temporary)
            .map_err(failed("create the new one"))?;
        file.write_all(&bytes).map_err(failed("write the new one"))?;
        file.set_len(bytes.len() as u64).map_err(failed("write the new one"))?;
        file.sync_all().map_err(failed("make the new one durable"))?;
        // From here on, until the directory is on disk too, a crash may find either.
        self.doubtful = true;
        self.replace(&temporary).map_err(failed("replace it"))?;
        self.sync_directory()?;
        self.doubtful = false;
        self.record = Some(record);
        if let Err(error) = self.reserve() {
            tracing::debug!(%error, "no space is kept for the next ownership record");
        }
        Ok(())
    }

    /// Makes sure that there is space for the next record, as every write does for the one after it:
    /// before this side promises to answer.
    pub fn reserve(&self) -> Result<(), JournalError> {
        self.keep_spare().map_err(|source| JournalError::Io {
            path: self.path.clone(),
            doing: "reserve space for the next one",
            source,
        })
    }

    fn spare(&self) -> PathBuf {
        self.path.with_extension("new")
    }

    /// Puts the new record in the old one's place, and the old one where the new one was: its space is
    /// the next one's.
    fn replace(&self, temporary: &Path) -> io::Result<()> {
        if self.record.is_some() {
            let exchange = RenameFlags::RENAME_EXCHANGE;
            if renameat2(AT_FDCWD, temporary, AT_FDCWD, &self.path, exchange).is_ok() {
                return Ok(());
            }
        }
        // There is none yet, or the file system cannot do that.
        fs::rename(temporary, &self.path)
    }

    fn keep_spare(&self) -> io::Result<()> {
        let spare =
            OpenOptions::new().write(true).create(true).truncate(false).open(self.spare())?;
        let most = libc::off_t::try_from(MAX_RECORD_BYTES).unwrap_or(libc::off_t::MAX);
        Ok(fallocate(&spare, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, most)?)
    }
}

fn encode(record: &Record) -> Option<Vec<u8>> {
    let body = postcard::to_stdvec(record).ok().filter(|b| b.len() <= MAX_RECORD_BYTES)?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len() + HASH_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&u16::try_from(body.len()).ok()?.to_le_bytes());
    bytes.extend_from_slice(&body);
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    Some(bytes)
}

fn read(path: &Path, file: File) -> Result<Record, JournalError> {
    let damaged = |what| JournalError::Damaged { path: path.to_owned(), what };
    let most = HEADER_BYTES + MAX_RECORD_BYTES + HASH_BYTES;
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes).map_err(|source| JournalError::Io {
        path: path.to_owned(),
        doing: "read it",
        source,
    })?;
    if bytes.len() > most {
        return Err(damaged("too long"));
    }
    let (magic, rest) = bytes.split_at_checked(8).ok_or_else(|| damaged("too short"))?;
    if magic != MAGIC {
        return Err(damaged("not an ownership record"));
    }
    let (version, rest) = rest.split_first_chunk::<2>().ok_or_else(|| damaged("too short"))?;
    let found = u16::from_le_bytes(*version);
    if !(OLDEST..=VERSION).contains(&found) {
        return Err(JournalError::Version { path: path.to_owned(), found });
    }
    let (length, rest) = rest.split_first_chunk::<2>().ok_or_else(|| damaged("too short"))?;
    let length = usize::from(u16::from_le_bytes(*length));
    let (body, hash) = rest.split_at_checked(length).ok_or_else(|| damaged("cut off"))?;
    if hash.len() != HASH_BYTES {
        return Err(damaged("wrong length"));
    }
    if blake3::hash(&bytes[..bytes.len() - HASH_BYTES]).as_bytes() != hash {
        return Err(damaged("its checksum does not match"));
    }
    match postcard::take_from_bytes(body) {
        Ok((record, [])) => Ok(record),
        _ => Err(damaged("its content cannot be read")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::{HandoffId, State, VmId};

    fn record() -> Record {
        let state = State::HandingOff { handoff: HandoffId([7; 16]), peer: "b:7000".into() };
        Record { state, ..Record::created(VmId([1; 16])) }
    }

    #[test]
    fn survives_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner");
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.record(), None);
        journal.write(Record::created(VmId([1; 16]))).unwrap();
        journal.write(record()).unwrap();
        assert_eq!(Journal::open(&path).unwrap().record(), Some(&record()));
        journal.forget().unwrap();
        assert_eq!(journal.record(), None);
        assert_eq!(Journal::open(&path).unwrap().record(), None);
    }

    /// Every single damaged bit and every truncation is an error, never another record.
    #[test]
    fn any_damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner");
        Journal::open(&path).unwrap().write(record()).unwrap();
        let whole = fs::read(&path).unwrap();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &bytes).unwrap();
            Journal::open(&path).unwrap_err();
        }
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            Journal::open(&path).unwrap_err();
        }
        fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
        Journal::open(&path).unwrap_err();
    }

    /// On a disk that is full, records can still be replaced, as often as it takes.
    #[test]
    fn the_space_of_the_next_record_is_always_there() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner");
        let mut journal = Journal::open(&path).unwrap();
        journal.write(record()).unwrap();
        let inodes = || {
            let inode = |path: &Path| fs::metadata(path).unwrap().ino();
            (inode(&path), inode(&path.with_extension("new")))
        };
        let first = inodes();
        for id in 0..5 {
            let spare = fs::metadata(path.with_extension("new")).unwrap();
            assert!(spare.blocks() * 512 >= MAX_RECORD_BYTES as u64);
            journal.write(Record::created(VmId([id; 16]))).unwrap();
            // The same two files, which have changed places.
            let now = inodes();
            assert!(now == first || now == (first.1, first.0), "{first:?} {now:?}");
        }
        // What a longer record left behind is cut off.
        fs::write(path.with_extension("new"), [0xa5; 6000]).unwrap();
        journal.write(record()).unwrap();
        assert_eq!(Journal::open(&path).unwrap().record(), Some(&record()));
    }

    #[test]
    fn a_failed_write_keeps_the_old_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner");
        let mut journal = Journal::open(&path).unwrap();
        journal.write(record()).unwrap();
        fs::remove_file(path.with_extension("new")).unwrap();
        fs::create_dir(path.with_extension("new")).unwrap();
        journal.write(Record::created(VmId([2; 16]))).unwrap_err();
        assert_eq!(journal.record(), Some(&record()));
        assert!(!journal.is_doubtful(), "the old one was not touched");
        assert_eq!(Journal::open(&path).unwrap().record(), Some(&record()));
    }

    /// A rename that fails may have happened on a disk that answers with errors.
    #[test]
    fn a_failure_behind_the_point_of_no_return_is_in_doubt_until_a_write_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner");
        let mut journal = Journal::open(&path).unwrap();
        fs::create_dir(&path).unwrap();
        journal.write(record()).unwrap_err();
        assert!(journal.is_doubtful());
        fs::remove_dir(&path).unwrap();
        journal.write(record()).unwrap();
        assert!(!journal.is_doubtful());
    }

    /// A record as the version before wrote it.
    #[test]
    fn the_version_before_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("owner");
        let mut bytes = encode(&record()).unwrap();
        bytes[8..10].copy_from_slice(&OLDEST.to_le_bytes());
        let body = bytes.len() - HASH_BYTES;
        let hash = blake3::hash(&bytes[..body]);
        bytes[body..].copy_from_slice(hash.as_bytes());
        fs::write(&path, &bytes).unwrap();
        assert_eq!(Journal::open(&path).unwrap().record(), Some(&record()));
    }
}
