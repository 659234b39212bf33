//! What a handoff may take of the network: a rate, and a class for those on the way.

use std::{fmt, io, net::TcpStream, str::FromStr};

use super::set;

/// The least cap: below it a link's own questions and answers would take most of it.
pub const LEAST_RATE_BYTES_PER_S: u64 = 8 << 10;
/// How a link behaves towards others. Nothing said: as TCP does.
///
/// The rate is held by the kernel (`SO_MAX_PACING_RATE`), packet by packet: no bursts, retransmissions
/// count, and a link that is slower by itself is not slowed further. Links that share a bottleneck
/// below their caps share it as TCP flows do, each handoff being one flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Bytes a second that are sent, with the headers of IP and TCP not counted.
    pub max_rate_bytes_per_s: Option<u64>,
    /// The class of service.
    pub dscp: Option<Dscp>,
}

impl Shape {
    /// Gives a connection this shape.
    pub(super) fn apply(self, stream: &TcpStream) -> io::Result<()> {
        if let Some(rate) = self.max_rate_bytes_per_s {
            let rate = rate.max(LEAST_RATE_BYTES_PER_S);
            let paced = u32::try_from(rate).unwrap_or(u32::MAX);
            set(stream, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, paced)?;
        }
        if let Some(Dscp(code)) = self.dscp {
            let byte = u32::from(code) << 2;
            if stream.peer_addr()?.is_ipv6() {
                set(stream, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, byte)?;
            }
            // Also of an IPv6 socket, for when it speaks to a mapped address.
            set(stream, libc::IPPROTO_IP, libc::IP_TOS, byte)?;
        }
        Ok(())
    }
}

/// A differentiated services code point (RFC 2474).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dscp(u8);

/// Those with names of their own (RFC 2474, 2597, 3246, 5865, 8622). Class selectors are `cs0` to `cs7`.
const NAMED: [(&str, u8); 15] = [
    ("le", 1),
    ("af11", 10),
    ("af12", 12),
    ("af13", 14),
    ("af21", 18),
    ("af22", 20),
    ("af23", 22),
    ("af31", 26),
    ("af32", 28),
    ("af33", 30),
    ("af41", 34),
    ("af42", 36),
    ("af43", 38),
    ("voice-admit", 44),
    ("ef", 46),
];

impl Dscp {
    /// The code point, below 64.
    pub fn code(self) -> u8 {
        self.0
    }
}

impl FromStr for Dscp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let named = NAMED.iter().find(|(name, _)| *name == lower).map(|(_, code)| *code);
        let selector = || {
            let class: u8 = lower.strip_prefix("cs")?.parse().ok()?;
            (class < 8).then_some(class << 3)
        };
        let number = || lower.parse().ok().filter(|code| *code < 64);
        named.or_else(selector).or_else(number).map(Self).ok_or_else(|| {
            "a DSCP is le, cs0 to cs7, af11 to af43, ef, or a number from 0 to 63".into()
        })
    }
}

impl fmt::Display for Dscp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMED.iter().find(|(_, code)| *code == self.0) {
            Some((name, _)) => f.write_str(name),
            None if self.0.is_multiple_of(8) => write!(f, "cs{}", self.0 >> 3),
            None => self.0.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpListener,
        os::fd::AsRawFd,
        time::{Duration, Instant},
    };

    use super::{super::TcpConnect, *};
    use crate::link::{Connect, Transport};

    #[test]
    fn code_points_are_said_by_name_or_number() {
        for code in 0..64 {
            let dscp = Dscp(code);
            assert_eq!(dscp.to_string().parse(), Ok(dscp));
            assert_eq!(code.to_string().parse(), Ok(dscp));
        }
        assert_eq!(("LE".parse(), "cs1".parse()), (Ok(Dscp(1)), Ok(Dscp(8))));
        for wrong in ["64", "cs8", "af14", "", "-1", "csx"] {
            assert!(wrong.parse::<Dscp>().unwrap_err().contains("af11"), "{wrong}");
        }
    }

    /// Sends for a while over a link of this shape: bytes that arrived a second, and the TOS byte.
    fn sent(shape: Shape, bytes: usize) -> (f64, u32) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut connect = TcpConnect::new(listener.local_addr().unwrap().to_string());
        connect.shape(shape);
        let link = connect.connect(Duration::from_secs(5)).unwrap();
        let (mut tos, mut length) = (0u32, 4);
        // SAFETY: the descriptor is open; the pointers describe an integer and its length.
        let status = unsafe {
            let fd = link.stream().as_raw_fd();
            let into = (&raw mut tos).cast();
            libc::getsockopt(fd, libc::IPPROTO_IP, libc::IP_TOS, into, &raw mut length)
        };
        assert_eq!(status, 0);
        let mut far = listener.accept().unwrap().0;
        let (mut tx, _rx) = link.split().unwrap();
        let begun = Instant::now();
        let reader = std::thread::spawn(move || {
            let mut left = bytes;
            let mut into = vec![0; 1 << 16];
            while left > 0 {
                left -= far.read(&mut into).unwrap();
            }
            begun.elapsed()
        });
        let mut left = vec![7; bytes];
        while !left.is_empty() {
            match tx.write(&left) {
                Ok(count) => _ = left.drain(..count),
                Err(e) => assert!(crate::link::is_tick(&e), "{e}"),
            }
        }
        (bytes as f64 / reader.join().unwrap().as_secs_f64(), tos)
    }

    #[test]
    fn a_link_keeps_to_its_rate_and_shows_its_class() {
        let rate = 4_000_000;
        let shape = Shape { max_rate_bytes_per_s: Some(rate), dscp: Some("af11".parse().unwrap()) };
        let (reached, tos) = sent(shape, 6_000_000);
        assert_eq!(tos, 10 << 2);
        // The first window goes out at once (on loopback ten segments of 64 KiB); on a busy machine it
        // may be less.
        assert!(reached < rate as f64 * 1.25, "{reached} bytes a second");
        let (unshaped, tos) = sent(Shape::default(), 2_000_000);
        assert!(unshaped > rate as f64 * 2.0 && tos == 0, "{unshaped} bytes a second");
    }
}
