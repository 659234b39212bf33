//! A machine into a file.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    sync::Arc,
};

use handoff::{BaseView, engine, tcp::MonotonicClock};

use super::kvm::KvmMachine;
use crate::{
    control::SaveRequest,
    failure::{Exit, Failure},
};

/// Writes are gathered into so many bytes.
const BUFFER_BYTES: usize = 1 << 20;

/// Saves a paused machine into an empty file; the report.
pub(super) fn save(
    machine: &mut KvmMachine,
    request: &SaveRequest,
    to: &File,
) -> Result<serde_json::Value, Failure> {
    let offer = machine.offer()?;
    // Other bases would have to be there when it is restored.
    let own: Arc<dyn BaseView> = machine.base.clone();
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, to);
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
    out.flush().map_err(|e| Failure::file("write", Path::new(&request.path), &e))?;
    Ok(serde_json::to_value(&saved.report).unwrap_or_default())
}
