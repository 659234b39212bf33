//! The process that receives one VM and then runs it.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use handoff::{
    Refusal,
    engine::{self, Incoming, Limits, ReceiveError, ReceiveOptions, accept},
    ownership::{Question, Record, State, target},
    step::{Step, StepHook},
    tcp::MonotonicClock,
    tls::{Guarded, PeerKey, Session, TlsLink},
};
use zeroize::Zeroizing;

use super::{
    host::{Host, HostArgs},
    link::Replayed,
    oom::{Expendable, Ordinary},
    room::Room,
};
use crate::{
    cgroup::Cgroup,
    cli::ReceiveProcessArgs,
    console::Console,
    control::{Adopted, Envelope, Phase, Reply, Request, channel::Channel, server, server::Asked},
    failure::{Exit, Failure, guarded},
    home::{Home, VmDir},
    jail::{self, Kind},
    lock::Lock,
    net::{Networks, Place},
    peers::{Endpoint, Peer},
    spawn::{self, Ready},
    steps, visit,
    vmproc::{self, Coming, Event, HeldTap, Links, Process, machine::Machine},
};

/// What a guest comes in over.
type Link = Guarded<Replayed>;

/// How long the listener may take to pass its link.
const LINK_TIMEOUT: Duration = Duration::from_secs(30);
/// Links of one handoff that wait to be used; the newest is what counts.
const MAX_WAITING_LINKS: usize = 4;

/// Receives, then runs, the VM whose first link comes over stdin.
pub(crate) fn run(args: &ReceiveProcessArgs, home: &Home) -> anyhow::Result<()> {
    spawn::detach();
    let dir = home.vm(&args.name);
    // Made and taken before the process is confined to it: the directory that it sees is this one,
    // whatever becomes of the name. The peer is told later if that failed.
    let locked = dir.create_and_lock();
    if locked.is_err() {
        dir.create()?;
    }
    let (held_tap, place) = match &args.network {
        None => (HeldTap::open(args.tap.as_deref()), None),
        Some(name) => {
            let network = Networks::read(home)?.get(name)?.clone();
            (HeldTap::attach(home, &args.name, name), Some(Place::find(home, &args.name, network)?))
        }
    };
    let cgroup = Cgroup::enter(home, &args.name);
    let (room, ordinary) = (Room::open(home)?, Ordinary::open());
    jail::enter(&args.jail, &dir, home)?;
    let expendable = ordinary.and_then(Ordinary::step_back);
    let (incoming, peer, known) = match first_link(args.wait.limits().silence) {
        Ok(first) => first,
        Err(error) => {
            if let Ok(lock) = locked {
                clean_up(&dir, lock, dir.record()?.is_none());
            }
            return Err(error);
        }
    };
    let (incoming, lock) = admit(&dir, incoming, locked)?;
    spawn::log_to(&dir.vm_log())?;
    let fresh = dir.record()?.is_none();
    let (tap, min_free_mib) = (args.tap.clone(), args.min_free_mib);
    let host_args =
        HostArgs { tap, place, held_tap, cgroup, min_free_mib, peer: known, room, live: true };
    match receive(args, host_args, expendable, home, &dir, incoming, peer) {
        Ok(_) => Ok(()),
        Err(error) => {
            clean_up(&dir, lock, fresh);
            Err(error)
        }
    }
}

/// The link that the listener took, read again from its first byte; with what is known of who made it.
fn first_link(timeout: Duration) -> anyhow::Result<(Incoming<Link>, Endpoint, Option<Peer>)> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    let mut channel = Channel::new(UnixStream::from(stdin), Some(LINK_TIMEOUT))?;
    let message = channel.receive::<Envelope>()?.map(|envelope| envelope.request);
    match (message, channel.take_fd()) {
        (Some(Request::AdoptLink(adopted)), Some(fd)) => {
            let (incoming, peer) = adopt(&adopted, fd, timeout)?;
            Ok((incoming, peer, adopted.tls.map(|tls| tls.peer)))
        }
        _ => anyhow::bail!("started without a link: use `howdah receive`"),
    }
}

/// A link that the listener took, with who is at its other end.
fn adopt(
    adopted: &Adopted,
    fd: OwnedFd,
    timeout: Duration,
) -> anyhow::Result<(Incoming<Link>, Endpoint)> {
    let link = Replayed::new(hex::decode(&adopted.hello)?, fd, timeout)?;
    let address = link.peer();
    let link = match &adopted.tls {
        None => Guarded::Plain(link),
        Some(tls) => {
            let session = Zeroizing::new(hex::decode(&tls.session)?);
            Guarded::Tls(TlsLink::new(link, Session::from_bytes(&session)?, tls.peer.key))
        }
    };
    let peer = Endpoint { key: link.peer(), address };
    Ok((accept(link, &Limits::default(), &MonotonicClock::default())?, peer))
}

