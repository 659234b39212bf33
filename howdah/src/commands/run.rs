//! `howdah vm run`.

use howdah_api::VmRunning;

use super::vm::say;
use crate::{
    cli::VmRunArgs,
    cloudlet::Cloudlet,
    ops,
    output::Output,
    vmproc::{self, End, Front, Origin},
};

/// Runs `howdah vm run`. In the foreground the VM is this very process, so that no daemon has a part in it.
pub(crate) fn run(
    args: VmRunArgs,
    cloudlet: &Cloudlet,
    output: Output,
    verbose: u8,
) -> anyhow::Result<()> {
    let warn = || vmproc::warn_of_slow_host(output);
    if args.detach {
        let running = cloudlet.run(&args, verbose, warn)?;
        say_running(output, &running);
        return Ok(());
    }
    let home = cloudlet.home();
    ops::run::prepare(&args, home)?;
    warn();
    let end = vmproc::run(&home.vm(&args.name), home, Front::Terminal, &args.jail)?;
    say(output, &args.name, if end == End::Stopped { "stopped" } else { "handed off" })
}

/// Says that a VM runs, and how it came to.
pub(crate) fn say_running(output: Output, running: &VmRunning) {
    output.done(running, |said| {
        let how = said.started.as_ref().map(|how| {
            let from = match how.from.as_str() {
                "kernel" => Origin::Kernel,
                "file" => Origin::File,
                _ => Origin::BaseMemory,
            };
            format!(", started in {} ms from {from}", how.started_ms)
        });
        format!("VM {} {}{}", said.vm, said.state.name(), how.unwrap_or_default())
    });
}
