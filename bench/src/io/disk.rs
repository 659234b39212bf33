//! Chunks of an overlay, read and written in groups as the engine does.

use std::{fs::File, os::fd::AsRawFd, path::Path, sync::Arc, time::Instant};

use anyhow::{Context, ensure};
use guest_images::{
    CHUNK_SIZE, Chunk,
    overlay::{ChunkIo, Means, Overlay},
    store::{ImportSpec, Store},
};
use handoff::{
    ChunkId, ChunkSet, Geometry, Space, order::RoundOrder, stage::outbound::GROUP_CHUNKS,
};
use io_uring::{IoUring, opcode, types};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::{Figure, cpu_s};

pub(crate) fn measure(dir: &Path, bytes: u64, runs: usize) -> anyhow::Result<Vec<Figure>> {
    let dir = tempfile::tempdir_in(dir).context("making a directory for the disk")?;
    let overlay = filled(dir.path(), bytes)?;
    let data = File::open(dir.path().join(guest_images::overlay::DATA_FILE))?;
    let mut figures = Vec::new();
    for percent in [100, 30, 3] {
        let ids = some_of(overlay.chunks(), percent);
        for cold in [false, true] {
            let what = format!("read {percent} %, {}", if cold { "cold" } else { "cached" });
            for by in Reader::ALL {
                let mut reader = by.start(&overlay, &data)?;
                figures.push(best(&what, by.name(), ids.len(), runs, || {
                    if cold {
                        overlay.flush()?;
                        posix_fadvise(&data, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
                    }
                    let began = (Instant::now(), cpu_s());
                    reader(&ids)?;
                    Ok((began.0.elapsed().as_secs_f64(), cpu_s() - began.1))
                })?);
            }
        }
        let what = format!("write {percent} %");
        let content = [9; CHUNK_SIZE];
        let write = |name, group: &mut dyn FnMut(&[u64]) -> anyhow::Result<()>| {
            best(&what, name, ids.len(), runs, || {
                overlay.flush()?;
                let began = (Instant::now(), cpu_s());
                ids.chunks(GROUP_CHUNKS).try_for_each(&mut *group)?;
                Ok((began.0.elapsed().as_secs_f64(), cpu_s() - began.1))
            })
        };
        figures.push(write("a call a chunk", &mut |group| {
            Ok(group.iter().try_for_each(|chunk| overlay.write_chunk(*chunk, &content))?)
        })?);
        for (name, means) in [("a call a run", Means::Calls), ("io_uring", Means::Ring)] {
            let mut io = ChunkIo::by(Arc::clone(&overlay), Means::Calls, means);
            figures.push(write(name, &mut |group| {
                let group: Vec<_> = group.iter().map(|chunk| (*chunk, &content)).collect();
                Ok(io.write(&group)?)
            })?);
        }
    }
    Ok(figures)
}

/// An overlay all of whose chunks are data.
fn filled(dir: &Path, bytes: u64) -> anyhow::Result<Arc<Overlay>> {
    let [disk, kernel] = ["disk", "kernel"].map(|name| dir.join(name));
    File::create(&disk)?.set_len(bytes)?;
    std::fs::write(&kernel, never_run())?;
    let store = Store::open(&dir.join("store"))?;
    let (name, cmdline) = ("bench".to_owned(), String::new());
    let spec = ImportSpec { name, disk, kernel, initramfs: None, cmdline, memory: None };
    store.import(&spec, &mut |_| {})?;
    let overlay = Overlay::create(dir, Arc::new(store.get("bench")?))?;
    for chunk in 0..overlay.chunks() {
        overlay.write_chunk(chunk, &[chunk as u8 | 1; CHUNK_SIZE])?;
    }
    overlay.flush()?;
    Ok(Arc::new(overlay))
}

/// The head of an ELF file for this machine: enough to be taken for a kernel.
fn never_run() -> Vec<u8> {
    let mut head = vec![7; CHUNK_SIZE];
    head[..6].copy_from_slice(b"\x7fELF\x02\x01");
    head[18..20].copy_from_slice(&62u16.to_le_bytes());
    head
}

/// Part of a disk's chunks, in the order in which a round names them.
fn some_of(chunks: u64, percent: u64) -> Vec<u64> {
    let mut set = ChunkSet::new(Geometry { ram_chunks: 0, disk_chunks: chunks });
    let mut state = 88_172_645_463_325_252_u64;
    for index in 0..chunks {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if state % 100 < percent {
            set.insert(ChunkId { space: Space::Disk, index });
        }
    }
    RoundOrder::shuffled(set, 1).map(|id| id.index).collect()
}

fn best(
    what: &str,
    by: &'static str,
    chunks: usize,
    runs: usize,
    mut run: impl FnMut() -> anyhow::Result<(f64, f64)>,
) -> anyhow::Result<Figure> {
    let mut best = (f64::MAX, f64::MAX);
    for _ in 0..runs.max(1) {
        let (wall, cpu) = run().with_context(|| format!("{what} by {by}"))?;
        best = (best.0.min(wall), best.1.min(cpu));
    }
    let bytes = (chunks * CHUNK_SIZE) as f64;
    let cpu_ms_per_gb = best.1 * 1e12 / bytes;
    let what = what.to_owned();
    Ok(Figure { what, by, bytes_per_s: bytes / best.0, cpu_ms_per_gb, calls_per_mb: None })
}

#[derive(Clone, Copy)]
enum Reader {
    Single,
    Runs,
    Ring,
    RingFile,
    RingFileAndBuffers,
}

type Read<'a> = Box<dyn FnMut(&[u64]) -> anyhow::Result<()> + 'a>;

impl Reader {
    const ALL: [Self; 5] =
        [Self::Single, Self::Runs, Self::Ring, Self::RingFile, Self::RingFileAndBuffers];

    fn name(self) -> &'static str {
        match self {
            Self::Single => "a call a chunk",
            Self::Runs => "a call a run",
            Self::Ring => "io_uring",
            Self::RingFile => "io_uring, file registered",
            Self::RingFileAndBuffers => "io_uring, all registered",
        }
    }

    fn start<'a>(self, overlay: &'a Arc<Overlay>, data: &'a File) -> anyhow::Result<Read<'a>> {
        let mut group = vec![[0; CHUNK_SIZE]; GROUP_CHUNKS];
        let means = match self {
            Self::Single => {
                return Ok(Box::new(move |ids| {
                    let read = |(id, into): (&u64, &mut Chunk)| overlay.read_chunk(*id, into);
                    ids.chunks(GROUP_CHUNKS)
                        .try_for_each(|ids| ids.iter().zip(&mut group).try_for_each(read))?;
                    Ok(())
                }));
            }
            Self::Runs => Means::Calls,
            Self::Ring => Means::Ring,
            Self::RingFile | Self::RingFileAndBuffers => {
                let mut raw = Registered::new(data, matches!(self, Self::RingFileAndBuffers))?;
                return Ok(Box::new(move |ids| {
                    ids.chunks(GROUP_CHUNKS).try_for_each(|ids| raw.read(ids))
                }));
            }
        };
        let mut io = ChunkIo::by(Arc::clone(overlay), means, Means::Calls);
        ensure!(io.reads_by() == means, "no io_uring here");
        Ok(Box::new(move |ids| {
            for ids in ids.chunks(GROUP_CHUNKS) {
                io.read(ids, &mut group[..ids.len()])?;
            }
            Ok(())
        }))
    }
}

