//! Making completed writes durable, many requests at a time.
//!
//! One flush runs at once, in the order that the overlay demands: sync the data, write the map's
//! dirty pages, sync the map. Requests that come while one runs cannot be covered by it, as it may
//! have synced already; they share the next.

use std::{io, os::fd::AsRawFd, sync::Arc};

use guest_images::overlay::{DirtyMap, Overlay, OverlayError};

use uring::Action;

use super::ring::{Operation, Ring, Token};
use crate::devices::complaints::Complaints;

enum Step {
    SyncData,
    WriteMap { left: usize },
    SyncMap,
}

struct Running {
    map: DirtyMap,
    step: Step,
    /// The first failure, and whether it was a sync's.
    failed: Option<(io::Error, bool)>,
    members: Vec<usize>,
}

/// The flush that runs and those that wait for the next.
#[derive(Default)]
pub(super) struct Flusher {
    running: Option<Running>,
    waiting: Vec<usize>,
    failures: Complaints,
}

/// Requests whose flush has ended, and whether it succeeded.
pub(super) struct Ended {
    pub(super) members: Vec<usize>,
    pub(super) durable: bool,
}

impl Flusher {
    /// Adds a request to the next flush.
    pub(super) fn join(&mut self, request: usize) {
        self.waiting.push(request);
    }

    /// Begins the next flush if none runs and requests wait. Returns those that ended at once.
    pub(super) fn start(&mut self, overlay: &Arc<Overlay>, ring: &mut Ring) -> Option<Ended> {
        if self.running.is_some() || self.waiting.is_empty() {
            return None;
        }
        let members = std::mem::take(&mut self.waiting);
        // Before the sync: the pages must name only data that the sync covers.
        match overlay.take_dirty_map() {
            Ok(map) => {
                sync(ring, overlay.data_fd().as_raw_fd());
                let step = Step::SyncData;
                self.running = Some(Running { map, step, failed: None, members });
                None
            }
            // Someone else makes the overlay durable right now: wait, as this thread may.
            Err(OverlayError::FlushRunning) => {
                Some(Ended { members, durable: self.report(overlay.flush()) })
            }
            Err(error) => Some(Ended { members, durable: self.report(Err(error)) }),
        }
    }

    /// An operation of the running flush ended. Returns the requests that are answered by it.
    pub(super) fn advance(
        &mut self,
        overlay: &Overlay,
        ring: &mut Ring,
        result: io::Result<()>,
    ) -> Option<Ended> {
        let running = self.running.as_mut()?;
        if let Err(error) = result {
            let was_sync = !matches!(running.step, Step::WriteMap { .. });
            running.failed.get_or_insert((error, was_sync));
        }
        match &mut running.step {
            Step::SyncData if running.failed.is_none() && !running.map.pages().is_empty() => {
                let file = overlay.map_fd().as_raw_fd();
                let mut left = 0;
                for page in running.map.pages() {
                    let bytes = page.bytes.clone().into_boxed_slice();
                    let write = Operation::write_owned(Token::Flush, file, page.file_offset, bytes);
                    // SAFETY: the memory is the operation's own, and the device keeps the overlay
                    // with its files for as long as its ring.
                    unsafe { ring.push(write) };
                    left += 1;
                }
                running.step = Step::WriteMap { left };
                return None;
            }
            Step::WriteMap { left } if *left > 1 => {
                *left -= 1;
                return None;
            }
            Step::WriteMap { .. } if running.failed.is_none() => {
                sync(ring, overlay.map_fd().as_raw_fd());
                running.step = Step::SyncMap;
                return None;
            }
            Step::SyncData | Step::WriteMap { .. } | Step::SyncMap => {}
        }
        self.running.take().map(|running| running.end(&self.failures))
    }

    /// Whether it was durable; tells why not.
    fn report(&self, result: Result<(), OverlayError>) -> bool {
        if let Err(error) = &result
            && let Some(times) = self.failures.due()
        {
            tracing::error!(%error, times, "flush of the disk failed");
        }
        result.is_ok()
    }

    /// Forgets the running flush, which the caller has stopped, and who waits. Its map pages are
    /// dirty again.
    pub(super) fn abandon(&mut self) {
        self.running = None;
        self.waiting.clear();
    }
}

impl Running {
    fn end(self, failures: &Complaints) -> Ended {
        let durable = self.failed.is_none();
        match self.failed {
            None => self.map.done(),
            Some((error, was_sync)) => {
                if let Some(times) = failures.due() {
                    tracing::error!(%error, was_sync, times, "flush of the disk failed");
                }
                if was_sync {
                    self.map.sync_failed();
                }
                // Otherwise dropping the map makes its pages dirty again.
            }
        }
        Ended { members: self.members, durable }
    }
}

fn sync(ring: &mut Ring, file: i32) {
    // SAFETY: there is no memory, and the device keeps the overlay with its files for as long as its
    // ring.
    unsafe { ring.push(Operation::plain(Token::Flush, file, Action::Sync)) };
}
