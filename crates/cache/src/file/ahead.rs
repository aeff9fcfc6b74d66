//! Reading what nobody has asked for yet: windows ahead of a reader, what faults have asked for, what the program says it
//! will need.
//!
//! *Owns*: which transfers that makes, and the pages on their way with them.
//!
//! *Does not own*: when it is time ([`ReadAhead`](crate::ReadAhead), [`Walks`]).
//!
//! *Locking*: the gate's ADD by trying, while pages are inserted; they stay locked until their transfer ends.

use std::ops::Range;
use std::sync::Arc;

use pinfold_base::{PAGE_SIZE, Progress};
use pinfold_mem::Frame;
use pinfold_store::{StoreError, Transfer};
use smallvec::SmallVec;

use super::{FilePages, WINDOW_PAGES_MAX};
use crate::folio::Folio;
use crate::gate::AddGuard;
use crate::readahead::Walks;

/// Pages in one read transfer at most: 512 KiB keeps several in flight within a window.
const TRANSFER_PAGES_MAX: u64 = 128;
/// The share of the budget that [`FilePages::will_need`] brings at once, as a divisor.
const WILL_NEED_SHARE: usize = 2;

impl FilePages {
    /// Starts reading pages that are missing in `range`; waits for nothing, gives up where frames are short.
    pub fn read_ahead(self: &Arc<Self>, range: Range<u64>) {
        // A blocked gate means that the range is about to change: not worth waiting for.
        if let Some(gate) = self.gate.try_add() {
            self.start_ahead(range, &gate);
        }
    }

    /// Starts reading what is missing of a range that is wanted soon: in transfers as large as they come, all under way
    /// together; as much as half of the budget holds, or the first pages would make room for the last. What is
    /// there counts as used once more, so that a scan does not drive it out first.
    pub fn will_need(self: &Arc<Self>, range: Range<u64>) {
        let most = (self.cache.pages_max() / WILL_NEED_SHARE) as u64;
        let end = range.end.min(self.end().div_ceil(PAGE_SIZE));
        let end = end.min(range.start.saturating_add(most));
        let mut at = range.start;
        while at < end {
            // The device is at work on one part while room is made for the next.
            let part = at..end.min(at + WINDOW_PAGES_MAX);
            self.read_ahead(part.clone());
            for page in part.clone() {
                let key = self.key(page);
                let mut frames = self.cache.index.candidates(key.hash());
                if let Some(frame) = frames.find(|&frame| self.cache.header(frame).is(key)) {
                    self.cache.policy.touch(frame);
                }
            }
            at = part.end;
        }
    }

    /// Starts all reading that faults of a mapping have asked for ([`Walks::note`]).
    pub fn start_walks(self: &Arc<Self>, walks: &Walks) {
        // A blocked gate: as above.
        let Some(gate) = self.gate.try_add() else {
            return;
        };
        let mut batch = Vec::new();
        walks.start(self.window_max(), |range| {
            self.prepare_ahead(range, &mut batch, &gate);
        });
        if !batch.is_empty() {
            self.object.read(batch);
        }
    }

    pub(super) fn start_ahead(self: &Arc<Self>, range: Range<u64>, gate: &AddGuard<'_>) {
        let mut batch = Vec::new();
        self.prepare_ahead(range, &mut batch, gate);
        if !batch.is_empty() {
            self.object.read(batch);
        }
    }

    /// Adds the transfers that bring what is missing in `range`.
    fn prepare_ahead(
        self: &Arc<Self>,
        range: Range<u64>,
        batch: &mut Vec<Transfer>,
        _gate: &AddGuard<'_>,
    ) {
        if self.is_closed() {
            // Nobody asked for these pages, so nobody has seen to it that they may be cached.
            return;
        }
        let end = range.end.min(self.end().div_ceil(PAGE_SIZE));
        if self.homes.window().is_some() {
            // These pages are likely to be mapped, by threads that must not make room themselves.
            drop(self.dirty_roomy());
        }
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
