//! A handoff as it goes, for people: a bar on a terminal, a line now and then elsewhere, nothing for
//! programs.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{
    control::Progress,
    output::{Output, bytes},
};

/// Where there is no terminal, a line this often.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// How much what was seen last weighs against what was seen before, for each second between.
const MEMORY: Duration = Duration::from_secs(3);
/// Less than this says nothing of how fast it goes.
const LEAST_STEP: Duration = Duration::from_millis(100);

/// Where it is shown.
pub(super) struct Shown {
    bar: Option<ProgressBar>,
    lines: bool,
    output: Output,
    last_line: Option<Instant>,
    begun: Instant,
    left: Left,
}

impl Shown {
    pub(super) fn new(output: Output) -> Self {
        let wanted = !output.is_json() && !output.is_quiet();
        let terminal = std::io::stderr().is_terminal() && wanted;
        let bar = terminal.then(|| ProgressBar::new(1));
        if let Some(bar) = &bar {
            let template = "{spinner} {elapsed} [{bar:24}] {wide_msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let (begun, left) = (Instant::now(), Left::default());
        Self { bar, lines: !terminal && wanted, output, last_line: None, begun, left }
    }

    /// Hides the live line, or shows it again, from another thread.
    pub(super) fn quiet(&self) -> impl Fn(bool) + Send + 'static {
        let bar = self.bar.clone();
        move |quiet| {
            let target =
                if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
            if let Some(bar) = &bar {
                bar.set_draw_target(target);
            }
        }
    }

    pub(super) fn show(&mut self, progress: &Progress) {
        let left = self.left.after(progress, self.begun.elapsed());
        if let Some(bar) = &self.bar {
            bar.set_length(self.left.most_bytes.max(1));
            bar.set_position(self.left.most_bytes.saturating_sub(progress.remaining_bytes));
            bar.set_message(line(progress, left));
        }
        if self.lines && self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            self.output.note(&line(progress, left));
            self.last_line = Some(Instant::now());
        }
    }

    pub(super) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How long a round will go on, by how fast what remains of it has become less: that is what the guest
/// changed, before it is made small, and so are neither the bytes sent nor their rate.
#[derive(Debug, Default)]
struct Left {
    round: u32,
    most_bytes: u64,
    last: Option<(Duration, u64)>,
    rate_bytes_per_s: Option<f64>,
}

impl Left {
    /// Takes what is known at `now`; the time left, if it can be told.
    fn after(&mut self, progress: &Progress, now: Duration) -> Option<Duration> {
        let remaining = progress.remaining_bytes;
        if self.round != progress.round {
            *self = Self {
                round: progress.round,
                rate_bytes_per_s: self.rate_bytes_per_s,
                ..Self::default()
            };
        }
        self.most_bytes = self.most_bytes.max(remaining);
        let (then, before) = *self.last.get_or_insert((now, remaining));
        let step = now.saturating_sub(then);
        if step >= LEAST_STEP {
            let rate = before.saturating_sub(remaining) as f64 / step.as_secs_f64();
            let weight = 1.0 - (-step.as_secs_f64() / MEMORY.as_secs_f64()).exp();
            let old = self.rate_bytes_per_s.unwrap_or(rate);
            self.rate_bytes_per_s = Some(old + (rate - old) * weight);
            self.last = Some((now, remaining));
        }
        let rate = self.rate_bytes_per_s.filter(|rate| *rate >= 1.0)?;
        Duration::try_from_secs_f64(remaining as f64 / rate).ok()
    }
}

/// What is known, in a line.
fn line(p: &Progress, left: Option<Duration>) -> String {
    let mut parts = vec![p.stage.clone()];
    if p.round > 0 {
        parts.push(format!("round {}", p.round));
    }
    parts.push(format!("{} sent", bytes(p.sent_bytes)));
    parts.push(format!("{} remaining", bytes(p.remaining_bytes)));
    parts.push(format!("{}/s", bytes(p.rate_bytes_per_s)));
    if let Some(left) = left.filter(|_| p.remaining_bytes > 0) {
        parts.push(format!("{} left", clock(left)));
    }
    if let Some(downtime) = p.predicted_downtime_ms {
        parts.push(format!("downtime would be {downtime} ms"));
    }
    parts.retain(|part| !part.is_empty());
    parts.join(", ")
}

/// A time for people: `0:07`, `12:30`, `2:00:00`.
fn clock(time: Duration) -> String {
    let s = time.as_secs();
    let (hours, minutes, seconds) = (s / 3600, s / 60 % 60, s % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(round: u32, remaining_mib: u64) -> Progress {
        Progress {
            stage: "sending".into(),
            round,
            sent_bytes: 2048,
            remaining_bytes: remaining_mib << 20,
            rate_bytes_per_s: 1_250_000,
            predicted_downtime_ms: Some(40),
            ..Progress::default()
        }
    }

    #[test]
    fn progress_reads_well() {
        assert_eq!(
            line(&at(2, 1), Some(Duration::from_millis(7_400))),
            "sending, round 2, 2.0 KiB sent, 1.0 MiB remaining, 1.2 MiB/s, 0:07 left, \
             downtime would be 40 ms"
        );
        assert_eq!(clock(Duration::from_secs(7325)), "2:02:05");
    }

    #[test]
    fn the_time_left_follows_what_remains() {
        let mut left = Left::default();
        assert_eq!(left.after(&at(1, 100), Duration::ZERO), None);
        let steady: Vec<_> = (1..=8)
            .map(|s| left.after(&at(1, 100 - 10 * s), Duration::from_secs(s)).unwrap().as_secs())
            .collect();
        assert_eq!(steady, [9, 8, 7, 6, 5, 4, 3, 2]);
        // A new round begins with the pace of the last, and a bar of its own.
        let next = left.after(&at(2, 30), Duration::from_secs(9)).unwrap();
        assert_eq!((next.as_secs(), left.most_bytes), (3, 30 << 20));
        // Nothing moves: no time is told for ever.
        let stuck = (10..200).filter_map(|s| left.after(&at(2, 30), Duration::from_secs(s))).last();
        assert!(stuck.is_none_or(|left| left > Duration::from_secs(3600)), "{stuck:?}");
    }
}
