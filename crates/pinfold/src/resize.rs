//! Ranges that change as a whole: reserve, punch, zero, collapse, insert.
//!
//! The gate is blocked, the store told, the pages dropped; edges are zeroed in place (SEMANTICS.md section F). The store
//! goes first because it may refuse, and then nothing may have changed.

use std::ops::Range;

use pinfold_base::units::FILE_SIZE_MAX;
use pinfold_base::{Errno, PAGE_SIZE};
use pinfold_cache::Harvest;

use pinfold_store::{Rearrange, StoreResult};

use crate::error::{Error, Result};
use crate::file::File;
use crate::inode::{Hindrance, Inode};

/// What [`File::allocate`] does with a range, as the modes of fallocate(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllocateMode {
    /// Reserve space; the file grows to the range's end.
    Extend,
    /// Reserve space; the size stays.
    KeepSize,
    /// The range reads as zeros and its space is given back; the size stays.
    Punch,
    /// The range reads as zeros and stays reserved; the file grows to the range's end.
    ZeroExtend,
    /// The range reads as zeros and stays reserved; the size stays.
    ZeroKeepSize,
    /// The range is taken out and what follows moves down.
    Collapse,
    /// A hole is put in and what follows moves up.
    Insert,
}

impl File {
    /// Changes a range as fallocate(2) does.
    ///
    /// # Errors
    /// `EBADF` if not open for writing, `EINVAL` for an empty or overflowing range, `EFBIG`, `ENOSPC`, `EOPNOTSUPP` where the
    /// store cannot; `EBUSY` if whole pages of the range, or those behind it that would move, stay pinned
    /// ([`Mapping::pin`](crate::Mapping::pin)).
    pub fn allocate(&self, mode: AllocateMode, range: Range<u64>) -> Result<()> {
        const OPERATION: &str = "allocate space in";
        if !self.access().write {
            return Err(Error::invalid(OPERATION, Errno::EBADF));
        }
        if range.is_empty() {
            return Err(Error::invalid(OPERATION, Errno::EINVAL).at_range(range));
        }
        if range.end > FILE_SIZE_MAX {
            return Err(Error::invalid(OPERATION, Errno::EFBIG).at_range(range));
        }
        let _quiet = self.enter(OPERATION)?;
        let inode = self.inode();
        inode.exclusively(|| {
            change(inode, mode, &range)?;
            inode.touch_modified();
            Ok(())
        })
    }

    /// Makes a range read as zeros and gives its space back; the size stays.
    ///
    /// # Errors
    /// As [`File::allocate`].
    pub fn punch(&self, range: Range<u64>) -> Result<()> {
        self.allocate(AllocateMode::Punch, range)
    }
}

/// What a change of a range came to. It is made again after a page was met that the program keeps.
type Changed = std::result::Result<(), Hindrance>;

fn change(inode: &Inode, mode: AllocateMode, range: &Range<u64>) -> Changed {
    match mode {
        AllocateMode::Extend | AllocateMode::KeepSize => {
            inode
                .object()
                .allocate(range.clone())
                .map_err(|error| Error::store("allocate space in", error))?;
            if mode == AllocateMode::Extend {
                grow(inode, range.end)?;
            }
        }
        AllocateMode::Punch => zero(inode, range, false)?,
        AllocateMode::ZeroExtend | AllocateMode::ZeroKeepSize => {
            zero(inode, range, true)?;
            if mode == AllocateMode::ZeroExtend {
                grow(inode, range.end)?;
            }
        }
        AllocateMode::Collapse => shift(inode, Rearrange::Collapse, range)?,
        AllocateMode::Insert => shift(inode, Rearrange::Insert, range)?,
    }
    Ok(())
}

fn grow(inode: &Inode, end: u64) -> Changed {
    if end > inode.len() {
        inode.set_len_locked(end)?;
    }
    Ok(())
}

