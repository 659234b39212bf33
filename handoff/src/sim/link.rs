//! Links whose ends wait in real time.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{
    LinkShape,
    line::{Line, Tried},
};
use crate::link::{Connect, LinkGauge, LinkReading, READ_TICK, Transport, WRITE_TICK};

/// Between two looks at a peer that cannot be reached.
const UNREACHABLE: Duration = Duration::from_millis(50);

/// What goes wrong on one link, counted in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// It breaks after so many bytes from the side that connected, in the middle of a write.
    pub cut_up: Option<u64>,
    /// It breaks after so many bytes to it.
    pub cut_down: Option<u64>,
    /// This byte from the side that connected arrives with a bit turned over.
    pub flip: Option<u64>,
}

/// One direction and those who wait for it.
#[derive(Debug)]
struct Way {
    line: Mutex<Line>,
    moved: Condvar,
    carried: Arc<AtomicU64>,
}

impl Way {
    fn new(line: Line, carried: &Arc<AtomicU64>) -> Self {
        Self { line: Mutex::new(line), moved: Condvar::new(), carried: Arc::clone(carried) }
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        // A line is whole after every call: a thread that panicked left it so.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `until`, or until the other end moved, but not beyond `deadline`; `false` if that
    /// is over.
    fn wait<'a>(
        &self,
        held: MutexGuard<'a, Line>,
        now: Duration,
        (until, deadline): (Duration, Duration),
    ) -> (MutexGuard<'a, Line>, bool) {
        let Some(left) = deadline.checked_sub(now).filter(|left| !left.is_zero()) else {
            return (held, false);
        };
        let time = until.saturating_sub(now).min(left);
        let waited = self.moved.wait_timeout(held, time);
        (waited.unwrap_or_else(PoisonError::into_inner).0, true)
    }
}

/// Both directions.
#[derive(Debug)]
struct Wire {
    origin: Instant,
    ways: [Way; 2],
}

impl Wire {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn each(&self, change: impl Fn(&mut Line)) {
        for way in &self.ways {
            change(&mut way.lock());
            way.moved.notify_all();
        }
    }
}

/// One end of a simulated link.
#[derive(Debug)]
pub struct SimLink {
    wire: Arc<Wire>,
    /// The direction in which this end sends.
    out: usize,
}

/// The half that sends. Dropping it closes the link.
#[derive(Debug)]
pub struct SimTx(SimLink);

/// The half that receives. Dropping it closes the link.
#[derive(Debug)]
pub struct SimRx(SimLink);

/// Measures what one end sends.
#[derive(Debug)]
pub struct SimGauge {
    wire: Arc<Wire>,
    out: usize,
}

impl SimLink {
    fn close(&self) {
        let now = self.wire.now();
        self.wire.each(|line| line.close(now));
    }
}

