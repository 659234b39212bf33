//! Checksummed records on the guest's disk: what the guest was promised must be there.
//!
//! Fixed size, little endian, numbered from 1 without gaps. A record is *durable*, and its number
//! published, only after fsync returned: from then on it must survive whatever is done to the VM.
//!
//! ```text
//!   0 magic   8 seq   16 counter   24 realtime_ns   32 nonce   48 BLAKE3 of bytes 0..48, cut to 16
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::clock;
use crate::vitals::Vitals;

/// Bytes of one record on disk.
pub(crate) const RECORD_BYTES: usize = 64;
/// Records a second beyond which a wish is refused: no disk here fsyncs faster.
pub(crate) const MAX_RATE: u32 = 10_000;

const MAGIC: [u8; 8] = *b"HOWDREC1";
const SUM_AT: usize = 48;

/// One record's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) seq: u64,
    pub(crate) counter: u64,
    pub(crate) realtime_ns: i64,
    pub(crate) nonce: [u8; 16],
}

impl Record {
    pub(crate) fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.counter.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.realtime_ns.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.nonce);
        let sum = checksum(&bytes);
        bytes[SUM_AT..].copy_from_slice(&sum);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; RECORD_BYTES]) -> Result<Self, &'static str> {
        if bytes[0..8] != MAGIC {
            return Err(if bytes.iter().all(|&b| b == 0) { "all zero" } else { "bad magic" });
        }
        if bytes[SUM_AT..] != checksum(bytes) {
            return Err("bad checksum");
        }
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            word
        };
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&bytes[32..48]);
        Ok(Self {
            seq: u64::from_le_bytes(word(8)),
            counter: u64::from_le_bytes(word(16)),
            realtime_ns: i64::from_le_bytes(word(24)),
            nonce,
        })
    }
}

fn checksum(bytes: &[u8; RECORD_BYTES]) -> [u8; 16] {
    let mut sum = [0; 16];
    sum.copy_from_slice(&blake3::hash(&bytes[..SUM_AT]).as_bytes()[..16]);
    sum
}

/// What a records file holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Sound records, from the start of the file.
    pub(crate) records: u64,
    /// The number of the last sound record; 0 for none.
    pub(crate) last_seq: u64,
    /// Agent starts that wrote records: 1 unless the agent was started again.
    pub(crate) nonces: u64,
    /// Bytes of a record cut short at the end, which only a crash amid an append leaves.
    pub(crate) torn_bytes: u64,
    /// Whether every whole record is sound and none is missing.
    pub(crate) ok: bool,
    /// The first thing that is wrong.
    pub(crate) first_error: Option<String>,
}

/// Checks a records file from start to end.
pub(crate) fn verify_file(path: &Path) -> io::Result<Report> {
    verify(BufReader::new(File::open(path)?))
}

/// Checks records from start to end; stops at the first that is wrong.
pub(crate) fn verify(mut input: impl Read) -> io::Result<Report> {
    let mut report = Report::default();
    let mut last: Option<Record> = None;
    let mut bytes = [0; RECORD_BYTES];
    loop {
        let filled = fill(&mut input, &mut bytes)?;
        if filled < RECORD_BYTES {
            report.torn_bytes = filled as u64;
            break;
        }
        match Record::decode(&bytes).and_then(|record| follows(last.as_ref(), record)) {
            Ok(record) => {
                report.records += 1;
                report.last_seq = record.seq;
                report.nonces += u64::from(last.is_none_or(|l| l.nonce != record.nonce));
                last = Some(record);
            }
            Err(reason) => {
                let offset = report.records * RECORD_BYTES as u64;
                report.first_error =
                    Some(format!("record {} at byte {offset}: {reason}", report.records + 1));
                break;
            }
        }
    }
    report.ok = report.first_error.is_none();
    Ok(report)
}

fn follows(last: Option<&Record>, record: Record) -> Result<Record, &'static str> {
    if record.seq != last.map_or(0, |l| l.seq) + 1 {
        return Err("out of sequence");
    }
    match last {
        Some(last) if last.nonce == record.nonce && last.counter > record.counter => {
            Err("counter went back")
        }
        _ => Ok(record),
    }
}

