//! How a body may be encoded: codecs, and the modes in which they work.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How a payload is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As it is: chosen where compression does not shrink it.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
    /// One LZ4 block.
    Lz4 = 2,
    /// One LZMA stream, in the `.lzma` format: xz without its container.
    Xz = 3,
    /// One raw deflate stream: gzip without its container.
    Gzip = 4,
    /// One bzip2 stream.
    Bzip2 = 5,
}

impl Codec {
    /// All, by their numbers.
    pub const ALL: [Self; 6] =
        [Self::Raw, Self::Zstd, Self::Lz4, Self::Xz, Self::Gzip, Self::Bzip2];

    /// The codec with this number on the wire.
    pub fn from_u8(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The name that modes and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "none",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Xz => "xz",
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
        }
    }

    /// The least level, the usual one, and the highest.
    const fn levels(self) -> (i32, i32, i32) {
        match self {
            Self::Raw | Self::Lz4 => (0, 0, 0),
            Self::Zstd => (-7, 3, 22),
            Self::Xz => (0, 6, 9),
            Self::Gzip => (1, 6, 9),
            Self::Bzip2 => (1, 9, 9),
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A codec at a level. Only those that exist can be made.
///
/// Its text is the codec's name and, where there are any, the level: `none`, `lz4`, `zstd:3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mode {
    codec: Codec,
    level: i8,
}

/// A text that is no mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownMode {
    /// No codec has this name.
    #[error("there is no codec {0:?}; there are: none, lz4, zstd, xz, gzip, bzip2")]
    Codec(String),
    /// The codec has no such level.
    #[error("{codec} has no level {level:?}{}", levels(*.codec))]
    Level {
        /// The codec.
        codec: Codec,
        /// What was given for its level.
        level: String,
    },
}

fn levels(codec: Codec) -> String {
    match codec.levels() {
        (0, _, 0) => "; it has none at all".into(),
        (min, _, max) => format!("; it has {min} to {max}"),
    }
}

impl Mode {
    /// Nothing is compressed.
    pub const NONE: Self = Self::at(Codec::Raw, 0);
    /// The fastest that compresses.
    pub const LZ4: Self = Self::at(Codec::Lz4, 0);
    /// What is used where nothing says otherwise.
    pub const DEFAULT: Self = Self::at(Codec::Zstd, 3);

    /// Those to choose from while running, from fast to strong: on a guest's memory each is stronger
    /// than those before it, and none of the others is both faster and stronger than one of them
    /// (ADR 0014). The last is the exception: on memory it is worth nothing, on plain text nothing is
    /// better, and the adapter finds out which it is.
    pub const LADDER: &'static [Self] = &[
        Self::NONE,
        Self::LZ4,
        Self::at(Codec::Zstd, -1),
        Self::at(Codec::Zstd, 1),
        Self::DEFAULT,
        Self::at(Codec::Zstd, 6),
        Self::at(Codec::Zstd, 9),
        Self::at(Codec::Xz, 0),
        Self::at(Codec::Xz, 3),
        Self::at(Codec::Xz, 6),
        Self::at(Codec::Bzip2, 9),
    ];

    /// Those that are compared where every one is tried.
    pub const STATIC: &'static [Self] = &[
        Self::NONE,
        Self::LZ4,
        Self::at(Codec::Zstd, -3),
        Self::at(Codec::Zstd, 1),
        Self::DEFAULT,
        Self::at(Codec::Zstd, 6),
        Self::at(Codec::Zstd, 9),
        Self::at(Codec::Zstd, 12),
        Self::at(Codec::Zstd, 15),
        Self::at(Codec::Zstd, 19),
        Self::at(Codec::Xz, 0),
        Self::at(Codec::Xz, 1),
        Self::at(Codec::Xz, 3),
        Self::at(Codec::Xz, 6),
        Self::at(Codec::Xz, 9),
        Self::at(Codec::Gzip, 1),
        Self::at(Codec::Gzip, 6),
        Self::at(Codec::Gzip, 9),
        Self::at(Codec::Bzip2, 1),
        Self::at(Codec::Bzip2, 9),
    ];

    const fn at(codec: Codec, level: i8) -> Self {
        Self { codec, level }
    }

    /// The codec at a level, if it has that.
    pub fn new(codec: Codec, level: i32) -> Option<Self> {
        let (min, _, max) = codec.levels();
        let in_range = (min..=max).contains(&level);
        in_range.then(|| i8::try_from(level).ok()).flatten().map(|level| Self { codec, level })
    }

    /// The codec.
    pub fn codec(self) -> Codec {
        self.codec
    }

    /// The level, 0 for a codec that has none.
    pub fn level(self) -> i32 {
        self.level.into()
    }

    /// The most memory that compressing in this mode takes besides body and payload.
    pub fn encoder_bytes(self) -> usize {
        const KIB: usize = 1 << 10;
        match (self.codec, self.level) {
            (Codec::Raw, _) => 0,
            (Codec::Lz4, _) => 16 * KIB,
            (Codec::Zstd, ..=3) => 1536 * KIB,
            (Codec::Zstd, _) => 4096 * KIB,
            (Codec::Xz, ..=3) => 5120 * KIB,
            (Codec::Xz, _) => 7168 * KIB,
            (Codec::Gzip, _) => 512 * KIB,
            (Codec::Bzip2, _) => 8192 * KIB,
        }
    }
}

