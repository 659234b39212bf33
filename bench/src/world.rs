//! What the benchmarks work on: a base in a store, and copies of a guest's chunks.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    sync::Arc,
};

use anyhow::{Context, ensure};
use guest_images::{
    Base, CHUNK_SIZE, Chunk, Part, Place,
    store::{ImportSpec, MemorySpec, Store},
};
use handoff::{Bases, ChunkId, Geometry, Space, stage::outbound::GROUP_CHUNKS};

/// A base of noise, and a guest of its size.
pub(crate) struct World {
    pub(crate) base: Arc<Base>,
    pub(crate) geometry: Geometry,
    /// RAM as the base has it.
    pub(crate) same: Vec<Chunk>,
    /// Chunks of the base's disk, as if the guest had read it into RAM.
    pub(crate) page_cache: Vec<Chunk>,
    _dir: tempfile::TempDir,
}

impl World {
    /// A base with a disk and a memory of so many bytes each, in a directory below `dir` that is
    /// removed in the end.
    pub(crate) fn new(dir: &Path, bytes: u64) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir_in(dir).context("making a directory for the base")?;
        let [disk, ram, kernel] = ["disk", "ram", "kernel"].map(|name| dir.path().join(name));
        write_noise(&disk, 1, bytes)?;
        write_noise(&ram, 2, bytes)?;
        std::fs::write(&kernel, never_run())?;
        let store = Store::open(&dir.path().join("store"))?;
        let memory = Some(MemorySpec { ram, machine: vec![1; 4096] });
        let (name, cmdline) = ("bench".to_owned(), String::new());
        let spec = ImportSpec { name, disk, kernel, initramfs: None, cmdline, memory };
        store.import(&spec, &mut |_| {})?;
        let base = Arc::new(store.get("bench")?);
        let chunks = bytes / CHUNK_SIZE as u64;
        let copy = |part| -> anyhow::Result<Vec<Chunk>> {
            ensure!(base.part_chunks(part) == chunks, "the base's {part} has another size");
            let chunk = |index| base.chunk(Place { part, index }).copied();
            (0..chunks).map(|index| chunk(index).context("a chunk of the base")).collect()
        };
        Ok(Self {
            same: copy(Part::Memory)?,
            page_cache: copy(Part::Disk)?,
            geometry: Geometry { ram_chunks: chunks, disk_chunks: chunks },
            base,
            _dir: dir,
        })
    }

    /// The base as the stages take it.
    pub(crate) fn bases(&self) -> Bases {
        Bases::from(Arc::clone(&self.base) as Arc<dyn handoff::BaseView>)
    }

    /// RAM chunks in groups as the source takes them, with their ids.
    pub(crate) fn groups<'a>(
        &self,
        chunks: &'a [Chunk],
    ) -> impl Iterator<Item = (Vec<ChunkId>, &'a [Chunk])> {
        chunks.chunks(GROUP_CHUNKS).enumerate().map(|(group, chunks)| {
            let first = (group * GROUP_CHUNKS) as u64;
            let ids = (0..chunks.len() as u64)
                .map(|n| ChunkId { space: Space::Ram, index: first + n })
                .collect();
            (ids, chunks)
        })
    }
}

/// The head of an ELF file for this machine: enough to be taken for a kernel.
fn never_run() -> Vec<u8> {
    let mut head = vec![7; CHUNK_SIZE];
    head[..6].copy_from_slice(b"\x7fELF\x02\x01");
    head[18..20].copy_from_slice(&62u16.to_le_bytes());
    head
}

fn write_noise(path: &Path, seed: u64, bytes: u64) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut noise = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    let mut block = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        noise.fill(&mut block);
        out.write_all(&block)?;
    }
    Ok(out.flush()?)
}
