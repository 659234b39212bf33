//! Which ports of the host are whose, of all VMs that run here.

use super::{
    book::{Networks, attached},
    nft::Rules,
};
use crate::{failure::Failure, home::Home};

/// What the packet filter is to do for the networks and for the VMs whose guests may run here.
pub(super) fn rules(home: &Home) -> Result<Rules, Failure> {
    let networks = Networks::read(home)?.all().to_vec();
    let mut published = Vec::new();
    for (vm, _, attachment) in attached(home)? {
        let ours = matches!(home.vm(&vm).record(), Ok(Some(record)) if record.may_run());
        let Some(address) = attachment.address.filter(|_| ours) else { continue };
        published.extend(attachment.publish.into_iter().map(|port| (port, address)));
    }
    published.sort();
    Ok(Rules { networks, published })
}
