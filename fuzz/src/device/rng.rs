//! The entropy device.

use vmm::devices::virtio::{VirtioBackend, rng::Rng};

use super::{Backend, DATA, Rig};

/// Its other side is the kernel's.
#[derive(Debug)]
pub struct Entropy;

impl Backend for Entropy {
    const QUEUES: u8 = 1;

    fn new() -> Self {
        Self
    }

    fn device(&mut self) -> Box<dyn VirtioBackend> {
        Box::new(Rng::new())
    }

    fn happens(&mut self, _: u8, _: &[u8]) {}

    fn works(rig: &mut Rig<Self>) {
        rig.start(u64::MAX, 0);
        rig.put(DATA, &[0; 64]);
        rig.ask(0, &[], &[(DATA, 64)]);
        assert_eq!(rig.wait_used(0), 64);
        let mut random = [0; 64];
        rig.peek(DATA, &mut random);
        assert_ne!(random, [0; 64]);
    }
}
