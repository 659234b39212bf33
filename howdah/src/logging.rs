//! Logs: to stderr, which is `vm.log` in a VM's own process; as text, as JSON, or to the journal.
//!
//! What belongs to a handoff carries its id as `trace`, on both sides (ADR 0029).

use std::{fmt, io, sync::OnceLock};

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// The environment variable that says the shape, to processes that are started too.
pub(crate) const VARIABLE: &str = "HOWDAH_LOG_FORMAT";

/// The shape of logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Lines for people
    #[default]
    Text,
    /// A JSON object a line, with time, level, fields and spans
    Json,
    /// Entries of the systemd journal with fields of their own; JSON where there is no journal
    Journal,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
            Self::Journal => "journal",
        })
    }
}

static CHOSEN: OnceLock<Format> = OnceLock::new();

/// What processes that this one starts are to log as.
pub(crate) fn chosen() -> Format {
    CHOSEN.get().copied().unwrap_or_default()
}

/// Starts logging; `HOWDAH_LOG` overrides `verbose`. A process that will be `confined` may not reach
/// the journal later, and logs JSON instead.
pub(crate) fn start(verbose: u8, format: Format, confined: bool) {
    let level = match verbose {
        0 => "warn",
        1 => "info,howdah=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("HOWDAH_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let format = *CHOSEN.get_or_init(|| format);
    let journal = match format {
        Format::Journal if !confined => tracing_journald::layer().ok(),
        _ => None,
    };
    let lines = match (&journal, format) {
        (Some(_), _) => None,
        (None, Format::Text) => Some(lines().boxed()),
        (None, Format::Json | Format::Journal) => {
            Some(lines().json().flatten_event(true).with_span_list(false).boxed())
        }
    };
    // A second start (tests) keeps the first.
    let _ = tracing_subscriber::registry().with(filter).with(journal).with(lines).try_init();
}

fn lines<S>() -> tracing_subscriber::fmt::Layer<
    S,
    tracing_subscriber::fmt::format::DefaultFields,
    tracing_subscriber::fmt::format::Format,
    fn() -> io::Stderr,
>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    tracing_subscriber::fmt::layer()
        .with_writer(io::stderr as fn() -> io::Stderr)
        // It would be told of with `eprintln!`, which panics where stderr cannot be written: a disk that
        // got full once took VMs with it, because their log was on it.
        .log_internal_errors(false)
        .with_ansi(false)
        .with_target(false)
}
