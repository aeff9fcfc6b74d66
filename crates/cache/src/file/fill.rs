//! Pages on their way from the store that somebody waits for.
//!
//! *Owns*: how missing pages are gathered into transfers, and what becomes of them when a transfer ends.
//!
//! *Does not own*: reading ahead (`ahead.rs`, `readahead.rs`); where the frames come from (`cache.rs`).
//!
//! *Locking*: pages are inserted locked, under the gate's ADD, and unlocked by whoever ends their transfer.

use std::sync::Arc;

use pinfold_base::{PAGE_SIZE, Progress};
use pinfold_mem::{Frame, Segments};
use pinfold_store::StoreError;
use smallvec::SmallVec;

use super::{FilePages, PAGE, Want};
use crate::CacheError;
use crate::folio::Folio;
use crate::gate::AddGuard;
use crate::lease::PageRef;
use crate::readahead::ReadAhead;

/// Pages a reader waits for in one transfer at most.
const SYNC_PAGES_MAX: u64 = 128;

impl FilePages {
    /// Reads a missing page, its request's followers and what is worth reading ahead; `None` when somebody else
    /// brought the page meanwhile.
    pub(super) fn fill(
        self: &Arc<Self>,
        page: u64,
        want: &Want<'_>,
    ) -> Result<Option<PageRef<'_>>, CacheError> {
        let limit = SYNC_PAGES_MAX.min(self.window_max().max(1));
        let pages = want.pages.clamp(1, limit);
        let gate = self.add()?;
        self.may_fill()?;
        let Some(folios) = self.insert_run(page, pages)? else {
            return Ok(None);
        };
        self.cache.counters.misses.bump();
        // What comes next is started before this thread waits, so that both are in flight together.
        if let Some(ahead) = want.ahead {
            let range = ahead.miss(page, pages.min(folios.len() as u64), self.window_max());
            self.start_ahead(range, &gate);
        }
        drop(gate);
        let segments = self.segments_of(page, folios.iter().map(Folio::frame));
        let outcome = self.object.read_wait(page * PAGE_SIZE, &segments);
        self.cache.counters.pages_read.add(folios.len() as u64);
        self.end_fill(folios, outcome).map(Some)
    }

    /// Reads a missing page as [`FilePages::read`] does, without allocating, and waiting for the store alone; returns it
    /// locked. `None` where that cannot be: somebody else brings it, pages are worth reading ahead, the store failed.
    pub(crate) fn fill_here(
        &self,
        page: u64,
        ahead: Option<&ReadAhead>,
        held: Option<&AddGuard<'_>>,
    ) -> Option<Folio<'_>> {
        if ahead.is_some_and(|ahead| ahead.follows(page)) {
            return None;
        }
        let gate = match held {
            None => Some(self.gate.try_add()?),
            Some(_) => None,
        };
        self.may_fill().ok()?;
        let frame = self.cache.try_take_frames(1).pop()?;
        let folio = self.insert(page, frame)?;
        drop(gate);
        let segments = self.segments_of(page, std::iter::once(folio.frame()));
        let outcome = self.object.read_here(page * PAGE_SIZE, &segments)?;
        self.cache.counters.misses.bump();
        self.cache.counters.pages_read.bump();
        if let Some(ahead) = ahead {
            // Nothing is worth it: this page follows no other.
            ahead.miss(page, 1, self.window_max());
        }
        self.settle_fill(&folio, 0, &outcome).then_some(folio)
    }

    /// Counts a use of a cached page by a fault.
    pub(crate) fn note_fault_hit(&self, folio: &Folio<'_>) {
        self.cache.counters.hits.bump();
        self.cache.policy.touch(folio.frame());
    }

    /// Unlocks pages a transfer filled; returns the first.
    fn end_fill(
        &self,
        folios: SmallVec<[Folio<'_>; 1]>,
        outcome: Progress<StoreError>,
    ) -> Result<PageRef<'_>, CacheError> {
        let mut first = None;
        for (i, folio) in folios.into_iter().enumerate() {
            if !self.settle_fill(&folio, i, &outcome) {
                // Dropped without contents: it leaves the cache.
                continue;
            }
            if i == 0 {
                let (page, frame) = (folio.page(), folio.frame());
                first = Some(PageRef::take_locked(self, page, frame));
            }
        }
        match (first, outcome.stop) {
            (Some(first), _) => Ok(first),
            (None, Some(error)) => Err(CacheError::Store(error)),
            (None, None) => Err(CacheError::NoFrames),
        }
    }

    /// Makes the `i`-th page of a finished transfer valid if its bytes came; what the store did not have is zeros.
    pub(super) fn settle_fill(
        &self,
        folio: &Folio<'_>,
        i: usize,
        outcome: &Progress<StoreError>,
    ) -> bool {
        let got = usize::try_from(outcome.done)
            .unwrap_or(usize::MAX)
            .saturating_sub(i * PAGE)
            .min(PAGE);
        if got < PAGE {
            if outcome.stop.is_some() {
                return false;
            }
            folio.zero_from(got);
        }
        folio.mark_uptodate();
        true
    }

    /// Lists the memory of neighbouring pages.
    pub(crate) fn segments_of(&self, start: u64, frames: impl Iterator<Item = Frame>) -> Segments {
        let mut segments = self.homes.segments();
        for (page, frame) in (start..).zip(frames) {
            self.homes.push(&mut segments, frame, page, 0, PAGE);
        }
        segments
    }

    /// Inserts up to `pages` locked pages from `page` on, up to the first that is there; `None` when `page` itself is.
    /// Waits for the first frame only.
    fn insert_run(
        &self,
        page: u64,
        pages: u64,
    ) -> Result<Option<SmallVec<[Folio<'_>; 1]>>, CacheError> {
        let end = self.end().div_ceil(PAGE_SIZE).max(page + 1);
        let pages = pages.min(end - page);
        let mut frames = self.cache.try_take_frames(pages as usize);
        if frames.is_empty() {
            frames.push(self.cache.take_frame()?);
        }
        let mut folios = SmallVec::new();
        let mut frames = frames.into_iter();
        for (at, frame) in (page..).zip(&mut frames) {
            match self.insert(at, frame) {
                Some(folio) => folios.push(folio),
                None => break,
            }
        }
        for spare in frames {
            self.cache.arena.free(spare);
        }
        Ok((!folios.is_empty()).then_some(folios))
    }
}
