//! Asking a peer how it is, and which VMs could go there.

use std::{sync::Arc, time::Duration};

use howdah_api::{CouldGo, GuestNetwork, HeldBase, Pinged};
use vmm::MachineProfile;

use crate::{
    about::{self, Candidate, Incoming, Verdict},
    commands::base,
    control::{Reply, Request, client},
    failure::Failure,
    home::{Home, VmConfig, VmDir},
    peers::{self, Book, BookFile, Endpoint, Right},
};

/// A VM's process describes its machine at once, or is busy with something long.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(5);

/// A peer that is known, and that nothing was asked of yet.
#[derive(Debug)]
pub(crate) struct Ping {
    home: Home,
    book: Arc<Book>,
    endpoint: Endpoint,
}

/// Finds the peer: a name, `HOST:PORT`, or both.
pub(crate) fn find(peer: &str, home: &Home) -> Result<Ping, Failure> {
    let book = BookFile::of(home).read()?;
    let endpoint = peers::resolve_for(&book, peer, false, None)?;
    Ok(Ping { home: home.clone(), book, endpoint })
}

impl Ping {
    /// Its name here and the address that it will be asked at.
    pub(crate) fn place(&self) -> Option<(&str, &str)> {
        let known = self.endpoint.key.and_then(|key| self.book.by_key(key))?;
        Some((known.name.as_ref(), &self.endpoint.address))
    }

    /// Asks it.
    pub(crate) fn ask(&self) -> Result<Pinged, Failure> {
        let Self { home, book, endpoint } = self;
        let known = endpoint.key.and_then(|key| book.by_key(key));
        let answered = about::ask(home, endpoint)?;
        let candidates = candidates(home)?;
        let may = |config: &VmConfig| {
            let allowed = |peer| config.base.parse().is_ok_and(|id| base::allowed(home, peer, id));
            known.is_none_or(allowed)
        };
        let about = answered.about;
        let forbidden = known.and_then(|peer| peer.check(Right::Receive).err());
        let forbidden = forbidden.map(|failure| failure.message);
        let vms = about::verdicts(&about, forbidden.as_deref(), may, &candidates);
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let held = |base: about::HeldBase| HeldBase { id: base.id, names: base.names };
        Ok(Pinged {
            peer: endpoint.shown(book),
            address: endpoint.address.clone(),
            connected_in_ms: ms(answered.connected_in),
            round_trip_ms: ms(answered.round_trip),
            version: about.version,
            protocol: about.protocol,
            takes_vms: about.takes.is_ok(),
            why_not: about.takes.err(),
            available_memory_bytes: about.available_memory_bytes,
            available_disk_bytes: about.available_disk_bytes,
            network: about.network.into(),
            bases: about.bases.into_iter().map(held).collect(),
            vms: vms.into_iter().map(CouldGo::from).collect(),
        })
    }
}

impl From<Incoming> for GuestNetwork {
    fn from(incoming: Incoming) -> Self {
        match incoming {
            Incoming::Nothing => Self::Nothing,
            Incoming::Tap => Self::Tap,
            Incoming::Network(subnet) => Self::Network(subnet.to_string()),
        }
    }
}

impl From<Verdict> for CouldGo {
    fn from(verdict: Verdict) -> Self {
        let Verdict { vm, could_go, why_not } = verdict;
        Self { vm: vm.to_string(), could_go, why_not }
    }
}

/// Every VM of this cloudlet that is not elsewhere.
fn candidates(home: &Home) -> Result<Vec<Candidate>, Failure> {
    let mut found = Vec::new();
    for dir in home.vms()? {
        let ours = matches!(dir.record(), Ok(Some(record)) if record.may_run());
        let Ok(config) = dir.config() else { continue };
        if ours {
            let profile = profile(&dir);
            found.push(Candidate { vm: dir.name().clone(), config, profile });
        }
    }
    Ok(found)
}

/// The machine of a VM; why it is not known.
fn profile(dir: &VmDir) -> Result<MachineProfile, String> {
    let asked = || -> Result<Reply, Failure> {
        let mut channel = client::ask(dir, Request::Describe, None)?;
        let _ = channel.set_timeout(Some(DESCRIBE_TIMEOUT));
        client::next_reply(dir, &mut channel)
    };
    match asked() {
        Ok(Reply::Machine(blob)) => {
            let blob = hex::decode(blob).map_err(|e| e.to_string())?;
            MachineProfile::decode(&blob).map_err(|e| e.to_string())
        }
        Ok(Reply::Failed(failure)) | Err(failure) => Err(failure.message),
        Ok(_) => Err("its process is another version of this program".into()),
    }
}
