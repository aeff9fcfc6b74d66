//! Locks of an open file description, of records (fcntl(2), F_OFD_SETLK) and of the whole file (flock(2)): who owns them is a
//! descriptor, not a process.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use pinfold_base::Errno;
use rustix::fs::FlockOperation;

/// What a lock keeps others from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordLock {
    /// Writing (F_RDLCK); shared.
    Read,
    /// Reading and writing (F_WRLCK); alone.
    Write,
}

/// Puts a lock on `range`, or takes all of the descriptor's off it; waits for nobody. Whether it could be is returned.
/// A range that ends at `u64::MAX` has no end.
///
/// # Errors
/// What fcntl(2) says, such as `EBADF` for a descriptor that is not open for what the lock is about.
pub fn set(
    fd: BorrowedFd<'_>,
    lock: Option<RecordLock>,
    range: &Range<u64>,
) -> Result<bool, Errno> {
    let mut record = record(lock, range)?;
    match call(fd, libc::F_OFD_SETLK, &mut record) {
        Ok(()) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Puts a lock on the whole file, changes it, or takes the descriptor's off; waits for nobody. Whether it could be is returned;
/// one that could not be changed is gone. Locks of records have nothing to do with it.
///
/// # Errors
/// What flock(2) says.
pub fn set_file(fd: BorrowedFd<'_>, lock: Option<RecordLock>) -> Result<bool, Errno> {
    let operation = match lock {
        Some(RecordLock::Read) => FlockOperation::NonBlockingLockShared,
        Some(RecordLock::Write) => FlockOperation::NonBlockingLockExclusive,
        None => FlockOperation::NonBlockingUnlock,
    };
    match rustix::fs::flock(fd, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(Errno::from_raw(errno.raw_os_error())),
    }
}

/// Finds a lock of another owner that keeps `lock` from `range`.
///
/// # Errors
/// What fcntl(2) says.
pub fn conflict(
    fd: BorrowedFd<'_>,
    lock: RecordLock,
    range: &Range<u64>,
) -> Result<Option<(RecordLock, Range<u64>)>, Errno> {
    let mut record = record(Some(lock), range)?;
    call(fd, libc::F_OFD_GETLK, &mut record)?;
    let found = match i32::from(record.l_type) {
        libc::F_RDLCK => RecordLock::Read,
        libc::F_WRLCK => RecordLock::Write,
        _ => return Ok(None),
    };
    let start = record.l_start.unsigned_abs();
    let end = match record.l_len {
        0 => u64::MAX,
        len => start.saturating_add(len.unsigned_abs()),
    };
    Ok(Some((found, start..end)))
}

fn record(lock: Option<RecordLock>, range: &Range<u64>) -> Result<libc::flock, Errno> {
    let signed = |offset: u64| i64::try_from(offset).map_err(|_| Errno::EINVAL);
    let len = match range.end {
        u64::MAX => 0,
        end => signed(end.saturating_sub(range.start))?,
    };
    let kind = match lock {
        Some(RecordLock::Read) => libc::F_RDLCK,
        Some(RecordLock::Write) => libc::F_WRLCK,
        None => libc::F_UNLCK,
    };
    Ok(libc::flock {
        // The three constants are 0, 1 and 2.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: signed(range.start)?,
        l_len: len,
        // These commands want it so.
        l_pid: 0,
    })
}

fn call(fd: BorrowedFd<'_>, command: i32, record: &mut libc::flock) -> Result<(), Errno> {
    let record: *mut libc::flock = record;
    // SAFETY: both commands read and write one `flock` at the address, which is that of an exclusive borrow for the length
    // of the call; the descriptor is borrowed as long.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, record) };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from(std::io::Error::last_os_error()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::RecordLock::{Read, Write};
    use super::*;

    #[test]
    fn locks_of_a_file_are_others_than_those_of_all_its_records() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        std::fs::write(&path, "").unwrap();
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).open(&path).unwrap()
        };
        let (a, b) = (open(), open());
        let (a, b) = (a.as_fd(), b.as_fd());
        assert_eq!(set_file(a, Some(Write)), Ok(true));
        assert_eq!(set_file(b, Some(Read)), Ok(false));
        assert_eq!(set(b, Some(Write), &(0..u64::MAX)), Ok(true));
        assert_eq!(set_file(a, Some(Read)), Ok(true));
        assert_eq!(set_file(b, Some(Read)), Ok(true));
        assert_eq!(set_file(a, Some(Write)), Ok(false));
        // What could not be changed is gone.
        assert_eq!(set_file(b, Some(Write)), Ok(true));
        assert_eq!(set_file(b, None), Ok(true));
        assert_eq!(set_file(a, None), Ok(true));
    }

    #[test]
    fn descriptors_own_locks_and_keep_each_other_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        std::fs::write(&path, "").unwrap();
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).open(&path).unwrap()
        };
        let (a, b) = (open(), open());
        let (a, b) = (a.as_fd(), b.as_fd());
        assert_eq!(set(a, Some(Write), &(0..10)), Ok(true));
        assert_eq!(set(b, Some(Read), &(5..20)), Ok(false));
        assert_eq!(conflict(b, Read, &(5..20)), Ok(Some((Write, 0..10))));
        assert_eq!(set(b, Some(Write), &(10..u64::MAX)), Ok(true));
        assert_eq!(
            conflict(a, Read, &(50..51)),
            Ok(Some((Write, 10..u64::MAX)))
        );
        assert_eq!(set(a, Some(Read), &(0..10)), Ok(true));
        assert_eq!(set(b, Some(Read), &(0..10)), Ok(true));
        assert_eq!(set(a, Some(Write), &(0..10)), Ok(false));
        assert_eq!(set(b, None, &(0..u64::MAX)), Ok(true));
        assert_eq!(conflict(a, Write, &(0..u64::MAX)), Ok(None));
        assert_eq!(
            set(a, Some(Read), &(u64::MAX - 1..u64::MAX)),
            Err(Errno::EINVAL)
        );
    }
}
