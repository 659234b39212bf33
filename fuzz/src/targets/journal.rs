//! An ownership record, a file of this host.
//!
//! A record that is read can be written again and is then the same; one that is damaged is an error,
//! never another record. Input: whether to reseal, and the file or what is in it.

use std::fs;

use handoff::{
    StateRoot,
    ownership::{
        Epoch, HandoffId, Journal, JournalError, Record, State, Tenure, VmId, answer, target,
    },
};

use super::{Origin, Target};
use crate::{
    input::{Input, Program},
    scratch::Scratch,
    world::QUESTION,
};

pub(super) const TARGET: Target =
    Target { name: "journal", from: Origin::File, run, seeds, max_len: 6000 };

/// Magic, version, and the length of what follows.
const HEADER_BYTES: usize = 12;

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let reseal = input.u8() & 1 == 1;
    let mut bytes = input.rest().to_vec();
    if reseal {
        let length = bytes.len().saturating_sub(HEADER_BYTES) as u16;
        if let Some(place) = bytes.get_mut(HEADER_BYTES - 2..HEADER_BYTES) {
            place.copy_from_slice(&length.to_le_bytes());
        }
        bytes.extend(*blake3::hash(&bytes).as_bytes());
    }
    let scratch = Scratch::new();
    let path = scratch.file("owner", &bytes);
    let Ok(mut journal) = Journal::open(&path) else { return false };
    let record = journal.record().cloned().expect("there is a file");
    let _ = (record.to_string(), record.may_run(), answer(Some(&record), QUESTION));
    let admitted = target::admit(Some(&record), QUESTION);
    assert!(!record.may_run() || admitted.is_err(), "a VM that may run here is not received");
    match journal.write(record.clone()) {
        Ok(()) => {}
        // A number can take more bytes in a file than it has to, never fewer.
        Err(e @ JournalError::Damaged { .. }) => panic!("what was read cannot be written: {e}"),
        Err(e) => panic!("a scratch file cannot be written: {e}"),
    }
    let again = Journal::open(&path).expect("what was written");
    assert_eq!(again.record(), Some(&record));
    true
}

fn records() -> Vec<Record> {
    let (handoff, root) = (HandoffId([2; 16]), StateRoot([3; 32]));
    let peer = || "b:7000".to_owned();
    let states = [
        State::Owner(Tenure::Settled),
        State::Owner(Tenure::Unconfirmed { handoff, peer: peer() }),
        State::Owner(Tenure::TakenOver { reason: "fire".into() }),
        State::HandingOff { handoff, peer: peer() },
        State::Committed { handoff, peer: peer(), root },
        State::Released { handoff, peer: peer() },
        State::Prepared { handoff, peer: peer(), root },
        State::Declined { handoff, reason: "no".into() },
        State::Receiving { handoff, peer: peer() },
    ];
    let of = |state| Record { vm: VmId([1; 16]), epoch: Epoch(1), state };
    states.into_iter().map(of).collect()
}

fn seeds() -> Vec<Vec<u8>> {
    let scratch = Scratch::new();
    let path = scratch.path().join("owner");
    let file = |record: Record| {
        let mut journal = Journal::open(&path).expect("a journal");
        journal.write(record).expect("a record");
        let bytes = fs::read(&path).expect("its file");
        fs::remove_file(&path).expect("its file");
        bytes
    };
    let files: Vec<Vec<u8>> = records().into_iter().map(file).collect();
    let raw = files.iter().take(1).map(|bytes| Program::new().u8(0).bytes(bytes).finish());
    let resealed = files.iter().map(|bytes| {
        let content = &bytes[..bytes.len() - blake3::OUT_LEN];
        Program::new().u8(1).bytes(content).finish()
    });
    raw.chain(resealed).collect()
}
