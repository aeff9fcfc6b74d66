//! The caller's memory: whatever address C hands over is copied from or to without trusting it.
//!
//! No reference or slice is ever made of it. A copy that meets memory which is not there brings it in and goes on, and ends
//! in `EFAULT` when nobody can.

use std::ffi::{OsString, c_char};
use std::mem::{MaybeUninit, size_of};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use pinfold::{CALL_BYTES_MAX, Direction, Errno, IovCursor, PAGE_SIZE, RawSpan, faultin};

use crate::errors::{Failure, Outcome, refuse};

/// The longest path, its closing zero byte included, as in Linux.
pub(crate) const PATH_MAX: usize = 4096;
/// Segments of one vectored call at most, as in Linux.
const IOV_MAX: i32 = 1024;
/// Copies that came to nothing at one place before the memory counts as bad: somebody else keeps taking it away.
const FRUITLESS_MAX: u32 = 16;

/// A C structure that is nothing but bytes.
///
/// # Safety
/// Every bit pattern is a value of the type, and it holds no references.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers.
unsafe impl Plain for i64 {}
// SAFETY: an integer.
unsafe impl Plain for u8 {}
// SAFETY: integers, and a raw pointer that is only read as an address.
unsafe impl Plain for libc::iovec {}
// SAFETY: integers.
unsafe impl Plain for libc::stat {}
// SAFETY: integers.
unsafe impl Plain for libc::statvfs {}
// SAFETY: integers.
unsafe impl Plain for libc::timespec {}
// SAFETY: integers.
unsafe impl Plain for libc::flock {}

/// Makes a cursor over one buffer of the caller's.
///
/// # Safety
/// What is mapped at the address is the caller's to lend for this call, as it would be with the system call.
pub(crate) unsafe fn buffer(
    direction: Direction,
    addr: usize,
    len: usize,
) -> Outcome<IovCursor<'static>> {
    if isize::try_from(len).is_err() {
        // As in Linux, where such a buffer reaches beyond user space.
        return refuse(Errno::EFAULT, "the length");
    }
    let len = len.min(CALL_BYTES_MAX);
    // SAFETY: passed on to the caller.
    Ok(unsafe { IovCursor::from_raw(direction, &[RawSpan { addr, len }]) })
}

/// Makes a cursor over the buffers that an array of the caller's names.
///
/// # Safety
/// As for [`buffer`], of the array and of every buffer.
pub(crate) unsafe fn buffers(
    direction: Direction,
    array: *const libc::iovec,
    count: i32,
) -> Outcome<IovCursor<'static>> {
    if !(0..=IOV_MAX).contains(&count) {
        return refuse(Errno::EINVAL, "the number of buffers");
    }
    let mut spans = Vec::with_capacity(count as usize);
    let mut left = CALL_BYTES_MAX;
    for index in 0..count as usize {
        // SAFETY: passed on to the caller; the address is checked by the copy.
        let segment = unsafe { get(array.wrapping_add(index)) }?;
        if isize::try_from(segment.iov_len).is_err() {
            return refuse(Errno::EINVAL, "a buffer's length");
        }
        let len = segment.iov_len.min(left);
        left -= len;
        spans.push(RawSpan {
            addr: segment.iov_base.expose_provenance(),
            len,
        });
    }
    // SAFETY: passed on to the caller.
    Ok(unsafe { IovCursor::from_raw(direction, &spans) })
}

/// Copies bytes out of the caller's memory.
///
/// # Safety
/// As for [`buffer`].
pub(crate) unsafe fn read_bytes(from: usize, into: &mut [u8]) -> Outcome<()> {
    // SAFETY: passed on to the caller.
    unsafe { copy(Direction::Source, from, into) }
}

/// Copies bytes to the caller's memory; takes `from` exclusively because the copy routine serves both ways.
///
/// # Safety
/// As for [`buffer`].
pub(crate) unsafe fn write_bytes(to: usize, from: &mut [u8]) -> Outcome<()> {
    // SAFETY: passed on to the caller.
    unsafe { copy(Direction::Target, to, from) }
}

