//! Two stores and a link between them, in one process.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    io::{self, Read},
    os::unix::{fs::FileExt, net::UnixStream},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use guest_images::{Base, BaseId, ImportSpec, MemorySpec, Part, Store, store::Problem};
use tempfile::TempDir;

use crate::{
    Given, Host, Link, No, Progress, Served, SyncError, Taken, Taking, Why, pull, push, serve,
};

const CHUNK: usize = 4096;

/// A store in a directory of its own.
struct Site {
    dir: TempDir,
    store: Store,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { dir, store }
    }

    /// Imports a base with this disk.
    fn import(&self, name: &str, disk: &[u8], memory: Option<&[u8]>) -> BaseId {
        let file = |part: &str, bytes: &[u8]| {
            let path = self.dir.path().join(format!("{name}.{part}"));
            fs::write(&path, bytes).unwrap();
            path
        };
        let mut kernel = vec![0; 9000];
        kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
        kernel[18] = 62;
        let spec = ImportSpec {
            name: name.into(),
            disk: file("disk", disk),
            kernel: file("kernel", &kernel),
            initramfs: None,
            cmdline: "root=/dev/vda".into(),
            memory: memory
                .map(|ram| MemorySpec { ram: file("ram", ram), machine: vec![7; 3 << 20] }),
        };
        self.store.import(&spec, &mut |_| {}).unwrap()
    }
}

/// Chunks, each of another content but where numbers are the same; 0 is zeros.
fn disk(chunks: impl IntoIterator<Item = u32>) -> Vec<u8> {
    let mut disk = Vec::new();
    for number in chunks {
        let mut chunk = [0; CHUNK];
        if number > 0 {
            let mut stream = blake(number);
            stream.fill(&mut chunk);
        }
        disk.extend_from_slice(&chunk);
    }
    disk
}

/// Bytes that do not compress, and follow from a number.
struct Stream(u64);

fn blake(number: u32) -> Stream {
    Stream(u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
}

impl Stream {
    fn fill(&mut self, into: &mut [u8]) {
        for byte in into {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *byte = self.0 as u8;
        }
    }
}

/// What the called side allows.
#[derive(Clone, Copy)]
struct Rules {
    pull: bool,
    push: bool,
    room_bytes: u64,
}

const ALL: Rules = Rules { pull: true, push: true, room_bytes: u64::MAX };

impl Host for Rules {
    fn room(&self, more_bytes: u64) -> Result<(), No> {
        if more_bytes > self.room_bytes {
            return Err(No::no_space(more_bytes, self.room_bytes));
        }
        Ok(())
    }

    fn machine(&self, _: &[u8]) -> Result<(), No> {
        Ok(())
    }

    fn may_pull(&self, _: &Base) -> Result<(), No> {
        if self.pull { Ok(()) } else { Err(No::new(Why::NotAllowed, "not that")) }
    }

    fn may_push(&self, _: &BaseId, _: &str) -> Result<(), No> {
        if self.push { Ok(()) } else { Err(No::new(Why::NotAllowed, "not here")) }
    }
}

/// A link that breaks after so many bytes were read.
struct Breaks<R>(R, u64);

impl<R: Read> Read for Breaks<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = self.1.min(into.len() as u64) as usize;
        if most == 0 && !into.is_empty() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let read = self.0.read(&mut into[..most])?;
        self.1 -= read as u64;
        Ok(read)
    }
}

type Ends = (Result<Served, SyncError>, u64);

/// Runs one side against a served one; what the called side says, and how many bytes went to the caller.
fn call<T: Send>(
    called: &Site,
    rules: Rules,
    caller: impl FnOnce(&mut Link<'_, Breaks<UnixStream>, UnixStream>) -> T + Send,
    breaks_after: u64,
) -> (T, Ends) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let never = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let store = &called.store;
        let never = &never;
        let served = scope.spawn(move || {
            let mut link = Link::new(theirs.try_clone().unwrap(), theirs, never);
            let done = serve(&mut link, &mut taking(store, &rules, &mut |_| {}));
            (done, link.sent_bytes)
        });
        let rx = Breaks(ours.try_clone().unwrap(), breaks_after);
        let mut link = Link::new(rx, ours, never);
        let done = caller(&mut link);
        drop(link);
        (done, served.join().unwrap())
    })
}

fn taking<'a>(
    store: &'a Store,
    rules: &'a Rules,
    progress: &'a mut dyn FnMut(Progress),
) -> Taking<'a> {
    Taking { store, host: rules, progress, heal: false }
}

