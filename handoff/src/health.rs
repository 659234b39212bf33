//! Whether a link is alive, and how long its round trip takes. No clock of its own.

use std::time::Duration;

/// Share of a new sample in the smoothed round trip, as 1/8: what TCP takes.
const SMOOTHING: u32 = 8;

/// One side's view of one link.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    silence: Duration,
    ping_every: Duration,
    heard_at: Duration,
    pinged_at: Duration,
    nonce: u64,
    answered: bool,
    rtt: Option<Duration>,
    rtt_min: Option<Duration>,
}

/// What is to be done about a link now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pulse {
    /// Nothing.
    Fine,
    /// Send a ping with this number.
    Ping(u64),
    /// Nothing was heard for too long.
    Dead,
}

impl Health {
    pub(crate) fn new(silence: Duration, ping_every: Duration) -> Self {
        Self {
            silence,
            ping_every,
            heard_at: Duration::ZERO,
            pinged_at: Duration::ZERO,
            nonce: 0,
            answered: true,
            rtt: None,
            rtt_min: None,
        }
    }

    /// A new link: what was measured stays, what was asked is forgotten.
    pub(crate) fn link_up(&mut self, now: Duration) {
        self.heard_at = now;
        self.pinged_at = now;
        self.answered = true;
    }

    pub(crate) fn heard(&mut self, now: Duration) {
        self.heard_at = self.heard_at.max(now);
    }

    /// Takes an answer to a ping; one to an earlier ping counts as hearing only.
    pub(crate) fn pong(&mut self, nonce: u64, now: Duration) {
        if nonce == self.nonce && !self.answered {
            self.answered = true;
            let sample = now.saturating_sub(self.pinged_at);
            self.rtt = Some(match self.rtt {
                None => sample,
                Some(rtt) => (rtt * (SMOOTHING - 1) + sample) / SMOOTHING,
            });
            self.rtt_min = Some(self.rtt_min.map_or(sample, |least| least.min(sample)));
        }
    }

    pub(crate) fn pulse(&mut self, now: Duration) -> Pulse {
        if now.saturating_sub(self.heard_at) >= self.silence {
            return Pulse::Dead;
        }
        if now.saturating_sub(self.pinged_at) < self.ping_every {
            return Pulse::Fine;
        }
        self.pinged_at = now;
        self.nonce = self.nonce.wrapping_add(1);
        self.answered = false;
        Pulse::Ping(self.nonce)
    }

    /// The smoothed round trip of pings, queueing behind data included.
    pub(crate) fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// The shortest round trip of a ping: nearest to the link without queues.
    pub(crate) fn rtt_min(&self) -> Option<Duration> {
        self.rtt_min
    }
}
