//! A guest that does again what was recorded.

use std::{sync::Arc, time::Duration};

use guest_images::{Chunk, chunk::ZERO_CHUNK};

use super::{ContentId, Trace};
use crate::{
    BaseView, ChunkId, ChunkSet, Clock, Geometry, SourceVm, Space,
    audit::Audit,
    base_view::own_place,
    tcp::MonotonicClock,
    vm::{LEAST_RUN_SHARE, VmError},
};

/// What stands in for a machine's state: no two bytes alike to a compressor, as saved registers of a
/// few vCPUs nearly are.
const STATE_BYTES: usize = 12 << 10;

/// How a trace is played.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Play {
    /// Where in the trace the guest is when the handoff begins.
    pub from: Duration,
    /// Whether the guest goes on from the begin of the trace when that is over; if not, it is idle.
    pub again: bool,
    /// How fast the guest's time passes.
    pub speed: f64,
}

impl Default for Play {
    fn default() -> Self {
        Self { from: Duration::ZERO, again: true, speed: 1.0 }
    }
}

/// Plays a trace. The guest begins to run when tracking begins, at [`Play::from`], so that every
/// handoff meets the same guest; it changes nothing while it is paused.
#[derive(Debug)]
pub struct TraceVm<C = MonotonicClock> {
    trace: Arc<Trace>,
    clock: C,
    play: Play,
    /// The content of each chunk, by number.
    ram: Vec<ContentId>,
    disk: Vec<ContentId>,
    dirty: ChunkSet,
    tracking: bool,
    /// The guest's time when it was last looked at, and the clock's then; `None` while it is paused
    /// or has not begun.
    position: Duration,
    since: Option<Duration>,
    paused: bool,
    /// The change that comes next, and how often the trace was played to its end.
    next: usize,
    laps: u32,
    throttle: f64,
}

impl<C: Clock> TraceVm<C> {
    /// A guest at [`Play::from`], which does not run yet.
    pub fn new(trace: Arc<Trace>, play: Play, clock: C) -> Self {
        let geometry = trace.geometry;
        let base = &trace.base;
        let begin = |space: Space| -> Vec<ContentId> {
            let ids = (0..geometry.space_len(space)).map(|index| ChunkId { space, index });
            ids.map(|id| own_place(&**base, id).map_or(ContentId::ZERO, |at| base.content(at)))
                .collect()
        };
        let mut vm = Self {
            clock,
            play,
            ram: begin(Space::Ram),
            disk: begin(Space::Disk),
            dirty: ChunkSet::new(geometry),
            tracking: false,
            position: Duration::ZERO,
            since: None,
            paused: false,
            next: 0,
            laps: 0,
            throttle: 1.0,
            trace: Arc::clone(&trace),
        };
        for (id, content) in &trace.initial {
            vm.set(*id, *content);
        }
        vm.play_until(play.from);
        vm.dirty = ChunkSet::new(geometry);
        vm
    }

    /// The trace.
    pub fn trace(&self) -> &Arc<Trace> {
        &self.trace
    }

    /// How far the guest is: the time for which it ran, counted from the begin of the trace.
    pub fn position(&mut self) -> Duration {
        self.catch_up();
        self.position
    }

    /// What a chunk holds now.
    pub fn chunk(&self, id: ChunkId) -> Option<&Chunk> {
        let at = usize::try_from(id.index).ok()?;
        let content = self.contents_of(id.space).get(at)?;
        self.trace.contents().get(*content)
    }

    fn contents_of(&self, space: Space) -> &[ContentId] {
        match space {
            Space::Ram => &self.ram,
            Space::Disk => &self.disk,
        }
    }

    fn set(&mut self, id: ChunkId, content: ContentId) {
        let slots = match id.space {
            Space::Ram => &mut self.ram,
            Space::Disk => &mut self.disk,
        };
        if let Some(slot) = usize::try_from(id.index).ok().and_then(|at| slots.get_mut(at)) {
            *slot = content;
            self.dirty.insert(id);
        }
    }

    /// Does what the guest did until now.
    fn catch_up(&mut self) {
        let Some(since) = self.since else { return };
        let now = self.clock.now();
        let ran = now.saturating_sub(since).mul_f64(self.play.speed * self.throttle);
        self.since = Some(now);
        self.play_until(self.position + ran);
    }

