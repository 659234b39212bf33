//! What somebody does at a desktop: writes, and now and then pushes the window aside.

use super::message::{key, pointer};
use crate::rng::Rng;

/// What is written, again and again.
const TEXT: &str = "the mahout sits on a howdah while the elephant walks from one village to the \
                    next and nobody spills a drop of tea ";
/// Characters of a line.
const LINE: u64 = 60;
/// Every so many things is a push of the window.
const PUSH: u64 = 16;
/// Where the recipe's window manager puts the editor's title bar, and how far it is pushed.
const TITLE: [u16; 2] = [300, 90];
const FAR: [u16; 2] = [160, 60];
/// Places of the pointer on the way.
const PLACES: u16 = 4;
/// The key of X11's keysym table that ends a line.
const RETURN: u32 = 0xff0d;

/// Somebody.
#[derive(Debug)]
pub(super) struct User {
    seed: u64,
    /// Whether the window is where it was pushed to.
    pushed: bool,
}

impl User {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, pushed: false }
    }

    /// The thing of this number, as it goes over the connection.
    pub(super) fn does(&mut self, seq: u64) -> Vec<u8> {
        if seq % PUSH == PUSH - 1 {
            return self.pushes();
        }
        let pressed = if seq % LINE == LINE - 2 { RETURN } else { self.letter(seq) };
        [key(pressed, true), key(pressed, false)].concat()
    }

    fn letter(&self, seq: u64) -> u32 {
        // Each seed begins elsewhere in the text.
        let from = Rng::of(&[self.seed, 0x74]).below(TEXT.len());
        let at = (from as u64 + seq) % TEXT.len() as u64;
        TEXT.as_bytes().get(at as usize).copied().unwrap_or(b' ').into()
    }

    fn pushes(&mut self) -> Vec<u8> {
        let there = [TITLE[0] + FAR[0], TITLE[1] + FAR[1]];
        let (from, to) = if self.pushed { (there, TITLE) } else { (TITLE, there) };
        self.pushed = !self.pushed;
        let between = |part: u16| {
            [0, 1].map(|axis| {
                let (from, to) = (i32::from(from[axis]), i32::from(to[axis]));
                let at = from + (to - from) * i32::from(part) / i32::from(PLACES);
                u16::try_from(at).unwrap_or(0)
            })
        };
        let mut bytes = pointer(false, from).to_vec();
        for part in 0..=PLACES {
            bytes.extend(pointer(true, between(part)));
        }
        bytes.extend(pointer(false, to));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_pushed_and_pushed_back() {
        let mut user = User::new(1);
        let (there, back) = (user.does(PUSH - 1), user.does(2 * PUSH - 1));
        assert_eq!(there[2..6], back[back.len() - 4..]);
        assert_eq!(there[there.len() - 4..], back[2..6]);
        assert_eq!(user.does(0).len(), 16);
        assert_eq!(user.does(LINE - 2)[6..8], [0xff, 0x0d]);
    }
}
