//! The process limits that writers are bound by.

use rustix::process::{Resource, getrlimit};

/// Returns RLIMIT_FSIZE in bytes; `None` when there is no limit.
#[must_use]
pub fn file_size() -> Option<u64> {
    getrlimit(Resource::Fsize).current
}

/// Sends SIGXFSZ to the calling thread, as the kernel does to a writer at its limit.
pub fn raise_file_size_signal() {
    // SAFETY: raises a signal with no arguments; its effect is the program's own choice.
    unsafe { libc::raise(libc::SIGXFSZ) };
}
