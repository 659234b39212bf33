//! The service inside the guest: its threads and what they share.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use thiserror::Error;

use crate::args::RunOptions;
use crate::ballast::Ballast;
use crate::gauge::Gauge;
use crate::ram::{LoadError, Ram};
use crate::records::{Throttle, Writer};
use crate::vitals::{Identity, Vitals};
use crate::workloads::Workloads;
use crate::{commands, probe};

/// How the line begins that says, on the console, that the workload is up. `howdah base build --boot`
/// takes its snapshot after such a line.
const READY: &str = "howdah: ready";

/// Everything the threads share.
pub(crate) struct Agent {
    pub(crate) vitals: Vitals,
    pub(crate) throttle: Throttle,
    pub(crate) ram: Ram,
    pub(crate) records_path: PathBuf,
    pub(crate) ballast: Ballast,
    pub(crate) workloads: Workloads,
    pub(crate) gauge: Gauge,
}

/// Why the agent cannot start.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    #[error("cannot read who this guest is: {0}")]
    Identity(#[source] io::Error),
    #[error("cannot use {}: {source}", path.display())]
    Records { path: PathBuf, source: io::Error },
    #[error("cannot listen on {protocol} port {port}: {source}")]
    Listen { protocol: &'static str, port: u16, source: io::Error },
    #[error("cannot start thread {name}: {source}")]
    Thread { name: &'static str, source: io::Error },
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Starts every thread, says so on the console, and ticks for as long as the guest lives.
pub(crate) fn run(options: &RunOptions) -> Result<(), ServeError> {
    let identity = Identity::establish().map_err(ServeError::Identity)?;
    let ready =
        format!("{READY} boot_id={} nonce={}", identity.boot_id, hex::encode(identity.nonce));
    let records_path = options.data.join("records");
    let writer = open_records(&options.data, &records_path)?;
    let probes = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, probe::PORT))
        .map_err(|source| ServeError::Listen { protocol: "UDP", port: probe::PORT, source })?;
    let lines = TcpListener::bind((Ipv4Addr::UNSPECIFIED, commands::PORT))
        .map_err(|source| ServeError::Listen { protocol: "TCP", port: commands::PORT, source })?;

    let agent = Arc::new(Agent {
        vitals: Vitals::new(identity),
        throttle: Throttle::new(options.write_rate),
        ram: Ram::new(),
        records_path,
        ballast: Ballast::new(&options.data),
        workloads: Workloads::default(),
        gauge: Gauge::default(),
    });
    agent.ram.set(options.load, &agent.vitals)?;

    start("records", &agent, move |agent| writer.run(&agent.vitals, &agent.throttle))?;
    start("ram", &agent, |agent| agent.ram.run(&agent.vitals))?;
    start("probe", &agent, move |agent| probe::serve(&probes, &agent.vitals))?;
    start("commands", &agent, move |agent| commands::serve(&lines, agent))?;
    // Whoever takes a snapshot now shall find on the disk what the guest has written.
    nix::unistd::sync();
    // A console that takes nothing is no reason to stop.
    let _ = crate::say(&ready);
    tick(&agent.vitals, options.tick)
}

fn open_records(dir: &Path, path: &Path) -> Result<Writer, ServeError> {
    std::fs::create_dir_all(dir)
        .and_then(|()| Writer::open(path))
        .map_err(|source| ServeError::Records { path: path.to_owned(), source })
}

fn start(
    name: &'static str,
    agent: &Arc<Agent>,
    work: impl FnOnce(&Arc<Agent>) + Send + 'static,
) -> Result<(), ServeError> {
    let agent = Arc::clone(agent);
    thread::Builder::new()
        .name(name.into())
        .spawn(move || work(&agent))
        .map(|_| ())
        .map_err(|source| ServeError::Thread { name, source })
}

/// Counts, and looks at the clocks, at every tick.
fn tick(vitals: &Vitals, period: Duration) -> ! {
    loop {
        vitals.clock.look();
        vitals.counter.fetch_add(1, Ordering::AcqRel);
        thread::sleep(period);
    }
}
