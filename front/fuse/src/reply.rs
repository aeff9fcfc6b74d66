//! Replies to reads, sent from the cache's own frames.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use fuser::ReplyData;
use pinfold::{Errno, Lease};

/// Bytes of the header before a reply's data.
const HEADER_BYTES: usize = 16;

/// The session's device, for replies that the protocol library would copy together first.
///
/// The library hands out no way to write pieces that are not slices, and frames are none: others may be writing to them.
#[derive(Debug, Default)]
pub(crate) struct Device(OnceLock<OwnedFd>);

impl Device {
    /// Takes the session's descriptor, once.
    pub(crate) fn set(&self, fd: OwnedFd) {
        // A second session over the same server does not exist.
        let _ = self.0.set(fd);
    }

    /// Sends a lease's bytes as the answer to a read.
    pub(crate) fn send(&self, unique: u64, lease: &Lease, reply: ReplyData) {
        let Some(fd) = self.0.get() else {
            return reply.error(fuser::Errno::EIO);
        };
        let header = header(unique, lease.len());
        match pinfold::writev_spans(fd.as_fd(), &header, lease.spans()) {
            Ok(_) => forget(reply),
            // The request was given up meanwhile: nobody waits for any answer.
            Err(Errno::ENOENT | Errno::ENODEV) => forget(reply),
            Err(errno) => {
                tracing::warn!(%errno, "cannot send the answer to a read");
                reply.error(fuser::Errno::EIO);
            }
        }
    }
}

/// Keeps the library from answering a request that has been answered. What is leaked is one count on the session's
/// descriptor, which the process keeps until it ends.
fn forget(reply: ReplyData) {
    std::mem::forget(reply);
}

/// Builds `struct fuse_out_header`: length, error, and the request's number.
fn header(unique: u64, data: usize) -> [u8; HEADER_BYTES] {
    // A read asks for at most a few MiB.
    let len = (HEADER_BYTES + data) as u32;
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&len.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_the_kernels_struct() {
        let bytes = header(0x0102_0304_0506_0708, 4096);
        assert_eq!(bytes[..4], 4112u32.to_ne_bytes());
        assert_eq!(bytes[4..8], [0; 4], "no error");
        assert_eq!(bytes[8..], 0x0102_0304_0506_0708u64.to_ne_bytes());
    }
}
