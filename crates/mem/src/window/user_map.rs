//! The program's mappings of a window, as address ranges.
//!
//! *Owns*: the addresses, and which of them are still mapped; how a mapping becomes longer, in its place or by moving.
//!
//! *Does not own*: what is at the addresses, faults there ([`crate::uffd`]).
//!
//! *Locking*: a leaf over the list of what is still mapped, held for system calls on it.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pinfold_base::{Errno, PAGE_SIZE, Progress};
use rustix::mm::{
    Advice, MprotectFlags, MremapFlags, madvise, mprotect, mremap, mremap_fixed, munmap,
};
use smallvec::{SmallVec, smallvec};

use super::{PAGE, UserMapKind, Window, WindowError, system};
use crate::copy::CopyStop;
use crate::iov::{Direction, IovCursor};
use crate::span::RawSpan;
use crate::sys;
use crate::uffd::Uffd;

/// A mapping of a window made for the program. Dropping it unmaps what is left of it.
///
/// An address range: nobody in the library touches its memory, and no reference into it is ever made here.
pub struct UserMap {
    addr: NonNull<u8>,
    first: u64,
    /// Behind the last page it was made or extended to show; never less than before.
    end: AtomicU64,
    /// What is still mapped, as ascending page ranges.
    left: Mutex<SmallVec<[Range<u64>; 1]>>,
    kind: UserMapKind,
    window: Arc<Window>,
}

// SAFETY: an address and bookkeeping under a lock; unmapping is a system call that any thread may make.
unsafe impl Send for UserMap {}
// SAFETY: as for Send.
unsafe impl Sync for UserMap {}

impl fmt::Debug for UserMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "UserMap({:p}, pages {:?}, {:?})",
            self.addr,
            self.pages(),
            self.kind
        )
    }
}

impl UserMap {
    pub(super) fn new(
        addr: NonNull<u8>,
        pages: Range<u64>,
        kind: UserMapKind,
        window: Arc<Window>,
    ) -> Self {
        Self {
            addr,
            first: pages.start,
            end: AtomicU64::new(pages.end),
            left: Mutex::new(smallvec![pages]),
            kind,
            window,
        }
    }

