//! A disk under the overlay that fails: what was there is still there, what failed was not marked, and
//! the error says which file.

use super::*;
use crate::overlay::batched::{ChunkIo, Means};

const NEW: Chunk = [0xee; CHUNK_SIZE];

/// An overlay whose data file can be exchanged for one that fails, and back.
struct Patient {
    overlay: Arc<Overlay>,
    healthy: Option<File>,
}

impl Patient {
    fn new(vm: &Vm) -> Self {
        Self { overlay: Arc::new(vm.create()), healthy: None }
    }

    fn exchange(&mut self, file: File) -> File {
        std::mem::replace(&mut Arc::get_mut(&mut self.overlay).unwrap().data, file)
    }

    /// Takes writes for granted, and has room for none.
    fn full(&mut self) {
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        self.healthy = Some(self.exchange(full));
    }

    /// Reads as little as a bad block gives.
    fn unreadable(&mut self) {
        let directory = File::open("/").unwrap();
        self.healthy = Some(self.exchange(directory));
    }

    /// Cannot say that anything is durable.
    fn forgetful(&mut self) {
        let (_reader, writer) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(writer));
        self.healthy = Some(self.exchange(pipe));
    }

    fn heal(&mut self) {
        let healthy = self.healthy.take().unwrap();
        self.exchange(healthy);
    }
}

fn says(error: &OverlayError, what: &str) {
    let text = error.to_string();
    assert!(text.starts_with(what) && text.contains(DATA_FILE), "{text}");
}

/// Every way to write, to a disk that is full: nothing changes, and later it does.
#[test]
fn a_full_disk_changes_nothing() {
    let (_fixture, vm) = Vm::new();
    let mut patient = Patient::new(&vm);
    patient.overlay.write_chunk(1, &[1; CHUNK_SIZE]).unwrap();
    patient.overlay.zero_chunk(2).unwrap();
    let before = whole(&patient.overlay);
    let states = |overlay: &Overlay| (0..CHUNKS).map(|c| overlay.state(c)).collect::<Vec<_>>();
    let old_states = states(&patient.overlay);
    patient.full();
    for chunk in 0..4 {
        says(&patient.overlay.write_chunk(chunk, &NEW).unwrap_err(), "writing");
        says(&patient.overlay.write_at(chunk * 4096 + 7, b"x").unwrap_err(), "writing");
    }
    let group: Vec<_> = (0..6).map(|chunk| (chunk, &NEW)).collect();
    for means in [Means::Calls, Means::Ring] {
        let mut io = ChunkIo::by(Arc::clone(&patient.overlay), means, means);
        let error = io.write(&group).unwrap_err();
        let OverlayError::Io { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        says(&error, "writing");
    }
    assert_eq!(states(&patient.overlay), old_states);
    patient.heal();
    assert_eq!(whole(&patient.overlay), before);
    patient.overlay.flush().unwrap();
    ChunkIo::new(Arc::clone(&patient.overlay)).write(&group).unwrap();
    assert_eq!(whole(&patient.overlay)[..6 * CHUNK_SIZE], [0xee; 6 * CHUNK_SIZE]);
}

#[test]
fn a_bad_block_is_an_error_of_that_file_and_of_nothing_else() {
    let (_fixture, vm) = Vm::new();
    let mut patient = Patient::new(&vm);
    patient.overlay.write_chunk(1, &NEW).unwrap();
    patient.unreadable();
    let mut chunk = [0; CHUNK_SIZE];
    says(&patient.overlay.read_chunk(1, &mut chunk).unwrap_err(), "reading");
    // What is the base's is read from there.
    patient.overlay.read_chunk(3, &mut chunk).unwrap();
    assert_eq!(chunk, vm.image[3 * CHUNK_SIZE..4 * CHUNK_SIZE]);
    let mut into = vec![[0; CHUNK_SIZE]; 3];
    for means in [Means::Calls, Means::Ring] {
        let mut io = ChunkIo::by(Arc::clone(&patient.overlay), means, means);
        says(&io.read(&[0, 1, 3], &mut into).unwrap_err(), "reading");
        io.read(&[0, 3, 4], &mut into).unwrap();
    }
    patient.heal();
    patient.overlay.read_chunk(1, &mut chunk).unwrap();
    assert_eq!(chunk, NEW);
}

/// The kernel tells of a lost write once: no later flush may call it durable, however well the disk
/// is again. Opened anew, it is what was durable before.
#[test]
fn a_sync_that_failed_is_not_made_up_for() {
    let (_fixture, vm) = Vm::new();
    let mut patient = Patient::new(&vm);
    patient.overlay.write_chunk(1, &NEW).unwrap();
    patient.overlay.flush().unwrap();
    patient.overlay.write_chunk(2, &NEW).unwrap();
    patient.forgetful();
    says(&patient.overlay.flush().unwrap_err(), "syncing");
    patient.heal();
    assert!(matches!(patient.overlay.flush(), Err(OverlayError::SyncLost { .. })));
    drop(patient);
    let again = vm.open().unwrap();
    assert_eq!((again.state(1), again.state(2)), (ChunkState::Data, ChunkState::Base));
    again.write_chunk(2, &NEW).unwrap();
    again.flush().unwrap();
}
