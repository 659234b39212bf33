//! What a base is made of, and the identity that follows from it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    base::{BaseId, Part},
    chunk::{CHUNK_SIZE, ChunkHash},
};

/// The version of a manifest without memory: a base that boots.
pub const MANIFEST_VERSION: u32 = 1;

/// The version of a manifest with memory: a base that resumes.
pub const MANIFEST_VERSION_MEMORY: u32 = 2;

/// The only architecture so far.
pub const ARCH: &str = "x86_64";

/// The largest part: 4 TiB. It bounds the overlay's map (1 GiB at this size) and the index.
pub const MAX_PART_BYTES: u64 = 4 << 40;

/// The largest machine state. Real ones have some hundred KiB.
pub const MAX_MACHINE_BYTES: u64 = 16 << 20;

/// The longest kernel command line: x86 has room for 2048 bytes with the final NUL.
pub const MAX_CMDLINE_BYTES: usize = 2047;

/// Starts the canonical encoding of a manifest.
const MANIFEST_DOMAIN: &[u8; 16] = b"howdah.manifest\0";

/// Starts what a part's root is the hash of.
const PART_DOMAIN: &[u8; 16] = b"howdah.part.v1\0\0";

/// Names, sizes and roots of the parts of one base.
///
/// `manifest.json` is its form for people. The identity is *not* the hash of that file but of
/// [`Manifest::canonical`], so white space and field order in the file mean nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of this format: [`MANIFEST_VERSION_MEMORY`] if there is a memory, otherwise
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// The guest's architecture, [`ARCH`].
    pub arch: String,
    /// The disk image.
    pub disk: PartInfo,
    /// The kernel image.
    pub kernel: PartInfo,
    /// The initramfs, if the kernel needs one.
    pub initramfs: Option<PartInfo>,
    /// The kernel command line that boots this disk. The VMM adds what its devices need.
    pub cmdline: String,
    /// The guest's memory and machine state, for a base that resumes instead of booting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryInfo>,
}

/// A snapshot of a running guest over the base's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryInfo {
    /// Its RAM: whole chunks, without the hole below 4 GiB.
    pub ram: PartInfo,
    /// The state of everything else.
    pub machine: MachineInfo,
}

/// Length and hash of a machine state: bytes that only a VMM understands.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineInfo {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of those bytes.
    #[serde(with = "hex32")]
    pub hash: [u8; 32],
}

impl fmt::Debug for MachineInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MachineInfo({} bytes, {})", self.bytes, hex::encode(&self.hash[..6]))
    }
}

impl MachineInfo {
    /// Of these bytes.
    pub fn of(machine: &[u8]) -> Self {
        Self { bytes: machine.len() as u64, hash: *blake3::hash(machine).as_bytes() }
    }
}

/// The exact length of a part and the root over its chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartInfo {
    /// Length in bytes. The last chunk is padded with zeros where it is hashed or read.
    pub bytes: u64,
    /// The root over all chunks.
    pub root: PartRoot,
}

impl PartInfo {
    /// How many chunks the part has.
    pub fn chunks(&self) -> u64 {
        self.bytes.div_ceil(CHUNK_SIZE as u64)
    }
}

/// BLAKE3 over the hashes of all chunks of a part; see [`RootHasher`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PartRoot(#[serde(with = "hex32")] pub [u8; 32]);

impl fmt::Display for PartRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for PartRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PartRoot({})", hex::encode(&self.0[..6]))
    }
}

/// 32 bytes as 64 hex digits.
mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 32], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&hex::encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(from)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(&text, &mut bytes).map_err(de::Error::custom)?;
        Ok(bytes)
    }
}

/// Computes a part's root: BLAKE3 of a domain string, the chunk count, then every chunk's hash in
/// order. Zero chunks count like others, but their hash is known beforehand.
#[derive(Debug)]
pub struct RootHasher {
    hasher: blake3::Hasher,
    zero: ChunkHash,
    announced: u64,
    pushed: u64,
    /// Hashes not given to the hasher yet: it is several times faster on long stretches.
    pending: Vec<u8>,
}

impl RootHasher {
    /// Hashes that are given to the hasher at once.
    const PENDING: usize = 2048;

    /// Starts the root of a part with `chunks` chunks.
    pub fn new(chunks: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(PART_DOMAIN);
        hasher.update(&chunks.to_le_bytes());
        let pending = Vec::with_capacity(32 * Self::PENDING);
        Self {
            hasher,
            zero: ChunkHash::of(crate::chunk::ZERO_CHUNK),
            announced: chunks,
            pushed: 0,
            pending,
        }
    }

