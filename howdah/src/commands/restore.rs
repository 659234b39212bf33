//! `howdah restore`: a new VM out of a file, on any cloudlet that holds its base.

use std::{ffi::OsString, fs::File, io::BufReader, process::Stdio, sync::Arc};

use handoff::{
    Refusal, TargetVm,
    engine::{self, saved::RestoreError},
    ownership::{Record, VmId},
};

use crate::{
    cgroup::Cgroup,
    cli::RestoreArgs,
    commands::{overlay, run::say_running, vm::say},
    failure::{Exit, Failure},
    home::{Home, VmDir},
    ops,
    output::Output,
    receive::{Host, HostArgs, Room},
    spawn,
    vmproc::{self, Brought, End, Front, HeldTap, Origin},
};

/// Runs `howdah restore`.
pub(crate) fn run(
    args: &RestoreArgs,
    home: &Home,
    output: Output,
    verbose: u8,
) -> anyhow::Result<()> {
    // Said before anything is made.
    drop(overlay::open(&args.file)?);
    let dir = home.vm(&args.name);
    if let Some(record) = dir.path().is_dir().then(|| dir.record()).transpose()?.flatten() {
        let way_out = "choose another --name, or `howdah vm rm` it first";
        let what = format!("VM {}", args.name);
        let why = format!("it is there already ({record})");
        return Err(Failure::new(Exit::Conflict, what, why, way_out).into());
    }
    vmproc::check_host()?;
    vmproc::warn_of_slow_host(output);
    if !args.detach {
        let end = run_here(args, home, Front::Terminal)?;
        return say(output, &args.name, if end == End::Stopped { "stopped" } else { "handed off" });
    }
    dir.create()?;
    let log = dir.vm_log();
    let child = spawn::start(process_arguments(home, verbose, args)?, Stdio::null(), &log)?;
    let started = spawn::await_ready(child, &log).inspect_err(|_| dir.remove_if_empty())?;
    say_running(output, &ops::run::running(&args.name, started));
    Ok(())
}

fn process_arguments(
    home: &Home,
    verbose: u8,
    args: &RestoreArgs,
) -> Result<Vec<OsString>, Failure> {
    let file = std::path::absolute(&args.file);
    let file = file.map_err(|e| Failure::file("read", &args.file, &e))?;
    let mut words = vec![OsString::from("--home"), home.root().into()];
    words.extend((0..verbose).map(|_| "-v".into()));
    words.extend(["restore-process".into(), "--name".into(), args.name.to_string().into()]);
    if let Some(tap) = &args.tap {
        words.extend(["--tap".into(), tap.into()]);
    }
    words.extend(["--min-free-mib".into(), args.min_free_mib.to_string().into()]);
    words.extend(args.jail.words());
    words.extend(["--".into(), file.into()]);
    Ok(words)
}

/// Restores, then runs, the VM in this process. What came to nothing leaves no VM.
pub(crate) fn run_here(args: &RestoreArgs, home: &Home, front: Front) -> anyhow::Result<End> {
    let dir = home.vm(&args.name);
    dir.create()?;
    let from = overlay::open(&args.file)?;
    let (tap, room) = (HeldTap::open(args.tap.as_deref()), Room::open(home)?);
    let cgroup = Cgroup::enter(home, dir.name());
    let (bringing, bringing_home, bringing_dir) = (args.clone(), home.clone(), dir.clone());
    let ended = vmproc::run_with(&dir, home, front, &args.jail, move |console, events| {
        let host_args = HostArgs {
            tap: bringing.tap.clone(),
            place: None,
            held_tap: tap,
            cgroup,
            min_free_mib: bringing.min_free_mib,
            peer: None,
            room,
            live: false,
        };
        let host = Host::new(
            host_args,
            &bringing_home,
            &bringing_dir,
            Arc::clone(console),
            events.clone(),
        );
        bring(&bringing, host, &bringing_dir, from)
    });
    if ended.is_err() && matches!(dir.record(), Ok(None)) {
        match dir.lock().and_then(|lock| dir.clear(lock)) {
            Ok(()) => dir.remove_if_empty(),
            Err(failure) => tracing::warn!("{failure}"),
        }
    }
    ended
}

fn bring(
    args: &RestoreArgs,
    mut host: Host,
    dir: &VmDir,
    from: BufReader<File>,
) -> Result<Brought, Failure> {
    let what = || format!("VM {}", dir.name());
    let mut journal = dir.journal()?;
    if let Some(record) = journal.record() {
        return Err(Failure::new(Exit::Conflict, what(), record, "choose another --name"));
    }
    let mut restored = engine::restore(&mut host, from).map_err(|e| failure(args, &e))?;
    // From here on the VM exists, and is ours; the guest runs only when that is durable.
    let record = Record::created(VmId::random());
    journal.write(record).map_err(|e| Failure::plain(Exit::Failed, what(), e))?;
    restored.vm.resume().map_err(|e| {
        let way_out = format!("`howdah vm run {}` boots it from its disk", dir.name());
        Failure::new(Exit::Failed, what(), e, way_out)
    })?;
    Ok((host.machine(restored.vm, journal, None)?, Origin::File))
}

fn failure(args: &RestoreArgs, error: &RestoreError) -> Failure {
    let file = args.file.display();
    let what = format!("VM {} is not restored", args.name);
    match error {
        RestoreError::Saved(e) => Failure::plain(Exit::Corrupt, file, e),
        RestoreError::Resolve { .. } => Failure::plain(Exit::Corrupt, file, error),
        RestoreError::Refused(Refusal::UnknownBase(id)) => {
            let why = format!("base {id} is not in this cloudlet's store");
            Failure::new(Exit::NotFound, what, why, "import it with `howdah base import`")
        }
        RestoreError::Refused(Refusal::NoSpace { what: of, needed_bytes, available_bytes }) => {
            let why =
                format!("{needed_bytes} bytes of {of} are needed, {available_bytes} are free");
            Failure::new(Exit::Failed, what, why, "make room")
        }
        RestoreError::Refused(Refusal::Machine(why)) => Failure::plain(Exit::Host, what, why),
        RestoreError::Refused(Refusal::Other(why) | Refusal::Conflict(why)) => {
            Failure::plain(Exit::Failed, what, why)
        }
        _ => Failure::plain(Exit::Failed, what, error),
    }
}
