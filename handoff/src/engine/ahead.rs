//! How much is ready for the link, and when a worker should make more.
//!
//! What is compressed waits for the link in the mode of when it was begun. On a link that is slower than the
//! workers, all that the pipeline has room for would wait so, and a link that changes would be met with
//! modes of seconds ago. So a worker takes its next body only when the link would run dry not long
//! after that body is ready: the link always has something to do, and the choice is as late as can be.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::status::TRUSTED_BYTES;
use crate::adapt::View;

/// The link should have work for so much longer than a body takes.
const MARGIN: Duration = Duration::from_millis(100);
/// A body may take so many times as long as those before it.
const SLOWER: f64 = 1.5;
/// How many bodies tell how long the next will take.
const RECENT: usize = 8;
/// A worker that waits looks again at least so often, and at most so often.
const LOOK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// What the courier says of the link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct LinkView {
    /// Bytes a second; none while that is not known.
    pub(super) bytes_per_s: Option<f64>,
    /// The shortest round trip seen.
    pub(super) rtt: Duration,
    /// Bytes of segments that the courier took and that have not reached the peer.
    pub(super) in_flight_bytes: u64,
}

/// What is between the workers and the link.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    link: LinkView,
    /// Bytes that are compressed and that the courier has not taken.
    waiting_bytes: u64,
    /// Bodies that are being compressed.
    making: u32,
    /// What the newest took, and what was left of them.
    recent: VecDeque<(Duration, u64)>,
    /// What the newest bodies took to be made before a worker had them, and their bytes.
    supplies: VecDeque<(Duration, usize)>,
    /// How long the mode takes that the next body may be in, if it is in time.
    lead: Duration,
    /// The guest waits, or everything is over: nothing is held back any more.
    open: bool,
}

impl State {
    fn supply_s_per_byte(&self) -> Option<f64> {
        let (took, bytes) = self
            .supplies
            .iter()
            .fold((0.0, 0), |sum, (took, bytes)| (sum.0 + took.as_secs_f64(), sum.1 + bytes));
        (self.supplies.len() == RECENT && bytes > 0).then(|| took / bytes as f64)
    }

    /// How long until a worker should look again; `None` if it may begin now.
    fn hold(&self) -> Option<Duration> {
        if self.open {
            return None;
        }
        let Some(rate) = self.link.bytes_per_s.filter(|rate| *rate > 0.0) else {
            // Enough to get to know the link with; the rest is for the mode that fits it.
            let ready = self.waiting_bytes + self.link.in_flight_bytes;
            return (ready >= TRUSTED_BYTES).then_some(LOOK.0);
        };
        let count = self.recent.len() as u64;
        let slowest = self.recent.iter().map(|(took, _)| *took).max()?;
        let each = self.recent.iter().map(|(_, bytes)| bytes).sum::<u64>() / count.max(1);
        let ready = self.waiting_bytes + self.link.in_flight_bytes + u64::from(self.making) * each;
        // What is on the wire is not there for the link to send.
        let dry_in = ready as f64 / rate - self.link.rtt.as_secs_f64();
        let takes = (slowest.as_secs_f64() * SLOWER).max(self.lead.as_secs_f64());
        let needed = takes + MARGIN.as_secs_f64();
        let wait = Duration::try_from_secs_f64(dry_in - needed).ok()?;
        (!wait.is_zero()).then(|| wait.clamp(LOOK.0, LOOK.1))
    }
}

impl Ahead {
    fn state(&self) -> MutexGuard<'_, State> {
        // Numbers that are a little wrong do no harm.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next job when it is time for one. `idle` is called whenever there is nothing to do
    /// meanwhile. None when there are no more jobs.
    pub(super) fn next<T>(&self, jobs: &Receiver<T>, mut idle: impl FnMut()) -> Option<T> {
        loop {
            let mut state = self.state();
            match state.hold() {
                None => state.making += 1,
                Some(wait) => {
                    drop(state);
                    idle();
                    let state = self.state();
                    drop(self.changed.wait_timeout(state, wait));
                    continue;
                }
            }
            drop(state);
            let job = match jobs.try_recv() {
                Ok(job) => Ok(job),
                Err(_) => {
                    idle();
                    jobs.recv_timeout(LOOK.1)
                }
            };
            match job {
                Ok(job) => return Some(job),
                Err(e) => {
                    self.state().making -= 1;
                    if e == RecvTimeoutError::Disconnected {
                        return None;
                    }
                }
            }
        }
    }

    /// A job that was taken is done: what it took and what came out, if it was a body.
    pub(super) fn made(&self, body: Option<(Duration, u64)>) {
        let mut state = self.state();
        state.making = state.making.saturating_sub(1);
        if let Some((took, bytes)) = body {
            state.waiting_bytes += bytes;
            state.recent.push_back((took, bytes));
            if state.recent.len() > RECENT {
                state.recent.pop_front();
            }
        }
    }

    /// A body of so many bytes took so long to be made, without waiting for room.
    pub(super) fn supplied(&self, took: Duration, bytes: usize) {
        let mut state = self.state();
        state.supplies.push_back((took, bytes));
        if state.supplies.len() > RECENT {
            state.supplies.pop_front();
        }
    }