    fn play_until(&mut self, position: Duration) {
        self.position = position;
        let trace = Arc::clone(&self.trace);
        loop {
            let lap = trace.duration.saturating_mul(self.laps);
            match trace.changes.get(self.next) {
                Some(change) if lap.saturating_add(change.at) <= position => {
                    self.next += 1;
                    self.set(change.id, change.content);
                }
                Some(_) => return,
                None => {
                    let ends = lap.saturating_add(trace.duration);
                    let empty = trace.changes.is_empty() || trace.duration.is_zero();
                    if !self.play.again || empty || ends > position {
                        return;
                    }
                    self.next = 0;
                    self.laps += 1;
                }
            }
        }
    }

    fn begin(&mut self) {
        if self.since.is_none() && !self.paused {
            self.since = Some(self.clock.now());
        }
    }
}

impl<C: Clock> SourceVm for TraceVm<C> {
    fn geometry(&self) -> Geometry {
        self.trace.geometry
    }

    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        self.catch_up();
        let base = &self.trace.base;
        let differs = |(index, content): (u64, &ContentId)| {
            let id = ChunkId { space: Space::Disk, index };
            own_place(&**base, id).map_or(ContentId::ZERO, |at| base.content(at)) != *content
        };
        Ok((0u64..).zip(&self.disk).filter(|chunk| differs(*chunk)).count() as u64)
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        self.begin();
        self.catch_up();
        self.tracking = true;
        self.dirty = ChunkSet::new(self.trace.geometry);
        let mut set = ChunkSet::new(self.trace.geometry);
        self.trace.initial.iter().for_each(|(id, _)| _ = set.insert(*id));
        let played = if self.laps > 0 { self.trace.changes.len() } else { self.next };
        self.trace.changes.iter().take(played).for_each(|change| _ = set.insert(change.id));
        Ok(set)
    }

    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        if !self.tracking {
            return Err("nothing is tracked".into());
        }
        self.catch_up();
        Ok(std::mem::replace(&mut self.dirty, ChunkSet::new(self.trace.geometry)))
    }

    fn peek_dirty(&mut self) -> Result<ChunkSet, VmError> {
        self.catch_up();
        Ok(self.dirty.clone())
    }

    fn throttle(&mut self, run_share: f64) -> Result<bool, VmError> {
        self.catch_up();
        self.throttle = run_share.clamp(LEAST_RUN_SHARE, 1.0);
        Ok(true)
    }

    fn stop_tracking(&mut self) -> Result<(), VmError> {
        self.throttle(1.0)?;
        self.tracking = false;
        Ok(())
    }

    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        self.catch_up();
        *into = *self.chunk(id).ok_or_else(|| format!("there is no chunk {id:?}"))?;
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.throttle(1.0)?;
        self.since = None;
        self.paused = true;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        let mut state = vec![0; STATE_BYTES];
        blake3::Hasher::new().update(&self.trace.base.id().0).finalize_xof().fill(&mut state);
        Ok(state)
    }

    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        let mut audit = Audit::default();
        for space in [Space::Ram, Space::Disk] {
            for (index, content) in (0u64..).zip(self.contents_of(space)) {
                if *content != ContentId::ZERO {
                    audit.chunk(index, self.trace.contents().get(*content).unwrap_or(ZERO_CHUNK));
                }
            }
            audit.end_of_space(self.trace.geometry.space_len(space));
        }
        Ok(audit.finish())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.paused = false;
        self.begin();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    use guest_images::{CHUNK_SIZE, Part};

    use super::*;
    use crate::trace::TraceBuilder;

    const NONE: [u64; 0] = [];

    #[derive(Clone, Default)]
    struct Hand(Arc<AtomicU64>);

    impl Hand {
        fn at(&self, ms: u64) {
            self.0.store(ms, SeqCst);
        }
    }

    impl Clock for Hand {
        fn now(&self) -> Duration {
            Duration::from_millis(self.0.load(SeqCst))
        }
    }

    fn ram(index: u64) -> ChunkId {
        ChunkId { space: Space::Ram, index }
    }

    fn filled(byte: u8) -> Chunk {
        [byte; CHUNK_SIZE]
    }

    /// Chunk 0 differs from the beginning; 1 changes at 100 ms and 300 ms, 2 at 200 ms; 400 ms in all.
    fn trace() -> Arc<Trace> {
        let geometry = Geometry { ram_chunks: 4, disk_chunks: 0 };
        let mut trace = TraceBuilder::new(geometry, [0; Part::ALL.len()], 10);
        trace.initial(ram(0), &filled(9)).unwrap();
        let ms = Duration::from_millis;
        trace.change(ms(100), ram(1), &filled(1)).unwrap();
        trace.change(ms(200), ram(2), &filled(2)).unwrap();
        trace.change(ms(300), ram(1), &filled(3)).unwrap();
        Arc::new(trace.finish(ms(400)))
    }

    fn harvested(vm: &mut TraceVm<Hand>) -> Vec<u64> {
        vm.harvest().unwrap().iter().map(|id| id.index).collect()
    }

    fn first_bytes(vm: &mut TraceVm<Hand>) -> Vec<u8> {
        let mut chunk = filled(0);
        let mut byte = |index| {
            vm.read_chunk(ram(index), &mut chunk).unwrap();
            chunk[0]
        };
        (0..4).map(&mut byte).collect()
    }

    #[test]
    fn changes_come_at_their_times() {
        let clock = Hand::default();
        let play = Play { again: false, ..Play::default() };
        let mut vm = TraceVm::new(trace(), play, clock.clone());
        clock.at(5000);
        assert_eq!(vm.start_tracking().unwrap().iter().collect::<Vec<_>>(), [ram(0)]);
        clock.at(5099);
        assert_eq!(harvested(&mut vm), NONE);
        clock.at(5100);
        assert_eq!(harvested(&mut vm), [1]);
        assert_eq!(first_bytes(&mut vm), [9, 1, 0, 0]);
        assert_eq!(harvested(&mut vm), NONE);
        clock.at(5250);
        assert_eq!(first_bytes(&mut vm), [9, 1, 2, 0]);
        clock.at(5300);
        assert_eq!(harvested(&mut vm), [1, 2]);
        assert_eq!(first_bytes(&mut vm), [9, 3, 2, 0]);
        clock.at(60_000);
        assert_eq!(harvested(&mut vm), NONE);
    }

    #[test]
    fn nothing_changes_while_paused_and_all_of_it_after() {
        let clock = Hand::default();
        let mut vm = TraceVm::new(trace(), Play::default(), clock.clone());
        vm.start_tracking().unwrap();
        clock.at(150);
        vm.pause().unwrap();
        clock.at(1150);
        assert_eq!(harvested(&mut vm), [1]);
        assert_eq!(first_bytes(&mut vm), [9, 1, 0, 0]);
        let hash = vm.full_hash().unwrap();
        vm.resume().unwrap();
        clock.at(1199);
        assert_eq!((harvested(&mut vm), vm.full_hash().unwrap()), (vec![], hash));
        clock.at(1200);
        assert_eq!(harvested(&mut vm), [2]);
    }

    #[test]
    fn a_throttled_guest_does_less() {
        let clock = Hand::default();
        let mut vm = TraceVm::new(trace(), Play::default(), clock.clone());
        vm.start_tracking().unwrap();
        assert!(vm.throttle(0.5).unwrap());
        clock.at(199);
        assert!(vm.peek_dirty().unwrap().is_empty());
        clock.at(200);
        assert_eq!(vm.peek_dirty().unwrap().len(), 1, "looked at, not taken");
        assert_eq!(harvested(&mut vm), [1]);
        vm.stop_tracking().unwrap();
        clock.at(300);
        assert_eq!(vm.position(), Duration::from_millis(200), "full speed again");
    }

    #[test]
    fn it_begins_anywhere_runs_at_any_speed_and_goes_on() {
        let clock = Hand::default();
        let play = Play { from: Duration::from_millis(250), speed: 2.0, ..Play::default() };
        let mut vm = TraceVm::new(trace(), play, clock.clone());
        assert_eq!(first_bytes(&mut vm), [9, 1, 2, 0]);
        let begun: Vec<_> = vm.start_tracking().unwrap().iter().map(|id| id.index).collect();
        assert_eq!(begun, [0, 1, 2], "what changed before differs from base");
        clock.at(25);
        assert_eq!(harvested(&mut vm), [1]);
        // The trace's end is at 75 ms: what came first comes again at 125.
        clock.at(124);
        assert_eq!(harvested(&mut vm), NONE);
        clock.at(125);
        assert_eq!(harvested(&mut vm), [1]);
        assert_eq!(vm.position(), Duration::from_millis(500));
    }
}
