//! Descriptors of the library's own, kept out of the program's way.
//!
//! A program that daemonizes closes a range of low descriptors, and one of ours among them would take the registration of
//! every mapping with it (SEMANTICS.md section 0, fact 8).

use std::os::fd::OwnedFd;

use rustix::io::fcntl_dupfd_cloexec;

/// Where our descriptors begin, if the process may have that many.
const FLOOR: i32 = 512;

/// Moves a descriptor to [`FLOOR`] or above; where RLIMIT_NOFILE does not reach that far it stays where it is.
pub(crate) fn high(fd: OwnedFd) -> OwnedFd {
    fcntl_dupfd_cloexec(&fd, FLOOR).unwrap_or(fd)
}
