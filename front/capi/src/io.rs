//! Reading, writing and the file position.

use std::ffi::{c_int, c_void};
use std::io::{Seek, SeekFrom};

use pinfold::{Direction, Errno, IoOptions, IovCursor};

use crate::call::answer;
use crate::descriptor::{self, Description};
use crate::errors::{Failure, Outcome, refuse};
use crate::user;

/// Where a transfer takes place.
#[derive(Clone, Copy)]
enum At {
    /// At the file position, which moves.
    Position,
    /// At an offset.
    Offset(i64),
}

fn transfer(
    fd: c_int,
    cursor: impl FnOnce(Direction) -> Outcome<IovCursor<'static>>,
    direction: Direction,
    at: At,
    flags: c_int,
) -> libc::ssize_t {
    answer(|| {
        let description = descriptor::of(fd)?;
        let at = match at {
            At::Offset(offset) => match u64::try_from(offset) {
                Ok(offset) => Some(offset),
                Err(_) => return refuse(Errno::EINVAL, "the offset"),
            },
            At::Position => None,
        };
        let file = match direction {
            Direction::Target => description.file()?,
            // A directory cannot be open for writing.
            Direction::Source => description.file_or(Errno::EBADF)?,
        };
        let allowed = match direction {
            Direction::Target => file.access().read,
            Direction::Source => file.access().write,
        };
        if !allowed {
            return refuse(Errno::EBADF, "the descriptor is not open for that");
        }
        let how = how(&description, flags, direction)?;
        let mut cursor = cursor(direction)?;
        let progress = match (direction, at) {
            (Direction::Target, Some(offset)) => file.read_cursor(&mut cursor, offset, &how),
            (Direction::Target, None) => file.read_next_cursor(&mut cursor, &how),
            (Direction::Source, Some(offset)) => file.write_cursor(&mut cursor, offset, &how),
            (Direction::Source, None) => file.write_next_cursor(&mut cursor, &how),
        };
        // A call moves at most CALL_BYTES_MAX bytes.
        progress
            .posix()
            .map(|done| done as isize)
            .map_err(Failure::from)
    })
}

/// Translates the flags of preadv2 and pwritev2.
fn how(
    description: &Description,
    flags: c_int,
    direction: Direction,
) -> Outcome<IoOptions<'static>> {
    // Not in the libc crate for every C library.
    const RWF_NOAPPEND: c_int = 0x20;
    let mut known = libc::RWF_HIPRI | libc::RWF_NOWAIT | libc::RWF_DSYNC | libc::RWF_SYNC;
    if direction == Direction::Source {
        known |= libc::RWF_APPEND | RWF_NOAPPEND;
    }
    if flags & !known != 0 {
        return refuse(Errno::EOPNOTSUPP, "the flags");
    }
    let has = |flag| flags & flag != 0;
    if has(libc::RWF_APPEND) && has(RWF_NOAPPEND) {
        return refuse(Errno::EINVAL, "the flags");
    }
    let writes = direction == Direction::Source;
    Ok(IoOptions {
        nowait: has(libc::RWF_NOWAIT),
        dsync: writes && has(libc::RWF_DSYNC | libc::RWF_SYNC),
        append: writes && (has(libc::RWF_APPEND) || (description.appends() && !has(RWF_NOAPPEND))),
        cancel: None,
    })
}

/// Reads at the file position, as read(2).
///
/// # Safety
/// `buf` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_read(fd: c_int, buf: *mut c_void, count: usize) -> libc::ssize_t {
    let addr = buf.expose_provenance();
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffer(direction, addr, count) };
    transfer(fd, cursor, Direction::Target, At::Position, 0)
}

/// Writes at the file position, or at the end with O_APPEND, as write(2).
///
/// # Safety
/// `buf` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_write(fd: c_int, buf: *const c_void, count: usize) -> libc::ssize_t {
    let addr = buf.expose_provenance();
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffer(direction, addr, count) };
    transfer(fd, cursor, Direction::Source, At::Position, 0)
}

/// Reads at `offset`, as pread(2).
///
/// # Safety
/// `buf` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_pread(
    fd: c_int,
    buf: *mut c_void,
    count: usize,
    offset: libc::off_t,
) -> libc::ssize_t {
    let addr = buf.expose_provenance();
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffer(direction, addr, count) };
    transfer(fd, cursor, Direction::Target, At::Offset(offset), 0)
}

/// Writes at `offset`, as pwrite(2): at the end with O_APPEND, whatever the offset, as in Linux.
///
/// # Safety
/// `buf` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_pwrite(
    fd: c_int,
    buf: *const c_void,
    count: usize,
    offset: libc::off_t,
) -> libc::ssize_t {
    let addr = buf.expose_provenance();
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffer(direction, addr, count) };
    transfer(fd, cursor, Direction::Source, At::Offset(offset), 0)
}

