//! What all handlers share.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Instant,
};

use howdah_api::{Event, Receiving};
use tokio::sync::{Notify, broadcast, watch};

use super::{keys::Keys, operations::Operations};
use crate::{cli::JailArgs, home::Home, peers::BookFile};

/// Events that a slow client may be behind by; then it is told that it lost some.
const MAX_EVENTS_BEHIND: usize = 1024;

/// A cloudlet's daemon. It holds no guest: what it knows of VMs it asks their directories and their
/// processes for (ADR 0007), so that it can be restarted at any time.
#[derive(Debug)]
pub(crate) struct Daemon {
    /// The cloudlet.
    pub(crate) home: Home,
    /// How much processes that are started log.
    pub(crate) verbose: u8,
    /// How they are confined, unless a request says otherwise.
    pub(crate) jail: JailArgs,
    /// What takes long.
    pub(crate) operations: Operations,
    /// What was answered to POSTs with a key.
    pub(super) keys: Keys,
    /// The peers that are known.
    pub(super) book: BookFile,
    /// Where the API listens for peers, once it does.
    pub(crate) listening: OnceLock<SocketAddr>,
    /// The listener for peers, once it listens.
    pub(crate) receiving: OnceLock<Receiving>,
    /// When the daemon started.
    pub(crate) started: Instant,
    /// What happens.
    events: broadcast::Sender<Event>,
    /// Woken when a VM may have changed.
    pub(super) changed: Notify,
    stopping: watch::Sender<bool>,
}

impl Daemon {
    pub(super) fn new(home: Home, verbose: u8, jail: JailArgs) -> Arc<Self> {
        let events = broadcast::Sender::new(MAX_EVENTS_BEHIND);
        Arc::new(Self {
            book: BookFile::of(&home),
            listening: OnceLock::new(),
            home,
            verbose,
            jail,
            operations: Operations::new(events.clone()),
            keys: Keys::default(),
            receiving: OnceLock::new(),
            started: Instant::now(),
            events,
            changed: Notify::new(),
            stopping: watch::Sender::new(false),
        })
    }

    /// Tells whoever follows.
    pub(crate) fn tell(&self, event: Event) {
        self.operations.pass_on(event);
    }

    /// Looks at the VMs soon: something was done with one.
    pub(crate) fn vms_changed(&self) {
        self.changed.notify_one();
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// How many follow what happens.
    pub(super) fn followers(&self) -> usize {
        self.events.receiver_count()
    }

    /// Ends streams and, when nobody is being answered any more, the daemon.
    pub(super) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Waits until the daemon is to end.
    pub(super) async fn stopped(&self) {
        // The sender lives as long as this.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }
}
