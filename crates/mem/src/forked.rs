//! Whether this process is a child that was forked off a running engine.
//!
//! Threads, rings and registrations do not survive fork(2); what is left in the child's memory looks alive and is not.
//! The rooms above ask [`forked`] first and fail clearly. A child made by a bare clone(2) system call, which runs no
//! handlers, is not noticed.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// Forks between the process that began to watch and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// A process, told apart from those it forks and those that forked it.
///
/// What a process made is its own: a child neither uses nor drops it, and may make its own of the same kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process(u32);

impl Process {
    /// Returns the calling process; begins to notice forks.
    #[must_use]
    pub fn current() -> Self {
        watch();
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Tells whether it is the calling process. Async-signal-safe.
    #[inline]
    #[must_use]
    pub fn is_current(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }
}

/// Begins to notice forks. Cheap from the second time on.
pub fn watch() {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        // SAFETY: the handler adds to an atomic, which a child of a threaded process may do.
        let refused = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        // Only memory for the list can lack; then nobody is told, as before the first call.
        debug_assert_eq!(refused, 0, "pthread_atfork");
    });
}

unsafe extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// Tells whether this process was forked off one in which [`watch`] was called.
#[inline]
#[must_use]
pub fn forked() -> bool {
    FORKS.load(Ordering::Relaxed) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_knows_that_it_is_one_and_the_parent_that_it_is_none() {
        let parent = Process::current();
        // SAFETY: the child calls async-signal-safe functions only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends the child without unwinding.
            unsafe {
                libc::_exit(if forked() && !parent.is_current() {
                    7
                } else {
                    1
                })
            };
        }
        let mut status = 0;
        // SAFETY: waits for our child.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(libc::WEXITSTATUS(status), 7, "status {status:#x}");
        assert!(!forked() && parent.is_current());
    }
}
