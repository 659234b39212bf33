//! `howdah recover`: settles with the peers where VMs may run, without starting any.

use std::time::Duration;

use handoff::engine::{Limits, Recovery};
use serde::Serialize;

use crate::{
    cli::RecoverArgs,
    failure::{Exit, Failure, one_line},
    home::{Home, VmDir, VmName},
    lock::Probe,
    output::{Output, table},
    vmproc::{Asking, recover},
};

/// For how long a peer that cannot be reached is tried: there are other VMs, and this can be repeated.
const PATIENCE: Duration = Duration::from_secs(3);

/// What became of one VM.
#[derive(Debug, Serialize)]
struct Settled {
    vm: VmName,
    /// `may-run`, `gone`, `never-here`, `in-doubt`, `in-use`, or `failed`.
    verdict: &'static str,
    /// What the record says now.
    ownership: Option<String>,
    /// Where it is, or who cannot be asked; a reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

/// Runs `howdah recover`.
pub(crate) fn run(args: &RecoverArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    let dirs = match args.vms.is_empty() {
        true => home.vms()?,
        false => args.vms.iter().map(|name| home.existing(name)).collect::<Result<_, _>>()?,
    };
    let settled: Vec<Settled> =
        dirs.iter().filter_map(|dir| settle(dir, home, args.peer.as_deref())).collect();
    output.result(&settled, |settled| shown(settled));
    let left: Vec<&str> = settled
        .iter()
        .filter(|vm| matches!(vm.verdict, "in-doubt" | "failed"))
        .map(|vm| vm.vm.as_ref())
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    let in_doubt = settled.iter().any(|vm| vm.verdict == "in-doubt");
    let exit = if in_doubt { Exit::InDoubt } else { Exit::Failed };
    let way_out = "try again when the peer is back, or name where it listens with --peer; \
                   `howdah vm takeover NAME` if it never will be";
    Err(Failure::new(exit, left.join(", "), "not settled", way_out).into())
}

/// Settles one VM; nothing for a directory that is nobody's.
fn settle(dir: &VmDir, home: &Home, peer: Option<&str>) -> Option<Settled> {
    let told = |verdict, why: Option<String>| {
        let record = dir.record().ok().flatten();
        let ownership = record.map(|record| one_line(&record.to_string()));
        let why = why.map(|why| one_line(&why));
        Some(Settled { vm: dir.name().clone(), verdict, ownership, why })
    };
    let failed = |failure: Failure| told("failed", Some(failure.message));
    if let Ok(Probe::Held { pid }) = dir.probe() {
        let who = pid.map_or("a process".to_owned(), |pid| format!("process {pid}"));
        return told("in-use", Some(format!("{who} has it, and settles it")));
    }
    let opened = dir.lock().and_then(|lock| Ok((lock, dir.journal()?)));
    let (_lock, mut journal) = match opened {
        Ok(opened) => opened,
        Err(failure) => return failed(failure),
    };
    journal.record()?;
    let limits = Limits { commit: PATIENCE, relink_grace: PATIENCE, ..Limits::default() };
    let asked = Asking::prepare(dir, home, peer);
    match asked.and_then(|asking| recover(dir, asking, &mut journal, &limits)) {
        Ok(Recovery::MayRun) => told("may-run", None),
        Ok(Recovery::Gone { peer }) => told("gone", Some(format!("it runs at {peer}"))),
        Ok(Recovery::NeverHere { reason }) => told("never-here", Some(reason)),
        Ok(Recovery::InDoubt { peer, reason }) => {
            told("in-doubt", Some(format!("{peer} cannot be asked: {reason}")))
        }
        Err(failure) => failed(failure),
    }
}

fn shown(settled: &[Settled]) -> String {
    if settled.is_empty() {
        return "no VMs".into();
    }
    let rows: Vec<_> = settled
        .iter()
        .map(|vm| {
            let why = vm.why.clone().or_else(|| vm.ownership.clone()).unwrap_or_default();
            [vm.vm.to_string(), vm.verdict.to_owned(), why]
        })
        .collect();
    table(["NAME", "VERDICT", "WHY"], &rows)
}

#[cfg(test)]
mod tests {
    use handoff::ownership::{HandoffId, Record, State, VmId};

    use super::*;

    fn home_with(states: &[(&str, State)]) -> (tempfile::TempDir, Home) {
        let root = tempfile::tempdir().unwrap();
        let home = Home::new(root.path()).unwrap();
        for (name, state) in states {
            let dir = home.vm(&name.parse().unwrap());
            dir.create().unwrap();
            let record = Record { state: state.clone(), ..Record::created(VmId([1; 16])) };
            dir.journal().unwrap().write(record).unwrap();
        }
        (root, home)
    }

    fn verdict(home: &Home, name: &str, peer: Option<&str>) -> &'static str {
        settle(&home.vm(&name.parse().unwrap()), home, peer).unwrap().verdict
    }

    /// A port of this host on which nobody listens.
    fn nobody() -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    }

    #[test]
    fn what_the_record_alone_decides() {
        let (handoff, peer) = (HandoffId([2; 16]), "b:7070".to_owned());
        let (_root, home) = home_with(&[
            ("mine", Record::created(VmId([1; 16])).state),
            ("moved", State::Released { handoff, peer: peer.clone() }),
            ("cut", State::Receiving { handoff, peer: peer.clone() }),
            ("no", State::Declined { handoff, reason: "too small".into() }),
        ]);
        home.vm(&"empty".parse().unwrap()).create().unwrap();
        assert_eq!(verdict(&home, "mine", None), "may-run");
        assert_eq!(verdict(&home, "moved", None), "gone");
        assert_eq!(verdict(&home, "cut", None), "never-here");
        let record = home.vm(&"cut".parse().unwrap()).record().unwrap().unwrap();
        assert!(matches!(record.state, State::Declined { .. }), "{record}");
        assert_eq!(verdict(&home, "no", None), "never-here");
        assert!(settle(&home.vm(&"empty".parse().unwrap()), &home, None).is_none());
    }

    #[test]
    fn a_vm_that_a_process_has_is_left_to_it() {
        let (_root, home) = home_with(&[("a", Record::created(VmId([1; 16])).state)]);
        let lock = home.vm(&"a".parse().unwrap()).lock().unwrap();
        assert_eq!(verdict(&home, "a", None), "in-use");
        drop(lock);
        assert_eq!(verdict(&home, "a", None), "may-run");
    }

    /// Before the commit nobody need be asked for long: no target can be told Commit any more.
    #[test]
    fn an_interrupted_handoff_comes_back_although_the_peer_is_gone() {
        let state = State::HandingOff { handoff: HandoffId([2; 16]), peer: nobody() };
        let (_root, home) = home_with(&[("a", state)]);
        assert_eq!(verdict(&home, "a", None), "may-run");
    }
}
