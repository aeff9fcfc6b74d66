//! Transfers that run by themselves, and calls that write records into user memory.
//!
//! *Owns*: one io_uring per transfer, for as long as it runs.
//!
//! *Does not own*: files; buffers.
//!
//! *Locking*: none.

use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};
use pinfold_base::Errno;

use super::{UserIov, raw_iov, returned, touch};
use crate::iov::Direction;

/// Starts a transfer between `fd` and a list, runs `meanwhile`, and waits for the transfer to end.
///
/// # Errors
/// What the transfer came to, or why none could be started (`ENOSYS`, `EPERM` where io_uring is switched off).
pub fn asynchronously(
    fd: BorrowedFd<'_>,
    direction: Direction,
    iov: &UserIov<'_>,
    offset: u64,
    meanwhile: &mut dyn FnMut(),
) -> Result<usize, Errno> {
    let (list, count) = raw_iov(iov)?;
    let count = u32::try_from(count).map_err(|_| Errno::EINVAL)?;
    let mut ring = IoUring::new(2)?;
    let file = types::Fd(fd.as_raw_fd());
    let entry = match direction {
        Direction::Source => opcode::Writev::new(file, list.as_ptr(), count)
            .offset(offset)
            .build(),
        Direction::Target => opcode::Readv::new(file, list.as_ptr(), count)
            .offset(offset)
            .build(),
    };
    // SAFETY: the list and its buffers (`UserIov`) outlive the transfer, which is awaited below whatever happens.
    unsafe { ring.submission().push(&entry) }.map_err(|_| Errno::EAGAIN)?;
    ring.submit()?;
    {
        // Were the transfer left behind, the kernel would use a list and buffers that are gone.
        let waits = Waits(&mut ring);
        meanwhile();
        drop(waits);
    }
    let done = ring.completion().next().ok_or(Errno::EIO)?;
    usize::try_from(done.result()).map_err(|_| Errno::from_raw(-done.result()))
}

/// Waits for the only transfer of a ring when dropped, a panic included.
struct Waits<'r>(&'r mut IoUring);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        while self.0.completion().is_empty() {
            match self.0.submit_and_wait(1) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) => std::thread::yield_now(),
                Ok(_) => {}
            }
        }
    }
}

/// Bytes of the request that FS_IOC_FIEMAP takes, and of each record it returns.
pub const FIEMAP_HEAD: usize = 32;
/// Bytes of one record.
pub const FIEMAP_RECORD: usize = 56;

/// Asks for the extents of a file (FS_IOC_FIEMAP), as many as fit behind the request in `buffer`; returns their number.
///
/// # Errors
/// As ioctl(2); `EFAULT` when the request cannot be stored, `EINVAL` for a list of more than one buffer or one too small
/// for the request.
pub fn extents(fd: BorrowedFd<'_>, buffer: &UserIov<'_>) -> Result<usize, Errno> {
    /// `_IOWR('f', 11, struct fiemap)`.
    const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
    /// Offset of the number of records found.
    const MAPPED: usize = 20;
    let [span] = buffer.spans() else {
        return Err(Errno::EINVAL);
    };
    let room = span.len.checked_sub(FIEMAP_HEAD).ok_or(Errno::EINVAL)? / FIEMAP_RECORD;
    let room = u32::try_from(room).map_err(|_| Errno::EINVAL)?;
    let mut head = [0u8; FIEMAP_HEAD];
    // From the first byte to the last there can be.
    head[8..16].copy_from_slice(&u64::MAX.to_ne_bytes());
    head[24..28].copy_from_slice(&room.to_ne_bytes());
    let addr = std::ptr::with_exposed_provenance_mut::<u8>(span.addr);
    // SAFETY: the buffer may be overwritten (`UserIov`), and is large enough.
    unsafe { touch::copy(addr, head.as_ptr(), head.len()) }.map_err(|_| Errno::EFAULT)?;
    // SAFETY: the request says how many records the buffer holds.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FIEMAP, addr) };
    returned(done as isize)?;
    let mut count = [0u8; 4];
    // SAFETY: as above.
    unsafe { touch::copy(count.as_mut_ptr(), addr.wrapping_add(MAPPED), count.len()) }
        .map_err(|_| Errno::EFAULT)?;
    Ok(u32::from_ne_bytes(count) as usize)
}
