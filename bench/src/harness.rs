//! Measuring in turns, and what came of it.

use std::time::Instant;

use handoff::stage::CpuWatch;
use serde::Serialize;
use serde_json::Value;

/// Which side of its bound a ratio must be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Side {
    /// The ratio must reach the bound.
    AtLeast,
    /// The ratio must not be above it.
    AtMost,
    /// The figure is stated: there is nothing that it must reach.
    Stated,
}

/// What came of one benchmark.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Outcome {
    /// The group that it belongs to.
    pub(crate) group: &'static str,
    /// What was measured.
    pub(crate) name: String,
    /// What it is measured against.
    pub(crate) reference_name: String,
    /// The unit of `value` and `reference`.
    pub(crate) unit: &'static str,
    /// What was measured: the median of all runs, or the best where that is said.
    pub(crate) value: f64,
    /// The same of the reference.
    pub(crate) reference: f64,
    /// The one by the other.
    pub(crate) ratio: f64,
    /// What the ratio is held to.
    pub(crate) bound: f64,
    /// On which side of the bound it must be.
    pub(crate) side: Side,
    /// Whether it is.
    pub(crate) met: bool,
    /// How many threads wanted a CPU when it was done, by the system's word over the last minute:
    /// with more than there are CPUs, times of threads that work together mean little.
    pub(crate) load: f64,
    /// What stands behind the figure.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub(crate) detail: Value,
}

impl Outcome {
    /// `value` against `reference`, held to `bound` on that side.
    pub(crate) fn of(
        group: &'static str,
        name: impl Into<String>,
        (unit, value): (&'static str, f64),
        (reference_name, reference): (impl Into<String>, f64),
        (side, bound): (Side, f64),
    ) -> Self {
        let ratio = value / reference;
        let met = match side {
            Side::AtLeast => ratio >= bound,
            Side::AtMost => ratio <= bound,
            Side::Stated => true,
        };
        let (name, reference_name) = (name.into(), reference_name.into());
        let (load, detail) = (load(), Value::Null);
        Self {
            group,
            name,
            reference_name,
            unit,
            value,
            reference,
            ratio,
            bound,
            side,
            met,
            load,
            detail,
        }
    }

    /// With what stands behind it.
    pub(crate) fn with(mut self, detail: Value) -> Self {
        self.detail = detail;
        self
    }
}

/// How many threads wanted a CPU lately; zero where the system does not say.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

/// A benchmark: what is measured, against what, and what the ratio of their rates must reach.
pub(crate) struct Bench {
    pub(crate) group: &'static str,
    pub(crate) name: String,
    pub(crate) reference_name: &'static str,
    pub(crate) bound: f64,
    /// Bytes that one run of either goes through.
    pub(crate) bytes: u64,
    pub(crate) runs: usize,
}

impl Bench {
    /// Runs `reference` and `measured` in turns, after one of each that does not count, and
    /// compares the rates by CPU time of this thread.
    pub(crate) fn run(
        &self,
        mut reference: impl FnMut() -> anyhow::Result<()>,
        mut measured: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Outcome> {
        reference()?;
        measured()?;
        let (mut values, mut references) = (Vec::new(), Vec::new());
        for _ in 0..self.runs.max(1) {
            let mut watch = CpuWatch::start();
            reference()?;
            references.push(watch.lap_ns());
            measured()?;
            values.push(watch.lap_ns());
        }
        Ok(self.outcome(median(values), median(references)))
    }

    /// The outcome where the one took `value_ns` and the reference `reference_ns`.
    pub(crate) fn outcome(&self, value_ns: u64, reference_ns: u64) -> Outcome {
        let rate = |ns: u64| self.bytes as f64 * 1e9 / ns.max(1) as f64;
        Outcome::of(
            self.group,
            self.name.clone(),
            ("bytes/s", rate(value_ns)),
            (self.reference_name, rate(reference_ns)),
            (Side::AtLeast, self.bound),
        )
    }
}

/// The one in the middle.
pub(crate) fn median(mut times: Vec<u64>) -> u64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or(u64::MAX)
}

/// The least of what several runs took, in nanoseconds: where threads wait for each other, what
/// else runs on the machine only ever adds to it.
pub(crate) fn best_of_ns(
    runs: usize,
    mut run: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let mut best = u64::MAX;
    for _ in 0..runs.max(1) {
        let start = Instant::now();
        run()?;
        best = best.min(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_missed_is_told() {
        let bench = Bench {
            group: "test",
            name: "a".into(),
            reference_name: "b",
            bound: 0.9,
            bytes: 1 << 20,
            runs: 3,
        };
        let data = vec![1; 1 << 20];
        let hash = |times: u32| {
            (0..times).for_each(|_| _ = std::hint::black_box(blake3::hash(&data)));
            Ok(())
        };
        let outcome = bench.run(|| hash(1), || hash(4)).unwrap();
        assert!(!outcome.met && outcome.ratio < 0.6, "{outcome:?}");
        assert_eq!(median(vec![3, 1, 2]), 2);
    }

    #[test]
    fn each_side_of_a_bound() {
        let of = |side| Outcome::of("test", "a", ("ms", 3.0), ("b", 2.0), (side, 1.0));
        assert!(of(Side::AtLeast).met);
        assert!(!of(Side::AtMost).met);
        assert!(of(Side::Stated).met);
    }
}
