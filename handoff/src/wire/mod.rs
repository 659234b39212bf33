//! Bytes on the wire: frames `[length u32 LE][type u8][body]`, as `docs/protocol.md` has them.
//!
//! Everything that arrives is hostile. A decoder takes bytes and gives a [`Frame`] whose every size
//! was checked, or a [`WireError`]; after an error the link is given up.

mod decode;
mod frame;
mod io;
#[cfg(test)]
mod tests;

pub use decode::{Decoder, Torn, WireError, decode_body, encode};
pub use frame::{
    Ack, Agreed, Call, Commit, Frame, Hello, Intent, Prepare, Resumed, VERSION_EARLY_COMMIT,
    VERSION_MAX, VERSION_MIN, VERSION_REST, Versions, Welcome,
};
pub use io::{FrameReader, FrameWriter, ReadError, write_frame};

/// What every link of a handoff begins with, inside the first frame.
pub const MAGIC: [u8; 8] = *b"howdah/h";
/// What every other link begins with, inside the first frame.
pub const MAGIC_CALL: [u8; 8] = *b"howdah/c";
/// Bytes before a frame's body.
pub const HEADER_BYTES: usize = 5;
/// The longest body of any frame but Hello and Segment.
pub const MAX_CONTROL_BYTES: usize = 16 << 10;
/// The longest body of a Hello: it carries the machine's description.
pub const MAX_HELLO_BYTES: usize = 512 << 10;
/// The longest body of a Segment frame.
pub const MAX_SEGMENT_BYTES: usize = crate::stage::seal::MAX_SEGMENT_BYTES;
