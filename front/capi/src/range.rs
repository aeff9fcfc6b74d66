//! Sizes, ranges, durability, and copying between files.

use std::ffi::{c_char, c_int, c_uint};
use std::ops::Range;

use pinfold::{
    AlignedBuf, AllocateMode, CALL_BYTES_MAX, Errno, File, IoOptions, IovCursor, OpenOptions,
};

use crate::call::{answer, answer_number};
use crate::descriptor::{self, Opened};
use crate::errors::{Outcome, refuse};
use crate::user;
use crate::volume::{self, VolumeHandle};
use crate::walk::{Place, walk};

/// Bytes copied at once between two files.
const COPY_BYTES: usize = 1 << 20;

fn size_of(length: libc::off_t) -> Outcome<u64> {
    u64::try_from(length).or_else(|_| refuse(Errno::EINVAL, "the length"))
}

/// Checks a range as fallocate does.
fn range_of(offset: libc::off_t, len: libc::off_t) -> Outcome<Range<u64>> {
    let (Ok(start), Ok(len)) = (u64::try_from(offset), u64::try_from(len)) else {
        return refuse(Errno::EINVAL, "the range");
    };
    if len == 0 {
        return refuse(Errno::EINVAL, "the length");
    }
    match start
        .checked_add(len)
        .filter(|&end| i64::try_from(end).is_ok())
    {
        Some(end) => Ok(start..end),
        None => refuse(Errno::EFBIG, "the range"),
    }
}

/// Sets the size, as ftruncate(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_ftruncate(fd: c_int, length: libc::off_t) -> c_int {
    answer(|| {
        let description = descriptor::of(fd)?;
        let size = size_of(length)?;
        description.file_or(Errno::EINVAL)?.set_len(size)?;
        Ok(0)
    })
}

/// Sets the size of the file at `path`, as truncate(2).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_truncate(
    volume: *mut VolumeHandle,
    path: *const c_char,
    length: libc::off_t,
) -> c_int {
    answer(|| {
        let served = volume::of(volume)?;
        // SAFETY: passed on to the caller.
        let path = unsafe { user::path(path) }?;
        let size = size_of(length)?;
        let node = walk(&served, Place::root(&served), &path, true)?.found()?;
        node.open(&OpenOptions::new().write(true))?.set_len(size)?;
        Ok(0)
    })
}

/// Reserves, punches, zeroes, collapses or inserts a range, as fallocate(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_fallocate(
    fd: c_int,
    mode: c_int,
    offset: libc::off_t,
    len: libc::off_t,
) -> c_int {
    answer(|| allocate(fd, mode, offset, len).map(|()| 0))
}

/// Reserves a range and grows the file to its end; returns the error number itself, as posix_fallocate(3).
#[unsafe(no_mangle)]
pub extern "C" fn pf_fallocate_number(fd: c_int, offset: libc::off_t, len: libc::off_t) -> c_int {
    answer_number(|| allocate(fd, 0, offset, len))
}

fn allocate(fd: c_int, mode: c_int, offset: libc::off_t, len: libc::off_t) -> Outcome<()> {
    const KEEP: c_int = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: c_int = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: c_int = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP: c_int = ZERO | KEEP;
    const COLLAPSE: c_int = libc::FALLOC_FL_COLLAPSE_RANGE;
    const INSERT: c_int = libc::FALLOC_FL_INSERT_RANGE;
    let description = descriptor::of(fd)?;
    let mode = match mode {
        0 => AllocateMode::Extend,
        KEEP => AllocateMode::KeepSize,
        PUNCH => AllocateMode::Punch,
        ZERO => AllocateMode::ZeroExtend,
        ZERO_KEEP => AllocateMode::ZeroKeepSize,
        COLLAPSE => AllocateMode::Collapse,
        INSERT => AllocateMode::Insert,
        _ => return refuse(Errno::EOPNOTSUPP, "the mode"),
    };
    let file = description.file_or(Errno::EBADF)?;
    if !file.access().write {
        return refuse(Errno::EBADF, "the descriptor is not open for writing");
    }
    file.allocate(mode, range_of(offset, len)?)?;
    Ok(())
}

/// Checks the advice and follows none: read-ahead sees patterns by itself. Returns the error number itself, as
/// posix_fadvise(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_fadvise(
    fd: c_int,
    offset: libc::off_t,
    len: libc::off_t,
    advice: c_int,
) -> c_int {
    answer_number(|| {
        descriptor::of(fd)?;
        let known = libc::POSIX_FADV_NORMAL..=libc::POSIX_FADV_NOREUSE;
        if offset < 0 || len < 0 || !known.contains(&advice) {
            return refuse(Errno::EINVAL, "the range or the advice");
        }
        Ok(())
    })
}

/// Writes back and makes the file or directory durable, as fsync(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_fsync(fd: c_int) -> c_int {
    answer(|| {
        match &descriptor::of(fd)?.opened {
            Opened::File(file) => file.sync_all()?,
            Opened::Directory(place) => place.node().sync_dir()?,
        }
        Ok(0)
    })
}

/// Writes back and makes the data durable, and what is needed to read it, as fdatasync(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_fdatasync(fd: c_int) -> c_int {
    answer(|| {
        match &descriptor::of(fd)?.opened {
            Opened::File(file) => file.sync_data()?,
            Opened::Directory(place) => place.node().sync_dir()?,
        }
        Ok(0)
    })
}

