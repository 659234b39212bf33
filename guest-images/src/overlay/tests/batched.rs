//! Chunks read and written many at a time: as if one by one, by whatever means.

use std::sync::atomic::AtomicU8;

use proptest::prelude::*;

use super::*;
use crate::overlay::batched::{ChunkIo, Means};

const ALL: [(Means, Means); 2] = [(Means::Ring, Means::Ring), (Means::Calls, Means::Calls)];

/// What a chunk may hold: the last one ends within its first 1024 bytes.
fn content(chunk: u64, fill: u8) -> Chunk {
    let mut content = [fill; CHUNK_SIZE];
    if chunk == CHUNKS - 1 {
        content[1024..].fill(0);
    }
    content
}

#[derive(Clone, Debug)]
enum Op {
    Write(Vec<(u64, u8)>),
    Read(Vec<u64>),
    Zero(u64),
    Reset(u64),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let chunk = || 0..CHUNKS;
    let op = prop_oneof![
        prop::collection::vec((chunk(), any::<u8>()), 0..20).prop_map(Op::Write),
        prop::collection::vec(chunk(), 0..30).prop_map(Op::Read),
        // As a round names them.
        (chunk(), chunk()).prop_map(|(from, to)| Op::Read((from..to).collect())),
        chunk().prop_map(Op::Zero),
        chunk().prop_map(Op::Reset),
    ];
    prop::collection::vec(op, 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn like_one_by_one(ops in ops(), by in prop::sample::select(ALL.to_vec())) {
        let ((_one, vm), (_two, other)) = (Vm::new(), Vm::new());
        let (overlay, plain) = (Arc::new(vm.create()), other.create());
        let mut io = ChunkIo::by(Arc::clone(&overlay), by.0, by.1);
        prop_assert_eq!(io.reads_by(), by.0);
        for op in ops {
            match op {
                Op::Write(chunks) => {
                    let contents: Vec<_> = chunks.iter().map(|&(c, fill)| content(c, fill)).collect();
                    let group: Vec<_> = chunks.iter().map(|(c, _)| *c).zip(&contents).collect();
                    io.write(&group).unwrap();
                    group.iter().for_each(|(c, content)| plain.write_chunk(*c, content).unwrap());
                }
                Op::Read(chunks) => {
                    let mut found = vec![[0xaa; CHUNK_SIZE]; chunks.len()];
                    io.read(&chunks, &mut found).unwrap();
                    let mut expected = [0; CHUNK_SIZE];
                    for (chunk, found) in chunks.iter().zip(&found) {
                        plain.read_chunk(*chunk, &mut expected).unwrap();
                        prop_assert!(*found == expected, "chunk {}", chunk);
                    }
                }
                Op::Zero(chunk) => {
                    overlay.zero_chunk(chunk).unwrap();
                    plain.zero_chunk(chunk).unwrap();
                }
                Op::Reset(chunk) => {
                    overlay.reset_chunk(chunk).unwrap();
                    plain.reset_chunk(chunk).unwrap();
                }
            }
        }
        for chunk in 0..CHUNKS {
            prop_assert_eq!(overlay.state(chunk), plain.state(chunk));
        }
        overlay.flush().unwrap();
        // Dropped before it is opened again: one process, one lock.
        drop(io);
        drop(overlay);
        prop_assert!(whole(&vm.open().unwrap()) == whole(&plain));
    }
}

/// The guest writes on while a group is read: chunks that it leaves alone are right, the others
/// hold bytes of contents that they had; once it stops, all is as it left it.
#[test]
fn the_guest_may_write_meanwhile() {
    for (reads, _) in ALL {
        let (_fixture, vm) = Vm::new();
        let overlay = Arc::new(vm.create());
        let latest = AtomicU8::new(0);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for fill in 100..=250u8 {
                    latest.store(fill, Ordering::Release);
                    for chunk in [1, 3, 4, 7] {
                        match (u64::from(fill) + chunk) % 5 {
                            0 => overlay.zero_chunk(chunk).unwrap(),
                            _ => overlay.write_chunk(chunk, &content(chunk, fill)).unwrap(),
                        }
                    }
                }
            });
            let mut io = ChunkIo::by(Arc::clone(&overlay), reads, Means::Calls);
            let chunks: Vec<u64> = (0..CHUNKS).collect();
            let mut found = vec![[0; CHUNK_SIZE]; chunks.len()];
            while !writer.is_finished() {
                io.read(&chunks, &mut found).unwrap();
                let newest = latest.load(Ordering::Acquire);
                for (chunk, found) in chunks.iter().zip(&found) {
                    let begin = *chunk as usize * CHUNK_SIZE;
                    let mut base =
                        vm.image[begin..(begin + CHUNK_SIZE).min(vm.image.len())].to_vec();
                    base.resize(CHUNK_SIZE, 0);
                    if [1, 3, 4, 7].contains(chunk) {
                        let possible = |(at, byte): (usize, &u8)| {
                            *byte == 0 || *byte == base[at] || (100..=newest).contains(byte)
                        };
                        assert!(found.iter().enumerate().all(possible), "chunk {chunk}");
                    } else {
                        assert!(found[..] == base[..], "chunk {chunk}");
                    }
                }
            }
            writer.join().unwrap();
            io.read(&chunks, &mut found).unwrap();
            let mut expected = [0; CHUNK_SIZE];
            for (chunk, found) in chunks.iter().zip(&found) {
                overlay.read_chunk(*chunk, &mut expected).unwrap();
                assert!(*found == expected, "chunk {chunk}");
            }
        });
    }
}

