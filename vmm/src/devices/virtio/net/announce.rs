//! Telling a network where a guest is now.
//!
//! Switches learn the place of a MAC address from any frame that it sends: a reverse ARP request in
//! the guest's name does that, for guests of any protocol. Where the guest's IPv4 addresses are known,
//! a gratuitous ARP for each corrects neighbours whose caches name another MAC address, as those of a
//! guest that went on from the same base may.
//!
//! One frame may be lost: a bridge's port that has just come up does not forward yet, a radio link
//! drops. So it is said a few times more, farther and farther apart, by the device's worker; a machine
//! that is paused meanwhile says no more.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{HEADER_BYTES, Tap};
use crate::devices::virtio::timer::Timer;

/// Addresses of one guest that are announced.
const MAX_ADDRESSES: usize = 8;
/// When it is said again, after the time before.
const AGAIN_MS: [u64; 4] = [50, 150, 350, 750];

/// The least Ethernet frame, without checksum.
pub(super) const FRAME_BYTES: usize = 60;

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ARP_REQUEST: u16 = 1;
const RARP_REQUEST: u16 = 3;

/// Tells a network where a guest is. May be used from any thread, as long as the guest is meant to be
/// here.
#[derive(Clone, Debug)]
pub struct Announcer {
    tap: Tap,
    mac: [u8; 6],
    addresses: Vec<Ipv4Addr>,
    timer: Arc<Timer>,
    /// How often it is still to be said.
    again: Arc<Mutex<std::slice::Iter<'static, u64>>>,
}

impl Announcer {
    /// Of the guest with `mac`, and as far as they are known its addresses, behind `tap`.
    pub(super) fn new(tap: Tap, mac: [u8; 6], addresses: &[Ipv4Addr]) -> io::Result<Self> {
        let known = addresses.iter().take(MAX_ADDRESSES);
        Ok(Self {
            tap,
            mac,
            addresses: known.copied().collect(),
            timer: Arc::new(Timer::new()?),
            again: Arc::default(),
        })
    }

    /// Says it, and has it said again by the device's worker.
    pub fn announce(&self) -> io::Result<()> {
        *self.again.lock().unwrap_or_else(PoisonError::into_inner) = AGAIN_MS.iter();
        let said = self.say();
        self.arm()?;
        said
    }

    /// What is readable when it is due again.
    pub(super) fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Says it again, if it is due: a worker that goes on after a pause looks at everything.
    pub(super) fn due(&self) {
        if !self.timer.take() {
            return;
        }
        let said = self.say().and_then(|()| self.arm());
        if let Err(error) = said {
            tracing::debug!(%error, tap = self.tap.name(), "announcing the guest again");
        }
    }

    fn arm(&self) -> io::Result<()> {
        let next = self.again.lock().unwrap_or_else(PoisonError::into_inner).next();
        next.map_or(Ok(()), |after| self.timer.set(Duration::from_millis(*after)))
    }

    fn say(&self) -> io::Result<()> {
        self.send(rarp(self.mac))?;
        self.addresses.iter().try_for_each(|address| self.send(gratuitous_arp(self.mac, *address)))
    }

    fn send(&self, frame: [u8; FRAME_BYTES]) -> io::Result<()> {
        let mut packet = [0u8; HEADER_BYTES + FRAME_BYTES];
        packet[HEADER_BYTES..].copy_from_slice(&frame);
        let piece = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
        // SAFETY: the piece is the local array.
        unsafe { self.tap.send(&[piece]) }.map(|_| ())
    }
}

/// A reverse ARP request: "who am I?", asked of everyone by `mac`.
fn rarp(mac: [u8; 6]) -> [u8; FRAME_BYTES] {
    let nobody = Ipv4Addr::UNSPECIFIED;
    arp(ETHERTYPE_RARP, RARP_REQUEST, mac, nobody, (mac, nobody))
}

/// A gratuitous ARP: "who has `address`?", asked of everyone by who has it (RFC 5227, announcement).
pub fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr) -> [u8; FRAME_BYTES] {
    arp(ETHERTYPE_ARP, ARP_REQUEST, mac, address, ([0; 6], address))
}

/// An ARP packet for Ethernet and IPv4, from `mac` to everyone (RFC 826, RFC 903).
fn arp(
    ethertype: u16,
    operation: u16,
    mac: [u8; 6],
    sender: Ipv4Addr,
    (target_mac, target): ([u8; 6], Ipv4Addr),
) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&[0xff; 6]);
    put(&mac);
    put(&ethertype.to_be_bytes());
    // Hardware Ethernet, protocol IPv4, the lengths of their addresses.
    put(&[0, 1, 0x08, 0, 6, 4]);
    put(&operation.to_be_bytes());
    put(&mac);
    put(&sender.octets());
    put(&target_mac);
    put(&target.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0x68, 0x77, 0, 0, 1];

    #[test]
    fn a_reverse_request_names_the_address_of_hardware_only() {
        let frame = rarp(MAC);
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &MAC[..]));
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&MAC[..], &MAC[..]));
        assert_eq!((&frame[28..32], &frame[38..]), (&[0; 4][..], &[0; 22][..]));
    }

    #[test]
    fn an_announcement_is_a_request_for_the_senders_own_address() {
        let frame = gratuitous_arp(MAC, Ipv4Addr::new(10, 77, 0, 5));
        assert_eq!(frame[12..22], [0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!((&frame[22..28], &frame[28..32]), (&MAC[..], &[10, 77, 0, 5][..]));
        assert_eq!((&frame[32..38], &frame[38..42]), (&[0; 6][..], &[10, 77, 0, 5][..]));
    }
}
