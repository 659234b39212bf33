//! Frames over TCP, as a handoff sends and reads them.

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use io_uring::{IoUring, cqueue, opcode, squeue::Flags, types};
use nix::sched::{CloneFlags, setns};

use super::{Figure, cpu_s};

/// Bytes of a frame: a segment that did not shrink.
const FRAME_BYTES: usize = 256 << 10;
/// Frames given to the kernel at once.
const BATCH: usize = 4;
/// Bytes asked for by one read, and of a buffer that the kernel may choose.
const READ_BYTES: usize = 64 << 10;
const READ_BUFFERS: u16 = 16;
const RUN: Duration = Duration::from_secs(2);
/// The other end's network namespace.
const NAMESPACE: &str = "howdah-bench-io";

#[derive(Clone, Copy, PartialEq)]
enum Tx {
    Calls,
    Ring,
    ZeroCopy,
}

#[derive(Clone, Copy, PartialEq)]
enum Rx {
    Calls,
    Multishot,
}

const WAYS: [(&str, Tx, Rx); 4] = [
    ("plain sockets", Tx::Calls, Rx::Calls),
    ("io_uring sends", Tx::Ring, Rx::Calls),
    ("io_uring sends, zero copy", Tx::ZeroCopy, Rx::Calls),
    ("io_uring multishot receives", Tx::Calls, Rx::Multishot),
];

pub(crate) fn measure() -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (by, tx, rx) in WAYS {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        figures.push(transfer("loopback", by, tx, rx, listener)?);
    }
    match Veth::new() {
        Ok(veth) => {
            for rate in [Some("100mbit"), Some("1gbit"), None] {
                veth.shape(rate)?;
                for (by, tx, rx) in WAYS {
                    let what = format!("veth, {}", rate.unwrap_or("unlimited"));
                    figures.push(transfer(&what, by, tx, rx, veth.listener()?)?);
                }
            }
        }
        Err(error) => eprintln!("no veth pair, only loopback is measured: {error:#}"),
    }
    Ok(figures)
}

/// A veth pair whose other end is in another network namespace; gone when it is dropped.
struct Veth;

fn run(command: &str) -> anyhow::Result<()> {
    let mut words = command.split_whitespace();
    let status = Command::new(words.next().context("no command")?).args(words).output()?;
    ensure!(status.status.success(), "{command}: {}", String::from_utf8_lossy(&status.stderr));
    Ok(())
}

impl Veth {
    fn new() -> anyhow::Result<Self> {
        run(&format!("ip netns add {NAMESPACE}"))?;
        let veth = Self;
        run(&format!("ip link add howdahio0 type veth peer name howdahio1 netns {NAMESPACE}"))?;
        run("ip addr add 198.18.44.1/30 dev howdahio0")?;
        run("ip link set howdahio0 up")?;
        run(&format!("ip -n {NAMESPACE} addr add 198.18.44.2/30 dev howdahio1"))?;
        run(&format!("ip -n {NAMESPACE} link set howdahio1 up"))?;
        Ok(veth)
    }

    fn shape(&self, rate: Option<&str>) -> anyhow::Result<()> {
        match rate {
            Some(rate) => run(&format!(
                "tc qdisc replace dev howdahio0 root tbf rate {rate} burst 128kb latency 50ms"
            )),
            None => run("tc qdisc del dev howdahio0 root"),
        }
    }

    /// A listener at the other end: made by a thread that goes there.
    fn listener(&self) -> anyhow::Result<TcpListener> {
        let made = thread::spawn(|| -> anyhow::Result<TcpListener> {
            let namespace = File::open(format!("/var/run/netns/{NAMESPACE}"))?;
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(TcpListener::bind("198.18.44.2:0")?)
        });
        made.join().map_err(|_| anyhow::anyhow!("the thread that listens panicked"))?
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        // The pair goes with the namespace.
        let _ = run(&format!("ip netns del {NAMESPACE}"));
    }
}

/// Bytes that one end moved, and its system calls.
#[derive(Clone, Copy, Default)]
struct Moved {
    bytes: u64,
    calls: u64,
}

fn transfer(
    what: &str,
    by: &'static str,
    tx: Tx,
    rx: Rx,
    listener: TcpListener,
) -> anyhow::Result<Figure> {
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_read_timeout(Some(Duration::from_millis(100)))?;
    let (done, received) = mpsc::channel();
    let began = (Instant::now(), cpu_s());
    let receiver = thread::spawn(move || {
        let _ = done.send(match rx {
            Rx::Calls => receive_by_calls(far),
            Rx::Multishot => receive_by_ring(&far),
        });
    });
    let sent = match tx {
        Tx::Calls => send_by_calls(near),
        Tx::Ring => send_by_ring(&near, false),
        Tx::ZeroCopy => send_by_ring(&near, true),
    };
    let sent = sent.with_context(|| format!("{what}: sending by {by}"))?;
    // The stream is closed by now: what is under way arrives, then the receiver ends.
    let received = received.recv()?.with_context(|| format!("{what}: receiving by {by}"))?;
    let (wall, cpu) = (began.0.elapsed().as_secs_f64(), cpu_s() - began.1);
    let _ = receiver.join();
    ensure!(sent.bytes == received.bytes, "{} bytes sent, {} came", sent.bytes, received.bytes);
    let (bytes, calls) = (sent.bytes as f64, (sent.calls + received.calls) as f64);
    Ok(Figure {
        what: what.to_owned(),
        by,
        bytes_per_s: bytes / wall,
        cpu_ms_per_gb: cpu * 1e12 / bytes,
        calls_per_mb: Some(calls * 1e6 / bytes),
    })
}

