//! The file systems under test behind one seam: raw buffers, raw flags, error numbers.
//!
//! *Owns*: the traits [`Fs`] and [`Handle`], and the kinds of file system that scenarios tell apart.
//!
//! *Does not own*: the back ends ([`kernel`], [`pinfold`], and [`mutant`], which is wrong on purpose).
//!
//! *Locking*: none of its own; every call may come from any thread.
//!
//! A mapped range ([`Mapped`]) is a source of [`UserIov`] like a region, so that a buffer may come from a file, even from
//! the one that is read or written. What a back end does not offer it [refuses](Refusal) with a reason; a scenario that
//! needs it is then skipped, never passed.

pub mod kernel;
pub mod mutant;
pub mod pinfold;

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use ::pinfold::Cancel;
use pinfold_base::Errno;
use pinfold_mem::Direction;
use pinfold_mem::region::view::{Sharing, View};
use pinfold_mem::region::{At, UserIov};
use serde::{Deserialize, Serialize};

/// What kind of file system answers: decides which divergences are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The kernel's ext4 (ext2 and ext3 answer to the same number).
    Ext4,
    /// The kernel's XFS.
    Xfs,
    /// The kernel's btrfs.
    Btrfs,
    /// The kernel's tmpfs.
    Tmpfs,
    /// A FUSE mount of whatever server.
    Fuse,
    /// A kernel file system about which nothing is recorded.
    Other,
    /// This library.
    Pinfold,
}

impl Kind {
    /// Recognises `f_type` of statfs(2).
    #[must_use]
    pub fn of_magic(magic: u64) -> Self {
        match magic {
            0xef53 => Self::Ext4,
            0x5846_5342 => Self::Xfs,
            0x9123_683e => Self::Btrfs,
            0x0102_1994 => Self::Tmpfs,
            0x6573_5546 => Self::Fuse,
            _ => Self::Other,
        }
    }

    /// Returns its usual name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Tmpfs => "tmpfs",
            Self::Fuse => "fuse",
            Self::Other => "other",
            Self::Pinfold => "pinfold",
        }
    }
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Open {
    /// O_APPEND.
    pub append: bool,
    /// O_CREAT.
    pub create: bool,
    /// O_TRUNC.
    pub truncate: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// O_DSYNC.
    pub dsync: bool,
}

impl Open {
    /// Opens for reading and writing what exists.
    pub const EXISTING: Self = Self {
        append: false,
        create: false,
        truncate: false,
        direct: false,
        dsync: false,
    };
    /// Creates for reading and writing; empties what exists.
    pub const FRESH: Self = Self {
        create: true,
        truncate: true,
        ..Self::EXISTING
    };

    /// Adds O_APPEND.
    #[must_use]
    pub const fn appending(self) -> Self {
        Self {
            append: true,
            ..self
        }
    }

    /// Adds O_DIRECT.
    #[must_use]
    pub const fn direct(self) -> Self {
        Self {
            direct: true,
            ..self
        }
    }
}

/// Flags of one transfer.
#[derive(Debug, Clone, Copy, Default)]
pub struct How<'a> {
    /// RWF_NOWAIT.
    pub nowait: bool,
    /// RWF_DSYNC.
    pub dsync: bool,
    /// Ends the call early when cancelled; a back end that cannot ignores it ([`Fs::cancels`]).
    pub cancel: Option<&'a Cancel>,
}

impl How<'_> {
    /// No flags.
    pub const PLAIN: Self = Self {
        nowait: false,
        dsync: false,
        cancel: None,
    };
    /// RWF_NOWAIT alone.
    pub const NOWAIT: Self = Self {
        nowait: true,
        ..Self::PLAIN
    };
}

/// What fallocate(2) is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocate {
    /// Reserve space; the file grows to hold it.
    Grow,
    /// Reserve space; the size stays.
    KeepSize,
    /// Make a hole; the size stays.
    Punch,
    /// Make the range zeros; the size stays.
    Zero,
}

/// Why a back end does not do what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It tried, and failed.
    Failed(Errno),
    /// It has no such call, or not yet: the reason, fit for "skipped".
    Missing(&'static str),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno)
    }
}

/// How often memory was pinned for transfers, and let go again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pins {
    /// Pins taken.
    pub acquired: u64,
    /// Pins given back.
    pub released: u64,
}

/// How the store under a file system behaves from now on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Weather {
    /// As it should.
    #[default]
    Fair,
    /// Writes over data that is stored already, in whole pages of one repeated byte, fail with an I/O error.
    WritesFail,
    /// Every write of data takes this long.
    WritesTake(Duration),
    /// Every read of data takes this long.
    ReadsTake(Duration),
}

/// A file system whose store can be made to fail.
pub struct Troubled {
    /// The file system.
    pub fs: Box<dyn Fs>,
    /// Changes the weather. `Err` says why that weather cannot be had.
    pub turn: Box<dyn Fn(Weather) -> Result<(), String> + Send + Sync>,
    /// Tries to write back what is dirty without asking any open file how that went.
    pub write_back: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
}

impl std::fmt::Debug for Troubled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Troubled({:?})", self.fs)
    }
}

/// One file system under test, rooted at a directory that is the scenario's alone.
pub trait Fs: Send + Sync + std::fmt::Debug {
    /// Returns the kind of file system that answers.
    fn kind(&self) -> Kind;

    /// Returns the directory of a kernel file system that all this lies in.
    fn dir(&self) -> &Path;