/// Takes the name for the newcomer, or tells the peer who has it.
fn admit(
    dir: &VmDir,
    incoming: Incoming<Link>,
    locked: Result<Lock, Failure>,
) -> Result<(Incoming<Link>, Lock), Failure> {
    let lock = not_to_itself(dir, &incoming).and(locked).and_then(|lock| {
        let mut journal = dir.journal()?;
        // Of a process that is gone: its source has been told, or is when it asks.
        engine::decline_lost_copy(&mut journal)
            .map_err(|e| Failure::plain(Exit::Failed, format!("VM {}", dir.name()), e))?;
        match journal.record().and_then(|record| conflict(record, &incoming)) {
            Some(why) => Err(Failure::new(
                Exit::Conflict,
                format!("VM {}", dir.name()),
                why,
                format!("remove or rename one of them (`howdah vm inspect {}`)", dir.name()),
            )),
            None => Ok(lock),
        }
    });
    match lock {
        Ok(lock) => Ok((incoming, lock)),
        Err(failure) => {
            let _ = incoming.refuse(Refusal::Conflict(failure.message.clone()));
            Err(failure)
        }
    }
}

/// Whether the handoff comes from another cloudlet than this one: it is the source's own record that
/// would be found here otherwise.
fn not_to_itself(dir: &VmDir, incoming: &Incoming<Link>) -> Result<(), Failure> {
    let Some(Record { vm, state: State::HandingOff { handoff, .. }, .. }) = dir.record()? else {
        return Ok(());
    };
    let offered = incoming.hello.handoff;
    if (vm, handoff) != (offered.vm, offered.handoff) {
        return Ok(());
    }
    let why = "it is on this very cloudlet, which would hand it off to itself";
    let way_out = "name the address of another one, or receive into another --home";
    Err(Failure::new(Exit::Conflict, format!("VM {}", dir.name()), why, way_out))
}

/// Whether what is here stands in the newcomer's way.
fn conflict(record: &Record, incoming: &Incoming<Link>) -> Option<String> {
    let offered = incoming.hello.handoff;
    let ended = matches!(record.state, State::Released { .. } | State::Declined { .. });
    if record.vm != offered.vm {
        Some(format!("another VM of that name is there ({record})"))
    } else if !ended {
        Some(format!("it is there already ({record})"))
    } else if record.epoch >= offered.epoch {
        let (here, theirs) = (record.epoch, offered.epoch);
        Some(format!("a newer epoch is known there ({here}, offered {theirs})"))
    } else {
        None
    }
}

fn receive(
    args: &ReceiveProcessArgs,
    host_args: HostArgs,
    expendable: Option<Expendable>,
    home: &Home,
    dir: &VmDir,
    incoming: Incoming<Link>,
    peer: Endpoint,
) -> anyhow::Result<vmproc::End> {
    let (process, events) = Process::new(dir.clone());
    vmproc::watch_signals(events.clone())?;
    let console = Arc::new(Console::new(&dir.console_log())?);
    let server = server::start(dir, Arc::clone(&console), events.clone(), Event::Asked)?;
    let shown = Arc::clone(&console);
    let (relink, relinks) = bounded(MAX_WAITING_LINKS);
    let timeout = args.wait.limits().silence;
    let (tell_newer, newer) = bounded(MAX_WAITING_LINKS);
    let links = take_links(incoming.hello.handoff, peer.clone(), timeout, relink, tell_newer);
    let host = Host::new(host_args, home, dir, console, events.clone());
    let mut options = ReceiveOptions::new(peer.to_string());
    options.limits = args.wait.limits();
    options.workers = args.workers.map_or(options.workers, usize::from);
    options.steps = told_when_it_comes(steps::from_env()?);
    options.newer = newer;
    let (tell, details) = bounded(1);
    std::thread::spawn(move || {
        let work = || {
            jail::confine(Kind::Handoff)?;
            work(incoming, host, &relinks, &options, &tell)
        };
        let arrived = guarded("reception", work).and_then(|received| received);
        let _ = events.send(Event::Arrived(arrived));
    });
    let ready = Box::new(move || {
        drop(expendable);
        spawn::say(&Ready::Running(details.try_recv().ok()));
    });
    let end = process.run(Coming { phase: Phase::Receiving, links: Some(links), ready });
    vmproc::finish(dir, end, &shown, &server)
}

/// The hook, and before it a word to the listener once the offer is taken: what there is to know of the
/// guest's network is on disk then.
fn told_when_it_comes(hook: StepHook) -> StepHook {
    StepHook::new(move |step| {
        if step == Step::OfferDurable {
            spawn::say_coming();
        }
        hook.call(step);
    })
}

