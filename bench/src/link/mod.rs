//! A real link between two network namespaces: the kernel's own TCP on both ends, and between them
//! a relay in this process that has a rate, a delay, a bounded queue and losses.
//!
//! ```text
//! namespace A: TCP -> TUN ── relay thread: Channel ── TUN -> TCP :namespace B
//! ```
//!
//! Kernels without netem can be measured with this too, and nothing is left behind when the process
//! ends. It needs the right to make namespaces and `/dev/net/tun`.

mod channel;
mod tun;
mod way;

use std::{
    fs::File,
    io::{self, Read, Write},
    net::Ipv4Addr,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
};

pub(crate) use channel::{Channel, Shape};
pub(crate) use tun::Namespace;
pub(crate) use way::Way;

/// The longest that a relay sleeps.
const TICK: Duration = Duration::from_millis(20);
/// Packets that are read before others are sent on.
const READ_AT_ONCE: usize = 64;
/// The largest packet that a TUN device carries.
const MAX_PACKET_BYTES: usize = 65_535;

/// Two namespaces and what is between them.
pub(crate) struct Link {
    pub(crate) near: Namespace,
    pub(crate) far: Namespace,
    /// Bytes carried from near to far so far.
    #[cfg_attr(not(test), expect(dead_code))]
    carried_bytes: Arc<AtomicU64>,
    /// When the link began: from there the shape's times count.
    pub(crate) origin: Instant,
    stop: Arc<AtomicBool>,
    relays: Vec<JoinHandle<Channel>>,
}

impl Link {
    /// The address of the far end.
    pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
    const NEAR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

    /// A link of that shape, both ways.
    pub(crate) fn new(shape: &Shape) -> io::Result<Self> {
        let (near, at_near) = Namespace::new(Self::NEAR, shape.mtu)?;
        let (far, at_far) = Namespace::new(Self::FAR, shape.mtu)?;
        let (stop, origin) = (Arc::new(AtomicBool::new(false)), Instant::now());
        let carried_bytes = Arc::new(AtomicU64::new(0));
        let ends = [
            (at_near.try_clone()?, at_far.try_clone()?, Arc::clone(&carried_bytes)),
            (at_far, at_near, Arc::default()),
        ];
        let mut relays = Vec::new();
        for (n, (from, to, carried)) in (1..).zip(ends) {
            let (channel, stop) = (Channel::new(shape.clone(), n), Arc::clone(&stop));
            let relay = move || relay(channel, &from, &to, origin, &carried, &stop);
            relays.push(thread::Builder::new().name("relay".into()).spawn(relay)?);
        }
        Ok(Self { near, far, carried_bytes, origin, stop, relays })
    }

    /// Ends the link and says what went from near to far.
    pub(crate) fn end(mut self) -> Option<Channel> {
        self.stop.store(true, Relaxed);
        let mut ended = self.relays.drain(..).map(JoinHandle::join);
        ended.next()?.ok()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.relays.drain(..).for_each(|relay| _ = relay.join());
    }
}

/// Carries packets one way until told to stop.
fn relay(
    mut channel: Channel,
    mut from: &File,
    mut to: &File,
    origin: Instant,
    carried_bytes: &AtomicU64,
    stop: &AtomicBool,
) -> Channel {
    // Sleeps end when they should, not up to 50 µs later. Nothing is lost if that is refused.
    // SAFETY: this option takes a number and no pointer.
    let _ = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize) };
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    while !stop.load(Relaxed) {
        for _ in 0..READ_AT_ONCE {
            // Nothing there, or the other namespace is about to go.
            let Ok(n) = from.read(&mut buffer) else { break };
            channel.offer(origin.elapsed(), buffer.get(..n).unwrap_or_default());
        }
        // A packet that the kernel does not take is one lost: TCP sends it again.
        channel.poll(origin.elapsed(), |packet| _ = to.write(packet));
        carried_bytes.store(channel.carried_bytes, Relaxed);
        let now = origin.elapsed();
        let wait = channel.next_due().map_or(TICK, |due| due.saturating_sub(now).min(TICK));
        let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        // Whatever comes of it, the loop looks at everything again.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(wait)), None);
    }
    channel
}

#[cfg(test)]
mod tests;
