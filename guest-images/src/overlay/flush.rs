//! Making the overlay durable, in the order that the [module](super) argues for.

use std::{
    os::unix::fs::FileExt,
    sync::{Arc, PoisonError, atomic::Ordering},
};

use super::{DATA_FILE, MAP_FILE, MapPage, Overlay, OverlayError};

/// Map pages on their way to disk: one flush, for a device that does its own I/O.
///
/// The holder syncs [`Overlay::data_fd`], *then* writes [`DirtyMap::pages`] to [`Overlay::map_fd`],
/// then syncs that, then calls [`DirtyMap::done`]. Dropped earlier, the pages are dirty again and
/// the next flush writes them. After a failed sync it calls [`DirtyMap::sync_failed`].
#[derive(Debug)]
#[must_use = "dropping it gives the flush up"]
pub struct DirtyMap {
    overlay: Arc<Overlay>,
    pages: Vec<MapPage>,
}

impl DirtyMap {
    /// The pages to write; empty if no state changed since the last flush, and then only the data
    /// need be synced. They stay in place as long as this value lives.
    pub fn pages(&self) -> &[MapPage] {
        &self.pages
    }

    /// The whole order was kept and everything succeeded.
    pub fn done(mut self) {
        self.pages.clear();
    }

    /// A sync failed: this and every later flush of the overlay fails, since the kernel reports a
    /// lost write only once.
    pub fn sync_failed(self) {
        self.overlay.sync_lost.store(true, Ordering::Release);
    }
}

impl Drop for DirtyMap {
    fn drop(&mut self) {
        self.overlay.end_flush(&self.pages);
    }
}

impl Overlay {
    /// Takes the map's dirty pages, which begins a flush. Call it *before* the data is synced, and
    /// only when every write that the flush is to cover has completed and been marked.
    pub fn take_dirty_map(self: &Arc<Self>) -> Result<DirtyMap, OverlayError> {
        let pages = self.begin_flush()?;
        Ok(DirtyMap { overlay: Arc::clone(self), pages })
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> Result<(), OverlayError> {
        // The lock guards no data: a thread that panicked with it left nothing half done.
        let _turn = self.flush_turn.lock().unwrap_or_else(PoisonError::into_inner);
        let pages = self.begin_flush()?;
        let written = self.write_durably(&pages);
        self.end_flush(if written.is_ok() { &[] } else { &pages });
        written
    }

    fn write_durably(&self, pages: &[MapPage]) -> Result<(), OverlayError> {
        let lost = |error| {
            self.sync_lost.store(true, Ordering::Release);
            error
        };
        self.data.sync_data().map_err(self.io("syncing", DATA_FILE)).map_err(lost)?;
        if pages.is_empty() {
            return Ok(());
        }
        for page in pages {
            self.map_file
                .write_all_at(&page.bytes, page.file_offset)
                .map_err(self.io("writing", MAP_FILE))?;
        }
        self.map_file.sync_data().map_err(self.io("syncing", MAP_FILE)).map_err(lost)
    }

    /// Two flushes at once could write an older copy of a page over a newer one, so there is one.
    fn begin_flush(&self) -> Result<Vec<MapPage>, OverlayError> {
        self.check_sync()?;
        if self.flush_running.swap(true, Ordering::AcqRel) {
            return Err(OverlayError::FlushRunning);
        }
        Ok(self.map.take_dirty())
    }

    fn end_flush(&self, unwritten: &[MapPage]) {
        self.map.restore_dirty(unwritten);
        self.flush_running.store(false, Ordering::Release);
    }
}
