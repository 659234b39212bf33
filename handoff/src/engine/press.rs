//! What a worker compresses with, and the memory that this takes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::{
    adapt::Trial,
    stage::{Buffers, Codec, Compressor, CpuWatch, Mode, Packed},
};

/// What the encoders of all workers and the window of segments may take together: on a slow link the
/// encoders are heavy and the window is small, on a fast one it is the other way round.
pub const WORKING_BYTES: usize = 24 << 20;
/// What is always left for the window.
pub(super) const LEAST_WINDOW_BYTES: usize = 2 << 20;
/// What encoders may take, whatever the window does.
pub(super) const ENCODER_BYTES: usize = WORKING_BYTES - LEAST_WINDOW_BYTES;

/// The memory that encoders and the window share.
#[derive(Clone, Debug, Default)]
pub(super) struct Encoders(Arc<Budget>);

#[derive(Debug, Default)]
struct Budget {
    used_bytes: AtomicUsize,
    window_bytes: AtomicUsize,
}

impl Encoders {
    fn most_bytes(&self) -> usize {
        WORKING_BYTES - self.0.window_bytes.load(Relaxed).clamp(LEAST_WINDOW_BYTES, WORKING_BYTES)
    }

    fn reserve(&self, bytes: usize) -> bool {
        let most = self.most_bytes();
        let within = |used: usize| Some(used + bytes).filter(|used| *used <= most);
        self.0.used_bytes.fetch_update(Relaxed, Relaxed, within).is_ok()
    }

    fn release(&self, bytes: usize) {
        self.0.used_bytes.fetch_sub(bytes, Relaxed);
    }

    fn left_bytes(&self) -> usize {
        self.most_bytes().saturating_sub(self.0.used_bytes.load(Relaxed))
    }

    /// The window holds so much now; how much it may.
    pub(super) fn window(&self, used: u64) -> u64 {
        let used = usize::try_from(used).unwrap_or(usize::MAX);
        self.0.window_bytes.store(used, Relaxed);
        let left = WORKING_BYTES.saturating_sub(self.0.used_bytes.load(Relaxed));
        left.max(LEAST_WINDOW_BYTES) as u64
    }
}

/// A compressor, and the buffer that it compresses into: as large as it may need.
pub(super) struct Press {
    compressor: Compressor,
    scratch: Vec<u8>,
    encoders: Encoders,
    /// What is reserved for each codec: those keep what they work with.
    held: [usize; Codec::ALL.len()],
    /// One mode only: what it takes stays reserved.
    forced: bool,
}

impl Press {
    pub(super) fn new(encoders: Encoders, forced: bool) -> Self {
        let held = [0; Codec::ALL.len()];
        Self { compressor: Compressor::new(), scratch: Vec::new(), encoders, held, forced }
    }

    /// Whether there is memory for this mode; it is reserved then.
    fn admits(&mut self, mode: Mode) -> bool {
        let (codec, need) = (mode.codec() as usize, mode.encoder_bytes());
        let held = self.held.get(codec).copied().unwrap_or_default();
        if need <= held || self.encoders.reserve(need - held) {
            self.hold(codec, need.max(held));
            return true;
        }
        // What other codecs keep is given up first.
        self.give_up();
        let fits = self.encoders.reserve(need);
        if fits {
            self.hold(codec, need);
        }
        fits
    }

    fn hold(&mut self, codec: usize, bytes: usize) {
        if let Some(held) = self.held.get_mut(codec) {
            *held = bytes;
        }
    }

    fn give_up(&mut self) {
        self.compressor = Compressor::new();
        self.held.iter_mut().for_each(|held| self.encoders.release(std::mem::take(held)));
    }

    /// The mode itself if there is memory for it, else the strongest to choose from that has it.
    pub(super) fn allowed(&mut self, mode: Mode) -> Mode {
        if self.admits(mode) {
            return mode;
        }
        let rank = Mode::LADDER.iter().position(|one| *one == mode);
        let weaker = Mode::LADDER.iter().take(rank.unwrap_or(Mode::LADDER.len())).rev();
        let left = self.encoders.left_bytes();
        let fits = weaker.copied().find(|one| one.encoder_bytes() <= left && self.admits(*one));
        // Takes none.
        fits.unwrap_or(Mode::NONE)
    }

