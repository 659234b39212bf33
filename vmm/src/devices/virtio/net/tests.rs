//! Tests of the network device over a socket pair that keeps frames apart, as a TAP does.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    time::Duration,
};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

use super::*;
use crate::devices::virtio::{
    TransportState, VirtioError,
    testing::{DATA, Driver, EVENT_IDX},
};

const MAC: [u8; 6] = [2, 0x68, 0x77, 0, 0, 1];
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);

fn net() -> (UnixDatagram, Net) {
    let (host, guest) = UnixDatagram::pair().unwrap();
    guest.set_nonblocking(true).unwrap();
    host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let tap = Tap::from_file(File::from(OwnedFd::from(guest)));
    (host, Net::new(tap, MAC, &[ADDRESS]).unwrap())
}

fn started() -> (UnixDatagram, Driver) {
    let (host, net) = net();
    let mut driver = Driver::new(Box::new(net));
    driver.start(EVENT_IDX | driver.offered() & 0xff_ffff);
    (host, driver)
}

fn packet(frame: &[u8]) -> Vec<u8> {
    // What the kernel puts before a frame may be anything.
    [&[0xee; HEADER_BYTES][..], frame].concat()
}

fn config(driver: &Driver) -> [u8; 8] {
    let mut space = [0; 8];
    for (n, byte) in space.iter_mut().enumerate() {
        crate::devices::bus::BusDevice::read(
            driver.device.as_ref(),
            0x100 + n as u64,
            std::slice::from_mut(byte),
        );
    }
    space
}

#[test]
fn sends_frames_without_the_drivers_header() {
    let (host, mut driver) = started();
    driver.put(DATA, &[0xab; HEADER_BYTES]);
    driver.put(DATA + 100, b"hello, ");
    driver.put(DATA + 200, b"world");
    let head = driver.offer(TX, &[(DATA, 12), (DATA + 100, 7), (DATA + 200, 5)], &[]);
    driver.kick(TX);
    assert_eq!(driver.wait_used(TX), (head, 0));
    let mut got = [0xff; 100];
    let len = host.recv(&mut got).unwrap();
    assert_eq!(got[..len], *[&[0; HEADER_BYTES][..], b"hello, world"].concat());
}

#[test]
fn receives_frames_and_marks_them() {
    let (host, mut driver) = started();
    // Frames that come before there are buffers wait at the interface.
    host.send(&packet(b"first")).unwrap();
    host.send(&packet(&[7; 1514])).unwrap();
    let first = driver.offer(RX, &[], &[(DATA, 1526)]);
    let second = driver.offer(RX, &[], &[(DATA + 0x1ffa, 1526)]);
    driver.kick(RX);
    assert_eq!(driver.wait_used(RX), (first, 17));
    assert_eq!(driver.wait_used(RX), (second, 1526));
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(driver.get(DATA, 17), [&header[..], b"first"].concat());
    assert_eq!(driver.get(DATA + 0x1ffa, 1526), [&header[..], &[7; 1514]].concat());
    let region = driver.ram.find_region(GuestAddress(DATA)).unwrap();
    let dirty = |page: u64| region.bitmap().dirty_at((DATA + page * 4096) as usize);
    assert_eq!([0, 1, 2, 3].map(dirty), [true, true, true, false]);
    // Then they come as they are sent.
    let third = driver.offer(RX, &[], &[(DATA, 1526)]);
    driver.kick(RX);
    std::thread::sleep(Duration::from_millis(5));
    host.send(&packet(b"x")).unwrap();
    assert_eq!(driver.wait_used(RX), (third, 13));
}

#[test]
fn many_frames_arrive_in_order() {
    let (host, mut driver) = started();
    let count = 1000u32;
    let sender = std::thread::spawn(move || {
        for n in 0..count {
            host.send(&packet(&n.to_le_bytes())).unwrap();
        }
        host
    });
    for n in 0..200 {
        driver.offer(RX, &[], &[(DATA + n * 0x1000, 1526)]);
    }
    driver.kick(RX);
    let mut slots: std::collections::VecDeque<u64> = (0..200).collect();
    for n in 0..count {
        assert_eq!(driver.wait_used(RX).1, 16);
        let slot = slots.pop_front().unwrap();
        assert_eq!(driver.get(DATA + slot * 0x1000 + 12, 4), n.to_le_bytes());
        driver.offer(RX, &[], &[(DATA + slot * 0x1000, 1526)]);
        slots.push_back(slot);
        driver.kick(RX);
    }
    sender.join().unwrap();
}

