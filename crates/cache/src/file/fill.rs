//! Pages on their way from the store: those somebody waits for, and those that are read ahead.
//!
//! *Owns*: how missing pages are gathered into transfers, and what becomes of them when a transfer ends.
//!
//! *Does not own*: what is worth reading ahead (`readahead.rs`); where the frames come from (`cache.rs`).
//!
//! *Locking*: pages are inserted locked, under the gate's ADD, and unlocked by whoever ends their transfer.

use std::ops::Range;
use std::sync::Arc;

use pinfold_base::{PAGE_SIZE, Progress};
use pinfold_mem::{Frame, Segments};
use pinfold_store::{StoreError, Transfer};
use smallvec::SmallVec;

use super::{FilePages, PAGE, Want};
use crate::CacheError;
use crate::folio::Folio;
use crate::gate::AddGuard;
use crate::lease::PageRef;
use crate::readahead::ReadAhead;

/// Pages in one read transfer at most: 512 KiB keeps several in flight within a window.
const TRANSFER_PAGES_MAX: u64 = 128;
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

    /// Starts reading pages that are missing in `range`; waits for nothing, gives up where frames are short.
    pub fn read_ahead(self: &Arc<Self>, range: Range<u64>) {
        // A blocked gate means that the range is about to change: not worth waiting for.
        if let Some(gate) = self.gate.try_add() {
            self.start_ahead(range, &gate);
        }
    }

    fn start_ahead(self: &Arc<Self>, range: Range<u64>, _gate: &AddGuard<'_>) {
        let end = range.end.min(self.end().div_ceil(PAGE_SIZE));
        let mut batch = Vec::new();
        let mut page = range.start;
        while page < end {
            let mut folios: SmallVec<[Folio<'_>; 1]> = SmallVec::new();
            let run = (end - page).min(TRANSFER_PAGES_MAX);
            let mut frames = self.cache.try_take_frames(run as usize).into_iter();
            for at in page..page + run {
                let Some(frame) = frames.next() else {
                    break;
                };
                match self.insert(at, frame) {
                    Some(folio) => folios.push(folio),
                    None => break,
                }
            }
            let short = frames.len() == 0 && (folios.len() as u64) < run;
            for spare in frames {
                self.cache.arena.free(spare);
            }
            let start = page;
            // The page that was there already is skipped as well.
            page += folios.len() as u64 + u64::from((folios.len() as u64) < run);
            if !folios.is_empty() {
                batch.push(self.transfer_ahead(start, folios));
            }
            if short {
                break;
            }
        }
        if !batch.is_empty() {
            self.object.read(batch);
        }
    }

    fn transfer_ahead(self: &Arc<Self>, start: u64, folios: SmallVec<[Folio<'_>; 1]>) -> Transfer {
        let counters = &self.cache.counters;
        counters.pages_read.add(folios.len() as u64);
        counters.pages_read_ahead.add(folios.len() as u64);
        let frames: Vec<Frame> = folios.into_iter().map(Folio::into_frame).collect();
        let segments = self.segments_of(start, frames.iter().copied());
        let filling = Filling {
            file: Arc::clone(self),
            start,
            frames,
        };
        Transfer {
            offset: start * PAGE_SIZE,
            segments,
            done: Box::new(move |outcome| filling.end(&outcome)),
        }
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

/// Locked pages on their way from the store, whose thread has gone on. Dropped before the transfer has told its end, as by a
/// store that panics, they leave the cache, and nobody waits for them for ever.
struct Filling {
    file: Arc<FilePages>,
    start: u64,
    frames: Vec<Frame>,
}

impl Filling {
    fn end(mut self, outcome: &Progress<StoreError>) {
        for (i, frame) in std::mem::take(&mut self.frames).into_iter().enumerate() {
            let folio = Folio::adopt(&self.file, self.start + i as u64, frame);
            // An error of a page nobody asked for is nobody's: who asks reads it himself.
            self.file.settle_fill(&folio, i, outcome);
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        for (page, &frame) in (self.start..).zip(&self.frames) {
            drop(Folio::adopt(&self.file, page, frame));
        }
    }
}
