//! The balloon.

use vmm::devices::virtio::{
    VirtioBackend,
    balloon::{Balloon, BalloonHandle},
};

use super::{Backend, DATA, Rig, rig::RAM_BYTES};

const CHUNK_BYTES: u64 = 4096;
const INFLATE: u8 = 0;
const REPORTS: u8 = 4;

/// The machine's owner.
#[derive(Debug, Default)]
pub struct Owner(Option<BalloonHandle>);

impl Backend for Owner {
    const QUEUES: u8 = 5;

    fn new() -> Self {
        Self::default()
    }

    fn device(&mut self) -> Box<dyn VirtioBackend> {
        let balloon = Balloon::new(RAM_BYTES / CHUNK_BYTES).expect("a balloon");
        self.0 = Some(balloon.handle());
        Box::new(balloon)
    }

    fn happens(&mut self, number: u8, _: &[u8]) {
        let Some(handle) = &self.0 else { return };
        match number % 5 {
            0 => _ = handle.hints().start(),
            1 => handle.hints().stop(),
            2 => {
                let hinted = handle.hints().take();
                assert!(hinted.iter().all(|r| r.start < r.end && r.end <= RAM_BYTES / CHUNK_BYTES));
                assert!(hinted.is_sorted_by(|one, two| one.end < two.start), "{hinted:?}");
            }
            3 => handle.set_discard(true),
            _ => handle.set_discard(false),
        }
    }

    fn works(rig: &mut Rig<Self>) {
        rig.happens_to_discard();
        rig.start(u64::MAX, 0);
        rig.put(DATA, &7u32.to_le_bytes());
        rig.ask(INFLATE, &[(DATA, 4)], &[]);
        rig.wait_used(INFLATE);
        let page = DATA + 0x8000;
        rig.put(page, &[7; CHUNK_BYTES as usize]);
        rig.ask(REPORTS, &[], &[(page, CHUNK_BYTES as u32)]);
        rig.wait_used(REPORTS);
        let mut content = [1; CHUNK_BYTES as usize];
        rig.peek(page, &mut content);
        assert!(content.iter().all(|byte| *byte == 0), "a reported page is given back");
    }
}

impl Rig<Owner> {
    fn happens_to_discard(&mut self) {
        self.backend.happens(3, &[]);
    }
}
