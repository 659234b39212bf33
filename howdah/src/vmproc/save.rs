//! A machine into a file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
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
    home::sync_parent,
};

/// Writes are gathered into so many bytes.
const BUFFER_BYTES: usize = 1 << 20;

/// Saves a paused machine. The file is there when it is whole and durable, or not at all.
pub(super) fn save(
    machine: &mut KvmMachine,
    request: &SaveRequest,
) -> Result<serde_json::Value, Failure> {
    let path = Path::new(&request.path);
    if path.exists() {
        let way_out = "name a file that does not";
        return Err(Failure::new(Exit::Failed, path.display(), "it exists", way_out));
    }
    let written = Partial::beside(path)?;
    let saved = write(machine, request, &written)?;
    written.finish(path)?;
    Ok(serde_json::to_value(&saved.report).unwrap_or_default())
}

fn write(machine: &mut KvmMachine, request: &SaveRequest, to: &Partial) -> Result<Saved, Failure> {
    let offer = machine.offer()?;
    // Other bases would have to be there when it is restored.
    let own: Arc<dyn BaseView> = machine.base.clone();
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, &to.file);
    let saved = engine::save(
        &mut machine.source,
        own.into(),
        machine.dir.name().as_ref(),
        &offer,
        request.encode.options(),
        &mut out,
        &MonotonicClock::default(),
    );
    let what = format!("VM {} is not saved", machine.dir.name());
    let saved = saved.map_err(|e| Failure::plain(Exit::Failed, what, e))?;
    out.flush().map_err(|e| Failure::file("write", &to.path, &e))?;
    Ok(saved)
}

/// A file under a name of its own, gone with this value unless it is finished.
struct Partial {
    path: PathBuf,
    file: File,
}

impl Partial {
    fn beside(path: &Path) -> Result<Self, Failure> {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}", std::process::id()));
        let partial = path.with_file_name(name);
        let mut options = OpenOptions::new();
        // Whoever reads it reads the guest's memory.
        let opened = options.write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let file = opened.map_err(|e| Failure::file("write", path, &e))?;
        Ok(Self { path: partial, file })
    }

    fn finish(self, path: &Path) -> Result<(), Failure> {
        let done = self
            .file
            .sync_all()
            .and_then(|()| fs::rename(&self.path, path))
            .and_then(|()| sync_parent(path));
        done.map_err(|e: io::Error| Failure::file("write", path, &e))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After it was finished there is nothing of this name.
        let _ = fs::remove_file(&self.path);
    }
}
