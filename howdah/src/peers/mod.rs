//! Other cloudlets: who they are, and what they may do.
//!
//! ```text
//! HOME/identity      this cloudlet's key pair, made when it is first needed; for its owner alone
//! HOME/peers.json    the keys of others, with their names, addresses and rights
//! ```
//!
//! A peer is its key. Names and addresses are for people and for finding it; rights hang on the key.
//! Rights are asked when a handoff begins; one that began is finished between the same two keys.

mod book;
mod call;
mod dial;
mod endpoint;
mod gate;
mod identity;
mod quota;
mod refusals;
mod remote;
mod stream;

pub(crate) use book::{Book, BookFile, Peer, Right, Rights, name_all, now};
pub(crate) use call::{Line, call};
pub(crate) use dial::Dial;
use endpoint::named;
pub(crate) use endpoint::{Endpoint, check_address, resolve, resolve_for};
pub(crate) use gate::{Gate, Turned, bind, last_word, unknown_key};
pub(crate) use identity::identity;
pub(crate) use quota::{Limits as QuotaLimits, Place, Quota};
pub(crate) use refusals::Refusals;
pub(crate) use remote::Remote;
pub(crate) use stream::Stream;
