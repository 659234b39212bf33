//! The API of a peer, over TLS.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use handoff::tls::{Speech, TlsConnect};
use howdah_api::{Connection, Dial};

use super::{BookFile, Stream, check_address, identity, named};
use crate::{
    failure::{Exit, Failure},
    home::Home,
};

/// How long a peer may take to be there and to prove who it is.
const CONNECT: Duration = Duration::from_secs(10);

/// Dials the API of one peer.
pub(crate) struct Remote {
    connect: Mutex<TlsConnect>,
    peer: String,
}

impl Remote {
    /// The peer of a name, where it is known that its API listens; or `NAME@HOST:PORT`.
    pub(crate) fn find(home: &Home, text: &str) -> Result<Self, Failure> {
        let book = BookFile::of(home).read()?;
        let (name, address) = match text.split_once('@') {
            Some((name, address)) => (name, Some(address)),
            None => (text, None),
        };
        let peer = named(&book, name)?;
        let Some(address) = address.or(peer.api.as_deref()) else {
            let way_out = format!(
                "say {name}@HOST:PORT, or `howdah peer add {name} {} --api HOST:PORT`",
                peer.key
            );
            let why = "it is not known where its API listens";
            return Err(Failure::new(Exit::Usage, format!("peer {name}"), why, way_out));
        };
        check_address(address)?;
        let connect = TlsConnect::new(address, identity(home)?, peer.key).speaking(Speech::Api);
        Ok(Self { connect: Mutex::new(connect), peer: format!("{name} ({address})") })
    }

    /// To be dialled by a client.
    pub(crate) fn shared(self) -> Arc<dyn Dial> {
        Arc::new(self)
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.peer)
    }
}

impl Dial for Remote {
    fn dial(&self) -> io::Result<Box<dyn Connection>> {
        let mut connect = self.connect.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, link) = connect.shake(CONNECT)?;
        Ok(Box::new(Stream::new(link.stream().try_clone()?, done)?))
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }
}