/// Zeroes a range: whole pages in the store, edges in the cache.
fn zero(inode: &Inode, range: &Range<u64>, reserve: bool) -> Changed {
    let end = inode.len();
    let whole = range.start.div_ceil(PAGE_SIZE) * PAGE_SIZE..range.end / PAGE_SIZE * PAGE_SIZE;
    if whole.start < whole.end {
        let _blocked = inode.pages().gate().block();
        inode.none_kept(whole.start / PAGE_SIZE..whole.end / PAGE_SIZE)?;
        zero_pages(inode, &whole, reserve)
            .map_err(|error| Error::store("punch a hole in", error))?;
    }
    if whole.start > whole.end {
        zero_edge(inode, range.start..range.end.min(end))?;
    } else {
        zero_edge(inode, range.start..whole.start.min(end))?;
        zero_edge(inode, whole.end..range.end.min(end))?;
    }
    if reserve {
        inode
            .object()
            .allocate(range.clone())
            .map_err(|error| Error::store("allocate space in", error))?;
    }
    Ok(())
}

/// Zeroes whole pages in the store and drops them from the cache. The caller blocks the gate.
fn zero_pages(inode: &Inode, whole: &Range<u64>, reserve: bool) -> StoreResult<()> {
    let (pages, object) = (inode.pages(), inode.object());
    let tell = || {
        if reserve {
            object.rearrange(Rearrange::Zero, whole.clone())
        } else {
            object.punch(whole.clone())
        }
    };
    pages.harvest(
        whole.start / PAGE_SIZE..whole.end / PAGE_SIZE,
        Harvest::Withdraw,
    );
    let newer = pages
        .next_dirty(whole.start / PAGE_SIZE)
        .is_some_and(|page| page * PAGE_SIZE < whole.end);
    // The store first, which may not be able to: then nothing has changed, and least of all are dirty pages lost.
    tell()?;
    pages.discard(whole.start / PAGE_SIZE..whole.end / PAGE_SIZE);
    if newer {
        // A transfer that was under way may have stored a page again; the pages waited for it.
        tell()?;
    }
    let end = inode.len();
    if whole.contains(&end.saturating_sub(1)) && object.len()? < end {
        // The page that would have brought the size to the store is gone. What is dirty goes first (data, then size); if
        // that fails, the errseq tells.
        let _ = inode.flush_range(0..whole.start);
        object.set_len(end)?;
    }
    Ok(())
}

/// Zeroes a part of one page through the cache.
fn zero_edge(inode: &Inode, bytes: Range<u64>) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let pages = inode.pages();
    let at = (bytes.start % PAGE_SIZE) as usize;
    let len = (bytes.end - bytes.start) as usize;
    let folio = pages
        .write_begin(bytes.start / PAGE_SIZE, at, at + len, false)
        .map_err(|error| Error::cache("punch a hole in", error))?;
    folio.zero(at, len);
    folio.commit();
    pages.note_dirty_file();
    Ok(())
}

/// Moves everything behind a range: all of it has to be in the store first, and leaves the cache.
fn shift(inode: &Inode, how: Rearrange, range: &Range<u64>) -> Changed {
    const OPERATION: &str = "move a range of";
    let end = inode.len();
    let len = range.end - range.start;
    let fits = match how {
        Rearrange::Collapse => range.end < end,
        Rearrange::Insert => {
            range.start < end && end.checked_add(len).is_some_and(|new| new <= FILE_SIZE_MAX)
        }
        Rearrange::Zero => true,
    };
    if !fits {
        return Err(Error::invalid(OPERATION, Errno::EINVAL)
            .at_range(range.clone())
            .into());
    }
    let _blocked = inode.pages().gate().block();
    inode.none_kept(range.start / PAGE_SIZE..u64::MAX)?;
    inode.pages().harvest(0..u64::MAX, Harvest::Withdraw);
    inode
        .flush_range(0..u64::MAX)
        .map_err(|error| Error::store(OPERATION, error))?;
    inode.pages().discard(range.start / PAGE_SIZE..u64::MAX);
    inode
        .object()
        .rearrange(how, range.clone())
        .map_err(|error| Error::store(OPERATION, error))?;
    let new = match how {
        Rearrange::Collapse => end - len,
        Rearrange::Insert => end + len,
        Rearrange::Zero => end,
    };
    inode.pages().set_end(new);
    inode.note_growth(end);
    Ok(())
}
