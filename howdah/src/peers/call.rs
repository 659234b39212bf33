//! Calling a peer for something else than a handoff.

use std::{
    io,
    time::{Duration, Instant},
};

use handoff::{
    Connect, Transport,
    engine::CallRx,
    tcp::TcpLink,
    tls::Guarded,
    wire::{Call, Frame, FrameReader, ReadError, Versions, write_frame},
};

use super::{Dial, Endpoint};
use crate::{
    failure::{Exit, Failure},
    home::Home,
};

/// How long a peer may take to answer the telephone.
const CONNECT: Duration = Duration::from_secs(10);
/// How long it may take to say whether it knows the service.
const GREETING: Duration = Duration::from_secs(10);

type Link = Guarded<TcpLink>;

/// A link over which a service is spoken.
pub(crate) struct Line {
    /// What the peer says.
    pub(crate) rx: CallRx<<Link as Transport>::Rx>,
    /// What the peer hears.
    pub(crate) tx: <Link as Transport>::Tx,
    /// The version of the service that both speak.
    #[expect(dead_code, reason = "there is only one version of any service so far")]
    pub(crate) version: u32,
}

/// Calls a peer for a service.
pub(crate) fn call(
    home: &Home,
    endpoint: &Endpoint,
    service: &str,
    versions: Versions,
) -> Result<Line, Failure> {
    let what = || format!("peer {}", endpoint.address);
    let broken = |error: io::Error| {
        let way_out = "check that `howdah receive` runs there, and try again";
        Failure::new(Exit::Failed, what(), error, way_out)
    };
    let link = Dial::from(home, endpoint)?.connect(CONNECT).map_err(broken)?;
    let (mut tx, rx) = link.split().map_err(broken)?;
    let first = Frame::Call(Call { versions, service: service.into() });
    write_frame(&mut tx, &first, &mut Vec::new()).map_err(broken)?;
    let (mut reader, begun) = (FrameReader::new(rx), Instant::now());
    loop {
        match reader.read_frame() {
            Ok(Some(Frame::Called { version })) if versions.holds(version) => {
                return Ok(Line { rx: reader.into_stream(), tx, version });
            }
            Ok(Some(Frame::Refuse(refusal))) => {
                return Err(Failure::plain(Exit::Conflict, what(), refusal));
            }
            Ok(Some(_)) => {
                let way_out = "update howdah there or here";
                let why = "it does not answer as a howdah of this version does";
                return Err(Failure::new(Exit::Failed, what(), why, way_out));
            }
            Ok(None) if begun.elapsed() < GREETING => {}
            Ok(None) => return Err(broken(io::ErrorKind::TimedOut.into())),
            // One that does not know the frame hangs up.
            Err(ReadError::Closed { .. }) => {
                let way_out = "update howdah there, if it is older than here";
                let why = format!("it hung up when it was asked for {service}");
                return Err(Failure::new(Exit::Failed, what(), why, way_out));
            }
            Err(error) => return Err(broken(io::Error::other(error))),
        }
    }
}
