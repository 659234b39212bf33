//! The applications of the measuring room.
//!
//! A guest that is handed off matters because somebody uses it. These are the paper's users: each
//! application has a server in the guest and a client outside, which sends it real requests
//! before, during and after a handoff, and tells what a user would have noticed.
//!
//! ```text
//!   guest                                          outside
//!   fluid    howdah-app fluid serve      (Rust)    howdah-app client --application fluid
//!   faces  ┐                                       readings, pictures: functions of a seed
//!   ar     ├ vision server     (OpenCV, Python)    ◄── frames over TCP, each with its number
//!   detect ┘                                       a line of JSON a request, a summary
//!   desktop  Xvnc, a window manager, an editor     ◄── RFB: keys, drags, pixels
//! ```
//!
//! All but the desktop speak the same framed protocol ([`frame`]). What a client sends follows from
//! a seed alone ([`inputs`]), so that two runs, and two systems under comparison, get the same
//! work; and since the client knows what it drew, it can tell a right answer from a wrong one.
//! The fluid is a function of its readings: after the run the client computes it once more and
//! compares every frame, so that a guest that was moved is shown to have computed what one that
//! stood still would have.
//!
//! [`summary`] makes of a client's lines what a handoff did to its user; the lab uses it for every
//! system alike. Nothing here knows how a guest is moved.

pub mod client;
pub mod fluid;
pub mod frame;
pub mod inputs;
mod progress;
pub mod record;
mod rng;
pub mod summary;

pub use progress::Progress;

/// Where an application in a guest listens, the desktop excepted.
pub const PORT: u16 = 7790;
/// Where the desktop listens: RFB's own port.
pub const DESKTOP_PORT: u16 = 5900;
