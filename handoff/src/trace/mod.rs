//! Traces: which chunks of a guest changed when, and to what, so that the real engine can be driven
//! by a recorded guest without KVM, as often as needed and each time the same.
//!
//! A [`Trace`] has what the guest differed in from its base when recording began, and from then on
//! every change with its time. A [`TraceVm`] plays it in real time as a [`SourceVm`](crate::SourceVm);
//! its [`TraceBase`] holds what of the base the guest's chunks were or referred to. [`synth`] makes
//! traces of known content.

mod base;
mod build;
mod contents;
pub mod file;
pub mod play;
mod player;
pub mod record;
mod summary;
pub mod synth;

use std::{sync::Arc, time::Duration};

pub use base::TraceBase;
pub use build::{BuildError, TraceBuilder};
pub use contents::{ContentId, Contents};
pub use player::{Play, TraceVm};
pub use summary::{Summary, Window};

use crate::{ChunkId, Geometry};

/// A change: the chunk has this content from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// When, counted from the begin of the recording.
    pub at: Duration,
    /// Which chunk.
    pub id: ChunkId,
    /// What it holds then.
    pub content: ContentId,
}

/// A guest's changes over a time.
#[derive(Clone, Debug)]
pub struct Trace {
    pub(crate) geometry: Geometry,
    pub(crate) duration: Duration,
    pub(crate) base: Arc<TraceBase>,
    pub(crate) initial: Vec<(ChunkId, ContentId)>,
    pub(crate) changes: Vec<Change>,
}

impl Trace {
    /// Sizes of RAM and disk.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// How long was recorded.
    pub fn duration(&self) -> Duration {
        self.duration
    }

    /// What both ends hold before.
    pub fn base(&self) -> &Arc<TraceBase> {
        &self.base
    }

    /// All contents that occur.
    pub fn contents(&self) -> &Contents {
        self.base.contents()
    }

    /// What differed from base when recording began: each chunk once, in order.
    pub fn initial(&self) -> &[(ChunkId, ContentId)] {
        &self.initial
    }

    /// What changed, in the order of time.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}
