//! The driver's side of a device, for tests.
