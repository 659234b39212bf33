//! A VM's disk: what is done to it between flushes, and files that were altered while it was closed.
//!
//! The disk holds what was written; once flushed, also after it is opened again. Altered files are
//! refused, or give a disk that can be read and used. Input: `Op`s.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use guest_images::{
    CHUNK_SIZE, Overlay, OverlayError,
    chunk::ZERO_CHUNK,
    overlay::{ChunkIo, DATA_FILE, MAP_FILE, Means},
};

use super::{Origin, Target};
use crate::{
    disk,
    input::{Input, Program},
    scratch::Scratch,
    world::chunk,
};

pub(super) const TARGET: Target =
    Target { name: "overlay", from: Origin::File, run, seeds, max_len: 8 << 10 };

mod op {
    /// Writes a block: where.
    pub(super) const WRITE: u8 = 0;
    /// Writes a chunk: number, content.
    pub(super) const CHUNK: u8 = 1;
    /// Makes zero: where, how much.
    pub(super) const ZERO: u8 = 2;
    /// Sets back to base: number.
    pub(super) const RESET: u8 = 3;
    /// Reads many chunks: by what, how many, and each number.
    pub(super) const READ: u8 = 4;
    /// Writes many chunks: the same.
    pub(super) const MANY: u8 = 5;
    /// Flushes.
    pub(super) const FLUSH: u8 = 6;
    /// Flushes, closes and opens.
    pub(super) const OPEN: u8 = 7;
    /// Closes, alters the map (where, a block, whether to reseal its header) and opens.
    pub(super) const ALTER: u8 = 8;
    /// Closes, gives a file another length (which, how long) and opens.
    pub(super) const RESIZE: u8 = 9;
    pub(super) const END: u8 = 10;
}

/// So many ops at most: a run stays short.
const MOST_OPS: usize = 100;
const CHUNKS: u64 = disk::WHOLE_CHUNKS + 1;
/// Bytes of the map's header that its checksum is over.
const CHECKED_BYTES: usize = 64;

/// The disk, and what it must hold; padded to whole chunks.
struct Disk {
    overlay: Arc<Overlay>,
    holds: Vec<u8>,
}

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let files = Scratch::new();
    let overlay = Overlay::create(files.path(), disk::base()).expect("a new disk");
    let mut holds = disk::disk();
    holds.resize(CHUNKS as usize * CHUNK_SIZE, 0);
    let mut disk = Disk { overlay: Arc::new(overlay), holds };
    for _ in 0..MOST_OPS {
        if input.is_empty() {
            break;
        }
        match input.u8() % op::END {
            op::OPEN => {
                disk.overlay.flush().expect("a flush");
                disk = disk.reopened(files.path(), |_| {}).expect("a disk that was flushed");
            }
            op::ALTER => {
                let (at, bytes, reseal) = (input.u16(), input.block(), input.u8() & 1 == 1);
                let altered = disk.reopened(files.path(), |dir| alter(dir, at, bytes, reseal));
                disk = match altered {
                    Ok(disk) => disk.found(),
                    Err(_) => return false,
                };
            }
            op::RESIZE => {
                let (which, length) = (input.u8(), input.u32() % (1 << 20));
                let altered = disk.reopened(files.path(), |dir| resize(dir, which, length.into()));
                disk = match altered {
                    Ok(disk) => disk.found(),
                    Err(_) => return false,
                };
            }
            op => disk.step(op, &mut input),
        }
    }
    disk.check();
    true
}

fn alter(dir: &Path, at: u16, bytes: &[u8], reseal: bool) {
    let path = dir.join(MAP_FILE);
    let map = OpenOptions::new().read(true).write(true).open(path).expect("the map");
    map.write_all_at(bytes, at.into()).expect("the map");
    if reseal {
        let mut head = [0; CHECKED_BYTES];
        map.read_exact_at(&mut head, 0).expect("the map");
        map.write_all_at(blake3::hash(&head).as_bytes(), CHECKED_BYTES as u64).expect("the map");
    }
}

fn resize(dir: &Path, which: u8, length: u64) {
    let path = dir.join(if which & 1 == 0 { MAP_FILE } else { DATA_FILE });
    if which & 2 != 0 {
        return fs::remove_file(path).expect("a file of the disk");
    }
    let file = OpenOptions::new().write(true).open(path).expect("a file of the disk");
    file.set_len(length).expect("a file of the disk");
}

impl Disk {
    fn reopened(self, dir: &Path, alter: impl FnOnce(&Path)) -> Result<Self, OverlayError> {
        let Self { overlay, holds } = self;
        drop(overlay);
        alter(dir);
        let overlay = Arc::new(Overlay::open(dir, disk::base())?);
        Ok(Self { overlay, holds })
    }

    /// After its files were altered it holds what it holds, and can be used.
    fn found(mut self) -> Self {
        for (number, holds) in (0..).zip(self.holds.chunks_mut(CHUNK_SIZE)) {
            let chunk = holds.first_chunk_mut().expect("whole chunks");
            self.overlay.read_chunk(number, chunk).expect("a disk that opened can be read");
        }
        self
    }

