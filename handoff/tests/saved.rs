//! A VM in a file: what is saved comes back, and what was cut off or altered never does.
#![allow(clippy::unwrap_used)]

mod model;

use std::sync::{Arc, atomic::Ordering::SeqCst};

use guest_images::{BaseId, CHUNK_SIZE};
use handoff::{
    BaseView, Bases, Refusal, SourceVm, Space, TargetVm,
    base_view::testing::MemBase,
    engine::PipelineOptions,
    engine::saved::{RestoreError, SaveError, Saved, SavedError, Tally, inspect, restore, save},
    stage::StageOptions,
    tcp::MonotonicClock,
    trace::{
        Play, TraceVm,
        synth::{Mix, Synth},
    },
};
use model::{Act, Host, Memory, Vm, acts, all, base, chunk, disk, ram};
use proptest::prelude::*;

fn guest(base: &Arc<MemBase>, acts: &[Act]) -> Vm {
    let mut memory = Memory::fresh(base);
    acts.iter().for_each(|act| memory.act(*act));
    Vm::new(memory)
}

fn write(vm: &mut Vm, host: &Host, to: impl std::io::Write + Send) -> Result<Saved, SaveError> {
    let (clock, pipeline) = (MonotonicClock::default(), PipelineOptions::default());
    save(vm, host.bases(), "vm", b"one vCPU", StageOptions::default(), pipeline, to, &clock)
}

fn saved(vm: &mut Vm, host: &Host) -> (Vec<u8>, Saved) {
    let mut file = Vec::new();
    let saved = write(vm, host, &mut file).unwrap();
    assert_eq!(saved.report.bytes, file.len() as u64);
    (file, saved)
}

/// A file of a few hundred bytes with one segment of each kind.
fn small() -> (Host, Vec<u8>) {
    let base = base(true);
    let host = Host::new(&base);
    let acts = [Act::Zero(ram(5)), Act::Copy(disk(3), ram(9)), Act::Write(disk(1), 77)];
    let (file, _) = saved(&mut guest(&base, &acts), &host);
    assert!(file.len() < 2000, "{} bytes", file.len());
    (host, file)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_is_saved_comes_back(before in acts(80), after in acts(20), memory: bool) {
        let base = base(memory);
        let mut vm = guest(&base, &before);
        let mut host = Host::new(&base);
        let (file, first) = saved(&mut vm, &host);
        for _ in 0..2 {
            let mut restored = restore(&mut host, &file[..]).unwrap();
            prop_assert!(all().all(|id| restored.vm.vm.memory().get(id) == vm.memory().get(id)));
            prop_assert!(!restored.vm.vm.memory().running);
            prop_assert_eq!(restored.table.root(), first.table.current_root());
            prop_assert_eq!(&restored.offer.vm_name, "vm");
            prop_assert_eq!(&restored.offer.machine, b"one vCPU");
            restored.vm.resume().unwrap();
        }
        let seen = inspect(&file[..]).unwrap();
        prop_assert_eq!(&seen.root, &first.report.root);
        prop_assert_eq!(seen.bytes, file.len() as u64);

        // What was saved goes on, and can be saved again.
        vm.resume().unwrap();
        after.iter().for_each(|act| vm.memory().act(*act));
        vm.pause().unwrap();
        let (file, _) = saved(&mut vm, &host);
        let restored = restore(&mut host, &file[..]).unwrap();
        prop_assert!(all().all(|id| restored.vm.vm.memory().get(id) == vm.memory().get(id)));
        prop_assert_eq!(host.discarded.load(SeqCst), 0);
    }

    #[test]
    fn arbitrary_bytes_are_no_vm(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..400) {
        let (mut host, file) = small();
        let grafted = [&file[..at.min(file.len())], &bytes].concat();
        if grafted != file {
            prop_assert!(inspect(&grafted[..]).is_err());
            prop_assert!(restore(&mut host, &grafted[..]).is_err());
        }
    }
}

#[test]
fn cut_off_anywhere_it_is_no_vm() {
    let (mut host, file) = small();
    for len in 0..file.len() {
        let cut = &file[..len];
        assert!(matches!(inspect(cut), Err(SavedError::CutOff(_))), "cut to {len}");
        let error = restore(&mut host, cut).map(|_| ()).unwrap_err();
        assert!(
            matches!(error, RestoreError::Saved(SavedError::CutOff(_))),
            "cut to {len}: {error}"
        );
    }
    assert!(host.prepared > 0);
    assert_eq!(host.discarded.load(SeqCst), host.prepared, "each was dropped");
    restore(&mut host, &file[..]).unwrap();
    let longer = [&file[..], &[0]].concat();
    assert!(matches!(inspect(&longer[..]), Err(SavedError::Trailing)));
    assert!(restore(&mut host, &longer[..]).is_err());
}

#[test]
fn altered_anywhere_it_is_no_vm() {
    let (mut host, file) = small();
    for at in 0..file.len() {
        for xor in [1u8, 0x80, 0xff] {
            let mut altered = file.clone();
            altered[at] ^= xor;
            assert!(inspect(&altered[..]).is_err(), "byte {at} altered by {xor:#x}");
            assert!(restore(&mut host, &altered[..]).is_err(), "byte {at} altered by {xor:#x}");
        }
    }
    assert_eq!(host.discarded.load(SeqCst), host.prepared, "each was dropped");
}

