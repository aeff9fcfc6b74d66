//! A locked page, as a guard: dropped without contents it leaves the cache, so that no failed fill or short copy
//! ever becomes visible (INV4).

use std::mem::ManuallyDrop;

use pinfold_base::rank::{self, Held, Rank};
use pinfold_base::{PAGE_SIZE, Progress};
use pinfold_mem::{CopyStop, Frame, IovCursor};

use crate::cache::Cache;
use crate::file::FilePages;
use crate::state::{DIRTY, ERROR, UPTODATE, WRITEBACK, is_unused};

const PAGE: usize = PAGE_SIZE as usize;

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

    fn cache(&self) -> &'a Cache {
        self.file.cache()
    }

    fn state(&self) -> u64 {
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
        self.cache().arena.copy_frame(self.frame, at, len, source)
    }

    /// Copies a slice of the library's own into the page.
    pub fn write(&self, at: usize, from: &[u8]) {
        self.cache().arena.write_frame(self.frame, at, from);
    }

    /// Zeroes a part of the page.
    pub fn zero(&self, at: usize, len: usize) {
        self.cache().arena.zero(self.frame, at, len);
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
        let cache = self.cache();
        let state = &cache.header(self.frame).state;
        state.doom();
        cache.wait(self.frame, is_unused);
        // After the wait: a failed write-back may have made the page dirty again.
        self.file.forget_dirty(self.page);
        let (frame, header) = (self.frame, cache.header(self.frame));
        let _end = ManuallyDrop::new(self);
        rank::leave(Rank::Folio);
        cache.unlist(frame, header);
        cache.give_frame(frame);
        cache.counters.dropped.bump();
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
            // Never had contents, so nobody references it.
            cache.unlist(self.frame, header);
            cache.give_frame(self.frame);
        } else if header.state.unlock(0, 0) {
            cache.wake(self.frame);
        }
    }
}
