//! Somebody at a desktop: types into an editor, moves its window, and watches the pixels.
//!
//! A request is one thing that a hand does; its answer is the first update of the screen in which a
//! pixel is another one. The next is done only once the screen has been still for a moment, so
//! that the rest of one reaction is not taken for the next; a desktop without a blinking cursor or
//! a clock is still by itself.

mod message;
mod screen;
mod user;

use self::{
    message::{Expected, Said},
    screen::Screen,
    user::User,
};
use super::{
    application::{Heard, Judged, Problem, Talk},
    wire::Wire,
};

/// How long a screen must be still before the next thing is done.
const STILL_NS: i64 = 80_000_000;

/// A viewer and who sits before it.
pub(super) struct Desktop {
    user: User,
    expected: Expected,
    bytes: Vec<u8>,
    screen: Option<Screen>,
    /// Whether the screen has been painted once.
    painted: bool,
    changed_ns: i64,
    open: Option<u64>,
}

impl Desktop {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            user: User::new(seed),
            expected: Expected::Version,
            bytes: Vec::new(),
            screen: None,
            painted: false,
            changed_ns: 0,
            open: None,
        }
    }

    /// Says what comes next in the greeting, or takes an update.
    fn take(&mut self, said: Said, wire: &mut Wire) -> Result<bool, Problem> {
        match said {
            Said::Version => {
                wire.queue(message::version());
                self.expected = Expected::Security;
            }
            Said::Security => {
                wire.queue(&message::security());
                self.expected = Expected::Welcome;
            }
            Said::Welcome => {
                wire.queue(&message::shared());
                self.expected = Expected::Screen;
            }
            Said::Screen { width, height } => {
                wire.queue(&message::formats());
                wire.queue(&message::request(false, width, height));
                self.screen = Some(Screen::new(width, height));
                self.expected = Expected::Message;
            }
            Said::Update(areas) => {
                let screen = self.screen.as_mut();
                let screen = screen.ok_or_else(|| Problem("an update of no screen".to_owned()))?;
                let mut changed = false;
                for (area, content) in &areas {
                    changed |= screen.apply(*area, content)?;
                }
                wire.queue(&message::request(true, screen.width, screen.height));
                self.painted = true;
                return Ok(changed);
            }
            Said::Other => {}
        }
        Ok(false)
    }
}

impl Talk for Desktop {
    fn connected(&mut self, _: &mut Wire) {
        self.expected = Expected::Version;
        self.bytes.clear();
        self.screen = None;
        self.painted = false;
        self.open = None;
    }

    fn ready(&self, now_ns: i64) -> bool {
        self.painted && self.open.is_none() && now_ns - self.changed_ns >= STILL_NS
    }

    fn ask(&mut self, seq: u64, _: i64, wire: &mut Wire) -> Result<u64, Problem> {
        let bytes = self.user.does(seq);
        wire.queue(&bytes);
        self.open = Some(seq);
        Ok(bytes.len() as u64)
    }

    fn hear(&mut self, came: &[u8], now_ns: i64, wire: &mut Wire) -> Result<Vec<Heard>, Problem> {
        self.bytes.extend_from_slice(came);
        let (mut heard, mut taken) = (Vec::new(), 0);
        loop {
            let rest = self.bytes.get(taken..).unwrap_or_default();
            let Some((said, length)) = message::read(rest, self.expected)? else { break };
            taken += length;
            if !self.take(said, wire)? {
                continue;
            }
            self.changed_ns = now_ns;
            if let Some(seq) = self.open.take() {
                let mark = self.screen.as_ref().map(Screen::digest);
                let judged = Ok(Judged { right: None, mark });
                heard.push(Heard { seq, bytes: length as u64, judged });
            }
        }
        self.bytes.drain(..taken);
        Ok(heard)
    }
}

#[cfg(test)]
mod tests;