/// Reads as the overlay's own ring does, with what could be registered.
struct Registered {
    // Before the memory that it was told of.
    uring: IoUring,
    group: Box<[Chunk]>,
    fixed: bool,
}

/// As the overlay does.
const LONGEST_RUN: usize = 8;

impl Registered {
    fn new(data: &File, fixed: bool) -> anyhow::Result<Self> {
        let mut group = vec![[0; CHUNK_SIZE]; GROUP_CHUNKS].into_boxed_slice();
        let uring = IoUring::new(GROUP_CHUNKS as u32)?;
        uring.submitter().register_files(&[data.as_raw_fd()])?;
        let bytes = group.as_flattened_mut();
        let memory = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: the memory is in the same value, which drops the ring before it.
        unsafe { uring.submitter().register_buffers(&[memory]) }?;
        Ok(Self { uring, group, fixed })
    }

    fn read(&mut self, ids: &[u64]) -> anyhow::Result<()> {
        let memory = self.group.as_flattened_mut().as_mut_ptr();
        let (mut at, mut count) = (0, 0);
        while let Some(&first) = ids.get(at) {
            let rest = ids.iter().skip(at).zip(first..).take(LONGEST_RUN);
            let run = rest.take_while(|(id, next)| **id == *next).count();
            let into = memory.wrapping_add(at * CHUNK_SIZE);
            let (len, offset) = ((run * CHUNK_SIZE) as u32, first * CHUNK_SIZE as u64);
            let entry = match self.fixed {
                true => {
                    opcode::ReadFixed::new(types::Fixed(0), into, len, 0).offset(offset).build()
                }
                false => opcode::Read::new(types::Fixed(0), into, len).offset(offset).build(),
            };
            // SAFETY: the memory is this value's, and all is waited for below, or the process ends.
            unsafe { self.uring.submission().push(&entry.user_data(u64::from(len))) }?;
            (at, count) = (at + run, count + 1);
        }
        let (mut ended, mut whole) = (0, true);
        while ended < count {
            if self.uring.submit_and_wait(count - ended).is_err() {
                // The kernel may still write to the memory: there is no going on.
                std::process::abort();
            }
            for completion in self.uring.completion() {
                whole &= completion.result() as u64 == completion.user_data();
                ended += 1;
            }
        }
        ensure!(whole, "a read was cut short");
        Ok(())
    }
}
