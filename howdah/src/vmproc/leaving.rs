//! A machine that leaves: what is offered with it, and what stays when it is gone.

use std::{sync::Arc, time::Duration};

use guest_images::{Base, BaseId, Chunk};
use handoff::{
    BaseView, ChunkId, SourceVm, StateTable,
    base_view::Bases,
    engine::{self, KeptReason, Recovery, SendError, SendOptions, SendOutcome},
    policy::CutOverPolicy,
    tcp::MonotonicClock,
    tls::Identity,
    vm::MAX_ALSO,
};

use super::{
    farewell::Farewell,
    kvm::KvmMachine,
    machine::{HandoffEnd, Keep, Watch},
};
use crate::{
    commands::base,
    control::{HandoffRequest, Pace},
    failure::{Exit, Failure},
    home::Home,
    peers::{Dial, Endpoint, Peer, Right},
    steps, visit,
};

/// How long to wait before a peer that did not confirm a commit is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// Hands the guest off.
pub(super) fn hand_off(
    mut machine: Box<KvmMachine>,
    request: &HandoffRequest,
    watch: &dyn Watch,
) -> HandoffEnd {
    let prepared = machine.dial(request).and_then(|(connect, peer)| {
        let bases = machine.bases(request, peer.as_ref())?;
        Ok((connect, machine.options(request)?, bases))
    });
    let (mut connect, options, bases) = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => return HandoffEnd::Kept { machine, failure },
    };
    // The peer hears of this one, which says that the one before is over.
    machine.farewell = None;
    connect.give_up_after(options.limits.silence);
    connect.shape(request.link.shape());
    let peer = request.peer.clone();
    let this = &mut *machine;
    let sent = engine::send(
        &mut this.source,
        bases,
        &mut connect,
        &mut this.journal,
        &options,
        &MonotonicClock::default(),
        &mut |progress| watch.progress(super::progress::of(&peer, progress)),
        watch.cancel(),
    );
    match sent {
        Ok(SendOutcome::Moved { report, table }) => {
            let keep = (request.keep_mib > 0).then(|| machine.keep(table, request.keep_mib));
            HandoffEnd::Moved { report: as_json(&report), keep }
        }
        Ok(SendOutcome::KeptHere { reason, report, untold }) => {
            let (vm, limits) = (machine.dir.name().clone(), options.limits);
            machine.farewell =
                untold.and_then(|untold| Farewell::begin(untold, &vm, connect, limits));
            let failure = Failure { report: Some(as_json(&report)), ..machine.kept(&reason) };
            HandoffEnd::Kept { machine, failure }
        }
        Ok(SendOutcome::InDoubt { report }) => {
            machine.settle(&mut connect, request, as_json(&report), watch)
        }
        Err(e @ (SendError::NotHere(_) | SendError::NoRecord)) => {
            let failure = Failure::plain(Exit::Conflict, format!("VM {}", machine.dir.name()), e);
            HandoffEnd::Kept { machine, failure }
        }
        Err(e) => HandoffEnd::Undecided {
            failure: Failure::plain(Exit::Failed, format!("VM {}", machine.dir.name()), e),
        },
    }
}

/// Other bases of this cloudlet that the peer may hold too: those in which most can be found.
fn other_bases(home: &Home, own: BaseId, peer: Option<&Peer>) -> Vec<Arc<dyn BaseView>> {
    let listed = base::store(home).and_then(|store| store.list().map_err(base::store_failure));
    let listed = listed.unwrap_or_else(|failure| {
        // The VM has its own base open; less is found is all.
        tracing::warn!("{failure}");
        Vec::new()
    });
    let mut found: Vec<Base> = listed.into_iter().filter_map(|one| one.base.ok()).collect();
    let may = |id| peer.is_none_or(|peer| base::allowed(home, peer, id));
    found.retain(|base| base.id() != own && may(base.id()));
    found.sort_by_key(|base| std::cmp::Reverse(base.indexed_chunks()));
    found.truncate(MAX_ALSO);
    found.into_iter().map(|base| Arc::new(base) as Arc<dyn BaseView>).collect()
}

impl KvmMachine {
    fn options(&self, request: &HandoffRequest) -> Result<SendOptions, Failure> {
        let machine = self.offer()?;
        let mut options = SendOptions::new(self.dir.name().to_string(), &request.peer, machine);
        options.audit = request.audit;
        options.steps = steps::from_env()?;
        options.limits = request.link.limits();
        options.stages = request.encode.options();
        options.pipeline = request.pipeline.options();
        if options.stages.known {
            options.contents = self.contents.clone();
            options.known = visit::known(&self.dir, self.base.id(), self.source.geometry());
        }
        let Pace { objective, throttle, order, commit } = request.pace;
        options.commit = commit;
        options.policy = CutOverPolicy { throttle, ..CutOverPolicy::new(objective) };
        options.order = order;
        Ok(options)
    }