/// Writes back the volume a descriptor belongs to and makes it durable, as syncfs(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_syncfs(fd: c_int) -> c_int {
    answer(|| {
        descriptor::of(fd)?.served.volume().sync()?;
        Ok(0)
    })
}

/// Writes back a range without making it durable, as sync_file_range(2) with all its flags; `nbytes` 0 means to the end.
#[unsafe(no_mangle)]
pub extern "C" fn pf_sync_file_range(
    fd: c_int,
    offset: libc::off_t,
    nbytes: libc::off_t,
    flags: c_uint,
) -> c_int {
    const KNOWN: c_uint = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    answer(|| {
        let description = descriptor::of(fd)?;
        let (Ok(start), Ok(len)) = (u64::try_from(offset), u64::try_from(nbytes)) else {
            return refuse(Errno::EINVAL, "the range");
        };
        let end = start.saturating_add(if len == 0 { u64::MAX } else { len });
        if flags & !KNOWN != 0 || (len != 0 && i64::try_from(end).is_err()) {
            return refuse(Errno::EINVAL, "the range or the flags");
        }
        let file = description.file_or(Errno::ESPIPE)?;
        if flags & libc::SYNC_FILE_RANGE_WRITE != 0 {
            file.write_back(start..end)?;
        }
        Ok(0)
    })
}

/// Copies bytes from one file to another through the cache, as copy_file_range(2); NULL offsets mean the file positions.
///
/// # Safety
/// The offsets are the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_copy_file_range(
    fd_in: c_int,
    offset_in: *mut libc::off_t,
    fd_out: c_int,
    offset_out: *mut libc::off_t,
    len: usize,
    flags: c_uint,
) -> libc::ssize_t {
    answer(|| {
        let (from, to) = (descriptor::of(fd_in)?, descriptor::of(fd_out)?);
        if flags != 0 {
            return refuse(Errno::EINVAL, "the flags");
        }
        let (source, target) = (from.file()?, to.file()?);
        if !source.access().read || !target.access().write || to.appends() {
            return refuse(Errno::EBADF, "a descriptor is not open for that");
        }
        // SAFETY: passed on to the caller.
        let start = unsafe { offset_of(source, offset_in) }?;
        // SAFETY: passed on to the caller.
        let at = unsafe { offset_of(target, offset_out) }?;
        let len = len.min(CALL_BYTES_MAX) as u64;
        let fits = |offset: u64| i64::try_from(offset.saturating_add(len)).is_ok();
        if !fits(start) || !fits(at) {
            return refuse(Errno::EOVERFLOW, "the range");
        }
        if source.node() == target.node() && start < at + len && at < start + len {
            return refuse(Errno::EINVAL, "the ranges overlap");
        }
        let done = copy(source, start, target, at, len)?;
        // SAFETY: passed on to the caller.
        unsafe { move_offset(source, offset_in, start + done) }?;
        // SAFETY: passed on to the caller.
        unsafe { move_offset(target, offset_out, at + done) }?;
        // At most CALL_BYTES_MAX.
        Ok(done as isize)
    })
}

/// # Safety
/// As for [`user::buffer`].
unsafe fn offset_of(mut file: &File, given: *const libc::off_t) -> Outcome<u64> {
    use std::io::Seek;
    if given.is_null() {
        return file
            .stream_position()
            .or_else(|error| refuse(Errno::from(&error), "the file position"));
    }
    // SAFETY: passed on to the caller.
    let offset = unsafe { user::get(given) }?;
    u64::try_from(offset).or_else(|_| refuse(Errno::EINVAL, "the offset"))
}

/// # Safety
/// As for [`user::buffer`].
unsafe fn move_offset(mut file: &File, given: *mut libc::off_t, offset: u64) -> Outcome<()> {
    use std::io::{Seek, SeekFrom};
    if given.is_null() {
        return match file.seek(SeekFrom::Start(offset)) {
            Ok(_) => Ok(()),
            Err(error) => refuse(Errno::from(&error), "the file position"),
        };
    }
    // Checked by the caller to fit.
    // SAFETY: passed on to the caller.
    unsafe { user::put(given, offset as libc::off_t) }
}

/// Copies until `len` bytes are done, the source ends or something fails; the error counts if nothing was done.
fn copy(source: &File, start: u64, target: &File, at: u64, len: u64) -> Outcome<u64> {
    let mut buf = AlignedBuf::zeroed(COPY_BYTES.min(len as usize));
    let how = IoOptions::default();
    let mut done = 0;
    while done < len {
        let want = (len - done).min(buf.len() as u64) as usize;
        let mut into = IovCursor::from_mut_slice(&mut buf.as_mut_slice()[..want]);
        let read = source.read_cursor(&mut into, start + done, &how).posix();
        let got = match read {
            Ok(0) => break,
            Ok(got) => got as usize,
            Err(_) if done > 0 => break,
            Err(error) => return Err(error.into()),
        };
        let mut from = IovCursor::from_slice(&buf.as_mut_slice()[..got]);
        match target.write_cursor(&mut from, at + done, &how).posix() {
            Ok(written) => {
                done += written;
                if written < got as u64 {
                    break;
                }
            }
            Err(_) if done > 0 => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}