    /// Compresses a body in an allowed mode, into a buffer no larger than it must be: many of them
    /// wait to be acknowledged. What is left of the body is given to `spent`, if anything is.
    pub(super) fn pack(
        &mut self,
        mode: Mode,
        body: Vec<u8>,
        buffers: &Buffers,
        spent: impl FnOnce(Vec<u8>),
    ) -> Result<(Packed, Trial), String> {
        let raw_len = u32::try_from(body.len()).map_err(|e| e.to_string())?;
        if mode == Mode::NONE {
            let bytes = u64::from(raw_len);
            let took = Duration::ZERO;
            let trial = Trial { mode, bytes_in: bytes, bytes_out: bytes, took, cpu: took };
            return Ok((Packed { codec: Codec::Raw, raw_len, payload: body }, trial));
        }
        let (codec, trial) = self.encode(mode, &body)?;
        let payload = match codec {
            Codec::Raw => body,
            _ => {
                let mut payload = buffers.take(self.scratch.len());
                payload.extend_from_slice(&self.scratch);
                spent(body);
                payload
            }
        };
        Ok((Packed { codec, raw_len, payload }, trial))
    }

    /// Compresses and throws away. `None` if there is no memory for it now.
    pub(super) fn try_out(&mut self, mode: Mode, body: &[u8]) -> Result<Option<Trial>, String> {
        if !self.admits(mode) {
            return Ok(None);
        }
        self.encode(mode, body).map(|(_, trial)| Some(trial))
    }

    fn encode(&mut self, mode: Mode, body: &[u8]) -> Result<(Codec, Trial), String> {
        let (began, mut watch) = (Instant::now(), CpuWatch::start());
        let codec = self.compressor.compress(mode, body, &mut self.scratch);
        let codec = codec.map_err(|e| e.to_string())?;
        if let Codec::Xz | Codec::Bzip2 = mode.codec()
            && !self.forced
        {
            // They keep nothing from one body to the next.
            let held = self.held.get_mut(mode.codec() as usize).map(std::mem::take);
            self.encoders.release(held.unwrap_or_default());
        }
        let trial = Trial {
            mode,
            bytes_in: body.len() as u64,
            bytes_out: self.scratch.len() as u64,
            took: began.elapsed(),
            cpu: Duration::from_nanos(watch.lap_ns()),
        };
        Ok((codec, trial))
    }
}

impl Drop for Press {
    fn drop(&mut self) {
        self.held.iter().for_each(|held| self.encoders.release(*held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(text: &str) -> Mode {
        text.parse().unwrap()
    }

    #[test]
    fn memory_is_shared_and_given_back() {
        let heavy = mode("xz:6");
        let encoders = Encoders::default();
        let others = ENCODER_BYTES - heavy.encoder_bytes() - mode("zstd:3").encoder_bytes();
        assert!(encoders.reserve(others));
        let (mut one, mut two) =
            (Press::new(encoders.clone(), false), Press::new(encoders.clone(), false));
        assert_eq!(one.allowed(heavy), heavy);
        let instead = two.allowed(heavy);
        assert!(instead != heavy && instead != Mode::NONE, "{instead}");
        two.give_up();
        let (_, trial) = one.encode(heavy, &[7; 5000]).unwrap();
        assert!(trial.bytes_out < 100);
        assert_eq!(two.allowed(heavy), heavy, "one has done with it");
        assert_eq!(one.try_out(heavy, &[7; 5000]).unwrap(), None);
        drop((one, two));
        assert_eq!(encoders.left_bytes(), ENCODER_BYTES - others);
    }

    #[test]
    fn the_window_and_the_encoders_share() {
        let encoders = Encoders::default();
        let mut press = Press::new(encoders.clone(), true);
        assert_eq!(encoders.window(0), WORKING_BYTES as u64);
        let heavy = mode("zstd:19");
        assert_eq!(press.allowed(heavy), heavy);
        assert_eq!(encoders.window(1000), (WORKING_BYTES - heavy.encoder_bytes()) as u64);
        drop(press);
        encoders.window(WORKING_BYTES as u64 - 1000);
        assert_ne!(Press::new(encoders.clone(), false).allowed(heavy), heavy);
        encoders.window(u64::MAX);
        assert_eq!(Press::new(encoders, false).allowed(heavy), Mode::NONE);
    }

    /// Every mode has room for two workers.
    #[test]
    fn two_workers_in_any_mode() {
        for mode in Mode::STATIC {
            let need = mode.encoder_bytes();
            assert!(2 * need <= ENCODER_BYTES, "{mode}: {need}");
        }
    }

    #[test]
    fn bodies_go_round() {
        let buffers = Buffers::new(1 << 20);
        let mut press = Press::new(Encoders::default(), true);
        let mut spent = 0;
        let mut pack = |mode: &str, body: &[u8]| {
            let mode = press.allowed(mode.parse().unwrap());
            press.pack(mode, body.to_vec(), &buffers, |_| spent += 1).unwrap().0
        };
        assert_eq!(pack("none", &[7; 5000]).payload, [7; 5000]);
        assert_eq!(pack("zstd:3", b"short").payload, b"short", "kept as it is");
        let packed = pack("zstd:3", &[7; 5000]);
        assert!(packed.payload.len() < 100 && packed.payload.capacity() < 5000);
        assert_eq!(spent, 1);
    }
}