    /// What makes links to the peer, and what is known of it.
    fn dial(&self, request: &HandoffRequest) -> Result<(Dial, Option<Peer>), Failure> {
        let endpoint: Endpoint =
            request.peer.parse().map_err(|e| Failure::plain(Exit::Usage, "the peer", e))?;
        let Some(tls) = &request.tls else { return Ok((Dial::to(&endpoint, None)?, None)) };
        let own = Identity::from_pem(tls.identity.as_bytes())
            .map_err(|e| Failure::plain(Exit::Failed, "this cloudlet's key", e))?;
        let peer = &tls.peer;
        // The command asked for its rights; that may have been a while ago.
        peer.check(Right::Receive)?;
        if !base::allowed(&self.home, peer, self.base.id()) {
            let why = format!("it may not receive VMs of base {}", self.base.id());
            let way_out = format!("`howdah peer add {} ... --bases` changes that", peer.name);
            return Err(Failure::new(Exit::Conflict, format!("peer {}", peer.name), why, way_out));
        }
        Ok((Dial::to(&endpoint, Some(Arc::new(own)))?, Some(peer.clone())))
    }

    fn bases(&self, request: &HandoffRequest, peer: Option<&Peer>) -> Result<Bases, Failure> {
        let also = match request.encode.options().other_bases {
            true => other_bases(&self.home, self.base.id(), peer),
            false => Vec::new(),
        };
        let own: Arc<dyn BaseView> = self.base.clone();
        Bases::new(own, also)
            .map_err(|e| Failure::plain(Exit::Failed, format!("VM {}", self.dir.name()), e))
    }

    /// Keeps the paused guest that `table` describes.
    fn keep(mut self: Box<Self>, table: StateTable, keep_mib: u64) -> Keep {
        Box::new(move || {
            let limit = keep_mib.saturating_mul(1 << 20);
            let Self { dir, source, disk, .. } = &mut *self;
            let read = &mut |id: ChunkId, into: &mut Chunk| source.read_chunk(id, into);
            let kept = visit::keep(dir, &table, disk, limit, read)?;
            tracing::info!(bytes = kept, "kept for the way back");
            Ok(())
        })
    }

    fn kept(&self, reason: &KeptReason) -> Failure {
        let what = format!("VM {} was not handed off and goes on here", self.dir.name());
        let exit = match reason {
            KeptReason::Cancelled => Exit::Cancelled,
            _ => Exit::NotMoved,
        };
        match reason {
            KeptReason::Link(_) => {
                let way_out =
                    "check that `howdah receive` listens there and the network in between";
                Failure::new(exit, what, reason, way_out)
            }
            _ => Failure::plain(exit, what, reason),
        }
    }

    /// Asks until it is known where the guest runs. Bounded by the user, who may end the process:
    /// the record is durable, and the next start asks again.
    fn settle(
        mut self: Box<Self>,
        connect: &mut Dial,
        request: &HandoffRequest,
        report: serde_json::Value,
        watch: &dyn Watch,
    ) -> HandoffEnd {
        let (peer, limits) = (&request.peer, request.link.limits());
        let what = format!("VM {}", self.dir.name());
        let mut why = format!("{peer} has not confirmed that it runs the guest");
        loop {
            watch.in_doubt(&why);
            let settled = engine::send_resume(
                &mut self.source,
                &mut self.journal,
                self.dir.name().as_ref(),
                connect,
                &limits,
                &MonotonicClock::default(),
            );
            match settled {
                Ok(Recovery::Gone { .. }) => return HandoffEnd::Moved { report, keep: None },
                Ok(Recovery::MayRun) => {
                    let why = format!("{peer} declined after the commit; the guest goes on here");
                    let failure = Failure::plain(Exit::NotMoved, what, why);
                    let failure = Failure { report: Some(report), ..failure };
                    return HandoffEnd::Kept { machine: self, failure };
                }
                Ok(Recovery::InDoubt { reason, .. }) => why = reason,
                Ok(Recovery::NeverHere { reason }) => {
                    let failure = Failure::plain(Exit::Failed, what, reason);
                    return HandoffEnd::Undecided { failure };
                }
                Err(e) => {
                    let failure = Failure::plain(Exit::Failed, what, e);
                    return HandoffEnd::Undecided { failure };
                }
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }
}

fn as_json<T: serde::Serialize>(value: &T) -> serde_json::Value {
    serde_json::to_value(value).unwrap_or_default()
}
