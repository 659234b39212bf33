//! `howdah base import --oci`: an image of containers as disk, kernel and command line.

use std::{
    fs::{self, OpenOptions},
    path::Path,
};

use guest_images::{
    ImportSpec, Part,
    image::oci::{Image, OciError, Startup},
    store::Progress,
};

use super::{Staging, disk, with_bar};
use crate::{
    cli::BaseImportArgs,
    failure::{Exit, Failure, one_line},
    output::Output,
};

/// The disk unless said otherwise. What is not used of it is not there.
const DEFAULT_DISK_MIB: u64 = 4096;

/// What a store imports: the disk as it was made in the staging directory.
pub(super) fn spec(
    args: BaseImportArgs,
    staging: &Staging,
    output: Output,
) -> Result<ImportSpec, Failure> {
    let BaseImportArgs { name, oci, reference, disk_mib, kernel, initramfs, cmdline, .. } = args;
    // It is there, or this would not be asked.
    let given = oci.unwrap_or_default();
    let told = |error| failure(&given, error);
    // An import would find out too, when all the work is done.
    for file in [&kernel, &initramfs].into_iter().flatten() {
        fs::metadata(file).map_err(|e| Failure::file("open", file, &e))?;
    }
    let image = Image::open(&given, reference.as_deref()).map_err(told)?;
    let disk_bytes = disk_mib.unwrap_or(DEFAULT_DISK_MIB) << 20;
    let merged = with_bar(output, "reading", |progress| {
        image.merge(disk_bytes, &mut |done, total| progress(of_disk(done, total))).map_err(told)
    })?;
    let startup = merged.startup().cloned();
    let cmdline = match (cmdline, &startup) {
        (Some(cmdline), _) => cmdline,
        (None, Some(startup)) => startup.cmdline(),
        (None, None) => return Err(told(OciError::NoShell)),
    };
    if kernel.is_none() && !merged.has_kernel() {
        let why = "it has no kernel in /boot, as images of containers have none";
        let way_out = "give one with --kernel (and --initramfs)";
        return Err(Failure::new(Exit::Usage, given.display(), why, way_out));
    }
    let left_out = merged.left_out();
    let path = staging.0.join(Part::Disk.file_name());
    let to = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
    let to = to.map_err(|e| Failure::file("create", &path, &e))?;
    with_bar(output, "unpacking", |progress| {
        let mut progress = |done, total| progress(of_disk(done, total));
        merged.write(&to, &mut progress).map_err(|error| match error {
            OciError::Write(why) => Failure::file("write", &path, &why),
            error => told(error),
        })
    })?;
    let (kernel, initramfs) = match kernel {
        Some(kernel) => (kernel, initramfs),
        None => {
            // Its command line is one for a boot loader, and another disk.
            let found = disk::boot(&given, &path, staging)?;
            output.note(&format!("its kernel is that of {}", found.found));
            (found.kernel, found.initramfs)
        }
    };
    if let Some(startup) = startup.filter(|startup| startup.cmdline() == cmdline) {
        output.note(&starts(&startup));
    }
    if left_out > 0 {
        output.note(&format!("{left_out} extended attributes of its files (ACLs) are left out"));
    }
    Ok(ImportSpec { name, disk: path, kernel, initramfs, cmdline, memory: None })
}

fn of_disk(done_bytes: u64, total_bytes: u64) -> Progress {
    Progress { part: Part::Disk, done_bytes, total_bytes }
}

fn starts(startup: &Startup) -> String {
    match startup {
        Startup::System => "it boots its own /sbin/init; what a container of it would run is not \
                            started (init=/sbin/howdah-init on the command line does that)"
            .into(),
        Startup::Command(words) => format!("it starts {}", one_line(&words.join(" "))),
    }
}

/// What is wrong with an image, and who can help it.
fn failure(given: &Path, error: OciError) -> Failure {
    let exit = match &error {
        OciError::Open(why) => return Failure::file("open", given, why),
        OciError::Read(why) => return Failure::file("read", given, why),
        OciError::Name { .. } => Exit::NotFound,
        OciError::Several(_) | OciError::Full { .. } | OciError::Bomb | OciError::NoShell => {
            Exit::Usage
        }
        _ => Exit::Corrupt,
    };
    Failure::plain(exit, given.display(), error)
}
