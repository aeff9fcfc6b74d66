//! The process limits that writers are bound by.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Resource, getrlimit};

/// What [`file_size_lately`] found last, and when; both relaxed, see there.
static LATELY: (AtomicU64, AtomicU64) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));

/// Returns RLIMIT_FSIZE in bytes; `None` when there is no limit.
#[must_use]
pub fn file_size() -> Option<u64> {
    getrlimit(Resource::Fsize).current
}

/// Returns RLIMIT_FSIZE as it was at the coarse clock's time `now_ns` or since: one system call a tick of that
/// clock instead of one a call, which would cost more than a cached page's write.
///
/// Good enough for what does not make a file grow: a limit lowered this very moment binds it at the next tick.
#[must_use]
pub fn file_size_lately(now_ns: u64) -> Option<u64> {
    let (when, limit) = &LATELY;
    // Another thread may be between its two stores: then this is the limit of a tick before.
    let limit = if when.load(Ordering::Acquire) == now_ns {
        limit.load(Ordering::Relaxed)
    } else {
        let found = file_size().unwrap_or(u64::MAX);
        limit.store(found, Ordering::Relaxed);
        when.store(now_ns, Ordering::Release);
        found
    };
    (limit != u64::MAX).then_some(limit)
}

/// Sends SIGXFSZ to the calling thread, as the kernel does to a writer at its limit.
pub fn raise_file_size_signal() {
    // SAFETY: raises a signal with no arguments; its effect is the program's own choice.
    unsafe { libc::raise(libc::SIGXFSZ) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_looked_up_again_when_the_clock_has_ticked() {
        let _ = file_size_lately(1);
        LATELY.1.store(77, Ordering::Relaxed);
        assert_eq!(file_size_lately(1), Some(77));
        assert_eq!(file_size_lately(2), file_size());
    }
}
