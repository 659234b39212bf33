//! Migrations between two QEMUs that are scripts: which commands come, in which order, and what is made
//! of what QEMU says.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread,
};

use super::*;

/// An event of one of the two, or the end of its connection.
#[derive(Clone)]
enum Said {
    Event(Side, &'static str, Value),
    End(Side),
}

/// What happens on a command of one side.
type Script = fn(Side, &str) -> Vec<Said>;

struct Fake {
    ends: [UnixStream; 2],
    clock_us: i64,
    log: Vec<String>,
}

impl Fake {
    fn line(&mut self, side: Side, line: &Value) {
        // The test may have seen enough.
        let _ = writeln!(&mut self.ends[side as usize], "{line}");
    }

    fn say(&mut self, said: Said) {
        match said {
            Said::End(side) => {
                let _ = self.ends[side as usize].shutdown(std::net::Shutdown::Both);
            }
            Said::Event(side, event, data) => {
                self.clock_us += 1000;
                let timestamp = json!({ "seconds": 0, "microseconds": self.clock_us });
                let event = json!({ "event": event, "data": data, "timestamp": timestamp });
                self.line(side, &event);
            }
        }
    }
}

/// Carries a migration out between scripts; what came of it, and the commands in their order.
fn play(variant: Variant, bound: Duration, script: Script) -> (Result<Ended>, Vec<String>) {
    let (source, source_end) = UnixStream::pair().unwrap();
    let (target, target_end) = UnixStream::pair().unwrap();
    let readers = [source_end.try_clone().unwrap(), target_end.try_clone().unwrap()];
    let fake = Fake { ends: [source_end, target_end], clock_us: 0, log: Vec::new() };
    let fake = Arc::new(Mutex::new(fake));
    for (side, reader) in [Side::A, Side::B].into_iter().zip(readers) {
        fake.lock().unwrap().line(side, &json!({ "QMP": { "version": {} } }));
        let fake = Arc::clone(&fake);
        thread::spawn(move || serve(side, reader, &fake, script));
    }
    let (mut source, mut target) = (Qmp::begin(source).unwrap(), Qmp::begin(target).unwrap());
    let ended = Migration { source: &mut source, target: &mut target, variant, bound }.run();
    let log = fake.lock().unwrap().log.clone();
    (ended, log)
}

fn serve(side: Side, reader: UnixStream, fake: &Mutex<Fake>, script: Script) {
    for line in BufReader::new(reader).lines() {
        let Ok(line) = line else { return };
        let command: Value = serde_json::from_str(&line).unwrap();
        let command = command["execute"].as_str().unwrap();
        let mut fake = fake.lock().unwrap();
        fake.log.push(format!("{} {command}", side.letter()));
        let answer = match command {
            "query-migrate" => json!({ "status": "active" }),
            "query-block-jobs" => json!([{ "len": 10, "offset": 4 }]),
            _ => json!({}),
        };
        fake.line(side, &json!({ "return": answer }));
        script(side, command).into_iter().for_each(|said| fake.say(said));
    }
}

fn migration(side: Side, status: &str) -> Said {
    Said::Event(side, "MIGRATION", json!({ "status": status }))
}

fn job(event: &'static str) -> Said {
    Said::Event(Side::A, event, json!({ "device": "mirror" }))
}

/// A guest that moves as it should.
fn good(side: Side, command: &str) -> Vec<Said> {
    use Side::{A, B};
    match (side, command) {
        (A, "blockdev-mirror") => vec![job("BLOCK_JOB_READY")],
        (A, "migrate") => vec![
            migration(A, "active"),
            Said::Event(A, "MIGRATION_PASS", json!({ "pass": 1 })),
            Said::Event(A, "MIGRATION_PASS", json!({ "pass": 2 })),
            Said::Event(A, "STOP", Value::Null),
            migration(A, "pre-switchover"),
        ],
        (A, "block-job-cancel") => vec![job("BLOCK_JOB_COMPLETED")],
        (A, "migrate-continue") => vec![
            migration(A, "completed"),
            Said::Event(B, "RESUME", Value::Null),
            migration(B, "completed"),
        ],
        _ => Vec::new(),
    }
}

const LONG: Duration = Duration::from_secs(30);

#[test]
fn the_disk_is_whole_before_the_target_runs() {
    let (ended, log) = play(Variant::Precopy, LONG, good);
    let ended = ended.unwrap();
    assert!(ended.finished && ended.given_up.is_none());
    // STOP, pre-switchover, the job's end, completed, RESUME: a millisecond each.
    assert_eq!(ended.downtime_ms, Some(4.0));
    let at = |command: &str| log.iter().position(|line| line == command).unwrap();
    let order = [
        "b nbd-server-start",
        "b block-export-add",
        "a blockdev-mirror",
        "b migrate-incoming",
        "a migrate",
        "a block-job-cancel",
        "b nbd-server-stop",
        "a migrate-continue",
    ];
    assert!(order.map(at).is_sorted(), "{log:?}");
    assert!(!log.contains(&"a migrate-start-postcopy".to_owned()));
}

#[test]
fn post_copy_begins_when_all_was_sent_once() {
    let (ended, log) = play(Variant::Postcopy, LONG, good);
    assert!(ended.unwrap().finished);
    let starts = log.iter().filter(|line| *line == "a migrate-start-postcopy");
    assert_eq!(starts.count(), 1);
}

#[test]
fn a_bound_is_kept_and_says_what_went_on() {
    let bound = Duration::from_millis(300);
    let (ended, log) = play(Variant::Precopy, bound, |side, command| match command {
        "migrate" => vec![migration(side, "active")],
        "migrate_cancel" => vec![migration(side, "cancelled")],
        _ => good(side, command),
    });
    let ended = ended.unwrap();
    assert!(!ended.finished && ended.total_ms.is_none() && ended.downtime_ms.is_none());
    assert_eq!(ended.given_up.as_deref(), Some("memory: active"));
    assert!(log.contains(&"a migrate_cancel".to_owned()));
    let (ended, log) = play(Variant::Precopy, bound, |_, _| Vec::new());
    let ended = ended.unwrap();
    assert_eq!(ended.given_up.as_deref(), Some("mirroring the disk"));
    assert_eq!(ended.figures["mirror"]["offset"], 4);
    assert!(!log.contains(&"a migrate".to_owned()));
}

#[test]
fn failures_are_no_figures() {
    let (ended, _) = play(Variant::Precopy, LONG, |side, command| match command {
        "blockdev-mirror" => vec![job("BLOCK_JOB_COMPLETED")],
        _ => good(side, command),
    });
    let error = format!("{:#}", ended.unwrap_err());
    assert!(error.contains("mirror of the disk"), "{error}");
    let (ended, log) = play(Variant::Precopy, LONG, |side, command| match command {
        "block-job-cancel" => vec![job("BLOCK_JOB_CANCELLED")],
        _ => good(side, command),
    });
    assert!(ended.is_err());
    assert!(!log.contains(&"a migrate-continue".to_owned()), "{log:?}");
    let (ended, _) = play(Variant::Precopy, LONG, |side, command| match command {
        "migrate" => vec![migration(side, "failed")],
        _ => good(side, command),
    });
    assert!(format!("{:#}", ended.unwrap_err()).contains("migration failed"));
}

#[test]
fn a_target_that_dies_is_noticed_while_the_source_waits() {
    let (ended, _) = play(Variant::Precopy, LONG, |side, command| match command {
        "migrate" => vec![migration(side, "active"), Said::End(Side::B)],
        _ => good(side, command),
    });
    let error = format!("{:#}", ended.unwrap_err());
    assert!(error.contains("closed its QMP socket"), "{error}");
}

#[test]
fn pre_copy_may_stop_the_guest_for_longer_the_longer_it_tries() {
    let began = Instant::now();
    let at = |seconds| began + Duration::from_secs(seconds);
    let mut limit = Limit::default();
    let raised: Vec<Option<u64>> = [(1, 0), (2, 90), (3, 91), (4, 96), (5, 97), (6, 102)]
        .map(|(pass, seconds)| limit.after_pass(pass, at(seconds)))
        .to_vec();
    assert_eq!(raised, [None, None, None, Some(450), None, Some(675)]);
    for seconds in 103..1000 {
        limit.after_pass(7, at(seconds));
    }
    assert_eq!(limit.ms, LAST_LIMIT_MS);
}
