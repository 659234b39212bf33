//! What KVM emulates for the whole machine: timer, clock, interrupt controllers.

use std::time::Duration;

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::{
    StateError, kvm,
    time::{away, wall_clock_ns},
};

/// In the order in which they are restored.
#[derive(Debug, Serialize, Deserialize)]
pub struct ChipState {
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
}

const CHIPS: [(u32, &str); 3] = [
    (KVM_IRQCHIP_PIC_MASTER, "first PIC"),
    (KVM_IRQCHIP_PIC_SLAVE, "second PIC"),
    (KVM_IRQCHIP_IOAPIC, "IOAPIC"),
];

impl ChipState {
    pub(super) fn save(vm: &VmFd) -> Result<Self, StateError> {
        let pit = vm.get_pit2().map_err(kvm("PIT", None))?;
        let before = wall_clock_ns()?;
        let mut clock = vm.get_clock().map_err(kvm("kvmclock", None))?;
        if clock.flags & KVM_CLOCK_REALTIME == 0 {
            // KVM has no pair: ours, a little early, so that the clock never stays behind.
            clock.realtime = before;
        }
        let mut chips = [kvm_irqchip::default(); 3];
        for (chip, (chip_id, what)) in chips.iter_mut().zip(CHIPS) {
            chip.chip_id = chip_id;
            vm.get_irqchip(chip).map_err(kvm(what, None))?;
        }
        let [pic_master, pic_slave, ioapic] = chips;
        Ok(Self { pit, clock, pic_master, pic_slave, ioapic })
    }

    pub(super) fn restore(
        &self,
        vm: &VmFd,
        clock_realtime: bool,
        at_most: Option<Duration>,
    ) -> Result<(), StateError> {
        vm.set_pit2(&self.pit).map_err(kvm("PIT", None))?;
        let clock = self.clock_at(wall_clock_ns()?, clock_realtime, at_most);
        vm.set_clock(&clock).map_err(kvm("kvmclock", None))?;
        for (chip, (chip_id, what)) in
            [&self.pic_master, &self.pic_slave, &self.ioapic].into_iter().zip(CHIPS)
        {
            // The id decides how KVM reads the rest, so it is ours, not the peer's.
            let chip = kvm_irqchip { chip_id, ..*chip };
            vm.set_irqchip(&chip).map_err(kvm(what, None))?;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn kvmclock_ns(&self) -> u64 {
        self.clock.clock
    }

    /// As if it had been saved so much earlier.
    #[cfg(test)]
    pub(crate) fn date_back(&mut self, by: Duration) {
        self.clock.realtime -= by.as_nanos() as u64;
    }

    /// kvmclock as it must stand at `now`: what it was, and the wall time that has gone by, as far as
    /// that is to be believed.
    fn clock_at(
        &self,
        now_ns: u64,
        clock_realtime: bool,
        at_most: Option<Duration>,
    ) -> kvm_clock_data {
        let mut clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        match away(self.clock.realtime, now_ns, at_most) {
            // The TSC was not set forward either, and said so.
            Err(_) => {}
            Ok(_) if clock_realtime => {
                // KVM adds what has gone by at the very moment it sets the clock.
                clock.flags = KVM_CLOCK_REALTIME;
                clock.realtime = self.clock.realtime;
            }
            Ok(away) => {
                let away = u64::try_from(away.as_nanos()).unwrap_or(u64::MAX);
                clock.clock = clock.clock.saturating_add(away);
            }
        }
        clock
    }
}
