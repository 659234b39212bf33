//! `howdah peer ping`: whether a peer answers, and which VMs could go there.

use howdah_api::{CouldGo, HeldBase, Pinged};

use crate::{
    cloudlet::Cloudlet,
    output::{Output, bytes, table},
};

/// Runs `howdah peer ping`.
pub(crate) fn run(peer: &str, cloudlet: &Cloudlet, output: Output) -> anyhow::Result<()> {
    let pinged = cloudlet.ping(peer)?;
    output.result(&pinged, show);
    Ok(())
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
    let row = |verdict: &CouldGo| {
        let could = if verdict.could_go { "yes" } else { "no" };
        [verdict.vm.clone(), could.to_owned(), verdict.why_not.join("; ")]
    };
    let rows: Vec<_> = pinged.vms.iter().map(row).collect();
    text + "\n\n" + &table(["VM", "COULD GO", "WHY NOT"], &rows)
}
