//! `howdah save`, `restore` and `overlay inspect`, on a file that was written without a guest.

use std::{fs, sync::Arc};

use guest_images::{Chunk, store::Store};
use handoff::{
    BaseView, ChunkId, ChunkSet, Geometry, SourceVm, Space, engine, stage::StageOptions,
    tcp::MonotonicClock, vm::VmError,
};

use crate::common::Cloudlet;

const GEOMETRY: Geometry = Geometry { ram_chunks: (32 << 20) / 4096, disk_chunks: 3 };

/// A paused guest with 40 chunks of RAM and one of disk that are not its base's.
struct Frozen;

impl Frozen {
    fn changed() -> ChunkSet {
        let mut set = ChunkSet::new(GEOMETRY);
        for index in 100..140 {
            set.insert(ChunkId { space: Space::Ram, index });
        }
        set.insert(ChunkId { space: Space::Disk, index: 1 });
        set
    }
}

impl SourceVm for Frozen {
    fn geometry(&self) -> Geometry {
        GEOMETRY
    }
    fn changed_disk_chunks(&mut self) -> Result<u64, VmError> {
        Ok(0)
    }

    fn start_tracking(&mut self) -> Result<ChunkSet, VmError> {
        Ok(Self::changed())
    }
    fn harvest(&mut self) -> Result<ChunkSet, VmError> {
        Ok(ChunkSet::new(GEOMETRY))
    }
    fn stop_tracking(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn read_chunk(&mut self, id: ChunkId, into: &mut Chunk) -> Result<(), VmError> {
        let words = into.chunks_exact_mut(8).zip(0u64..);
        words.for_each(|(word, n)| word.copy_from_slice(&(id.index << 20 | n).to_le_bytes()));
        Ok(())
    }
    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }
    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(vec![7; 500])
    }
    fn full_hash(&mut self) -> Result<[u8; 32], VmError> {
        Ok([0; 32])
    }
    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

/// Imports a base and saves a guest of it to `saved`.
fn saved(cloudlet: &Cloudlet) -> Vec<u8> {
    cloudlet.base("tiny").ok();
    let base = Store::open(&cloudlet.home().join("store")).unwrap().get("tiny").unwrap();
    let own: Arc<dyn BaseView> = Arc::new(base);
    let profile = Cloudlet::profile(None).encode().unwrap();
    let machine = postcard::to_stdvec(&(1u8, "quiet", profile)).unwrap();
    let mut file = Vec::new();
    let (stages, clock) = (StageOptions::default(), MonotonicClock::default());
    let pipeline = engine::PipelineOptions::default();
    engine::save(&mut Frozen, own.into(), "ada", &machine, stages, pipeline, &mut file, &clock)
        .unwrap();
    cloudlet.file("saved", &file);
    file
}

#[test]
fn a_file_is_looked_into() {
    let cloudlet = Cloudlet::new();
    let bytes = saved(&cloudlet).len();
    let seen = cloudlet.line("overlay inspect saved --json").ok().json();
    assert_eq!((&seen["vm"], &seen["bytes"]), (&"ada".into(), &bytes.into()));
    assert_eq!(seen["machine"]["memory_mib"], 32);
    assert_eq!(seen["machine"]["append"], "quiet");
    let classes = seen["classes"].as_array().unwrap();
    let chunks: u64 = classes.iter().map(|tally| tally["chunks"].as_u64().unwrap()).sum();
    assert_eq!(chunks, 41, "{seen}");
    let text = cloudlet.line("overlay inspect saved").ok().stdout;
    for part in ["VM ada", "RAM", "disk", "machine state", "whole"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn files_that_are_no_saved_vms() {
    let cloudlet = Cloudlet::new();
    let file = saved(&cloudlet);
    cloudlet.line("overlay inspect missing").fails(3, &["missing"]);
    cloudlet.line("overlay inspect .").fails(2, &["howdah save"]);
    cloudlet.line("restore missing --name b").fails(3, &["missing"]);
    cloudlet.line("restore saved").fails(2, &["--name"]);
    cloudlet.line("overlay inspect disk.raw").fails(6, &["disk.raw", "not a saved VM"]);
    cloudlet.file("empty", b"");
    cloudlet.line("overlay inspect empty").fails(6, &["empty", "cut off"]);
    for cut in [12, 100, file.len() / 2, file.len() - 1] {
        cloudlet.file("cut", &file[..cut]);
        cloudlet.line("overlay inspect cut").fails(6, &["cut", "cut off"]);
    }
    for at in [20, 60, file.len() / 2, file.len() - 1] {
        let mut altered = file.clone();
        altered[at] ^= 1;
        cloudlet.file("altered", &altered);
        cloudlet.line("overlay inspect altered").fails(6, &["altered"]);
    }
    cloudlet.file("longer", &[&file[..], b"x"].concat());
    cloudlet.line("overlay inspect longer").fails(6, &["longer", "behind the end"]);
    assert_eq!(cloudlet.line("vm ls --json").json(), serde_json::json!([]));
}

/// These get as far as looking at the host.
#[test]
fn files_that_cannot_be_restored_leave_no_vm() {
    if vmm::HostCheck::run().is_err() {
        eprintln!("not tested: this host cannot run VMs");
        return;
    }
    let cloudlet = Cloudlet::new();
    let file = saved(&cloudlet);
    cloudlet.file("cut", &file[..file.len() - 1]);
    for line in ["restore cut --name b --detach", "restore cut --name b"] {
        let ran = cloudlet.line(line);
        assert!(!ran.stderr.contains("panicked"), "{ran:?}");
        assert!(ran.code != Some(0), "{ran:?}");
    }
    let raw = "restore disk.raw --name b --detach";
    let ran = cloudlet.line(raw);
    assert_eq!(ran.code, Some(6), "{ran:?}");
    assert!(ran.stderr.contains("not a saved VM"), "{ran:?}");
    cloudlet.line("base rm tiny").ok();
    let ran = cloudlet.line("restore saved --name b --detach");
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.stderr.contains("howdah base import"), "{ran:?}");
    assert_eq!(cloudlet.line("vm ls --json").json(), serde_json::json!([]));
    assert!(fs::read_dir(cloudlet.home().join("vms")).unwrap().next().is_none());
}
