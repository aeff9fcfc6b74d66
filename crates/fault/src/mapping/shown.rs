//! What a tracked mapping has shown, and what was stored to it without notice (docs/decisions/0007-dirty-tracking.md).
//!
//! *Owns*: the record of pages that have had an entry here, and the questions to the page tables.
//!
//! *Does not own*: when is asked, and what becomes of the answer (`cache::stores`).
//!
//! *Locking*: a page's bit changes with its folio locked, or while nothing can be installed there (`live`). The scan is a leaf.
//!
//! A place without an entry and without a mark counts as stored to: its entry may have been dropped, by the program or the
//! system, after a store. Where there never was one it says nothing, and that is what the record tells apart.
//!
//! ```text
//!  not shown ──install──► shown ──withdrawn by the library, and asked──► not shown
//!                           └──dropped by anybody else──► shown: the next fault has to ask
//! ```

use std::ops::Range;

use pinfold_base::Errno;
use pinfold_cache::Harvest;
use pinfold_mem::uffd::{ScanFor, scan};
use pinfold_mem::{PageBits, UserMap, UserMapKind};

use super::{PAGE, UserMapping};
use crate::channel::Channel;

/// The pages of one mapping that have, or had, an entry in its page tables.
#[derive(Debug)]
pub(super) struct Shown {
    bits: PageBits,
    /// The first page of the mapping, which has the first bit.
    first: u64,
}

impl Shown {
    /// Returns the record of a mapping that is about to be made, if it needs one.
    pub(super) fn of(map: &UserMap, channel: &Channel) -> Result<Option<Self>, Errno> {
        if !is_tracked(map, channel) {
            return Ok(None);
        }
        let pages = map.pages();
        Ok(Some(Self {
            bits: PageBits::new(pages.end - pages.start)?,
            first: pages.start,
        }))
    }

    /// Makes room for pages up to `end`.
    pub(super) fn ensure(&self, end: u64) -> Result<(), Errno> {
        self.bits.ensure(end.saturating_sub(self.first))
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        self.bits.contains(page - self.first)
    }

    pub(super) fn insert(&self, pages: Range<u64>) {
        self.bits.insert(self.offsets(&pages));
    }

    pub(super) fn remove(&self, pages: &Range<u64>) {
        self.bits.remove(self.offsets(pages));
    }

    /// Tells `found` the part of `pages` that was shown.
    fn of_these(&self, pages: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        let first = self.first;
        self.bits.runs(self.offsets(pages), |run| {
            found(first + run.start..first + run.end)
        });
    }

    fn bounds(&self, pages: &Range<u64>) -> Option<Range<u64>> {
        let bounds = self.bits.bounds(self.offsets(pages))?;
        Some(self.first + bounds.start..self.first + bounds.end)
    }

    fn offsets(&self, pages: &Range<u64>) -> Range<u64> {
        pages.start.saturating_sub(self.first)..pages.end.saturating_sub(self.first)
    }
}

fn is_tracked(map: &UserMap, channel: &Channel) -> bool {
    map.kind() == UserMapKind::SharedWrite && channel.uffd().wp_async()
}

impl UserMapping {
    /// Tells whether first stores come without a fault and are found by looking for them.
    #[must_use]
    pub fn is_tracked(&self) -> bool {
        self.shown.is_some()
    }

    /// Makes the file know of stores to pages that are about to lose their entries. Nothing is held.
    pub(crate) fn find_stores(&self, pages: &Range<u64>) {
        if self.is_tracked() {
            self.pages().harvest(pages.clone(), Harvest::Wait);
        }
    }

    /// Tells which pages were stored to since this was asked last or they were protected, and protects them again.
    pub(crate) fn stores(&self, pages: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        self.look(pages, ScanFor::WrittenAndProtect, found);
    }

    /// The same, and protects nothing.
    pub(crate) fn seem_stored(&self, pages: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) {
        self.look(pages, ScanFor::Written, found);
    }

    /// As [`UserMapping::stores`] after access to runs of pages was taken away. Their locks are held.
    pub(crate) fn withdraw(&self, runs: &[Range<u64>], found: &mut dyn FnMut(Range<u64>)) {
        let mut refused = false;
        self.unmap_runs(runs, &mut |run| {
            // The program's own doing: then stores go on, and the pages stay.
            refused = true;
            found(run);
        });
        if let Some(shown) = self.shown.as_ref().filter(|_| !refused) {
            for run in runs {
                self.stores(run, found);
                // In this order: what was shown is what is looked at.
                shown.remove(run);
            }
        }
    }

    /// Asks the page tables about those of the pages that were shown.
    fn look(&self, pages: &Range<u64>, what: ScanFor, found: &mut dyn FnMut(Range<u64>)) {
        let Some(shown) = &self.shown else {
            return;
        };
        let Some(bounds) = shown.bounds(pages) else {
            return;
        };
        self.each_live(&bounds, |addr, len| {
            let mut stored =
                |run: Range<usize>| shown.of_these(&self.pages_at(run.start, run.len()), found);
            if scan(addr..addr + len, what, &mut stored).is_err() {
                // Whatever it did not say may be so.
                stored(addr..addr + len);
            }
        });
    }

    /// Returns the pages that a part of the address range shows.
    fn pages_at(&self, addr: usize, len: usize) -> Range<u64> {
        let first = self.map.pages().start + ((addr - self.map.addr()) / PAGE) as u64;
        first..first + (len / PAGE) as u64
    }

    /// Notes pages that were just installed. Their locks are held since before: nobody looks for stores in between.
    pub(super) fn note_shown(&self, pages: Range<u64>) {
        if let Some(shown) = &self.shown {
            shown.insert(pages);
        }
    }
}