/// Receives the guest; what is known of the transfer goes to `details`.
fn work(
    incoming: Incoming<Link>,
    mut host: Host,
    relinks: &Receiver<Incoming<Link>>,
    options: &ReceiveOptions,
    details: &Sender<serde_json::Value>,
) -> Result<Box<dyn Machine>, Failure> {
    let what = format!("VM {}", host.name());
    let mut journal = host.journal()?;
    if let Err(e) = journal.reserve() {
        let failure = Failure::plain(Exit::NotMoved, what, e);
        let _ = incoming.refuse(Refusal::Other(failure.message.clone()));
        return Err(failure);
    }
    let handoff = incoming.hello.id().to_string();
    let received = engine::receive(
        incoming,
        &mut host,
        &mut journal,
        relinks,
        options,
        &MonotonicClock::default(),
    );
    let received = received.map_err(|e| {
        let exit =
            if matches!(e, ReceiveError::NotStarted(_)) { Exit::Failed } else { Exit::NotMoved };
        Failure::plain(exit, what, e)
    })?;
    // Its source may have kept it: then the way back is short.
    if let Err(failure) = visit::remember(host.dir(), received.record.epoch.0, &received.table) {
        tracing::warn!("{failure}");
    }
    let _ = details.try_send(serde_json::json!({
        "handoff": handoff,
        "epoch": received.record.epoch.0,
        "released": received.released,
        "bytes_received": received.bytes_received,
        "bytes_sent": received.bytes_sent,
        "full_hash": received.full_hash.map(hex::encode),
    }));
    host.machine(received.vm, journal, Some(received.contents))
}

/// Gives later links of this handoff to the reception, and tells it when its source begins anew.
fn take_links(
    ours: Question,
    source: Endpoint,
    timeout: Duration,
    relink: Sender<Incoming<Link>>,
    newer: Sender<Question>,
) -> Links {
    let handoff = ours.handoff;
    Box::new(move |Asked { request, fd, answer }| {
        let taken = match (request, fd) {
            (Request::Expects { handoff: asked }, _) if asked == handoff.to_string() => {
                return answer.last(Reply::Done);
            }
            (Request::Newer { offered, caller }, _) => {
                return answer.last(match tell_newer(ours, &source, &newer, offered, caller) {
                    Ok(()) => Reply::Done,
                    Err(why) => Failure::line(Exit::Conflict, why).into(),
                });
            }
            (Request::AdoptLink(adopted), Some(fd)) => adopt(&adopted, fd, timeout),
            (Request::AdoptLink(_), None) => Err(anyhow::anyhow!("no link came along")),
            _ => Err(anyhow::anyhow!("another handoff is under way")),
        };
        let taken = taken.and_then(|(incoming, peer)| {
            anyhow::ensure!(incoming.hello.id() == handoff, "another handoff is under way");
            anyhow::ensure!(peer.key == source.key, "the handoff is another cloudlet's");
            relink
                .try_send(incoming)
                .map_err(|_| anyhow::anyhow!("links come faster than they are used"))
        });
        match taken {
            Ok(()) => answer.last(Reply::Done),
            Err(e) => answer.last(Failure::line(Exit::Conflict, &format!("link: {e:#}"))),
        }
    })
}

/// Tells the reception of a newer offer of its source. What becomes of it then is decided by the
/// thread that writes its record.
fn tell_newer(
    ours: Question,
    source: &Endpoint,
    newer: &Sender<Question>,
    offered: Question,
    caller: Option<PeerKey>,
) -> Result<(), &'static str> {
    if !target::supersedes(ours, offered) {
        return Err("what is received is no older");
    }
    if !source.is(caller) {
        return Err("what is received is another cloudlet's");
    }
    newer.try_send(offered).map_err(|_| "newer offers come faster than they are looked at")
}

/// Removes what a reception left that came to nothing. What the record says is ours stays.
fn clean_up(dir: &VmDir, lock: Lock, fresh: bool) {
    let record = dir.record();
    let removed = match record {
        Ok(None) if fresh => dir.clear(lock),
        Ok(Some(record))
            if matches!(record.state, State::Declined { .. } | State::Released { .. }) =>
        {
            dir.remove_disk()
        }
        _ => Ok(()),
    };
    if let Err(failure) = removed {
        tracing::warn!("{failure}");
    }
}

#[cfg(test)]
mod tests {
    use handoff::{
        ownership::{Epoch, HandoffId, VmId},
        tls::Identity,
    };

    use super::*;

    #[test]
    fn a_newer_offer_is_told_of_if_it_is_the_sources() {
        let [key, stranger] = [0; 2].map(|_| Identity::generate().unwrap().key());
        let of = |epoch| Question {
            vm: VmId([1; 16]),
            handoff: HandoffId([epoch as u8; 16]),
            epoch: Epoch(epoch),
        };
        let at = |key| Endpoint { key, address: "127.0.0.1:9".into() };
        let (to, told) = bounded(1);
        let tell = |key, offered, caller| tell_newer(of(4), &at(key), &to, offered, caller);
        tell(Some(key), of(4), Some(key)).unwrap_err();
        tell(Some(key), of(2), Some(key)).unwrap_err();
        let another = Question { vm: VmId([2; 16]), ..of(6) };
        tell(Some(key), another, Some(key)).unwrap_err();
        tell(Some(key), of(6), Some(stranger)).unwrap_err();
        tell(Some(key), of(6), None).unwrap_err();
        assert!(told.is_empty());
        tell(Some(key), of(6), Some(key)).unwrap();
        tell(Some(key), of(8), Some(key)).unwrap_err();
        assert_eq!(told.recv(), Ok(of(6)));
        tell(None, of(8), None).unwrap();
        assert_eq!(told.recv(), Ok(of(8)));
    }
}
