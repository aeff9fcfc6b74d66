//! Transfers in the calling thread, by `preadv` and `pwritev`.

use std::os::fd::{AsRawFd, OwnedFd};

use pinfold_base::units::FILE_SIZE_MAX;
use pinfold_base::{Errno, Progress};

use super::Op;
use super::flight::{Registered, Verdict, cut};
use crate::limits;
use crate::span::Segments;

/// Moves `segments.bytes()` bytes at `offset`, continuing short transfers as the ring does.
pub(super) fn transfer(
    op: Op,
    file: &OwnedFd,
    offset: u64,
    segments: &Segments,
    block: u32,
) -> Progress<Errno> {
    let len = segments.bytes() as u64;
    if len == 0 {
        return Progress::complete(0);
    }
    if offset
        .checked_add(len)
        .is_none_or(|end| end > FILE_SIZE_MAX)
    {
        return Progress::stopped(0, Errno::EINVAL);
    }
    let mut done = 0;
    for mut piece in cut(segments, Registered::NONE) {
        loop {
            piece.gather(segments);
            let at = offset + (piece.from + piece.done) as u64;
            match piece.settle(op, block, call(op, file, at, &piece.fragments)) {
                Verdict::Ended => break,
                Verdict::Continue if op == Op::Write => {
                    let next = offset + (piece.from + piece.done) as u64;
                    // Cut short by the limit, as the kernel does; another try would bring a signal.
                    if limits::file_size().is_some_and(|limit| next >= limit) {
                        return Progress::stopped(done + piece.done as u64, Errno::EFBIG);
                    }
                }
                Verdict::Continue | Verdict::Retry => {}
            }
        }
        done += piece.done as u64;
        if let Some(stop) = piece.stop() {
            return Progress::stopped(done, stop);
        }
        if piece.done < piece.len {
            break;
        }
    }
    Progress::complete(done)
}

/// Makes one system call; returns bytes, or a negative error number as a ring does.
fn call(op: Op, file: &OwnedFd, offset: u64, fragments: &[libc::iovec]) -> i32 {
    let fd = file.as_raw_fd();
    // `cut` keeps the count within FRAGMENTS_MAX, and `transfer` the offset within i64.
    let (count, offset) = (fragments.len() as libc::c_int, offset as libc::off64_t);
    if let &[only] = fragments {
        let (addr, len) = (only.iov_base, only.iov_len);
        let moved = match op {
            // SAFETY: the fragment lies in Segments, which the caller holds and which let the kernel write there.
            Op::Read => unsafe { libc::pread64(fd, addr, len, offset) },
            // SAFETY: as above; the kernel reads there.
            Op::Write => unsafe { libc::pwrite64(fd, addr, len, offset) },
        };
        return outcome(moved);
    }
    outcome(match op {
        // SAFETY: the fragments lie in Segments, which the caller holds and which let the kernel write there.
        Op::Read => unsafe { libc::preadv64(fd, fragments.as_ptr(), count, offset) },
        // SAFETY: as above; the kernel reads there.
        Op::Write => unsafe { libc::pwritev64(fd, fragments.as_ptr(), count, offset) },
    })
}

/// Turns a system call's result into a ring's.
fn outcome(result: isize) -> i32 {
    if result < 0 {
        return -Errno::from(std::io::Error::last_os_error()).raw();
    }
    // A piece is at most PIECE_BYTES_MAX long.
    result as i32
}