fn fill(input: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < bytes.len() {
        match input.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// How fast the writer writes; 0 pauses it.
#[derive(Debug)]
pub(crate) struct Throttle {
    per_second: Mutex<u32>,
    changed: Condvar,
}

impl Throttle {
    pub(crate) fn new(per_second: u32) -> Self {
        Self { per_second: Mutex::new(per_second), changed: Condvar::new() }
    }

    pub(crate) fn set(&self, per_second: u32) {
        *self.per_second.lock().unwrap_or_else(PoisonError::into_inner) = per_second;
        self.changed.notify_all();
    }

    /// Waits until the next record is due after one written at `last`.
    fn wait_due(&self, last: Instant) {
        let mut rate = self.per_second.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if *rate == 0 {
                rate = self.changed.wait(rate).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let period = Duration::from_secs(1) / *rate;
            let Some(left) = period.checked_sub(last.elapsed()).filter(|l| !l.is_zero()) else {
                return;
            };
            rate = self.changed.wait_timeout(rate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Appends records to a file, each made durable before the next.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
    next_seq: u64,
}

impl Writer {
    /// Opens the file, or makes it; goes on after its last sound record.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let found = verify(BufReader::new(&file))?;
        if let Some(error) = found.first_error {
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        // A torn tail was never durable: the next record takes its place.
        let end = found.records * RECORD_BYTES as u64;
        file.set_len(end)?;
        file.seek(SeekFrom::Start(end))?;
        Ok(Self { file, next_seq: found.last_seq + 1 })
    }

    /// Writes one record and publishes its number once it is durable.
    fn append(&mut self, vitals: &Vitals) -> io::Result<()> {
        let record = Record {
            seq: self.next_seq,
            counter: vitals.counter.load(Ordering::Acquire),
            realtime_ns: clock::realtime_ns(),
            nonce: vitals.nonce(),
        };
        let at = (self.next_seq - 1) * RECORD_BYTES as u64;
        // Seek, so that a write that failed half way is written over by the next attempt.
        self.file.seek(SeekFrom::Start(at))?;
        self.file.write_all(&record.encode())?;
        self.file.sync_all()?;
        vitals.durable_seq.store(self.next_seq, Ordering::Release);
        self.next_seq += 1;
        Ok(())
    }

    /// Writes for as long as the agent lives. A failed write is counted and tried again.
    pub(crate) fn run(mut self, vitals: &Vitals, throttle: &Throttle) -> ! {
        vitals.durable_seq.store(self.next_seq - 1, Ordering::Release);
        let mut last = Instant::now();
        loop {
            throttle.wait_due(last);
            last = Instant::now();
            if let Err(error) = self.append(vitals) {
                if vitals.write_errors.fetch_add(1, Ordering::AcqRel) == 0 {
                    eprintln!("howdah-agent: record {} not written: {error}", self.next_seq);
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vitals::Identity;

    fn record(seq: u64) -> Record {
        Record { seq, counter: seq * 3, realtime_ns: -5, nonce: [7; 16] }
    }

    fn file_of(records: impl IntoIterator<Item = u64>) -> Vec<u8> {
        records.into_iter().flat_map(|seq| record(seq).encode()).collect()
    }

    #[test]
    fn sound_records_verify() {
        let report = verify(&file_of(1..=9)[..]).unwrap();
        let expected = Report { records: 9, last_seq: 9, nonces: 1, ok: true, ..Report::default() };
        assert_eq!(report, expected);
        assert!(verify(&[][..]).unwrap().ok);
    }

    #[test]
    fn a_missing_record_is_found() {
        let report = verify(&file_of([1, 2, 4])[..]).unwrap();
        assert_eq!((report.ok, report.last_seq), (false, 2));
        assert_eq!(report.first_error.unwrap(), "record 3 at byte 128: out of sequence");
    }

    #[test]
    fn a_counter_that_goes_back_is_found() {
        let mut file = file_of([1]);
        file.extend(Record { seq: 2, counter: 2, ..record(2) }.encode());
        assert!(!verify(&file[..]).unwrap().ok);
    }

    #[test]
    fn a_torn_tail_is_named_and_harmless() {
        let file = file_of(1..=3);
        let report = verify(&file[..file.len() - 1]).unwrap();
        assert_eq!((report.ok, report.last_seq, report.torn_bytes), (true, 2, 63));
    }

    #[test]
    fn a_block_of_zeros_is_not_a_record() {
        let mut file = file_of(1..=3);
        file.extend([0; RECORD_BYTES]);
        assert!(verify(&file[..]).unwrap().first_error.unwrap().ends_with("all zero"));
    }

    #[test]
    fn a_writer_goes_on_where_the_last_one_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records");
        for (nonce, expected) in [([1; 16], 3), ([2; 16], 6)] {
            let vitals = Vitals::new(Identity { boot_id: String::new(), nonce });
            let mut writer = Writer::open(&path).unwrap();
            for _ in 0..3 {
                writer.append(&vitals).unwrap();
            }
            assert_eq!(vitals.durable_seq.into_inner(), expected);
            writer.file.write_all(b"torn").unwrap();
        }
        let report = verify_file(&path).unwrap();
        assert_eq!((report.last_seq, report.nonces, report.torn_bytes), (6, 2, 4));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_found(bit in 0..RECORD_BYTES * 8 * 3) {
            let mut file = file_of(1..=3);
            file[bit / 8] ^= 1 << (bit % 8);
            let report = verify(&file[..]).unwrap();
            prop_assert!(!report.ok);
            prop_assert_eq!(report.records, (bit / 8 / RECORD_BYTES) as u64);
        }
    }
}
