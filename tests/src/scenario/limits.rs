//! What the figures of a scenario are held against: bounds, and other figures of the same run.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// Figures of a scenario that must be kept to.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Limits {
    /// Total time of the first handoff.
    pub(crate) total_ms: Option<f64>,
    /// Downtime of the first handoff.
    pub(crate) downtime_ms: Option<f64>,
    /// The longest silence that the client met around the first handoff.
    pub(crate) client_gap_ms: Option<f64>,
    /// Figures that were measured.
    pub(crate) figures: Vec<FigureLimit>,
}

/// What one handoff may cost.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LegLimits {
    /// Total time.
    pub(crate) total_ms: Option<f64>,
    /// Downtime.
    pub(crate) downtime_ms: Option<f64>,
    /// Payload bytes on the link, both directions.
    pub(crate) bytes: Option<u64>,
    /// Compared with other handoffs of the same run.
    pub(crate) ratios: Vec<Ratio>,
    /// Bytes on the link, as a multiple of what the offline encoder made of the same state.
    pub(crate) encoder_ratio: Option<f64>,
}

/// A figure of a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Figure {
    /// Total time.
    TotalMs,
    /// Downtime.
    DowntimeMs,
    /// Payload bytes on the link, both directions.
    Bytes,
}

impl Figure {
    /// As it is written in scenarios.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::TotalMs => "total_ms",
            Self::DowntimeMs => "downtime_ms",
            Self::Bytes => "bytes",
        }
    }
}

/// A figure of a handoff as a multiple of the same figure of another.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ratio {
    /// Which figure.
    pub(crate) of: Figure,
    /// The other handoff's scenario; this one when absent.
    pub(crate) scenario: Option<String>,
    /// Which handoff of it, from 1.
    #[serde(default = "first")]
    pub(crate) leg: usize,
    /// The most that it may be; when absent it is only stated.
    pub(crate) max: Option<f64>,
    /// How much more than the other one the figure may be, in its own unit.
    pub(crate) max_more: Option<f64>,
}

fn first() -> usize {
    1
}

/// What a measured figure is held against. Figures are measured several times: the median counts,
/// and the range from least to most is their noise.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FigureLimit {
    /// Which: `NAME.FIELD` of a `measure` step, or one that the lab takes itself.
    pub(crate) figure: String,
    /// The most that its median may be.
    pub(crate) at_most: Option<f64>,
    /// Another figure that it is compared with.
    pub(crate) to: Option<String>,
    /// The scenario of the other figure; this one when absent.
    pub(crate) scenario: Option<String>,
    /// For a rate: whether its best must reach the other's worst. Then it is not slower beyond
    /// noise; that it is faster is no harm.
    #[serde(default)]
    pub(crate) no_slower: bool,
    /// What it may have grown to: the median of the last quarter, as a multiple of that of the second.
    /// The first quarter is what it takes to get warm.
    pub(crate) grows_at_most: Option<f64>,
}

impl Limits {
    /// Refuses limits that say nothing.
    pub(crate) fn validate(&self) -> Result<()> {
        for limit in &self.figures {
            let figure = &limit.figure;
            let bounds = [limit.at_most, limit.grows_at_most];
            if bounds.iter().all(Option::is_none) && limit.to.is_none() {
                bail!(
                    "limits: {figure} is held against nothing: give at_most, grows_at_most or to"
                );
            }
            if limit.to.is_none() && (limit.no_slower || limit.scenario.is_some()) {
                bail!("limits: {figure} is compared with no figure: give to");
            }
        }
        Ok(())
    }
}

impl LegLimits {
    /// Refuses limits that nothing can be held against.
    pub(crate) fn validate(&self) -> Result<()> {
        let bounds = self.ratios.iter().filter_map(|ratio| ratio.max).chain(self.encoder_ratio);
        if let Some(bad) = bounds.into_iter().find(|max| !max.is_finite() || *max <= 0.0) {
            bail!("a ratio of at most {bad}: use a positive number");
        }
        if self.ratios.iter().any(|ratio| ratio.leg == 0) {
            bail!("leg = 0: handoffs are numbered from 1");
        }
        Ok(())
    }
}
