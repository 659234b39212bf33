//! Who does what a command asks: the cloudlet's daemon where one runs, or else the command itself; or the
//! daemon of a peer, if that is meant (`--cloudlet`).
//!
//! All do it by the same verbs (`crate::ops`), and the answers are of the same types (`howdah_api`), so that
//! what is printed does not tell one from the other.

use howdah_api::{
    At, Base, BasesCollected, BasesGc, Client, ClientError, Operation, Peer, PeerSpec, Pinged,
    Problem, SOCKET, State, Vm, VmRun, VmRunning,
};

use crate::{
    cli::VmRunArgs,
    failure::{Exit, Failure},
    home::{Home, VmName},
    ops,
    peers::{Remote, identity},
};

/// If it is set, commands do by themselves what they are asked.
const DIRECT: &str = "HOWDAH_DIRECT";
/// How long one look at an operation waits.
const WAIT_S: u32 = 30;

/// A cloudlet, by whoever answers for it.
#[derive(Debug)]
pub(crate) struct Cloudlet<'a> {
    home: &'a Home,
    by: By,
}

#[derive(Debug)]
enum By {
    /// This process.
    Itself,
    /// The daemon of this home.
    Daemon(Client),
    /// The daemon of a peer.
    Peer(Client),
}

impl<'a> Cloudlet<'a> {
    /// That of this home, or the peer that is named.
    pub(crate) fn meant(home: &'a Home, peer: Option<&str>) -> Result<Self, Failure> {
        let Some(peer) = peer else { return Ok(Self::of(home)) };
        let by = By::Peer(Client::over(Remote::find(home, peer)?.shared()));
        Ok(Self { home, by })
    }

    /// That of this home, by its daemon, if one answers.
    fn of(home: &'a Home) -> Self {
        let client = Client::new(home.root().join(SOCKET));
        let wanted = std::env::var_os(DIRECT).is_none_or(|value| value.is_empty());
        let by = if wanted && client.answers() { By::Daemon(client) } else { By::Itself };
        Self { home, by }
    }

    /// The daemon, if there is one.
    pub(crate) fn daemon(&self) -> Option<&Client> {
        match &self.by {
            By::Itself => None,
            By::Daemon(client) | By::Peer(client) => Some(client),
        }
    }

    /// The daemon of a peer, if that is meant.
    pub(crate) fn elsewhere(&self) -> Option<&Client> {
        match &self.by {
            By::Peer(client) => Some(client),
            By::Itself | By::Daemon(_) => None,
        }
    }

