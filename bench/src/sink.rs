//! A target that costs next to nothing: it checks that segments come whole and in order, says that
//! it applied them, and believes the rest. What a source takes by itself shows against it.

use std::time::Duration;

use anyhow::{anyhow, bail};
use handoff::{
    Clock, Transport,
    engine::ReceiveOptions,
    target::{TargetEvent, TargetSession},
    tcp::MonotonicClock,
    wire::{Agreed, Frame, FrameReader, ReadError, Resumed, write_frame},
};

/// How long a source may say nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// Takes one handoff to its end and keeps nothing of it.
pub(crate) fn swallow<L: Transport>(link: L, options: &ReceiveOptions) -> anyhow::Result<()> {
    let (mut tx, rx) = link.split()?;
    let mut reader = FrameReader::new(rx);
    let clock = MonotonicClock::default();
    let hello = loop {
        match reader.read_frame()? {
            Some(Frame::Hello(hello)) => break hello,
            Some(other) => bail!("{} came first", other.name()),
            None if clock.now() > SILENCE => bail!("nothing came"),
            None => {}
        }
    };
    let version = options.versions.agree(hello.versions).map_err(|e| anyhow!("{e}"))?;
    let ping_every = options.limits.ping_every;
    let agreed = Agreed { bases: 0, known: None };
    let mut session =
        TargetSession::new(hello.handoff, agreed, options.window_bytes, SILENCE, ping_every);
    session.link_up(version, clock.now());
    let mut scratch = Vec::new();
    loop {
        while let Some(frame) = session.poll_transmit() {
            write_frame(&mut tx, &frame, &mut scratch)?;
        }
        match reader.read_frame() {
            Ok(Some(frame)) => session.handle(frame, clock.now())?,
            Ok(None) => {}
            // Released or given up, and closed.
            Err(ReadError::Closed { .. }) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        while let Some(event) = session.poll_event() {
            match event {
                TargetEvent::Segment(segment) => {
                    let mark = segment.check()?.mark();
                    session.applied(&mark, clock.now());
                }
                TargetEvent::Prepare(said) => {
                    session.prepared(said.root, said.full_hash, clock.now());
                }
                TargetEvent::Commit => session.resumed(Resumed::untimed(hello.handoff)),
                TargetEvent::Aborted(_) | TargetEvent::Released => return Ok(()),
                TargetEvent::CommitLost | TargetEvent::Answer(_) => {}
            }
        }
        if !session.tick(clock.now()) {
            bail!("the source says nothing");
        }
    }
}