    /// Returns the address of the first byte.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.addr.as_ptr().expose_provenance()
    }

    /// Returns the first byte's address as a pointer, for the program.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.addr.as_ptr()
    }

    /// Returns the length in bytes as it was mapped or extended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes_of(&self.pages())
    }

    /// Tells whether the mapping is empty; it never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Returns the window's pages it was made or extended to show.
    #[must_use]
    pub fn pages(&self) -> Range<u64> {
        self.first..self.end.load(Ordering::Acquire)
    }

    /// Returns what it is for.
    #[must_use]
    pub fn kind(&self) -> UserMapKind {
        self.kind
    }

    /// Returns the window it shows.
    #[must_use]
    pub fn window(&self) -> &Arc<Window> {
        &self.window
    }

    /// Returns the address of a page of the window; `None` when this mapping was not made to show it.
    #[must_use]
    pub fn addr_of(&self, page: u64) -> Option<usize> {
        let at = self.pages().contains(&page).then(|| page - self.first)?;
        Some(self.addr() + (at * PAGE_SIZE) as usize)
    }

    /// Returns the page of the window that an address shows.
    #[must_use]
    pub fn page_at(&self, addr: usize) -> Option<u64> {
        let at = addr.checked_sub(self.addr())?;
        (at < self.len()).then(|| self.first + (at / PAGE) as u64)
    }

    /// Copies mapped bytes from `at` on, with nothing held, as far as no fault of a shared mapping is in the way: bring that
    /// page in and go on at byte `done`.
    ///
    /// # Panics
    /// When the range leaves the mapping as it was made.
    pub fn load(&self, at: usize, into: &mut [u8]) -> Progress<CopyStop> {
        let mut cursor = self.cursor(Direction::Source, at, into.len());
        match self.kind {
            // The program's own copies are to be had at its addresses alone.
            UserMapKind::Private => cursor.copy_slice_waiting(into),
            UserMapKind::SharedRead | UserMapKind::SharedWrite => cursor.copy_slice_nofault(into),
        }
    }

    /// Stores to mapped bytes from `at` on, as [`UserMap::load`] loads.
    ///
    /// # Panics
    /// When the range leaves the mapping as it was made.
    pub fn store(&self, at: usize, from: &[u8]) -> Progress<CopyStop> {
        let mut cursor = self.cursor(Direction::Target, at, from.len());
        if self.kind != UserMapKind::Private {
            // SAFETY: a slice's faults are the kernel's to resolve, and a target cursor only reads it.
            return unsafe { cursor.copy_nofault(from.as_ptr().cast_mut(), from.len()) };
        }
        let mut piece = [0; PAGE];
        let mut done = 0;
        for from in from.chunks(PAGE) {
            let piece = &mut piece[..from.len()];
            piece.copy_from_slice(from);
            let copied = cursor.copy_slice_waiting(piece);
            done += copied.done;
            if copied.stop.is_some() {
                return Progress {
                    done,
                    stop: copied.stop,
                };
            }
        }
        Progress::complete(done)
    }

    fn cursor(&self, direction: Direction, at: usize, len: usize) -> IovCursor<'_> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.len());
        assert!(fits, "{len} bytes at {at} leave the mapping");
        let span = RawSpan {
            addr: self.addr() + at,
            len,
        };
        // SAFETY: mapped memory, into which nobody in the library holds references (`UserMap`); or unmapped, which copies
        // report.
        unsafe { IovCursor::from_raw(direction, &[span]) }
    }

    /// Lists the page ranges that are still mapped.
    #[must_use]
    pub fn mapped(&self) -> SmallVec<[Range<u64>; 1]> {
        self.left
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Unmaps a part. The caller has made sure that nobody installs pages there any more: the addresses may be somebody
    /// else's as soon as this returns.
    ///
    /// # Errors
    /// [`WindowError::MapCount`]: one mapping would become two.
    pub fn unmap(&self, pages: Range<u64>) -> Result<(), WindowError> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = SmallVec::new();
        let mut outcome = Ok(());
        for range in left.drain(..) {
            let gone = range.start.max(pages.start)..range.end.min(pages.end);
            if gone.is_empty() || outcome.is_err() {
                rest.push(range);
                continue;
            }
            outcome = self.unmap_range(&gone);
            if outcome.is_err() {
                rest.push(range);
                continue;
            }
            for kept in [range.start..gone.start, gone.end..range.end] {
                if !kept.is_empty() {
                    rest.push(kept);
                }
            }
        }
        *left = rest;
        outcome
    }

    fn unmap_range(&self, pages: &Range<u64>) -> Result<(), WindowError> {
        let (addr, len) = (self.ptr_of(pages.start), self.bytes_of(pages));
        // SAFETY: a part of our mapping that is still mapped (`left`); who makes a user map answers for its use.
        unsafe { munmap(addr.cast(), len) }.map_err(system("munmap"))
    }

    /// Returns what is mapped if that is one range from the first page on, as it has to be to change its length.
    fn whole(&self, left: &[Range<u64>]) -> Result<Range<u64>, Errno> {
        match left {
            [range] if range.start == self.first => Ok(range.clone()),
            _ => Err(Errno::EFAULT),
        }
    }

    /// Makes it longer where it is, up to page `end`. The addresses that are new belong to whoever has charge of the
    /// others' faults.
    ///
    /// # Errors
    /// `EFAULT` where a part before the end was unmapped; `ENOMEM`: there is something behind it, or no room for more; as
    /// [`Window::ensure`].
    pub fn extend(&self, end: u64) -> Result<(), WindowError> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = self.whole(&left).map_err(told("mremap"))?;
        if end <= whole.end {
            return Ok(());
        }
        self.window.ensure(end)?;
        let longer = self.first..end;
        let (old, new) = (self.bytes_of(&whole), self.bytes_of(&longer));
        // SAFETY: our mapping, whose addresses stay what they are; without leave to move it the kernel only adds to them.
        unsafe { mremap(self.addr.as_ptr().cast(), old, new, MremapFlags::empty()) }
            .map_err(system("mremap"))?;
        self.end.fetch_max(end, Ordering::AcqRel);
        left[0] = longer;
        Ok(())
    }

    /// Moves what a private mapping shows, with the program's copies, to the first addresses of `to`, another mapping of
    /// the same pages that nobody knows of yet; the addresses here show the window's pages from then on, in one step for
    /// whoever accesses them. `uffd` is in charge of both, before and after.
    ///
    /// The kernel ends the charge of what it moves, and of a neighbour that it joins with it on the way. So the mapping is
    /// marked as no neighbour is while it moves (SEMANTICS.md section 0, fact 8, has it made inaccessible for that, which others
    /// who use it would notice).
    ///
    /// # Errors
    /// `EFAULT` as [`UserMap::extend`]; `ENOMEM`. Nothing has moved then, and those addresses of `to` are given up: the
    /// kernel does not tell whether it had unmapped them before it failed.
    pub fn carry_to(&self, to: &Self, uffd: &Uffd) -> Result<(), WindowError> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = self.whole(&left).map_err(told("mremap"))?;
        let mut theirs = to.left.lock().unwrap_or_else(PoisonError::into_inner);
        let there = to.whole(&theirs).map_err(told("mremap"))?;
        if there.start != whole.start || there.end < whole.end {
            return Err(told("mremap")(Errno::EINVAL));
        }
        let (from, into) = (self.addr.as_ptr(), to.addr.as_ptr());
        let len = self.bytes_of(&whole);
        mark(from, len, Advice::Sequential)?;
        let moved = move_entries(from, into, len, MremapFlags::DONTUNMAP).and_then(|()| {
            uffd.register_range(to.addr(), len).map_err(|refused| {
                let back = move_entries(into, from, len, MremapFlags::empty()).and_then(|()| {
                    uffd.register_range(self.addr(), len)
                        .map_err(told("ioctl(UFFDIO_REGISTER)"))
                });
                if back.is_err() {
                    // Better an access that ends the program than one that is nobody's.
                    forbid(from, len);
                    forbid(into, len);
                }
                told("ioctl(UFFDIO_REGISTER)")(refused)
            })
        });
        // Of no consequence but for how many mappings the kernel counts.
        let _ = mark(from, len, Advice::Normal);
        if moved.is_ok() {
            let _ = mark(into, len, Advice::Normal);
        } else {
            theirs[0].start = whole.end;
            theirs.retain(|range| !range.is_empty());
        }
        moved
    }

    fn bytes_of(&self, pages: &Range<u64>) -> usize {
        // Addresses of ours: they fit.
        ((pages.end - pages.start) * PAGE_SIZE) as usize
    }

    fn ptr_of(&self, page: u64) -> *mut u8 {
        self.addr
            .as_ptr()
            .wrapping_add(((page - self.first) * PAGE_SIZE) as usize)
    }

    /// Drops page-table entries of a range that is still mapped; the pages stay in the window. In a private mapping this
    /// drops the program's own copies.
    ///
    /// # Errors
    /// `ENOMEM` where a part is not mapped any more.
    pub fn drop_entries(&self, pages: Range<u64>) -> Result<(), Errno> {
        self.drop_many(std::slice::from_ref(&pages))
    }

    /// As [`UserMap::drop_entries`] of many ranges; processors are told once, where the kernel can (Linux 6.16).
    ///
    /// # Errors
    /// As [`UserMap::drop_entries`]; some of the ranges may have lost their entries then.
    pub fn drop_many(&self, parts: &[Range<u64>]) -> Result<(), Errno> {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let is_mapped = |part: &Range<u64>| {
            let inside = |range: &Range<u64>| range.start <= part.start && part.end <= range.end;
            !part.is_empty() && left.iter().any(inside)
        };
        if !parts.iter().all(is_mapped) {
            return Err(Errno::ENOMEM);
        }
        parts.chunks(sys::ADVISED_MAX).try_for_each(|parts| {
            let spans = parts.iter().map(|part| RawSpan {
                addr: self.ptr_of(part.start).expose_provenance(),
                len: self.bytes_of(part),
            });
            // SAFETY: parts of our mapping, still mapped while `left` is locked; contents come again by a fault.
            unsafe { sys::drop_entries(spans) }
        })
    }
}

