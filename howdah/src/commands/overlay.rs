//! `howdah overlay inspect`: what is in a file that `howdah save` wrote.

use std::{
    fs::File,
    io::{BufReader, IsTerminal},
    path::Path,
};

use handoff::{
    Space,
    engine::{self, saved::Inspection},
};
use serde::Serialize;

use crate::{
    failure::{Exit, Failure},
    offer::MachineOffer,
    output::{Output, bytes, table},
};

/// Reads are gathered into so many bytes.
const BUFFER_BYTES: usize = 1 << 20;

/// A file that is to be read from front to back.
pub(crate) fn open(path: &Path) -> Result<BufReader<File>, Failure> {
    let failed = |e: std::io::Error| Failure::file("read", path, &e);
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() || file.is_terminal() {
        let way_out = "name a file that `howdah save` wrote";
        return Err(Failure::new(Exit::Usage, path.display(), "it is no file", way_out));
    }
    Ok(BufReader::with_capacity(BUFFER_BYTES, file))
}

/// The machine in a file.
#[derive(Serialize)]
struct Machine {
    vcpus: u8,
    memory_mib: u64,
    mac: Option<String>,
    append: String,
}

#[derive(Serialize)]
struct Seen<'a> {
    #[serde(flatten)]
    file: &'a Inspection,
    machine: Machine,
}

/// Runs `howdah overlay inspect`. Reads all of the file, and so says too that it is whole.
pub(crate) fn inspect(path: &Path, output: Output) -> anyhow::Result<()> {
    let damaged = |e: &dyn std::fmt::Display| Failure::plain(Exit::Corrupt, path.display(), e);
    let file = engine::inspect(open(path)?).map_err(|e| damaged(&e))?;
    let machine = MachineOffer::decode(&file.machine).map_err(|e| damaged(&e))?;
    let profile = machine.profile;
    let machine = Machine {
        vcpus: profile.vcpus,
        memory_mib: profile.memory_bytes >> 20,
        mac: profile.mac.map(|mac| crate::mac::Mac(mac).to_string()),
        append: machine.append,
    };
    output.result(&Seen { file: &file, machine }, text);
    Ok(())
}

fn text(seen: &Seen) -> String {
    let Seen { file, machine } = seen;
    let network = machine.mac.as_deref().unwrap_or("no network");
    let mut lines = vec![
        format!("VM {}: {} vCPUs, {} MiB, {network}", file.vm, machine.vcpus, machine.memory_mib),
        format!("  base   {}", file.base),
    ];
    lines.extend(file.also.iter().map(|id| format!("  also   {id}")));
    lines.push(format!("  state  {}", file.root));
    lines.push(format!("  file   {}, {} segments, whole", bytes(file.bytes), file.segments));
    let rows: Vec<_> = file
        .classes
        .iter()
        .map(|tally| {
            let space = match tally.space {
                Space::Ram => "RAM",
                Space::Disk => "disk",
            };
            let chunks = tally.chunks.to_string();
            [space.to_owned(), tally.class.clone(), chunks, bytes(tally.bytes)]
        })
        .collect();
    lines.push(String::new());
    lines.push(table(["SPACE", "CLASS", "CHUNKS", "CARRIED"], &rows));
    let stage =
        |name: &str, (before, after): (u64, u64)| [name.to_owned(), bytes(before), bytes(after)];
    let rows = [stage("chunks", file.batch_bytes), stage("machine state", file.state_bytes)];
    lines.push(String::new());
    lines.push(table(["COMPRESS", "IN", "OUT"], &rows));
    let rows: Vec<_> = file
        .codecs
        .iter()
        .map(|of| {
            let segments = of.segments.to_string();
            [of.codec.clone(), segments, bytes(of.bytes_in), bytes(of.bytes_out)]
        })
        .collect();
    lines.push(String::new());
    lines.push(table(["CODEC", "SEGMENTS", "IN", "OUT"], &rows));
    lines.join("\n")
}
