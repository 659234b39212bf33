//! `howdah trace`: records what guests change, and moves them again by the real engine.

use std::{
    fs::File,
    io::BufReader,
    net::TcpListener,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use crossbeam_channel::{Receiver, unbounded};
use handoff::{
    BaseView, Bases,
    engine::{ReceiveOptions, SendOptions},
    report::Report,
    sim::{LinkShape, MemHost, Rate, SimConnect},
    tcp::{MonotonicClock, TcpLink, accept_tcp},
    tls::Guarded,
    trace::{
        Play, Summary, Trace, TraceVm,
        file::{self, TraceFileError},
        play::{self, PlayError, Played},
    },
};

use super::{handoff::summary, interrupt::Interrupts};
use crate::{
    cli::{PlayArgs, RecordArgs, TakeArgs, TraceCommand},
    control::{Encode, RecordRequest, Reply, Request, client},
    failure::{Exit, Failure, one_line},
    home::Home,
    output::{Output, bytes, table},
    partial::Partial,
    peers::{self, BookFile, Dial, Gate, Right},
};

/// How long compressing and writing a trace may take, beyond the recording.
const WRITE_TIMEOUT: Duration = Duration::from_secs(600);

/// Runs `howdah trace`.
pub(crate) fn run(command: TraceCommand, home: &Home, output: Output) -> anyhow::Result<()> {
    match command {
        TraceCommand::Record(args) => record(&args, home, output),
        TraceCommand::Show { file, windows } => {
            let summary = load(&file)?.summary(windows);
            output.result(&summary, shown);
            Ok(())
        }
        TraceCommand::Play(args) => play_trace(args, home, output),
        TraceCommand::Take(args) => take(&args, home, output),
    }
}

fn record(args: &RecordArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    let dir = home.existing(&args.vm)?;
    let file = std::path::absolute(&args.out).map_err(|e| Failure::file("write", &args.out, &e))?;
    let path = file.to_str().ok_or_else(|| {
        Failure::new(Exit::Usage, file.display(), "not a UTF-8 path", "choose another")
    })?;
    let request = RecordRequest {
        path: path.to_owned(),
        for_ms: args.for_s * 1000,
        every_ms: args.every_ms,
        most_mib: args.most_mib,
    };
    Interrupts::take()?.watch(&dir, Request::EndRecording, output, None, |_| {});
    let written = Partial::beside(&file)?;
    let timeout = Duration::from_secs(args.for_s) + WRITE_TIMEOUT;
    let said = match client::fill(&dir, Request::Record(request), written.file(), timeout)? {
        Reply::Recorded(said) => said,
        _ => anyhow::bail!("VM {}: its process gave an answer that is none", dir.name()),
    };
    written.finish(&file)?;
    output.result(&said, |said| {
        let number = |key: &str| said.get(key).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
        let mut text = format!(
            "VM {} is recorded in {}: {:.1} s, {} changes of {} chunks, {}",
            args.vm,
            file.display(),
            number("duration_s"),
            number("changes"),
            number("changed_chunks"),
            bytes(number("bytes") as u64),
        );
        if said.get("ended").and_then(serde_json::Value::as_str) == Some("full") {
            text += "; it ended early because --most-mib was reached";
        }
        text
    });
    Ok(())
}

fn load(path: &Path) -> Result<Trace, Failure> {
    let opened = File::open(path).map_err(|e| Failure::file("read", path, &e))?;
    file::read(BufReader::new(opened)).map_err(|e| {
        let way_out = match e {
            TraceFileError::Version { .. } => "use the howdah that recorded it",
            _ => "record it again",
        };
        Failure::new(Exit::Corrupt, path.display(), e, way_out)
    })
}

fn shown(summary: &Summary) -> String {
    let chunks = |n: u64| bytes(n * guest_images::CHUNK_SIZE as u64);
    let mut text = format!(
        "RAM {}, disk {}, {:.1} s\ndiffered at the begin: {} of RAM, {} of disk\n\
         changed since: {} chunks ({}), {} times, {} of these on disk\n\
         {} different contents ({})\n\n",
        chunks(summary.ram_chunks),
        chunks(summary.disk_chunks),
        summary.duration_s,
        chunks(summary.initial_ram),
        chunks(summary.initial_disk),
        summary.changed_chunks,
        chunks(summary.changed_chunks),
        summary.changes,
        summary.disk_changes,
        summary.contents,
        chunks(summary.contents),
    );
    let classes = summary.initial_classes.named().into_iter().zip(summary.change_classes.named());
    let rows: Vec<_> = classes
        .map(|((name, begin), (_, later))| [name.to_owned(), begin.to_string(), later.to_string()])
        .collect();
    text += &table(["CLASS", "AT THE BEGIN", "CHANGES"], &rows);
    text += "\n\n";
    let rows: Vec<_> = summary
        .windows
        .iter()
        .map(|window| {
            [
                format!("{:.1}", window.from_s),
                format!("{:.0}", window.changes as f64 / window.for_s.max(1e-6)),
                chunks(window.chunks),
                chunks(window.new_chunks),
            ]
        })
        .collect();
    text + &table(["FROM S", "CHANGES/S", "WORKING SET", "NEW IN IT"], &rows)
}

/// `10`, or `5@0,35@20,5@40`: Mbit/s from a second on.
fn rates(text: &str) -> Result<Rate, Failure> {
    let wrong = || {
        let way_out = "give Mbit/s, like 10 or 5,35@20,5@40";
        Failure::new(Exit::Usage, format!("--mbps {text}"), "no rates over time", way_out)
    };
    let positive = |word: &str| word.parse().ok().filter(|n: &f64| n.is_finite() && *n >= 0.0);
    let mut rate: Option<(Rate, f64)> = None;
    for word in text.split(',') {
        let (mbps, from) = word.split_once('@').unwrap_or((word, "0"));
        let mbps: f64 = positive(mbps).ok_or_else(wrong)?;
        let from: f64 = positive(from).ok_or_else(wrong)?;
        let at = Duration::try_from_secs_f64(from).map_err(|_| wrong())?;
        rate = Some(match rate {
            None if from > 0.0 || mbps == 0.0 => return Err(wrong()),
            None => (Rate::mbps(mbps), from),
            Some((_, last)) if from <= last => return Err(wrong()),
            Some((rate, _)) => (rate.then_mbps(at, mbps), from),
        });
    }
    Ok(rate.ok_or_else(wrong)?.0)
}

fn seconds(what: &str, value: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(value)
        .map_err(|e| Failure::new(Exit::Usage, what, e, "give a positive number"))
}

fn play_trace(args: PlayArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    let shape =
        LinkShape::symmetric(rates(&args.mbps)?, seconds("--delay-ms", args.delay_ms / 1e3)?);
    let from = seconds("--from-s", args.from_s)?;
    let trace = Arc::new(load(&args.file)?);
    let clock = MonotonicClock::default();
    let played = Play { from, again: !args.once, ..Play::default() };
    let mut vm = TraceVm::new(Arc::clone(&trace), played, clock);
    let options = send_options(&args);
    let report = match &args.to {
        Some(peer) => {
            let endpoint = peers::resolve(&*BookFile::of(home).read()?, peer, args.plain)?;
            let mut connect = Dial::from(home, &endpoint)?;
            play::send_trace(
                &mut vm,
                &mut connect,
                &options,
                scratch()?.path(),
                &clock,
                &mut |_| {},
                &AtomicBool::new(false),
            )
        }
        None => {
            let (mut connect, ends) = SimConnect::new(shape);
            let played = play::play(
                &mut vm,
                &mut connect,
                &ends,
                (&options, &ReceiveOptions::new("trace")),
                scratch()?.path(),
                &clock,
                &mut |_| {},
                &AtomicBool::new(false),
            );
            played.map(|Played { report, .. }| report)
        }
    };
    let report = report.map_err(|e| failure(&args.file, e))?;
    let report: serde_json::Value = serde_json::to_value::<Report>(report)?;
    let peer = args.to.as_deref().unwrap_or("the other end of the link");
    let name = args.file.display();
    output.result(&report, |report| summary(&format_args!("of {name}"), peer, report));
    Ok(())
}

fn send_options(args: &PlayArgs) -> SendOptions {
    let mut options = SendOptions::new("trace", "trace", Vec::new());
    options.policy = handoff::policy::CutOverPolicy::new(args.pace.objective);
    options.policy.throttle = args.pace.throttle;
    options.order = args.pace.order;
    options.commit = args.pace.commit;
    options.stages = Encode::from(args.encode.clone()).options();
    options.pipeline.choice = args.pipeline.mode;
    options.pipeline.serial = args.pipeline.serial;
    if let Some(workers) = args.pipeline.workers {
        options.pipeline.workers = workers.into();
    }
    options
}

fn scratch() -> Result<tempfile::TempDir, Failure> {
    let made = tempfile::tempdir();
    made.map_err(|e| Failure::file("make a directory in", &std::env::temp_dir(), &e))
}

fn failure(file: &Path, error: PlayError) -> Failure {
    let what = format!("the guest of {}", file.display());
    match error {
        PlayError::Kept { reason, report } => {
            let report = serde_json::to_value(*report).ok();
            Failure { report, ..Failure::plain(Exit::NotMoved, what, reason) }
        }
        PlayError::InDoubt => Failure::plain(Exit::InDoubt, what, error),
        other => Failure::plain(Exit::Failed, what, other),
    }
}

fn take(args: &TakeArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    let trace = load(&args.file)?;
    let base: Arc<dyn BaseView> = Arc::clone(trace.base()) as Arc<dyn BaseView>;
    let listen = |e| {
        let what = format!("listen on {}", args.listen);
        Failure::new(Exit::Failed, what, e, "choose another with --listen")
    };
    let listener = TcpListener::bind(args.listen).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    output.note(&format!("listening on {address}"));
    let gate = if args.plain { None } else { Some(Gate::of(home)?) };
    let ends = accepting(listener, gate, output);
    let mut options = ReceiveOptions::new("trace");
    if let Some(workers) = args.workers {
        options.workers = workers.into();
    }
    let clock = MonotonicClock::default();
    let over = AtomicBool::new(false);
    // A peer that is started by hand may come late.
    let first = ends.recv()?;
    let host = MemHost::new(Bases::from(base));
    let scratch = scratch()?;
    let target = play::take(first, &ends, host, scratch.path(), &options, &clock, &over)
        .map_err(|e| failure(&args.file, e))?;
    let written = target.written().count() as u64;
    let said = serde_json::json!({ "written_chunks": written });
    output.result(&said, |_| {
        let size = bytes(written * guest_images::CHUNK_SIZE as u64);
        format!("the guest of {} is here: {size} differ from its base", args.file.display())
    });
    Ok(())
}

/// A link of a peer that may send, or of anyone.
fn let_in(gate: Option<&Gate>, link: TcpLink) -> anyhow::Result<Guarded<TcpLink>> {
    let Some(gate) = gate else { return Ok(Guarded::Plain(link)) };
    let (peer, done) = gate.admit(link.stream())?;
    peer.check(Right::Send)?;
    Ok(Guarded::Tls(done.over(link)))
}

fn accepting(
    listener: TcpListener,
    gate: Option<Gate>,
    output: Output,
) -> Receiver<Guarded<TcpLink>> {
    let (to, ends) = unbounded();
    // Ends with the process.
    std::thread::spawn(move || {
        while let Ok(link) = accept_tcp(&listener) {
            match let_in(gate.as_ref(), link) {
                Ok(link) => {
                    if to.send(link).is_err() {
                        return;
                    }
                }
                Err(e) => output.note(&one_line(&format!("howdah: a caller was refused: {e:#}"))),
            }
        }
    });
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_or_refused() {
        let s = Duration::from_secs;
        assert_eq!(rates("10").unwrap(), Rate::mbps(10.0));
        let varied = Rate::mbps(5.0).then_mbps(s(20), 35.0).then_mbps(s(40), 5.0);
        assert_eq!(rates("5,35@20,5@40").unwrap(), varied);
        assert_eq!(rates("5@0,35@20,5@40").unwrap(), varied);
        for bad in ["", "x", "0", "-1", "5@3", "5,35", "5,35@20,5@10", "5,35@x", "inf", "5,,6@1"] {
            assert_eq!(rates(bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
    }
}
