//! Stores that nobody was told of: found by asking the kernel (docs/decisions/0007-dirty-tracking.md).
//!
//! In a tracked mapping the first store to a page that is mapped for reading makes no fault. The kernel lets it pass and
//! takes the page's protection away; who wants to know scans for pages without protection.
//!
//! *Owns*: when is asked, and the order of steps that loses no store. A page that such a mapping shows has [`UMAP_ASYNC`] in
//! its state and is listed, both under its lock and before the entry is there. Clean then means: clean as far as known.
//!
//! ```text
//!  who wants to                 does, with the page's lock held
//!  know what is dirty           scan and protect; what was stored to is dirty
//!  store what is dirty          protect, clean, read the bytes
//!  drop what is clean           drop the entry; scan; only a page not stored to goes
//! ```
//! The last works because an entry that is dropped while it is protected leaves a mark, and one that was stored to
//! leaves none; and no entry comes back without the page's lock.
//!
//! *Does not own*: the scan (`pinfold-fault` by [`ReverseMap`](crate::ReverseMap)), which mappings are tracked.
//!
//! *Locking*: locks folios, neighbours in ascending order, of which all but the first by trying; the scan is a leaf.

use std::ops::Range;

use pinfold_mem::Frame;
use smallvec::{SmallVec, smallvec};

use crate::cache::Cache;
use crate::dirty::Note;
use crate::file::{Attempt, FilePages};
use crate::folio::Folio;
use crate::room::RECLAIM_BATCH;
use crate::state::{DIRTY, UMAP_ASYNC, pins};

/// Pages asked about with one call at most.
const ASKED_MAX: usize = 64;

/// How thorough a harvest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harvest {
    /// Passes by pages that others have locked.
    Try,
    /// Every store that came before is known when it returns.
    Wait,
    /// The same; and no store comes without notice until a page is mapped again, which the gate keeps off. Pinned pages are
    /// only asked about.
    Withdraw,
}

impl FilePages {
    /// Makes pages of `range` dirty that were stored to without notice. Nothing may be held but classes 1 to 4.
    pub fn harvest(&self, range: Range<u64>, how: Harvest) {
        let pages = self.noted(Note::Tracked, range, usize::MAX);
        let mut rest = &pages[..];
        while let Some((&first, others)) = rest.split_first() {
            let folio = match how {
                Harvest::Try => self.lock_if_free(first),
                Harvest::Wait | Harvest::Withdraw => self.lock(first),
            };
            let Some(folio) = folio else {
                // Gone, and its stores with it: whoever dropped it has asked before.
                rest = others;
                continue;
            };
            // What the program has pinned keeps its entries; what counts on their absence does not drop pinned pages.
            let withdraws =
                |folio: &Folio<'_>| how == Harvest::Withdraw && pins(folio.state()) == 0;
            let withdraw = withdraws(&folio);
            let mut run: SmallVec<[Folio<'_>; 1]> = smallvec![folio];
            for (next, &page) in (first + 1..).zip(others).take(ASKED_MAX - 1) {
                match (page == next).then(|| self.lock_if_free(page)).flatten() {
                    Some(folio) if withdraws(&folio) == withdraw => run.push(folio),
                    _ => break,
                }
            }
            self.look_for_stores(&run, withdraw);
            rest = &rest[run.len()..];
        }
    }

    /// Tells whether pages may be stored to without notice, now or as soon as they are mapped.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        let reverse = self.reverse.get();
        reverse.is_some_and(|reverse| reverse.tracks(&(0..u64::MAX)))
    }