    /// Opens `name`, a single component, for reading and writing.
    ///
    /// # Errors
    /// As open(2).
    fn open(&self, name: &str, how: Open) -> Result<Box<dyn Handle>, Errno>;

    /// Tells whether [`How::cancel`] ends a call early.
    fn cancels(&self) -> bool;

    /// Tells whether faults in mappings are served by the thread that takes them, in a signal handler of ours.
    fn faults_inline(&self) -> bool {
        false
    }

    /// Counts pins; `None` where nobody counts.
    fn pins(&self) -> Option<Pins>;

    /// Makes a file system of the same kind over a store that fails or dawdles on demand.
    ///
    /// # Errors
    /// The reason why that is impossible here.
    fn troubled(&self) -> Result<Troubled, String>;

    /// Makes a file system of the same kind over a store whose writes live in this process until they are synced: killing
    /// the process is a loss of power. Opened again, by any process, it holds what was synced.
    ///
    /// # Errors
    /// The reason why that is impossible here.
    fn volatile(&self) -> Result<Box<dyn Fs>, String>;
}

/// One open file description.
///
/// Transfers take user memory as it comes, bad parts included, and follow the POSIX rule: the bytes if any moved, else
/// the error.
pub trait Handle: Send + Sync + std::fmt::Debug {
    /// Reads into `to`.
    ///
    /// # Errors
    /// As preadv2(2).
    fn read(&self, to: &UserIov<'_>, at: At, how: How<'_>) -> Result<usize, Errno>;

    /// Writes `from`.
    ///
    /// # Errors
    /// As pwritev2(2).
    fn write(&self, from: &UserIov<'_>, at: At, how: How<'_>) -> Result<usize, Errno>;

    /// Moves the file position to `offset` bytes from the start.
    ///
    /// # Errors
    /// As lseek(2).
    fn seek(&self, offset: u64) -> Result<(), Errno>;

    /// Returns the file position.
    ///
    /// # Errors
    /// As lseek(2).
    fn position(&self) -> Result<u64, Errno>;

    /// Returns the size as fstat(2) would.
    ///
    /// # Errors
    /// As fstat(2).
    fn size(&self) -> Result<u64, Errno>;

    /// Sets the size.
    ///
    /// # Errors
    /// As ftruncate(2).
    fn truncate(&self, size: u64) -> Result<(), Errno>;

    /// Reserves, punches or zeroes a range.
    ///
    /// # Errors
    /// As fallocate(2).
    fn allocate(&self, mode: Allocate, range: Range<u64>) -> Result<(), Errno>;

    /// Makes everything durable (fsync).
    ///
    /// # Errors
    /// As fsync(2).
    fn sync(&self) -> Result<(), Errno>;

    /// Makes the data durable (fdatasync).
    ///
    /// # Errors
    /// As fdatasync(2).
    fn sync_data(&self) -> Result<(), Errno>;

    /// Writes back and forgets what is cached, so that the next access meets a cold cache.
    ///
    /// # Errors
    /// Those of the write-back.
    fn drop_cache(&self) -> Result<(), Errno>;

    /// Maps `range`, which starts at a page border, for loads and stores.
    ///
    /// # Errors
    /// As mmap(2).
    fn map(&self, range: Range<u64>, sharing: Sharing) -> Result<Box<dyn Mapped>, Refusal>;

    /// Writes what is known of the extents into a buffer, in fiemap's records of
    /// [`FIEMAP_RECORD`](pinfold_mem::region::transfer::FIEMAP_RECORD) bytes behind a head of
    /// [`FIEMAP_HEAD`](pinfold_mem::region::transfer::FIEMAP_HEAD); returns how many there are.
    ///
    /// # Errors
    /// As the ioctl FS_IOC_FIEMAP.
    fn extents(&self, into: &UserIov<'_>) -> Result<usize, Refusal>;

    /// Starts a transfer, runs `meanwhile` beside it, and returns what the transfer came to.
    ///
    /// # Errors
    /// As [`Handle::read`] and [`Handle::write`].
    fn transfer(
        &self,
        direction: Direction,
        iov: &UserIov<'_>,
        offset: u64,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<usize, Refusal>;
}

/// A mapped part of a file; unmapped when dropped.
pub trait Mapped: Send + Sync + std::fmt::Debug {
    /// Returns the mapped bytes.
    fn view(&self) -> View<'_>;

    /// Calls msync(2) with raw flags; the range may be unaligned, or leave the mapping.
    ///
    /// # Errors
    /// As msync(2).
    fn sync(&self, range: Range<usize>, flags: i32) -> Result<(), Refusal>;

    /// Makes the next access to whole pages of `range` fault; of a private mapping, forgets its copies.
    ///
    /// # Errors
    /// As madvise(2) with MADV_DONTNEED.
    fn forget(&self, range: Range<usize>) -> Result<(), Refusal>;

    /// Tells of each page of `range` whether it is in memory.
    ///
    /// # Errors
    /// As mincore(2).
    fn resident(&self, range: Range<usize>) -> Result<Vec<bool>, Refusal>;

    /// Unmaps a part; afterwards only [`Mapped::sync`] may be called.
    ///
    /// # Errors
    /// As munmap(2).
    fn unmap(&mut self, range: Range<usize>) -> Result<(), Refusal>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_numbers_name_their_file_systems() {
        assert_eq!(Kind::of_magic(0xef53), Kind::Ext4);
        assert_eq!(Kind::of_magic(1), Kind::Other);
        assert_eq!(Kind::of_magic(0x0102_1994).name(), "tmpfs");
    }
}
