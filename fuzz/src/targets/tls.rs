//! What a stranger says before its key is known, and records on a link that someone else can write to.
//!
//! A handshake ends with an error, within its bounds of bytes, unless it was made with a key. What is read
//! from altered records is what was written up to the first that was altered, and nothing else. Input: 0
//! and what a stranger says; or 1, the suite, blocks to write, and what is done to the link's bytes.

use std::{
    io::{self, Read, Write},
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use handoff::{
    Transport,
    tcp::MonotonicClock,
    tls::{Identity, Session, TlsLink, accept, connect},
};

use super::{Origin, Target};
use crate::input::{Input, Program};

pub(super) const TARGET: Target =
    Target { name: "tls", from: Origin::Peer, run, seeds, max_len: 40 << 10 };

static IDENTITY: LazyLock<Identity> =
    LazyLock::new(|| Identity::generate().expect("a key can be made"));

/// More than a handshake reads of a stranger.
const MOST_HANDSHAKE_BYTES: usize = 40 << 10;
/// So many alterations at most.
const MOST_ALTERATIONS: usize = 8;

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    if input.u8() & 1 == 0 {
        let mut stream = Stream { said: input.rest(), heard: Vec::new(), read: 0 };
        let clock = MonotonicClock::default();
        let shaken = accept(&mut stream, &IDENTITY, Duration::from_secs(5), &clock);
        assert!(shaken.is_err(), "a handshake without a key");
        assert!(stream.read <= MOST_HANDSHAKE_BYTES, "{} bytes of a stranger", stream.read);
        return !stream.heard.is_empty();
    }
    records(&mut input)
}

/// What a stranger says, and what it hears.
struct Stream<'a> {
    said: &'a [u8],
    heard: Vec<u8>,
    read: usize,
}

impl Read for Stream<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.said.read(into)?;
        self.read += count;
        Ok(count)
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A link that keeps what is written and gives what it was given.
#[derive(Clone, Default)]
struct Wire {
    written: Arc<Mutex<Vec<u8>>>,
    given: io::Cursor<Vec<u8>>,
    piece: usize,
}

impl Transport for Wire {
    type Tx = Self;
    type Rx = Self;

    fn split(self) -> io::Result<(Self, Self)> {
        Ok((self.clone(), self))
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Wire {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = self.piece.clamp(1, into.len().max(1)).min(into.len());
        self.given.read(&mut into[..most])
    }
}

/// The two ends of a link: whose bytes are written as `Session::to_bytes` has it.
fn session(suite: u8, caller: bool) -> Session {
    let (code, key_bytes) = [(0x1301u16, 16), (0x1302, 32), (0x1303, 32)][usize::from(suite % 3)];
    let half = |seed: u8| [&[0; 8][..], &vec![seed; key_bytes], &[seed; 12]].concat();
    let halves = if caller { [half(1), half(2)] } else { [half(2), half(1)] };
    let bytes = [&code.to_be_bytes()[..], &halves.concat()].concat();
    Session::from_bytes(&bytes).expect("a session")
}

fn link(wire: Wire, suite: u8, caller: bool) -> TlsLink<Wire> {
    TlsLink::new(wire, session(suite, caller), IDENTITY.key())
}

fn records(input: &mut Input<'_>) -> bool {
    let (suite, piece, count) = (input.u8(), input.u16(), input.u8() % 8);
    let wire = Wire::default();
    let written = Arc::clone(&wire.written);
    let (mut tx, rx) = link(wire, suite, true).split().expect("a link");
    let mut data = Vec::new();
    for _ in 0..count {
        let block = input.block();
        tx.write_all(block).expect("to memory");
        tx.flush().expect("to memory");
        data.extend_from_slice(block);
    }
    drop((tx, rx));
    let sealed = std::mem::take(&mut *written.lock().unwrap_or_else(PoisonError::into_inner));
    let mut altered = sealed.clone();
    for _ in 0..MOST_ALTERATIONS {
        if input.is_empty() {
            break;
        }
        alter(&mut altered, input);
    }
    let piece = usize::from(piece) + 1;
    let given = Wire { given: io::Cursor::new(altered.clone()), piece, ..Wire::default() };
    let (_tx, mut rx) = link(given, suite, false).split().expect("a link");
    let mut read = Vec::new();
    let ended = rx.read_to_end(&mut read);
    assert!(data.starts_with(&read), "what was read is what was written");
    if altered == sealed {
        assert!(ended.is_ok() && read == data, "a whole link");
    }
    ended.is_ok()
}

/// Turns bits over, leaves bytes out, says some twice, or adds some.
fn alter(bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    let (how, at) = (input.u8() % 4, usize::from(input.u16()));
    let at = at.min(bytes.len());
    let end = (at + usize::from(input.u16())).min(bytes.len());
    match how {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= input.u8();
            }
        }
        1 => drop(bytes.drain(at..end)),
        2 => {
            let again = bytes[at..end].to_vec();
            bytes.splice(end..end, again);
        }
        _ => drop(bytes.splice(at..at, input.block().to_vec())),
    }
}

/// What a caller says first.
fn client_hello() -> Vec<u8> {
    let mut stream = Stream { said: &[], heard: Vec::new(), read: 0 };
    let within = Duration::from_secs(5);
    let shaken =
        connect(&mut stream, &IDENTITY, IDENTITY.key(), within, &MonotonicClock::default());
    assert!(shaken.is_err(), "nobody answered");
    stream.heard
}

fn seeds() -> Vec<Vec<u8>> {
    let hello = client_hello();
    let written = |suite: u8| {
        let begun = Program::new().u8(1).u8(suite).u16(700).u8(3);
        begun.block(b"one").block(&[7; 20_000]).block(b"three")
    };
    let sealed = (0..3).map(|suite| written(suite).finish());
    let altered = [
        written(0).u8(0).u16(30).u16(0).u8(1),
        written(1).u8(1).u16(0).u16(25),
        written(2).u8(2).u16(0).u16(25),
        written(0).u8(3).u16(25).u16(0).block(&[23, 3, 3, 0, 17]),
    ];
    sealed
        .chain(altered.map(Program::finish))
        .chain([Program::new().u8(0).bytes(&hello).finish(), vec![0, 22, 3, 1, 0xff, 0xff]])
        .collect()
}