fn pull_from(from: &Site, to: &Site, which: &str) -> Result<(BaseId, Taken), SyncError> {
    pull_with(from, to, which, false, u64::MAX).0
}

fn pull_with(
    from: &Site,
    to: &Site,
    which: &str,
    heal: bool,
    breaks_after: u64,
) -> (Result<(BaseId, Taken), SyncError>, Ends) {
    let work = |link: &mut Link<'_, Breaks<UnixStream>, UnixStream>| {
        let mut progress = |_| {};
        let taking = taking(&to.store, &ALL, &mut progress);
        pull(link, which, &mut Taking { heal, ..taking })
    };
    call(from, ALL, work, breaks_after)
}

fn push_to(from: &Site, to: &Site, name: &str, rules: Rules) -> (Result<Given, SyncError>, Ends) {
    let base = from.store.get(name).unwrap();
    call(to, rules, |link| push(link, &from.store, &base, name, &mut |_| {}), u64::MAX)
}

fn is_whole(store: &Store, id: &BaseId) -> bool {
    let problems: Vec<Problem> = store.verify(id, &mut |_| {}).unwrap();
    problems.is_empty() && store.get_id(id).is_ok()
}

#[test]
fn a_base_comes_across_whole() {
    let (a, b) = (Site::new(), Site::new());
    // Beyond one slab, with zeros between, and an odd end.
    let mut image = disk((1..700).chain(std::iter::repeat_n(0, 20_000)).chain([3, 3, 0, 9]));
    image.truncate(image.len() - 512);
    let ram = disk((1..100).chain([0; 60]).chain(5000..5100));
    let id = a.import("edge", &image, Some(&ram));
    let (pulled, taken) = pull_from(&a, &b, "edge").unwrap();
    assert_eq!(pulled, id);
    assert!(is_whole(&b.store, &id));
    // What is twice in it travels once: the copies of 3, chunk 9's end differs, RAM's 1 to 99.
    assert_eq!(taken.received_chunks + taken.local_chunks, taken.chunks);
    assert!(taken.local_chunks >= 101, "{taken:?}");
    let same = |part| {
        fs::read(a.store.part_path(&id, part)).unwrap()
            == fs::read(b.store.part_path(&id, part)).unwrap()
    };
    assert!([Part::Disk, Part::Kernel, Part::Memory].into_iter().all(same));
    // Again: nothing to do.
    let (_, again) = pull_from(&a, &b, &id.to_string()).unwrap();
    assert!(again.already);
}

/// Another version of a base that the other side has costs what differs, and nothing for the rest.
#[test]
fn only_what_the_peer_lacks_travels() {
    let (a, b) = (Site::new(), Site::new());
    let old = disk(1..2000);
    let mut new = old.clone();
    new[100 * CHUNK..110 * CHUNK].copy_from_slice(&disk(5000..5010));
    for site in [&a, &b] {
        site.import("old", &old, None);
    }
    let id = a.import("new", &new, None);
    let (base, mut last) = (a.store.get("new").unwrap(), Progress::default());
    let push = |link: &mut Link<'_, _, _>| {
        push(link, &a.store, &base, "new", &mut |progress| last = progress)
    };
    let (given, (served, to_a)) = call(&b, ALL, push, u64::MAX);
    let bytes = 10 * CHUNK as u64;
    assert_eq!((last.done_bytes, last.total_bytes), (bytes, bytes), "it is known beforehand");
    assert_eq!(given.unwrap(), Given { sent_chunks: 10, already: false });
    let Ok(Served::Taken(taken_id, name, taken)) = served else { panic!("{served:?}") };
    assert_eq!((taken_id, name.as_str(), taken.received_chunks), (id, "new", 10));
    assert!(is_whole(&b.store, &b.store.resolve("new").unwrap()));
    assert!(to_a < 1000, "{to_a} bytes of questions");

    // Without a base in common at the giver, hashes tell what is here all the same.
    a.store.remove(&a.store.resolve("old").unwrap()).unwrap();
    let c = Site::new();
    c.import("other", &old, None);
    let (_, taken) = pull_from(&a, &c, "new").unwrap();
    assert_eq!((taken.received_chunks, taken.local_chunks), (10, 1999 - 10 + 1));
}

