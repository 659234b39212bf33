//! How long links are waited for: the same knobs at both ends.

use std::{fmt, str::FromStr, time::Duration};

use clap::Args;
use handoff::{
    engine::{Backoff, Limits},
    tcp::{Dscp, Shape},
};
use serde::{Deserialize, Serialize};

/// What may be waited for, in seconds.
fn seconds() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=86_400)
}

/// When a link is given up, and how it is made again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
pub(crate) struct LinkArgs {
    /// A link on which nothing was heard for so long is given up, and made again [default: 10]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(2..=600))]
    pub(crate) link_timeout_s: Option<u64>,
    /// For how long a broken link is made again while the guest runs here [default: 120]
    #[arg(long, value_name = "S", value_parser = seconds())]
    pub(crate) retry_for_s: Option<u64>,
    /// The same while the guest is paused and nothing is committed: then it goes on here
    /// [default: 5]
    #[arg(long, value_name = "S", value_parser = seconds())]
    pub(crate) retry_paused_s: Option<u64>,
    /// Waits between two attempts: the first, and the longest that they grow to [default: 100..1000]
    #[arg(long, value_name = "MS..MS")]
    pub(crate) retry_ms: Option<Waits>,
    /// The most of the link that this handoff may take, in Mbit/s [default: what there is]
    #[arg(long, value_name = "MBPS", value_parser = clap::value_parser!(u32).range(1..=32_000))]
    #[serde(default)]
    pub(crate) max_mbps: Option<u32>,
    /// Class of service of what is sent: le, cs0 to cs7, af11 to af43, ef, or 0 to 63
    #[arg(long, value_name = "DSCP")]
    #[serde(default, with = "dscp")]
    pub(crate) dscp: Option<Dscp>,
}

/// A class of service, as users say it.
mod dscp {
    use handoff::tcp::Dscp;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(dscp: &Option<Dscp>, to: S) -> Result<S::Ok, S::Error> {
        dscp.map(|dscp| dscp.to_string()).serialize(to)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Option<Dscp>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}

/// Bytes a second in one Mbit/s.
const BYTES_PER_MBIT: u64 = 125_000;

impl LinkArgs {
    /// What links may take of the network.
    pub(crate) fn shape(&self) -> Shape {
        let max_rate_bytes_per_s = self.max_mbps.map(|mbps| u64::from(mbps) * BYTES_PER_MBIT);
        Shape { max_rate_bytes_per_s, dscp: self.dscp }
    }

    /// What the engine is told.
    pub(crate) fn limits(&self) -> Limits {
        let usual = Limits::default();
        let or = |seconds: Option<u64>, usual| seconds.map_or(usual, Duration::from_secs);
        Limits {
            silence: or(self.link_timeout_s, usual.silence),
            relink_grace: or(self.retry_for_s, usual.relink_grace),
            relink_paused: or(self.retry_paused_s, usual.relink_paused),
            retry: self.retry_ms.map_or(usual.retry, Waits::backoff),
            ..usual
        }
    }
}

/// How a receiving cloudlet waits for its sources.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct WaitArgs {
    /// A link on which nothing was heard for so long is given up; the source makes another
    /// [default: 10]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(2..=600))]
    pub(crate) link_timeout_s: Option<u64>,
    /// How long what came of a VM is kept for a source whose link broke [default: 140]
    #[arg(long, value_name = "S", value_parser = seconds())]
    pub(crate) wait_for_s: Option<u64>,
}

impl WaitArgs {
    /// What the engine is told.
    pub(crate) fn limits(&self) -> Limits {
        let usual = Limits::at_target();
        let or = |seconds: Option<u64>, usual| seconds.map_or(usual, Duration::from_secs);
        Limits {
            silence: or(self.link_timeout_s, usual.silence),
            relink_grace: or(self.wait_for_s, usual.relink_grace),
            ..usual
        }
    }

