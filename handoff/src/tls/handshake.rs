//! The TLS handshake over a stream, within bounds of time and bytes.
//!
//! It is read record by record and never beyond its last one, so that what follows can be opened by
//! others: see [`super::record`].

use std::{
    io::{self, Read, Write},
    sync::Arc,
    time::Duration,
};

use rustls::{
    AlertDescription, ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection,
    client::{AlwaysResolvesClientRawPublicKeys, Resumption},
    crypto::{CryptoProvider, ring},
    pki_types::ServerName,
    server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage},
    version::TLS13,
};

use super::{
    key::{Identity, PeerKey},
    link::TlsLink,
    record::{HANDSHAKE, HEADER_BYTES, RecordError, Session, SessionError, body_length},
    verify::{Pinned, Proven},
};
use crate::Clock;

/// What is spoken inside (ALPN), so that no other server of the same key can be meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speech {
    /// Frames: handoffs, and the services that are called.
    Frames,
    /// HTTP: the API of a cloudlet's daemon.
    Api,
}

impl Speech {
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Frames => b"howdah",
            Self::Api => b"howdah-api",
        }
    }
}

/// More than this nobody needs to say before it is known who speaks.
pub const MAX_HANDSHAKE_BYTES: usize = 16 << 10;
/// What a peer without TLS begins with: the type of a Hello, behind its length.
const PLAIN_HELLO: u8 = 0x01;
/// The first byte of the version in the headers of records, of all versions that there are.
const VERSION_MAJOR: u8 = 3;

/// A handshake that both ends finished.
#[derive(Debug)]
pub struct Handshake {
    /// Who is at the other end: it has proven that it holds this key, and nothing more.
    pub peer: PeerKey,
    /// What was agreed on.
    pub session: Session,
    sent: u64,
    received: u64,
}

impl Handshake {
    /// Goes on over the link that the handshake was made on.
    pub fn over<L>(self, link: L) -> TlsLink<L> {
        TlsLink::new(link, self.session, self.peer).count(self.sent, self.received)
    }
}

/// Why there is no TLS link.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The peer was too slow.
    #[error("the peer did not finish the TLS handshake within {0:?}")]
    Slow(Duration),
    /// The peer went away.
    #[error(
        "the peer closed the link in the TLS handshake (does it listen with --plain, or is it no howdah?)"
    )]
    Closed,
    /// The peer began to speak our protocol without TLS.
    #[error("the peer speaks without TLS (started with --plain?), which is not taken here")]
    Plain,
    /// The peer speaks something else.
    #[error("the peer does not speak TLS")]
    NotTls,
    /// The peer says too much.
    #[error("the peer's TLS handshake has more than {MAX_HANDSHAKE_BYTES} bytes")]
    TooLong,
    /// Another one answers than the one that was called.
    #[error(
        "the peer's key is {found}, not the pinned {expected}: if it was renewed, `howdah peer rm` \
         and `howdah peer add`; if not, somebody else answers"
    )]
    WrongKey {
        /// The pinned key.
        expected: PeerKey,
        /// The key of who answered.
        found: PeerKey,
    },
    /// The peer showed no key, or means another protocol.
    #[error("the peer is no cloudlet: it {0}")]
    Stranger(&'static str),
    /// The peer speaks TLS, and inside it something else.
    #[error(
        "another protocol is spoken there: handoffs and the API have ports of their own \
         (`howdah receive`, `howdah serve --api-listen`)"
    )]
    OtherSpeech,
    /// The peer said why it does not go on.
    #[error("the peer ended the TLS handshake: {0:?}")]
    Alert(AlertDescription),
    /// The peer broke the rules of TLS, or shares no version or suite with us.
    #[error("TLS: {0}")]
    Tls(rustls::Error),
    /// The link broke.
    #[error("the link broke in the TLS handshake: {0}")]
    Io(#[from] io::Error),
    /// The secrets cannot be used: a suite that was not offered.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)
            | rustls::Error::NoApplicationProtocol => Self::OtherSpeech,
            rustls::Error::AlertReceived(alert) => Self::Alert(alert),
            error => Self::Tls(error),
        }
    }
}

impl From<RecordError> for TlsError {
    fn from(_: RecordError) -> Self {
        Self::NotTls
    }
}

/// As the side that calls, for [`Speech::Frames`]: see [`connect_for`].
pub fn connect<S: Read + Write>(
    stream: &mut S,
    identity: &Identity,
    expected: PeerKey,
    within: Duration,
    clock: &dyn Clock,
) -> Result<Handshake, TlsError> {
    connect_for(Speech::Frames, stream, identity, expected, within, clock)
}

