//! Reading tar archives: ustar, with the extensions of pax and of GNU for long names, large numbers and
//! extended attributes. One entry after the other, in bounded memory; nothing is written anywhere.

use std::io::{self, ErrorKind, Read};

use super::mkfs::{Meta, Xattr};

/// Archives are made of blocks.
pub(super) const BLOCK_BYTES: usize = 512;
/// The longest header of an extension: names, numbers and attributes of one entry.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Extensions of one entry: there is one of each kind.
const MAX_EXTENSIONS: usize = 8;

/// Why an archive cannot be read. Reads well after what it is.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// Its bytes do not come, or not as what they should be.
    #[error("it cannot be unpacked: {0}")]
    Io(io::Error),
    /// It ends within an entry.
    #[error("it is cut short")]
    Short,
    /// It is no archive, or not one any more.
    #[error("what stands at byte {0} of its archive is no header")]
    Header(u64),
    /// A number in it is none.
    #[error("a number of {0} is impossible")]
    Number(String),
    /// It says more of an entry than anybody has to say.
    #[error("what it says of one entry is longer than 1 MiB")]
    Extension,
    /// What layers do not have.
    #[error("{path} is {what}, which is not supported: make the image anew without")]
    Kind {
        /// Which entry.
        path: String,
        /// What it is.
        what: &'static str,
    },
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        if error.kind() == ErrorKind::UnexpectedEof { Self::Short } else { Self::Io(error) }
    }
}

