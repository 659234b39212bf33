//! What the driver asks of a disk, parsed and checked.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{MAX_RANGE_SECTORS, MAX_RANGES, MAX_REQUEST_BYTES, SECTOR_BYTES};
use crate::{
    devices::virtio::{buffers::Buffers, device::DeviceError, queue::Chain},
    memory::GuestRam,
};

const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;

/// A byte range of the disk that lies inside it and begins and ends on sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Fill the data buffers from here on.
    Read(ByteRange),
    /// Write the data buffers here.
    Write(ByteRange),
    /// Make all completed writes durable.
    Flush,
    /// Tell the disk's name.
    GetId,
    /// The content does not matter any more.
    Discard(Vec<ByteRange>),
    /// Make zero.
    WriteZeroes(Vec<ByteRange>),
    /// Answer with this status and do nothing.
    Refuse(u8),
}

/// A request that can be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) head: u16,
    pub(super) operation: Operation,
    /// What is read or written, without header and status.
    pub(super) data: Buffers,
    /// One byte.
    pub(super) status: Buffers,
}

impl Request {
    /// Parses a chain. One that cannot even take a status breaks the device; any other mistake
    /// becomes [`Operation::Refuse`].
    pub(super) fn parse(
        chain: Chain,
        ram: &GuestRam,
        disk_bytes: u64,
    ) -> Result<Self, DeviceError> {
        let Chain { head, readable, writable } = chain;
        let status_at = writable
            .len()
            .checked_sub(1)
            .ok_or(DeviceError::Request("a disk request without room for its status"))?;
        let status = writable.slice(status_at, 1);
        let mut header = [0; HEADER_BYTES as usize];
        if readable.read_at(ram, 0, &mut header)? != header.len() {
            let operation = Operation::Refuse(VIRTIO_BLK_S_IOERR as u8);
            return Ok(Self { head, operation, data: Buffers::default(), status });
        }
        let (kind, sector) = (le32(&header, 0), le64(&header, 8));
        let to_device = readable.slice(HEADER_BYTES, u64::MAX);
        let from_device = writable.slice(0, status_at);
        let (operation, data) = match kind {
            VIRTIO_BLK_T_IN => {
                (transfer(sector, &from_device, disk_bytes).map(Operation::Read), from_device)
            }
            VIRTIO_BLK_T_OUT => {
                (transfer(sector, &to_device, disk_bytes).map(Operation::Write), to_device)
            }
            VIRTIO_BLK_T_FLUSH => (Ok(Operation::Flush), Buffers::default()),
            VIRTIO_BLK_T_GET_ID => {
                // All of the data counts as written, so it ends where the name does.
                let name = from_device.slice(0, VIRTIO_BLK_ID_BYTES.into());
                (Ok(Operation::GetId), name)
            }
            VIRTIO_BLK_T_DISCARD => {
                let ranges = ranges(&to_device, ram, disk_bytes, 0)?;
                (ranges.map(Operation::Discard), Buffers::default())
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let ranges = ranges(&to_device, ram, disk_bytes, flags)?;
                (ranges.map(Operation::WriteZeroes), Buffers::default())
            }
            _ => (Err(Refusal::Unsupported), Buffers::default()),
        };
        let operation = operation.unwrap_or_else(|refusal| Operation::Refuse(refusal.status()));
        Ok(Self { head, operation, data, status })
    }
}

/// Why a request is answered without doing anything.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    Invalid,
    Unsupported,
}

impl Refusal {
    fn status(self) -> u8 {
        match self {
            Self::Invalid => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

fn transfer(sector: u64, data: &Buffers, disk_bytes: u64) -> Result<ByteRange, Refusal> {
    if data.is_empty() || !data.len().is_multiple_of(SECTOR_BYTES) || data.len() > MAX_REQUEST_BYTES
    {
        return Err(Refusal::Invalid);
    }
    range(sector, data.len(), disk_bytes)
}

fn range(sector: u64, len: u64, disk_bytes: u64) -> Result<ByteRange, Refusal> {
    let start = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Invalid)?;
    let end = start.checked_add(len).ok_or(Refusal::Invalid)?;
    if end <= disk_bytes { Ok(ByteRange { start, end }) } else { Err(Refusal::Invalid) }
}

/// The ranges of a discard or write-zeroes request. The outer error is of guest memory.
fn ranges(
    data: &Buffers,
    ram: &GuestRam,
    disk_bytes: u64,
    known_flags: u32,
) -> Result<Result<Vec<ByteRange>, Refusal>, DeviceError> {
    let count = data.len() / RANGE_BYTES;
    if !data.len().is_multiple_of(RANGE_BYTES) || !(1..=u64::from(MAX_RANGES)).contains(&count) {
        return Ok(Err(Refusal::Invalid));
    }
    let mut out = Vec::with_capacity(count as usize);
    for index in 0..count {
        let mut entry = [0; RANGE_BYTES as usize];
        data.read_at(ram, index * RANGE_BYTES, &mut entry)?;
        let (sector, sectors, flags) = (le64(&entry, 0), le32(&entry, 8), le32(&entry, 12));
        if flags & !known_flags != 0 {
            return Ok(Err(Refusal::Unsupported));
        }
        if sectors > MAX_RANGE_SECTORS {
            return Ok(Err(Refusal::Invalid));
        }
        match range(sector, u64::from(sectors) * SECTOR_BYTES, disk_bytes) {
            Ok(range) => out.push(range),
            Err(refusal) => return Ok(Err(refusal)),
        }
    }
    Ok(Ok(out))
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