#[test]
fn what_does_not_fit_is_dropped() {
    let (host, mut driver) = started();
    let head = driver.offer(RX, &[], &[(DATA, 60)]);
    driver.kick(RX);
    // The pair cuts a frame that is too long instead of telling its length; a stub is dropped.
    host.send(b"stub").unwrap();
    host.send(&packet(b"fits")).unwrap();
    assert_eq!(driver.wait_used(RX), (head, 16));
    // On the way out: nothing behind the header, and more than a frame holds.
    driver.offer(TX, &[(DATA, 12)], &[]);
    driver.offer(TX, &[(DATA, 12), (DATA, 1 << 20)], &[]);
    driver.offer(TX, &[(DATA, 3)], &[]);
    driver.kick(TX);
    for _ in 0..3 {
        driver.wait_used(TX);
    }
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_receive_buffer_without_room_breaks_the_device() {
    let (_host, mut driver) = started();
    driver.offer(RX, &[], &[(DATA, 11)]);
    driver.kick(RX);
    driver.wait_for("the failure", |d| d.status() & 64 != 0);
}

#[test]
fn a_moved_driver_is_asked_to_announce_itself() {
    let (_host, driver) = started();
    assert_eq!(config(&driver)[..6], MAC);
    assert_eq!(config(&driver)[6..], [1, 0]);
    let (_target, net) = net();
    let (mut moved, _) = driver.hand_off(Box::new(net));
    assert_eq!(moved.wait_interrupt(), 2);
    assert_eq!(config(&moved)[6..], [3, 0]);
    // Some command that there is not, then the acknowledgement.
    for (command, answer) in [([3, 1], 1), ([0, 0], 1), ([3, 0], 0)] {
        moved.put(DATA, &command);
        let head = moved.offer(CONTROL, &[(DATA, 2)], &[(DATA + 8, 1)]);
        moved.kick(CONTROL);
        assert_eq!(moved.wait_used(CONTROL), (head, 1));
        assert_eq!(moved.get(DATA + 8, 1), [answer]);
    }
    assert_eq!(config(&moved)[6..], [1, 0]);
}

#[test]
fn another_address_is_refused() {
    let (_host, driver) = started();
    driver.device.pause().unwrap();
    let state: TransportState = driver.device.save().unwrap();
    let (_other_host, mut net) = net();
    net.mac[5] = 9;
    let target = Driver::new(Box::new(net));
    target.device.pause().unwrap();
    let error = target.device.restore(&state).unwrap_err();
    assert!(matches!(error, VirtioError::State { .. }), "{error}");
}

/// The Ethernet types of the frames that come within this time.
fn types_heard(host: &UnixDatagram, within: Duration) -> Vec<u16> {
    host.set_read_timeout(Some(within)).unwrap();
    let mut got = [0; 200];
    let mut types = Vec::new();
    while let Ok(len) = host.recv(&mut got) {
        assert_eq!(len, HEADER_BYTES + 60);
        let frame = &got[HEADER_BYTES..];
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &MAC[..]));
        types.push(u16::from_be_bytes([frame[12], frame[13]]));
    }
    types
}

const ONE_ANNOUNCEMENT: [u16; 2] = [0x8035, 0x0806];

/// A frame may be lost while a bridge's port comes up.
#[test]
fn an_announcement_is_repeated_by_the_worker_while_the_guest_is_here() {
    let (host, net) = net();
    let announcer = net.announcer();
    let mut driver = Driver::new(Box::new(net));
    driver.start(EVENT_IDX | driver.offered() & 0xff_ffff);
    announcer.announce().unwrap();
    let heard = types_heard(&host, Duration::from_millis(900));
    assert_eq!(heard, ONE_ANNOUNCEMENT.repeat(5), "at once, and four times more");
    // A guest that is paused, as one that leaves is, says nothing more.
    announcer.announce().unwrap();
    driver.device.pause().unwrap();
    while host.recv(&mut [0; 200]).is_ok() {}
    assert!(types_heard(&host, Duration::from_millis(300)).is_empty());
}

/// The driver's thread waits, the worker's sleeps: what is held back is neither lost nor reordered.
#[test]
fn both_directions_are_held_to_a_rate() {
    let (host, net) = net();
    // 100 frames a second, 10 at once.
    let rate = Rate { operations_per_s: Some(100), ..Rate::default() };
    let mut driver = Driver::new(Box::new(net.limited(rate).unwrap()));
    driver.start(EVENT_IDX | driver.offered() & 0xff_ffff);
    let begun = std::time::Instant::now();
    for n in 0..40u64 {
        driver.put(DATA + n * 0x100 + 12, &[n as u8; 60]);
        driver.offer(TX, &[(DATA + n * 0x100, 72)], &[]);
        driver.offer(RX, &[], &[(DATA + 0x1_0000 + n * 0x1000, 1526)]);
        host.send(&packet(&[n as u8; 60])).unwrap();
    }
    driver.kick(TX);
    driver.kick(RX);
    for n in 0..40u8 {
        driver.wait_used(TX);
        let mut got = [0; 100];
        let len = host.recv(&mut got).unwrap();
        assert_eq!(got[HEADER_BYTES..len], [n; 60]);
        assert_eq!(driver.wait_used(RX).1, 72);
        assert_eq!(driver.get(DATA + 0x1_0000 + u64::from(n) * 0x1000 + 12, 60), [n; 60]);
    }
    let took = begun.elapsed();
    assert!((250..3000).contains(&took.as_millis()), "30 frames beyond the first 10: {took:?}");
    // Frames that wait for their time are in the queue: a pause does not wait for them.
    for n in 0..40u64 {
        driver.offer(TX, &[(DATA + n * 0x100, 72)], &[]);
    }
    driver.kick(TX);
    driver.wait_used(TX);
    let begun = std::time::Instant::now();
    driver.device.pause().unwrap();
    assert!(begun.elapsed() < Duration::from_millis(200));
}
