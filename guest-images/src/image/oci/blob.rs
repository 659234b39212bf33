//! Blobs: pieces of an image that are named by the hash of their content, and where they are.

use std::{
    cell::Cell,
    collections::HashMap,
    fmt,
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use ring::digest::{Context, SHA256};
use serde::Deserialize;

use super::OciError;
use crate::{
    format,
    image::{
        Raw, ReadAt,
        tar::{Archive, BLOCK_BYTES, Kind, Skip, TarError},
    },
};

/// Files of an archive that are looked at: far more than an image has layers.
const MAX_MEMBERS: usize = 1 << 16;
const BUFFER_BYTES: usize = 64 << 10;

/// The SHA-256 of a content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// Its bytes.
    pub(super) fn bytes(&self) -> [u8; 32] {
        self.0
    }

    /// That of a content.
    pub fn of(content: &[u8]) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(content);
        hasher.finish()
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut bytes = [0; 32];
        let hex = text.strip_prefix("sha256:").filter(|hex| !hex.contains(char::is_uppercase));
        match hex.map(|hex| hex::decode_to_slice(hex, &mut bytes)) {
            Some(Ok(())) => Ok(Self(bytes)),
            _ => {
                Err(format!("{:?} is no SHA-256 digest", text.chars().take(80).collect::<String>()))
            }
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Makes a digest of what comes in pieces.
pub(super) struct Hasher(Context);

impl Hasher {
    pub(super) fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn finish(self) -> Digest {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.0.finish().as_ref());
        Digest(bytes)
    }
}

/// What holds the pieces of an image.
#[derive(Debug)]
pub(super) enum Source {
    /// A directory.
    Directory(PathBuf),
    /// The files of a tar archive: where each is, and how long.
    Archive { file: Arc<Raw>, members: HashMap<Vec<u8>, (u64, u64)> },
}

/// A piece of an image.
#[derive(Clone, Debug)]
pub(super) struct Blob {
    file: Arc<Raw>,
    at: u64,
    bytes: u64,
    /// What it is called.
    pub(super) name: String,
}

impl Source {
    /// What is at this path.
    pub(super) fn open(path: &Path) -> Result<Self, OciError> {
        if std::fs::metadata(path).map_err(OciError::Open)?.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let file = open_file(path).map_err(OciError::Open)?;
        let mut head = vec![0; format::HEAD_BYTES.min(file.len() as usize)];
        file.read_exact_at(&mut head, 0).map_err(OciError::Read)?;
        format::check_compressed(&head).map_err(OciError::Packed)?;
        let whole = Window { file: &file, at: 0, end: file.len() };
        let members = index(whole).map_err(|error| match error {
            TarError::Header(0) => OciError::NotOci,
            TarError::Short if file.len() < BLOCK_BYTES as u64 => OciError::NotOci,
            error => OciError::Archive(error),
        })?;
        Ok(Self::Archive { file: Arc::new(file), members })
    }

    /// A piece by its path; `None` if there is none.
    pub(super) fn find(&self, name: &str) -> Result<Option<Blob>, OciError> {
        match self {
            Self::Directory(dir) => {
                let file = match open_file(&dir.join(name)) {
                    Ok(file) => file,
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(OciError::Read(error)),
                };
                let bytes = file.len();
                Ok(Some(Blob { file: Arc::new(file), at: 0, bytes, name: name.to_owned() }))
            }
            Self::Archive { file, members } => Ok(members.get(name.as_bytes()).map(|place| {
                let (at, bytes) = *place;
                Blob { file: Arc::clone(file), at, bytes, name: name.to_owned() }
            })),
        }
    }

    /// The piece with this content, which has that length; its content is not looked at yet.
    pub(super) fn blob(&self, digest: Digest, bytes: u64) -> Result<Blob, OciError> {
        let path = format!("blobs/sha256/{}", hex::encode(digest.0));
        let mut blob = self.find(&path)?.ok_or_else(|| OciError::Missing(digest.to_string()))?;
        blob.name = digest.to_string();
        if blob.bytes != bytes {
            return Err(OciError::Length { blob: blob.name, there: blob.bytes, said: bytes });
        }
        Ok(blob)
    }
}

impl Blob {
    /// Its content, which is not longer than that, and has that digest if there is one.
    pub(super) fn read(&self, most: u64, digest: Option<Digest>) -> Result<Vec<u8>, OciError> {
        if self.bytes > most {
            return Err(OciError::Document { name: self.name.clone(), most });
        }
        let mut content = vec![0; self.bytes as usize];
        self.file.read_exact_at(&mut content, self.at).map_err(OciError::Read)?;
        match digest {
            Some(digest) if Digest::of(&content) != digest => Err(self.wrong()),
            _ => Ok(content),
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.bytes
    }

    /// Its content from the front, counted as it is read.
    pub(super) fn stream<'a>(&'a self, count: &'a Cell<u64>) -> impl Read + 'a {
        let end = self.at.saturating_add(self.bytes);
        Counted { inner: Window { file: &self.file, at: self.at, end }, count }
    }

    /// Reads all of it and compares.
    pub(super) fn verify(
        &self,
        digest: Digest,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), OciError> {
        let count = Cell::new(0);
        let mut stream = self.stream(&count);
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let read = stream.read(&mut buffer).map_err(OciError::Read)?;
            let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            hasher.update(bytes);
            progress(count.get());
        }
        if hasher.finish() == digest { Ok(()) } else { Err(self.wrong()) }
    }

    fn wrong(&self) -> OciError {
        OciError::Digest(self.name.clone())
    }
}

/// Opens a file, and nothing that would keep its reader waiting.
fn open_file(path: &Path) -> io::Result<Raw> {
    let mut options = OpenOptions::new();
    let file: File = options.read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"));
    }
    Raw::new(file)
}

/// Where the files of an archive are.
fn index(archive: Window<'_>) -> Result<HashMap<Vec<u8>, (u64, u64)>, TarError> {
    let mut archive = Archive::new(archive);
    let mut members = HashMap::new();
    while let Some(entry) = archive.next()? {
        let Kind::File(bytes) = entry.kind else { continue };
        let mut path = entry.path;
        while path.starts_with(b"./") {
            path.drain(..2);
        }
        members.insert(path, (entry.at, bytes));
        if members.len() > MAX_MEMBERS {
            return Err(TarError::Header(entry.at));
        }
    }
    Ok(members)
}

/// A stretch of a file, read from its front.
struct Window<'a> {
    file: &'a Raw,
    at: u64,
    end: u64,
}

impl Read for Window<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_sub(self.at);
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
        let Some(into) = into.get_mut(..most) else { return Ok(0) };
        self.file.read_exact_at(into, self.at)?;
        self.at += most as u64;
        Ok(most)
    }
}

impl Skip for Window<'_> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let at = self.at.checked_add(bytes).filter(|at| *at <= self.end);
        self.at = at.ok_or(ErrorKind::UnexpectedEof)?;
        Ok(())
    }
}

struct Counted<'a, R> {
    inner: R,
    count: &'a Cell<u64>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)?;
        self.count.set(self.count.get() + read as u64);
        Ok(read)
    }
}
