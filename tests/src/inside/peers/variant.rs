//! The ways in which QEMU moves a guest, and what each is told.

use anyhow::{Result, bail};
use serde_json::{Value, json};

/// The cache of XBZRLE: a quarter of what most guests here have; QEMU's default is 64 MiB.
const XBZRLE_CACHE_BYTES: u64 = 256 << 20;
/// Connections of multifd: one for each CPU of the lab host; QEMU's default is 2 as well.
const MULTIFD_CHANNELS: u32 = 2;

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// As it comes: pages as they are, zero pages left out.
    Precopy,
    /// Pages sent again are sent as what changed.
    Xbzrle,
    /// Several connections, each compressing.
    MultifdZstd,
    /// As it comes, with the guest slowed down until it converges.
    AutoConverge,
    /// One pass over memory; then the guest runs at the target, which asks for the pages it misses.
    Postcopy,
}

impl Variant {
    /// Reads the name that plans use.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "precopy" => Self::Precopy,
            "precopy-xbzrle" => Self::Xbzrle,
            "precopy-multifd-zstd" => Self::MultifdZstd,
            "precopy-auto-converge" => Self::AutoConverge,
            "postcopy" => Self::Postcopy,
            other => bail!(
                "qemu/{other}: use precopy, precopy-xbzrle, precopy-multifd-zstd, \
                 precopy-auto-converge or postcopy"
            ),
        })
    }

    /// What both ends are told that they can do.
    pub(crate) fn capabilities(self) -> Value {
        // Events instead of polling; and the source waits for the disk between stop and switch.
        let mut names = vec!["events", "pause-before-switchover"];
        names.extend(match self {
            Self::Precopy => None,
            Self::Xbzrle => Some("xbzrle"),
            Self::MultifdZstd => Some("multifd"),
            Self::AutoConverge => Some("auto-converge"),
            Self::Postcopy => Some("postcopy-ram"),
        });
        let state = |name: &str| json!({ "capability": name, "state": true });
        json!({ "capabilities": names.into_iter().map(state).collect::<Vec<_>>() })
    }

    /// What both ends are told to do it with; none where QEMU's defaults stand.
    pub(crate) fn parameters(self) -> Option<Value> {
        match self {
            Self::Xbzrle => Some(json!({ "xbzrle-cache-size": XBZRLE_CACHE_BYTES })),
            Self::MultifdZstd => Some(json!({
                "multifd-compression": "zstd",
                "multifd-channels": MULTIFD_CHANNELS,
            })),
            Self::Precopy | Self::AutoConverge | Self::Postcopy => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_told_to_wait_for_the_disk() {
        let all = ["precopy", "precopy-xbzrle", "precopy-multifd-zstd", "precopy-auto-converge"];
        for name in all.into_iter().chain(["postcopy"]) {
            let told = Variant::parse(name).unwrap().capabilities().to_string();
            assert!(told.contains("pause-before-switchover"), "{name}: {told}");
        }
        let error = Variant::parse("teleport").unwrap_err().to_string();
        assert!(error.contains("teleport") && error.contains("postcopy"), "{error}");
    }
}
