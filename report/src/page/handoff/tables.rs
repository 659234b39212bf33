//! A report's lists as tables.

use handoff::{adapt::Adaptation, report::Report};

use super::waterfall::share_row;
use crate::{
    chart::Data,
    units::{bytes, count, percent, rate, time},
};

/// One row a round.
pub(super) fn rounds(report: &Report) -> Data {
    let mut data =
        Data::new(["Round", "Chunks", "On the link", "Took", "Dirty after", "Without link"]);
    for round in &report.rounds {
        data.push([
            round.number.to_string(),
            count(round.chunks),
            bytes(round.bytes as f64),
            time(round.duration_ms),
            count(round.dirty_after),
            time(round.outage_ms),
        ]);
    }
    data
}

/// Classes that there were, then stages.
pub(super) fn stages(report: &Report) -> Data {
    let mut data = Data::new(["Class or stage", "Chunks", "In", "Out", "CPU"]);
    let classes = report.classes.iter().filter(|class| class.chunks > 0);
    classes.chain(&report.stages).for_each(|share| data.push(share_row(share)));
    data
}

/// One row a mode.
pub(super) fn modes(adaptation: &Adaptation) -> Data {
    let mut data = Data::new(["Mode", "Batches", "In", "Out", "Left", "CPU", "Samples"]);
    for mode in &adaptation.modes {
        let (bytes_in, bytes_out) = (mode.bytes_in as f64, mode.bytes_out as f64);
        let left = if bytes_in > 0.0 { percent(bytes_out / bytes_in) } else { "–".into() };
        data.push([
            mode.mode.to_string(),
            count(mode.bodies),
            bytes(bytes_in),
            bytes(bytes_out),
            left,
            time((mode.cpu_s + mode.samples_cpu_s) * 1e3),
            count(mode.samples),
        ]);
    }
    data
}

/// One row a decision.
pub(super) fn decisions(adaptation: &Adaptation) -> Data {
    let mut data = Data::new(["At", "Link idle", "Link busy", "Link", "Promised", "Because"]);
    let or_dash = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), rate);
    for decision in &adaptation.decisions {
        data.push([
            time(decision.at_ms),
            decision.mode.to_string(),
            decision.stronger.to_string(),
            or_dash(decision.link_bytes_per_s),
            or_dash(decision.promised_bytes_per_s),
            decision.why.clone(),
        ]);
    }
    data
}
