//! Legacy ports: the console's UART, the keyboard controller, the power registers; and a saved console.
//!
//! No access of any width at any port goes wrong; the console takes no more input than its bound; what
//! it saves it can take on. Input: ops.

use std::{io, sync::Arc};

use vmm::{
    devices::{
        bus::Bus,
        legacy::{AcpiPower, I8042},
        serial::{MAX_PENDING_INPUT_BYTES, Serial, SerialState},
    },
    layout::{ACPI_PORTS, ACPI_SLEEP_CONTROL_PORT, COM1_PORT, COM1_PORTS, I8042_PORT, I8042_PORTS},
};
use vmm_sys_util::eventfd::EventFd;

use super::{Origin, Target};
use crate::input::{Input, Program};

pub(super) const TARGET: Target =
    Target { name: "ports", from: Origin::Guest, run, seeds, max_len: 8 << 10 };

mod op {
    pub(super) const READ: u8 = 0;
    pub(super) const WRITE: u8 = 1;
    pub(super) const TYPE: u8 = 2;
    pub(super) const MOVE: u8 = 3;
    pub(super) const RESTORE: u8 = 4;
    pub(super) const END: u8 = 5;
}

fn irq() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).expect("an event descriptor")
}

fn bus(serial: &Arc<Serial>) -> Bus {
    let mut bus = Bus::new();
    let sink: Arc<dyn Fn(_) + Send + Sync> = Arc::new(|_| {});
    for (start, ports, device) in [
        (COM1_PORT, COM1_PORTS, Arc::clone(serial) as Arc<_>),
        (I8042_PORT, I8042_PORTS, Arc::new(I8042::new(Arc::clone(&sink))) as Arc<_>),
        (ACPI_SLEEP_CONTROL_PORT, ACPI_PORTS, Arc::new(AcpiPower::new(sink)) as Arc<_>),
    ] {
        bus.insert(start.into(), ports.into(), device).expect("ports apart from each other");
    }
    bus
}

/// The ports around each device.
fn port(number: u8) -> u64 {
    let (start, offset) = match number % 3 {
        0 => (COM1_PORT, number / 3 % 10),
        1 => (I8042_PORT, number / 3 % 7),
        _ => (ACPI_SLEEP_CONTROL_PORT, number / 3 % 5),
    };
    u64::from(start - 1) + u64::from(offset)
}

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let mut serial = Arc::new(Serial::new(irq(), Box::new(io::sink())));
    let mut ports = bus(&serial);
    while !input.is_empty() {
        match input.u8() % op::END {
            op::READ => {
                let (port, width) = (port(input.u8()), input.below(9));
                ports.read(port, &mut [0; 8][..width.into()]);
            }
            op::WRITE => {
                let (port, width) = (port(input.u8()), input.below(9));
                ports.write(port, &input.u64().to_le_bytes()[..width.into()]);
            }
            op::TYPE => {
                let bytes = input.block();
                let taken = serial.input(bytes).expect("an interrupt can be raised");
                assert!(taken <= bytes.len());
            }
            op::MOVE => {
                let state = serial.state();
                let moved = Serial::from_state(&state, irq(), Box::new(io::sink()));
                serial = Arc::new(moved.expect("what was saved can be taken on"));
                assert_eq!(serial.state(), state);
                ports = bus(&serial);
            }
            _ => {
                let state = postcard::from_bytes::<SerialState>(input.block());
                let Ok(state) = state else { return false };
                let taken = Serial::from_state(&state, irq(), Box::new(io::sink()));
                let Ok(taken) = taken else { return false };
                serial = Arc::new(taken);
                ports = bus(&serial);
            }
        }
    }
    let most = MAX_PENDING_INPUT_BYTES;
    while serial.input(&[b'x'; 1000]).expect("an interrupt can be raised") > 0 {}
    let state = postcard::to_allocvec(&serial.state()).expect("a state can be written");
    assert!(state.len() <= most + 200, "a console keeps at most {most} bytes");
    true
}

fn seeds() -> Vec<Vec<u8>> {
    let state = Serial::new(irq(), Box::new(io::sink())).state();
    let blob = postcard::to_allocvec(&state).expect("a state can be written");
    let each = (0..30).fold(Program::new(), |program, number| {
        let read = program.u8(op::READ).u8(number).u8(1);
        read.u8(op::WRITE).u8(number).u8(1).u64(u64::from(number) * 0x11)
    });
    // Interrupts on, a line typed, loopback, and all of it moved.
    let console = Program::new()
        .bytes(&[op::WRITE, 6, 1])
        .u64(0x0f)
        .u8(op::TYPE)
        .block(b"root\n")
        .bytes(&[op::READ, 3, 1, op::MOVE])
        .bytes(&[op::WRITE, 15, 1])
        .u64(0x10)
        .bytes(&[op::WRITE, 3, 1])
        .u64(0x41);
    let restored = Program::new().u8(op::RESTORE).block(&blob).u8(op::TYPE).block(&[7; 5000]);
    [each, console, restored].map(Program::finish).into()
}