impl Default for Mode {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.codec.levels() {
            (0, _, 0) => f.write_str(self.codec.name()),
            _ => write!(f, "{}:{}", self.codec, self.level),
        }
    }
}

impl From<Mode> for String {
    fn from(mode: Mode) -> Self {
        mode.to_string()
    }
}

impl TryFrom<String> for Mode {
    type Error = UnknownMode;

    fn try_from(text: String) -> Result<Self, UnknownMode> {
        text.parse()
    }
}

impl FromStr for Mode {
    type Err = UnknownMode;

    /// `codec:level`, or the codec alone at its usual level.
    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        let (name, level) = text.split_once(':').map_or((text, None), |(n, l)| (n, Some(l)));
        let codec = Codec::ALL.into_iter().find(|codec| codec.name() == name);
        let codec = codec.ok_or_else(|| UnknownMode::Codec(name.to_owned()))?;
        let (min, usual, max) = codec.levels();
        let mode = match level {
            None => Self::new(codec, usual),
            // A codec without levels takes none, not even 0.
            Some(level) if min < max => level.parse().ok().and_then(|n| Self::new(codec, n)),
            Some(_) => None,
        };
        let unknown = || UnknownMode::Level { codec, level: level.unwrap_or_default().to_owned() };
        mode.ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for mode in Mode::STATIC.iter().chain(Mode::LADDER) {
            assert_eq!(mode.to_string().parse(), Ok(*mode));
        }
        assert_eq!("zstd".parse(), Ok(Mode::DEFAULT));
        assert_eq!("none".parse(), Ok(Mode::NONE));
        assert_eq!(Mode::LZ4.to_string(), "lz4");
        assert_eq!("zstd:-3".parse(), Mode::new(Codec::Zstd, -3).ok_or_else(|| unreachable!()));
        let says = |text: &str| text.parse::<Mode>().unwrap_err().to_string();
        assert!(says("deflate").contains("zstd, xz"));
        assert!(says("zstd:23").contains("-7 to 22"));
        assert!(says("zstd:").contains("no level \"\""));
        assert!(says("xz:six").contains("0 to 9"));
        assert!(says("lz4:0").contains("none at all"));
        assert!(says("Zstd").contains("there is no codec"));
        assert!(says("zstd:3 ").contains("no level"));
    }

    #[test]
    fn only_those_that_exist() {
        assert_eq!(Mode::new(Codec::Gzip, 0), None);
        assert_eq!(Mode::new(Codec::Raw, 1), None);
        assert_eq!(Mode::new(Codec::Zstd, i32::MIN), None);
        for (number, codec) in (0..).zip(Codec::ALL) {
            assert_eq!((codec as u8, Codec::from_u8(number)), (number, Some(codec)));
        }
        assert_eq!(Codec::from_u8(6), None);
    }

    #[test]
    fn as_json() {
        let json = serde_json::to_string(&Mode::DEFAULT).unwrap();
        assert_eq!(json, "\"zstd:3\"");
        assert_eq!(serde_json::from_str::<Mode>(&json).unwrap(), Mode::DEFAULT);
        assert!(serde_json::from_str::<Mode>("\"zstd:99\"").is_err());
    }
}
