//! Where guests of this cloudlet came from and went to, and when.
//!
//! A VM's ownership record says it for as long as a handoff concerns it; the next handoff's record says
//! it no more. So what records say is noted in one file, each time that networks are looked at. It is a
//! memory aid: without it nothing is forwarded, and nothing else is lost.

use std::{collections::BTreeMap, net::Ipv4Addr};

use handoff::{
    ownership::{HandoffId, Record, State, Tenure},
    tls::PeerKey,
};
use serde::{Deserialize, Serialize};

use crate::{
    failure::Failure,
    home::{Home, VmName, read_json, write_json},
    peers::Endpoint,
};

const VERSION: u32 = 1;
/// Cloudlets that answers of one guest go back to.
const MAX_CAME: usize = 8;

/// A cloudlet at the other end of a handoff.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Hop {
    handoff: String,
    pub(super) peer: PeerKey,
    /// None that packets could be sent to.
    pub(super) address: Option<Ipv4Addr>,
    /// When the guest changed hosts, in seconds of the Unix epoch; it has not yet, if that is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) since_s: Option<u64>,
}

/// What is known of one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Trail {
    /// Which VM: a name may be used again.
    vm: String,
    /// Where it came from, the latest last, each peer once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) came: Vec<Hop>,
    /// Where it went, unless it is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) left: Option<Hop>,
}

/// The moment at which a record is looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub(super) now_s: u64,
    /// When the record was written.
    pub(super) written_s: u64,
    /// How long a hop matters.
    pub(super) keep_s: u64,
}

impl Hop {
    /// When it matters no more, if it still does. A clock that was set back since does not make it
    /// matter for more than twice as long.
    pub(super) fn until_s(&self, now_s: u64, keep_s: u64) -> Option<u64> {
        let since_s = self.since_s.unwrap_or(now_s);
        let until_s = since_s.saturating_add(keep_s);
        (until_s > now_s && since_s <= now_s.saturating_add(keep_s)).then_some(until_s)
    }
}

impl Trail {
    /// What is known after a look at the VM's record, if this was before. `find` looks an address up;
    /// that is done once for each handoff.
    pub(super) fn after(
        before: Option<Self>,
        record: &Record,
        at: Moment,
        find: impl Fn(&str) -> Option<Ipv4Addr>,
    ) -> Self {
        let vm = record.vm.to_string();
        let fresh = Self { vm: vm.clone(), ..Self::default() };
        let mut trail = before.filter(|trail| trail.vm == vm).unwrap_or(fresh);
        let hop = |handoff: HandoffId, peer: &str, since_s| {
            let endpoint: Endpoint = peer.parse().ok()?;
            let key = endpoint.key?;
            let address = find(&endpoint.address);
            Some(Hop { handoff: handoff.to_string(), peer: key, address, since_s })
        };
        match &record.state {
            State::Receiving { handoff, peer } | State::Prepared { handoff, peer, .. } => {
                let id = handoff.to_string();
                trail.came.retain(|hop| hop.since_s.is_some() || hop.handoff == id);
                if trail.came.iter().all(|hop| hop.handoff != id) {
                    trail.came_from(hop(*handoff, peer, None));
                }
            }
            // What was coming is not.
            State::Declined { .. } => trail.came.retain(|hop| hop.since_s.is_some()),
            State::Owner(tenure) => {
                if let Tenure::Unconfirmed { handoff, peer } = tenure {
                    let id = handoff.to_string();
                    if trail.came.iter().all(|hop| hop.handoff != id) {
                        trail.came_from(hop(*handoff, peer, Some(at.written_s)));
                    }
                }
                trail.is_here(at.now_s);
            }
            State::HandingOff { .. } | State::Committed { .. } => trail.is_here(at.now_s),
            State::Released { handoff, peer } => {
                let id = handoff.to_string();
                if trail.left.as_ref().is_none_or(|left| left.handoff != id) {
                    trail.is_here(at.written_s);
                    trail.left = hop(*handoff, peer, Some(at.written_s));
                }
            }
        }
        trail.came.retain(|hop| hop.until_s(at.now_s, at.keep_s).is_some());
        trail
    }

    /// The newest, in place of an older one of the same peer.
    fn came_from(&mut self, hop: Option<Hop>) {
        let Some(hop) = hop else { return };
        self.came.retain(|older| older.peer != hop.peer);
        self.came.push(hop);
        let surplus = self.came.len().saturating_sub(MAX_CAME);
        self.came.drain(..surplus);
    }

    fn is_here(&mut self, since_s: u64) {
        self.left = None;
        for hop in &mut self.came {
            hop.since_s.get_or_insert(since_s);
        }
    }
}

/// What is known of all VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Trails {
    version: u32,
    vms: BTreeMap<VmName, Trail>,
}

impl Trails {
    /// As the file has them.
    pub(super) fn read(home: &Home) -> Self {
        let nothing = Self { version: VERSION, vms: BTreeMap::new() };
        let path = home.trails();
        if !path.exists() {
            return nothing;
        }
        match read_json::<Self>(&path) {
            Ok(read) if read.version == VERSION => read,
            Ok(read) => {
                tracing::warn!("{}: version {} is not read here", path.display(), read.version);
                nothing
            }
            Err(failure) => {
                tracing::warn!("{failure}");
                nothing
            }
        }
    }

    /// Makes it so.
    pub(super) fn write(&self, home: &Home) -> Result<(), Failure> {
        write_json(&home.trails(), self)
    }

    /// What is known of a VM.
    pub(super) fn get(&self, vm: &VmName) -> Option<&Trail> {
        self.vms.get(vm)
    }

