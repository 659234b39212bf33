//! Bases between cloudlets: whatever a peer says in such a session.
//!
//! Every base of the store is whole afterwards, whoever led and whatever was said; what was reported as
//! taken is there; and what is said to the peer is messages within their limits. Input: who plays which
//! part, and the bodies of the peer's messages as blocks.

use std::{
    cell::Cell,
    fs,
    io::{self, Read, Write},
    os::unix::{
        fs::{FileExt, PermissionsExt},
        net::UnixStream,
    },
    path::Path,
    sync::{LazyLock, atomic::AtomicBool},
    thread,
};

use base_sync::{Host, Link, MAX_FRAME_BYTES, Message, No, SyncError, Taking, pull, push, serve};
use guest_images::{Base, BaseId, ImportSpec, MemorySpec, Part, Store};

use super::{Origin, Target};
use crate::{
    input::{Input, Program},
    scratch::Scratch,
    world::chunk,
};

pub(super) const TARGET: Target =
    Target { name: "bases", from: Origin::Peer, run, seeds, max_len: 32 << 10 };

/// What this side is asked to do, or does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The peer calls a store that has everything.
    Give,
    /// The peer calls a store that has an older base.
    BePushed,
    /// A store that has an older base calls the peer.
    Pull,
    /// A store whose base is damaged calls the peer.
    Heal,
}

const ROLES: [Role; 4] = [Role::Pull, Role::Heal, Role::BePushed, Role::Give];
/// The base that goes about, and an older one that shares chunks with it.
const NEW: &str = "new";
const OLD: &str = "old";
/// No base here is larger; what a peer claims may be.
const ROOM_BYTES: u64 = 8 << 20;

/// Stores to begin with, made once.
struct Stores {
    dir: Scratch,
    id: BaseId,
}

static STORES: LazyLock<Stores> = LazyLock::new(|| {
    let dir = Scratch::new();
    let disk = |numbers: &[u8]| numbers.iter().flat_map(|n| chunk(*n)).collect::<Vec<u8>>();
    let (old, mut new) = (disk(&[1, 2, 3, 4, 5, 6]), disk(&[1, 2, 3, 9, 5, 6, 7, 7]));
    new.resize(new.len() + (8 << 12), 0);
    let make = |name: &str, which: &[&str]| {
        let store = Store::open(&dir.path().join(name)).expect("a store");
        for base in which {
            let disk = if *base == OLD { &old } else { &new };
            let machine = vec![7; 3000];
            let memory = MemorySpec { ram: dir.file("ram", &disk[..8192]), machine };
            let spec = ImportSpec {
                name: (*base).into(),
                disk: dir.file("disk", disk),
                kernel: dir.file("kernel", &kernel()),
                initramfs: None,
                cmdline: "root=/dev/vda".into(),
                memory: Some(memory).filter(|_| *base == NEW),
            };
            store.import(&spec, &mut |_| {}).expect("a base");
        }
        store
    };
    make("older", &[OLD]);
    let id = make("full", &[OLD, NEW]).resolve(NEW).expect("it was imported");
    let damaged = make("damaged", &[OLD, NEW]);
    let path = damaged.part_path(&id, Part::Disk);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("its owner may");
    let file = fs::OpenOptions::new().write(true).open(&path).expect("a part");
    file.write_all_at(b"rot", 5000).expect("it can be written");
    Stores { dir, id }
});

fn kernel() -> Vec<u8> {
    let mut kernel = vec![0; 5000];
    kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
    kernel[18] = 62;
    kernel
}

/// A copy of the store that a role begins with; the one that only gives needs none.
fn store_for(role: Role, scratch: &Scratch) -> Store {
    let name = match role {
        Role::Give => return Store::open(&STORES.dir.path().join("full")).expect("a store"),
        Role::BePushed | Role::Pull => "older",
        Role::Heal => "damaged",
    };
    let to = scratch.path().join("store");
    copy(&STORES.dir.path().join(name), &to);
    Store::open(&to).expect("a store")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a scratch directory");
    for entry in fs::read_dir(from).expect("a directory").flatten() {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().expect("its kind");
        if kind.is_dir() {
            copy(&from, &to);
        } else if kind.is_symlink() {
            let target = fs::read_link(&from).expect("a link");
            std::os::unix::fs::symlink(target, &to).expect("a link");
        } else {
            // Not fs::copy, which libFuzzer's timer interrupts.
            let content = fs::read(&from).expect("a file");
            fs::write(&to, content).expect("a copy");
        }
    }
}

/// Allows all that there is room for.
struct Rules;

impl Host for Rules {
    fn room(&self, more_bytes: u64) -> Result<(), No> {
        if more_bytes <= ROOM_BYTES { Ok(()) } else { Err(No::no_space(more_bytes, ROOM_BYTES)) }
    }

