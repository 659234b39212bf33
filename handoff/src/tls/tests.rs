//! Links between two cloudlets over loopback; and callers that are none.

use std::{
    io::{self, Cursor, Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection, client::AlwaysResolvesClientRawPublicKeys};

use super::{verify::Pinned, *};
use crate::{
    Transport,
    link::{READ_TICK, WRITE_TICK, is_tick},
    tcp::{MonotonicClock, TcpLink},
};

const PATIENCE: Duration = Duration::from_secs(5);

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    for stream in [&near, &far] {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(READ_TICK)).unwrap();
    }
    (near, far)
}

fn calls(stream: &TcpStream, by: &Identity, to: PeerKey) -> Result<Handshake, TlsError> {
    connect(&mut &*stream, by, to, PATIENCE, &MonotonicClock::default())
}

fn is_called(stream: &TcpStream, as_: &Identity) -> Result<Handshake, TlsError> {
    accept(&mut &*stream, as_, PATIENCE, &MonotonicClock::default())
}

/// Both ends of a link between two cloudlets.
fn links() -> (TlsLink<TcpLink>, TlsLink<TcpLink>) {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (near, far) = pair();
    let (called, answered) = thread::scope(|scope| {
        let answered = scope.spawn(|| is_called(&far, &b));
        (calls(&near, &a, b.key()), answered.join().unwrap())
    });
    let (called, answered) = (called.unwrap(), answered.unwrap());
    assert_eq!((called.peer, answered.peer), (b.key(), a.key()));
    (called.over(TcpLink::new(near).unwrap()), answered.over(TcpLink::new(far).unwrap()))
}

fn read_all(rx: &mut impl Read, length: usize) -> Vec<u8> {
    let (mut got, mut scratch) = (Vec::new(), vec![0; 10_000]);
    let begun = Instant::now();
    while got.len() < length && begun.elapsed() < PATIENCE {
        match rx.read(&mut scratch) {
            Ok(0) => break,
            Ok(count) => got.extend_from_slice(&scratch[..count]),
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
        }
    }
    got
}

/// Writes the same again where there was no room.
fn write_whole(tx: &mut impl Write, mut bytes: &[u8]) {
    let begun = Instant::now();
    while !bytes.is_empty() && begun.elapsed() < PATIENCE {
        match tx.write(bytes) {
            Ok(taken) => bytes = &bytes[taken..],
            Err(e) => assert!(is_tick(&e), "{e}"),
        }
    }
    assert!(bytes.is_empty(), "nobody reads");
}

