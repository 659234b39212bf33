//! `howdah save`: asks a VM's process to write it to a file.

use std::time::Duration;

use crate::{
    cli::SaveArgs,
    control::{Reply, Request, SaveRequest, client},
    failure::{Exit, Failure},
    home::Home,
    ops,
    output::{Output, bytes, shares},
    partial::Partial,
};

/// How long a save may take.
const SAVE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Runs `howdah save`.
pub(crate) fn run(args: SaveArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    let dir = home.existing(&args.vm)?;
    let file =
        std::path::absolute(&args.file).map_err(|e| Failure::file("write", &args.file, &e))?;
    let path = file.to_str().ok_or_else(|| {
        Failure::new(Exit::Usage, file.display(), "not a UTF-8 path", "choose another")
    })?;
    let request = SaveRequest {
        path: path.to_owned(),
        hold: args.stop,
        encode: args.encode.into(),
        pipeline: args.compress.into(),
    };
    // The file is there when it is whole and durable, or not at all; only then the guest may go.
    let written = Partial::beside(&file)?;
    let report = match client::fill(&dir, Request::Save(request), written.file(), SAVE_TIMEOUT)? {
        Reply::Saved(report) => report,
        _ => anyhow::bail!("VM {}: its process gave an answer that is none", dir.name()),
    };
    written.finish(&file)?;
    if args.stop {
        client::call(&dir, Request::Stop { force: false }, ops::vm::KEEP_TIMEOUT)?;
        ops::vm::await_exit(&dir, ops::vm::KEEP_TIMEOUT)?;
    }
    output.done(&report, |report| {
        let size = report.get("bytes").and_then(serde_json::Value::as_u64).unwrap_or_default();
        format!("VM {} is in {}: {}{}", args.vm, file.display(), bytes(size), shares(report))
    });
    Ok(())
}
