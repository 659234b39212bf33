//! What goes over an RFB connection (RFC 6143), as far as a viewer without extensions needs it.

use std::ops::Range;

use super::Problem;

/// Widest and highest screen.
const MAX_SIDE: u16 = 4096;
const MAX_TEXT_BYTES: u32 = 1 << 20;
/// Bytes of a pixel in the format that we ask for: 0x00RRGGBB, little endian.
pub(super) const PIXEL_BYTES: usize = 4;

const VERSION: &[u8; 12] = b"RFB 003.008\n";
const SECURITY_NONE: u8 = 1;
const RAW: i32 = 0;
const COPY: i32 = 1;

/// Part of a screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) x: u16,
    pub(super) y: u16,
    pub(super) width: u16,
    pub(super) height: u16,
}

impl Area {
    pub(super) fn columns(&self) -> Range<usize> {
        usize::from(self.x)..usize::from(self.x) + usize::from(self.width)
    }

    pub(super) fn rows(&self) -> Range<usize> {
        usize::from(self.y)..usize::from(self.y) + usize::from(self.height)
    }
}

/// New content of an area.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    /// Pixels, row by row.
    Raw(Vec<u8>),
    /// What is on the screen from this place on.
    Copy { x: u16, y: u16 },
}

/// What a server says, greeting included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    Version,
    /// It lets us in without a password.
    Security,
    Welcome,
    Screen {
        width: u16,
        height: u16,
    },
    Update(Vec<(Area, Content)>),
    /// A bell, a text to paste: nothing for us.
    Other,
}

/// What is to be read next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    Version,
    Security,
    Welcome,
    Screen,
    Message,
}

enum Stop {
    /// Not all of it is there yet.
    More,
    Bad(String),
}

/// Reads one thing from the beginning of what came; None if it is not whole yet.
pub(super) fn read(bytes: &[u8], expected: Expected) -> Result<Option<(Said, usize)>, Problem> {
    let mut rest = Rest(bytes);
    let said = match expected {
        Expected::Version => rest.version(),
        Expected::Security => rest.security(),
        Expected::Welcome => rest.welcome(),
        Expected::Screen => rest.screen(),
        Expected::Message => rest.message(),
    };
    match said {
        Ok(said) => Ok(Some((said, bytes.len() - rest.0.len()))),
        Err(Stop::More) => Ok(None),
        Err(Stop::Bad(problem)) => Err(Problem(problem)),
    }
}

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Stop::More)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Stop::More)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, Stop> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_be_bytes)
    }

    fn text(&mut self) -> Result<String, Stop> {
        let length = self.u32()?;
        if length > MAX_TEXT_BYTES {
            return Err(Stop::Bad(format!("a text of {length} bytes: {MAX_TEXT_BYTES} at most")));
        }
        Ok(String::from_utf8_lossy(self.take(length as usize)?).into_owned())
    }

    fn version(&mut self) -> Result<Said, Stop> {
        let version: [u8; 12] = self.array()?;
        if !version.starts_with(b"RFB ") {
            return Err(Stop::Bad("no RFB server: it greets otherwise".to_owned()));
        }
        if version < *VERSION {
            let version = String::from_utf8_lossy(&version);
            return Err(Stop::Bad(format!("{} is too old: 3.8 at least", version.trim())));
        }
        Ok(Said::Version)
    }

    fn security(&mut self) -> Result<Said, Stop> {
        let count = self.u8()?;
        if count == 0 {
            return Err(Stop::Bad(format!("the server refuses: {}", self.text()?)));
        }
        if !self.take(count.into())?.contains(&SECURITY_NONE) {
            return Err(Stop::Bad("the server wants a password: start it without".to_owned()));
        }
        Ok(Said::Security)
    }

    fn welcome(&mut self) -> Result<Said, Stop> {
        match self.u32()? {
            0 => Ok(Said::Welcome),
            _ => Err(Stop::Bad(format!("the server refuses: {}", self.text()?))),
        }
    }

    fn screen(&mut self) -> Result<Said, Stop> {
        let (width, height) = (self.u16()?, self.u16()?);
        // Its own pixel format, which we replace, and its name.
        self.take(16)?;
        self.text()?;
        if !(1..=MAX_SIDE).contains(&width) || !(1..=MAX_SIDE).contains(&height) {
            return Err(Stop::Bad(format!("a screen of {width}×{height}: {MAX_SIDE} at most")));
        }
        Ok(Said::Screen { width, height })
    }

    fn message(&mut self) -> Result<Said, Stop> {
        match self.u8()? {
            0 => self.update(),
            1 => {
                self.take(3)?;
                let colours = self.u16()?;
                self.take(6 * usize::from(colours)).map(|_| Said::Other)
            }
            2 => Ok(Said::Other),
            3 => {
                self.take(3)?;
                self.text().map(|_| Said::Other)
            }
            other => Err(Stop::Bad(format!("a message of kind {other}, which nobody asked for"))),
        }
    }

    fn update(&mut self) -> Result<Said, Stop> {
        self.take(1)?;
        let count = self.u16()?;
        let mut areas = Vec::new();
        for _ in 0..count {
            let area =
                Area { x: self.u16()?, y: self.u16()?, width: self.u16()?, height: self.u16()? };
            if area.columns().end > MAX_SIDE.into() || area.rows().end > MAX_SIDE.into() {
                return Err(Stop::Bad(format!("an update of {area:?}")));
            }
            let content = match i32::from_be_bytes(self.array()?) {
                RAW => {
                    let pixels = usize::from(area.width) * usize::from(area.height);
                    Content::Raw(self.take(pixels * PIXEL_BYTES)?.to_vec())
                }
                COPY => Content::Copy { x: self.u16()?, y: self.u16()? },
                other => {
                    return Err(Stop::Bad(format!("encoding {other}, which nobody asked for")));
                }
            };
            areas.push((area, content));
        }
        Ok(Said::Update(areas))
    }
}

/// What we say to a greeting.
pub(super) fn version() -> &'static [u8] {
    VERSION
}

/// That we want no password.
pub(super) fn security() -> [u8; 1] {
    [SECURITY_NONE]
}

/// That others may watch too.
pub(super) fn shared() -> [u8; 1] {
    [1]
}

/// How we want pixels: 32 bits, true colours, and in which encodings.
pub(super) fn formats() -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];
    bytes.extend([2, 0, 0, 2]);
    bytes.extend(COPY.to_be_bytes());
    bytes.extend(RAW.to_be_bytes());
    bytes
}

/// Asks for the screen: all of it, or what changed as soon as something does.
pub(super) fn request(changes_only: bool, width: u16, height: u16) -> Vec<u8> {
    let mut bytes = vec![3, u8::from(changes_only), 0, 0, 0, 0];
    bytes.extend(width.to_be_bytes());
    bytes.extend(height.to_be_bytes());
    bytes
}

/// A key goes down or comes up.
pub(super) fn key(key: u32, down: bool) -> [u8; 8] {
    let [a, b, c, d] = key.to_be_bytes();
    [4, u8::from(down), 0, 0, a, b, c, d]
}

/// The pointer is there, with its first button pressed or not.
pub(super) fn pointer(pressed: bool, [x, y]: [u16; 2]) -> [u8; 6] {
    let ([x1, x2], [y1, y2]) = (x.to_be_bytes(), y.to_be_bytes());
    [5, u8::from(pressed), x1, x2, y1, y2]
}