    /// The courier took so many bytes.
    pub(super) fn taken(&self, bytes: u64) {
        let mut state = self.state();
        state.waiting_bytes = state.waiting_bytes.saturating_sub(bytes);
    }

    /// How the link stands now.
    pub(super) fn link(&self, link: LinkView) {
        let mut state = self.state();
        let held = state.hold().is_some();
        state.link = link;
        let held = held && state.hold().is_some();
        drop(state);
        if !held {
            self.changed.notify_all();
        }
    }

    /// The next body may take so long.
    pub(super) fn lead(&self, takes: Duration) {
        self.state().lead = takes;
    }

    /// From now on nothing is held back.
    pub(super) fn open(&self) {
        self.state().open = true;
        self.changed.notify_all();
    }

    /// What an adapter is told, for a body of so many bytes.
    pub(super) fn view(&self, body_bytes: usize, queued_bodies: usize, workers: usize) -> View {
        let state = self.state();
        View {
            body_bytes,
            queued_bodies,
            in_flight_bytes: state.waiting_bytes + state.link.in_flight_bytes,
            link_bytes_per_s: state.link.bytes_per_s,
            rtt: state.link.rtt,
            workers,
            supply_s_per_byte: state.supply_s_per_byte(),
            paused: state.open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn link(in_flight_bytes: u64) -> LinkView {
        LinkView { bytes_per_s: Some(1e6), rtt: 50 * MS, in_flight_bytes }
    }

    /// Bodies of 100 ms, which leave 200 kB each, over a link of 1 MB/s.
    fn working() -> Ahead {
        let ahead = Ahead::default();
        for _ in 0..20 {
            ahead.made(Some((100 * MS, 200_000)));
            ahead.taken(200_000);
        }
        assert_eq!(ahead.state().recent.len(), RECENT);
        ahead
    }

    #[test]
    fn a_link_that_is_not_known_gets_enough_to_be_known_and_no_more() {
        let ahead = Ahead::default();
        ahead.made(Some((100 * MS, TRUSTED_BYTES / 2)));
        assert_eq!(ahead.state().hold(), None);
        ahead.link(LinkView { bytes_per_s: None, ..link(TRUSTED_BYTES) });
        assert!(ahead.state().hold().is_some());
        ahead.taken(TRUSTED_BYTES / 2);
        ahead.link(LinkView { bytes_per_s: None, ..link(TRUSTED_BYTES - 1) });
        assert_eq!(ahead.state().hold(), None, "some of it got through");
        ahead.link(LinkView { bytes_per_s: None, ..link(1 << 30) });
        ahead.open();
        assert_eq!(ahead.state().hold(), None, "the guest waits");
    }

    #[test]
    fn a_body_is_begun_when_it_will_be_needed() {
        let ahead = working();
        // 150 ms for the body, 100 ms of margin, 50 ms on the wire: from 300 ms on it can wait.
        ahead.link(link(290_000));
        assert_eq!(ahead.state().hold(), None);
        ahead.link(link(310_000));
        assert!(ahead.state().hold().is_some_and(|wait| wait < 11 * MS));
        ahead.link(link(100_000));
        ahead.state().making = 1;
        assert_eq!(ahead.state().hold(), None, "one is being made: two are needed");
        ahead.state().making = 2;
        assert!(ahead.state().hold().is_some());
        ahead.open();
        assert_eq!(ahead.state().hold(), None, "the guest waits");
    }

    #[test]
    fn what_waits_counts_until_it_is_taken() {
        let ahead = working();
        ahead.made(Some((100 * MS, 200_000)));
        ahead.link(link(200_000));
        assert!(ahead.state().hold().is_some());
        let view = ahead.view(1000, 3, 2);
        assert_eq!((view.in_flight_bytes, view.queued_bodies), (400_000, 3));
        assert_eq!(view.supply_s_per_byte, None);
        (0..RECENT).for_each(|_| ahead.supplied(100 * MS, 500_000));
        assert_eq!(ahead.view(1000, 3, 2).supply_s_per_byte, Some(2e-7));
        ahead.taken(200_000);
        assert_eq!(ahead.state().hold(), None);
    }

    #[test]
    fn a_worker_that_waits_goes_on_when_there_is_room_and_ends_with_the_jobs() {
        let ahead = working();
        ahead.link(link(10_000_000));
        let (jobs, jobs_rx) = crossbeam_channel::bounded(2);
        jobs.send(7).unwrap();
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                let mut idle = 0;
                let job = ahead.next(&jobs_rx, || idle += 1);
                ahead.made(None);
                (job, idle > 0, ahead.next(&jobs_rx, || ()))
            });
            std::thread::sleep(20 * MS);
            assert!(!worker.is_finished());
            ahead.link(link(0));
            drop(jobs);
            assert_eq!(worker.join().unwrap(), (Some(7), true, None));
        });
        assert_eq!(ahead.state().making, 0);
    }
}
