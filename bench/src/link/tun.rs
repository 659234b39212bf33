//! A network namespace with one TUN device: what is sent there can be read as packets, and packets
//! that are written arrive there.
//!
//! Nothing needs to be cleaned up: both are gone with their last descriptor.

use std::{
    fs::{self, File, OpenOptions},
    io,
    net::Ipv4Addr,
    os::fd::AsRawFd,
    os::unix::fs::OpenOptionsExt,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

const INTERFACE: &[u8] = b"link0";

/// A network namespace.
pub(crate) struct Namespace(File);

impl Namespace {
    /// A namespace whose only way out is the device that is returned with it.
    pub(crate) fn new(address: Ipv4Addr, mtu: usize) -> io::Result<(Self, File)> {
        // On a thread of its own, which ends there: only it has moved.
        let made = thread::scope(|scope| scope.spawn(|| make(address, mtu)).join());
        made.unwrap_or_else(|_| Err(io::Error::other("making a namespace panicked")))
    }

    /// Moves the calling thread, and those that it starts, into the namespace for good.
    pub(crate) fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.0, CloneFlags::CLONE_NEWNET)?)
    }
}

fn make(address: Ipv4Addr, mtu: usize) -> io::Result<(Namespace, File)> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let handle = File::open("/proc/thread-self/ns/net")?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // One run must not learn from the one before.
    fs::write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1")?;
    let control = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    set(&device, libc::TUNSETIFF, |request| request.ifru_flags = flags)?;
    set(&control, libc::SIOCSIFADDR, |request| request.ifru_addr = inet(address))?;
    let mask = Ipv4Addr::new(255, 255, 255, 0);
    set(&control, libc::SIOCSIFNETMASK, |request| request.ifru_netmask = inet(mask))?;
    let mtu = libc::c_int::try_from(mtu).unwrap_or(libc::c_int::MAX);
    set(&control, libc::SIOCSIFMTU, |request| request.ifru_mtu = mtu)?;
    let up = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    set(&control, libc::SIOCSIFFLAGS, |request| request.ifru_flags = up)?;
    Ok((Namespace(handle), device))
}

fn inet(address: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain data of 16 bytes; `sockaddr` is the form in which any address travels.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
}

/// One setting of the interface.
fn set(
    on: &impl AsRawFd,
    what: libc::Ioctl,
    fill: impl FnOnce(&mut libc::__c_anonymous_ifr_ifru),
) -> io::Result<()> {
    // SAFETY: a request is made of integers, addresses and pointers that nobody follows while they
    // are null, for all of which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(INTERFACE) {
        *to = *from as libc::c_char;
    }
    fill(&mut request.ifr_ifru);
    // SAFETY: the descriptor is open for the call, and every request used here takes an `ifreq`,
    // which lives until the call returns.
    match unsafe { libc::ioctl(on.as_raw_fd(), what, &raw mut request) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
