//! How a handoff's pipeline works: the same flags wherever one is.

use std::{fmt, str::FromStr};

use clap::Args;
use handoff::{
    adapt::ModeChoice,
    engine::{LEAST_CPU_SHARE, PipelineOptions},
    stage::Mode,
};
use serde::{Deserialize, Serialize};

/// How what is sent is compressed, and with how much of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
pub(crate) struct PipelineArgs {
    /// How batches are compressed: auto, none, lz4, zstd:LEVEL, xz:LEVEL, gzip:LEVEL or bzip2:LEVEL
    ///
    /// `auto` chooses for each batch what fits the link and the CPU; the others are for measuring.
    #[arg(long, default_value_t, value_name = "MODE")]
    pub(crate) mode: ModeChoice,
    /// Data in a batch, 256 to 1024 KiB: more compresses better, less is sent sooner
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u16).range(256..=1024))]
    pub(crate) batch_kib: Option<u16>,
    /// Threads that compress [default: as many as there are cores, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) workers: Option<u8>,
    /// Share of a core that each of them may use while the guest runs, above 0 to 1
    #[arg(long, default_value_t, value_name = "SHARE")]
    pub(crate) cpu_share: CpuShare,
}

impl PipelineArgs {
    /// What the engine is told.
    pub(crate) fn options(&self) -> PipelineOptions {
        let usual = PipelineOptions::default();
        PipelineOptions {
            choice: self.mode,
            batch_bytes: self.batch_kib.map_or(usual.batch_bytes, |kib| usize::from(kib) << 10),
            workers: self.workers.map_or(usual.workers, usize::from),
            cpu_share: self.cpu_share.share(),
            ..usual
        }
    }
}

/// How what is saved is compressed. No link waits for it, but the guest does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct CompressArgs {
    /// How batches are compressed: none, lz4, zstd:LEVEL, xz:LEVEL, gzip:LEVEL or bzip2:LEVEL
    ///
    /// The guest is paused meanwhile: `xz:6` makes a smaller file and takes a hundred times as long.
    #[arg(long, default_value_t, value_name = "MODE")]
    pub(crate) mode: Mode,
    /// Data in a batch, 256 to 1024 KiB: more compresses better
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u16).range(256..=1024))]
    pub(crate) batch_kib: Option<u16>,
}

impl From<CompressArgs> for PipelineArgs {
    fn from(CompressArgs { mode, batch_kib }: CompressArgs) -> Self {
        Self { mode: ModeChoice::Fixed(mode), batch_kib, ..Self::default() }
    }
}

/// A share of a core, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CpuShare(u16);

impl CpuShare {
    fn share(self) -> f64 {
        f64::from(self.0) / 1e3
    }
}

impl Default for CpuShare {
    fn default() -> Self {
        Self(1000)
    }
}

impl fmt::Display for CpuShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.share().fmt(f)
    }
}

impl FromStr for CpuShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = text.parse().ok().filter(|share| (LEAST_CPU_SHARE..=1.0).contains(share));
        let share = share.ok_or_else(|| format!("a share is from {LEAST_CPU_SHARE} to 1"))?;
        Ok(Self((share * 1e3).round() as u16))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_a_core() {
        let of = |text: &str| text.parse::<CpuShare>();
        assert_eq!(of("0.25").unwrap().share(), 0.25);
        assert_eq!(of("1").unwrap(), CpuShare::default());
        assert_eq!(CpuShare::default().to_string(), "1");
        for wrong in ["0", "1.1", "-1", "nan", "half", ""] {
            assert!(of(wrong).unwrap_err().contains("0.05 to 1"), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_said_is_usual() {
        assert_eq!(PipelineArgs::default().options(), PipelineOptions::default());
        let args = PipelineArgs {
            mode: "xz:6".parse().unwrap(),
            batch_kib: Some(512),
            workers: Some(3),
            cpu_share: "0.5".parse().unwrap(),
        };
        let options = args.options();
        assert_eq!((options.batch_bytes, options.workers, options.cpu_share), (512 << 10, 3, 0.5));
        let text = serde_json::to_string(&args).unwrap();
        assert_eq!(serde_json::from_str::<PipelineArgs>(&text).unwrap(), args, "{text}");
    }
}
