//! The serial console: a 16550 UART on COM1.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use vm_superio::{Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;

/// Most console input that waits for the guest to read it.
pub const MAX_PENDING_INPUT_BYTES: usize = 4096;

/// What can go wrong with the console.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// A saved state that no console can have.
    #[error("saved serial state is not valid: {0}")]
    State(String),
    /// More input waits than a console keeps.
    #[error(
        "saved serial state holds {0} bytes of unread input, more than {MAX_PENDING_INPUT_BYTES}"
    )]
    TooMuchInput(usize),
    /// The interrupt line failed.
    #[error("cannot raise the serial interrupt: {0}")]
    Interrupt(#[source] io::Error),
}

/// The console's saved registers. Plain data: [`Serial::from_state`] checks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    pending_input: Vec<u8>,
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Output = Box<dyn Write + Send>;
type Uart = vm_superio::Serial<Irq, NoEvents, Output>;
type UartError = vm_superio::serial::Error<io::Error>;

struct Inner {
    uart: Uart,
    /// Input beyond the UART's FIFO.
    pending: VecDeque<u8>,
    /// Whether lost output has been reported: once is enough.
    output_failed: bool,
}

/// The serial console.
pub struct Serial {
    inner: Mutex<Inner>,
}

impl Serial {
    /// A console as after power-on. `irq` is its interrupt line; `output` gets what the guest
    /// prints, byte by byte on the vCPU's thread, so it should not block for long.
    pub fn new(irq: EventFd, output: Output) -> Self {
        Self::with(Uart::new(Irq(irq), output), VecDeque::new())
    }

    /// A console that goes on from a saved state. May raise its interrupt: the interrupt
    /// controllers must have been restored before.
    pub fn from_state(
        state: &SerialState,
        irq: EventFd,
        output: Output,
    ) -> Result<Self, SerialError> {
        if state.pending_input.len() > MAX_PENDING_INPUT_BYTES {
            return Err(SerialError::TooMuchInput(state.pending_input.len()));
        }
        let uart_state = vm_superio::SerialState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let uart =
            Uart::from_state(&uart_state, Irq(irq), NoEvents, output).map_err(|e| match e {
                UartError::Trigger(e) => SerialError::Interrupt(e),
                e => SerialError::State(e.to_string()),
            })?;
        Ok(Self::with(uart, state.pending_input.iter().copied().collect()))
    }

    fn with(uart: Uart, pending: VecDeque<u8>) -> Self {
        Self { inner: Mutex::new(Inner { uart, pending, output_failed: false }) }
    }

    /// The console's present state.
    pub fn state(&self) -> SerialState {
        let inner = self.lock();
        let uart = inner.uart.state();
        SerialState {
            baud_divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            pending_input: inner.pending.iter().copied().collect(),
        }
    }

