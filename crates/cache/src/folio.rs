//! A locked page, as a guard: dropped without contents it leaves the cache, so that no failed fill or short copy
//! ever becomes visible (INV4).

use std::mem::ManuallyDrop;

use pinfold_base::rank::{self, Held, Rank};
use pinfold_base::{PAGE_SIZE, Progress};
use pinfold_mem::{CopyStop, Frame, IovCursor};
use smallvec::SmallVec;

use crate::cache::Cache;
use crate::file::FilePages;
use crate::state::{DIRTY, ERROR, UMAP_ASYNC, UMAP_RO, UMAP_RW, UPTODATE, WRITEBACK, is_unused};

const PAGE: usize = PAGE_SIZE as usize;
/// Pages that leave a window with one call at most.
const GOING_MAX: usize = 64;

/// A page whose lock this thread holds.
#[derive(Debug)]
pub struct Folio<'a> {
    file: &'a FilePages,
    page: u64,
    frame: Frame,
    _held: Held,
}

impl<'a> Folio<'a> {
    /// Wraps a frame whose LOCKED bit the caller has just set.
    pub(crate) fn adopt(file: &'a FilePages, page: u64, frame: Frame) -> Self {
        Self {
            file,
            page,
            frame,
            _held: rank::enter(Rank::Folio),
        }
    }

    /// Gives the lock away: to a completion that will unlock the page from another thread.
    pub(crate) fn into_frame(self) -> Frame {
        let folio = ManuallyDrop::new(self);
        let frame = folio.frame;
        // The thread that goes on without the lock no longer holds it: undo the note alone.
        rank::leave(Rank::Folio);
        frame
    }

    pub(crate) fn cache(&self) -> &'a Cache {
        self.file.cache()
    }

    pub(crate) fn file(&self) -> &'a FilePages {
        self.file
    }

    pub(crate) fn homes(&self) -> &'a pinfold_mem::Homes {
        self.file.homes()
    }

    pub(crate) fn state(&self) -> u64 {
        self.cache().header(self.frame).state.load()
    }

    /// Returns the page's number.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Returns the page's frame.
    #[must_use]
    pub fn frame(&self) -> Frame {
        self.frame
    }

    /// Returns the library's own address of the page, good while this exists.
    #[must_use]
    pub fn addr(&self) -> *mut u8 {
        self.file.homes().addr(self.frame, self.page)
    }

    /// Tells whether the page is in its file's window, and may be in user mappings.
    #[must_use]
    pub fn in_window(&self) -> bool {
        self.cache().in_window(self.frame)
    }

    /// Tells whether the contents are valid.
    #[must_use]
    pub fn is_uptodate(&self) -> bool {
        self.state() & UPTODATE != 0
    }

    /// Tells whether the contents are newer than the store's.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.state() & DIRTY != 0
    }

    /// Tells whether the contents, or older ones, are on their way to the store.
    #[must_use]
    pub fn is_under_writeback(&self) -> bool {
        self.state() & WRITEBACK != 0
    }

    /// Copies user bytes into the page at `at`, without resolving faults. Not visible before
    /// [`Folio::commit`] unless the page was valid already.
    pub fn copy_in(&self, at: usize, len: usize, source: &mut IovCursor<'_>) -> Progress<CopyStop> {
        self.file
            .homes()
            .copy(self.frame, self.page, at, len, source)
    }

    /// Copies a slice of the library's own into the page.
    pub fn write(&self, at: usize, from: &[u8]) {
        self.file.homes().write(self.frame, self.page, at, from);
    }

    /// Zeroes a part of the page.
    pub fn zero(&self, at: usize, len: usize) {
        self.file.homes().zero(self.frame, self.page, at, len);
    }

    /// Makes the contents valid and dirty, and unlocks the page.
    pub fn commit(self) {
        self.commit_to(0);
    }

    /// As [`Folio::commit`], for a write that ends at byte `end` of the file: the file grows to there if it was shorter.
    ///
    /// The contents are valid before the size tells of them (B-4), and the size is raised before the lock is dropped:
    /// write-back takes the lock, so it never takes new bytes for something past the end.
    pub fn commit_to(self, end: u64) {
        self.file.note_dirty(self.page, self.frame);
        let frame = self.frame;
        let cache = self.cache();
        if self.file.end() < end {
            cache.header(frame).state.set(UPTODATE | DIRTY);
            self.file.set_end(end);
        }
        let _end = ManuallyDrop::new(self);
        rank::leave(Rank::Folio);
        if cache.header(frame).state.unlock(UPTODATE | DIRTY, ERROR) {
            cache.wake(frame);
        }
    }

    /// Makes the contents valid; the page stays locked.
    pub(crate) fn mark_uptodate(&self) {
        self.cache().header(self.frame).state.set(UPTODATE);
    }

    /// Drops the page, dirty or not, once its users have let go.
    pub fn discard(self) {
        let mut going = Going::new(self.file);
        going.push(self);
    }

    /// Waits until the page may be dropped, and makes it invalid.
    fn condemn(&self) {
        let cache = self.cache();
        let before = cache.header(self.frame).state.doom();
        if before & (UMAP_RO | UMAP_RW) != 0 && !is_unused(before) {
            // What is waited for may take its time: no mapping shows an invalid page meanwhile (INV1).
            self.file.unmap(self.page..self.page + 1);
        }
        cache.wait(self.frame, is_unused);
        // After the wait: a failed write-back may have made the page dirty again.
        self.file.forget_dirty(self.page);
    }

    /// Keeps stores through mappings out until somebody who holds the lock lets them in again. The page stays dirty.
    pub(crate) fn protect(&self) {
        if self.state() & UMAP_ASYNC != 0 {
            // The kernel would let the next store in by itself.
            self.file.look_for_stores(std::slice::from_ref(self), true);
        }
        if self.state() & UMAP_RW != 0 {
            self.file.protect(self.page..self.page + 1);
            self.cache().header(self.frame).state.clear(UMAP_RW);
        }
    }

    /// Strikes the page off the list of those that may be stored to without notice.
    pub(crate) fn untrack(&self) {
        self.file.untrack(self.page);
    }

    /// Names the page's new frame, after the move.
    pub(crate) fn set_frame(&mut self, frame: Frame) {
        self.frame = frame;
    }

    /// Sleeps until write-back of the page has ended. Write-back takes no lock of classes 1 to 5, so anybody may wait.
    pub fn wait_writeback(&self) {
        self.cache()
            .wait(self.frame, |state| state & WRITEBACK == 0);
    }

    /// Zeroes everything from byte `at` on: bytes past the end of the file (INV7).
    pub fn zero_from(&self, at: usize) {
        self.zero(at, PAGE - at);
    }
}

