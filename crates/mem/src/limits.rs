//! The process limits that writers are bound by.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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

/// Runs `work` with RLIMIT_FSIZE out of its way; `None`, and nothing is run, where there is none or the process may
/// not raise it.
///
/// For bytes that were acknowledged when the limit allowed them: the kernel applies the limit of the moment to whoever
/// writes, and a limit lowered since must not lose them (SEMANTICS.md section 0, fact 10). The limit belongs to the
/// whole process, so for that moment no thread is bound by it; a limit that the program sets meanwhile stays.
pub fn without_file_size_limit<R>(work: impl FnOnce() -> R) -> Option<R> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock();
    let before = getrlimit(Resource::Fsize);
    before.current?;
    let raised = raise(before)?;
    let result = work();
    let now = getrlimit(Resource::Fsize);
    if (now.current, now.maximum) == (raised.current, raised.maximum) {
        // Lowering it again needs no right, so this cannot fail.
        let _ = setrlimit(Resource::Fsize, before);
    }
    Some(result)
}

/// Sets the highest limit that the process may: none, with the right to raise the hard one, or else the hard one.
fn raise(before: Rlimit) -> Option<Rlimit> {
    let highest = [
        Rlimit {
            current: None,
            maximum: None,
        },
        Rlimit {
            current: before.maximum,
            maximum: before.maximum,
        },
    ];
    highest
        .into_iter()
        .find(|limit| setrlimit(Resource::Fsize, *limit).is_ok())
}

/// Returns vm.max_map_count if the process has as many mappings as that allows; `None` if it has fewer, or /proc does not
/// tell.
///
/// Reads /proc/self/maps, which may take milliseconds: to say what an `ENOMEM` was about.
#[must_use]
pub fn map_count_reached() -> Option<u64> {
    /// Mappings that other threads may have given up since the call that failed, or that it would have made.
    const SLACK: u64 = 8;
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?;
    let limit: u64 = limit.trim().parse().ok()?;
    let mut maps = std::fs::File::open("/proc/self/maps").ok()?;
    let mut piece = [0; 4096];
    let mut count = 0;
    loop {
        match std::io::Read::read(&mut maps, &mut piece).ok()? {
            0 => break,
            len => count += piece[..len].iter().filter(|&&byte| byte == b'\n').count() as u64,
        }
    }
    (count + SLACK >= limit).then_some(limit)
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
    fn a_process_of_few_mappings_has_not_reached_their_limit() {
        assert_eq!(map_count_reached(), None);
    }

    #[test]
    fn a_limit_is_looked_up_again_when_the_clock_has_ticked() {
        let _ = file_size_lately(1);
        LATELY.1.store(77, Ordering::Relaxed);
        assert_eq!(file_size_lately(1), Some(77));
        assert_eq!(file_size_lately(2), file_size());
    }
}
