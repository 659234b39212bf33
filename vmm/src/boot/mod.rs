//! Loading a Linux kernel the way a boot loader would, and the state in which it starts.
//!
//! The 64-bit boot protocol: the kernel finds itself in long mode with identity-mapped low memory,
//! the zero page in RSI, and ACPI tables named there. All of it is written to guest RAM before the
//! first vCPU runs; a restored machine needs none of it.

mod acpi;
mod cpu;
mod kernel;
mod params;

use std::{
    io,
    path::{Path, PathBuf},
};

use linux_loader::{cmdline, loader};
use vm_memory::{GuestAddress, GuestMemoryError};

pub use cpu::{BootCpu, setup_vcpu};

use crate::{
    layout::{CMDLINE, CMDLINE_MAX},
    memory::GuestRam,
};

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file larger than anything that boots.
    #[error("{what} {} has {bytes} bytes; at most {max} are accepted", path.display())]
    TooLarge {
        /// Kernel or initramfs.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The kernel file is not a kernel that can be booted here.
    #[error("kernel {}: {why}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: KernelError,
    },
    /// The initramfs does not fit beside the kernel.
    #[error(
        "initramfs of {bytes} bytes does not fit between the kernel's end at {kernel_end:#x} and {limit:#x}: give the guest more memory"
    )]
    InitramfsDoesNotFit {
        /// Its size.
        bytes: u64,
        /// Where the kernel ends, unpacked.
        kernel_end: u64,
        /// Below which address it has to lie.
        limit: u64,
    },
    /// The command line is not one.
    #[error("kernel command line: {0} (at most {max} bytes of printable ASCII)", max = CMDLINE_MAX - 1)]
    Cmdline(#[source] cmdline::Error),
    /// The command line cannot be written.
    #[error("kernel command line cannot be written: {0}")]
    CmdlineWrite(#[source] loader::Error),
    /// The ACPI tables outgrew their place: too many vCPUs for the layout.
    #[error("ACPI tables do not fit below 1 MiB")]
    AcpiTooLarge,
    /// The guest's memory map has too many entries.
    #[error("guest memory has more regions than the zero page can tell")]
    TooManyRegions,
    /// Guest RAM cannot be written.
    #[error("cannot write boot data: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Neither format.
    #[error("neither a bzImage nor an ELF file (begins with {0:02x?})")]
    Foreign(Vec<u8>),
    /// Compressed as a whole.
    #[error("is {0}-compressed: unpack it first")]
    Compressed(&'static str),
    /// Shorter than its header says.
    #[error("is truncated: {bytes} bytes of {needed}")]
    Truncated {
        /// Bytes there.
        bytes: u64,
        /// Bytes that the header asks for.
        needed: u64,
    },
    /// A 32-bit or very old kernel.
    #[error("has no 64-bit entry point (boot protocol {version:#06x}): an x86-64 kernel is needed")]
    No64Bit {
        /// Boot protocol version.
        version: u16,
    },
    /// It does not fit.
    #[error("needs guest memory up to {needed:#x}, and there is {available:#x}")]
    DoesNotFit {
        /// Where it ends, unpacked.
        needed: u64,
        /// Where low RAM ends.
        available: u64,
    },
    /// The loader rejected it.
    #[error(transparent)]
    Loader(#[from] loader::Error),
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// bzImage or ELF.
    pub kernel: &'a Path,
    /// Initial RAM file system.
    pub initramfs: Option<&'a Path>,
    /// Kernel command line.
    pub cmdline: &'a str,
}

/// Writes everything into guest RAM and returns the state in which the first vCPU starts.
///
/// `slots` are the virtio-mmio slots that hold a device.
pub fn load(
    ram: &GuestRam,
    source: BootSource<'_>,
    vcpus: u8,
    slots: &[usize],
) -> Result<BootCpu, BootError> {
    let kernel = kernel::load(ram, source.kernel)?;
    let initramfs =
        source.initramfs.map(|path| kernel::load_initramfs(ram, path, &kernel)).transpose()?;
    let mut cmdline = cmdline::Cmdline::new(CMDLINE_MAX).map_err(BootError::Cmdline)?;
    cmdline.insert_str(source.cmdline).map_err(BootError::Cmdline)?;
    loader::load_cmdline(ram, GuestAddress(CMDLINE), &cmdline).map_err(BootError::CmdlineWrite)?;
    let rsdp = acpi::write(ram, vcpus, slots)?;
    params::write(ram, &kernel, initramfs, rsdp)?;
    cpu::write_tables(ram)?;
    Ok(BootCpu { entry: kernel.entry })
}
