//! This cloudlet as the engine sees it: what can come in, and what it becomes.

use std::sync::Arc;

use crossbeam_channel::Sender;
use guest_images::{Base, BaseId, CHUNK_SIZE, overlay::Overlay};
use handoff::{
    BaseView, Geometry, Offer, Refusal, StateTable, TargetHost, TargetVm, base_view::Bases,
    ownership::Journal, stage::SentCache, vm::Prepared as Ready,
};
use vmm::{AnyVm, HostCheck, HostProfile, IncomingVm, MachineProfile, VmSource};

use super::{
    room::{Needs, Reserved, Room},
    watched::Watched,
};
use crate::{
    cgroup::{self, Cgroup, NoCgroup},
    commands::base,
    console::Console,
    failure::{Exit, Failure},
    home::{Home, VmConfig, VmDir, VmName},
    mac::Mac,
    net::Place,
    offer::{MachineOffer, Setup},
    peers::Peer,
    visit::{Unusable, Visit},
    vmproc::{
        Event, HeldTap,
        kvm::{self, KvmMachine},
        machine::Machine,
    },
};

/// A cloudlet about to receive one VM.
pub(crate) struct Host {
    home: Home,
    dir: VmDir,
    tap: Option<String>,
    place: Option<Place>,
    held_tap: HeldTap,
    cgroup: Option<Result<Cgroup, NoCgroup>>,
    min_free_bytes: u64,
    peer: Option<Peer>,
    room: Room,
    live: bool,
    console: Arc<Console>,
    events: Sender<Event>,
    /// What the machine needs besides the VMM's part, once it is prepared.
    prepared: Option<Prepared>,
}

/// What of this host a VM gets.
#[derive(Debug)]
pub(crate) struct HostArgs {
    /// The name of the TAP device for its network.
    pub(crate) tap: Option<String>,
    /// Its place in a network that this cloudlet manages, instead.
    pub(crate) place: Option<Place>,
    /// The device.
    pub(crate) held_tap: HeldTap,
    /// The group that the VM's process is in.
    pub(crate) cgroup: Result<Cgroup, NoCgroup>,
    /// Disk space that stays free.
    pub(crate) min_free_mib: u64,
    /// Who hands the VM off, where that is known.
    pub(crate) peer: Option<Peer>,
    /// The room that there is.
    pub(crate) room: Room,
    /// Whether the guest runs elsewhere until it is here, and does not come out of a file.
    pub(crate) live: bool,
}

struct Prepared {
    disk: Arc<Overlay>,
    append: String,
    setup: Setup,
}

impl Host {
    /// Receives into `dir`.
    pub(crate) fn new(
        args: HostArgs,
        home: &Home,
        dir: &VmDir,
        console: Arc<Console>,
        events: Sender<Event>,
    ) -> Self {
        Self {
            home: home.clone(),
            dir: dir.clone(),
            tap: args.tap,
            place: args.place,
            held_tap: args.held_tap,
            cgroup: Some(args.cgroup),
            min_free_bytes: args.min_free_mib.saturating_mul(1 << 20),
            peer: args.peer,
            room: args.room,
            live: args.live,
            console,
            events,
            prepared: None,
        }
    }

    /// The VM's directory.
    pub(super) fn dir(&self) -> &VmDir {
        &self.dir
    }

    /// The VM's name.
    pub(super) fn name(&self) -> &VmName {
        self.dir.name()
    }

    /// The VM's journal.
    pub(super) fn journal(&self) -> Result<Journal, Failure> {
        self.dir.journal()
    }

    /// The guest that came, as a machine of this process.
    pub(crate) fn machine(
        self,
        vm: Watched,
        journal: Journal,
        contents: Option<SentCache>,
    ) -> Result<Box<dyn Machine>, Failure> {
        let gone = || {
            Failure::plain(Exit::Failed, format!("VM {}", self.dir.name()), "the machine is gone")
        };
        let Prepared { disk, append, setup } = self.prepared.ok_or_else(gone)?;
        let source = match vm.into_inner().into_vm().ok_or_else(gone)? {
            AnyVm::Running(vm) => {
                kvm::connect_console(&self.console, &vm);
                VmSource::new(vm)
            }
            AnyVm::Paused(vm) => {
                kvm::connect_console(&self.console, &vm);
                VmSource::from_paused(vm)
            }
        };
        let (home, dir, base) = (self.home, self.dir, Arc::clone(disk.base()));
        let contents = contents.map(Arc::new);
        Ok(Box::new(KvmMachine {
            home,
            dir,
            source,
            disk,
            base,
            journal,
            append,
            setup,
            contents,
            farewell: None,
        }))
    }