    /// Adds the next chunk.
    pub fn push(&mut self, hash: &ChunkHash) {
        self.pending.extend_from_slice(&hash.0);
        self.pushed += 1;
        if self.pending.len() >= 32 * Self::PENDING {
            self.hasher.update(&self.pending);
            self.pending.clear();
        }
    }

    /// Adds `count` chunks of zeros.
    pub fn push_zeros(&mut self, count: u64) {
        let zero = self.zero;
        (0..count).for_each(|_| self.push(&zero));
    }

    /// The root, or nothing if more or fewer chunks were added than announced.
    pub fn finish(mut self) -> Option<PartRoot> {
        self.hasher.update(&self.pending);
        (self.pushed == self.announced).then(|| PartRoot(*self.hasher.finalize().as_bytes()))
    }
}

/// Why a manifest is not one.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON of the right shape.
    #[error("not a manifest: {0}")]
    Syntax(#[from] serde_json::Error),
    /// From another version of howdah.
    #[error(
        "manifest version {found}; this build reads versions {MANIFEST_VERSION} and {MANIFEST_VERSION_MEMORY}: update howdah or import the base again"
    )]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// A memory where the version has none, or the other way round. Two manifests of one base
    /// would have two ids.
    #[error("manifest version {version} is for a base {} memory, this one has {}", if *.version == MANIFEST_VERSION { "without" } else { "with" }, if *.version == MANIFEST_VERSION { "one" } else { "none" })]
    Memory {
        /// The version in the file.
        version: u32,
    },
    /// The machine state's length is impossible.
    #[error("a machine state of {bytes} bytes: it has at least 1 and at most {MAX_MACHINE_BYTES}")]
    MachineLength {
        /// Its length.
        bytes: u64,
    },
    /// For a machine that this build cannot run.
    #[error("made for {found:?}; this build runs {ARCH} guests only")]
    Arch {
        /// The architecture in the file.
        found: String,
    },
    /// A part's length is impossible.
    #[error("{part} of {bytes} bytes: {rule}")]
    PartLength {
        /// Which part.
        part: Part,
        /// Its length.
        bytes: u64,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The command line cannot be given to a kernel.
    #[error("kernel command line: {0}")]
    Cmdline(&'static str),
}

impl Manifest {
    /// Parses and checks `manifest.json`.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        /// The version decides how the rest reads, so it is looked at first and alone.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(json)?;
        check_version(version)?;
        let manifest: Self = serde_json::from_slice(json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks everything that can be checked without looking at the parts.
    pub fn check(&self) -> Result<(), ManifestError> {
        check_version(self.version)?;
        if self.version != version_for(self.memory.as_ref()) {
            return Err(ManifestError::Memory { version: self.version });
        }
        if self.arch != ARCH {
            return Err(ManifestError::Arch { found: self.arch.clone() });
        }
        for part in Part::ALL {
            if let Some(info) = self.part(part) {
                check_length(part, info.bytes)?;
            }
        }
        if let Some(memory) = &self.memory {
            check_machine_length(memory.machine.bytes)?;
        }
        check_cmdline(&self.cmdline)
    }

    /// The size and root of one part; nothing if this base has none.
    pub fn part(&self, part: Part) -> Option<&PartInfo> {
        match part {
            Part::Disk => Some(&self.disk),
            Part::Kernel => Some(&self.kernel),
            Part::Initramfs => self.initramfs.as_ref(),
            Part::Memory => self.memory.as_ref().map(|memory| &memory.ram),
        }
    }

    /// The encoding that the id is the hash of: fixed field order, little-endian integers, strings
    /// with a `u32` length before them. `docs/formats.md` has it to the byte.
    pub fn canonical(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256 + self.cmdline.len());
        let part = |out: &mut Vec<u8>, info: &PartInfo| {
            out.extend_from_slice(&info.bytes.to_le_bytes());
            out.extend_from_slice(&info.root.0);
        };
        // Lengths fit: `check` bounds both strings far below 4 GiB.
        let text = |out: &mut Vec<u8>, text: &str| {
            out.extend_from_slice(&(text.len() as u32).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        };
        out.extend_from_slice(MANIFEST_DOMAIN);
        out.extend_from_slice(&self.version.to_le_bytes());
        text(&mut out, &self.arch);
        part(&mut out, &self.disk);
        part(&mut out, &self.kernel);
        out.push(u8::from(self.initramfs.is_some()));
        if let Some(info) = &self.initramfs {
            part(&mut out, info);
        }
        text(&mut out, &self.cmdline);
        // Only in version 2, so that what version 1 gave keeps its id.
        if let Some(memory) = &self.memory {
            part(&mut out, &memory.ram);
            out.extend_from_slice(&memory.machine.bytes.to_le_bytes());
            out.extend_from_slice(&memory.machine.hash);
        }
        out
    }

    /// The identity of the base that this manifest describes.
    pub fn id(&self) -> BaseId {
        BaseId(*blake3::hash(&self.canonical()).as_bytes())
    }

    /// The file's form: JSON for people, ending in a newline.
    pub fn to_json(&self) -> Result<Vec<u8>, ManifestError> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        Ok(json)
    }
}

/// The version of a manifest with or without this memory.
pub fn version_for(memory: Option<&MemoryInfo>) -> u32 {
    if memory.is_some() { MANIFEST_VERSION_MEMORY } else { MANIFEST_VERSION }
}

fn check_version(found: u32) -> Result<(), ManifestError> {
    match found {
        MANIFEST_VERSION | MANIFEST_VERSION_MEMORY => Ok(()),
        _ => Err(ManifestError::Version { found }),
    }
}

/// Checks a machine state's length.
pub fn check_machine_length(bytes: u64) -> Result<(), ManifestError> {
    match bytes {
        1..=MAX_MACHINE_BYTES => Ok(()),
        _ => Err(ManifestError::MachineLength { bytes }),
    }
}

/// Checks a part's length.
pub fn check_length(part: Part, bytes: u64) -> Result<(), ManifestError> {
    let broken = |rule| Err(ManifestError::PartLength { part, bytes, rule });
    if bytes == 0 {
        return broken("it is empty");
    }
    if bytes > MAX_PART_BYTES {
        return broken("more than 4 TiB");
    }
    if part == Part::Disk && !bytes.is_multiple_of(512) {
        return broken(
            "not whole 512-byte sectors: is it a raw image, and complete? \
             `truncate -s %512 IMAGE` pads it",
        );
    }
    if part == Part::Memory && !bytes.is_multiple_of(CHUNK_SIZE as u64) {
        return broken("memory is whole chunks of 4096 bytes");
    }
    Ok(())
}

/// Checks a kernel command line.
pub fn check_cmdline(cmdline: &str) -> Result<(), ManifestError> {
    if cmdline.len() > MAX_CMDLINE_BYTES {
        return Err(ManifestError::Cmdline("longer than 2047 bytes"));
    }
    if cmdline.chars().any(char::is_control) {
        return Err(ManifestError::Cmdline("holds a control character, such as a newline"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let part = |bytes, byte| PartInfo { bytes, root: PartRoot([byte; 32]) };
        Manifest {
            version: MANIFEST_VERSION,
            arch: ARCH.into(),
            disk: part(1 << 20, 1),
            kernel: part(12345, 2),
            initramfs: Some(part(777, 3)),
            cmdline: "console=ttyS0 root=/dev/vda".into(),
            memory: None,
        }
    }

    fn with_memory() -> Manifest {
        let ram = PartInfo { bytes: 512 << 20, root: PartRoot([4; 32]) };
        let machine = MachineInfo { bytes: 70_000, hash: [5; 32] };
        let memory = Some(MemoryInfo { ram, machine });
        Manifest { version: MANIFEST_VERSION_MEMORY, memory, ..sample() }
    }

    #[test]
    fn json_round_trips_and_white_space_does_not_change_the_id() {
        for manifest in [sample(), with_memory()] {
            let json = manifest.to_json().unwrap();
            let back = Manifest::parse(&json).unwrap();
            assert_eq!(back, manifest);
            let compact: Vec<u8> =
                serde_json::to_vec(&serde_json::from_slice::<serde_json::Value>(&json).unwrap())
                    .unwrap();
            assert_ne!(compact, json);
            assert_eq!(Manifest::parse(&compact).unwrap().id(), manifest.id());
        }
        // A base without memory is written as it always was.
        assert!(!String::from_utf8(sample().to_json().unwrap()).unwrap().contains("memory"));
    }

    /// Freezes the encoding: if this fails, every base in the field has lost its name.
    #[test]
    fn canonical_encoding_is_frozen() {
        let canonical = sample().canonical();
        let mut expected = Vec::new();
        expected.extend_from_slice(b"howdah.manifest\0");
        expected.extend_from_slice(&[1, 0, 0, 0]);
        expected.extend_from_slice(&[6, 0, 0, 0]);
        expected.extend_from_slice(b"x86_64");
        expected.extend_from_slice(&(1u64 << 20).to_le_bytes());
        expected.extend_from_slice(&[1; 32]);
        expected.extend_from_slice(&12345u64.to_le_bytes());
        expected.extend_from_slice(&[2; 32]);
        expected.push(1);
        expected.extend_from_slice(&777u64.to_le_bytes());
        expected.extend_from_slice(&[3; 32]);
        expected.extend_from_slice(&[27, 0, 0, 0]);
        expected.extend_from_slice(b"console=ttyS0 root=/dev/vda");
        assert_eq!(canonical, expected);

        expected[16] = 2;
        expected.extend_from_slice(&(512u64 << 20).to_le_bytes());
        expected.extend_from_slice(&[4; 32]);
        expected.extend_from_slice(&70_000u64.to_le_bytes());
        expected.extend_from_slice(&[5; 32]);
        assert_eq!(with_memory().canonical(), expected);
    }

    #[test]
    fn every_field_changes_the_id() {
        let id = sample().id();
        let changes: [fn(&mut Manifest); 7] = [
            |m| m.disk.bytes += 512,
            |m| m.disk.root.0[0] ^= 1,
            |m| m.kernel.bytes += 1,
            |m| m.kernel.root.0[31] ^= 1,
            |m| m.initramfs = None,
            |m| m.cmdline.push(' '),
            |m| m.version += 1,
        ];
        for change in changes {
            let mut other = sample();
            change(&mut other);
            assert_ne!(other.id(), id, "{other:?}");
        }
        let id = with_memory().id();
        let changes: [fn(&mut MemoryInfo); 4] = [
            |m| m.ram.bytes += 4096,
            |m| m.ram.root.0[0] ^= 1,
            |m| m.machine.bytes += 1,
            |m| m.machine.hash[31] ^= 1,
        ];
        for change in changes {
            let mut other = with_memory();
            change(other.memory.as_mut().unwrap());
            assert_ne!(other.id(), id, "{other:?}");
        }
    }

    #[test]
    fn impossible_manifests_are_refused() {
        let refuse = |change: fn(&mut Manifest), words: &str| {
            let mut manifest = sample();
            change(&mut manifest);
            let json = manifest.to_json().unwrap();
            let error = Manifest::parse(&json).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        refuse(|m| m.version = 3, "version 3");
        refuse(|m| m.version = 0, "version 0");
        refuse(|m| m.arch = "riscv64".into(), "riscv64");
        refuse(|m| m.disk.bytes = 0, "empty");
        refuse(|m| m.disk.bytes = 1000, "sectors");
        refuse(|m| m.kernel.bytes = u64::MAX, "4 TiB");
        refuse(|m| m.cmdline = "a\nb".into(), "control");
        refuse(|m| m.cmdline = "a".repeat(2048), "2047");
        let refuse_memory = |change: fn(&mut MemoryInfo), words: &str| {
            let mut manifest = with_memory();
            change(manifest.memory.as_mut().unwrap());
            let json = manifest.to_json().unwrap();
            let error = Manifest::parse(&json).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        refuse_memory(|m| m.ram.bytes = 0, "memory of 0 bytes");
        refuse_memory(|m| m.ram.bytes += 512, "whole chunks");
        refuse_memory(|m| m.ram.bytes = u64::MAX, "4 TiB");
        refuse_memory(|m| m.machine.bytes = 0, "at least 1");
        refuse_memory(|m| m.machine.bytes = MAX_MACHINE_BYTES + 1, "at most");
        refuse(|m| m.version = 2, "version 2 is for a base with memory, this one has none");
        refuse(
            |m| m.memory = with_memory().memory,
            "version 1 is for a base without memory, this one has one",
        );
        let json = String::from_utf8(sample().to_json().unwrap()).unwrap();
        let unknown = json.replacen('{', "{\"extra\": 1,", 1);
        assert!(Manifest::parse(unknown.as_bytes()).unwrap_err().to_string().contains("extra"));
        assert!(Manifest::parse(b"").is_err());
        assert!(Manifest::parse(&json.as_bytes()[..json.len() / 2]).is_err());
    }

    #[test]
    fn root_depends_on_count_and_order() {
        let (a, b) = (ChunkHash([1; 32]), ChunkHash([2; 32]));
        let root = |hashes: &[ChunkHash]| {
            let mut hasher = RootHasher::new(hashes.len() as u64);
            hashes.iter().for_each(|h| hasher.push(h));
            hasher.finish().unwrap()
        };
        assert_ne!(root(&[a, b]), root(&[b, a]));
        assert_ne!(root(&[a]), root(&[a, a]));
        let mut short = RootHasher::new(2);
        short.push(&a);
        assert!(short.finish().is_none());
        let mut long = RootHasher::new(1);
        long.push_zeros(2);
        assert!(long.finish().is_none());
        let mut zeros = RootHasher::new(3);
        zeros.push_zeros(3);
        assert_eq!(zeros.finish().unwrap(), root(&[ChunkHash::of(crate::chunk::ZERO_CHUNK); 3]));
    }
}
