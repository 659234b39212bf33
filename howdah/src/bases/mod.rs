//! Bases between cloudlets: what the commands and the API do, and what the listener does for a caller.
//!
//! ```text
//! push, pull, heal ─ peers::call("bases") ═══ TLS ═══ receive::listener ─► serve ─ peer's rights, quota, room
//!        └────────────────────── base_sync: one gives, one takes ──────────────────────┘
//! ```

mod guard;
mod ops;
mod serve;

pub(crate) use guard::allocated_bytes;
pub(crate) use ops::{Watch, check_name, find, heal, pull, push};
pub(crate) use serve::{Bounds, Session, serve};

use handoff::wire::Versions;

/// What a link is called for.
pub(crate) const SERVICE: &str = "bases";
/// The versions of that which are spoken here.
pub(crate) const VERSIONS: Versions = Versions { min: 1, max: 1 };
