//! Who goes first when guest and handoff want the same core.

/// How much nicer threads are that work for a handoff while its guest runs: a core that both want is the guest's
/// for three parts in four (the kernel's weights of nice 0 and nice 5 are 1024 and 335). With less, what takes
/// milliseconds of CPU takes a second to come back, and the mode that fits is one that saves no bytes.
const NICE: libc::c_int = 5;

/// Lets everything else on this core go before the calling thread, for good. The handoff adapts to
/// what is left: workers' throughput is measured in wall time. Where the guest waits, nobody else wants
/// the core, and the thread has all of it.
pub(crate) fn give_way() {
    // SAFETY: takes a number only; on Linux it concerns the calling thread alone. Giving way is always
    // permitted.
    let _ = unsafe { libc::nice(NICE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calling_thread_alone_gives_way() {
        // SAFETY: takes numbers only.
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = nice();
        let within = std::thread::spawn(move || {
            give_way();
            nice()
        });
        assert_eq!(within.join().unwrap(), (before + NICE).min(19));
        assert_eq!(nice(), before);
    }
}