    /// The home of this host's cloudlet: that of a peer is not here.
    pub(crate) fn home(&self) -> &'a Home {
        self.home
    }

    /// Every VM.
    pub(crate) fn vms(&self) -> Result<Vec<Vm>, Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.vms()?),
            None => ops::vm::list(self.home),
        }
    }

    /// One VM.
    pub(crate) fn vm(&self, name: &VmName) -> Result<Vm, Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.vm(name.as_ref())?),
            None => Ok(ops::vm::look(&self.home.existing(name)?)),
        }
    }

    /// Runs a VM in the background; `ready` is called when nothing is wrong with what was asked.
    pub(crate) fn run(
        &self,
        args: &VmRunArgs,
        verbose: u8,
        ready: impl FnOnce(),
    ) -> Result<VmRunning, Failure> {
        match self.daemon() {
            Some(daemon) => {
                let running = daemon.run(&VmRun::from(args))?;
                ready();
                Ok(running)
            }
            None => {
                ops::run::prepare(args, self.home)?;
                ready();
                ops::run::launch(args, self.home, verbose)
            }
        }
    }

    /// Stops the vCPUs of a VM.
    pub(crate) fn pause(&self, name: &VmName) -> Result<(), Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.pause(name.as_ref()).map(drop)?),
            None => ops::vm::pause(&self.home.existing(name)?),
        }
    }

    /// Lets a VM go on.
    pub(crate) fn resume(&self, name: &VmName) -> Result<(), Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.resume(name.as_ref()).map(drop)?),
            None => ops::vm::resume(&self.home.existing(name)?),
        }
    }

    /// Flushes a VM's disk and ends it.
    pub(crate) fn stop(&self, name: &VmName, force: bool) -> Result<(), Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.stop(name.as_ref(), force).map(drop)?),
            None => ops::vm::stop(&self.home.existing(name)?, force),
        }
    }

    /// Removes a VM, which must be there.
    pub(crate) fn remove(&self, name: &VmName) -> Result<(), Failure> {
        match self.daemon() {
            Some(daemon) => {
                // The API is content with a VM that is gone already; who typed its name is not.
                daemon.vm(name.as_ref())?;
                Ok(daemon.remove(name.as_ref())?)
            }
            None => ops::vm::remove(&self.home.existing(name)?, self.home),
        }
    }

    /// Asks a peer how it is.
    pub(crate) fn ping(&self, peer: &str) -> Result<Pinged, Failure> {
        if let Some(daemon) = self.elsewhere() {
            // What is a peer's name there is looked up there.
            let (name, address) = match peer.split_once('@') {
                Some((name, address)) => (name, Some(address)),
                None => (peer, None),
            };
            return Ok(daemon.ping_peer(name, address)?);
        }
        let ping = ops::ping::find(peer, self.home)?;
        match self.daemon().zip(ping.place()) {
            Some((daemon, (name, address))) => Ok(daemon.ping_peer(name, Some(address))?),
            None => ping.ask(),
        }
    }

    /// Every base.
    pub(crate) fn bases(&self) -> Result<Vec<Base>, Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.bases()?),
            None => ops::base::list(self.home),
        }
    }

    /// Removes the bases that nothing uses, or says which those are.
    pub(crate) fn collect_bases(&self, asked: BasesGc) -> Result<BasesCollected, Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.collect_bases(asked)?),
            None => ops::gc::gc(self.home, asked),
        }
    }

    /// The cloudlet's key.
    pub(crate) fn key(&self) -> Result<String, Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.host()?.key),
            None => Ok(identity(self.home)?.key().to_string()),
        }
    }

    /// Every peer that is known.
    pub(crate) fn peers(&self) -> Result<Vec<Peer>, Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.peers()?),
            None => ops::peer::list(self.home),
        }
    }

    /// Lets a peer in, or changes what is said of one.
    pub(crate) fn put_peer(&self, name: &VmName, spec: PeerSpec) -> Result<Peer, Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.put_peer(name.as_ref(), &spec)?),
            None => ops::peer::put(&ops::peer::described(name.as_ref(), spec)?, self.home),
        }
    }

    /// Forgets a peer, which must be known.
    pub(crate) fn remove_peer(&self, name: &VmName) -> Result<Peer, Failure> {
        let removed = match self.daemon() {
            Some(daemon) => daemon.remove_peer(name.as_ref())?,
            None => ops::peer::remove(name, self.home)?,
        };
        // The API is content with one that is not known; who typed its name is not.
        removed.ok_or_else(|| ops::peer::unknown(name))
    }

    /// Removes a base; its id.
    pub(crate) fn remove_base(&self, name: &str) -> Result<String, Failure> {
        match self.daemon() {
            Some(daemon) => Ok(daemon.remove_base(name)?.id),
            None => Ok(ops::base::remove(name, self.home)?.to_string()),
        }
    }
}

/// Follows an operation to its end; what came of it.
pub(crate) fn follow(
    daemon: &Client,
    begun: Operation,
    mut show: impl FnMut(&Operation),
) -> Result<serde_json::Value, Failure> {
    let id = begun.id.clone();
    let ended = daemon.events().ok().and_then(|events| {
        events.into_iter().find_map(|event| match event {
            howdah_api::Event::Operation { operation } if operation.id == id => {
                show(&operation);
                operation.state.is_over().then_some(*operation)
            }
            _ => None,
        })
    });
    let mut operation = ended.unwrap_or(begun);
    while !operation.state.is_over() {
        // The daemon was restarted, or does not tell: it is asked.
        operation = daemon.wait(&id, WAIT_S)?;
    }
    match (operation.state, operation.error) {
        (State::Done, _) => Ok(operation.result.unwrap_or_default()),
        (_, Some(problem)) => Err(problem.into()),
        (state, None) => {
            let why = format!("it is {}", state.name());
            Err(Failure::plain(Exit::Failed, format!("operation {id}"), why))
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        let exit = serde_json::from_value(problem.kind.clone().into()).unwrap_or(Exit::Failed);
        Self { report: problem.report, ..Self::line(exit, &problem.detail) }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Problem(problem) => (*problem).into(),
            ClientError::Unreachable { at: At::Peer(_), .. }
            | ClientError::Broken { at: At::Peer(_), .. } => {
                let way_out = "check that `howdah serve --api-listen` runs there, and that address";
                Self::new(Exit::Failed, "cloudlet", error, way_out)
            }
            error => {
                let way_out = format!("look at the daemon, or set {DIRECT}=1 to do without it");
                Self::new(Exit::Failed, "daemon", error, way_out)
            }
        }
    }
}
