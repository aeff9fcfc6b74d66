//! Reading a directory from any position, as NFS and FUSE servers must.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use pinfold_base::Errno;
use rustix::fs::{RawDir, SeekFrom};

use super::stat::Kind;

/// Bytes of entries fetched from the kernel at once.
const BATCH_BYTES: usize = 32 << 10;

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name; `.` and `..` are listed too.
    pub name: OsString,
    /// The inode's number on the directory's own device; of a mount point, the covered inode's.
    pub inode: u64,
    /// What it is, where the directory itself tells.
    pub kind: Option<Kind>,
    /// The position behind this entry.
    pub next: u64,
}

/// An open directory, read entry by entry.
///
/// Positions are the filesystem's own cookies: they stay good while entries come and go, and for seekdir(3).
#[derive(Debug)]
pub struct Entries {
    fd: OwnedFd,
    /// Entries read ahead of `position`, in order.
    batch: VecDeque<DirEntry>,
    /// The position of the batch's first entry.
    position: u64,
}

impl Entries {
    /// Reads the directory behind `fd`, which must not be an `O_PATH` descriptor.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            batch: VecDeque::new(),
            position: 0,
        }
    }

    /// Moves to a position that an entry gave as its `next`; 0 is the start.
    ///
    /// # Errors
    /// `EINVAL` for a position that the directory does not know.
    pub fn seek(&mut self, position: u64) -> Result<(), Errno> {
        // Position 0 always asks the kernel afresh: rewinddir(3) promises to see what changed.
        if position != self.position || position == 0 {
            self.batch.clear();
            rustix::fs::seek(&self.fd, SeekFrom::Start(position))
                .map_err(|e| Errno::from_raw(e.raw_os_error()))?;
            self.position = position;
        }
        Ok(())
    }

    /// Returns the entry at the current position without moving on; `None` at the end.
    ///
    /// # Errors
    /// What getdents(2) says; `ENOENT` for a directory that was removed.
    pub fn peek(&mut self) -> Result<Option<&DirEntry>, Errno> {
        if self.batch.is_empty() {
            self.fetch()?;
        }
        Ok(self.batch.front())
    }

    /// Moves past the entry at the current position and returns it.
    pub fn advance(&mut self) -> Option<DirEntry> {
        let entry = self.batch.pop_front()?;
        self.position = entry.next;
        Some(entry)
    }

    fn fetch(&mut self) -> Result<(), Errno> {
        let mut buf = vec![MaybeUninit::uninit(); BATCH_BYTES];
        let mut raw = RawDir::new(&self.fd, &mut buf);
        while let Some(entry) = raw.next() {
            let entry = entry.map_err(|e| Errno::from_raw(e.raw_os_error()))?;
            self.batch.push_back(DirEntry {
                name: OsStr::from_bytes(entry.file_name().to_bytes()).to_owned(),
                inode: entry.ino(),
                kind: Kind::from_type(entry.file_type()),
                next: entry.next_entry_cookie(),
            });
            if raw.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}
