//! Client and server as processes of one machine would meet: over TCP, with links that break.
#![allow(clippy::unwrap_used)]

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use howdah_apps::{
    Progress,
    client::{self, Application, ClientError, Films, Options},
    fluid::Server,
    record::{Fate, Record},
    summary::{Requests, Summary},
};

fn any_port() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

fn serve(progress: Option<&Path>) -> SocketAddr {
    let server = Server::bind(any_port(), progress.map(Progress::new)).unwrap();
    let address = server.address().unwrap();
    thread::spawn(move || server.run());
    address
}

fn options(address: SocketAddr, jsonl: &Path) -> Options {
    Options {
        application: Application::Fluid,
        address,
        seed: 11,
        rate_hz: 0.0,
        outstanding: 1,
        duration: None,
        requests: Some(12),
        connect_within: Duration::from_secs(5),
        grace: Duration::from_secs(5),
        jsonl: Some(jsonl.to_owned()),
    }
}

fn ask(change: impl FnOnce(&mut Options), address: SocketAddr) -> (Summary, Record) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut options = options(address, file.path());
    change(&mut options);
    let summary = client::run(&options).unwrap();
    let record = Record::read(file.path()).unwrap();
    assert_eq!(record.summary.as_ref(), Some(&summary));
    (summary, record)
}

/// Stands between client and server. What becomes of the connections is said one after the other;
/// the last one is kept.
#[derive(Clone, Copy)]
enum Way {
    /// Broken once so many bytes came back from the server.
    CutAfter(usize),
    /// Bytes pass.
    Open,
    /// Nothing comes back, and nobody says so.
    Silent,
}

fn relay(server: SocketAddr, ways: Vec<Way>) -> SocketAddr {
    let listener = TcpListener::bind(any_port()).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for (at, near) in listener.incoming().enumerate() {
            let (near, far) = (near.unwrap(), TcpStream::connect(server).unwrap());
            let way = ways[at.min(ways.len() - 1)];
            let up = (near.try_clone().unwrap(), far.try_clone().unwrap());
            thread::spawn(move || pass(up.0, up.1, Way::Open));
            thread::spawn(move || pass(far, near, way));
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream, way: Way) {
    let (mut buffer, mut passed) = (vec![0; 16 << 10], 0);
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        passed += length;
        match way {
            Way::Silent => continue,
            Way::CutAfter(limit) if passed > limit => break,
            Way::CutAfter(_) | Way::Open => {}
        }
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

#[test]
fn every_request_is_answered_and_the_film_is_the_one_that_its_readings_give() {
    let progress = tempfile::NamedTempFile::new().unwrap();
    let (summary, record) = ask(|_| (), serve(Some(progress.path())));
    assert_eq!((summary.counts.sent, summary.counts.answered), (12, 12));
    assert_eq!((summary.counts.lost, summary.counts.failed, summary.reconnects), (0, 0, 0));
    assert!(summary.p50_ms > Some(0.0) && summary.max_ms >= summary.p99_ms);
    assert!(record.exchanges.iter().all(|one| one.answer_bytes > 12_000));
    let films = Films::compare(&record).unwrap();
    assert_eq!((films.compared, films.different), (12, 0));
    assert_eq!(std::fs::read_to_string(progress.path()).unwrap(), "12\n");
}

#[test]
fn a_broken_connection_costs_what_was_outstanding_and_is_made_again() {
    let relay = relay(serve(None), vec![Way::CutAfter(40_000), Way::Open]);
    let (summary, record) = ask(|options| options.outstanding = 4, relay);
    assert_eq!((summary.counts.sent, summary.reconnects, record.reconnects), (12, 1, 1));
    let lost: Vec<u64> =
        record.exchanges.iter().filter(|one| one.fate == Fate::Lost).map(|one| one.seq).collect();
    assert!((1..=4).contains(&lost.len()), "{lost:?}");
    assert_eq!(summary.counts.answered + lost.len() as u64, 12);
    assert!(record.exchanges.iter().any(|one| one.connection == 2 && one.fate == Fate::Answered));
    // Each connection has a film of its own.
    assert_eq!(Films::compare(&record).unwrap().different, 0);
}

#[test]
fn what_is_never_answered_is_lost_and_what_could_not_be_asked_is_skipped() {
    let relay = relay(serve(None), vec![Way::Silent]);
    let began = Instant::now();
    let (summary, record) = ask(
        |options| {
            options.rate_hz = 50.0;
            options.outstanding = 2;
            options.requests = None;
            options.duration = Some(Duration::from_millis(400));
            options.grace = Duration::from_millis(100);
        },
        relay,
    );
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!((summary.counts.sent, summary.counts.lost, summary.reconnects), (2, 2, 0));
    assert!((10..=25).contains(&summary.skipped), "{}", summary.skipped);
    assert!(record.exchanges.iter().all(|one| one.problem.is_some()));
    assert_eq!((summary.p50_ms, summary.longest_gap_ms), (None, None));
}

#[test]
fn requests_come_at_their_rate() {
    let (summary, record) = ask(
        |options| {
            options.rate_hz = 20.0;
            options.outstanding = 8;
            options.requests = Some(10);
        },
        serve(None),
    );
    assert!((0.4..2.0).contains(&summary.duration_s), "{}", summary.duration_s);
    let sent = record.exchanges.iter().map(|one| one.sent_monotonic_ns);
    let (from, to) = (sent.clone().min().unwrap(), sent.max().unwrap());
    let around = Requests::around(&record.exchanges, 0, from, to);
    assert_eq!((around.counts.answered, around.before_p50_ms), (10, None));
    assert!(around.during_p50_ms.is_some() && around.longest_gap_ms.is_some());
}

#[test]
fn a_server_that_is_not_there_is_said_to_be_so() {
    let nobody = TcpListener::bind(any_port()).unwrap().local_addr().unwrap();
    let mut options = options(nobody, Path::new("/dev/null"));
    options.connect_within = Duration::from_millis(100);
    let error = client::run(&options).unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    assert!(error.to_string().contains("fluid"), "{error}");
}

#[test]
fn a_server_that_speaks_something_else_is_left() {
    let listener = TcpListener::bind(any_port()).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(b"SSH-2.0-something else\r\n");
        }
    });
    let (summary, _) = ask(
        |options| {
            options.requests = Some(2);
            options.outstanding = 1;
            options.duration = Some(Duration::from_secs(3));
            options.grace = Duration::from_millis(100);
        },
        address,
    );
    assert_eq!((summary.counts.answered, summary.counts.lost), (0, summary.counts.sent));
}
