//! Threads that no signal handler of the program interrupts.
//!
//! A handler that touches mapped memory takes a fault wherever it happens to run. On top of a thread that holds a lock of
//! ours it would wait for what only that thread can release (SEMANTICS.md F-9, T67), so signals wait until the thread
//! holds nothing. Without mappings no handler can fault on us, and nothing is done.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Signals that the thread's own instructions raise: blocked, they would kill the process.
const SYNCHRONOUS: [libc::c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

/// While it lives, signals wait that handlers of the program would be run for on this thread.
///
/// Nests; dropped in the reverse order of creation.
#[must_use = "signals come again as soon as this is dropped"]
pub struct Quiet {
    /// The mask to come back to; `None` when nothing was changed.
    before: Option<libc::sigset_t>,
    /// The mask is the thread's: the undoing must happen there too.
    _here: PhantomData<*const ()>,
}

impl std::fmt::Debug for Quiet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Quiet(changed: {})", self.before.is_some())
    }
}

impl Quiet {
    /// Keeps signals away if the process has mappings. One relaxed load otherwise.
    #[inline]
    pub fn enter() -> Self {
        Self {
            before: if crate::mapped::any() { block() } else { None },
            _here: PhantomData,
        }
    }
}

impl Drop for Quiet {
    #[inline]
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // SAFETY: restores a mask that pthread_sigmask filled.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
        }
    }
}

/// Keeps signals away from this thread for good: how every background thread of the library begins.
pub fn keep_signals_away() {
    let _ = block();
}

#[cold]
fn block() -> Option<libc::sigset_t> {
    let mut wanted = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills the set.
    unsafe { libc::sigfillset(wanted.as_mut_ptr()) };
    for signal in SYNCHRONOUS {
        // SAFETY: the set was filled above; the number is that of a signal.
        unsafe { libc::sigdelset(wanted.as_mut_ptr(), signal) };
    }
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `wanted` is filled, `before` has room for a set.
    let outcome =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, wanted.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: pthread_sigmask filled it when it succeeded.
    (outcome == 0).then(|| unsafe { before.assume_init() })
}
