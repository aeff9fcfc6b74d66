//! A forked child has the engine's memory but none of its threads: every call there fails instead of waiting for ever.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{RwLock, RwLockReadGuard};
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

/// Tells whether this is a child of the process that opened the volumes.
pub(crate) fn in_child() -> bool {
    IN_CHILD.load(Ordering::Relaxed)
}

/// Locks a table for reading.
///
/// # Errors
/// As [`check`], in a forked child, if a thread that is not there any more was changing the table.
pub(crate) fn read<T>(table: &RwLock<T>) -> Outcome<RwLockReadGuard<'_, T>> {
    if in_child() {
        return match table.try_read() {
            Some(guard) => Ok(guard),
            None => refused(),
        };
    }
    Ok(table.read())
}

/// Refuses in/// Refuses in a child of the process that opened the volumes.
pub(crate) fn check() -> Outcome<()> {
    if in_child() {
        return refused();
    }
    Ok(())
}

fn refused<T>() -> Outcome<T> {
    refuse(
        Errno::ENOTCONN,
        "this process was forked from one that serves volumes, and has no engine",
    )
}