/// # Safety
/// As for [`buffer`].
unsafe fn copy(direction: Direction, addr: usize, ours: &mut [u8]) -> Outcome<()> {
    let spans = [RawSpan {
        addr,
        len: ours.len(),
    }];
    // SAFETY: passed on to the caller.
    let mut cursor = unsafe { IovCursor::from_raw(direction, &spans) };
    let (mut done, mut fruitless) = (0, 0);
    loop {
        let copied = cursor.copy_slice_nofault(&mut ours[done..]);
        // At most `ours.len()`.
        done += copied.done as usize;
        if copied.stop.is_none() {
            return Ok(());
        }
        fruitless = if copied.done > 0 { 0 } else { fruitless + 1 };
        if fruitless > FRUITLESS_MAX || faultin::fault_in_cursor(&cursor, 1) > 0 {
            return refuse(Errno::EFAULT, "an address");
        }
    }
}

/// Copies a structure out of the caller's memory.
///
/// # Safety
/// As for [`buffer`].
pub(crate) unsafe fn get<T: Plain>(from: *const T) -> Outcome<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: zeroed memory of that size, borrowed exclusively through `value`.
    let bytes =
        unsafe { std::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>()) };
    // SAFETY: passed on to the caller.
    unsafe { read_bytes(from.expose_provenance(), bytes) }?;
    // SAFETY: `Plain`: whatever was copied is a value.
    Ok(unsafe { value.assume_init() })
}

/// Copies a structure to the caller's memory.
///
/// # Safety
/// As for [`buffer`].
pub(crate) unsafe fn put<T: Plain>(to: *mut T, mut value: T) -> Outcome<()> {
    let ours = (&raw mut value).cast::<u8>();
    // SAFETY: a local that nothing else refers to; callers build theirs from zeroed memory, so padding is initialized.
    let bytes = unsafe { std::slice::from_raw_parts_mut(ours, size_of::<T>()) };
    // SAFETY: passed on to the caller.
    unsafe { write_bytes(to.expose_provenance(), bytes) }
}

/// Copies a path out of the caller's memory.
///
/// # Safety
/// As for [`buffer`].
pub(crate) unsafe fn path(from: *const c_char) -> Outcome<PathBuf> {
    // SAFETY: passed on to the caller.
    let bytes = unsafe { string(from.expose_provenance()) }?;
    Ok(OsString::from_vec(bytes).into())
}

/// # Safety
/// As for [`buffer`].
unsafe fn string(from: usize) -> Outcome<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 256];
    while bytes.len() < PATH_MAX {
        let at = from.wrapping_add(bytes.len());
        // Not across a page's border: what comes after the closing zero byte need not be there.
        let in_page = PAGE_SIZE as usize - at % PAGE_SIZE as usize;
        let n = chunk.len().min(in_page).min(PATH_MAX - bytes.len());
        // SAFETY: passed on to the caller.
        unsafe { read_bytes(at, &mut chunk[..n]) }?;
        if let Some(end) = chunk[..n].iter().position(|&byte| byte == 0) {
            bytes.extend_from_slice(&chunk[..end]);
            return Ok(bytes);
        }
        bytes.extend_from_slice(&chunk[..n]);
    }
    Err(Failure::Argument(Errno::ENAMETOOLONG, "the path"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_addresses_are_efault_wherever_they_lie() {
        for addr in [0usize, 1, 0x0000_8000_0000_0000, usize::MAX - 8, usize::MAX] {
            // SAFETY: nothing is mapped there.
            let failed = unsafe { read_bytes(addr, &mut [0; 16]) }.unwrap_err();
            assert_eq!(failed.errno(), Errno::EFAULT, "{addr:#x}");
            // SAFETY: nothing is mapped there.
            let failed = unsafe { path(addr as *const c_char) }.unwrap_err();
            assert_eq!(failed.errno(), Errno::EFAULT, "{addr:#x}");
        }
    }

    #[test]
    fn a_path_ends_at_its_zero_byte_or_is_too_long() {
        let mut long = vec![b'a'; PATH_MAX];
        // SAFETY: a live buffer that is PATH_MAX bytes long.
        let failed = unsafe { string(long.as_ptr() as usize) }.unwrap_err();
        assert_eq!(failed.errno(), Errno::ENAMETOOLONG);
        long[PATH_MAX - 1] = 0;
        // SAFETY: a live buffer that ends in a zero byte.
        let whole = unsafe { string(long.as_ptr() as usize) }.unwrap();
        assert_eq!(whole.len(), PATH_MAX - 1);
    }
}
