//! The host's end of the guest's network: a TAP interface.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    sync::Arc,
};

use super::HEADER_BYTES;

const TUN_DEVICE: &str = "/dev/net/tun";

/// Why a TAP interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// A name that no interface can have.
    #[error("`{0}` cannot name a network interface: 1 to 15 bytes, without slash, space or zero")]
    Name(String),
    /// The host has no TUN/TAP.
    #[error(
        "cannot open {TUN_DEVICE}: {0}; load the module with `modprobe tun`, or allow access to it"
    )]
    Device(#[source] io::Error),
    /// Another process uses it.
    #[error("TAP interface {0} is in use: another VM has it, give this one its own")]
    Busy(String),
    /// Not allowed, or it does not exist and may not be made.
    #[error(
        "not allowed to use TAP interface {0}: have it made for this user with \
         `ip tuntap add dev {0} mode tap user $USER vnet_hdr`, or run with CAP_NET_ADMIN"
    )]
    Permission(String),
    /// An interface of that name is of another kind.
    #[error("network interface {0} is not a single-queue TAP interface: remove it or name another")]
    Kind(String),
    /// It is down and may not be set up.
    #[error(
        "TAP interface {name} is down and cannot be set up ({source}): `ip link set {name} up`"
    )]
    Down {
        /// The interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {what} of TAP interface {name}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An open TAP interface, up, with a virtio-net header before each frame. Clones share it.
#[derive(Clone, Debug)]
pub struct Tap {
    file: Arc<File>,
    name: String,
}

impl Tap {
    /// Opens the TAP interface `name`, or makes one, and sets it up.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let mut request = request_for(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN_DEVICE)
            .map_err(TapError::Device)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) })
            .map_err(|e| not_attached(name, e))?;
        let failed = |what| move |source| TapError::Io { what, name: name.to_owned(), source };
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which `size` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &size) })
            .map_err(failed("set the header size"))?;
        // No offloads: frames come whole and with their checksums.
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, 0) })
            .map_err(failed("turn off the offloads"))?;
        set_up(name)?;
        Ok(Self { file: Arc::new(file), name: name.to_owned() })
    }

    /// Something else that keeps frames apart and never blocks, such as one end of a datagram socket
    /// pair: each frame behind a virtio-net header. For tests and fuzzing.
    pub fn from_file(file: File) -> Self {
        Self { file: Arc::new(file), name: "given".into() }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Takes one frame with its header: returns its length, which is more than the pieces hold if
    /// the frame did not fit.
    ///
    /// # Safety
    /// The pieces must be memory that may be written, through the call.
    pub(super) unsafe fn receive(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let count = pieces.len() as libc::c_int;
        // SAFETY: the caller vouches for the pieces; the descriptor is open.
        let got = unsafe { libc::readv(self.fd(), pieces.as_ptr(), count) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// Gives one frame with its header to the host.
    ///
    /// # Safety
    /// The pieces must be memory that may be read, through the call.
    pub(super) unsafe fn send(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        let count = pieces.len() as libc::c_int;
        // SAFETY: the caller vouches for the pieces; the descriptor is open.
        let sent = unsafe { libc::writev(self.fd(), pieces.as_ptr(), count) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// An interface request that names `name` and is otherwise zero.
fn request_for(name: &str) -> Result<libc::ifreq, TapError> {
    let bad = |b: u8| b == 0 || b == b'/' || b == b':' || b.is_ascii_whitespace();
    let dots = name == "." || name == "..";
    // `%` would ask the kernel to choose a number.
    if name.is_empty()
        || name.len() >= libc::IFNAMSIZ
        || name.bytes().any(|b| bad(b) || b == b'%')
        || dots
    {
        return Err(TapError::Name(name.to_owned()));
    }
    // SAFETY: an ifreq is integers and a pointer, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as _);
    Ok(request)
}

fn not_attached(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy(name),
        Some(libc::EPERM | libc::EACCES) => TapError::Permission(name),
        Some(libc::EINVAL) => TapError::Kind(name),
        _ => TapError::Io { what: "take hold", name, source },
    }
}

fn set_up(name: &str) -> Result<(), TapError> {
    let failed = |source| TapError::Down { name: name.to_owned(), source };
    let mut request = request_for(name)?;
    // SAFETY: socket takes no pointers.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(socket).map_err(failed)?;
    // SAFETY: the descriptor is fresh, open, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: SIOCGIFFLAGS reads and writes one ifreq, which `request` is.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) })
        .map_err(failed)?;
    // SAFETY: SIOCGIFFLAGS has filled this member in.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if i32::from(flags) & libc::IFF_UP != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which `request` is.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) })
        .map_err(failed)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for bad in ["", "a/b", "a b", "0123456789abcdef", "tap%d", "a\0b", "..", "a:b"] {
            assert!(matches!(Tap::open(bad), Err(TapError::Name(name)) if name == bad), "{bad}");
        }
    }

    #[test]
    fn opens_once() {
        let name = format!("hwdh{}", std::process::id() % 100_000);
        match Tap::open(&name) {
            Ok(tap) => {
                assert_eq!(tap.name(), name);
                let second = Tap::open(&name);
                assert!(matches!(&second, Err(TapError::Busy(_))), "{second:?}");
            }
            // Not every machine lets tests make interfaces; the refusal must be the helpful one.
            Err(TapError::Permission(_) | TapError::Device(_)) => {
                eprintln!("skipped: this user may not make TAP interfaces");
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn other_interfaces_are_refused() {
        let refused = Tap::open("lo");
        let kinds = matches!(
            refused,
            Err(TapError::Kind(_) | TapError::Permission(_) | TapError::Device(_))
        );
        assert!(kinds, "{refused:?}");
    }
}
