//! The threads of a machine, and what is done at the beginning of each.
//!
//! A guest's bytes are worked on by a few threads, and each kind needs little of the host. Who owns
//! the machine may confine them: it is called on every such thread before that touches anything of
//! the guest's.

use std::{fmt, io, sync::Arc};

/// What a thread of a machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a virtual CPU, and answers its accesses to devices.
    Vcpu,
    /// Works on the queues of one virtio device.
    Device,
}

impl fmt::Display for ThreadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpu => "vCPU",
            Self::Device => "device",
        })
    }
}

/// Confines the thread that calls it.
type Confine = dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync;

/// What is called first on each thread of a machine. A thread on which it fails does nothing else.
#[derive(Clone, Default)]
pub struct ThreadHook(Option<Arc<Confine>>);

impl ThreadHook {
    /// Calls `confine` on each thread.
    pub fn new(confine: impl Fn(ThreadKind) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(confine)))
    }

    /// Called on a thread of this kind.
    pub(crate) fn begin(&self, kind: ThreadKind) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |confine| confine(kind))
    }
}

impl fmt::Debug for ThreadHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ThreadHook").field(&self.0.is_some()).finish()
    }
}
