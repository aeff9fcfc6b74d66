//! Ranges of a file's cached pages: listed, dropped, cut off, zeroed.
//!
//! *Locking*: the pages of a range are locked one after the other, upwards; whoever has to keep others from coming meanwhile
//! blocks the gate.

use pinfold_base::sync::path::Ordering;
use std::ops::Range;
use std::sync::Arc;

use pinfold_base::PAGE_SIZE;

use super::FilePages;
use crate::cache::Header;
use crate::folio::{Folio, Going};
use crate::state::UPTODATE;

/// Ranges up to this many pages are probed page by page rather than by a walk over all frames.
const PROBE_PAGES_MIN: u64 = 1024;

impl FilePages {
    /// Lists the cached pages of `range`, lowest first.
    pub(crate) fn cached_pages(&self, range: Range<u64>) -> Vec<u64> {
        let end = range.end.min(self.high.load(Ordering::Relaxed));
        if range.start >= end {
            return Vec::new();
        }
        if end - range.start <= PROBE_PAGES_MIN.max(self.cache.pages_max() as u64 / 8) {
            return (range.start..end)
                .filter(|&page| self.is_listed(self.key(page)))
                .collect();
        }
        // A page that moves meanwhile moves to a header that is still to be looked at.
        let mut pages: Vec<u64> = self
            .cache
            .headers()
            .filter(|header| header.state.load() != 0)
            .map(Header::key)
            .filter(|key| key.file == self.id && (range.start..end).contains(&key.page))
            .map(|key| key.page)
            .collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// Drops every page of `range`, dirty or not, once nobody uses it. The caller keeps pages from coming back.
    pub fn discard(&self, range: Range<u64>) {
        let mut going = Going::new(self);
        for page in self.cached_pages(range) {
            if let Some(folio) = self.lock(page) {
                going.push(folio);
            }
        }
    }

    /// Drops every page, dirty or not, but those that the program itself keeps pinned.
    pub(super) fn discard_unkept(&self) {
        let mut going = Going::new(self);
        for page in self.cached_pages(0..u64::MAX) {
            if let Some(folio) = self.lock(page)
                && !folio.is_kept()
            {
                going.push(folio);
            }
        }
    }

    /// Cuts the file to `end` bytes: the size first, so that no reader goes past it, then the pages. The caller blocks the
    /// gate.
    ///
    /// Waits for transfers under way of every page concerned, the one that holds the end included: one that ends
    /// after the store was cut would make the stored file longer again, with bytes that a later growth would show.
    ///
    /// Private copies of the pages go as well, as in Linux: last, since a copy may be made of a page as long as that is there.
    pub fn truncate(&self, end: u64) {
        self.set_end(end);
        let at = (end % PAGE_SIZE) as usize;
        if at != 0
            && let Some(folio) = self.lock(end / PAGE_SIZE)
        {
            folio.wait_writeback();
            folio.protect();
            folio.zero_from(at);
        }
        let beyond = end.div_ceil(PAGE_SIZE)..u64::MAX;
        self.discard(beyond.clone());
        if let Some(reverse) = self.reverse.get() {
            reverse.cut(beyond);
        }
    }

    /// Drops the clean pages of `range`, once their transfers have ended; returns false if any was dirty and stayed, or is
    /// pinned by the program itself for as long as that likes.
    pub fn invalidate(&self, range: Range<u64>) -> bool {
        let mut all = true;
        let mut going = Going::new(self);
        for page in self.cached_pages(range) {
            if let Some(folio) = self.lock(page) {
                folio.wait_writeback();
                if folio.is_dirty() || folio.is_kept() || self.was_stored_to(&folio) {
                    all = false;
                } else {
                    going.push(folio);
                }
            }
        }
        all
    }

    /// Zeroes bytes `from .. to` of a page if it is cached, making it dirty; false when it is not cached.
    pub fn zero_cached(self: &Arc<Self>, page: u64, from: usize, to: usize) -> bool {
        let Some(folio) = self.lock(page) else {
            return false;
        };
        folio.zero(from, to - from);
        folio.commit();
        self.note_dirty_file();
        true
    }

    /// Locks a cached page with no transfer of it under way: until it is unlocked none begins.
    #[must_use]
    pub fn lock_settled(&self, page: u64) -> Option<Folio<'_>> {
        let folio = self.lock(page)?;
        folio.wait_writeback();
        Some(folio)
    }

    /// Zeroes what a cached page holds past the file's end without making it dirty (INV7). Stores through mappings that
    /// come later wait for the lock: they are the new size's.
    pub fn zero_past_end(&self, end: u64) {
        let at = (end % PAGE_SIZE) as usize;
        if at != 0
            && let Some(folio) = self.lock(end / PAGE_SIZE)
        {
            folio.protect();
            folio.zero_from(at);
        }
    }

    /// Returns how many pages of `range` are cached and valid.
    #[must_use]
    pub fn resident(&self, range: Range<u64>) -> usize {
        self.cached_pages(range)
            .into_iter()
            .filter(|&page| {
                let key = self.key(page);
                self.cache.index.candidates(key.hash()).any(|frame| {
                    let header = self.cache.header(frame);
                    header.is(key) && header.state.load() & UPTODATE != 0
                })
            })
            .count()
    }
}
