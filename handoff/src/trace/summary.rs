//! What is in a trace, for people.

use std::{collections::HashMap, time::Duration};

use guest_images::{ChunkHash, chunk::ZERO_CHUNK};
use serde::Serialize;

use super::{ContentId, Trace};
use crate::{BaseView, ChunkId, ChunkSet, Space, base_view::own_place};

/// What happened in a stretch of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Window {
    /// Its begin, in seconds.
    pub from_s: f64,
    /// Its length.
    pub for_s: f64,
    /// Changes in it.
    pub changes: u64,
    /// Different chunks that changed in it: the working set.
    pub chunks: u64,
    /// Of those, chunks that had not changed in the trace before.
    pub new_chunks: u64,
}

/// What a trace holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// The guest's RAM, in chunks.
    pub ram_chunks: u64,
    /// Its disk.
    pub disk_chunks: u64,
    /// How long it was recorded.
    pub duration_s: f64,
    /// Different contents, 4 KiB each.
    pub contents: u64,
    /// What differed from base at the begin, ...
    pub initial_ram: u64,
    /// ... and on disk.
    pub initial_disk: u64,
    /// What became of these by the means of the stages, without deltas.
    pub initial_classes: Classes,
    /// Changes afterwards, ...
    pub changes: u64,
    /// ... those of them on disk, ...
    pub disk_changes: u64,
    /// ... how many different chunks changed, ...
    pub changed_chunks: u64,
    /// ... and what these changes were.
    pub change_classes: Classes,
    /// The trace in stretches of time.
    pub windows: Vec<Window>,
}

/// Chunks by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Classes {
    /// The base's in the same place.
    pub base_state: u64,
    /// Zeros.
    pub zero: u64,
    /// Found elsewhere in the base.
    pub in_base: u64,
    /// A content that came before.
    pub seen: u64,
    /// The rest.
    pub data: u64,
}

impl Classes {
    /// Names and numbers.
    pub fn named(self) -> [(&'static str, u64); 5] {
        let Self { base_state, zero, in_base, seen, data } = self;
        [
            ("base state", base_state),
            ("zero", zero),
            ("in base", in_base),
            ("seen", seen),
            ("data", data),
        ]
    }
}

impl Trace {
    /// Counts what it holds, over at most so many stretches of time.
    pub fn summary(&self, windows: u32) -> Summary {
        let count = |space| self.initial.iter().filter(|(id, _)| id.space == space).count() as u64;
        let mut sorter = Sorter { trace: self, in_base: HashMap::new(), seen: HashMap::new() };
        let mut initial_classes = Classes::default();
        self.initial
            .iter()
            .for_each(|(id, content)| sorter.sort(*id, *content, &mut initial_classes));
        let mut change_classes = Classes::default();
        for change in &self.changes {
            sorter.sort(change.id, change.content, &mut change_classes);
        }
        let mut changed = ChunkSet::new(self.geometry);
        self.changes.iter().for_each(|change| _ = changed.insert(change.id));
        let on_disk = self.changes.iter().filter(|change| change.id.space == Space::Disk);
        Summary {
            ram_chunks: self.geometry.ram_chunks,
            disk_chunks: self.geometry.disk_chunks,
            duration_s: self.duration.as_secs_f64(),
            contents: self.contents().len() as u64,
            initial_ram: count(Space::Ram),
            initial_disk: count(Space::Disk),
            initial_classes,
            changes: self.changes.len() as u64,
            disk_changes: on_disk.count() as u64,
            changed_chunks: changed.len(),
            change_classes,
            windows: self.windows(windows.max(1)),
        }
    }

    fn windows(&self, windows: u32) -> Vec<Window> {
        // Whole seconds where there are enough of them.
        let each = (self.duration / windows).max(Duration::from_secs(1));
        let mut before = ChunkSet::new(self.geometry);
        let mut rest = &self.changes[..];
        let mut all = Vec::new();
        let mut from = Duration::ZERO;
        while from < self.duration {
            let until = (from + each).min(self.duration);
            // The last one has its end in it.
            let last = until == self.duration;
            let n = rest.partition_point(|change| change.at < until || last);
            let (here, later) = rest.split_at(n);
            let mut set = ChunkSet::new(self.geometry);
            here.iter().for_each(|change| _ = set.insert(change.id));
            let new_chunks = set.iter().filter(|id| !before.contains(*id)).count() as u64;
            before.union(&set);
            all.push(Window {
                from_s: from.as_secs_f64(),
                for_s: (until - from).as_secs_f64(),
                changes: here.len() as u64,
                chunks: set.len(),
                new_chunks,
            });
            (rest, from) = (later, until);
        }
        all
    }
}

struct Sorter<'a> {
    trace: &'a Trace,
    in_base: HashMap<ContentId, bool>,
    seen: HashMap<ContentId, ()>,
}

impl Sorter<'_> {
    fn sort(&mut self, id: ChunkId, content: ContentId, classes: &mut Classes) {
        let base = &self.trace.base;
        let own = own_place(&**base, id).map_or(ContentId::ZERO, |place| base.content(place));
        let found = *self.in_base.entry(content).or_insert_with(|| {
            let chunk = self.trace.contents().get(content).unwrap_or(ZERO_CHUNK);
            base.lookup(&ChunkHash::of(chunk)).is_some()
        });
        let class = if own == content {
            &mut classes.base_state
        } else if content == ContentId::ZERO {
            &mut classes.zero
        } else if found {
            &mut classes.in_base
        } else if self.seen.insert(content, ()).is_some() {
            &mut classes.seen
        } else {
            &mut classes.data
        };
        *class += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::synth::{Mix, Synth};

    #[test]
    fn all_is_counted_once() {
        let spec = Synth {
            ram_chunks: 4096,
            disk_chunks: 1024,
            cache_chunks: 50,
            changed: 600,
            changed_disk: 40,
            mix: Mix::PAGE_CACHE,
            writes_per_s: 100.0,
            duration: Duration::from_secs(4),
            ..Synth::default()
        };
        let trace = spec.build().unwrap();
        let summary = trace.summary(10);
        assert_eq!((summary.initial_ram, summary.initial_disk, summary.changes), (600, 40, 400));
        let sum = |classes: Classes| classes.named().iter().map(|(_, n)| n).sum::<u64>();
        assert_eq!((sum(summary.initial_classes), sum(summary.change_classes)), (640, 400));
        assert!(summary.initial_classes.in_base > 300, "{summary:?}");
        assert_eq!(summary.windows.len(), 4);
        assert_eq!(summary.windows.iter().map(|window| window.changes).sum::<u64>(), 400);
        let new = summary.windows.iter().map(|window| window.new_chunks).sum::<u64>();
        assert_eq!(new, summary.changed_chunks);
    }
}
