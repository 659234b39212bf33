//! Repetitions of the same put together.

use std::collections::BTreeMap;

use crate::{
    run::{Link, PaperRun, Run},
    stats::Stat,
    units::plain,
};

/// Applications in the order of the paper; others follow by name.
const APPLICATIONS: [(&str, &str); 6] = [
    ("fluid", "App1 fluid"),
    ("faces", "App2 faces"),
    ("ar", "App3 AR"),
    ("detect", "App4 detect"),
    ("desktop", "Desktop"),
    ("idle", "Idle"),
];

/// What a guest did, in the order of the paper.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct App {
    place: usize,
    name: String,
}

impl App {
    fn of(name: &str) -> Self {
        let place = APPLICATIONS.iter().position(|(known, _)| *known == name);
        Self { place: place.unwrap_or(APPLICATIONS.len()), name: name.to_owned() }
    }

    /// What it is called in tables.
    pub(super) fn label(&self) -> &str {
        APPLICATIONS.get(self.place).map_or(&self.name, |(_, label)| label)
    }
}

/// A link, in the order in which links are shown: first those that stay as they are, then by delay,
/// loss and rate.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LinkKey {
    changes: Vec<(u64, u64)>,
    delay_us: u64,
    loss_ppm: u64,
    rate_kbps: u64,
    name: String,
}

impl LinkKey {
    pub(super) fn of(link: &Link) -> Self {
        let scaled = |value: f64, by: f64| (value * by).round() as u64;
        let changes = link.changes.iter().flatten();
        Self {
            changes: changes.map(|c| (scaled(c.at_s, 1e3), scaled(c.rate_mbps, 1e3))).collect(),
            delay_us: scaled(link.delay_ms.unwrap_or(0.0), 1e3),
            loss_ppm: scaled(link.loss_percent.unwrap_or(0.0), 1e4),
            rate_kbps: scaled(link.rate_mbps.unwrap_or(0.0), 1e3),
            name: link.name.clone(),
        }
    }

    /// Its rate, or its rates over time.
    pub(super) fn rates(&self) -> String {
        if self.rate_kbps == 0 {
            return self.name.clone();
        }
        let mut text = mbps(self.rate_kbps);
        for (at_ms, kbps) in &self.changes {
            text += &format!(", {} from {} s", mbps(*kbps), plain(*at_ms as f64 / 1e3));
        }
        text
    }

    /// Everything but its rate.
    pub(super) fn conditions(&self) -> String {
        let delay = plain(self.delay_us as f64 / 1e3);
        let mut text = format!("{delay} ms delay");
        if self.loss_ppm > 0 {
            text += &format!(", {} % loss", plain(self.loss_ppm as f64 / 1e4));
        }
        text
    }

    /// Links with the same of these are rows of one table.
    pub(super) fn group(&self) -> (bool, u64, u64) {
        (!self.changes.is_empty(), self.delay_us, self.loss_ppm)
    }

    /// All of it.
    pub(super) fn label(&self) -> String {
        format!("{}, {}", self.rates(), self.conditions())
    }
}

fn mbps(kbps: u64) -> String {
    if kbps >= 1_000_000 {
        return format!("{} Gbit/s", plain(kbps as f64 / 1e6));
    }
    format!("{} Mbit/s", plain(kbps as f64 / 1e3))
}

/// What moved the guest, howdah first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mover {
    not_howdah: bool,
    system: String,
    not_default: bool,
    variant: String,
}

impl Mover {
    fn of(run: &PaperRun) -> Self {
        Self {
            not_howdah: run.system != "howdah",
            system: run.system.clone(),
            not_default: run.variant != "default",
            variant: run.variant.clone(),
        }
    }

    /// howdah as it is without being told anything.
    pub(super) fn is_default(&self) -> bool {
        !self.not_howdah && !self.not_default
    }

    /// Something else than howdah.
    pub(super) fn is_peer(&self) -> bool {
        self.not_howdah
    }

    /// `howdah`, `qemu`, ...
    pub(super) fn system(&self) -> &str {
        &self.system
    }

    /// The mode that howdah was made to use throughout.
    pub(super) fn forced_mode(&self) -> Option<&str> {
        self.variant.strip_prefix("static:").filter(|_| !self.not_howdah)
    }

    /// What it is called.
    pub(super) fn label(&self) -> String {
        let Self { system, variant, not_default, .. } = self;
        if *not_default { format!("{system} {variant}") } else { system.clone() }
    }
}

/// The repetitions of one thing.
#[derive(Clone, Debug, Default)]
pub(super) struct Cell<'a> {
    pub(super) runs: Vec<&'a Run>,
}

