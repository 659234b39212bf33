//! The two ways in which a PC guest turns itself off or starts over.

use std::sync::Arc;

use super::bus::BusDevice;
use crate::layout::{
    ACPI_RESET_PORT, ACPI_RESET_VALUE, ACPI_S5_SLEEP_TYPE, ACPI_SLEEP_CONTROL_PORT,
    ACPI_SLEEP_STATUS_PORT, I8042_COMMAND_PORT, I8042_PORT,
};

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Start over.
    Reset,
    /// Turn off.
    PowerOff,
}

/// Who is told. Called on the vCPU's thread, which goes on running the guest afterwards unless the
/// sink stops it: it must not block.
pub type PowerSink = Arc<dyn Fn(PowerEvent) + Send + Sync>;

const I8042_COMMAND: u64 = (I8042_COMMAND_PORT - I8042_PORT) as u64;
const I8042_RESET: u8 = 0xfe;

/// A keyboard controller that has no keyboard and knows one command: reset the CPU.
pub struct I8042 {
    sink: PowerSink,
}

impl I8042 {
    /// A controller for the ports from [`I8042_PORT`] on.
    pub fn new(sink: PowerSink) -> Self {
        Self { sink }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Status 0: nothing to read, ready for commands.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == I8042_COMMAND && data == [I8042_RESET] {
            (self.sink)(PowerEvent::Reset);
        }
    }
}

const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = (ACPI_SLEEP_STATUS_PORT - ACPI_SLEEP_CONTROL_PORT) as u64;
const RESET: u64 = (ACPI_RESET_PORT - ACPI_SLEEP_CONTROL_PORT) as u64;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;
const SLP_EN: u8 = 1 << 5;

/// The sleep control, sleep status and reset registers of hardware-reduced ACPI.
pub struct AcpiPower {
    sink: PowerSink,
}

impl AcpiPower {
    /// Registers for the ports from [`ACPI_SLEEP_CONTROL_PORT`] on.
    pub fn new(sink: PowerSink) -> Self {
        Self { sink }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // The guest never wakes from the one state it can enter, so wake status is always clear.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL
                if value & SLP_EN != 0
                    && (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK == ACPI_S5_SLEEP_TYPE =>
            {
                (self.sink)(PowerEvent::PowerOff);
            }
            RESET if value == ACPI_RESET_VALUE => (self.sink)(PowerEvent::Reset),
            // Writing ones clears status bits: none are ever set.
            SLEEP_STATUS => {}
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn sink() -> (Arc<Mutex<Vec<PowerEvent>>>, PowerSink) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        (seen, Arc::new(move |event| log.lock().unwrap().push(event)))
    }

    proptest::proptest! {
        /// Only the two requests that there are do anything, at any port and in any width.
        #[test]
        fn other_accesses_do_nothing(
            offset in 0u64..16,
            data in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..9),
        ) {
            let (seen, sink) = sink();
            let (keyboard, power) = (I8042::new(sink.clone()), AcpiPower::new(sink));
            keyboard.write(offset, &data);
            keyboard.read(offset, &mut data.clone());
            let resets = offset == I8042_COMMAND && data == [I8042_RESET];
            proptest::prop_assert_eq!(seen.lock().unwrap().len(), usize::from(resets));
            seen.lock().unwrap().clear();
            power.write(offset, &data);
            power.read(offset, &mut data.clone());
            let sleeps = offset == SLEEP_CONTROL
                && matches!(data[..], [value] if value & SLP_EN != 0
                    && value >> SLP_TYP_SHIFT & SLP_TYP_MASK == ACPI_S5_SLEEP_TYPE);
            let starts_over = offset == RESET && data == [ACPI_RESET_VALUE];
            proptest::prop_assert_eq!(seen.lock().unwrap().len(), usize::from(sleeps || starts_over));
        }
    }

    #[test]
    fn keyboard_controller_resets() {
        let (seen, sink) = sink();
        let device = I8042::new(sink);
        device.write(0, &[0xfe]);
        device.write(4, &[0xfe, 0]);
        device.write(4, &[0xaa]);
        assert!(seen.lock().unwrap().is_empty());
        device.write(4, &[0xfe]);
        assert_eq!(*seen.lock().unwrap(), [PowerEvent::Reset]);
        let mut status = [0xff];
        device.read(4, &mut status);
        assert_eq!(status, [0]);
    }

    #[test]
    fn acpi_registers() {
        let (seen, sink) = sink();
        let device = AcpiPower::new(sink);
        device.write(SLEEP_CONTROL, &[ACPI_S5_SLEEP_TYPE << 2]); // Not enabled.
        device.write(SLEEP_CONTROL, &[1 << 2 | SLP_EN]); // Not S5.
        device.write(SLEEP_STATUS, &[0x80]);
        device.write(RESET, &[0]);
        assert!(seen.lock().unwrap().is_empty());
        device.write(SLEEP_CONTROL, &[ACPI_S5_SLEEP_TYPE << 2 | SLP_EN]);
        device.write(RESET, &[ACPI_RESET_VALUE]);
        assert_eq!(*seen.lock().unwrap(), [PowerEvent::PowerOff, PowerEvent::Reset]);
    }
}