impl io::Write for SimTx {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (wire, way) = (&self.0.wire, &self.0.wire.ways[self.0.out]);
        let mut line = way.lock();
        let deadline = wire.now() + WRITE_TICK;
        loop {
            let now = wire.now();
            match line.write(now, bytes) {
                Tried::Over(why) => return Err(why.into()),
                Tried::Done(n) => {
                    let cut = line.is_cut();
                    drop(line);
                    way.carried.fetch_add(n as u64, Relaxed);
                    way.moved.notify_all();
                    if cut {
                        // What was written before still arrives.
                        self.0.close();
                        return Err(io::ErrorKind::ConnectionReset.into());
                    }
                    return Ok(n);
                }
                Tried::Wait(until) => {
                    let (held, in_time) = way.wait(line, now, (until, deadline));
                    if !in_time {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    line = held;
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Read for SimRx {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (wire, way) = (&self.0.wire, &self.0.wire.ways[1 - self.0.out]);
        let mut line = way.lock();
        let deadline = wire.now() + READ_TICK;
        loop {
            let now = wire.now();
            match line.read(now, into) {
                Tried::Over(io::ErrorKind::BrokenPipe) => return Ok(0),
                Tried::Over(why) => return Err(why.into()),
                Tried::Done(n) => {
                    drop(line);
                    way.moved.notify_all();
                    return Ok(n);
                }
                Tried::Wait(until) => {
                    let (held, in_time) = way.wait(line, now, (until, deadline));
                    if !in_time {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    line = held;
                }
            }
        }
    }
}

impl Drop for SimTx {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Drop for SimRx {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl LinkGauge for SimGauge {
    fn read(&self) -> Option<LinkReading> {
        let now = self.wire.now();
        self.wire.ways[self.out].lock().reading(now)
    }
}

impl Transport for SimLink {
    type Tx = SimTx;
    type Rx = SimRx;

    fn gauge(&self) -> Option<Box<dyn LinkGauge>> {
        Some(Box::new(SimGauge { wire: Arc::clone(&self.wire), out: self.out }))
    }

    fn split(self) -> io::Result<(SimTx, SimRx)> {
        let second = Self { wire: Arc::clone(&self.wire), out: self.out };
        Ok((SimTx(self), SimRx(second)))
    }
}

/// Makes links to one peer, and gives that their other ends.
#[derive(Debug)]
pub struct SimConnect {
    /// How links are from now on.
    pub shape: LinkShape,
    /// What happens on the next links, in order.
    pub faults: VecDeque<Fault>,
    /// Whether links can be made after the last of [`SimConnect::faults`].
    pub reachable_after: bool,
    /// How many links were made.
    pub links: u32,
    carried: Arc<AtomicU64>,
    origin: Option<Instant>,
    to: Sender<SimLink>,
}

impl SimConnect {
    /// A way to a peer, and where that finds the other ends of the links made.
    pub fn new(shape: LinkShape) -> (Self, Receiver<SimLink>) {
        let (to, ends) = unbounded();
        let connect = Self {
            shape,
            faults: VecDeque::new(),
            reachable_after: true,
            links: 0,
            carried: Arc::default(),
            origin: None,
            to,
        };
        (connect, ends)
    }

    /// Bytes written to all links, by both ends.
    pub fn carried_bytes(&self) -> u64 {
        self.carried.load(Relaxed)
    }

    fn wait_for_outage(&self, now: Duration, timeout: Duration) -> io::Result<()> {
        let Some(outage) = self.shape.outages.iter().find(|o| (o.from..o.until).contains(&now))
        else {
            return Ok(());
        };
        let left = outage.until.saturating_sub(now);
        std::thread::sleep(left.min(timeout));
        if left > timeout { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
}

impl Connect for SimConnect {
    type Link = SimLink;

    fn connect(&mut self, timeout: Duration) -> io::Result<SimLink> {
        let origin = *self.origin.get_or_insert_with(Instant::now);
        let fault = match self.faults.pop_front() {
            Some(fault) => fault,
            None if self.reachable_after => Fault::default(),
            None => {
                std::thread::sleep(timeout.min(UNREACHABLE));
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
        };
        self.wait_for_outage(origin.elapsed(), timeout)?;
        let LinkShape { up, down, outages } = &self.shape;
        // The first packet goes there and back.
        std::thread::sleep((up.delay + down.delay).min(timeout));
        let mut lines = [Line::new(up.clone(), down.delay), Line::new(down.clone(), up.delay)];
        (lines[0].cut, lines[0].flip, lines[1].cut) = (fault.cut_up, fault.flip, fault.cut_down);
        let now = origin.elapsed();
        for outage in outages.iter().filter(|outage| outage.until > now) {
            lines.iter_mut().for_each(|line| line.breaks(outage.from));
        }
        let ways = lines.map(|line| Way::new(line, &self.carried));
        let wire = Arc::new(Wire { origin, ways });
        let far = SimLink { wire: Arc::clone(&wire), out: 1 };
        self.to.send(far).map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        self.links += 1;
        Ok(SimLink { wire, out: 0 })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        thread,
    };

    use super::*;
    use crate::sim::{Outage, Rate};

    const TIMEOUT: Duration = Duration::from_secs(1);

    fn read_all(rx: &mut SimRx) -> (usize, Option<io::ErrorKind>) {
        let (mut all, mut into) = (0, vec![0; 64 << 10]);
        loop {
            match rx.read(&mut into) {
                Ok(0) => return (all, None),
                Ok(n) => all += n,
                Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
                Err(e) => return (all, Some(e.kind())),
            }
        }
    }

    #[test]
    fn a_transfer_takes_its_time_and_is_measured() {
        let (mut connect, ends) = SimConnect::new(LinkShape::mbps(16.0, Duration::from_millis(10)));
        let near = connect.connect(TIMEOUT).unwrap();
        let (_tx, mut rx) = ends.recv().unwrap().split().unwrap();
        let gauge = near.gauge().unwrap();
        let reader = thread::spawn(move || read_all(&mut rx));
        let (mut tx, near_rx) = near.split().unwrap();
        let began = Instant::now();
        tx.write_all(&vec![5; 1_000_000]).unwrap();
        thread::sleep(Duration::from_millis(150));
        let reading = gauge.read().unwrap();
        assert_eq!((reading.delivered_bytes, reading.unacked_bytes), (1_000_000, 0));
        let rate = reading.delivery_bytes_per_s as f64;
        assert!((1.8e6..2.2e6).contains(&rate), "{reading:?}");
        assert!(reading.busy >= Duration::from_millis(500), "{reading:?}");
        drop((tx, near_rx));
        assert_eq!(reader.join().unwrap(), (1_000_000, None));
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(510), "{took:?}");
        assert!(took < Duration::from_millis(2000), "{took:?}");
        assert_eq!(connect.carried_bytes(), 1_000_000);
    }

    #[test]
    fn an_outage_breaks_links_and_ends() {
        let ms = Duration::from_millis;
        let mut shape = LinkShape::symmetric(Rate::mbps(8.0), Duration::ZERO);
        shape.outages.push(Outage { from: ms(100), until: ms(300) });
        let (mut connect, ends) = SimConnect::new(shape);
        let (mut tx, _rx) = connect.connect(TIMEOUT).unwrap().split().unwrap();
        let (_far_tx, mut far_rx) = ends.recv().unwrap().split().unwrap();
        let began = Instant::now();
        let error = tx.write_all(&vec![0; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let (got, why) = read_all(&mut far_rx);
        assert_eq!(why, Some(io::ErrorKind::ConnectionReset));
        assert!((50_000..=100_000).contains(&got), "{got}");
        connect.connect(ms(10)).unwrap_err();
        connect.connect(TIMEOUT).unwrap();
        assert!(began.elapsed() >= ms(190));
    }

    #[test]
    fn a_cut_lets_what_was_written_before_arrive() {
        let (mut connect, ends) = SimConnect::new(LinkShape::unlimited());
        connect.faults.push_back(Fault { cut_up: Some(1000), ..Fault::default() });
        connect.reachable_after = false;
        let (mut tx, _rx) = connect.connect(TIMEOUT).unwrap().split().unwrap();
        let (_far_tx, mut far_rx) = ends.recv().unwrap().split().unwrap();
        tx.write_all(&[0; 4000]).unwrap_err();
        assert_eq!(read_all(&mut far_rx), (1000, None));
        connect.connect(TIMEOUT).unwrap_err();
        assert_eq!(connect.links, 1);
    }
}
