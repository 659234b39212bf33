//! Measuring in turns.

use handoff::stage::CpuWatch;
use serde::Serialize;

/// What came of one benchmark.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    /// What was measured.
    pub(crate) name: &'static str,
    /// What it is measured against.
    pub(crate) reference_name: &'static str,
    /// Its rate in bytes a second of CPU, the median of all runs.
    pub(crate) value: f64,
    /// The rate of the reference.
    pub(crate) reference: f64,
    /// The one by the other.
    pub(crate) ratio: f64,
    /// What the ratio must reach.
    pub(crate) bound: f64,
    /// Whether it does.
    pub(crate) met: bool,
}

/// A benchmark: what is measured, against what, and what the ratio of their rates must reach.
pub(crate) struct Bench {
    pub(crate) name: &'static str,
    pub(crate) reference_name: &'static str,
    pub(crate) bound: f64,
    /// Bytes that one run of either goes through.
    pub(crate) bytes: u64,
    pub(crate) runs: usize,
}

impl Bench {
    /// Runs `reference` and `measured` in turns, after one of each that does not count.
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
        let rate = |times: Vec<u64>| self.bytes as f64 * 1e9 / median(times).max(1) as f64;
        let (value, reference) = (rate(values), rate(references));
        let ratio = value / reference;
        let Self { name, reference_name, bound, .. } = *self;
        Ok(Outcome { name, reference_name, value, reference, ratio, bound, met: ratio >= bound })
    }
}

fn median(mut times: Vec<u64>) -> u64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_missed_is_told() {
        let bench = Bench { name: "a", reference_name: "b", bound: 0.9, bytes: 1 << 20, runs: 3 };
        let data = vec![1; 1 << 20];
        let hash = |times: u32| {
            (0..times).for_each(|_| _ = std::hint::black_box(blake3::hash(&data)));
            Ok(())
        };
        let outcome = bench.run(|| hash(1), || hash(4)).unwrap();
        assert!(!outcome.met && outcome.ratio < 0.6, "{outcome:?}");
        assert_eq!(median(vec![3, 1, 2]), 2);
    }
}
