//! A forked child has the engine's memory but none of its threads: every call there fails instead of waiting for ever.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use pinfold::Errno;

use crate::errors::{Outcome, refuse};

static IN_CHILD: AtomicBool = AtomicBool::new(false);

/// Begins to watch for forks; once a process.
pub(crate) fn watch() {
    static WATCHING: Once = Once::new();
    extern "C" fn child() {
        IN_CHILD.store(true, Ordering::Relaxed);
    }
    WATCHING.call_once(|| {
        // SAFETY: `child` only stores to an atomic, which is allowed between fork and exec.
        unsafe { libc::pthread_atfork(None, None, Some(child)) };
    });
}

/// Refuses in a child of the process that opened the volumes.
pub(crate) fn check() -> Outcome<()> {
    if IN_CHILD.load(Ordering::Relaxed) {
        return refuse(
            Errno::ENOTCONN,
            "this process was forked from one that serves volumes, and has no engine",
        );
    }
    Ok(())
}
