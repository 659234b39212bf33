//! The disk: an overlay over the small base.

use std::{collections::BTreeSet, sync::Arc};

use guest_images::{CHUNK_SIZE, Overlay};
use vmm::devices::virtio::{
    VirtioBackend,
    block::{Block, DiskDirty},
};

use super::{Backend, DATA, Rig};
use crate::{disk, scratch::Scratch};

const SECTOR_BYTES: usize = 512;
const READ: u32 = 0;
const OK: u8 = 0;

/// The disk's files, and which of its chunks a handoff would send.
#[derive(Debug)]
pub struct Disk {
    overlay: Arc<Overlay>,
    dirty: Option<Arc<DiskDirty>>,
    marked: BTreeSet<u64>,
    base: Vec<u8>,
    _files: Scratch,
}

impl Disk {
    fn harvest(&mut self) {
        let words = self.dirty.as_ref().map(|dirty| dirty.harvest()).unwrap_or_default();
        for (word, bits) in (0..).zip(words) {
            self.marked
                .extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * 64 + bit));
        }
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; disk::DISK_BYTES];
        self.overlay.read_at(0, &mut content).expect("a disk that can be read");
        content
    }
}

impl Backend for Disk {
    const QUEUES: u8 = 1;

    fn new() -> Self {
        let files = Scratch::new();
        let overlay = Overlay::create(files.path(), disk::base()).expect("an overlay");
        let (overlay, base) = (Arc::new(overlay), disk::disk());
        Self { overlay, dirty: None, marked: BTreeSet::new(), base, _files: files }
    }

    fn device(&mut self) -> Box<dyn VirtioBackend> {
        self.harvest();
        let block = Block::new(Arc::clone(&self.overlay), "a-disk").expect("io_uring");
        self.dirty = Some(block.dirty());
        Box::new(block)
    }

    /// The handoff reads the disk meanwhile.
    fn happens(&mut self, number: u8, _: &[u8]) {
        if number & 1 == 0 {
            self.harvest();
        } else {
            self.content();
        }
    }

    /// Every chunk that is not as in the base is marked.
    fn check(&mut self) {
        self.harvest();
        let content = self.content();
        let chunks = content.chunks(CHUNK_SIZE).zip(self.base.chunks(CHUNK_SIZE));
        for (number, (now, then)) in (0..).zip(chunks) {
            assert!(now == then || self.marked.contains(&number), "chunk {number} is not marked");
        }
    }

    fn works(rig: &mut Rig<Self>) {
        rig.start(u64::MAX, 0);
        let content = rig.backend.content();
        let sector = 17;
        let mut header = READ.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend((sector as u64).to_le_bytes());
        rig.put(DATA, &header);
        rig.put(DATA + 100, &[0xff]);
        rig.ask(0, &[(DATA, 16)], &[(DATA + 0x1000, SECTOR_BYTES as u32), (DATA + 100, 1)]);
        rig.wait_used(0);
        let (mut status, mut read) = ([0xff], [0; SECTOR_BYTES]);
        rig.peek(DATA + 100, &mut status);
        rig.peek(DATA + 0x1000, &mut read);
        assert_eq!(status, [OK]);
        assert_eq!(read[..], content[sector * SECTOR_BYTES..][..SECTOR_BYTES]);
    }
}