/// Reads into several buffers at the file position, as readv(2).
///
/// # Safety
/// The array and the buffers are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_readv(
    fd: c_int,
    iov: *const libc::iovec,
    count: c_int,
) -> libc::ssize_t {
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffers(direction, iov, count) };
    transfer(fd, cursor, Direction::Target, At::Position, 0)
}

/// Writes several buffers at the file position, as writev(2).
///
/// # Safety
/// The array and the buffers are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_writev(
    fd: c_int,
    iov: *const libc::iovec,
    count: c_int,
) -> libc::ssize_t {
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffers(direction, iov, count) };
    transfer(fd, cursor, Direction::Source, At::Position, 0)
}

/// Reads into several buffers at `offset`, as preadv(2).
///
/// # Safety
/// The array and the buffers are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_preadv(
    fd: c_int,
    iov: *const libc::iovec,
    count: c_int,
    offset: libc::off_t,
) -> libc::ssize_t {
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffers(direction, iov, count) };
    transfer(fd, cursor, Direction::Target, At::Offset(offset), 0)
}

/// Writes several buffers at `offset`, as pwritev(2).
///
/// # Safety
/// The array and the buffers are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_pwritev(
    fd: c_int,
    iov: *const libc::iovec,
    count: c_int,
    offset: libc::off_t,
) -> libc::ssize_t {
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffers(direction, iov, count) };
    transfer(fd, cursor, Direction::Source, At::Offset(offset), 0)
}

/// Offset -1 of the calls with flags means the file position.
fn place(offset: libc::off_t) -> At {
    if offset == -1 {
        At::Position
    } else {
        At::Offset(offset)
    }
}

/// As pf_preadv, with flags, as preadv2(2): RWF_NOWAIT fails with EAGAIN rather than wait; offset -1 is the file position.
///
/// # Safety
/// The array and the buffers are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_preadv2(
    fd: c_int,
    iov: *const libc::iovec,
    count: c_int,
    offset: libc::off_t,
    flags: c_int,
) -> libc::ssize_t {
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffers(direction, iov, count) };
    transfer(fd, cursor, Direction::Target, place(offset), flags)
}

/// As pf_pwritev, with flags, as pwritev2(2): RWF_NOWAIT, RWF_DSYNC, RWF_SYNC, RWF_APPEND, RWF_NOAPPEND; offset -1 is the
/// file position.
///
/// # Safety
/// The array and the buffers are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_pwritev2(
    fd: c_int,
    iov: *const libc::iovec,
    count: c_int,
    offset: libc::off_t,
    flags: c_int,
) -> libc::ssize_t {
    // SAFETY: passed on to the caller.
    let cursor = |direction| unsafe { user::buffers(direction, iov, count) };
    transfer(fd, cursor, Direction::Source, place(offset), flags)
}

/// Moves the file position, as lseek(2), SEEK_DATA and SEEK_HOLE included.
#[unsafe(no_mangle)]
pub extern "C" fn pf_lseek(fd: c_int, offset: libc::off_t, whence: c_int) -> libc::off_t {
    answer(|| {
        let description = descriptor::of(fd)?;
        let mut file = description.file_or(Errno::EINVAL)?;
        let to = match whence {
            libc::SEEK_SET => SeekFrom::Start(position(offset)?),
            libc::SEEK_CUR => SeekFrom::Current(offset),
            libc::SEEK_END => SeekFrom::End(offset),
            libc::SEEK_DATA | libc::SEEK_HOLE => {
                let what = match whence {
                    libc::SEEK_DATA => pinfold::Seek::Data,
                    _ => pinfold::Seek::Hole,
                };
                // Linux has it ENXIO, not EINVAL, before the start as behind the end.
                let from = u64::try_from(offset).ok();
                let found = match from {
                    Some(from) => file.seek_to(what, from)?,
                    None => None,
                };
                match found {
                    Some(found) => SeekFrom::Start(found),
                    None => return refuse(Errno::ENXIO, "no data or hole from the offset on"),
                }
            }
            _ => return refuse(Errno::EINVAL, "whence"),
        };
        match file.seek(to) {
            // Offsets of files fit an off_t.
            Ok(position) => Ok(position as libc::off_t),
            Err(error) => refuse(Errno::from(&error), "the offset"),
        }
    })
}

fn position(offset: libc::off_t) -> Outcome<u64> {
    u64::try_from(offset).or_else(|_| refuse(Errno::EINVAL, "the offset"))
}