fn send_by_calls(mut stream: TcpStream) -> anyhow::Result<Moved> {
    let frame = vec![7; FRAME_BYTES];
    let (began, mut moved) = (Instant::now(), Moved::default());
    while began.elapsed() < RUN {
        let n = stream.write(&frame)?;
        moved = Moved { bytes: moved.bytes + n as u64, calls: moved.calls + 1 };
    }
    Ok(moved)
}

fn receive_by_calls(mut stream: TcpStream) -> anyhow::Result<Moved> {
    let mut into = vec![0; READ_BYTES];
    let mut moved = Moved::default();
    loop {
        moved.calls += 1;
        match stream.read(&mut into) {
            Ok(0) => return Ok(moved),
            Ok(n) => moved.bytes += n as u64,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Sends batches of frames that follow each other, the next while the kernel still holds buffers of the
/// one before. The frames are not changed, so that one batch's memory serves all.
fn send_by_ring(stream: &TcpStream, zero_copy: bool) -> anyhow::Result<Moved> {
    // Leaked: whatever ends this function early, the kernel may read it.
    let frame: &'static mut [u8] = vec![7; FRAME_BYTES].leak();
    let mut uring = IoUring::new(64)?;
    let memory = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
    // SAFETY: the memory is never freed.
    unsafe { uring.submitter().register_buffers(&[memory]) }?;
    let (began, mut moved) = (Instant::now(), Moved::default());
    // What the kernel may hold back of a stream that is not copied: as much as two batches.
    let (mut held, most_held) = (0, 2 * BATCH);
    let fd = types::Fd(stream.as_raw_fd());
    while began.elapsed() < RUN {
        for n in 0..BATCH {
            let len = frame.len() as u32;
            let entry = match zero_copy {
                true => opcode::SendZc::new(fd, frame.as_ptr(), len)
                    .flags(libc::MSG_WAITALL)
                    .buf_index(Some(0))
                    .build(),
                false => {
                    opcode::Send::new(fd, frame.as_ptr(), len).flags(libc::MSG_WAITALL).build()
                }
            };
            let entry = if n + 1 < BATCH { entry.flags(Flags::IO_LINK) } else { entry };
            // SAFETY: the memory is never freed, and the stream is open until this returns; with
            // nothing in flight then, or the process ends.
            unsafe { uring.submission().push(&entry) }?;
        }
        let (mut left, mut want) = (BATCH, BATCH);
        loop {
            uring.submit_and_wait(want)?;
            moved.calls += 1;
            for completion in uring.completion() {
                if cqueue::notif(completion.flags()) {
                    held -= 1;
                    continue;
                }
                let sent = completion.result();
                ensure!(sent == FRAME_BYTES as i32, "a send ended with {sent}");
                moved.bytes += sent as u64;
                left -= 1;
                held += usize::from(cqueue::more(completion.flags()));
            }
            if left == 0 && held <= most_held - BATCH {
                break;
            }
            want = left.max(1);
        }
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    while held > 0 {
        uring.submit_and_wait(1)?;
        held -= uring.completion().filter(|c| cqueue::notif(c.flags())).count();
    }
    Ok(moved)
}

/// One receive that goes on, into buffers that the kernel takes from a ring.
fn receive_by_ring(stream: &TcpStream) -> anyhow::Result<Moved> {
    const GROUP: u16 = 1;
    // Leaked: whatever ends this function early, the kernel may write it.
    let buffers: &'static mut [u8] = vec![0; READ_BYTES * usize::from(READ_BUFFERS)].leak();
    let base = buffers.as_mut_ptr();
    let mut uring = IoUring::new(64)?;
    let provide = |first: u16, count: u16| {
        let at = base.wrapping_add(READ_BYTES * usize::from(first));
        opcode::ProvideBuffers::new(at, READ_BYTES as i32, count, GROUP, first).build().user_data(1)
    };
    let receive = || {
        let fd = types::Fd(stream.as_raw_fd());
        opcode::RecvMulti::new(fd, GROUP).build().user_data(2)
    };
    // SAFETY: the memory is never freed, and nobody else uses it; the stream is open until this returns.
    unsafe {
        uring.submission().push(&provide(0, READ_BUFFERS))?;
        uring.submission().push(&receive())?;
    }
    let mut moved = Moved::default();
    let tick = types::Timespec::from(Duration::from_millis(100));
    let mut back = Vec::new();
    loop {
        let args = types::SubmitArgs::new().timespec(&tick);
        moved.calls += 1;
        match uring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ETIME) => continue,
            Err(e) => return Err(e.into()),
        }
        let mut again = false;
        for completion in uring.completion() {
            if completion.user_data() != 2 {
                continue;
            }
            again |= !cqueue::more(completion.flags());
            match completion.result() {
                0 => return Ok(moved),
                n @ 1.. => moved.bytes += n as u64,
                e if e == -libc::ENOBUFS => {}
                e => bail!("receiving ended with {e}"),
            }
            back.extend(cqueue::buffer_select(completion.flags()));
        }
        // SAFETY: as above; what is given back is no longer read here.
        unsafe {
            for buffer in back.drain(..) {
                uring.submission().push(&provide(buffer, 1))?;
            }
            if again {
                uring.submission().push(&receive())?;
            }
        }
    }
}
