//! `howdah peer ping`: whether a peer answers, and which VMs could go there.

use std::time::Duration;

use serde::Serialize;
use vmm::MachineProfile;

use crate::{
    about::{self, Candidate, HeldBase, Incoming, Verdict},
    commands::base,
    control::{Reply, Request, client},
    failure::Failure,
    home::{Home, VmDir},
    output::{Output, bytes, table},
    peers::{self, BookFile, Right},
};

/// A VM's process describes its machine at once, or is busy with something long.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(5);

/// What came of it.
#[derive(Debug, Serialize)]
struct Pinged {
    peer: String,
    address: String,
    connected_in_ms: f64,
    round_trip_ms: f64,
    version: String,
    protocol: (u32, u32),
    takes_vms: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
    available_memory_bytes: u64,
    available_disk_bytes: u64,
    network: Incoming,
    bases: Vec<HeldBase>,
    vms: Vec<Verdict>,
}

/// Runs `howdah peer ping`.
pub(crate) fn run(peer: &str, home: &Home, output: Output) -> anyhow::Result<()> {
    let book = BookFile::of(home).read()?;
    let endpoint = peers::resolve_for(&book, peer, false, None)?;
    let known = endpoint.key.and_then(|key| book.by_key(key));
    let answered = about::ask(home, &endpoint)?;
    let candidates = candidates(home)?;
    let may = |config: &crate::home::VmConfig| {
        known.is_none_or(|peer| config.base.parse().is_ok_and(|id| base::allowed(home, peer, id)))
    };
    let about = answered.about;
    let forbidden = known.and_then(|peer| peer.check(Right::Receive).err());
    let forbidden = forbidden.map(|failure| failure.message);
    let vms = about::verdicts(&about, forbidden.as_deref(), may, &candidates);
    let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let pinged = Pinged {
        peer: endpoint.shown(&book),
        address: endpoint.address.clone(),
        connected_in_ms: ms(answered.connected_in),
        round_trip_ms: ms(answered.round_trip),
        version: about.version,
        protocol: about.protocol,
        takes_vms: about.takes.is_ok(),
        why_not: about.takes.err(),
        available_memory_bytes: about.available_memory_bytes,
        available_disk_bytes: about.available_disk_bytes,
        network: about.network,
        bases: about.bases,
        vms,
    };
    output.result(&pinged, show);
    Ok(())
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

fn show(pinged: &Pinged) -> String {
    let Pinged { peer, version, protocol: (least, most), round_trip_ms, connected_in_ms, .. } =
        pinged;
    let mut text = format!(
        "{peer}: howdah {version}, protocol {least} to {most}, round trip {round_trip_ms:.1} ms, link in \
         {connected_in_ms:.0} ms; {} of memory and {} of disk are free",
        bytes(pinged.available_memory_bytes),
        bytes(pinged.available_disk_bytes),
    );
    if let Some(why) = &pinged.why_not {
        text += &format!("\nit takes no VMs from here: {why}");
    }
    let named = |base: &HeldBase| match &base.names[..] {
        [] => base.id.get(..12).unwrap_or(&base.id).to_owned(),
        names => names.join(","),
    };
    let bases: Vec<String> = pinged.bases.iter().map(named).collect();
    let bases = if bases.is_empty() { "none".to_owned() } else { bases.join(" ") };
    text += &format!("\nbases for VMs from here: {bases}");
    if pinged.vms.is_empty() {
        return text;
    }
    let row = |verdict: &Verdict| {
        let could = if verdict.could_go { "yes" } else { "no" };
        [verdict.vm.to_string(), could.to_owned(), verdict.why_not.join("; ")]
    };
    let rows: Vec<_> = pinged.vms.iter().map(row).collect();
    text + "\n\n" + &table(["VM", "COULD GO", "WHY NOT"], &rows)
}