#[test]
fn what_is_not_there_is_refused_before_anything_is_done() {
    for (reads, writes) in ALL {
        let (_fixture, vm) = Vm::new();
        let overlay = Arc::new(vm.create());
        let mut io = ChunkIo::by(Arc::clone(&overlay), reads, writes);
        let mut into = [[7; CHUNK_SIZE]; 2];
        let beyond = io.read(&[1, CHUNKS], &mut into).unwrap_err();
        assert!(matches!(beyond, OverlayError::OutOfRange { .. }), "{beyond}");
        assert!(into == [[7; CHUNK_SIZE]; 2]);
        let full = [1; CHUNK_SIZE];
        let beyond = io.write(&[(1, &full), (u64::MAX, &full)]).unwrap_err();
        assert!(matches!(beyond, OverlayError::OutOfRange { .. }), "{beyond}");
        let padded = io.write(&[(1, &full), (CHUNKS - 1, &full)]).unwrap_err();
        assert!(matches!(padded, OverlayError::Padding { .. }), "{padded}");
        assert_eq!(overlay.changed().count(), 0);
    }
}

/// A data file that lost its end gives an error, not zeros; and its other chunks.
#[test]
fn a_file_that_is_too_short_is_an_error() {
    for (reads, writes) in ALL {
        let (_fixture, vm) = Vm::new();
        let overlay = Arc::new(vm.create());
        let mut io = ChunkIo::by(Arc::clone(&overlay), reads, writes);
        let contents: Vec<_> = (0..CHUNKS).map(|chunk| content(chunk, 9)).collect();
        let group: Vec<_> = (0..CHUNKS).zip(&contents).collect();
        io.write(&group).unwrap();
        let cut = OpenOptions::new().write(true).open(vm.file(DATA_FILE)).unwrap();
        cut.set_len(4 * CHUNK_SIZE as u64 + 100).unwrap();
        let mut into = [[0; CHUNK_SIZE]; 3];
        for chunks in [[0, 2, 4], [5, 6, 7], [3, 4, 5]] {
            let error = io.read(&chunks, &mut into).unwrap_err();
            let OverlayError::Io { source, path, .. } = error else { panic!("{error}") };
            assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof);
            assert_eq!(path, vm.file(DATA_FILE));
        }
        io.read(&[0, 1, 3], &mut into).unwrap();
        assert!(into == [[9; CHUNK_SIZE]; 3]);
    }
}

/// A disk that is full, as its file system tells it: what was not written has its old state.
#[test]
fn a_write_that_fails_changes_no_state() {
    for (reads, writes) in ALL {
        let (_fixture, vm) = Vm::new();
        let mut overlay = vm.create();
        overlay.data = File::open("/dev/null").unwrap();
        let overlay = Arc::new(overlay);
        let mut io = ChunkIo::by(Arc::clone(&overlay), reads, writes);
        let full = [1; CHUNK_SIZE];
        let error = io.write(&[(1, &full), (2, &full), (5, &full)]).unwrap_err();
        assert!(matches!(error, OverlayError::Io { what: "writing", .. }), "{error}");
        assert_eq!(overlay.changed().count(), 0);
    }
}

#[test]
fn without_a_ring_calls_do_it() {
    let (_fixture, vm) = Vm::new();
    let overlay = Arc::new(vm.create());
    let mut io = ChunkIo::new(Arc::clone(&overlay));
    io.lose_ring(&io::ErrorKind::PermissionDenied.into());
    assert_eq!(io.reads_by(), Means::Calls);
    let contents = [content(2, 5), content(3, 6)];
    io.write(&[(3, &contents[1]), (2, &contents[0])]).unwrap();
    let mut into = [[0; CHUNK_SIZE]; 2];
    io.read(&[2, 3], &mut into).unwrap();
    assert!(into == contents);
}
