//! What the agent's threads know about themselves, shared with whoever asks.

use std::fs;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::clock::{Reading, Watch};

/// Who this guest is: unchanged for as long as its RAM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The kernel's boot id: another one means that the guest was booted again.
    pub(crate) boot_id: String,
    /// Made at start and held only in RAM: another one means that RAM was not carried over.
    pub(crate) nonce: [u8; 16],
}

impl Identity {
    /// Reads the boot id and draws a nonce.
    pub(crate) fn establish() -> io::Result<Self> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Ok(Self { boot_id, nonce: draw_nonce()? })
    }
}

fn draw_nonce() -> io::Result<[u8; 16]> {
    let mut nonce = [0; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(nonce)
}

/// Counters that the agent's threads publish and the probe answers carry.
#[derive(Debug)]
pub(crate) struct Vitals {
    boot_id: String,
    nonce: Mutex<[u8; 16]>,
    /// Grows at every tick, in RAM only.
    pub(crate) counter: AtomicU64,
    pub(crate) clock: Watch,
    /// The last record known to be on the disk; 0 for none.
    pub(crate) durable_seq: AtomicU64,
    pub(crate) write_errors: AtomicU64,
    pub(crate) ram_errors: AtomicU64,
    pub(crate) ram_pages: AtomicU64,
    pub(crate) pages_dirtied: AtomicU64,
    pub(crate) pages_verified: AtomicU64,
    started: Reading,
}

/// The vital signs at one moment, as they go over the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) boot_id: String,
    pub(crate) nonce: String,
    pub(crate) counter: u64,
    pub(crate) durable_seq: u64,
    pub(crate) realtime_ns: i64,
    pub(crate) monotonic_ns: i64,
    pub(crate) clock_violations: u64,
    pub(crate) longest_tick_gap_ns: u64,
    pub(crate) write_errors: u64,
    pub(crate) ram_errors: u64,
    pub(crate) ram_pages: u64,
    pub(crate) pages_dirtied: u64,
    pub(crate) pages_verified: u64,
    pub(crate) uptime_ns: i64,
}

impl Vitals {
    pub(crate) fn new(identity: Identity) -> Self {
        Self {
            boot_id: identity.boot_id,
            nonce: Mutex::new(identity.nonce),
            counter: AtomicU64::new(0),
            clock: Watch::default(),
            durable_seq: AtomicU64::new(0),
            write_errors: AtomicU64::new(0),
            ram_errors: AtomicU64::new(0),
            ram_pages: AtomicU64::new(0),
            pages_dirtied: AtomicU64::new(0),
            pages_verified: AtomicU64::new(0),
            started: Reading::now(),
        }
    }

    /// The nonce that is held now.
    pub(crate) fn nonce(&self) -> [u8; 16] {
        *self.nonce.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws another nonce. Guests that resume from one snapshot hold the same one: a new one tells
    /// them apart from each other, and from the snapshot.
    pub(crate) fn renew_nonce(&self) -> io::Result<()> {
        let nonce = draw_nonce()?;
        *self.nonce.lock().unwrap_or_else(PoisonError::into_inner) = nonce;
        Ok(())
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let now = Reading::now();
        let get = |value: &AtomicU64| value.load(Ordering::Acquire);
        Snapshot {
            boot_id: self.boot_id.clone(),
            nonce: hex::encode(self.nonce()),
            counter: get(&self.counter),
            durable_seq: get(&self.durable_seq),
            realtime_ns: now.realtime_ns,
            monotonic_ns: now.monotonic_ns,
            clock_violations: self.clock.violations(),
            longest_tick_gap_ns: self.clock.longest_gap_ns(),
            write_errors: get(&self.write_errors),
            ram_errors: get(&self.ram_errors),
            ram_pages: get(&self.ram_pages),
            pages_dirtied: get(&self.pages_dirtied),
            pages_verified: get(&self.pages_verified),
            uptime_ns: now.monotonic_ns - self.started.monotonic_ns,
        }
    }
}
