//! Slower vCPUs, for a guest that changes its memory faster than a link takes it.
//!
//! A thread interrupts all vCPUs at the end of their share of each period and lets them go on at its
//! end. Interrupted, a vCPU waits outside KVM with no access to a device half done; whoever stops it
//! for good ends the wait.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// How often a throttled guest runs and waits: short enough for its timers and its network.
const PERIOD: Duration = Duration::from_millis(20);

/// Whether vCPUs may run, as they see it.
#[derive(Debug, Default)]
pub(crate) struct Brake {
    /// Looked at on every way out of KVM: no lock where nothing is throttled.
    held: AtomicBool,
    lock: Mutex<()>,
    released: Condvar,
}

impl Brake {
    /// Waits while the brake is held and the vCPU is not to stop for good.
    pub(crate) fn wait(&self, stop: &AtomicBool) {
        if !self.held.load(Ordering::Acquire) {
            return;
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.held.load(Ordering::Acquire) && !stop.load(Ordering::Acquire) {
            // A bound, so that no wake-up that is missed can hold a guest for longer.
            let waited = self.released.wait_timeout(guard, PERIOD);
            (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn hold(&self, held: bool) {
        self.held.store(held, Ordering::Release);
        if !held {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.released.notify_all();
        }
    }
}

/// Slows vCPUs down as long as it lives; dropped, they run at full speed.
#[derive(Debug)]
pub(crate) struct Throttle {
    brake: Arc<Brake>,
    over: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Lets vCPUs that wait at `brake` run for `run_share` of the time; `kick` makes them look at it.
    pub(crate) fn start(
        brake: Arc<Brake>,
        run_share: f64,
        kick: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        let run = PERIOD.mul_f64(run_share.clamp(0.0, 1.0));
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let (theirs, held) = (Arc::clone(&over), Arc::clone(&brake));
        let thread = std::thread::Builder::new().name("throttle".into()).spawn(move || {
            while !is_over(&theirs, run) {
                held.hold(true);
                kick();
                let ended = is_over(&theirs, PERIOD.saturating_sub(run));
                held.hold(false);
                if ended {
                    return;
                }
            }
        })?;
        Ok(Self { brake, over, thread: Some(thread) })
    }
}

/// Sleeps for `time` or until the throttle is over.
fn is_over((over, changed): &(Mutex<bool>, Condvar), time: Duration) -> bool {
    let over = over.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = changed.wait_timeout_while(over, time, |over| !*over);
    *waited.unwrap_or_else(PoisonError::into_inner).0
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let (over, changed) = &*self.over;
        *over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say; a panic in it has been printed.
            let _ = thread.join();
        }
        self.brake.hold(false);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering::Relaxed},
        time::Instant,
    };

    use super::*;

    /// Milliseconds of work that a thread gets done in `time` at the brake.
    fn work(brake: &Brake, time: Duration) -> u64 {
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < time {
            brake.wait(&AtomicBool::new(false));
            std::thread::sleep(Duration::from_millis(1));
            done += 1;
        }
        done
    }

    #[test]
    fn a_throttled_thread_does_its_share_and_then_all() {
        let brake = Arc::new(Brake::default());
        let kicks = Arc::new(AtomicU64::new(0));
        let kicked = Arc::clone(&kicks);
        let time = Duration::from_millis(400);
        let throttle = Throttle::start(Arc::clone(&brake), 0.25, move || {
            kicked.fetch_add(1, Relaxed);
        });
        let slow = work(&brake, time);
        drop(throttle.unwrap());
        let kicks_before = kicks.load(Relaxed);
        let full = work(&brake, time);
        assert!(slow > 0 && slow * 2 < full, "{slow} throttled, {full} not");
        assert!(kicks_before > 2 && kicks_before == kicks.load(Relaxed));
    }

    #[test]
    fn a_vcpu_that_is_to_stop_does_not_wait() {
        let brake = Brake::default();
        brake.hold(true);
        brake.wait(&AtomicBool::new(true));
    }
}
