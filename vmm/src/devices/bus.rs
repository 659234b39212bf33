//! An address space of devices: ports, or memory that is not RAM.

use std::{collections::BTreeMap, fmt, sync::Arc};

/// A device that answers reads and writes at offsets from where it was put.
///
/// vCPU threads call at once and at any time, so the device locks what it must. `data` has the
/// width of the guest's access, 1 to 8 bytes; offset and width come from the guest, so a device
/// answers every combination.
pub trait BusDevice: Send + Sync {
    /// Answers a guest's read. `data` holds ones before the call.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes a guest's write.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device cannot be put on a bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("device range of {len:#x} at {start:#x} is empty or passes the end of the bus")]
    Range {
        /// First address.
        start: u64,
        /// Length.
        len: u64,
    },
    /// Another device is there.
    #[error(
        "device range of {len:#x} at {start:#x} overlaps the device at {other_start:#x} of {other_len:#x}"
    )]
    Overlap {
        /// First address.
        start: u64,
        /// Length.
        len: u64,
        /// First address of the device already there.
        other_start: u64,
        /// Its length.
        other_len: u64,
    },
}

struct Entry {
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Which device answers which range. Built once, then shared by the vCPUs.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, Entry>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.devices.iter().map(|(start, e)| (start, e.len))).finish()
    }
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `start`.
    pub fn insert(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|more| start.checked_add(more))
            .ok_or(BusError::Range { start, len })?;
        if let Some((&other_start, other)) = self.devices.range(..=last).next_back()
            && other_start + (other.len - 1) >= start
        {
            return Err(BusError::Overlap { start, len, other_start, other_len: other.len });
        }
        self.devices.insert(start, Entry { len, device });
        Ok(())
    }

    /// Answers a read; addresses without a device read as ones. Says whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        device.read(offset, data);
        true
    }

    /// Passes a write on; one to an address without a device is dropped. Says whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        device.write(offset, data);
        true
    }

    /// The device that holds the whole access, and the access's offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(u64, &dyn BusDevice)> {
        let (&start, entry) = self.devices.range(..=address).next_back()?;
        let offset = address - start;
        let inside = offset.checked_add(len as u64)? <= entry.len;
        inside.then_some((offset, entry.device.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn routes_by_range() {
        let (a, b) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let mut bus = Bus::new();
        bus.insert(0x10, 8, a.clone()).unwrap();
        bus.insert(0x18, 8, b.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x12, &mut data));
        assert_eq!(data, [2, 2]);
        assert!(bus.read(0x1a, &mut data));
        assert_eq!(data, [2, 2]);
        for unknown in [0, 0xf, 0x17, 0x1f, 0x20, u64::MAX] {
            assert!(!bus.read(unknown, &mut data), "{unknown:#x}");
            assert_eq!(data, [0xff; 2]);
            assert!(!bus.write(unknown, &[1, 2]));
        }
        assert!(bus.write(0x1e, &[1, 2]));
        assert!(a.0.lock().unwrap().is_empty());
        assert_eq!(*b.0.lock().unwrap(), [(6, vec![1, 2])]);
    }

    #[test]
    fn ranges_that_cannot_be() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::new();
        bus.insert(0x10, 0x10, device.clone()).unwrap();
        for (start, len) in [(0x10, 1), (0x1f, 1), (0, 0x11), (0, 0x100), (0x18, 0x100)] {
            let err = bus.insert(start, len, device.clone()).unwrap_err();
            assert!(matches!(err, BusError::Overlap { other_start: 0x10, .. }), "{err}");
        }
        for (start, len) in [(0, 0), (u64::MAX, 2)] {
            let err = bus.insert(start, len, device.clone()).unwrap_err();
            assert_eq!(err, BusError::Range { start, len });
        }
        bus.insert(u64::MAX, 1, device.clone()).unwrap();
        bus.insert(0x20, 1, device).unwrap();
    }
}
