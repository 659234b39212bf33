//! How the process's heap behaves.

/// Blocks of at least so many bytes go back to the system as soon as they are free.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: libc::c_int = 256 << 10;

/// Makes the C library give large blocks back to the system when they are freed.
///
/// By itself it keeps them for the next time once some were freed, for each thread: with several
/// threads in whose libraries codecs ask for megabytes for each body, what is kept is more than what is in use. For
/// a process to call once, before it makes threads. Does nothing where the C library is another one.
pub fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number in the allocator; no memory is touched.
    let _ = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) };
}