#[test]
fn bytes_put_together_from_two_files_are_no_vm() {
    let base = base(false);
    let mut host = Host::new(&base);
    let many: Vec<_> = (0..50).map(|i| Act::Write(ram(i), 900 + i)).collect();
    let (one, _) = saved(&mut guest(&base, &many), &host);
    let (two, _) = saved(&mut guest(&base, &many[..49]), &host);
    // The same head; the end of one behind the segments of the other.
    let end = 73;
    let mixed = [&one[..one.len() - end], &two[two.len() - end..]].concat();
    assert!(matches!(inspect(&mixed[..]), Err(SavedError::End)));
    assert!(restore(&mut host, &mixed[..]).is_err());
}

#[test]
fn inspection_counts_by_class_and_space() {
    let base = base(true);
    let host = Host::new(&base);
    let acts = [
        Act::Zero(ram(5)),
        Act::Copy(disk(3), ram(9)),
        Act::Write(disk(1), 7000),
        Act::Write(ram(20), 7001),
        Act::Write(ram(30), 7000),
    ];
    let (file, saved) = saved(&mut guest(&base, &acts), &host);
    let seen = inspect(&file[..]).unwrap();
    let count = |class: &str, space| {
        let of = |t: &&Tally| t.class == class && t.space == space;
        seen.classes.iter().find(of).map_or((0, 0), |t| (t.chunks, t.bytes))
    };
    assert_eq!(count("zero", Space::Ram), (1, 0));
    assert_eq!(count("base_disk", Space::Ram), (1, 0));
    let (chunks, bytes) = count("data", Space::Ram);
    let (more, more_bytes) = count("data", Space::Disk);
    assert_eq!((bytes, more_bytes), (chunks * 4096, more * 4096));
    let all: u64 = seen.classes.iter().map(|t| t.chunks).sum();
    // The last is what saving itself wrote: a delta against the base, or data.
    assert_eq!(all, acts.len() as u64 + 1, "{:?}", seen.classes);
    assert_eq!(saved.table.len(), all);
    assert_eq!((seen.base, seen.also.len()), (base.id().to_string(), 0));
    assert_eq!(seen.state_bytes.0, b"registers".len() as u64);
    assert!(seen.batch_bytes.0 > seen.batch_bytes.1);
    let classes = &saved.report.classes;
    assert_eq!(classes.iter().map(|c| c.chunks).sum::<u64>(), all);
}

#[test]
fn every_base_it_refers_to_must_be_there() {
    let base = base(false);
    let mut host = Host::new(&base);
    let other = Arc::new(MemBase::new((0..9).map(|i| chunk(800 + i)).collect(), vec![], vec![]));
    host.also = vec![Arc::clone(&other)];
    let acts: Vec<_> = (0..9).map(|i| Act::Write(ram(i), 800 + i)).collect();
    let mut vm = guest(&base, &acts);
    let (file, _) = saved(&mut vm, &host);
    assert_eq!(inspect(&file[..]).unwrap().also, [other.id().to_string()]);
    let restored = restore(&mut host, &file[..]).unwrap();
    assert!(all().all(|id| restored.vm.vm.memory().get(id) == vm.memory().get(id)));

    host.also.clear();
    let missing = |e: RestoreError, id: BaseId| matches!(e, RestoreError::Refused(Refusal::UnknownBase(found)) if found == id);
    assert!(missing(restore(&mut host, &file[..]).map(|_| ()).unwrap_err(), other.id()));
    let mut elsewhere = Host::new(&model::base(true));
    assert!(missing(restore(&mut elsewhere, &file[..]).map(|_| ()).unwrap_err(), base.id()));
}

/// A disk that is full after so many bytes.
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.0 {
            0 => Err(std::io::ErrorKind::StorageFull.into()),
            left => {
                let n = left.min(bytes.len());
                self.0 -= n;
                Ok(n)
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_that_is_full_leaves_the_vm_as_it_was() {
    let base = base(false);
    let host = Host::new(&base);
    let acts: Vec<_> = (0..60).map(|i| Act::Write(ram(i), 900 + i)).collect();
    let mut vm = guest(&base, &acts);
    let (file, _) = saved(&mut vm, &host);
    for room in [0, 10, 60, 300, file.len() / 2] {
        let error = write(&mut vm, &host, Full(room)).map(|_| ()).unwrap_err();
        let full =
            matches!(&error, SaveError::Io(e) if e.kind() == std::io::ErrorKind::StorageFull);
        assert!(full, "{room}: {error}");
    }
    let mut host = host;
    let (file, _) = saved(&mut vm, &host);
    restore(&mut host, &file[..]).unwrap();
}

/// Workers hold back what a link of unknown rate would have to carry. A file is no link.
#[test]
fn much_that_does_not_compress_is_saved_too() {
    let synth = Synth { changed: 1000, mix: Mix::RANDOM, writes_per_s: 0.0, ..Synth::default() };
    let trace = Arc::new(synth.build().unwrap());
    let bases = Bases::from(Arc::clone(trace.base()) as Arc<dyn BaseView>);
    let mut vm = TraceVm::new(Arc::clone(&trace), Play::default(), MonotonicClock::default());
    vm.pause().unwrap();
    let (clock, mut file) = (MonotonicClock::default(), Vec::new());
    let options = (StageOptions::default(), PipelineOptions::default());
    save(&mut vm, bases, "vm", b"one vCPU", options.0, options.1, &mut file, &clock).unwrap();
    assert!(file.len() > 1000 * CHUNK_SIZE);
    inspect(&file[..]).unwrap();
}