/// What is read, and can be left out.
pub(super) trait Skip: Read + Sized {
    /// Leaves out so many bytes.
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let skipped = io::copy(&mut self.take(bytes), &mut io::sink())?;
        if skipped == bytes { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file of so many bytes, which the archive reads next.
    File(u64),
    /// Another name of the file with this one.
    Hard(Vec<u8>),
    /// A symbolic link.
    Symlink(Vec<u8>),
    Directory,
    Device {
        is_block: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// An entry, as the archive has it: no name in it is checked.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) meta: Meta,
    /// Where its content begins.
    pub(super) at: u64,
    /// Extended attributes that it has and `meta` has not.
    pub(super) left_out: u64,
}

/// An archive that is being read. As a reader, it is the content of the entry that came last.
#[derive(Debug)]
pub(super) struct Archive<R> {
    input: R,
    at: u64,
    /// Of the content, and behind it.
    left: u64,
    padding: u64,
}

/// What extensions say of the next entry.
#[derive(Debug, Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    time: Option<(i64, u32)>,
    xattrs: Vec<Xattr>,
    left_out: u64,
    is_sparse: bool,
}

type Block = [u8; BLOCK_BYTES];

impl<R: Skip> Archive<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, at: 0, left: 0, padding: 0 }
    }

    /// What it is read from.
    pub(super) fn into_inner(self) -> R {
        self.input
    }

    /// The next entry; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extension = Extension::default();
        for _ in 0..MAX_EXTENSIONS {
            self.skip_rest()?;
            let Some(header) = self.header()? else { return Ok(None) };
            match header[156] {
                b'x' => {
                    let records = self.extension()?;
                    extension.read(&records)?;
                }
                // Comments, mostly, and never what layers rely on.
                b'g' => {}
                b'L' => extension.path = Some(until_zero(&self.extension()?).to_owned()),
                b'K' => extension.link = Some(until_zero(&self.extension()?).to_owned()),
                kind => return self.entry(&header, kind, extension).map(Some),
            }
        }
        Err(TarError::Header(self.at))
    }

    /// Goes behind the content of the entry.
    fn skip_rest(&mut self) -> Result<(), TarError> {
        let rest = self.left.checked_add(self.padding).ok_or(TarError::Short)?;
        (self.left, self.padding) = (0, 0);
        self.at = self.at.saturating_add(rest);
        Ok(self.input.skip(rest)?)
    }

    /// The next header, and where its content ends; `None` at the end, which is a block of zeros, or no block.
    fn header(&mut self) -> Result<Option<Block>, TarError> {
        let (mut header, mut there) = ([0; BLOCK_BYTES], 0);
        while there < BLOCK_BYTES {
            match self.input.read(&mut header[there..]) {
                Ok(0) if there == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Short),
                Ok(read) => there += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let at = self.at;
        self.at += BLOCK_BYTES as u64;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sums = sums(&header);
        let sum = octal(&header[148..156]).filter(|sum| sums.contains(sum));
        sum.ok_or(TarError::Header(at))?;
        self.set_size(number(&header, 124, 12, "an entry's size")?);
        Ok(Some(header))
    }

    fn set_size(&mut self, bytes: u64) {
        self.left = bytes;
        self.padding = bytes.wrapping_neg() % BLOCK_BYTES as u64;
    }

    /// The content of an extension.
    fn extension(&mut self) -> Result<Vec<u8>, TarError> {
        if self.left > MAX_EXTENSION_BYTES {
            return Err(TarError::Extension);
        }
        let mut content = vec![0; self.left as usize];
        self.read_exact(&mut content)?;
        Ok(content)
    }

    fn entry(&mut self, header: &Block, kind: u8, extension: Extension) -> Result<Entry, TarError> {
        let path = extension.path.unwrap_or_else(|| path_of(header));
        let link = || extension.link.unwrap_or_else(|| until_zero(&header[157..257]).to_owned());
        let odd = |what| TarError::Kind { path: shown(&path), what };
        if extension.is_sparse {
            return Err(odd("a sparse file of GNU tar"));
        }
        let of = |what: &str| format!("{} ({what})", shown(&path));
        if let Some(bytes) = extension.size {
            self.set_size(bytes);
        }
        let kind = match kind {
            // Before there was a kind for them, directories were told by their name.
            0 | b'0' if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' => Kind::File(self.left),
            b'1' => Kind::Hard(link()),
            b'2' => Kind::Symlink(link()),
            b'3' | b'4' => {
                let numbers = [329, 337].map(|at| number(header, at, 8, &of("device")));
                let [major, minor] = numbers;
                // What Linux has in 32 bits.
                let fits = |number: u64, bits: u32| {
                    u32::try_from(number).ok().filter(|number| number >> bits == 0)
                };
                let both = fits(major?, 12).zip(fits(minor?, 20));
                let (major, minor) = both.ok_or_else(|| TarError::Number(of("device")))?;
                Kind::Device { is_block: kind == b'4', major, minor }
            }
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(odd("a sparse file of GNU tar")),
            _ => return Err(odd("an entry of an unknown kind")),
        };
        // Whatever is said there, only files have a content.
        if !matches!(kind, Kind::File(_)) {
            self.set_size(0);
        }
        let id = |at, given: Option<u64>| {
            let id = given.map_or_else(|| number(header, at, 8, &of("owner")), Ok)?;
            u32::try_from(id).map_err(|_| TarError::Number(of("owner")))
        };
        let (seconds, nanoseconds) = match extension.time {
            Some(time) => time,
            None => (signed(&header[136..148]).unwrap_or_default(), 0),
        };
        let meta = Meta {
            mode: (number(header, 100, 8, &of("mode"))? & 0o7777) as u16,
            uid: id(108, extension.uid)?,
            gid: id(116, extension.gid)?,
            seconds,
            nanoseconds,
            xattrs: extension.xattrs,
        };
        Ok(Entry { path, kind, meta, at: self.at, left_out: extension.left_out })
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        let read = self.input.read(&mut into[..most])?;
        if read == 0 && most > 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        self.at += read as u64;
        Ok(read)
    }
}

