//! `howdah handoff`: asks a VM's process to send it, and shows how it goes.

use howdah_api::{Client, HandoffSpec, Kind, State};

use super::{interrupt::Interrupts, shown::Shown};
use crate::{
    cli::HandoffArgs,
    cloudlet::{Cloudlet, follow},
    control::{HandoffRequest, Request},
    failure::{Exit, Failure},
    home::VmName,
    ops,
    output::{Output, bytes, shares},
};

/// Runs `howdah handoff`.
pub(crate) fn run(args: HandoffArgs, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    // A VM's process is asked itself on its own host, and by its daemon from another.
    let dir = match cloudlet.elsewhere() {
        None => Ok(cloudlet.home().existing(&args.vm)?),
        Some(daemon) => Err(daemon),
    };
    let Some(peer) = args.peer.filter(|_| !args.cancel) else {
        match dir {
            Ok(dir) => ops::handoff::cancel(&dir)?,
            Err(daemon) => cancel(daemon, &args.vm)?,
        }
        return super::vm::say(output, &args.vm, "handoff cancelled, the guest goes on here");
    };
    // Before anything is begun: its threads must not take the signals.
    let interrupts = Interrupts::take()?;
    let request = HandoffRequest {
        audit: args.audit,
        pace: args.pace.into(),
        keep_mib: args.keep_mib,
        encode: args.encode.into(),
        pipeline: args.pipeline,
        link: args.link,
        ..HandoffRequest::default()
    };
    let mut shown = Shown::new(output);
    let question = Some("Give up this handoff? The guest goes on here.");
    let spec = HandoffSpec { peer, plain: args.plain, ..HandoffSpec::from(&request) };
    // What only this command can say (means that are left out for measuring) it says to the VM itself.
    let sayable = HandoffRequest::try_from(&spec).is_ok_and(|said| said == request);
    let (shown_peer, ended) = match (cloudlet.daemon().filter(|_| sayable), dir) {
        (Some(daemon), dir) => {
            let begun = daemon.handoff(args.vm.as_ref(), &spec).map_err(Failure::from)?;
            let quiet = shown.quiet();
            match dir {
                Ok(dir) => {
                    interrupts.watch(&dir, Request::CancelHandoff, output, question, quiet);
                }
                Err(daemon) => {
                    let (daemon, id) = (daemon.clone(), begun.id.clone());
                    let give_up = move || Ok(daemon.cancel(&id).map(drop)?);
                    interrupts.tell(output, question, quiet, give_up);
                }
            }
            let peer = begun.peer.clone().unwrap_or(spec.peer);
            let ended = follow(daemon, begun, |operation| {
                if let Some(progress) = operation.handoff.clone() {
                    shown.show(&progress.into());
                }
            });
            (peer, ended)
        }
        (None, Ok(dir)) => {
            let (plain, home) = (args.plain, cloudlet.home());
            let handoff = ops::handoff::begin(&dir, &spec.peer, plain, request, home)?;
            interrupts.watch(&dir, Request::CancelHandoff, output, question, shown.quiet());
            (handoff.peer.clone(), handoff.follow(|progress| shown.show(&progress)))
        }
        (None, Err(_)) => {
            let why = "flags that are for measuring are not in the API";
            let way_out = "leave them out, or type it on that VM's host";
            return Err(Failure::new(Exit::Usage, "--cloudlet", why, way_out).into());
        }
    };
    shown.clear();
    let report = ended?;
    output.result(&report, |report| summary(&args.vm, &shown_peer, report));
    Ok(())
}

/// Gives up the handoff of a VM of another cloudlet.
fn cancel(daemon: &Client, vm: &VmName) -> Result<(), Failure> {
    let running = daemon.operations()?.into_iter().find(|operation| {
        let of_vm = operation.kind == Kind::Handoff && operation.subject == vm.as_ref();
        of_vm && operation.state == State::Running
    });
    match running {
        Some(operation) => Ok(daemon.cancel(&operation.id).map(drop)?),
        None => {
            let way_out = "`howdah vm inspect` shows how it is";
            Err(Failure::new(Exit::Conflict, format!("VM {vm}"), "it is not handed off", way_out))
        }
    }
}

/// What a report says in a few lines.
pub(super) fn summary(
    vm: &impl std::fmt::Display,
    peer: &str,
    report: &serde_json::Value,
) -> String {
    let number = |key: &str| report.get(key).and_then(serde_json::Value::as_f64);
    let mut text = format!("VM {vm} runs at {peer}");
    if let (Some(total), Some(down)) = (number("total_ms"), number("downtime_ms")) {
        text += &format!(": {:.1} s in all, {down:.0} ms down", total / 1000.0);
    }
    if let Some(sent) = number("bytes_on_link") {
        text += &format!(", {} on the link", bytes(sent as u64));
    }
    text += &shares(report);
    text += &modes(&report["adaptation"]);
    text
}

/// What a report says of modes, in a line; nothing if it says nothing.
fn modes(adaptation: &serde_json::Value) -> String {
    let list = |key: &str| adaptation[key].as_array().map_or(&[][..], Vec::as_slice);
    let used = list("modes").iter().filter_map(|mode| {
        let bodies = mode["bodies"].as_u64().filter(|bodies| *bodies > 0)?;
        Some(format!("{bodies} in {}", mode["mode"].as_str()?))
    });
    let used: Vec<String> = used.collect();
    if used.is_empty() {
        return String::new();
    }
    let left_out = adaptation["decisions_left_out"].as_u64().unwrap_or(0);
    let decisions = match list("decisions").len() as u64 + left_out {
        0 => String::new(),
        1 => "; 1 decision".to_owned(),
        several => format!("; {several} decisions"),
    };
    let choice = adaptation["choice"].as_str().unwrap_or_default();
    format!("\n\nbatches, mode {choice}: {}{decisions}", used.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_shows_what_became_of_the_chunks() {
        let report = serde_json::json!({
            "total_ms": 2500.0, "downtime_ms": 120.4, "bytes_on_link": 2048,
            "classes": [
                {"name": "zero", "chunks": 12, "bytes_in": 49152, "bytes_out": 24, "cpu_s": 0.01},
                {"name": "seen", "chunks": 0, "bytes_in": 0, "bytes_out": 0, "cpu_s": 0.0},
            ],
        });
        assert_eq!(
            summary(&"a", "b:1", &report),
            "VM a runs at b:1: 2.5 s in all, 120 ms down, 2.0 KiB on the link\n\n\
             CLASS  CHUNKS  IN        OUT   CPU\nzero   12      48.0 KiB  24 B  10 ms"
        );
    }

    #[test]
    fn a_report_shows_which_modes_were_used() {
        let adaptation = serde_json::json!({
            "choice": "auto", "decisions": [{}, {}], "decisions_left_out": 1,
            "modes": [
                {"mode": "lz4", "bodies": 0, "samples": 1},
                {"mode": "zstd:3", "bodies": 7},
                {"mode": "xz:3", "bodies": 12},
            ],
        });
        let says = "\n\nbatches, mode auto: 7 in zstd:3, 12 in xz:3; 3 decisions";
        assert_eq!(modes(&adaptation), says);
        assert_eq!(modes(&serde_json::Value::Null), "");
    }
}