impl Drop for UserMap {
    fn drop(&mut self) {
        for range in self.mapped() {
            let _ = self.unmap_range(&range);
        }
    }
}

fn forbid(addr: *mut u8, len: usize) {
    // SAFETY: a part of a mapping of ours that is still mapped; who makes a user map answers for its use.
    let _ = unsafe { mprotect(addr.cast(), len, MprotectFlags::empty()) };
}

/// Gives a mapping advice on how it is read, which nobody heeds where there is no reading ahead.
fn mark(addr: *mut u8, len: usize, advice: Advice) -> Result<(), WindowError> {
    // SAFETY: advice on a mapping of ours.
    unsafe { madvise(addr.cast(), len, advice) }.map_err(system("madvise"))
}

/// Moves page-table entries from one mapping of ours to another, which it replaces.
fn move_entries(
    from: *mut u8,
    into: *mut u8,
    len: usize,
    flags: MremapFlags,
) -> Result<(), WindowError> {
    let flags = flags | MremapFlags::MAYMOVE;
    // SAFETY: both are mapped, their `left` locked by the caller; nobody refers to memory of either.
    let moved = unsafe { mremap_fixed(from.cast(), len, len, flags, into.cast()) };
    moved.map(drop).map_err(system("mremap"))
}

fn told(call: &'static str) -> impl Fn(Errno) -> WindowError {
    move |errno| WindowError::System { call, errno }
}