    fn reserve(&self, offer: &Offer) -> Result<Reserved, Refusal> {
        let needs = Needs {
            memory_bytes: bytes_of(offer.geometry.ram_chunks),
            disk_bytes: bytes_of(offer.changed_disk_chunks),
        };
        self.room.reserve(&self.dir, needs, self.min_free_bytes)
    }

    fn config(&self, offer: &Offer, machine: &MachineOffer) -> Result<VmConfig, Refusal> {
        let profile = &machine.profile;
        let has_network = profile.mac.is_some();
        if has_network && self.tap.is_none() && self.place.is_none() {
            let why = "it has a network device, and neither TAP device nor network was named for it \
                       there with --tap or --network";
            return Err(Refusal::Machine(why.into()));
        }
        let place = self.place.as_ref().filter(|_| has_network);
        let network = place.map(|place| place.take_in(machine.setup.network.as_ref()));
        let network = network.transpose().map_err(Refusal::Machine)?;
        Ok(VmConfig {
            memory_mib: profile.memory_bytes >> 20,
            vcpus: profile.vcpus,
            tap: self.tap.clone().filter(|_| profile.mac.is_some()),
            mac: profile.mac.map(|mac| Mac(mac).to_string()),
            append: machine.append.clone(),
            cpu: machine.setup.cpu,
            network,
            limits: machine.setup.limits,
            ..VmConfig::of(&offer.base)
        })
    }
}

impl TargetHost for Host {
    type Vm = Watched;

    fn prepare(&mut self, offer: &Offer) -> Result<Ready<Watched>, Refusal> {
        let base = open_base(&self.home, offer.base)?;
        let machine =
            MachineOffer::decode(&offer.machine).map_err(|e| Refusal::Machine(e.to_string()))?;
        check_machine(&machine.profile, offer.geometry, base.disk_chunks())?;
        let reserved = self.reserve(offer)?;
        let config = self.config(offer, &machine)?;
        if let Some(cgroup) = self.cgroup.take() {
            let limited = cgroup::limit(cgroup, &config.limits, self.dir.name());
            limited.map_err(|e| Refusal::Machine(e.message))?;
        }
        self.dir.write_config(&config).map_err(|e| other(&e))?;
        let back = match Visit::find(&self.dir, offer) {
            Some(visit) => self.back(visit, &config, &base, &machine.profile)?,
            None => None,
        };
        let (vm, disk, start) = match back {
            Some((vm, disk, table)) => (vm, disk, Some(table)),
            None => {
                let (vm, disk) = self.anew(&config, &base, &machine.profile)?;
                (vm, disk, None)
            }
        };
        let setup = Setup::of(&config);
        self.prepared = Some(Prepared { disk, append: machine.append, setup });
        let also = also_held(&self.home, offer, self.peer.as_ref());
        let bases = Bases::new(base, also).map_err(|e| other(&e))?;
        let vm = Watched::new(vm, self.dir.path().to_owned(), self.min_free_bytes, reserved);
        Ok(Ready { vm, bases, start })
    }
}

type Disk = Arc<Overlay>;

impl Host {
    /// A VM in the state of its base.
    fn anew(
        &self,
        config: &VmConfig,
        base: &Arc<Base>,
        profile: &MachineProfile,
    ) -> Result<(IncomingVm, Disk), Refusal> {
        // What is here of an earlier stay is of no use: it was released.
        self.dir.remove_disk().map_err(|e| other(&e))?;
        let disk = Overlay::create(self.dir.path(), Arc::clone(base)).map_err(|e| other(&e))?;
        let disk = Arc::new(disk);
        Ok((self.incoming(config, base, &disk, profile)?, disk))
    }

