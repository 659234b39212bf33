//! One id through a handoff: what either side logs of it can be found by what its report says.
#![allow(clippy::unwrap_used)]

mod sim;

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex},
};

use handoff::engine::SendOutcome;
use sim::{HostFaults, pair::pair};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

/// Log lines, kept.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[test]
fn both_sides_log_the_id_that_the_report_has() {
    let lines = Lines::default();
    let filter = EnvFilter::new("handoff=info,handoff::step=debug");
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(lines.clone())
        .init();
    let mut pair = pair(&[], HostFaults::default(), 200);
    let SendOutcome::Moved { report, .. } = pair.send() else { panic!("not moved") };
    drop(pair.connect);
    assert!(pair.target.join().unwrap().iter().all(Result::is_ok));

    let log = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let steps: Vec<&str> = log.lines().filter(|line| line.contains("reached step=")).collect();
    assert!(steps.len() > 20, "{log}");
    let trace = format!("trace={}", report.handoff);
    for line in &steps {
        assert!(line.contains(&trace), "no {trace} in {line}");
    }
    let sides: BTreeSet<_> = steps
        .iter()
        .flat_map(|line| {
            ["source", "target"]
                .into_iter()
                .filter(|side| line.contains(&format!("side=\"{side}\"")))
        })
        .collect();
    assert_eq!(sides.len(), 2, "{log}");
}
