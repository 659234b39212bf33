//! What became of the bytes, and of the downtime, step by step.

use handoff::report::{Report, StageShare};

use crate::{
    chart::{
        Chart, Data,
        rows::{self, Row, Tone},
    },
    units::{bytes, count, percent, time},
};

/// A step that changes less than this share of the whole is left out of the picture.
const LEAST_SHARE: f64 = 0.0005;

/// From what was looked at to what was on the link; none if nothing was looked at.
pub(super) fn reduction(report: &Report) -> Option<Chart> {
    let whole: f64 = report.classes.iter().map(|class| class.bytes_in as f64).sum();
    if whole <= 0.0 {
        return None;
    }
    let mut fall = Fall::from(whole);
    for class in &report.classes {
        let hint = format!("{} chunks", count(class.chunks));
        fall.step(class_words(&class.name), class.bytes_out as f64 - class.bytes_in as f64, &hint);
    }
    let stage = |name: &str| report.stages.iter().find(|stage| stage.name == name);
    if let Some(compress) = stage("compress").filter(|stage| stage.chunks > 0) {
        let (given, made) = (compress.bytes_in as f64, compress.bytes_out as f64);
        fall.step("Tables of batches, the machine's state", given - fall.level, "");
        let hint = format!("{} of it left", percent(share(made, given)));
        fall.step("Compressed", made - given, &hint);
    }
    let link = report.bytes_on_link as f64;
    fall.step("Seals, TLS, the protocol's words", link - fall.level, "");
    Some(fall.end(link))
}

fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// What a class of chunks means.
fn class_words(name: &str) -> &str {
    match name {
        "unchanged" => "Unchanged: the target holds it",
        "known" => "Known from an earlier visit",
        "reset" => "Back to its base state",
        "zero" => "Zeros",
        "base_disk" => "Found in the base's disk",
        "base_memory" => "Found in the base's memory",
        "other_base" => "Found in another base",
        "seen" => "A copy of another chunk",
        "delta" => "Only what changed in it",
        "data" => "Data as it is",
        other => other,
    }
}

/// Steps from a whole to what is left of it.
struct Fall {
    whole: f64,
    level: f64,
    rows: Vec<Row>,
    data: Data,
}

impl Fall {
    fn from(whole: f64) -> Self {
        let data = Data::new(["Step", "Bytes", "Left after it"]);
        let mut fall = Self { whole, level: whole, rows: Vec::new(), data };
        fall.total("Looked at", whole);
        fall
    }

    fn total(&mut self, label: &str, amount: f64) {
        self.rows.push(Row {
            label: label.to_owned(),
            value: bytes(amount),
            bar: (0.0, amount / self.whole),
            tone: Tone::Whole,
            hint: label.to_owned(),
        });
        self.data.push([label.to_owned(), bytes(amount), bytes(amount)]);
    }

    fn step(&mut self, label: &str, change: f64, hint: &str) {
        let before = self.level;
        self.level = (before + change).max(0.0);
        let said = format!("{}{}", if change < 0.0 { "−" } else { "+" }, bytes(change.abs()));
        if change != 0.0 {
            self.data.push([label.to_owned(), said.clone(), bytes(self.level)]);
        }
        if change.abs() < self.whole * LEAST_SHARE {
            return;
        }
        let (low, high) = (before.min(self.level), before.max(self.level));
        self.rows.push(Row {
            label: label.to_owned(),
            value: said,
            bar: (low / self.whole, (high / self.whole).min(1.0)),
            tone: if change < 0.0 { Tone::Saved } else { Tone::Added },
            hint: hint.to_owned(),
        });
    }

    fn end(mut self, left: f64) -> Chart {
        self.total("On the link", left);
        let part = percent(share(left, self.whole));
        let title = format!("{} looked at, {} on the link: {part}", bytes(self.whole), bytes(left));
        Chart { svg: rows::draw(&title, &self.rows, &[]), data: self.data }
    }
}

