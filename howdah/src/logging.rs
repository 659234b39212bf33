//! Logs: to stderr, which is `vm.log` in a VM's own process.

use std::io;

use tracing_subscriber::EnvFilter;

/// Starts logging; `HOWDAH_LOG` overrides `verbose`.
pub(crate) fn start(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info,howdah=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("HOWDAH_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // It would be told of with `eprintln!`, which panics where stderr cannot be written: a disk that
        // got full once took VMs with it, because their log was on it.
        .log_internal_errors(false)
        .with_ansi(false)
        .with_target(false);
    // A second start (tests) keeps the first.
    let _ = log.try_init();
}