    fn lock_if_free(&self, page: u64) -> Option<Folio<'_>> {
        match self.try_lock(page) {
            Attempt::Locked(folio) => Some(folio),
            Attempt::Busy(_) | Attempt::Gone => None,
        }
    }

    /// Strikes a locked page off the list of those that may be stored to without notice.
    pub(crate) fn untrack(&self, page: u64) {
        self.dirty().pages.remove(Note::Tracked, page);
    }

    /// Makes those of neighbouring locked pages dirty that were stored to without notice. With `withdraw` they are in no
    /// mapping afterwards where that could happen.
    pub(crate) fn look_for_stores(&self, run: &[Folio<'_>], withdraw: bool) {
        let (Some(first), Some(last), Some(reverse)) =
            (run.first(), run.last(), self.reverse.get())
        else {
            return;
        };
        let pages = first.page()..last.page() + 1;
        let mut found = Found::new(&pages);
        if withdraw {
            reverse.withdraw(&pages, &mut |stored| found.add(stored));
        } else {
            reverse.stores(&pages, &mut |stored| found.add(stored));
        }
        // A mapping that is made now has installed nothing: that takes the locks held here.
        let nowhere = !reverse.tracks(&pages);
        let mut count = 0;
        for folio in run {
            let state = &self.cache().header(folio.frame()).state;
            // A page that has no entry counts as stored to: what tells is that it never had one.
            if state.load() & UMAP_ASYNC == 0 {
                continue;
            }
            let stored = found.has(folio.page());
            if stored {
                self.make_dirty(folio);
                count += 1;
            }
            // One that was found may still have its entry: where it could not be taken away, that is the answer.
            if nowhere || (withdraw && !stored) {
                state.clear(UMAP_ASYNC);
                self.untrack(folio.page());
            }
        }
        self.note_stores(count);
    }

    /// Tells whether a locked, clean page was stored to without notice; it is dirty then. Otherwise nobody will.
    pub(crate) fn was_stored_to(&self, folio: &Folio<'_>) -> bool {
        if folio.state() & UMAP_ASYNC == 0 {
            return false;
        }
        self.look_for_stores(std::slice::from_ref(folio), true);
        folio.is_dirty()
    }

    /// Of neighbouring pages that are claimed for eviction, puts those back that were stored to, and returns them. The
    /// others are in no mapping any more where they could be.
    ///
    /// Asks twice: before the entries go, so that a page in use keeps its entry, and after, which is the answer
    /// that counts.
    pub(crate) fn keep_stored(&self, run: &[Frame]) -> SmallVec<[Frame; RECLAIM_BATCH]> {
        let cache = self.cache();
        let mut kept = SmallVec::new();
        let (Some(&first), Some(reverse)) = (run.first(), self.reverse.get()) else {
            return kept;
        };
        let start = cache.header(first).key().page;
        let pages = start..start + run.len() as u64;
        let mut found = Found::new(&pages);
        reverse.stores(&pages, &mut |stored| found.add(stored));
        let mut at = start;
        while let Some(clean) = found.gap_after(at) {
            reverse.withdraw(&clean, &mut |stored| found.add(stored));
            at = clean.end;
        }
        for (page, &frame) in (start..).zip(run) {
            let state = &cache.header(frame).state;
            if state.load() & UMAP_ASYNC == 0 {
                continue;
            }
            if found.has(page) {
                self.note_dirty(page, frame);
                cache.keep(frame, DIRTY);
                kept.push(frame);
            } else {
                state.clear(UMAP_ASYNC);
                self.untrack(page);
            }
        }
        self.note_stores(kept.len());
        kept
    }

    fn note_stores(&self, count: usize) {
        if count > 0 {
            self.cache().counters.stores_found.add(count as u64);
            self.note_found_stores();
        }
    }
}

impl Cache {
    /// Makes known what was stored to without notice, as far as nobody has to be waited for.
    pub(crate) fn harvest_all(&self) {
        for file in self.dirty_files() {
            file.harvest(0..u64::MAX, Harvest::Try);
        }
    }
}

/// Which of a run of pages were found to be stored to.
struct Found {
    start: u64,
    stored: SmallVec<[bool; ASKED_MAX]>,
}

impl Found {
    fn new(pages: &Range<u64>) -> Self {
        Self {
            start: pages.start,
            stored: smallvec![false; (pages.end - pages.start) as usize],
        }
    }

    fn add(&mut self, pages: Range<u64>) {
        let end = self.start + self.stored.len() as u64;
        for page in pages.start.max(self.start)..pages.end.min(end) {
            self.stored[(page - self.start) as usize] = true;
        }
    }

    fn has(&self, page: u64) -> bool {
        self.stored[(page - self.start) as usize]
    }

    /// Returns the first run of pages at or after `page` that were not found.
    fn gap_after(&self, page: u64) -> Option<Range<u64>> {
        let from = (page - self.start) as usize;
        let stored = self.stored.get(from..)?;
        let first = from + stored.iter().position(|stored| !stored)?;
        let len = self.stored[first..]
            .iter()
            .take_while(|stored| !**stored)
            .count();
        let start = self.start + first as u64;
        Some(start..start + len as u64)
    }
}

#[cfg(all(test, loom))]
mod model;