#[test]
fn a_broken_link_costs_what_was_under_way() {
    let (a, b) = (Site::new(), Site::new());
    let id = a.import("edge", &disk(1..6000), None);
    let (mut tries, mut bytes) = (0, 0);
    let taken = loop {
        tries += 1;
        match pull_with(&a, &b, "edge", false, 6 << 20) {
            (Ok((_, taken)), (_, sent)) => {
                bytes += sent;
                break taken;
            }
            (Err(error), (_, _)) => {
                assert!(matches!(error, SyncError::Link(_)), "{error}");
                assert!(!b.store.contains(&id), "a part of a base is no base");
                bytes += 6 << 20;
            }
        }
    };
    assert!((4..8).contains(&tries), "{tries} links");
    assert!(taken.resumed_chunks > 4000, "{taken:?}");
    assert!(is_whole(&b.store, &id));
    // 24 MiB and the hashes of each try.
    assert!(bytes < 32 << 20, "{bytes} bytes");
}

#[test]
fn a_damaged_base_is_healed_with_what_is_whole_of_it() {
    let (a, b) = (Site::new(), Site::new());
    let image = disk(1..3000);
    let id = a.import("edge", &image, Some(&disk(7000..7100)));
    pull_from(&a, &b, "edge").unwrap();
    let path = b.store.part_path(&id, Part::Disk);
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    fs::set_permissions(&path, permissions).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"rot", 1_000_000).unwrap();
    file.write_all_at(&[9; 5000], 2_000_000).unwrap();
    assert!(!is_whole(&b.store, &id));
    let (_, taken) = pull_with(&a, &b, &id.to_string(), true, u64::MAX).0.unwrap();
    assert!((2..=4).contains(&taken.received_chunks), "{taken:?}");
    assert!(is_whole(&b.store, &id));
    // Shorter than it should be, it does not even open.
    let path = b.store.part_path(&id, Part::Memory);
    fs::remove_file(&path).unwrap();
    fs::write(&path, disk(7000..7050)).unwrap();
    let (_, taken) = pull_with(&a, &b, &id.to_string(), true, u64::MAX).0.unwrap();
    assert_eq!(taken.received_chunks, 50);
    assert!(is_whole(&b.store, &id));
}

/// A base here to which the giver refers may be damaged; then hashes are asked for instead.
#[test]
fn a_damaged_base_here_is_not_built_on() {
    let (a, b) = (Site::new(), Site::new());
    for site in [&a, &b] {
        site.import("old", &disk(1..500), None);
    }
    let old = b.store.resolve("old").unwrap();
    spoil(&b.store.part_path(&old, Part::Disk), 50_000);
    let id = a.import("new", &disk((1..500).chain([600])), None);
    let (_, taken) = pull_from(&a, &b, "new").unwrap();
    assert_eq!(taken.received_chunks, 2);
    assert!(is_whole(&b.store, &id));
}

#[test]
fn a_damaged_base_is_not_given() {
    let (a, b) = (Site::new(), Site::new());
    let id = a.import("edge", &disk(1..500), None);
    spoil(&a.store.part_path(&id, Part::Disk), 1_000_000);
    let error = pull_from(&a, &b, "edge").unwrap_err();
    assert!(matches!(error, SyncError::Damaged(_)), "{error}");
    assert!(!b.store.contains(&id));
    let (given, (served, _)) = push_to(&a, &b, "edge", ALL);
    assert!(matches!(given, Err(SyncError::Refused(No { why: Why::Damaged, .. }))), "{given:?}");
    assert!(matches!(served, Err(SyncError::Damaged(_))));
}

#[test]
fn who_may_not_is_told_why_before_anything_moves() {
    let (a, b) = (Site::new(), Site::new());
    let id = a.import("edge", &disk(1..500), None);
    let why = |done: Result<Given, SyncError>| match done {
        Err(SyncError::Refused(no)) => no.why,
        other => panic!("{other:?}"),
    };
    let (given, (_, sent)) = push_to(&a, &b, "edge", Rules { push: false, ..ALL });
    assert_eq!((why(given), sent < 100), (Why::NotAllowed, true));
    let (given, _) = push_to(&a, &b, "edge", Rules { room_bytes: 1 << 20, ..ALL });
    assert_eq!(why(given), Why::NoSpace);
    b.import("edge", &disk([4, 5]), None);
    let (given, _) = push_to(&a, &b, "edge", ALL);
    assert_eq!(why(given), Why::Taken);
    assert!(!b.store.contains(&id));
    let nothing = pull_from(&a, &b, "no-such").unwrap_err();
    assert!(matches!(nothing, SyncError::Refused(No { why: Why::NotFound, .. })), "{nothing}");
    let (given, _) = push_to(&a, &b, &id.to_string(), ALL);
    assert!(matches!(given, Err(SyncError::Refused(_))), "an id is no name");
}

