//! What a lab host needs to run QEMU in it: the programs of this machine, and their firmware.

use std::path::Path;

use anyhow::{Context, Result};

use crate::{
    exec::Request,
    machine::{image::Extra, libraries::find_tool},
};

/// Programs, and the Debian packages they are in.
const PROGRAMS: [(&str, &str); 2] =
    [("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils")];
/// What QEMU loads for a machine of type q35 that boots a kernel, without graphics.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "linuxboot_dma.bin", "kvmvapic.bin"];
/// Where Debian and others keep it.
const FIRMWARE_DIRS: [&str; 2] = ["/usr/share/seabios", "/usr/share/qemu"];

/// Puts QEMU into a lab host, at the paths that it has here.
pub(super) fn add_qemu(request: &mut Request) -> Result<()> {
    for (program, package) in PROGRAMS {
        let from = find_tool(program).with_context(|| {
            format!("{program} is not installed: peers need it; install the package {package}")
        })?;
        request.extras.push(Extra::File { from, to: Path::new("/usr/bin").join(program) });
    }
    for name in FIRMWARE {
        let mut paths = FIRMWARE_DIRS.iter().map(|dir| Path::new(dir).join(name));
        let from = paths.find(|path| path.is_file()).with_context(|| {
            format!("QEMU's firmware {name} is in none of {}", FIRMWARE_DIRS.join(", "))
        })?;
        // One directory that QEMU searches; links of packages into others would be lost.
        let to = Path::new("/usr/share/qemu").join(name);
        request.extras.push(Extra::File { from, to });
    }
    Ok(())
}
