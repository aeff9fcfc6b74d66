//! Locks on the store's file, of records and of the whole, for front ends whose programs' locks have to hold against other
//! nodes' programs.
//!
//! *Owns*: one owner's locks on one file.
//!
//! *Does not own*: who the owners are; waiting. What the locks are worth is the store's: those of a kernel filesystem hold on
//! one machine, those of a network filesystem on all that mount it.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

pub use pinfold_mem::record_lock::RecordLock;
use pinfold_mem::{Quiet, record_lock};

use crate::error::{Error, Result};

/// One owner's locks on one file: of records (fcntl(2)), and beside those, which they have nothing to do with, of the whole
/// (flock(2)). Dropping it gives them all back.
#[derive(Debug)]
pub struct RecordLocks(OwnedFd);

impl RecordLocks {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Puts a lock on `range`, or takes this owner's off it; tells whether it could be done without waiting. A range that ends at
    /// `u64::MAX` has no end.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn set(&self, lock: Option<RecordLock>, range: &Range<u64>) -> Result<bool> {
        let _quiet = Quiet::enter();
        record_lock::set(self.0.as_fd(), lock, range)
            .map_err(|errno| Error::invalid("lock records of", errno))
    }

    /// Puts a lock on the whole file as flock(2) does, changes it, or takes this owner's off; tells whether it could be done without
    /// waiting. One that could not be changed is gone, as there.
    ///
    /// # Errors
    /// What flock(2) says.
    pub fn set_file(&self, lock: Option<RecordLock>) -> Result<bool> {
        let _quiet = Quiet::enter();
        record_lock::set_file(self.0.as_fd(), lock).map_err(|errno| Error::invalid("lock", errno))
    }

    /// Finds a lock of another owner that keeps `lock` from `range`.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn conflict(
        &self,
        lock: RecordLock,
        range: &Range<u64>,
    ) -> Result<Option<(RecordLock, Range<u64>)>> {
        let _quiet = Quiet::enter();
        record_lock::conflict(self.0.as_fd(), lock, range)
            .map_err(|errno| Error::invalid("look for locks of", errno))
    }
}
