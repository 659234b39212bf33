//! Kernels and initramfs files, which come with a base and are put into a guest's RAM.
//!
//! Any file is loaded into RAM or refused. Input: the length of the kernel, the kernel, the initramfs.

use std::sync::LazyLock;

use vmm::{
    boot::{BootSource, load},
    layout::MIN_MEMORY_BYTES,
    memory::{self, GuestRam},
};

use super::{Origin, Target};
use crate::{
    input::{Input, Program},
    scratch::Scratch,
};

pub(super) const TARGET: Target =
    Target { name: "kernel", from: Origin::File, run, seeds, max_len: 32 << 10 };

/// One for all runs: what is loaded where is what counts, not what was there.
static RAM: LazyLock<GuestRam> =
    LazyLock::new(|| memory::allocate(MIN_MEMORY_BYTES).expect("a little RAM"));

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let scratch = Scratch::new();
    let kernel = scratch.file("kernel", input.block());
    let initramfs = scratch.file("initramfs", input.rest());
    [None, Some(&*initramfs)].map(|initramfs| {
        let source = BootSource { kernel: &kernel, initramfs, cmdline: "console=ttyS0" };
        load(&RAM, source, 2, &[0, 1]).is_ok()
    }) == [true; 2]
}

/// An ELF file of one segment.
pub(super) fn elf() -> Vec<u8> {
    const AT: u64 = 0x100_0000;
    let code = [0xf4; 64];
    let headers = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2u8, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend([AT, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend([0u8, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1u8, 0, 0, 0, 7, 0, 0, 0]);
    let len = code.len() as u64;
    elf.extend([headers, AT, AT, len, len, 4096].map(u64::to_le_bytes).concat());
    elf.extend(code);
    elf
}

/// A bzImage of the least size, for a 64-bit machine.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0x90; 5 * 512 + 64];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1f4, &4u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x260, &0x1000u32.to_le_bytes());
    image
}

fn seeds() -> Vec<Vec<u8>> {
    [elf(), bzimage(), b"\x1f\x8b\x08 compressed".to_vec()]
        .map(|kernel| Program::new().block(&kernel).bytes(&[7; 5000]).finish())
        .into()
}