    /// With these in place of all: VMs that are gone are forgotten, and those that never moved not noted.
    pub(super) fn with(vms: impl IntoIterator<Item = (VmName, Trail)>) -> Self {
        let moved = |(_, trail): &(VmName, Trail)| trail.left.is_some() || !trail.came.is_empty();
        Self { version: VERSION, vms: vms.into_iter().filter(moved).collect() }
    }
}

#[cfg(test)]
mod tests {
    use handoff::{
        ownership::{Epoch, VmId},
        tls::Identity,
    };

    use super::*;

    const KEEP_S: u64 = 600;

    fn at(now_s: u64) -> Moment {
        Moment { now_s, written_s: now_s, keep_s: KEEP_S }
    }

    fn record(state: State) -> Record {
        Record { state, epoch: Epoch(3), ..Record::created(VmId([1; 16])) }
    }

    fn id(n: u8) -> HandoffId {
        HandoffId([n; 16])
    }

    fn look(before: Option<Trail>, state: State, now_s: u64) -> Trail {
        let address = |text: &str| text.rsplit_once(':')?.0.parse().ok();
        Trail::after(before, &record(state), at(now_s), address)
    }

    #[test]
    fn a_trail_follows_a_guest_through_its_handoffs() {
        let [b, c] = [0; 2].map(|_| Identity::generate().unwrap().key());
        let (at_b, at_c) = (format!("{b}@192.0.2.2:7070"), format!("{c}@192.0.2.3:7070"));
        let gone = |n, peer: &String| State::Released { handoff: id(n), peer: peer.clone() };
        let coming = |n, peer: &String| State::Receiving { handoff: id(n), peer: peer.clone() };
        let here = || State::Owner(Tenure::Settled);
        let created = look(None, here(), 900);
        assert_eq!(Trails::with([("a".parse().unwrap(), created.clone())]).vms.len(), 0);
        let left = look(Some(created), gone(1, &at_b), 1000);
        let hop = left.left.clone().unwrap();
        assert_eq!((hop.peer, hop.address), (b, Some(Ipv4Addr::new(192, 0, 2, 2))));
        assert_eq!(hop.until_s(1000, KEEP_S), Some(1600));
        assert_eq!(hop.until_s(1600, KEEP_S), None);
        // A look later changes nothing; while it comes back, and if that fails, it is still there.
        assert_eq!(look(Some(left.clone()), gone(1, &at_b), 1100), left);
        let coming_back = look(Some(left.clone()), coming(2, &at_b), 1200);
        assert_eq!((&coming_back.left, coming_back.came.len()), (&left.left, 1));
        let declined = State::Declined { handoff: id(2), reason: String::new() };
        assert_eq!(look(Some(coming_back.clone()), declined, 1300), left);
        // However long it took to come: its time begins when it is here.
        let back = look(Some(coming_back), here(), 2500);
        assert_eq!((&back.left, back.came[0].since_s), (&None, Some(2500)));
        let onward = look(Some(back), gone(3, &at_c), 2600);
        assert_eq!((onward.left.as_ref().unwrap().peer, onward.came.len()), (c, 1));
        let later = look(Some(onward), gone(3, &at_c), 3100);
        assert!(later.came.is_empty(), "its time is over: {later:?}");
    }

    #[test]
    fn plain_handoffs_and_other_vms_leave_no_trail() {
        let b = Identity::generate().unwrap().key();
        let plain = State::Released { handoff: id(1), peer: "192.0.2.2:7070".into() };
        assert_eq!(look(None, plain, 1000).left, None);
        let gone = State::Released { handoff: id(1), peer: format!("{b}@192.0.2.2:7070") };
        let left = look(None, gone, 1000);
        let other = Record { vm: VmId([2; 16]), ..record(State::Owner(Tenure::Settled)) };
        let trail = Trail::after(Some(left), &other, at(1001), |_| None);
        assert_eq!((trail.left, trail.came.len()), (None, 0));
    }

    #[test]
    fn who_was_not_looked_at_while_it_came_is_known_until_the_source_has_let_go() {
        let b = Identity::generate().unwrap().key();
        let peer = format!("{b}@192.0.2.2:40000");
        let unconfirmed = Tenure::Unconfirmed { handoff: id(1), peer };
        let here = look(None, State::Owner(unconfirmed), 1000);
        assert_eq!(here.came[0].since_s, Some(1000));
        let settled = look(Some(here.clone()), State::Owner(Tenure::Settled), 1010);
        assert_eq!(settled, here);
    }

    #[test]
    fn a_clock_that_was_set_back_makes_no_hop_last() {
        let hop = Hop {
            handoff: String::new(),
            peer: Identity::generate().unwrap().key(),
            address: None,
            since_s: Some(10_000),
        };
        assert_eq!(hop.until_s(9_990, KEEP_S), Some(10_600));
        assert_eq!(hop.until_s(5_000, KEEP_S), None);
    }

    #[test]
    fn what_was_noted_is_read_again_and_damage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path()).unwrap();
        let b = Identity::generate().unwrap().key();
        let gone = State::Released { handoff: id(1), peer: format!("{b}@192.0.2.2:7070") };
        let vm: VmName = "web".parse().unwrap();
        let trails = Trails::with([(vm.clone(), look(None, gone, 1000))]);
        trails.write(&home).unwrap();
        assert_eq!(Trails::read(&home), trails);
        std::fs::write(home.trails(), "{").unwrap();
        assert_eq!(Trails::read(&home).get(&vm), None);
    }
}
