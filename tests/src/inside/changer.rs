//! A link that changes by itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::net::Network;
use crate::scenario::LinkPlan;

/// Changes the link while time goes on; leaves it as it is when dropped.
pub(super) struct Changer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Changer {
    /// Begins now.
    pub(super) fn start(plan: &LinkPlan, network: Arc<Network>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, plan) = (Arc::clone(&stop), plan.clone());
        let thread = thread::spawn(move || {
            let started = Instant::now();
            let mut link = plan.at_first();
            for change in &plan.changes {
                while started.elapsed().as_secs_f64() < change.at_s {
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
                link = change.apply(link);
                if let Err(error) = network.shape(link) {
                    eprintln!("lab: cannot change the link: {error:#}");
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Changer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to hand back.
            let _ = thread.join();
        }
    }
}