impl Cell<'_> {
    fn stat(&self, of: impl Fn(&PaperRun) -> Option<f64>) -> Option<Stat> {
        let finished = self.runs.iter().filter(|run| run.facts.finished);
        Stat::of(finished.filter_map(|run| of(&run.facts)))
    }

    pub(super) fn total(&self) -> Option<Stat> {
        self.stat(|run| run.total_ms)
    }

    pub(super) fn downtime(&self) -> Option<Stat> {
        self.stat(|run| run.downtime_ms)
    }

    pub(super) fn bytes(&self) -> Option<Stat> {
        self.stat(|run| run.bytes_on_link.map(|bytes| bytes as f64))
    }

    pub(super) fn encoder_bytes(&self) -> Option<Stat> {
        self.stat(|run| run.offline_encoder_bytes.map(|bytes| bytes as f64))
    }

    /// What the bytes alone take at the rate that the link really had.
    pub(super) fn link_ms(&self) -> Option<Stat> {
        self.stat(|run| {
            let rate = run.measured_rate_bytes_per_s.filter(|rate| *rate > 0.0)?;
            Some(run.bytes_on_link? as f64 / rate * 1e3)
        })
    }

    pub(super) fn finished(&self) -> usize {
        self.runs.iter().filter(|run| run.facts.finished).count()
    }

    /// For how long those that did not finish were let, at least.
    pub(super) fn bound_ms(&self) -> Option<f64> {
        let open = self.runs.iter().filter(|run| !run.facts.finished);
        open.filter_map(|run| run.facts.bound_s).map(|s| s * 1e3).reduce(f64::min)
    }
}

/// All cells, in order.
pub(super) struct Grid<'a>(BTreeMap<(LinkKey, App, Mover), Cell<'a>>);

impl<'a> Grid<'a> {
    pub(super) fn of(runs: &[&'a Run]) -> Self {
        let mut cells: BTreeMap<_, Cell<'a>> = BTreeMap::new();
        for run in runs {
            let facts = &run.facts;
            let key = (LinkKey::of(&facts.link), App::of(&facts.application), Mover::of(facts));
            cells.entry(key).or_default().runs.push(run);
        }
        Self(cells)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&LinkKey, &App, &Mover, &Cell<'a>)> {
        self.0.iter().map(|((link, app, mover), cell)| (link, app, mover, cell))
    }

    pub(super) fn get(&self, link: &LinkKey, app: &App, mover: &Mover) -> Option<&Cell<'a>> {
        self.0.get(&(link.clone(), app.clone(), mover.clone()))
    }

    /// howdah's own, as it is without being told anything.
    pub(super) fn default(&self, link: &LinkKey, app: &App) -> Option<&Cell<'a>> {
        let of = self.iter().find(|(l, a, mover, _)| *l == link && *a == app && mover.is_default());
        of.map(|(_, _, _, cell)| cell)
    }

    /// Links of which `pick` wants something, in order.
    pub(super) fn links(&self, pick: impl Fn(&Mover) -> bool) -> Vec<&LinkKey> {
        sorted(self.iter().filter(|(_, _, mover, _)| pick(mover)).map(|(link, ..)| link))
    }

    /// Applications that ran over these links.
    pub(super) fn apps(&self, over: &[&LinkKey]) -> Vec<&App> {
        sorted(self.iter().filter(|(link, ..)| over.contains(link)).map(|(_, app, ..)| app))
    }

    /// What moved guests over this link, but for forced modes.
    pub(super) fn movers(&self, over: &LinkKey) -> Vec<&Mover> {
        let moved = self.iter().filter(|(link, ..)| *link == over).map(|(_, _, mover, _)| mover);
        sorted(moved.filter(|mover| mover.forced_mode().is_none()))
    }
}

fn sorted<'a, T: Ord>(items: impl Iterator<Item = &'a T>) -> Vec<&'a T> {
    let mut items: Vec<_> = items.collect();
    items.sort();
    items.dedup();
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::LinkChange;

    fn link(rate_mbps: f64, delay_ms: f64) -> Link {
        let (rate, delay) = (Some(rate_mbps), Some(delay_ms));
        Link { name: "l".into(), rate_mbps: rate, delay_ms: delay, ..Link::default() }
    }

    #[test]
    fn links_are_in_the_papers_order() {
        let changes = Some(vec![LinkChange { at_s: 20.0, rate_mbps: 35.0 }]);
        let changing = Link { changes, ..link(5.0, 0.0) };
        let mut links = [
            changing,
            link(1000.0, 0.0),
            link(10.0, 25.0),
            link(5.0, 0.0),
            Link { loss_percent: Some(0.5), ..link(5.0, 25.0) },
        ]
        .map(|link| LinkKey::of(&link));
        links.sort();
        assert_eq!(
            links.map(|link| link.label()),
            [
                "5 Mbit/s, 0 ms delay",
                "1 Gbit/s, 0 ms delay",
                "10 Mbit/s, 25 ms delay",
                "5 Mbit/s, 25 ms delay, 0.5 % loss",
                "5 Mbit/s, 35 Mbit/s from 20 s, 0 ms delay",
            ]
        );
    }

    #[test]
    fn applications_and_movers_are_in_order() {
        let mut apps = ["own", "idle", "detect", "fluid"].map(App::of);
        apps.sort();
        assert_eq!(apps.each_ref().map(App::label), ["App1 fluid", "App4 detect", "Idle", "own"]);
        let mover = |system: &str, variant: &str| {
            let (system, variant) = (system.into(), variant.into());
            Mover::of(&PaperRun { system, variant, ..PaperRun::default() })
        };
        let mut movers =
            [mover("qemu", "precopy"), mover("howdah", "static:xz:6"), mover("howdah", "default")];
        movers.sort();
        assert_eq!(
            movers.each_ref().map(Mover::label),
            ["howdah", "howdah static:xz:6", "qemu precopy"]
        );
        assert_eq!(movers[1].forced_mode(), Some("xz:6"));
        assert!(movers[0].is_default() && movers[2].is_peer());
    }
}