    fn step(&mut self, op: u8, input: &mut Input<'_>) {
        match op {
            op::WRITE => {
                let (at, block) = (input.u32() as usize % disk::DISK_BYTES, input.block());
                let block = &block[..block.len().min(disk::DISK_BYTES - at)];
                self.overlay.write_at(at as u64, block).expect("inside the disk");
                self.holds[at..at + block.len()].copy_from_slice(block);
            }
            op::CHUNK => {
                let (number, seed) = (input.u8(), input.u8());
                self.write_chunks(&[u64::from(number)], seed, None);
            }
            op::ZERO => {
                let at = input.u32() as usize % disk::DISK_BYTES;
                let len = (input.u32() as usize).min(disk::DISK_BYTES - at);
                self.overlay.zero_at(at as u64, len as u64).expect("inside the disk");
                self.holds[at..at + len].fill(0);
            }
            op::RESET => {
                let number = u64::from(input.u8()) % CHUNKS;
                self.overlay.reset_chunk(number).expect("inside the disk");
                let base = disk::disk();
                let mut content = *ZERO_CHUNK;
                let there = &base[number as usize * CHUNK_SIZE..];
                let len = there.len().min(CHUNK_SIZE);
                content[..len].copy_from_slice(&there[..len]);
                self.at(number).copy_from_slice(&content);
            }
            op::READ => {
                let (means, numbers) = (means(input.u8()), numbers(input));
                let mut io = ChunkIo::by(Arc::clone(&self.overlay), means, Means::Calls);
                let mut into = vec![[0xff; CHUNK_SIZE]; numbers.len()];
                io.read(&numbers, &mut into).expect("inside the disk");
                for (number, found) in numbers.into_iter().zip(into) {
                    assert!(self.at(number) == found, "chunk {number}, read with others");
                }
            }
            op::MANY => {
                let (means, mut numbers) = (means(input.u8()), numbers(input));
                numbers.sort_unstable();
                numbers.dedup();
                self.write_chunks(&numbers, input.u8(), Some(means));
            }
            _ => self.overlay.flush().expect("a flush"),
        }
    }

    fn at(&mut self, number: u64) -> &mut [u8] {
        &mut self.holds[number as usize * CHUNK_SIZE..][..CHUNK_SIZE]
    }

    /// Writes chunks one by one, or together. What lies behind the disk's end is zero in all.
    fn write_chunks(&mut self, numbers: &[u64], seed: u8, means: Option<Means>) {
        let numbers: Vec<u64> = numbers.iter().map(|number| number % CHUNKS).collect();
        let content = |number: u64| {
            let mut content = chunk(seed.wrapping_add(number as u8));
            if number == disk::WHOLE_CHUNKS {
                content[disk::DISK_BYTES % CHUNK_SIZE..].fill(0);
            }
            content
        };
        let contents: Vec<_> = numbers.iter().map(|number| content(*number)).collect();
        match means {
            Some(means) => {
                let chunks: Vec<_> = numbers.iter().copied().zip(&contents).collect();
                let mut io = ChunkIo::by(Arc::clone(&self.overlay), Means::Calls, means);
                io.write(&chunks).expect("inside the disk");
            }
            None => {
                for (number, content) in numbers.iter().zip(&contents) {
                    self.overlay.write_chunk(*number, content).expect("inside the disk");
                }
            }
        }
        for (number, content) in numbers.iter().zip(&contents) {
            self.at(*number).copy_from_slice(content);
        }
    }

    fn check(&self) {
        let mut found = vec![0; disk::DISK_BYTES];
        self.overlay.read_at(0, &mut found).expect("a disk that can be read");
        let held = &self.holds[..disk::DISK_BYTES];
        let differs = found.iter().zip(held).position(|(one, two)| one != two);
        assert_eq!(differs, None, "the disk holds something else there");
        assert!(self.overlay.changed().all(|chunk| chunk < CHUNKS));
    }
}

fn means(number: u8) -> Means {
    if number & 1 == 0 { Means::Ring } else { Means::Calls }
}

fn numbers(input: &mut Input<'_>) -> Vec<u64> {
    let count = input.u8() % 20;
    (0..count).map(|_| u64::from(input.u8()) % CHUNKS).collect()
}

fn seeds() -> Vec<Vec<u8>> {
    let written = Program::new()
        .u8(op::WRITE)
        .u32(5000)
        .block(b"some bytes")
        .u8(op::CHUNK)
        .u8(11)
        .u8(7)
        .u8(op::ZERO)
        .u32(9000)
        .u32(6000)
        .u8(op::RESET)
        .u8(1)
        .u8(op::MANY)
        .u8(0)
        .u8(3)
        .bytes(&[4, 5, 6])
        .u8(9)
        .u8(op::READ)
        .u8(0)
        .u8(4)
        .bytes(&[0, 5, 2, 11]);
    let flushed = written.clone().u8(op::FLUSH).u8(op::CHUNK).u8(3).u8(8).u8(op::OPEN);
    let alter = |at: u16, bytes: &[u8], reseal: u8| {
        flushed.clone().u8(op::ALTER).u16(at).block(bytes).u8(reseal).bytes(&[op::CHUNK, 2, 2])
    };
    let resize = |which: u8, length: u32| flushed.clone().u8(op::RESIZE).u8(which).u32(length);
    [
        written,
        flushed.clone(),
        alter(4096, &[1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0], 0),
        alter(4096, &[3], 0),
        alter(4096 + 12, &[1], 0),
        alter(8, &[2], 1),
        alter(48, &[1], 1),
        alter(100, &[1], 0),
        resize(0, 4096),
        resize(0, 100),
        resize(1, 0),
        resize(1, 49_152),
        resize(3, 0),
    ]
    .map(Program::finish)
    .into()
}
