//! The calls by name.

use http::Method;

use super::{Client, ClientError};
use crate::{
    Base, BaseHeal, BasePull, BasePush, BaseRemoved, BasesCollected, BasesGc, HandoffSpec, Host,
    Operation, Peer, PeerSpec, Pinged, Vm, VmRun, VmRunning,
};

type Called<T> = Result<T, ClientError>;

const NOTHING: Option<&()> = None;

/// A name as a part of a path. Names that are none are told so by the daemon.
fn part(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let quoted = name.bytes().map(|b| match b {
        b if plain(b) => char::from(b).to_string(),
        b => format!("%{b:02X}"),
    });
    quoted.collect()
}

impl Client {
    /// The host and its daemon.
    pub fn host(&self) -> Called<Host> {
        self.call(Method::GET, "/v1/host", NOTHING)
    }

    /// Every VM.
    pub fn vms(&self) -> Called<Vec<Vm>> {
        self.call(Method::GET, "/v1/vms", NOTHING)
    }

    /// One VM, with its last report.
    pub fn vm(&self, name: &str) -> Called<Vm> {
        self.call(Method::GET, &format!("/v1/vms/{}", part(name)), NOTHING)
    }

    /// Creates a VM and runs it, or runs one that is there.
    pub fn run(&self, vm: &VmRun) -> Called<VmRunning> {
        self.call(Method::POST, "/v1/vms", Some(vm))
    }

    /// Stops the vCPUs.
    pub fn pause(&self, name: &str) -> Called<Vm> {
        self.call(Method::POST, &format!("/v1/vms/{}/pause", part(name)), NOTHING)
    }

    /// Lets a paused VM go on.
    pub fn resume(&self, name: &str) -> Called<Vm> {
        self.call(Method::POST, &format!("/v1/vms/{}/resume", part(name)), NOTHING)
    }

    /// Flushes the disk and ends the VM; with `force` even while it is being handed off.
    pub fn stop(&self, name: &str, force: bool) -> Called<Vm> {
        self.call(Method::POST, &format!("/v1/vms/{}/stop?force={force}", part(name)), NOTHING)
    }

    /// Removes a stopped VM with its disk.
    pub fn remove(&self, name: &str) -> Called<()> {
        self.call(Method::DELETE, &format!("/v1/vms/{}", part(name)), NOTHING)
    }

    /// Begins to hand a VM off.
    pub fn handoff(&self, name: &str, handoff: &HandoffSpec) -> Called<Operation> {
        self.call(Method::POST, &format!("/v1/vms/{}/handoff", part(name)), Some(handoff))
    }

    /// Every base.
    pub fn bases(&self) -> Called<Vec<Base>> {
        self.call(Method::GET, "/v1/bases", NOTHING)
    }

    /// Begins to compare a base with its manifest.
    pub fn verify_base(&self, name: &str) -> Called<Operation> {
        self.call(Method::POST, &format!("/v1/bases/{}/verify", part(name)), NOTHING)
    }

    /// Begins to send a base to a peer.
    pub fn push_base(&self, name: &str, push: &BasePush) -> Called<Operation> {
        self.call(Method::POST, &format!("/v1/bases/{}/push", part(name)), Some(push))
    }

    /// Begins to fetch a base that a peer calls so.
    pub fn pull_base(&self, name: &str, pull: &BasePull) -> Called<Operation> {
        self.call(Method::POST, &format!("/v1/bases/{}/pull", part(name)), Some(pull))
    }

    /// Begins to mend a base with what a peer has of it.
    pub fn heal_base(&self, name: &str, heal: &BaseHeal) -> Called<Operation> {
        self.call(Method::POST, &format!("/v1/bases/{}/heal", part(name)), Some(heal))
    }

    /// Removes a base that no VM uses.
    pub fn remove_base(&self, name: &str) -> Called<BaseRemoved> {
        self.call(Method::DELETE, &format!("/v1/bases/{}", part(name)), NOTHING)
    }

    /// Removes the bases that nothing uses, or says which those are.
    pub fn collect_bases(&self, gc: BasesGc) -> Called<BasesCollected> {
        self.call(Method::POST, "/v1/store/gc", Some(&gc))
    }

    /// Every peer that is known.
    pub fn peers(&self) -> Called<Vec<Peer>> {
        self.call(Method::GET, "/v1/peers", NOTHING)
    }

    /// Lets a peer in, or changes what is said of one.
    pub fn put_peer(&self, name: &str, peer: &PeerSpec) -> Called<Peer> {
        self.call(Method::PUT, &format!("/v1/peers/{}", part(name)), Some(peer))
    }

    /// Forgets a peer; none if it was not known.
    pub fn remove_peer(&self, name: &str) -> Called<Option<Peer>> {
        self.call(Method::DELETE, &format!("/v1/peers/{}", part(name)), NOTHING)
    }

    /// Asks a peer how it is; where it is known to listen, or at an address.
    pub fn ping_peer(&self, name: &str, address: Option<&str>) -> Called<Pinged> {
        let address = address.map(|address| format!("?address={}", part(address)));
        let path = format!("/v1/peers/{}/ping{}", part(name), address.unwrap_or_default());
        self.call(Method::POST, &path, NOTHING)
    }

    /// Operations that run, and the latest that are over.
    pub fn operations(&self) -> Called<Vec<Operation>> {
        self.call(Method::GET, "/v1/operations", NOTHING)
    }

    /// One operation.
    pub fn operation(&self, id: &str) -> Called<Operation> {
        self.call(Method::GET, &format!("/v1/operations/{}", part(id)), NOTHING)
    }

    /// Waits until an operation is over, for some seconds at most; how it is then.
    pub fn wait(&self, id: &str, seconds: u32) -> Called<Operation> {
        self.call(Method::GET, &format!("/v1/operations/{}?wait_s={seconds}", part(id)), NOTHING)
    }

    /// Gives an operation up.
    pub fn cancel(&self, id: &str) -> Called<Operation> {
        self.call(Method::POST, &format!("/v1/operations/{}/cancel", part(id)), NOTHING)
    }
}

#[cfg(test)]
mod tests {
    use super::part;

    #[test]
    fn names_stay_one_part_of_a_path() {
        assert_eq!(part("web-1.a_b"), "web-1.a_b");
        assert_eq!(part("../x?y z"), "..%2Fx%3Fy%20z");
    }
}
