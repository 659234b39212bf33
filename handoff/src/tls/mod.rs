//! Links that are encrypted, and whose ends know each other: TLS 1.3 between two pinned keys.
//!
//! ```text
//! TcpStream ─ handshake (rustls) ─► PeerKey, Session ─► TlsLink = a link + a Session
//!                                             │
//!                                             └─ bytes: another process goes on with the link
//! ```
//!
//! A cloudlet is its key: Ed25519, sent as it is (RFC 7250), named by the SHA-256 of its
//! SubjectPublicKeyInfo. There are no certificates, no authorities and no names to check. Nothing is
//! resumed and nothing is sent early, so that no byte of a link is of use on another one.
//!
//! The handshake is rustls's; what it agreed on becomes a [`Session`], whose halves seal and open
//! records by themselves: one thread sends while another receives, and a link can be handed to another
//! process. ADR 0021 has the reasons.

mod dial;
mod handshake;
mod key;
mod link;
mod record;
#[cfg(test)]
mod tests;
mod verify;

pub use dial::TlsConnect;
pub use handshake::{
    Handshake, MAX_HANDSHAKE_BYTES, Speech, TlsError, accept, accept_for, connect, connect_for,
};
pub use key::{Identity, IdentityError, PeerKey, PeerKeyError};
pub use link::{Guarded, GuardedRx, GuardedTx, TlsLink, TlsRx, TlsTx};
pub use record::{Session, SessionError};