    /// A VM in the state that it left behind here; `None` if that is not as it was.
    fn back(
        &self,
        visit: Visit,
        config: &VmConfig,
        base: &Arc<Base>,
        profile: &MachineProfile,
    ) -> Result<Option<(IncomingVm, Disk, StateTable)>, Refusal> {
        let opened = Overlay::open(self.dir.path(), Arc::clone(base)).map_err(Unusable::from);
        let checked = opened.and_then(|disk| visit.check_disk(&disk).map(|()| Arc::new(disk)));
        let disk = match checked {
            Ok(disk) => disk,
            Err(e) => {
                tracing::warn!("what was kept of VM {}: {e}", self.dir.name());
                return Ok(None);
            }
        };
        // Whatever becomes of this reception: from here on the overlay may change.
        visit.consume().map_err(|e| other(&e))?;
        let mut vm = self.incoming(config, base, &disk, profile)?;
        match visit.load_ram(|id, chunk| vm.write_chunk(id, chunk)) {
            Ok(table) => Ok(Some((vm, disk, table))),
            Err(e) => {
                tracing::warn!("what was kept of VM {}: {e}", self.dir.name());
                vm.discard();
                Ok(None)
            }
        }
    }

    fn incoming(
        &self,
        config: &VmConfig,
        base: &Base,
        disk: &Disk,
        profile: &MachineProfile,
    ) -> Result<IncomingVm, Refusal> {
        let build = kvm::build(config, base, disk, &self.held_tap, &self.console, &self.events)
            .map_err(|e| Refusal::Machine(e.message))?;
        let vm = IncomingVm::new(profile.clone(), build);
        let vm = vm.map_err(|e| Refusal::Machine(e.to_string()))?;
        Ok(if self.live { vm.awaited() } else { vm })
    }
}

fn other(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::Other(error.to_string())
}

/// Those of the other bases on offer that are here and whole, in the order of the offer. Of those
/// that are none of the peer's business it is not told.
fn also_held(home: &Home, offer: &Offer, peer: Option<&Peer>) -> Vec<Arc<dyn BaseView>> {
    let may = |id: &&BaseId| peer.is_none_or(|peer| base::allowed(home, peer, **id));
    let held = offer.also.iter().filter(may).filter_map(|id| open_base(home, *id).ok());
    held.map(|base| base as Arc<dyn BaseView>).collect()
}

fn open_base(home: &Home, id: BaseId) -> Result<Arc<Base>, Refusal> {
    let store = base::store(home).map_err(|e| Refusal::Other(e.message))?;
    match store.get(&id.to_string()) {
        Ok(base) => Ok(Arc::new(base)),
        Err(e) => {
            tracing::info!("base {id}: {e}");
            Err(Refusal::UnknownBase(id))
        }
    }
}

/// Whether the machine is what its sizes say, and this host can carry it.
fn check_machine(
    profile: &MachineProfile,
    geometry: Geometry,
    disk_chunks: u64,
) -> Result<(), Refusal> {
    if bytes_of(geometry.ram_chunks) != profile.memory_bytes || geometry.disk_chunks != disk_chunks
    {
        return Err(Refusal::Machine("its sizes contradict its description or its base".into()));
    }
    if !profile.memory_bytes.is_multiple_of(1 << 20) || !profile.disk {
        return Err(Refusal::Machine(
            "no machine of ours: it has no disk, or memory in no whole MiB".into(),
        ));
    }
    let refuse = |e: &dyn std::fmt::Display| Refusal::Machine(e.to_string());
    let host = HostCheck::run().map_err(|e| refuse(&e))?;
    let host = HostProfile::of(&host).map_err(|e| refuse(&e))?;
    profile.check_compatible(&host).map_err(|e| refuse(&e))
}

fn bytes_of(chunks: u64) -> u64 {
    chunks.saturating_mul(CHUNK_SIZE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_contradict_each_other_are_refused() {
        let profile = MachineProfile {
            vcpus: 1,
            memory_bytes: 64 << 20,
            disk: true,
            mac: None,
            cpuid: Vec::new(),
            tsc_khz: 1,
            xsave_bytes: 4096,
        };
        let geometry = Geometry { ram_chunks: 1, disk_chunks: 1 };
        assert!(matches!(check_machine(&profile, geometry, 1), Err(Refusal::Machine(_))));
    }
}
