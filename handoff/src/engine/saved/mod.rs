//! A VM in a file: the stream of a handoff, written down.
//!
//! [`save`] writes what makes a paused VM differ from its base; [`restore`] makes a VM of that and
//! the same base, on any cloudlet and any number of times; [`inspect`] says what is in it. A file
//! that was cut off or altered never becomes a VM.

mod format;
mod inspect;
mod restore;
mod save;

use std::io;

pub use inspect::{CodecTally, Inspection, Tally, inspect};
pub use restore::{RestoreError, Restored, restore};
pub use save::{SaveError, SaveReport, Saved, save};

use crate::{
    StateRoot,
    stage::{BatchError, DecompressError, OpenError, SegmentError},
};

/// Why bytes are not a saved VM.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// They could not be read.
    #[error("cannot read the saved VM: {0}")]
    Io(io::Error),
    /// They end too early.
    #[error("the saved VM ends {0}: it was cut off")]
    CutOff(&'static str),
    /// They are something else, or of a version that this program does not know.
    #[error("not a saved VM of a version up to {version}: it begins with {0:02x?}", version = format::VERSION)]
    Magic([u8; 12]),
    /// The head cannot be what was written.
    #[error("the head of the saved VM was altered: {0}")]
    Head(&'static str),
    /// A record of unknown kind or impossible size.
    #[error("record {number} of the saved VM was altered: kind {kind}, {length} bytes")]
    Record {
        /// Its number, from 1.
        number: u64,
        /// Its kind.
        kind: u8,
        /// The length it claims.
        length: u32,
    },
    /// A record that is no segment.
    #[error("a record of the saved VM was altered: {0}")]
    Segment(#[from] SegmentError),
    /// A segment that does not continue those before it.
    #[error("the saved VM was altered: {0}")]
    Open(#[from] OpenError),
    /// The end is not the end of these segments.
    #[error("the end of the saved VM does not go with the rest: it was altered")]
    End,
    /// There is more behind the end.
    #[error("there are bytes behind the end of the saved VM")]
    Trailing,
    /// A segment that cannot be decompressed.
    #[error("segment {seq} of the saved VM: {source}")]
    Decompress {
        /// Its number.
        seq: u64,
        /// Why not.
        source: DecompressError,
    },
    /// A segment that is no batch.
    #[error("segment {seq} of the saved VM: {source}")]
    Batch {
        /// Its number.
        seq: u64,
        /// Why not.
        source: BatchError,
    },
    /// More machine state than any machine has.
    #[error("the saved VM has more than {most} bytes of machine state", most = super::MAX_MACHINE_STATE_BYTES)]
    State,
    /// What came out is not what was saved.
    #[error("RAM and disk have root {found}, the saved VM says {said}")]
    Root {
        /// What the file says.
        said: StateRoot,
        /// What was found.
        found: StateRoot,
    },
}

impl SavedError {
    /// An error of reading, at a place that has a name.
    fn reading(e: io::Error, at: &'static str) -> Self {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => Self::CutOff(at),
            _ => Self::Io(e),
        }
    }
}
