//! The source's half of the protocol, without I/O and without a clock.

/// Bytes of segments that may be unacknowledged.
pub const DEFAULT_WINDOW_BYTES: u64 = 8 << 20;
