//! The client outside: asks an application all the time, and notes what becomes of each request.
//!
//! Requests are due at a fixed rate. One that is due while as many as are allowed are outstanding
//! is not sent, and counted as skipped: a user does not point the camera at everything that was
//! missed. A connection is kept for as long as the system keeps it, silence included; only when it
//! broke is another one made, and what was outstanding on it is lost.

mod application;
mod films;
mod framed;
mod rfb;
mod run;
mod wire;

pub(crate) use application::Judged;
pub use application::{Application, UnknownApplication};
pub use films::{Films, FilmsError};
pub use run::{ClientError, Options, run};