#[test]
fn whoever_waits_can_be_told_to_stop() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(std::time::Duration::from_millis(5))).unwrap();
    let cancel = AtomicBool::new(false);
    let site = Site::new();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| {
            let mut link = Link::new(ours.try_clone().unwrap(), &ours, &cancel);
            pull(&mut link, "x", &mut taking(&site.store, &ALL, &mut |_| {}))
        });
        cancel.store(true, Ordering::Relaxed);
        assert!(matches!(waits.join().unwrap(), Err(SyncError::Cancelled)));
    });
}

fn spoil(path: &Path, at: u64) {
    let mut permissions = fs::metadata(path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    fs::set_permissions(path, permissions).unwrap();
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"rot", at).unwrap();
}

/// Whatever a caller says, it is served without a panic, and no base comes of it.
mod hostile {
    use proptest::prelude::*;

    use super::*;
    use crate::{Message, wire::Run};

    fn message() -> impl Strategy<Value = Message> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..200);
        let number = || prop_oneof![0u64..40, any::<u64>()];
        let run = prop_oneof![
            (number(), 0u32..40, 0u8..3, 0u8..5, number()).prop_map(
                |(at, count, base, part, first)| { Run::Base { at, count, base, part, first } }
            ),
            (number(), bytes()).prop_map(|(at, hashes)| Run::Hashes { at, hashes }),
        ];
        prop_oneof![
            "[a-z]{0,5}".prop_map(Message::Pull),
            Just(Message::Pull("edge".into())),
            prop::collection::vec(any::<[u8; 32]>(), 0..3).prop_map(Message::Have),
            bytes().prop_map(Message::Both),
            (0u8..5, number(), any::<u32>(), any::<bool>()).prop_map(
                |(part, first, count, refer)| { Message::Hashes { part, first, count, refer } }
            ),
            (0u8..2, 0u64..40, 0u32..40).prop_map(|(part, first, count)| {
                Message::Hashes { part, first, count, refer: true }
            }),
            prop::collection::vec(run, 0..4).prop_map(Message::HashesAre),
            (0u8..5, prop::collection::vec((number(), any::<u32>()), 0..4))
                .prop_map(|(part, runs)| Message::Chunks { part, runs }),
            bytes().prop_map(Message::ChunksAre),
            any::<u64>().prop_map(Message::Machine),
            any::<bool>().prop_map(|already| Message::Done { already }),
        ]
    }

    fn framed(message: &Message) -> Vec<u8> {
        let never = AtomicBool::new(false);
        let mut link = Link::new(io::empty(), Vec::new(), &never);
        link.send(message).unwrap();
        link.into_tx()
    }

    #[test]
    fn callers_and_givers_are_survived() {
        let site = Site::new();
        site.import("edge", &disk(1..30), None);
        let elsewhere = Site::new();
        let id = elsewhere.import("new", &disk(20..50), None);
        let manifest = elsewhere.store.get("new").unwrap().manifest().to_json().unwrap();
        let all = (
            prop::collection::vec(message(), 0..6),
            any::<bool>(),
            prop::collection::vec(any::<u8>(), 0..20),
        );
        let run = |(messages, pushes, noise): (Vec<Message>, bool, Vec<u8>)| {
            let mut bytes = Vec::new();
            if pushes {
                let name = "new".into();
                bytes.extend(framed(&Message::Push { name, manifest: manifest.clone() }));
            }
            bytes.extend(messages.iter().flat_map(framed));
            bytes.extend(&noise);
            let never = AtomicBool::new(false);
            let mut link = Link::new(bytes.as_slice(), io::sink(), &never);
            let _ = serve(&mut link, &mut taking(&site.store, &ALL, &mut |_| {}));
            prop_assert!(!site.store.contains(&id));
            // And a called side that answers a pull with the same.
            let mut bytes = framed(&Message::Offer(manifest.clone()));
            bytes.extend(messages.iter().flat_map(framed));
            let mut link = Link::new(bytes.as_slice(), io::sink(), &never);
            let _ = pull(&mut link, "new", &mut taking(&site.store, &ALL, &mut |_| {}));
            prop_assert!(!site.store.contains(&id));
            Ok(())
        };
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) };
        proptest::test_runner::TestRunner::new(config).run(&all, run).unwrap();
    }
}
