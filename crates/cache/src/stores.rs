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
use crate::state::{DIRTY, UMAP_ASYNC, pins};

/// Pages asked about with one call at most.
pub(crate) const ASKED_MAX: usize = 64;
/// Pages that are looked at for nothing rather than with another call.
const GAP_MAX: u64 = 64;

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
        let mut pages = self.noted(Note::Tracked, range, usize::MAX);
        if how == Harvest::Try {
            self.leave_suspects(&mut pages);
        }
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

    /// Of pages in ascending order leaves those that seem to have been stored to, by a few looks at many pages. No answer for
    /// whoever relies on it: somebody else may have been told of a store and not have noted it yet.
    fn leave_suspects(&self, pages: &mut Vec<u64>) {
        let Some(reverse) = self.reverse.get() else {
            return;
        };
        let mut found = Found::new(pages.iter().copied());
        for near in pages.chunk_by(|a, b| b - a <= GAP_MAX) {
            let seen = near[0]..near[near.len() - 1] + 1;
            reverse.seem_stored(&seen, &mut |stored| found.add(stored));
        }
        let mut stored = found.stored.iter();
        pages.retain(|_| stored.next() == Some(&true));
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
        let mut found = Found::new(pages.clone());
        if withdraw {
            let runs = std::slice::from_ref(&pages);
            reverse.withdraw(runs, &mut |stored| found.add(stored));
        } else {
            reverse.stores(&pages, &mut |stored| found.add(stored));
        }
        // A mapping that is made now has installed nothing: that takes the locks held here.
        let nowhere = !reverse.tracks(&pages);
        let mut count = 0;
        for (folio, &stored) in run.iter().zip(&found.stored) {
            let state = &self.cache().header(folio.frame()).state;
            // No mapping shows it: at most one has, of older bytes.
            if state.load() & UMAP_ASYNC == 0 {
                continue;
            }
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

    /// Of a file's pages that are claimed for eviction, in order, puts those back that were stored to, and returns them. The
    /// others are in no shared mapping any more.
    ///
    /// Asks twice: before the entries go, so that a page in use keeps its entry, and after, which is the answer
    /// that counts. Between the two all the entries go at once: telling the other processors costs more than the rest.
    pub(crate) fn keep_stored(&self, claimed: &[Frame]) -> SmallVec<[Frame; ASKED_MAX]> {
        let cache = self.cache();
        let mut kept = SmallVec::new();
        let Some(reverse) = self.reverse.get() else {
            return kept;
        };
        let page_of = |&frame: &Frame| cache.header(frame).key().page;
        let mut found = Found::new(claimed.iter().map(page_of));
        for run in runs_of(claimed.iter().map(page_of)) {
            reverse.stores(&run, &mut |stored| found.add(stored));
        }
        reverse.withdraw(&found.others(), &mut |stored| found.add(stored));
        for (&frame, stored) in claimed.iter().zip(&found.stored) {
            let page = page_of(&frame);
            let state = &cache.header(frame).state;
            if state.load() & UMAP_ASYNC == 0 {
                continue;
            }
            if *stored {
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

/// Which of some pages, in ascending order, were found to be stored to.
struct Found {
    pages: SmallVec<[u64; ASKED_MAX]>,
    stored: SmallVec<[bool; ASKED_MAX]>,
}

impl Found {
    fn new(pages: impl Iterator<Item = u64>) -> Self {
        let pages: SmallVec<[u64; ASKED_MAX]> = pages.collect();
        Self {
            stored: smallvec![false; pages.len()],
            pages,
        }
    }

    fn add(&mut self, stored: Range<u64>) {
        let at = |end: u64| self.pages.partition_point(|&page| page < end);
        let (from, to) = (at(stored.start), at(stored.end));
        self.stored[from..to].fill(true);
    }

    /// Lists the runs of pages that were not found.
    fn others(&self) -> Runs {
        let pages = self.pages.iter().zip(&self.stored);
        runs_of(pages.filter(|(_, stored)| !**stored).map(|(&page, _)| page))
    }
}

/// Runs of neighbouring pages; as many as one eviction comes upon have room without allocating.
pub(crate) type Runs = SmallVec<[Range<u64>; ASKED_MAX]>;

/// Joins neighbours of an ascending list of pages.
pub(crate) fn runs_of(pages: impl Iterator<Item = u64>) -> Runs {
    let mut runs = Runs::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

#[cfg(all(test, loom))]
mod model;