/// As the side that calls: nobody but `expected` is spoken to. `stream` is to return from a read at
/// least every [`READ_TICK`](crate::link::READ_TICK).
pub fn connect_for<S: Read + Write>(
    speech: Speech,
    stream: &mut S,
    identity: &Identity,
    expected: PeerKey,
    within: Duration,
    clock: &dyn Clock,
) -> Result<Handshake, TlsError> {
    let provider = provider();
    let pinned = Arc::new(Pinned::new(expected, provider.signature_verification_algorithms));
    let resolver = AlwaysResolvesClientRawPublicKeys::new(Arc::clone(&identity.certified));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(pinned.clone())
        .with_client_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![speech.alpn().to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_secret_extraction = true;
    // Not looked at: the key is pinned.
    let name = ServerName::try_from("cloudlet").map_err(|_| TlsError::NotTls)?;
    let connection = Connection::Client(ClientConnection::new(Arc::new(config), name)?);
    let done = Shaking::new(speech, connection, stream, within, clock).run();
    match (done, pinned.wrong()) {
        (Err(_), Some(found)) => Err(TlsError::WrongKey { expected, found }),
        (done, _) => done,
    }
}

/// As the side that is called, for [`Speech::Frames`]: see [`accept_for`].
pub fn accept<S: Read + Write>(
    stream: &mut S,
    identity: &Identity,
    within: Duration,
    clock: &dyn Clock,
) -> Result<Handshake, TlsError> {
    accept_for(Speech::Frames, stream, identity, within, clock)
}

/// As the side that is called. Whether the peer whose key comes back may say anything is for the
/// caller to decide, before it reads on.
pub fn accept_for<S: Read + Write>(
    speech: Speech,
    stream: &mut S,
    identity: &Identity,
    within: Duration,
    clock: &dyn Clock,
) -> Result<Handshake, TlsError> {
    let provider = provider();
    let proven = Arc::new(Proven(provider.signature_verification_algorithms));
    let resolver = AlwaysResolvesServerRawPublicKeys::new(Arc::clone(&identity.certified));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(proven)
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![speech.alpn().to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.enable_secret_extraction = true;
    let connection = Connection::Server(ServerConnection::new(Arc::new(config))?);
    Shaking::new(speech, connection, stream, within, clock).run()
}

/// What is offered and taken: authenticated ciphers and X25519.
fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    let kx_groups = vec![ring::kx_group::X25519];
    Arc::new(CryptoProvider { cipher_suites, kx_groups, ..ring::default_provider() })
}

/// A handshake under way.
struct Shaking<'a, S> {
    speech: Speech,
    connection: Connection,
    stream: &'a mut S,
    within: Duration,
    deadline: Duration,
    clock: &'a dyn Clock,
    sent: u64,
    received: usize,
}

impl<'a, S: Read + Write> Shaking<'a, S> {
    fn new(
        speech: Speech,
        connection: Connection,
        stream: &'a mut S,
        within: Duration,
        clock: &'a dyn Clock,
    ) -> Self {
        let deadline = clock.now() + within;
        Self { speech, connection, stream, within, deadline, clock, sent: 0, received: 0 }
    }

    fn run(mut self) -> Result<Handshake, TlsError> {
        loop {
            self.send()?;
            if !self.connection.is_handshaking() {
                return self.finish();
            }
            let record = self.record()?;
            let mut rest = record.as_slice();
            while !rest.is_empty() {
                self.connection.read_tls(&mut rest)?;
            }
            if let Err(error) = self.connection.process_new_packets() {
                // The peer learns why, if it still listens.
                let _ = self.send();
                return Err(error.into());
            }
        }
    }

    fn finish(self) -> Result<Handshake, TlsError> {
        let certificates = self.connection.peer_certificates().unwrap_or_default();
        let peer = certificates.first().map(|spki| PeerKey::of(spki));
        let peer = peer.ok_or(TlsError::Stranger("showed no key"))?;
        if self.connection.alpn_protocol() != Some(self.speech.alpn()) {
            return Err(TlsError::Stranger("means another protocol"));
        }
        let session = Session::of(self.connection.dangerous_extract_secrets()?)?;
        Ok(Handshake { peer, session, sent: self.sent, received: self.received as u64 })
    }

    fn send(&mut self) -> Result<(), TlsError> {
        while self.connection.wants_write() {
            match self.connection.write_tls(self.stream) {
                Ok(0) => return Err(TlsError::Closed),
                Ok(count) => self.sent += count as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(e)),
            }
            self.in_time()?;
        }
        Ok(self.stream.flush()?)
    }

    /// Reads one record and not a byte more.
    fn record(&mut self) -> Result<Vec<u8>, TlsError> {
        let is_first = self.received == 0;
        let mut record = vec![0; HEADER_BYTES];
        self.fill(&mut record)?;
        let header = record.first_chunk().copied().unwrap_or_default();
        if is_first && !header.starts_with(&[HANDSHAKE, VERSION_MAJOR]) {
            // A frame's length, which no Hello has beyond three bytes, and its type.
            let is_hello = header.ends_with(&[0, PLAIN_HELLO]);
            return Err(if is_hello { TlsError::Plain } else { TlsError::NotTls });
        }
        let length = body_length(header)?;
        if self.received + length > MAX_HANDSHAKE_BYTES {
            return Err(TlsError::TooLong);
        }
        record.resize(HEADER_BYTES + length, 0);
        self.fill(record.get_mut(HEADER_BYTES..).unwrap_or_default())?;
        Ok(record)
    }

    fn fill(&mut self, mut into: &mut [u8]) -> Result<(), TlsError> {
        while !into.is_empty() {
            match self.stream.read(into) {
                Ok(0) => return Err(TlsError::Closed),
                Ok(count) => {
                    self.received += count;
                    into = into.get_mut(count..).unwrap_or_default();
                }
                Err(e) if is_tick(&e) => {}
                Err(e) => return Err(self.broken(e)),
            }
            // Also while bytes come: one at a time is no way to stay.
            self.in_time()?;
        }
        Ok(())
    }

    fn in_time(&self) -> Result<(), TlsError> {
        if self.clock.now() < self.deadline { Ok(()) } else { Err(TlsError::Slow(self.within)) }
    }

    fn broken(&self, error: io::Error) -> TlsError {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => TlsError::Closed,
            _ => TlsError::Io(error),
        }
    }
}

fn is_tick(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}
