//! The network device, over a socket pair that keeps frames apart, as a TAP does.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixDatagram},
};

use vmm::devices::virtio::{
    VirtioBackend,
    net::{Net, Tap},
};

use super::{Backend, DATA, Rig};

const MAC: [u8; 6] = [2, 0x68, 0x77, 0, 0, 1];
const HEADER_BYTES: u32 = 12;
const RX: u8 = 0;
const TX: u8 = 1;

/// The network.
#[derive(Debug)]
pub struct Network {
    host: UnixDatagram,
    guest: UnixDatagram,
}

impl Network {
    /// Takes the frames that the guest has sent.
    fn empty(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = [0; 70 << 10];
        loop {
            match self.host.recv(&mut buffer) {
                Ok(length) => frames.push(buffer[..length].to_vec()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return frames,
                Err(e) => panic!("receiving from the guest: {e}"),
            }
        }
    }
}

impl Backend for Network {
    const QUEUES: u8 = 3;

    fn new() -> Self {
        let (host, guest) = UnixDatagram::pair().expect("a socket pair");
        for end in [&host, &guest] {
            end.set_nonblocking(true).expect("a socket");
        }
        Self { host, guest }
    }

    fn device(&mut self) -> Box<dyn VirtioBackend> {
        let guest = self.guest.try_clone().expect("a descriptor");
        let tap = Tap::from_file(File::from(OwnedFd::from(guest)));
        Box::new(Net::new(tap, MAC, &[]).expect("a timer"))
    }

    fn happens(&mut self, number: u8, block: &[u8]) {
        if number & 1 == 0 {
            // A network that is full drops frames.
            let _ = self.host.send(block);
        } else {
            self.empty();
        }
    }

    fn works(rig: &mut Rig<Self>) {
        rig.start(u64::MAX, 0);
        rig.backend.empty();
        rig.put(DATA, &[0; HEADER_BYTES as usize]);
        rig.put(DATA + 100, b"a frame of some length");
        rig.ask(TX, &[(DATA, HEADER_BYTES), (DATA + 100, 22)], &[]);
        assert_eq!(rig.wait_used(TX), 0);
        let sent = rig.backend.empty();
        assert!(sent.iter().any(|frame| frame.ends_with(b"a frame of some length")), "{sent:?}");
        // Frames may wait from before: any will do.
        let _ = rig.backend.host.send(&[7; 100]);
        rig.ask(RX, &[], &[(DATA, 4000)]);
        assert!(rig.wait_used(RX) >= HEADER_BYTES);
    }
}