impl Drop for Folio<'_> {
    fn drop(&mut self) {
        let cache = self.file.cache();
        let header = cache.header(self.frame);
        if header.state.load() & UPTODATE == 0 {
            // Never had contents, so nobody references it, and no mapping shows it.
            cache.unlist(self.frame, header);
            cache.give_frame(self.frame);
        } else if header.state.unlock(0, 0) {
            cache.wake(self.frame);
        }
    }
}

/// Neighbouring pages on their way out of the cache: locked and invalid until they are gone from every mapping.
pub(crate) struct Going<'a> {
    file: &'a FilePages,
    folios: SmallVec<[Folio<'a>; 1]>,
}

impl<'a> Going<'a> {
    pub(crate) fn new(file: &'a FilePages) -> Self {
        Self {
            file,
            folios: SmallVec::new(),
        }
    }

    /// Drops a page, once its users have let go; one in a window together with the neighbours that follow.
    pub(crate) fn push(&mut self, folio: Folio<'a>) {
        let last = self.folios.last().map(|last| last.page + 1);
        if last.is_some_and(|next| next != folio.page) || self.folios.len() == GOING_MAX {
            self.flush();
        }
        folio.condemn();
        let windowed = folio.in_window();
        if windowed {
            self.folios.push(folio);
        } else {
            folio.leave();
        }
    }

    fn flush(&mut self) {
        let (Some(first), Some(last)) = (self.folios.first(), self.folios.last()) else {
            return;
        };
        self.file.punch(first.page..last.page + 1);
        for folio in self.folios.drain(..) {
            folio.leave();
        }
    }
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Folio<'_> {
    /// Ends a condemned page that no mapping shows any more.
    fn leave(self) {
        let (cache, frame) = (self.cache(), self.frame);
        let _end = ManuallyDrop::new(self);
        rank::leave(Rank::Folio);
        cache.unlist(frame, cache.header(frame));
        cache.give_frame(frame);
        cache.counters.dropped.bump();
    }
}
