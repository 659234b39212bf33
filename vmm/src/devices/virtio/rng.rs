//! virtio-rng: entropy from the host's kernel.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::device::{DeviceContext, DeviceError, Progress, VirtioBackend};

/// Most bytes given for one request; a driver that wants more asks again.
const MAX_REQUEST_BYTES: usize = 4096;
/// Requests answered before others get their turn.
const REQUESTS_PER_CALL: usize = 16;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {}

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Self {}
    }
}

impl VirtioBackend for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn process(
        &mut self,
        index: usize,
        ctx: &mut DeviceContext<'_>,
    ) -> Result<Progress, DeviceError> {
        let Some(queue) = ctx.queues.get_mut(index) else { return Ok(Progress::Drained) };
        for _ in 0..REQUESTS_PER_CALL {
            let Some(chain) = queue.pop(ctx.ram)? else { return Ok(Progress::Drained) };
            let mut entropy = [0; MAX_REQUEST_BYTES];
            let wanted = chain.writable.len().min(MAX_REQUEST_BYTES as u64) as usize;
            let entropy = &mut entropy[..wanted];
            fill(entropy)?;
            let written = chain.writable.write_at(ctx.ram, 0, entropy)?;
            queue.complete(ctx.ram, chain.head, written as u32)?;
        }
        Ok(Progress::Yield)
    }

    fn reset(&mut self) {}
}

fn fill(mut buffer: &mut [u8]) -> Result<(), DeviceError> {
    while !buffer.is_empty() {
        // SAFETY: the pointer and length are those of a live, writable slice.
        let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let Ok(got) = usize::try_from(got) else {
            let source = std::io::Error::last_os_error();
            if source.kind() == std::io::ErrorKind::Interrupted {
                continue;
            }
            return Err(DeviceError::Host { what: "reading the host's entropy", source });
        };
        buffer = &mut buffer[got..];
    }
    Ok(())
}
