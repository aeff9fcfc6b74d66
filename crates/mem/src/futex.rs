//! Sleeping on a word of memory: how a thread waits where it may neither allocate nor touch `errno`.
//!
//! Raw system calls without thread-local state, so a signal handler may make them.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::thread::futex::{self, Flags, Timespec};

/// Sleeps while `word` is `seen`, until woken or for at most `limit`; spurious wake-ups happen.
pub fn wait(word: &AtomicU32, seen: u32, limit: Option<Duration>) {
    let limit = limit.map(|limit| Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    });
    // Whatever it says (changed meanwhile, interrupted, time is up), the caller looks again.
    let _ = futex::wait(word, Flags::PRIVATE, seen, limit.as_ref());
}

/// Wakes up to `count` threads that sleep on `word`.
pub fn wake(word: &AtomicU32, count: u32) {
    // The kernel takes it as signed, and a negative one for a single thread.
    let count = count.min(i32::MAX.unsigned_abs());
    let _ = futex::wake(word, Flags::PRIVATE, count);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn everybody_is_woken_when_all_are_meant() {
        let word = Arc::new(AtomicU32::new(0));
        let sleepers: Vec<_> = (0..5)
            .map(|_| {
                let word = Arc::clone(&word);
                std::thread::spawn(move || {
                    let begun = std::time::Instant::now();
                    while word.load(Ordering::SeqCst) == 0 {
                        wait(&word, 0, Some(Duration::from_secs(20)));
                    }
                    begun.elapsed()
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(100));
        word.store(1, Ordering::SeqCst);
        wake(&word, u32::MAX);
        for sleeper in sleepers {
            assert!(sleeper.join().unwrap() < Duration::from_secs(10));
        }
    }
}
