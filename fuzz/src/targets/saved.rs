//! Saved VMs: a file with the stream of a handoff in it.
//!
//! A VM that is restored holds what the file's root says, its machine is loaded and it does not run;
//! of any other file nothing stays. What is restored can also be described. Input: 0 and a file,
//! or 1, a head and records to seal as `docs/formats.md` has it.

use handoff::{
    Offer, Refusal, StateRoot, TargetHost,
    engine::{inspect, restore},
    sim::{MemHost, MemTarget},
    stage::{Sealer, SegmentKind},
    vm::Prepared,
};

use super::{Origin, Target, batch};
use crate::{
    input::{Input, Program},
    model::{Model, packed},
    world::{GEOMETRY, bases, offer, root_of},
};

pub(super) const TARGET: Target =
    Target { name: "saved", from: Origin::File, run, seeds, max_len: 64 << 10 };

const HEAD_CONTEXT: &str = "howdah 2026 saved-vm head v1";
const END_CONTEXT: &str = "howdah 2026 saved-vm end v1";

/// Has room for one size of guest.
struct Host(MemHost);

impl TargetHost for Host {
    type Vm = MemTarget;

    fn prepare(&mut self, offer: &Offer) -> Result<Prepared<MemTarget>, Refusal> {
        if offer.geometry != GEOMETRY {
            return Err(Refusal::Other("a guest of another size".into()));
        }
        self.0.prepare(offer)
    }
}

fn run(data: &[u8]) -> bool {
    let mut input = Input::new(data);
    let file = match input.u8() & 1 {
        0 => input.rest().to_vec(),
        _ => sealed(&mut input),
    };
    let described = inspect(&file[..]);
    let Ok(mut restored) = restore(&mut Host(MemHost::new(bases())), &file[..]) else {
        return false;
    };
    let described = described.expect("what can be restored can be described");
    assert_eq!(described.root, restored.table.root().to_string());
    assert_eq!(restored.table.root(), root_of(&restored.vm));
    assert!(restored.vm.state().is_some() && !restored.vm.is_running());
    assert_eq!(restored.bytes, file.len() as u64);
    true
}

/// Writes the file, with the hashes that belong into it. Records: 0 a segment of chunks, 1 one of
/// the machine's state, each with codec, body length and payload; 2 a segment sealed for another
/// file; else the end, with the right root or another.
fn sealed(input: &mut Input<'_>) -> Vec<u8> {
    let head = input.block();
    let mut file = b"howdah/s".to_vec();
    file.extend(2u32.to_le_bytes());
    file.extend((head.len() as u32).to_le_bytes());
    file.extend(head);
    let id = blake3::derive_key(HEAD_CONTEXT, &file);
    file.extend(id);
    let mut sealer = Sealer::new(&id);
    let mut model = Model::new();
    let mut chain = [0; 32];
    while !input.is_empty() {
        let what = input.u8() % 4;
        if what == 3 {
            let root = if input.u8() & 1 == 0 { model.root() } else { StateRoot([3; 32]) };
            file.push(2);
            file.extend(sealer.last_seq().to_le_bytes());
            file.extend(root.0);
            let mut seal = blake3::Hasher::new_derive_key(END_CONTEXT);
            seal.update(&chain).update(&sealer.last_seq().to_le_bytes()).update(&root.0);
            file.extend(*seal.finalize().as_bytes());
            continue;
        }
        let kind = if what == 1 { SegmentKind::MachineState } else { SegmentKind::Chunks };
        let packed = packed(input);
        let segment = match what {
            2 => Sealer::new(b"another").seal(1, kind, packed),
            _ => sealer.seal(1, kind, packed),
        };
        chain = segment.chain;
        model.apply(&segment);
        file.push(1);
        file.extend((segment.encoded_len() as u32).to_le_bytes());
        segment.encode_into(&mut file);
    }
    file
}

fn seeds() -> Vec<Vec<u8>> {
    let head = postcard::to_allocvec(&offer()).expect("a sound offer");
    let raw = |program: Program, kind: u8, body: &[u8]| program.u8(kind).u8(0).u32(0).block(body);
    let begin = || Program::new().u8(1).block(&head);
    let state = |program| raw(program, 1, b"the machine's state");
    let small = state(begin()).u8(3).u8(0).finish();
    let whole = batch::bodies().iter().fold(begin(), |program, body| raw(program, 0, body));
    let whole = state(whole).u8(3).u8(0).finish();
    let plain = |program: &[u8]| {
        let file = sealed(&mut Input::new(&program[1..]));
        Program::new().u8(0).bytes(&file).finish()
    };
    vec![plain(&small), small, plain(&whole), whole]
}
