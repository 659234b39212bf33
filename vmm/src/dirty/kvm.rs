//! KVM's dirty log: one memory slot for each region of RAM.

use std::sync::Arc;

use guest_images::CHUNK_SIZE;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iowr_nr};

use super::{DirtyError, DirtyLog};
use crate::memory::{self, GuestRam, MemoryError};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// How many words of the log are cleared at once: 128 MiB of RAM. vCPUs that fault wait meanwhile.
const CLEAR_WORDS: usize = 512;

/// KVM's log.
#[derive(Debug)]
pub(crate) struct KvmLog {
    vm: Arc<VmFd>,
    slots: Vec<kvm_userspace_memory_region>,
    manual: bool,
}

impl KvmLog {
    /// Gives RAM to KVM, without a log.
    pub(crate) fn new(vm: Arc<VmFd>, ram: &GuestRam) -> Result<Self, DirtyError> {
        let slots = ram
            .iter()
            .zip(0..)
            .map(|(region, slot)| {
                Ok(kvm_userspace_memory_region {
                    slot,
                    flags: 0,
                    guest_phys_addr: region.start_addr().0,
                    memory_size: region.len(),
                    userspace_addr: memory::host_address(region)?,
                })
            })
            .collect::<Result<_, MemoryError>>()?;
        let manual = enable_manual(&vm);
        let log = Self { vm, slots, manual };
        log.set_enabled(false)?;
        Ok(log)
    }

    /// Goes on as where KVM has no manual protect.
    #[cfg(test)]
    pub(crate) fn use_plain(&mut self) -> Result<(), DirtyError> {
        let capability =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        self.manual = false;
        self.vm.enable_cap(&capability).map_err(Self::failed("switching manual protect off", 0))
    }

    fn failed(what: &'static str, slot: u32) -> impl Fn(kvm_ioctls::Error) -> DirtyError {
        move |source| DirtyError::Kvm { what, slot, source }
    }
}

/// Asks for manual protect; `false` where KVM has none.
fn enable_manual(vm: &VmFd) -> bool {
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let flags = u32::try_from(offered).unwrap_or(0) & wanted;
    if flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
        return false;
    }
    let mut capability =
        kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    capability.args[0] = flags.into();
    vm.enable_cap(&capability)
        .inspect_err(|error| tracing::debug!(%error, "no manual protect: the plain dirty log"))
        .is_ok()
}

impl DirtyLog for KvmLog {
    fn set_enabled(&self, enabled: bool) -> Result<(), DirtyError> {
        for region in &self.slots {
            let flags = if enabled { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            let region = kvm_userspace_memory_region { flags, ..*region };
            let what = if enabled { "turning on the dirty log" } else { "setting up" };
            // SAFETY: the region is the whole of a mapping of guest RAM, which the machine keeps as
            // long as it keeps the VM (`Tracker` holds both).
            unsafe { self.vm.set_user_memory_region(region) }
                .map_err(Self::failed(what, region.slot))?;
        }
        Ok(())
    }

    fn is_manual(&self) -> bool {
        self.manual
    }

    fn read(&self, region: usize) -> Result<Vec<u64>, DirtyError> {
        let Some(slot) = self.slots.get(region) else { return Ok(Vec::new()) };
        self.vm
            .get_dirty_log(slot.slot, slot.memory_size as usize)
            .map_err(Self::failed("reading the dirty log", slot.slot))
    }

    fn clear(&self, region: usize, first_word: u64, bits: &[u64]) -> Result<(), DirtyError> {
        let Some(slot) = self.slots.get(region) else { return Ok(()) };
        let pages = slot.memory_size / CHUNK_SIZE as u64;
        let mut first_page = first_word * 64;
        for bits in bits.chunks(CLEAR_WORDS) {
            // KVM wants whole words, but for the end of the slot.
            let count = (bits.len() as u64 * 64).min(pages.saturating_sub(first_page));
            if bits.iter().all(|bits| *bits == 0) {
                first_page += count;
                continue;
            }
            let argument = kvm_clear_dirty_log {
                slot: slot.slot,
                num_pages: count as u32,
                first_page,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                    dirty_bitmap: bits.as_ptr().cast_mut().cast(),
                },
            };
            // SAFETY: the descriptor is a VM's, the request is the one that takes this argument, and
            // KVM only reads the bitmap: `count` bits, which `bits` has.
            if unsafe { ioctl_with_ref(&*self.vm, KVM_CLEAR_DIRTY_LOG(), &argument) } != 0 {
                let source = kvm_ioctls::Error::last();
                return Err(Self::failed("clearing the dirty log", slot.slot)(source));
            }
            first_page += count;
        }
        Ok(())
    }
}
