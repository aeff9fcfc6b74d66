//! Threads that no signal handler of the program interrupts.
//!
//! A handler that touches mapped memory takes a fault wherever it happens to run. On top of a thread that holds a lock of
//! ours it would wait for what only that thread can release (SEMANTICS.md F-9, T67), so signals wait until the thread
//! holds nothing. Without mappings no handler can fault on us, and calls are only counted: whoever makes the first mapping
//! waits for those under way.

use std::marker::PhantomData;

mod calls;

/// Signals that the thread's own instructions raise, which blocked would kill the process; and the two (SIGCANCEL,
/// SIGSETXID) by which the C library reaches its threads, which pthread_sigmask(3) never blocks either.
const LET_THROUGH: [libc::c_int; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    32,
    33,
];

/// A signal mask as the kernel has it. The C library's is sixteen times as large and would have to be moved about with
/// every call of this library.
type Mask = u64;

/// While it lives, signals wait that handlers of the program would be run for on this thread.
///
/// Nests; dropped in the reverse order of creation.
#[must_use = "signals come again as soon as this is dropped"]
pub struct Quiet {
    /// The mask to come back to; `None` when nothing was changed.
    before: Option<Mask>,
    /// The note of a call that signals may interrupt.
    noted: Option<calls::Noted>,
    /// The mask is the thread's: the undoing must happen there too.
    _here: PhantomData<*const ()>,
}

impl std::fmt::Debug for Quiet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Quiet(changed: {})", self.before.is_some())
    }
}

impl Quiet {
    /// Keeps signals away if the process has mappings. Two plain stores and a load otherwise.
    #[inline]
    pub fn enter() -> Self {
        let noted = calls::begin();
        if !crate::mapped::any() {
            return Self {
                before: None,
                noted: Some(noted),
                _here: PhantomData,
            };
        }
        calls::end(noted);
        Self {
            before: block(),
            noted: None,
            _here: PhantomData,
        }
    }
}

impl Quiet {
    /// Keeps signals away whether the process has mappings or not: for starting threads, which have them kept away for good.
    pub fn for_threads() -> Self {
        Self {
            before: block(),
            noted: None,
            _here: PhantomData,
        }
    }
}

impl Drop for Quiet {
    #[inline]
    fn drop(&mut self) {
        if let Some(before) = self.before {
            set_mask(libc::SIG_SETMASK, before);
        }
        if let Some(noted) = self.noted {
            calls::end(noted);
        }
    }
}

/// While it lives, calls begin as if the process had a mapping.
#[derive(Debug)]
#[must_use = "a mapping has to be made before this is dropped"]
pub struct Expecting(());

impl Expecting {
    /// Says that a mapping is about to be made, and waits for the calls under way that signals may interrupt: until half a
    /// minute has passed, and not for this thread's own. Nothing may be held, and no call be begun but of what makes mappings.
    pub fn a_mapping() -> Self {
        crate::mapped::count(1);
        let expecting = Self(());
        calls::wait_for_all();
        expecting
    }
}

impl Drop for Expecting {
    fn drop(&mut self) {
        crate::mapped::count(-1);
    }
}

/// Keeps signals away from this thread for good: how every background thread of the library begins.
pub fn keep_signals_away() {
    let _ = block();
    calls::exempt();
}

#[cold]
fn block() -> Option<Mask> {
    let through = LET_THROUGH
        .iter()
        .fold(0, |mask, signal| mask | 1 << (signal - 1));
    set_mask(libc::SIG_BLOCK, !through)
}

/// Changes this thread's mask as sigprocmask(2) does; returns the one before.
fn set_mask(how: libc::c_int, mask: Mask) -> Option<Mask> {
    let mut before: Mask = 0;
    // SAFETY: both masks are as long as the call is told.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const mask,
            &raw mut before,
            size_of::<Mask>(),
        )
    };
    (outcome == 0).then_some(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_blocked(signal: libc::c_int) -> bool {
        let mut now = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: a null set only queries; there is room for the answer.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), now.as_mut_ptr()) };
        // SAFETY: filled above.
        unsafe { libc::sigismember(now.as_ptr(), signal) == 1 }
    }

    #[test]
    fn signals_stay_away_until_the_guard_is_dropped_and_faults_never_do() {
        assert!(!is_blocked(libc::SIGUSR1));
        let quiet = Quiet {
            before: block(),
            noted: None,
            _here: PhantomData,
        };
        assert!(is_blocked(libc::SIGUSR1) && is_blocked(libc::SIGRTMAX()));
        assert!(!is_blocked(libc::SIGBUS) && !is_blocked(libc::SIGSEGV));
        drop(quiet);
        assert!(!is_blocked(libc::SIGUSR1));
    }
}