#[test]
fn two_threads_use_a_link_both_ways() {
    let (near, far) = links();
    let gauge = near.gauge().unwrap();
    let (mut near_tx, mut near_rx) = near.split().unwrap();
    let (mut far_tx, mut far_rx) = far.split().unwrap();
    let there: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            for piece in there.chunks(77_777) {
                write_whole(&mut near_tx, piece);
            }
        });
        scope.spawn(|| far_tx.write_all(b"and back").unwrap());
        assert_eq!(read_all(&mut near_rx, 8), b"and back");
        assert_eq!(read_all(&mut far_rx, there.len()), there);
    });
    // Silence is a tick, and the end an end.
    assert_eq!(near_rx.read(&mut [0; 9]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let (sent, received) = gauge.overhead_bytes();
    let records = (there.len() / 77_777 + 1) * (77_777 / record::MAX_PLAIN_BYTES + 1);
    assert!(sent > 300 && sent < 1000 + 22 * records as u64, "{sent}");
    assert!(received > 300 && received < 1000, "{received}");
    drop(near_tx);
    assert_eq!(far_rx.read(&mut [0; 9]).unwrap(), 0);
}

/// A peer that does not read holds a writer for no longer than a tick at a time, and not one byte is lost
/// or sent twice when it reads again.
#[test]
fn a_writer_comes_back_from_a_link_without_room() {
    let (near, far) = links();
    let (mut near_tx, _near_rx) = near.split().unwrap();
    let (_far_tx, mut far_rx) = far.split().unwrap();
    let there: Vec<u8> = (0..20_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut written = 0;
    let began = loop {
        let began = Instant::now();
        match near_tx.write(&there[written..]) {
            Ok(taken) => written += taken,
            Err(e) if is_tick(&e) => break began,
            Err(e) => panic!("{e}"),
        }
    };
    assert!(began.elapsed() >= WRITE_TICK && began.elapsed() < 5 * WRITE_TICK + READ_TICK);
    thread::scope(|scope| {
        scope.spawn(|| write_whole(&mut near_tx, &there[written..]));
        assert!(read_all(&mut far_rx, there.len()) == there, "other data arrived");
    });
}

#[test]
fn another_process_goes_on_with_a_link() {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (near, far) = pair();
    let near = thread::scope(|scope| {
        let called = scope.spawn(|| calls(&near, &a, b.key()).unwrap());
        let answered = is_called(&far, &b).unwrap();
        let bytes = answered.session.to_bytes();
        let session = Session::from_bytes(&bytes).unwrap();
        let far = TlsLink::new(TcpLink::new(far).unwrap(), session, answered.peer);
        let near = called.join().unwrap().over(TcpLink::new(near.try_clone().unwrap()).unwrap());
        let (mut tx, rx) = near.split().unwrap();
        tx.write_all(b"hello").unwrap();
        let (mut far_tx, mut far_rx) = far.split().unwrap();
        assert_eq!(read_all(&mut far_rx, 5), b"hello");
        far_tx.write_all(b"welcome").unwrap();
        drop(tx);
        rx
    });
    drop(near);
}

#[test]
fn only_the_pinned_key_is_spoken_to() {
    let [a, b, other] = [0; 3].map(|_| Identity::generate().unwrap());
    let (near, far) = pair();
    thread::scope(|scope| {
        let answered = scope.spawn(|| is_called(&far, &b));
        let error = calls(&near, &a, other.key()).unwrap_err();
        assert!(
            matches!(error, TlsError::WrongKey { expected, found }
                if expected == other.key() && found == b.key()),
            "{error}"
        );
        let error = answered.join().unwrap().unwrap_err();
        assert!(matches!(error, TlsError::Alert(_)), "{error}");
    });
}

/// A recorded link is of no use: the answer to its Hello would be another.
/// Who means the API does not come to speak with a listener for handoffs, nor the other way round.
#[test]
fn a_link_is_for_one_protocol() {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    for (asked, spoken) in [(Speech::Api, Speech::Frames), (Speech::Frames, Speech::Api)] {
        let ((near, far), clock) = (pair(), MonotonicClock::default());
        let (called, answered) = thread::scope(|scope| {
            let answered =
                scope.spawn(|| accept_for(spoken, &mut &far, &b, PATIENCE, &clock).map(drop));
            let called = connect_for(asked, &mut &near, &a, b.key(), PATIENCE, &clock).map(drop);
            (called, answered.join().unwrap())
        });
        assert!(matches!(answered.unwrap_err(), TlsError::OtherSpeech), "{spoken:?}");
        assert!(matches!(called.unwrap_err(), TlsError::OtherSpeech), "{asked:?}");
    }
}

#[test]
fn what_was_recorded_cannot_be_said_again() {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (near, middle) = pair();
    let (caller, far) = pair();
    let recorded = thread::scope(|scope| {
        let answered = scope.spawn(|| is_called(&far, &b).unwrap());
        // What the caller says passes a listener in between, who keeps it.
        let tapped = scope.spawn(|| {
            let mut recorded = Vec::new();
            let mut back = caller.try_clone().unwrap();
            let to_near = scope.spawn(|| copy(&caller, &middle, &mut Vec::new()));
            copy(&middle, &back, &mut recorded);
            back.flush().unwrap();
            drop(to_near);
            recorded
        });
        let done = calls(&near, &a, b.key()).unwrap();
        let (mut tx, _rx) =
            done.over(TcpLink::new(near.try_clone().unwrap()).unwrap()).split().unwrap();
        tx.write_all(b"a Hello").unwrap();
        answered.join().unwrap();
        tx.flush().unwrap();
        drop(tx);
        tapped.join().unwrap()
    });
    assert!(recorded.len() > 400, "{}", recorded.len());
    let mut replayed = Script { says: Cursor::new(recorded), heard: Vec::new() };
    let error = accept(&mut replayed, &b, PATIENCE, &MonotonicClock::default()).unwrap_err();
    assert!(matches!(error, TlsError::Tls(_)), "{error}");
}

/// Copies what one end says to the other until it has nothing to say for a while.
fn copy(from: &TcpStream, to: &TcpStream, kept: &mut Vec<u8>) {
    let (mut from, mut to, mut scratch) = (from, to, [0; 4096]);
    let mut idle = 0;
    while idle < 5 {
        match from.read(&mut scratch) {
            Ok(0) => return,
            Ok(count) => {
                kept.extend_from_slice(&scratch[..count]);
                if to.write_all(&scratch[..count]).is_err() {
                    return;
                }
                idle = 0;
            }
            Err(_) => idle += 1,
        }
    }
}

/// A peer that says what it always says.
struct Script {
    says: Cursor<Vec<u8>>,
    heard: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.says.read(into)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn told(says: Vec<u8>) -> TlsError {
    let mut peer = Script { says: Cursor::new(says), heard: Vec::new() };
    let own = Identity::generate().unwrap();
    accept(&mut peer, &own, PATIENCE, &MonotonicClock::default()).unwrap_err()
}

#[test]
fn strangers_are_told_apart() {
    let hello = [&[200, 1, 0, 0, 1][..], b"howdah/h"].concat();
    assert!(matches!(told(hello), TlsError::Plain));
    assert!(matches!(told(b"GET / HTTP/1.1\r\n".to_vec()), TlsError::NotTls));
    assert!(matches!(told(Vec::new()), TlsError::Closed));
    assert!(matches!(told(vec![22, 3, 1, 0xff, 0xff]), TlsError::NotTls));
    // Messages without an end, each of them allowed.
    let endless: Vec<u8> =
        (0..100).flat_map(|_| [&[22, 3, 1, 16, 0][..], &[0; 4096]].concat()).collect();
    assert!(!matches!(told(endless), TlsError::Slow(_)));
}

/// A ClientHello that offers TLS 1.2 and nothing newer.
#[test]
fn older_versions_are_refused() {
    let random = [7; 32];
    let mut hello = vec![3, 3];
    hello.extend_from_slice(&random);
    hello.push(0); // no session
    hello.extend_from_slice(&[0, 2, 0xc0, 0x2f]); // ECDHE_RSA with AES_128_GCM
    hello.extend_from_slice(&[1, 0]); // no compression
    // supported_groups, signature_algorithms
    hello.extend_from_slice(&[0, 18, 0, 10, 0, 4, 0, 2, 0, 29, 0, 13, 0, 6, 0, 4, 8, 7, 4, 3]);
    let mut record = vec![22, 3, 1, 0, (hello.len() + 4) as u8, 1, 0, 0, hello.len() as u8];
    record.extend_from_slice(&hello);
    let error = told(record);
    assert!(matches!(error, TlsError::Tls(rustls::Error::PeerIncompatible(_))), "{error}");
}

#[test]
fn a_slow_handshake_ends_in_time() {
    let own = Identity::generate().unwrap();
    let (near, far) = pair();
    let within = Duration::from_millis(300);
    let begun = Instant::now();
    thread::scope(|scope| {
        // A byte now and then is not enough.
        scope.spawn(move || {
            for byte in [22, 3, 1, 1, 0].into_iter().chain([0; 250]) {
                thread::sleep(Duration::from_millis(20));
                if (&near).write_all(&[byte]).is_err() {
                    return;
                }
            }
        });
        let error = accept(&mut &far, &own, within, &MonotonicClock::default()).unwrap_err();
        assert!(matches!(error, TlsError::Slow(_)), "{error}");
        assert!(begun.elapsed() < within * 4, "{:?}", begun.elapsed());
        drop(far);
    });
}

/// The records are those of TLS: a rustls connection at the other end reads and writes them.
#[test]
fn rustls_itself_is_at_the_other_end() {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (near, far) = pair();
    thread::scope(|scope| {
        let answered = scope.spawn(|| is_called(&far, &b).unwrap());
        let mut client = foreign_client(&a, b.key());
        while client.is_handshaking() || client.wants_write() {
            complete(&mut client, &near);
        }
        let far = answered.join().unwrap().over(TcpLink::new(far.try_clone().unwrap()).unwrap());
        let (mut tx, mut rx) = far.split().unwrap();
        client.writer().write_all(b"from rustls").unwrap();
        client.write_tls(&mut &near).unwrap();
        assert_eq!(read_all(&mut rx, 11), b"from rustls");
        tx.write_all(b"to rustls").unwrap();
        let mut got = [0; 9];
        while client.reader().read(&mut got).is_err() {
            complete(&mut client, &near);
        }
        assert_eq!(&got, b"to rustls");
        // New keys are not for us.
        client.refresh_traffic_keys().unwrap();
        client.write_tls(&mut &near).unwrap();
        let error = read_error(&mut rx);
        assert!(error.to_string().contains("no TLS record of data"), "{error}");
    });
}

#[test]
fn the_end_is_understood() {
    let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (near, far) = pair();
    thread::scope(|scope| {
        let answered = scope.spawn(|| is_called(&far, &b).unwrap());
        let mut client = foreign_client(&a, b.key());
        while client.is_handshaking() || client.wants_write() {
            complete(&mut client, &near);
        }
        client.send_close_notify();
        client.write_tls(&mut &near).unwrap();
        let far = answered.join().unwrap().over(TcpLink::new(far.try_clone().unwrap()).unwrap());
        let (_tx, mut rx) = far.split().unwrap();
        assert_eq!(read_all(&mut rx, 1), b"");
    });
}

fn foreign_client(own: &Identity, to: PeerKey) -> ClientConnection {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pinned = Pinned::new(to, provider.signature_verification_algorithms);
    let resolver = AlwaysResolvesClientRawPublicKeys::new(Arc::clone(&own.certified));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_client_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![b"howdah".to_vec()];
    ClientConnection::new(Arc::new(config), "cloudlet".try_into().unwrap()).unwrap()
}

fn complete(client: &mut ClientConnection, stream: &TcpStream) {
    match client.complete_io(&mut &*stream) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
    }
}

fn read_error(rx: &mut impl Read) -> io::Error {
    loop {
        match rx.read(&mut [0; 100]) {
            Ok(count) => assert_ne!(count, 0, "it ended"),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return e,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes, it is an error in bounded memory.
    #[test]
    fn no_beginning_is_too_odd(
        mut says in prop::collection::vec(any::<u8>(), 0..600),
        looks_like_tls in any::<bool>(),
    ) {
        if looks_like_tls {
            says.splice(0..0, [22, 3, 1, 1, 0]);
        }
        told(says);
    }
}
