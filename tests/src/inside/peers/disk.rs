//! The guest's disk for QEMU: an overlay over the base that both sides hold, and its mirror over NBD.
//!
//! QEMU can leave out what both sides have only where the user arranges it so: the target is given an
//! empty overlay over its own copy of the base, and the mirror takes the source's overlay alone
//! (`sync=top`). That is the best that QEMU's users can do, so it is what howdah is compared with.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::qmp::{Event, Qmp, QmpError};
use crate::inside::copy::copy_sparse;

/// Where the lab puts the tool that makes overlays.
const QEMU_IMG: &str = "/usr/bin/qemu-img";
/// The guest's disk, in QEMU's graph of block nodes; the export has the same name.
pub(super) const NODE: &str = "disk";
/// The target's disk as the source sees it.
const FAR: &str = "far";
/// The mirror.
const JOB: &str = "mirror";
/// The target's port of NBD.
const PORT: u16 = 10809;
/// What the mirror copies of a block that changed. QEMU's default is a cluster, 64 KiB: too much for a
/// guest that appends to files, over a thin link.
const GRANULARITY: u32 = 4096;
/// How long what the mirror still owes may take when the guest has stopped.
const DRAINS: Duration = Duration::from_secs(600);

/// The base's disk in the lab host's memory; copied there once.
pub(super) fn base(image: &Path, dir: &Path) -> Result<PathBuf> {
    let copy = dir.join("disk.raw");
    if !copy.exists() {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let fresh = dir.join("disk.raw.part");
        copy_sparse(&image.join("disk.raw"), &fresh)
            .and_then(|()| fs::rename(&fresh, &copy))
            .with_context(|| format!("cannot copy the disk of {}", image.display()))?;
    }
    Ok(copy)
}

/// Makes an empty overlay.
pub(super) fn overlay(base: &Path, at: &Path) -> Result<()> {
    let output = Command::new(QEMU_IMG)
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([base, at])
        .output()
        .context("cannot run qemu-img")?;
    if !output.status.success() {
        bail!("qemu-img create: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Lets the target's disk be written over the network.
pub(super) fn export(target: &mut Qmp, address: Ipv4Addr) -> Result<(), QmpError> {
    let data = json!({ "host": address.to_string(), "port": PORT.to_string() });
    target.tell("nbd-server-start", json!({ "addr": { "type": "inet", "data": data } }))?;
    let export = json!({
        "type": "nbd", "id": NODE, "node-name": NODE, "name": NODE, "writable": true,
    });
    target.tell("block-export-add", export).map(drop)
}

/// Starts the mirror of the source's overlay.
pub(super) fn mirror(source: &mut Qmp, address: Ipv4Addr) -> Result<(), QmpError> {
    let server = json!({ "type": "inet", "host": address.to_string(), "port": PORT.to_string() });
    let far = json!({ "driver": "nbd", "node-name": FAR, "server": server, "export": NODE });
    source.tell("blockdev-add", far)?;
    let job = json!({
        "job-id": JOB, "device": NODE, "target": FAR, "sync": "top", "granularity": GRANULARITY,
    });
    source.tell("blockdev-mirror", job).map(drop)
}

/// Waits until the target's disk follows the source's.
pub(super) fn wait_mirrored(source: &mut Qmp, deadline: Instant) -> Result<Mirrored, QmpError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(event) = source.event(left)? else { return Ok(Mirrored::TooLate) };
        if !of_job(&event) {
            continue;
        }
        match event.event.as_str() {
            "BLOCK_JOB_READY" => return Ok(Mirrored::Follows),
            "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_ERROR" => {
                let problem = problem(&event);
                return Err(QmpError::Refused { command: "blockdev-mirror".into(), problem });
            }
            _ => {}
        }
    }
}

/// How waiting for a mirror ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mirrored {
    /// The target's disk follows.
    Follows,
    /// Not in time.
    TooLate,
}

/// Ends the mirror of a guest that has stopped: what it owes is written, and the target alone has the
/// disk.
pub(super) fn finish(source: &mut Qmp, target: &mut Qmp) -> Result<(), QmpError> {
    // To cancel a mirror that is ready is to end it with both sides the same.
    source.tell("block-job-cancel", json!({ "device": JOB }))?;
    let ended = source.wait_for("end of the mirror", DRAINS, |event| {
        of_job(event) && ["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"].contains(&&*event.event)
    })?;
    if ended.event != "BLOCK_JOB_COMPLETED" || ended.data.get("error").is_some() {
        let problem = problem(&ended);
        return Err(QmpError::Refused { command: "block-job-cancel".into(), problem });
    }
    source.tell("blockdev-del", json!({ "node-name": FAR }))?;
    target.tell("nbd-server-stop", json!({})).map(drop)
}

/// Bytes that the mirror has sent and has to send, as QEMU counts them.
pub(super) fn progress(source: &mut Qmp) -> Option<Value> {
    let jobs = source.query("query-block-jobs").ok()?;
    jobs.as_array()?.first().cloned()
}

fn of_job(event: &Event) -> bool {
    event.data.get("device").and_then(Value::as_str) == Some(JOB)
}

fn problem(event: &Event) -> String {
    let error = event.data.get("error").and_then(Value::as_str);
    format!("{}: {}", event.event, error.unwrap_or("the mirror ended too early"))
}