    fn machine(&self, _: &[u8]) -> Result<(), No> {
        Ok(())
    }

    fn may_pull(&self, _: &Base) -> Result<(), No> {
        Ok(())
    }

    fn may_push(&self, _: &BaseId, _: &str) -> Result<(), No> {
        Ok(())
    }
}

/// What this side says must be messages.
#[derive(Default)]
struct Checked(Vec<u8>);

impl Write for Checked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        while let Some((length, rest)) = self.0.split_first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            assert!(length <= MAX_FRAME_BYTES, "a message of {length} bytes is said");
            if rest.len() < length {
                break;
            }
            let (_, left) = postcard::take_from_bytes::<Message>(&rest[..length]).expect("one");
            assert!(left.is_empty(), "a message has {} bytes behind it", left.len());
            self.0.drain(..4 + length);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let role = ROLES[usize::from(input.below(ROLES.len() as u8))];
    let mut said = Vec::new();
    while !input.is_empty() {
        let body = input.block();
        said.extend((body.len() as u32).to_le_bytes());
        said.extend(body);
    }
    let scratch = Scratch::new();
    let store = store_for(role, &scratch);
    let never = AtomicBool::new(false);
    let mut link = Link::new(said.as_slice(), Checked::default(), &never);
    let done = play(role, &mut link, &store);
    let mut whole = 0;
    for listed in store.list().expect("the store can be listed") {
        let problems = store.verify(&listed.id, &mut |_| {}).expect("it can be read");
        let damaged = role == Role::Heal && listed.id == STORES.id && done.is_err();
        assert!(damaged || problems.is_empty(), "{role:?}: {} has {problems:?}", listed.id);
        whole += usize::from(problems.is_empty());
    }
    // Two bases at the giver and the healed one; the older one and what was taken elsewhere.
    assert!(done.is_err() || whole == 2 || role == Role::BePushed, "{role:?}: {done:?}, {whole}");
    done.is_ok()
}

fn play<R: Read, W: Write>(
    role: Role,
    link: &mut Link<'_, R, W>,
    store: &Store,
) -> Result<(), SyncError> {
    let mut progress = |_| {};
    let heal = role == Role::Heal;
    let mut taking = Taking { store, host: &Rules, progress: &mut progress, heal };
    match role {
        Role::Give | Role::BePushed => serve(link, &mut taking).map(drop),
        // By its name: the peer says which it is. A base is healed by its id.
        Role::Pull => pull(link, NEW, &mut taking).map(drop),
        Role::Heal => pull(link, &STORES.id.to_string(), &mut taking).map(drop),
    }
}

/// Keeps what is read.
struct Heard<'a, R>(R, &'a Cell<Vec<u8>>);

impl<R: Read> Read for Heard<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(into)?;
        let mut heard = self.1.take();
        heard.extend_from_slice(&into[..read]);
        self.1.set(heard);
        Ok(read)
    }
}

/// A session with a peer that does as it should: the input that says the same.
fn session(number: usize) -> Vec<u8> {
    let role = ROLES[number];
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let scratch = Scratch::new();
    let (store, never) = (store_for(role, &scratch), AtomicBool::new(false));
    let heard = Cell::default();
    thread::scope(|scope| {
        scope.spawn(|| peer_of(role, theirs));
        let rx = Heard(ours.try_clone().expect("a socket"), &heard);
        play(role, &mut Link::new(rx, &ours, &never), &store).expect("a sound session");
        drop(ours);
    });
    let (mut program, heard) = (Program::new().u8(number as u8), heard.take());
    let mut left = heard.as_slice();
    while let Some((length, rest)) = left.split_first_chunk::<4>() {
        let (body, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        (program, left) = (program.block(body), rest);
    }
    program.finish()
}

fn peer_of(role: Role, link: UnixStream) {
    let (scratch, never) = (Scratch::new(), AtomicBool::new(false));
    let mut link = Link::new(link.try_clone().expect("a socket"), link, &never);
    let done = match role {
        Role::Pull | Role::Heal => play(Role::Give, &mut link, &store_for(Role::Give, &scratch)),
        Role::Give => play(Role::Pull, &mut link, &store_for(Role::Pull, &scratch)),
        Role::BePushed => {
            let store = store_for(Role::Give, &scratch);
            let base = store.get(NEW).expect("it was imported");
            push(&mut link, &store, &base, NEW, &mut |_| {}).map(drop)
        }
    };
    done.expect("the peer of a sound session");
}

fn seeds() -> Vec<Vec<u8>> {
    (0..ROLES.len()).map(session).collect()
}
