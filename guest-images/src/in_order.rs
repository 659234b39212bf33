//! Work on several threads, results in order.

use std::{
    sync::mpsc::{Receiver, sync_channel},
    thread,
};

/// Results that may wait behind each thread: with the number of threads it bounds how far ahead of
/// the slowest piece of work the others get, and so memory.
const QUEUE: usize = 2;
/// More threads than this gain nothing: a disk is full before.
const MAX_THREADS: u64 = 18;

/// Calls `work` with 0 to `count` - 1 on all cores and gives the results to `take`, on the
/// caller's thread, in order. The first error of `take` ends it.
///
/// Threads take numbers in turn and `take` follows the same turn: nothing is sorted, and nothing
/// need be kept of what is missing.
pub(crate) fn in_order<T: Send, E>(
    count: u64,
    work: impl Fn(u64) -> T + Sync,
    mut take: impl FnMut(T) -> Result<(), E>,
) -> Result<(), E> {
    let threads = threads().min(count);
    if threads <= 1 {
        return (0..count).try_for_each(|number| take(work(number)));
    }
    thread::scope(|scope| {
        let work = &work;
        let results: Vec<Receiver<T>> = (0..threads)
            .map(|first| {
                let (done, results) = sync_channel(QUEUE);
                scope.spawn(move || {
                    let mut mine = (first..count).step_by(threads as usize);
                    // Nobody listens any more after an error.
                    mine.all(|number| done.send(work(number)).is_ok())
                });
                results
            })
            .collect();
        for results in results.iter().cycle().take(count as usize) {
            // A thread that is gone panicked, and the scope says so when it ends.
            let Ok(result) = results.recv() else { break };
            take(result)?;
        }
        Ok(())
    })
}

/// A few more than there are cores, as some wait for the disk.
fn threads() -> u64 {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    (cores + 2).min(MAX_THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_stop_at_an_error() {
        for count in [0, 1, 2, 3, 100] {
            let mut taken = Vec::new();
            let work = |n: u64| {
                if n.is_multiple_of(7) {
                    thread::sleep(std::time::Duration::from_millis(1));
                }
                n * n
            };
            in_order(count, work, |square| {
                taken.push(square);
                Ok::<_, ()>(())
            })
            .unwrap();
            assert!(taken.into_iter().eq((0..count).map(|n| n * n)));
        }
        let mut taken = 0;
        let stopped = in_order(
            1_000_000,
            |n| n,
            |n| {
                taken = n;
                if n < 20 { Ok(()) } else { Err("enough") }
            },
        );
        assert_eq!((stopped, taken), (Err("enough"), 20));
    }
}