    /// Types `bytes` at the console and returns how many it took: fewer when the guest does not
    /// read and [`MAX_PENDING_INPUT_BYTES`] wait already.
    pub fn input(&self, bytes: &[u8]) -> Result<usize, SerialError> {
        let mut inner = self.lock();
        let taken = bytes.len().min(MAX_PENDING_INPUT_BYTES - inner.pending.len());
        inner.pending.extend(&bytes[..taken]);
        inner.feed()?;
        Ok(taken)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every method leaves the registers consistent, whatever a writer that panicked did.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Moves pending input into the UART as far as it fits.
    fn feed(&mut self) -> Result<(), SerialError> {
        let room = self.uart.fifo_capacity().min(self.pending.len());
        if room == 0 {
            return Ok(());
        }
        let bytes: Vec<u8> = self.pending.iter().take(room).copied().collect();
        // In loopback mode the UART takes nothing: the input waits.
        let taken = self.uart.enqueue_raw_bytes(&bytes).map_err(|e| match e {
            UartError::Trigger(e) => SerialError::Interrupt(e),
            e => SerialError::State(e.to_string()),
        })?;
        self.pending.drain(..taken.min(room));
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [byte] = data else { return };
        let Ok(register) = u8::try_from(offset) else { return };
        let mut inner = self.lock();
        *byte = inner.uart.read(register);
        if register == 0
            && let Err(error) = inner.feed()
        {
            tracing::error!(%error, "serial input");
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[byte] = data else { return };
        let Ok(register) = u8::try_from(offset) else { return };
        let mut inner = self.lock();
        if let Err(error) = inner.uart.write(register, byte)
            && !std::mem::replace(&mut inner.output_failed, true)
        {
            tracing::warn!(%error, "serial output is lost from here on");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn eventfd() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0xff];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn prints() {
        let sink = Sink::default();
        let serial = Serial::new(eventfd(), Box::new(sink.clone()));
        serial.write(0, b"h");
        serial.write(0, b"i");
        serial.write(0, b"no"); // A UART register is a byte wide.
        assert_eq!(*sink.0.lock().unwrap(), b"hi");
    }

    #[test]
    fn input_beyond_the_fifo_waits_and_survives_a_move() {
        let irq = eventfd();
        let serial = Serial::new(irq.try_clone().unwrap(), Box::new(io::sink()));
        serial.write(1, &[1]); // Interrupt on received data.
        let typed: Vec<u8> = (0..200u8).collect();
        assert_eq!(serial.input(&typed).unwrap(), 200);
        assert_eq!(irq.read().unwrap(), 1);
        let head: Vec<u8> = (0..10).map(|_| read(&serial, 0)).collect();
        assert_eq!(head, typed[..10]);

        let moved = Serial::from_state(&serial.state(), eventfd(), Box::new(io::sink())).unwrap();
        assert_eq!(moved.state(), serial.state());
        let mut rest = Vec::new();
        while read(&moved, 5) & 1 != 0 {
            rest.push(read(&moved, 0));
        }
        assert_eq!(rest, typed[10..]);
    }

    #[test]
    fn input_is_bounded() {
        let serial = Serial::new(eventfd(), Box::new(io::sink()));
        let taken = serial.input(&[0; 3 * MAX_PENDING_INPUT_BYTES]).unwrap();
        assert_eq!(taken, MAX_PENDING_INPUT_BYTES);
        assert!(serial.input(&[0; 3 * MAX_PENDING_INPUT_BYTES]).unwrap() < 100);
        assert_eq!(serial.input(&[0]).unwrap(), 0);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(256))]

        /// Whatever a guest does to the port, and whoever types meanwhile, the console can be saved and
        /// goes on elsewhere: a guest must not be able to make itself immovable.
        #[test]
        fn any_access_leaves_a_state_that_can_be_moved(
            accesses in proptest::collection::vec(
                (0u64..10, 0usize..9, proptest::prelude::any::<u8>(), 0u8..3),
                0..200,
            ),
        ) {
            let serial = Serial::new(eventfd(), Box::new(io::sink()));
            for (offset, width, value, what) in accesses {
                match what {
                    0 => serial.write(offset, &[value; 8][..width.min(8)]),
                    1 => serial.read(offset, &mut [0; 8][..width.min(8)]),
                    _ => drop(serial.input(&vec![value; usize::from(value)])),
                }
            }
            let state = serial.state();
            let moved = Serial::from_state(&state, eventfd(), Box::new(io::sink()));
            proptest::prop_assert_eq!(moved.unwrap().state(), state);
        }
    }

    #[test]
    fn foreign_states_are_refused() {
        let serial = Serial::new(eventfd(), Box::new(io::sink()));
        let mut state = serial.state();
        state.fifo = vec![0; 1000];
        assert!(Serial::from_state(&state, eventfd(), Box::new(io::sink())).is_err());
        let mut state = serial.state();
        state.pending_input = vec![0; MAX_PENDING_INPUT_BYTES + 1];
        let refused = Serial::from_state(&state, eventfd(), Box::new(io::sink()));
        assert!(matches!(refused, Err(SerialError::TooMuchInput(4097))));
    }
}