impl Extension {
    /// Takes what records of pax say: each has its length, a key and a value.
    fn read(&mut self, mut records: &[u8]) -> Result<(), TarError> {
        let odd = || TarError::Number("an extended header".into());
        while !records.is_empty() {
            let digits = records.iter().position(|byte| *byte == b' ').ok_or_else(odd)?;
            let length = decimal(&records[..digits]).ok_or_else(odd)?;
            let length = usize::try_from(length).map_err(|_| odd())?;
            let record = records.get(digits + 1..length).ok_or_else(odd)?;
            records = &records[length..];
            let record = record.strip_suffix(b"\n").ok_or_else(odd)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(odd)?;
            self.set(&record[..equals], &record[equals + 1..]).ok_or_else(odd)?;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            // Without a value, the header's own counts.
            b"path" | b"linkpath" | b"size" | b"uid" | b"gid" | b"mtime" if value.is_empty() => {}
            b"path" => self.path = Some(value.to_owned()),
            b"linkpath" => self.link = Some(value.to_owned()),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"mtime" => self.time = Some(time(value)?),
            _ if key.starts_with(b"GNU.sparse.") => self.is_sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.set_xattr(name, value);
                }
            }
        }
        Some(())
    }

    fn set_xattr(&mut self, name: &[u8], value: &[u8]) {
        // What a union of layers has noted for itself, where one was packed up.
        let of_overlay = name.starts_with(b"trusted.overlay.");
        match Xattr::new(name, value).filter(|_| !of_overlay) {
            Some(xattr) => {
                self.xattrs.retain(|other| !other.is_same_name(&xattr));
                self.xattrs.push(xattr);
            }
            None => self.left_out += 1,
        }
    }
}

/// The sum of a header's bytes, those of the sum itself counted as spaces; also as it was computed where
/// bytes had a sign.
fn sums(header: &Block) -> [u64; 2] {
    let counted = header.iter().enumerate().map(|(at, byte)| match at {
        148..156 => b' ',
        _ => *byte,
    });
    let (mut plain, mut with_sign) = (0u64, 0i64);
    for byte in counted {
        plain += u64::from(byte);
        with_sign += i64::from(byte as i8);
    }
    [plain, with_sign.unsigned_abs()]
}

fn path_of(header: &Block) -> Vec<u8> {
    let name = until_zero(&header[..100]);
    let prefix = until_zero(&header[345..500]);
    // GNU's has other things there.
    if &header[257..263] == b"ustar\0" && !prefix.is_empty() {
        [prefix, b"/", name].concat()
    } else {
        name.to_owned()
    }
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.split_at(end).0
}

/// A path for people.
pub(super) fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    let clean = text.chars().map(|c| if c.is_control() { '?' } else { c });
    // Enough to know which it is.
    clean.take(200).collect()
}

/// A number of a header that has no sign.
fn number(header: &Block, at: usize, bytes: usize, what: &str) -> Result<u64, TarError> {
    let found = header.get(at..at + bytes).and_then(signed);
    let found = found.and_then(|number| u64::try_from(number).ok());
    found.ok_or_else(|| TarError::Number(what.to_owned()))
}

/// A number as text, in octal, or in binary if its first bit is set.
fn signed(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return i64::try_from(octal(field)?).ok();
    }
    // The bit behind the first is the sign.
    let start = if first & 0x40 == 0 { i128::from(first & 0x3f) } else { i128::from(first as i8) };
    let rest = field.get(1..)?;
    i64::try_from(rest.iter().fold(start, |number, byte| number << 8 | i128::from(*byte))).ok()
}

/// A number in octal, with spaces and zeros around it; nothing counts as zero.
fn octal(field: &[u8]) -> Option<u64> {
    let text = until_zero(field).trim_ascii();
    text.iter().try_fold(0u64, |number, byte| match byte {
        b'0'..=b'7' => Some(number.checked_mul(8)? + u64::from(byte - b'0')),
        _ => None,
    })
}

fn decimal(text: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(text).ok()?;
    if digits.starts_with('+') { None } else { digits.parse().ok() }
}

/// Seconds with a fraction, perhaps before 1970.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds = decimal(digits.as_bytes())? as u32;
    match (whole.starts_with('-'), nanoseconds) {
        (false, _) | (true, 0) => Some((seconds, nanoseconds)),
        (true, nanoseconds) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
    }
}

#[cfg(test)]
mod tests;
