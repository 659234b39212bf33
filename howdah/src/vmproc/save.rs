//! A machine into a file.

use std::{
    io::{BufWriter, Write},
    path::Path,
    sync::Arc,
};

use handoff::{
    BaseView,
    engine::{self, saved::Saved},
    tcp::MonotonicClock,
};

use super::kvm::KvmMachine;
use crate::{
    control::SaveRequest,
    failure::{Exit, Failure},
    partial::Partial,
};

/// Writes are gathered into so many bytes.
const BUFFER_BYTES: usize = 1 << 20;

/// Saves a paused machine. The file is there when it is whole and durable, or not at all.
pub(super) fn save(
    machine: &mut KvmMachine,
    request: &SaveRequest,
) -> Result<serde_json::Value, Failure> {
    let path = Path::new(&request.path);
    let written = Partial::beside(path)?;
    let saved = write(machine, request, &written)?;
    written.finish(path)?;
    Ok(serde_json::to_value(&saved.report).unwrap_or_default())
}

fn write(machine: &mut KvmMachine, request: &SaveRequest, to: &Partial) -> Result<Saved, Failure> {
    let offer = machine.offer()?;
    // Other bases would have to be there when it is restored.
    let own: Arc<dyn BaseView> = machine.base.clone();
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, to.file());
    let saved = engine::save(
        &mut machine.source,
        own.into(),
        machine.dir.name().as_ref(),
        &offer,
        request.encode.options(),
        request.pipeline.options(),
        &mut out,
        &MonotonicClock::default(),
    );
    let what = format!("VM {} is not saved", machine.dir.name());
    let saved = saved.map_err(|e| Failure::plain(Exit::Failed, what, e))?;
    out.flush().map_err(|e| Failure::file("write", to.path(), &e))?;
    Ok(saved)
}
