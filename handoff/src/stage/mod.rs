//! The stages between a chunk read at the source and a chunk written at the target.
//!
//! ```text
//!            source                                  target
//! classify   Classifier  chunk -> Decision           Resolver  step -> chunk written, hashed
//! delta      DeltaStage  data -> delta               apply()   delta -> data
//! pack       BatchBuilder steps -> body              Batch     body -> steps
//! compress   Compressor  body -> payload             Decompressor  payload -> body
//! seal       Sealer      payload -> Segment          Opener    Segment -> payload
//! ```
//!
//! Each module holds one stage forward and in reverse, so that a stage is added or removed in one
//! place; [`Outbound`] is the first three of the source as one. None does I/O but to read the base;
//! none has a thread of its own, nor a clock but that of the CPU time it uses.

mod buffers;
pub mod classify;
mod codec;
pub mod compress;
pub mod delta;
mod delta_cache;
pub mod forecast;
pub mod inspect;
pub mod mode;
pub mod options;
pub mod outbound;
pub mod pack;
mod pack_codec;
mod pack_run;
pub mod repeats;
pub mod resolve;
pub mod seal;
pub mod stats;
#[cfg(test)]
mod tests;
mod write_group;

pub use buffers::Buffers;
pub use classify::{Classifier, ClassifyError, Decision, Op};
pub use compress::{CompressError, Compressor, DecompressError, Decompressor, Packed};
pub use delta::{DeltaCodec, DeltaError, DeltaMode, UnknownDeltaMode};
pub use delta_cache::SentCache;
pub use forecast::Forecast;
pub use inspect::{Inspected, Inspector};
pub use mode::{Codec, Mode, UnknownMode};
pub use options::{StageOptions, UnknownSwitch};
pub use outbound::Outbound;
pub use pack::{Batch, BatchBuilder, BatchError, BatchFull, BatchLimits, RawBatch, Step, What};
pub use repeats::Repeats;
pub use resolve::{Applied, ResolveError, Resolver};
pub use seal::{
    Mark, OpenError, Opener, SEGMENT_OVERHEAD, Sealer, Segment, SegmentError, SegmentKind,
    Unchecked,
};
pub use stats::{Class, CpuWatch, Share, SharedShare, Stage, Stats, thread_cpu_ns};