    /// The same, as words for another process of this program.
    pub(crate) fn words(&self) -> Vec<String> {
        let flags = [("--link-timeout-s", self.link_timeout_s), ("--wait-for-s", self.wait_for_s)];
        let said = flags.into_iter().filter_map(|(flag, value)| Some((flag, value?)));
        said.flat_map(|(flag, value)| [flag.to_owned(), value.to_string()]).collect()
    }
}

/// A first and a longest wait, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Waits {
    first: u32,
    most: u32,
}

impl Waits {
    /// A shorter wait keeps a processor busy with attempts.
    const LEAST_MS: u32 = 10;
    /// After a longer one nobody would know what is being waited for.
    const MOST_MS: u32 = 600_000;

    fn backoff(self) -> Backoff {
        let ms = |ms: u32| Duration::from_millis(ms.into());
        Backoff { first: ms(self.first), most: ms(self.most) }
    }
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.most)
    }
}

impl From<Waits> for String {
    fn from(waits: Waits) -> Self {
        waits.to_string()
    }
}

impl TryFrom<String> for Waits {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Waits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (least, most) = (Self::LEAST_MS, Self::MOST_MS);
        let parse = |text: &str| text.parse().ok().filter(|ms| (least..=most).contains(ms));
        text.split_once("..")
            .and_then(|(first, most)| Some(Self { first: parse(first)?, most: parse(most)? }))
            .filter(|waits| waits.first <= waits.most)
            .ok_or_else(|| {
                format!("two numbers of milliseconds from {least} to {most}, as in 100..1000")
            })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Both {
        #[command(flatten)]
        link: LinkArgs,
    }

    #[test]
    fn what_is_not_said_is_usual() {
        assert_eq!(LinkArgs::default().limits(), Limits::default());
        assert_eq!(WaitArgs::default().limits(), Limits::at_target());
        assert!(WaitArgs::default().words().is_empty());
    }

    #[test]
    fn the_help_names_the_engines_defaults() {
        let usual = Limits::default();
        assert_eq!((usual.silence.as_secs(), usual.relink_grace.as_secs()), (10, 120));
        assert_eq!((usual.relink_paused.as_secs(), usual.retry), (5, Backoff::default()));
        assert_eq!("100..1000".parse::<Waits>().unwrap().backoff(), Backoff::default());
        assert_eq!(Limits::at_target().relink_grace.as_secs(), 140);
    }

    #[test]
    fn what_is_said_reaches_the_engine() {
        let words = "x --link-timeout-s 3 --retry-for-s 7 --retry-paused-s 1 --retry-ms 20..50 \
                     --max-mbps 10 --dscp le";
        let args = Both::try_parse_from(words.split(' ')).unwrap().link;
        let limits = args.limits();
        let s = Duration::from_secs;
        assert_eq!((limits.silence, limits.relink_grace, limits.relink_paused), (s(3), s(7), s(1)));
        let shape = args.shape();
        assert_eq!(shape.max_rate_bytes_per_s, Some(1_250_000));
        assert_eq!(shape.dscp.map(Dscp::code), Some(1));
        let ms = Duration::from_millis;
        assert_eq!(limits.retry, Backoff { first: ms(20), most: ms(50) });
        let text = serde_json::to_string(&args).unwrap();
        assert_eq!(serde_json::from_str::<LinkArgs>(&text).unwrap(), args, "{text}");
        let wait = WaitArgs { link_timeout_s: Some(4), wait_for_s: Some(9) };
        assert_eq!(wait.words().join(" "), "--link-timeout-s 4 --wait-for-s 9");
        assert_eq!((wait.limits().silence, wait.limits().relink_grace), (s(4), s(9)));
    }

    #[test]
    fn waits_are_two_numbers_in_order() {
        for wrong in ["", "100", "..", "5..100", "100..50", "1..2..3", "100..700000", "a..b"] {
            assert!(wrong.parse::<Waits>().unwrap_err().contains("100..1000"), "{wrong}");
        }
    }
}