/// The pause, part by part, in order; none if there was none.
pub(super) fn pause(report: &Report) -> Option<Chart> {
    let cutover = report.cutover.as_ref()?;
    let parts = [
        ("Stop vCPUs, drain devices", cutover.pause_ms),
        ("Read and pack the last round", cutover.final_round_ms),
        ("Save and pack the machine's state", cutover.state_ms),
        ("Until the commit is said", cutover.prepare_ms),
        ("Until the peer says that it runs", cutover.commit_ms),
    ];
    let whole: f64 = parts.iter().map(|(_, ms)| ms).sum();
    if whole <= 0.0 {
        return None;
    }
    let mut data = Data::new(["Step", "Time"]);
    let mut rows = Vec::new();
    let mut add = |label: &str, ms: f64, from: f64, tone: Tone| {
        let bar = (from / whole, ((from + ms) / whole).min(1.0));
        let (label, hint) = (label.to_owned(), time(ms));
        data.push([label.clone(), time(ms)]);
        rows.push(Row { label, value: time(ms), bar, tone, hint });
    };
    let mut from = 0.0;
    for (label, ms) in parts {
        add(label, ms, from, Tone::Plain);
        from += ms;
    }
    let peer = [
        ("there: verify, make durable, load", cutover.peer_prepare_ms),
        ("there: make the ownership durable", cutover.peer_commit_ms),
        ("there: set the guest running", cutover.peer_resume_ms),
    ];
    // The peer's own words, about the last of the time: when exactly, its clock only knows.
    let told: f64 = peer.iter().map(|(_, ms)| ms).sum();
    let mut from = (whole - told).max(0.0);
    for (label, ms) in peer.into_iter().filter(|(_, ms)| *ms > 0.0) {
        add(label, ms, from, Tone::Saved);
        from += ms;
    }
    let title = format!("The pause, {} until the peer's word", time(whole));
    Some(Chart { svg: rows::draw(&title, &rows, &[]), data })
}

/// A stage or class as a row of a table.
pub(super) fn share_row(share: &StageShare) -> [String; 5] {
    [
        share.name.clone(),
        count(share.chunks),
        bytes(share.bytes_in as f64),
        bytes(share.bytes_out as f64),
        time(share.cpu_s * 1e3),
    ]
}

#[cfg(test)]
mod tests {
    use handoff::report::Cutover;

    use super::*;

    fn stage(name: &str, chunks: u64, bytes_in: u64, bytes_out: u64) -> StageShare {
        StageShare { name: name.into(), chunks, bytes_in, bytes_out, cpu_s: 0.1 }
    }

    #[test]
    fn the_fall_ends_at_the_link() {
        let classes = vec![
            stage("unchanged", 100, 400_000, 0),
            stage("seen", 50, 200_000, 0),
            stage("data", 100, 400_000, 400_000),
        ];
        let stages = vec![stage("compress", 100, 410_000, 100_000)];
        let report = Report { classes, stages, bytes_on_link: 103_000, ..Report::default() };
        let chart = reduction(&report).unwrap();
        let left: Vec<&str> = chart.data.rows.iter().map(|row| row[2].as_str()).collect();
        assert_eq!(left, ["1.00 MB", "600 kB", "400 kB", "410 kB", "100 kB", "103 kB", "103 kB"]);
        let svg = chart.svg.into_string();
        assert!(svg.contains("1.00 MB looked at, 103 kB on the link: 10 %"), "{svg}");
        // What unchanged chunks took away is the right-hand part of the width.
        assert!(svg.contains(r#"class="saved" x="60.00%" width="40.00%""#), "{svg}");
        assert!(svg.contains(r#"class="added" x="40.00%" width="1.00%""#), "{svg}");
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        assert!(reduction(&Report::default()).is_none());
        assert!(pause(&Report::default()).is_none());
        let empty = Report { cutover: Some(Cutover::default()), ..Report::default() };
        assert!(pause(&empty).is_none());
    }

    #[test]
    fn parts_of_the_pause_follow_one_another() {
        let cutover = Cutover {
            pause_ms: 10.0,
            final_round_ms: 30.0,
            commit_ms: 60.0,
            peer_prepare_ms: 50.0,
            ..Cutover::default()
        };
        let report = Report { cutover: Some(cutover), ..Report::default() };
        let svg = pause(&report).unwrap().svg.into_string();
        assert!(svg.contains(r#"class="plain" x="10.00%" width="30.00%""#), "{svg}");
        assert!(svg.contains(r#"class="plain" x="40.00%" width="60.00%""#), "{svg}");
        assert!(svg.contains(r#"class="saved" x="50.00%" width="50.00%""#), "{svg}");
    }
}
