//! Devices: the buses, legacy ports, and virtio over MMIO.
